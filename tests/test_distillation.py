"""What a flow learns of a teacher's latents: the way from fresh noise, from their own noise, or what the bridged base says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.diffusion.bridge import Bridge
from library.diffusion.noise import Draw
from library.diffusion.rectified_flow import RectifiedFlow
from library.files import write_json
from library.inference.denoiser import GuidedDenoiser
from library.inference.prompt_encoding import EncodedPart
from library.inference.sampler_run import run_sampler
from library.inference.samplers import SAMPLERS, no_noise
from library.inference.sigmas import noise_levels
from library.models.conditioning import Conditioning
from library.models.locate import locate_base
from library.training.stop import STOP
from networks.families import SD15, UNET
from tests.test_network_resume import assert_same_end
from tests.tools.network_runs import Built, asked, losses, metadata
from tests.tools.teacher import BASE, TeacherSetting

BRIDGE = {"flow_model": ""}
NATIVE = {"flow_mode": "native"}
KD = {**NATIVE, "flow_target": "kd"}


@torch.no_grad()
def first_loss(built: Built, sigmas: list[float]) -> float:
    """Mean of the flow's loss before any step, over all latents at these sigmas."""
    path, total = built.task.objective.parametrisation, 0.0
    for number in range(3):
        batch = built.batch(number)
        latents = built.task.latents(batch)
        noise = built.task.fixed_noise(batch, built.task.training, latents)
        for sigma in sigmas:
            timesteps = path.timesteps_of(torch.full((len(batch),), sigma))
            total += float(built.task.each(batch, latents, Draw(noise, noise, timesteps)).mean())
    return total / 3 / len(sigmas)


@pytest.mark.parametrize("target", ["cfm", "reflow"])
def test_the_bridge_begins_where_a_native_flow_has_yet_to_come(target: str, teacher_setting: TeacherSetting) -> None:
    found = {}
    for name, mode in (("bridge", BRIDGE), ("native", NATIVE)):
        built = teacher_setting.build(**mode, flow_target=target)
        found[name] = first_loss(built, [0.3, 0.7])
        built.close()
    assert found["bridge"] < 0.8 * found["native"]


def test_kd_compares_with_what_the_bridged_base_says_at_the_same_point(teacher_setting: TeacherSetting) -> None:
    """With adapters at zero and with others, beyond the schedule's end too, where the teacher goes on without a jump."""
    built = teacher_setting.build(**KD).stir()
    task, batch = built.task, built.batch()
    assert isinstance(task.objective.parametrisation, RectifiedFlow) and task.teacher is not None
    bridge, latents = task.teacher.bridge, task.latents(batch)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    text = task.condition(batch)

    def said(sigma: float) -> Tensor:
        x = (1 - sigma) * latents + sigma * noise
        with torch.no_grad(), task.network.disabled():
            return task._as_the_base(x, torch.full((len(batch),), 1000 * sigma), batch)

    sigma = 0.5
    x = (1 - sigma) * latents + sigma * noise
    with torch.no_grad(), task.network.disabled():
        t = bridge.timesteps_of(torch.full((len(batch),), sigma))
        output = task.predict(x / bridge.inverse_scale(sigma), t, text, batch.sizes)
    expected = (output - x) / (1 - sigma)  # the reference's formula E
    assert torch.allclose(said(sigma), expected, atol=1e-4)
    before, after = said(bridge.high - 1e-4), said(bridge.high + 1e-4)
    assert (after - before).abs().max() < 0.02 * before.abs().max() and said(1.0).isfinite().all()
    loss = task.each(batch, latents, Draw(noise, noise, torch.full((len(batch),), 500.0)))
    own = task.predict(x, torch.full((len(batch),), 500.0), text, batch.sizes)
    assert torch.allclose(loss, (own - expected).square().mean(dim=(1, 2, 3)), rtol=1e-4)
    loss.mean().backward()
    grown = [name for name, one in task.models[UNET].named_parameters() if one.grad is not None]
    assert grown and all("lora" in name for name in grown), "gradients in the adapters alone"
    built.close()


