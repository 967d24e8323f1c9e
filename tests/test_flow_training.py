"""Trainings along a rectified flow: what they leave, resume and refuse, and that a bridge's adapter is an ordinary one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.diffusion.bridge import Bridge
from library.diffusion.rectified_flow import RectifiedFlow
from library.diffusion.scheduler_config import parametrisation_of
from library.files import read_json, write_json
from library.inference.denoiser import GuidedDenoiser
from library.inference.prompt_encoding import EncodedPart
from library.inference.sampler_noise import initial_noise
from library.inference.sampler_run import run_sampler
from library.inference.samplers import SAMPLERS, no_noise
from library.inference.sigmas import noise_levels
from library.models.conditioning import Conditioning
from library.models.load import load_scheduler_config
from library.training.stop import STOP
from networks.families import SD15, UNET
from tests.test_network_resume import assert_same_end
from tests.tools.generating import run as generate
from tests.tools.infotext import read_png
from tests.tools.network_runs import EXACT, Built, NetworkSetting, adapter, asked, losses, metadata, rows

NATIVE = {"flow_mode": "native", "flow_recipe": "lune"}
BRIDGE = {"flow_model": ""}


@pytest.fixture(scope="module")
def plain(network_setting: NetworkSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain")
    assert network_setting.train(output, **network_setting.quick) == 0
    return output


@pytest.fixture(scope="module")
def bridged(network_setting: NetworkSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bridged")
    assert network_setting.train(output, **network_setting.quick, **BRIDGE, timestep_sampling="shift") == 0
    return output


@pytest.fixture(scope="module")
def native(network_setting: NetworkSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("native")
    assert network_setting.train(output, **network_setting.quick, **NATIVE) == 0
    return output


@pytest.fixture
def flow_base(tiny_sd15: Path, tmp_path: Path) -> Path:
    """The tiny base, whose files say that it is a flow model."""
    folder = tmp_path / "flow_base"
    shutil.copytree(tiny_sd15, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.unlink()
    write_json(path, {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
    return folder


def test_a_bridge_leaves_an_ordinary_adapter_that_says_how_it_was_trained(plain: Path, bridged: Path) -> None:
    one, other = adapter(plain / "mio.safetensors"), adapter(bridged / "mio.safetensors")
    assert one.keys() == other.keys() and any(not torch.equal(one[key], other[key]) for key in one)
    before, after = metadata(plain / "mio.safetensors"), metadata(bridged / "mio.safetensors")
    assert after["modelspec.prediction_type"] == "epsilon" and "modelspec.usage_hint" not in after
    assert after["ss_flow_mode"] == "bridge" and after["ss_timestep_sampling"] == "shift"
    assert after["ss_discrete_flow_shift"] == "2.5"
    low, high = json.loads(after["ss_flow_sigma_range"])
    assert low == 0 and high == pytest.approx(0.93596, abs=1e-4)
    assert not any(key.startswith("ss_flow") for key in before), "nothing of an ordinary run changes"
    assert {key for key in after.keys() - before.keys() if not key.startswith(("ss_flow", "ss_discrete_flow"))} <= {
        "ss_timestep_sampling", "ss_sigmoid_scale", "ss_weighting_scheme", "ss_logit_mean", "ss_logit_std", "ss_mode_scale",
    }  # fmt: skip


def test_a_native_adapter_says_what_it_is_and_which_node_draws_with_it(native: Path) -> None:
    said = metadata(native / "mio.safetensors")
    assert said["modelspec.prediction_type"] == "flow" and said["ss_flow_mode"] == "native"
    assert "ModelSamplingSD3" in said["modelspec.usage_hint"] and "shift 2.0" in said["modelspec.usage_hint"]


@pytest.mark.bits
def test_a_flow_training_resumes_to_the_bit(network_setting: NetworkSetting, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mode = {**NATIVE, "timestep_sampling": "mode"}
    options = {**EXACT, **network_setting.quick, **mode, "caption_dropout_rate": None, "shuffle_caption": None}
    assert network_setting.train(whole, **options) == 0
    parts.mkdir()
    with asked(2, STOP, parts):
        assert network_setting.train(parts, **options) == 75
    assert network_setting.train(parts, **options) == 0
    assert_same_end(whole, parts)
    assert all(torch.tensor(losses(whole)).isfinite())


def test_a_base_whose_files_say_flow_is_trained_and_validated_as_one(
    flow_base: Path, network_setting: NetworkSetting, tmp_path: Path
) -> None:
    options = network_setting.quick | {"pretrained_model_name_or_path": flow_base}
    assert network_setting.train(tmp_path / "out", **options, validation_split=0.4, validate_every_n_steps=1) == 0
    assert metadata(tmp_path / "out" / "mio.safetensors")["ss_flow_mode"] == "native"
    assert all(row["val/loss"] > 0 for row in rows(tmp_path / "out", "val/loss"))


def test_heads_are_aligned_on_a_flow(network_setting: NetworkSetting, tiny_dinov2: Path) -> None:
    options = {
        "alignment": "", "dino_model": tiny_dinov2, "dino_resolution": 56, "token_grid": 4, "align_warmup_steps": 0,
    }  # fmt: skip
    built = network_setting.build(**options, **NATIVE).stir()
    assert isinstance(built.task.objective.parametrisation, RectifiedFlow)
    parts = built.task.losses(built.batch(), torch.Generator().manual_seed(0), 5)
    assert parts["token"] > 0 and parts["loss"].isfinite()
    parts["loss"].backward()
    grown = [name for name, one in built.task.models[UNET].named_parameters() if one.grad is not None]
    assert grown and all("lora" in name for name in grown), "gradients in the adapters alone"
    built.close()


def test_a_bridged_drawing_is_the_drawing_of_the_plain_path(network_setting: NetworkSetting) -> None:
    """Euler's steps along the flow and DDIM's, with an adapter and guidance, from the same noise over the same levels."""
    built = network_setting.build(**network_setting.quick, **BRIDGE).stir(0.02)
    path = built.task.objective.parametrisation
    assert isinstance(path, Bridge)
    levels = noise_levels("DDIM", 8, path.process.levels, SD15)
    noise = initial_noise(0, (4, 8, 8))
    plain = drawn(built, path.process, noise * levels[0], levels) / path.process.inverse_scale(float(levels[-1]))
    sigmas = levels / (1 + levels)
    along = drawn(built, path, noise * sigmas[0], sigmas)
    along = along / path.inverse_scale(float(sigmas[-1]))
    error = (along - plain).square().mean() / (plain.max() - plain.min()).square()
    assert -10 * torch.log10(error).item() > 80
    built.close()


def drawn(built: Built, process, x, levels):  # type: ignore[no-untyped-def]
    unet = built.task.models[UNET].eval()
    text = torch.randn(2, 1, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    positive, negative = (EncodedPart(1.0, (1,), (Conditioning(states, None),)) for states in text)
    denoiser = GuidedDenoiser(unet, process, [positive], negative, cfg_scale=7.5)
    return run_sampler(SAMPLERS["Euler"], denoiser, x.float(), levels, no_noise, process)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--discrete_flow_shift 2", "discrete_flow_shift has no effect: .* is no flow model by its files. Add --flow_model"),
        ("--flow_model --discrete_flow_shift 0", "discrete_flow_shift must be positive, got 0.0"),
        ("--flow_model --discrete_flow_shift -1", "discrete_flow_shift must be positive, got -1.0"),
        ("--flow_model --discrete_flow_shift 2 --flow_shift_by_resolution", "A shift would be applied twice"),
        (
            "--flow_model --timestep_sampling logit_normal --logit_mean 1 --discrete_flow_shift 2",
            "logit_mean 1.0 is a shift of 2.72 already, beside discrete_flow_shift 2.0",
        ),
        (
            "--flow_model --discrete_flow_shift 2 --flow_uniform_static_ratio 2.5",
            "--flow_uniform_static_ratio is --discrete_flow_shift by another name, and both are given",
        ),
        ("--flow_model --timestep_sampling uniform --weighting_scheme mode", "is a density, and timestep_sampling uniform"),
        ("--flow_model --logit_std 2", "logit_std has no effect with a uniform density"),
        ("--flow_model --timestep_sampling mode --mode_scale 1.8", "mode_scale must lie between -1 and 1.7519, got 1.8"),
        ("--flow_model --zero_terminal_snr", "zero_terminal_snr rescales a schedule of betas"),
        ("--flow_mode native --v_parameterization", "v_parameterization says that the base predicts v"),
        ("--flow_model --objective v", "objective v compares something else than a flow does"),
        ("--flow_model --flow_sigma_max 1", "flow_sigma_max 1.0 reaches beyond .* trained up to sigma 0.9360"),
        ("--flow_model --flow_sigma_min 0.6 --flow_sigma_max 0.5", "flow_sigma_min 0.6 is not below flow_sigma_max 0.5"),
        ("--flow_model --v_pred_like_loss 0.5", "v_pred_like_loss weights a loss on noise or v"),
        ("--show_timesteps console", "show_timesteps has no effect"),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_sentence_before_anything_slow(
    options: str, said: str, network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert network_setting.train(tmp_path / "out", *options.split(), **network_setting.quick) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, error), error
    assert not list(tmp_path.glob("out/*"))


def test_noise_that_a_flow_does_not_end_in_is_warned_of(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_forecast: None
) -> None:
    words = ["--noise_offset", "0.05", "--dry_run"]
    assert network_setting.train(tmp_path / "out", *words, **network_setting.quick, **BRIDGE) == 0
    assert "warning: noise_offset changes the noise that a flow ends in" in capsys.readouterr().out


def test_adapters_of_the_other_kind_are_refused_by_name(
    plain: Path, native: Path, bridged: Path, flow_base: Path, network_setting: NetworkSetting, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], no_forecast: None
) -> None:  # fmt: skip
    quick, file = network_setting.quick, "mio.safetensors"
    flow = {"pretrained_model_name_or_path": flow_base}
    assert network_setting.train(tmp_path / "a", **quick, network_weights=native / file) == 2
    assert "was trained on a flow model, and" in (said := capsys.readouterr().err) and "--flow_mode native" in said
    assert network_setting.train(tmp_path / "a", "--dry_run", **quick | flow, network_weights=bridged / file) == 2
    assert "was trained on a base that predicts epsilon" in capsys.readouterr().err
    assert network_setting.train(tmp_path / "a", "--dry_run", **quick | flow, network_weights=native / file) == 0


def test_the_histogram_shows_what_is_drawn(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**network_setting.quick, **BRIDGE, "timestep_sampling": "logit_normal"}
    assert network_setting.train(tmp_path / "out", **options, show_timesteps="console") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] == "0."]
    shares = {line[0]: float(line[2].rstrip("%")) for line in lines}
    assert len(shares) == 20 and sum(shares.values()) == pytest.approx(100, abs=0.2)
    assert shares["0.45-0.50"] > 2.5 * shares["0.10-0.15"] and shares["0.95-1.00"] == 0
    assert network_setting.train(tmp_path / "out", **options, show_timesteps="image") == 0
    with Image.open(tmp_path / "out" / "timesteps.png") as picture:
        assert len(picture.getcolors(10_000)) > 2


# ------------------------------------------------------------------------------------------------------- drawing


def test_a_flow_base_is_found_said_drawn_with_its_shift_and_written_into_the_picture(
    flow_base: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, file = tmp_path / "x.png", native / "mio.safetensors"
    words = ["--pretrained_model_name_or_path", flow_base, "--lora", file, "--images", 1, "--output", output]
    assert generate(*words) == 0
    said = capsys.readouterr().out
    assert "(a rectified flow), drawn along a rectified flow with shift 3" in said
    info = read_png(output)
    assert (info.schedule, info.other["Flow shift"], info.other["Prediction type"]) == ("Normal", "3", "flow")
    for sampler in ("Heun", "UniPC"):
        assert generate(*words, "--sampler", sampler, "--steps", 2, "--flow_shift", 2) == 0
    assert generate(*words, "--hires_scale", 2, "--latent_multiplier", 0.9) == 0
    assert generate(*words, "--init_image", output, "--denoising_strength", 0.5, "--steps", 2) == 0
    assert read_png(output).other["Flow shift"] == "3"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sampler DPM2", "The sampler DPM2 steps in the logarithm of the level"),
        ("--schedule ays", "The schedule Align Your Steps 11 has the levels of SD's own noise schedules"),
        ("--sampler 'DPM++ 2M Karras'", "The schedule Karras has the levels"),
        ("--flow_shift 0", "flow_shift must be positive, got 0.0"),
        ("--lora PLAIN", "was trained on a base that predicts epsilon, and"),
        ("--refiner tiny-sd15", "A refiner takes over between levels of SD's own schedule"),
    ],
)
def test_what_flow_does_not_have_is_refused_before_anything_is_loaded(
    words: str, said: str, flow_base: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = shlex.split(words.replace("PLAIN", str(plain / "mio.safetensors")))
    assert generate("--pretrained_model_name_or_path", flow_base, "--output", tmp_path / "x.png", *given) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.glob("*.png"))


def test_any_base_is_drawn_along_a_flow_by_a_shift_of_the_command_line_or_of_a_prompt(
    tiny_sd15: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = ["--pretrained_model_name_or_path", tiny_sd15], tmp_path / "x.png"
    (tmp_path / "p.txt").write_text("a red square --fs 2.5 --s 2\n")
    assert generate(*base, "--prompt_file", tmp_path / "p.txt", "--output", output, prompt=None) == 0
    assert "(predicts noise), drawn along a rectified flow with shift 2.5" in capsys.readouterr().out
    info = read_png(output)
    assert info.other["Flow shift"] == "2.5" and "Prediction type" not in info.other
    assert generate(*base, "--lora", native / "mio.safetensors", "--output", output) == 2
    assert "was trained on a flow model" in (said := capsys.readouterr().err) and "--prediction_type flow_pred" in said
    more = ["--prediction_type", "flow_prediction", "--images", 1, "--output", output]
    assert generate(*base, "--lora", native / "mio.safetensors", *more) == 0


def test_pictures_drawn_while_training_follow_the_flow(network_setting: NetworkSetting, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\na cat --w 64 --h 64 --s 2 --d 1 --fs 6\n")
    options = {**network_setting.quick, **NATIVE, "max_train_epochs": None, "max_train_steps": 1}
    assert network_setting.train(tmp_path / "out", **options, sample_prompts=tmp_path / "p.txt") == 0
    shifts = [read_png(path).other["Flow shift"] for path in sorted((tmp_path / "out" / "sample").iterdir())]
    assert shifts == ["2", "6"]


# ------------------------------------------------------------------------------------------------------- merging


def test_a_merged_flow_model_says_what_it_is_in_every_form(
    native: Path, bridged: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers draws with the folder as it is, and the single file is found to be a flow with its shift."""
    import diffusers

    import merge_lora

    out, file = tmp_path / "merged", str(native / "mio.safetensors")
    words = ["--models", file, "--pretrained_model_name_or_path", str(tiny_sd15), "--output_dir", str(out)]
    assert merge_lora.main(words) == 2
    assert "was trained on a flow model" in (said := capsys.readouterr().err) and "--prediction_type flow_pred" in said
    assert merge_lora.main([*words, "--prediction_type", "flow_prediction", "--save_single_file"]) == 0
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert pipeline.scheduler.config.use_flow_sigmas and type(pipeline.scheduler).__name__.startswith("DPMSolverMulti")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", height=64, width=64, num_inference_steps=2).images[0].size == (64, 64)
    whole = metadata(out / "model.safetensors")
    assert whole["modelspec.prediction_type"] == "flow" and "ModelSamplingSD3" in whole["modelspec.usage_hint"]
    for base in (out, out / "model.safetensors"):
        assert isinstance(parametrisation_of(load_scheduler_config(str(base))), RectifiedFlow)
    written = read_json(out / "scheduler" / "scheduler_config.json")
    flow_match = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow_match))
    again = ["--models", file, "--pretrained_model_name_or_path", str(out), "--output_dir", str(tmp_path / "other")]
    assert merge_lora.main(again) == 0
    assert read_json(tmp_path / "other" / "scheduler" / "scheduler_config.json") == written | {"flow_shift": 3.0}
    assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "other", safety_checker=None).scheduler
    more = ["--pretrained_model_name_or_path", str(out), "--output_dir", str(tmp_path / "again")]
    assert merge_lora.main(["--models", str(bridged / "mio.safetensors"), *more]) == 2
    assert "was trained on a base that predicts epsilon" in capsys.readouterr().err


