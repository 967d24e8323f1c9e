"""A LoRA from two checkpoints: which layers, how near it comes, what it says it cannot hold; extract_lora.py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import extract_lora
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.files import file_hash
from library.merging.extract import adaptable, extract, nearest_of_rank
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.configs import configs_of
from library.models.locate import BaseLocation
from networks.adapter_file import read_adapter
from networks.families import SD15, SDXL, Family
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, Target, current_key
from tests.tools.adapters import kohya_targets
from tests.tools.ldm_layout import ldm_checkpoint

FILES = {
    UNET: "unet/diffusion_pytorch_model.safetensors",
    VAE: "vae/diffusion_pytorch_model.safetensors",
    TEXT_ENCODER: "text_encoder/model.safetensors",
}
PROJ = Target(UNET, "mid_block.attentions.0.proj_in")
FC1 = "text_model.encoder.layers.3.mlp.fc1"
Change = Callable[[dict[str, Tensor]], None]


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(BaseLocation(folder.name, folder))


def tuned_copy(base: Path, folder: Path, **changes: Change) -> Path:
    """A copy of a diffusers folder in which `changes` (by component) has altered the tensors."""
    shutil.copytree(base, folder)
    for component, change in changes.items():
        tensors = load_file(folder / FILES[component])
        change(tensors)
        save_file(tensors, folder / FILES[component], metadata={"format": "pt"})
    return folder


def add_low_rank(tensors: dict[str, Tensor], rank: int = 3) -> None:
    """Train a rank-3 change into every layer that has an adapter in kohya's widest setting."""
    generator = torch.Generator().manual_seed(5)
    shapes = {UNET: {key: value.shape for key, value in tensors.items()}}
    for _, path in adaptable(shapes, convolutions=True):
        weight = tensors[f"{path}.weight"]
        up = torch.randn(weight.shape[0], rank, generator=generator)
        down = torch.randn(rank, weight[0].numel(), generator=generator)
        tensors[f"{path}.weight"] = weight + 0.02 * (up @ down).reshape(weight.shape)


def add_noise(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(6)
    for key, value in tensors.items():
        tensors[key] = value + 0.01 * torch.randn(value.shape, generator=generator)


def add_to(key: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if current_key(TEXT_ENCODER, name) == key or name == key]
        tensors[names[0]] = tensors[names[0]].clone()
        tensors[names[0]].view(-1)[0] += value

    return change


def unet_of(family: Family) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(configs_of(family).unet)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {str(current_key(TEXT_ENCODER, name)): value.shape for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("family", "counts"), [(SD15, (192, 278)), (SDXL, (722, 788))])
def test_the_layers_of_a_unet_are_those_that_kohya_adapts(family: Family, counts: tuple[int, int]) -> None:
    unet = unet_of(family)
    shapes = {UNET: {name: value.shape for name, value in unet.state_dict().items()}}
    for count, conv in zip(counts, (False, True), strict=True):
        expected = {target: tuple(of.weight.shape) for target, of in kohya_targets(UNET, unet, conv=conv).items()}
        assert adaptable(shapes, convolutions=conv) == expected
        assert len(expected) == count


def test_the_layers_of_text_encoders_are_those_that_kohya_adapts() -> None:
    shapes = {}
    for component, config in configs_of(SDXL).text_encoders.items():
        with torch.device("meta"):
            shapes[component] = shapes_of(CLIPTextModel(CLIPTextConfig(**config)))
    found = adaptable(shapes, convolutions=True)
    assert sum(target.component == TEXT_ENCODER for target in found) == 72
    assert sum(target.component == TEXT_ENCODER_2 for target in found) == 192
    assert {path.partition(".layers.0.")[2] for _, path in found if ".layers.0." in path} == {
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *("mlp.fc1", "mlp.fc2"),
    }


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (80, 48, 1, 1), (24, 16, 3, 3)])
@pytest.mark.parametrize("rank", [1, 8, 200])
def test_the_nearest_module_is_the_truncated_svd(shape: tuple[int, ...], rank: int) -> None:
    """Of noise, whose singular values are the hardest to tell apart."""
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module, kept = nearest_of_rank(change, rank)
    u, s, vh = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert (module.rank, module.alpha, module.shape) == (min(rank, len(s)), float(min(rank, len(s))), shape)
    torch.testing.assert_close(module.product().flatten(1).double(), best, rtol=0, atol=1e-5)
    assert kept == pytest.approx(float(best.norm()), rel=1e-6)