def test_a_guided_teacher_leads_away_from_the_empty_prompt(teacher_setting: TeacherSetting) -> None:
    plain, guided = (teacher_setting.build(**KD, flow_kd_cfg=cfg) for cfg in (1, 3))
    batch = plain.batch()
    x, timesteps = plain.task.latents(batch), torch.full((len(batch),), 400.0)
    empty = plain.batch()
    empty.states = guided.task.teacher.nothing.states.expand_as(batch.states)  # type: ignore[union-attr]
    with torch.no_grad():
        of_prompt, of_nothing = (plain.task._as_the_base(x, timesteps, one) for one in (batch, empty))
        found = guided.task._as_the_base(x, timesteps, batch)
    assert torch.allclose(found, of_nothing + 3 * (of_prompt - of_nothing), atol=1e-4)
    assert not torch.allclose(found, of_prompt, atol=1e-2)
    plain.close()
    guided.close()


def test_the_way_from_a_latents_own_noise_ends_in_the_latent(teacher_setting: TeacherSetting) -> None:
    built = teacher_setting.build(**BRIDGE, flow_target="reflow")
    path = built.task.objective.parametrisation
    assert isinstance(path, Bridge)
    batch, process = built.batch(), path.process
    assert batch.noise is not None
    levels, cache = noise_levels("Normal", 3, process.levels, SD15), built.task.text.prompts  # type: ignore[attr-defined]
    nothing = Conditioning(cache.read([cache.empty_row]).states.expand_as(batch.states), None)
    prompt, negative = (EncodedPart(1.0, (1,), (one,)) for one in (built.task.condition(batch), nothing))
    denoiser = GuidedDenoiser(built.task.models[UNET].eval(), process, [prompt], negative, cfg_scale=1.5)
    drawn = run_sampler(SAMPLERS["Euler"], denoiser, batch.noise * levels[0], levels, no_noise, process)
    assert torch.allclose(drawn, built.task.latents(batch), atol=4e-3)  # float16, and prompts cached in it
    built.close()