def test_a_sum_of_flow_adapters_is_one_and_of_both_kinds_is_refused(
    native: Path, bridged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import merge_lora

    flow, other, out = native / "mio.safetensors", bridged / "mio.safetensors", tmp_path / "sum.safetensors"
    words = ["--lora_only", "--save_to", str(out), "--models", str(flow)]
    assert merge_lora.main([*words, str(other)]) == 2
    assert "on a base that predicts epsilon: a sum fits neither" in capsys.readouterr().err
    shutil.copyfile(flow, tmp_path / "copy.safetensors")
    assert merge_lora.main([*words, str(tmp_path / "copy.safetensors")]) == 0
    said = metadata(out)
    assert said["modelspec.prediction_type"] == "flow" and said["ss_flow_mode"] == "native"


def test_a_student_that_was_saved_alone_becomes_a_whole_flow_model(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.models.load import load_unet
    from tools.student_to_model import main

    weights = {name: value + 1 for name, value in load_unet(str(tiny_sd15)).state_dict().items()}
    torch.save({"student": weights, "config": {"shift": 2.0}}, tmp_path / "lune.pt")
    words = ["--base", str(tiny_sd15), "--output_dir", str(tmp_path / "lune"), "--flow_shift", "2"]
    assert main([str(tmp_path / "lune.pt"), *words]) == 0
    found = load_unet(str(tmp_path / "lune")).state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    path = parametrisation_of(load_scheduler_config(str(tmp_path / "lune")))
    assert isinstance(path, RectifiedFlow) and path.shift == 2
    torch.save({"student": {"conv_in.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    torch.save({"student": Path("x")}, tmp_path / "code.pt")
    for name, said in (("other", "do not agree (first: conv_in.bias"), ("code", "holds more than tensors and numbers")):
        words = ["--base", str(tiny_sd15), "--output_dir", str(tmp_path / name)]
        assert main([str(tmp_path / f"{name}.pt"), *words]) == 2
        assert said in capsys.readouterr().err