def test_a_change_of_low_rank_is_found_whole(tiny_sd15: Path, tmp_path: Path) -> None:
    base, tuned = open_folder(tiny_sd15), open_folder(tuned_copy(tiny_sd15, tmp_path / "tuned", unet=add_low_rank))
    adapter, report = extract(base, tuned, rank=4, conv_rank=3)
    assert len(adapter.modules) == len(report.modules) == 278
    assert report.share == pytest.approx(1.0, abs=1e-5)
    for target, module in adapter.modules.items():
        assert module.rank == (3 if module.kernel == 3 else 4)
        key = f"{target.path}.weight"
        merged = base.read(UNET, key) + module.product().reshape(base.shapes[UNET][key])
        torch.testing.assert_close(merged, tuned.read(UNET, key), rtol=0, atol=2e-6)
    assert (report.too_close, report.left, report.unmatched) == ({TEXT_ENCODER: 0.0}, (), ())


def test_the_report_accounts_for_the_whole_change(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = tuned_copy(tiny_sd15, tmp_path / "tuned", unet=add_noise, vae=add_noise, text_encoder=add_noise)
    base, tuned = open_folder(tiny_sd15), open_folder(folder)
    _, report = extract(base, tuned, rank=2, min_diff=0.0)
    assert len(report.modules) == 192 + 72
    squares = 0.0
    for one in report.modules:
        key = f"{one.target.path}.weight"
        change = (tuned.read(one.target.component, key) - base.read(one.target.component, key)).flatten(1)
        assert one.change == pytest.approx(float(change.norm()), rel=1e-5)
        assert one.kept == pytest.approx(float(torch.linalg.svdvals(change)[:2].norm()), rel=1e-4)
        assert one.share == one.kept / one.change
        squares += one.kept**2
    assert report.share == pytest.approx(squares**0.5 / report.change)
    everything = sum(
        float((tuned.read(part, key) - base.read(part, key)).double().square().sum())
        for part, named in base.shapes.items()
        for key in named
    )
    assert sum(one.tensors for one in report.left) + 264 == sum(len(named) for named in base.shapes.values())
    assert report.change**2 + sum(one.change**2 for one in report.left) == pytest.approx(everything, rel=1e-6)
    assert {one.kind for one in report.left} == {
        *("VAE", "U-Net: conv_in", "U-Net: conv_out", "U-Net: time_embedding", "U-Net: norms", "U-Net: biases"),
        *("U-Net: residual blocks and resamplers (--conv_dim adapts them)",),
        *("text_encoder: embeddings", "text_encoder: norms", "text_encoder: biases"),
    }
    assert [one.change for one in report.left] == sorted((one.change for one in report.left), reverse=True)


def test_a_text_encoder_is_taken_where_it_differs_by_more_than_min_diff(tiny_sd15: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_sd15)
    change = add_to(f"{FC1}.weight", 0.02)
    tuned = open_folder(
        tuned_copy(tiny_sd15, tmp_path / "a", unet=add_to(f"{PROJ.path}.weight", 1.0), text_encoder=change)
    )
    adapter, report = extract(base, tuned, rank=1)
    assert (set(adapter.modules), report.unchanged, report.too_close) == ({PROJ, Target(TEXT_ENCODER, FC1)}, 262, {})
    adapter, report = extract(base, tuned, rank=1, min_diff=0.03)
    assert set(adapter.modules) == {PROJ}
    assert report.too_close == {TEXT_ENCODER: pytest.approx(0.02, abs=1e-6)}
    assert [(one.kind, one.tensors) for one in report.left] == [("text_encoder: layers passed over", 1)]
    adapter, report = extract(base, tuned, rank=1, components=(TEXT_ENCODER,))
    assert set(adapter.modules) == {Target(TEXT_ENCODER, FC1)}
    assert [(one.kind, one.change) for one in report.left] == [("U-Net: layers passed over", pytest.approx(1.0))]


def test_models_that_do_not_fit_together_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_sd15)
    other = Checkpoint(BaseLocation("big", tiny_sd15), SDXL, base.tensors, base.stored_names)

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PROJ.path}.weight"] = torch.zeros(200, 96, 1, 1)

    def diverge(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PROJ.path}.weight"] = torch.full_like(tensors[f"{PROJ.path}.weight"], torch.nan)

    for tuned, sentence in (
        (other, f"big is SDXL, {tiny_sd15.name} is SD1.5: a LoRA is the difference of two models of one kind."),
        (base, "are alike in every layer that a LoRA can adapt (text encoders within min_diff 0.01)."),
        (
            open_folder(tuned_copy(tiny_sd15, tmp_path / "wide", unet=widen)),
            f"1 of 264 layers are absent or of another shape in wide (first: unet {PROJ.path})",
        ),
        (
            open_folder(tuned_copy(tiny_sd15, tmp_path / "nan", unet=diverge)),
            f"unet {PROJ.path}.weight has values that are not finite in one of the models.",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            extract(base, tuned, rank=2)


def test_tensors_that_only_one_model_has_are_named(tiny_sd15: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        add_to(f"{PROJ.path}.weight", 1.0)(tensors)
        tensors["extra.weight"] = torch.zeros(2)
        tensors["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
        del tensors["conv_out.bias"]

    tuned = open_folder(tuned_copy(tiny_sd15, tmp_path / "tuned", unet=change))
    _, report = extract(open_folder(tiny_sd15), tuned, rank=2)
    assert set(report.unmatched) == {"unet extra.weight", "unet conv_in.weight", "unet conv_out.bias"}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = extract_lora.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_script_writes_a_lora_that_turns_one_model_into_the_other(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = add_to("conv_in.weight", 0.5)
    tuned = tuned_copy(
        tiny_sd15,
        tmp_path / "tuned",
        unet=lambda tensors: (add_low_rank(tensors), change(tensors)),
        text_encoder=add_noise,
    )
    single = tmp_path / "tuned.safetensors"
    save_file(ldm_checkpoint(tuned), single)
    out = tmp_path / "lora.safetensors"
    words = ("--model_org", tiny_sd15, "--model_tuned", single, "--save_to", out, "--dim", 4, "--conv_dim", 4)
    code, said, _ = run(capsys, *words, "--device", "cpu", "--min_diff", 0.005)
    assert code == EXIT_OK
    adapter = read_adapter(out)
    assert len(adapter.modules) == 278 + 72
    base, after = open_folder(tiny_sd15), open_folder(tuned)
    for target, module in adapter.modules.items():
        if target.component == UNET:
            key = f"{target.path}.weight"
            merged = base.read(UNET, key) + module.product().reshape(base.shapes[UNET][key])
            torch.testing.assert_close(merged, after.read(UNET, key), rtol=0, atol=1e-5)
    assert re.search(r"^unet +278 +4 .* 100\.0%", said, re.MULTILINE)
    assert re.search(r"^ +0\.5 +1  U-Net: conv_in$", said, re.MULTILINE)
    record = json.loads(adapter.metadata["repa_extract"])
    assert record["tuned"] == {"name": "tuned.safetensors", "sha256": {"tuned.safetensors": file_hash(single)}}
    assert adapter.metadata["ss_sd_model_name"] == tiny_sd15.name
    assert adapter.metadata["ss_network_dim"] == "4" and str(tmp_path) not in str(adapter.metadata)
    code, _, error = run(capsys, *words)
    assert (code, "exists already" in error) == (EXIT_BAD_INPUT, True)
    code, said, _ = run(capsys, *words, "--overwrite", "--dry_run", "--save_precision", "fp16")
    assert code == EXIT_OK and "(replacing what is there)" in said
    assert read_adapter(out).metadata == adapter.metadata


def test_sdxl_models_give_an_sdxl_lora(tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tuned_copy(tiny_sdxl, tmp_path / "tuned", text_encoder=add_noise)
    out = tmp_path / "lora.safetensors"
    code, said, _ = run(
        capsys, "--model_org", tiny_sdxl, "--model_tuned", tuned, "--save_to", out, "--save_precision", "fp16"
    )
    assert code == EXIT_OK
    assert "Passed over: text_encoder_2, whose values differ by at most 0, within --min_diff." in said
    adapter = read_adapter(out)
    assert adapter.family is SDXL and {target.component for target in adapter.modules} == {TEXT_ENCODER}
    assert {module.down.dtype for module in adapter.modules.values()} == {torch.float16}


def test_the_script_refuses_in_a_sentence(
    tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--model_org", tiny_sd15, "--model_tuned", tiny_sd15)
    out = tmp_path / "lora.safetensors"
    for words, sentence in (
        ((*both, "--save_to", tmp_path / "lora.pt"), "save_to must be a .safetensors file"),
        ((*both, "--save_to", out, "--dim", 0), "dim must be positive, got 0."),
        ((*both, "--save_to", out, "--min_diff", -1), "min_diff must not be negative, got -1"),
        ((*both, "--save_to", out, "--device", "nowhere"), "device nowhere cannot be used"),
        ((*both, "--save_to", out), "are alike in every layer that a LoRA can adapt"),
        ((*both[:3], tmp_path / "absent", "--save_to", out), "absent does not exist"),
        ((*both[:3], tiny_sdxl, "--save_to", out), "a LoRA is the difference of two models of one kind"),
    ):
        code, _, error = run(capsys, *words)
        assert code == EXIT_BAD_INPUT and sentence in error, error
        assert not out.exists()
        if "alike" not in sentence:  # that only the weights tell
            assert run(capsys, *words, "--dry_run")[::2] == (code, error), "the dry run in the same words"