@pytest.mark.bits
def test_a_training_on_drawn_latents_resumes_to_the_bit_and_says_what_it_was(
    teacher_setting: TeacherSetting, tmp_path: Path
) -> None:
    more = {
        "save_state": "",
        "ema_decay": 0.5,
        "validation_split": 0.3,
        "max_train_steps": 2,
        "validate_every_n_steps": 2,
    }
    options = {**KD, "flow_kd_cfg": 2, **more}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert teacher_setting.train(whole, **options) == 0
    parts.mkdir()
    with asked(0, STOP, parts):
        assert teacher_setting.train(parts, **options) == 75
    assert teacher_setting.train(parts, **options) == 0
    assert_same_end(whole, parts)
    assert all(torch.tensor(losses(whole)).isfinite()) and all(torch.tensor(losses(whole, "val/loss")).isfinite())
    said = metadata(whole / "mio.safetensors")
    assert (said["ss_flow_target"], said["modelspec.prediction_type"]) == ("kd", "flow")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--flow_target reflow", "flow_target reflow is of a rectified flow, and this run trains none. Add --flow_model"),
        ("--flow_target kd", "flow_target kd is of a rectified flow, .* Add --flow_mode native"),
        ("--flow_target kd --flow_model", "kd teaches a native student .* Say --flow_mode native"),
        ("--flow_kd_cfg 2 --flow_model", "flow_kd_cfg guides the teacher of kd, and flow_target cfm asks none"),
        ("--flow_target kd --flow_mode native --any_teacher", "any_teacher does not go with flow_target kd"),
        ("--flow_target reflow --flow_model --noise_offset 0.1", "reflow keeps each latent with the noise .* noise_offset"),
        ("--flow_model --train_data_dir demo", "train_data_dir is for pictures, and teacher_latents are latents already"),
        ("--flow_model --flip_aug", "flip_aug is for pictures"),
        ("--flow_model --pretrained_model_name_or_path SD15", "were drawn by tiny-shapes, whose weights are not those of"),
        ("--flow_model --pretrained_model_name_or_path SDXL", "were drawn by SD1.5, and .* is SDXL"),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_sentence_before_anything_slow(
    options: str, said: str, teacher_setting: TeacherSetting, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = options.replace("SD15", str(tiny_sd15)).replace("SDXL", str(tiny_sdxl))
    base = None if "pretrained" in options else teacher_setting.options["pretrained_model_name_or_path"]
    assert teacher_setting.train(tmp_path / "out", *options.split(), pretrained_model_name_or_path=base) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, error), error
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("store", "changes", "said"),
    [
        ("", {"flow_target": "reflow"}, "flow_target has no effect without teacher_latents"),
        ("nowhere", {}, "There is no LMDB store at"),
        ("pictures", {}, "was not drawn by prepare_cache.py --teacher_latents"),
    ],
)
def test_a_store_that_is_none_is_refused(
    store: str, changes: dict[str, object], said: str, teacher_setting: TeacherSetting, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from library.data.store import StoreMeta
    from library.data.store_writer import StoreWriter

    if store == "pictures":
        writer = StoreWriter(tmp_path / store, "latents", expected_bytes=0)
        writer.set_meta(StoreMeta("latents", "float16", (4, 8, 8), {"value": "posterior mode"}, complete=True))
        writer.close()
    path = None if not store else tmp_path / store
    assert teacher_setting.train(tmp_path / "out", teacher_latents=path, **BRIDGE, **changes) == 2
    assert said in capsys.readouterr().err


def test_what_only_the_store_knows_is_refused_too(
    drawn_latents: Path, teacher_setting: TeacherSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents of a sampler that adds noise have no way back to their seed's; a flow base has no bridge."""
    import shutil

    from library.data.store import META_KEY, TensorStore
    from library.data.store_writer import StoreWriter

    store = TensorStore(drawn_latents, "latents")
    meta = json.loads(bytes(store.get_raw(META_KEY)))
    store.close()
    shutil.copytree(drawn_latents, tmp_path / "store")
    meta["producer"]["sampler"] = "Euler a"
    writer = StoreWriter(tmp_path / "store", "latents", expected_bytes=0)
    writer.put_raw(META_KEY, json.dumps(meta).encode())
    writer.commit()
    writer.close()
    changes = {"teacher_latents": tmp_path / "store", "flow_target": "reflow", **BRIDGE}
    assert teacher_setting.train(tmp_path / "out", **changes) == 2
    assert "drawn with Euler a, which adds noise on the way" in capsys.readouterr().err
    flow = tmp_path / "flow"
    shutil.copytree(locate_base(BASE).path, flow)
    write_json(
        flow / "scheduler" / "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
    )
    assert teacher_setting.train(tmp_path / "out", pretrained_model_name_or_path=flow, flow_target="kd") == 2
    assert "is a flow model already. Use cfm or reflow" in capsys.readouterr().err


def test_a_plan_of_a_training_on_drawn_latents_is_made_without_pictures(
    teacher_setting: TeacherSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_forecast: None
) -> None:
    assert teacher_setting.train(tmp_path / "out", "--dry_run", **KD) == 0
    said = capsys.readouterr().out
    assert "6 latents of tiny-shapes (Euler Normal, 3 steps, cfg 1.5), flow_target kd" in said
    assert "samples          6 an epoch, of 6 pictures" in said and "missing          nothing" in said


def test_the_experiments_commands_are_ones_that_the_scripts_take(tmp_path: Path) -> None:
    from library.options.network import parse_network_options
    from library.options.parser import parse
    from library.options.repa import REPA, PrepareCacheOptions
    from tools.flow_experiment import ARMS, draw_command, parsed, train_command

    options = parsed([])
    for arm in ARMS:
        found = parse_network_options(train_command(arm, options, tmp_path)[2:], prog="", description=None)
        assert (found.flow.flow_mode == "native") == arm.is_native and found.training.max_train_steps == options.steps
    words = draw_command(options, tmp_path, tmp_path / "prompts.txt")[2:]
    drawing = parse(
        PrepareCacheOptions, words, prog="", description=None, default_config="demo.toml", dialect=REPA
    ).drawing
    assert drawing.teacher_images == options.latents and drawing.teacher_sampler == "Euler"
