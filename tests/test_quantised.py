"""Bases of small numbers with scales: read rightly wherever a base is read, merged rightly, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.models.base_family import family_of
from library.models.checkpoint import open_checkpoint
from library.models.load import load_text_encoders, load_unet
from library.models.locate import check_base, locate_base
from networks.families import SDXL
from tests.tools.merging import FILES, assert_same_tensors, run_merge, save, single_file

FP8 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]
Layout = Callable[[str, Tensor], Tensors]


def scaled_fp8(name: str, weight: Tensor) -> Tensors:
    """ComfyUI's."""
    scale = weight.abs().max() / 448
    return {
        f"{name}.weight": (weight / scale).to(FP8),
        f"{name}.scale_weight": scale,
        f"{name}.scale_input": torch.ones(1),
    }


def weight_scale(name: str, weight: Tensor) -> Tensors:
    """ComfyUI's later one, with a scale for each output."""
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-8) / 448
    shaped = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return {f"{name}.weight": (weight / shaped).to(FP8), f"{name}.weight_scale": scale, f"{name}.comfy_quant": note}


def int8(name: str, weight: Tensor) -> Tensors:
    scale = (weight.flatten(1).abs().amax(1).clamp(min=1e-8) / 127)[:, None]
    rows = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return {f"{name}.weight": (weight / rows).round().to(torch.int8), f"{name}.weight_scale": scale.half()}


LAYOUTS: dict[str, Layout] = {layout.__name__: layout for layout in (scaled_fp8, weight_scale, int8)}


def is_scaled(name: str, value: Tensor) -> bool:
    return name.endswith((".to_q.weight", ".conv1.weight", ".in_layers.2.weight", ".fc1.weight")) and value.ndim > 1


def quantised(tensors: Tensors, layout: Layout) -> tuple[Tensors, Tensors]:
    """The file's tensors, and the plain ones that they mean."""
    stored: Tensors = {}
    plain = dict(tensors)
    for name, value in tensors.items():
        if not is_scaled(name, value):
            stored[name] = value
            continue
        parts = layout(name.removesuffix(".weight"), value.float())
        stored |= parts
        scale = next(part for key, part in parts.items() if key.endswith(("scale_weight", "weight_scale")))
        plain[name] = parts[name].float() * scale.float().reshape(-1, *(1 for _ in value.shape[1:]))
    return stored, plain


@pytest.fixture(scope="module", params=LAYOUTS)
def files(
    request: pytest.FixtureRequest, tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A quantised single file, and the same unscaled in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = load_file(single_file(tiny_sd15, folder / "whole.safetensors"))
    stored, plain = quantised(whole, LAYOUTS[request.param])
    marker = {"scaled_fp8": torch.zeros(0).to(FP8)} if request.param == "scaled_fp8" else {}
    return save(stored | marker, folder / "quantised.safetensors"), save(plain, folder / "plain.safetensors")


def test_a_quantised_base_is_loaded_as_what_its_numbers_mean(files: tuple[Path, Path]) -> None:
    found, expected = (load_unet(str(file)).state_dict() for file in files)
    assert_same_tensors(found, expected)
    texts = [load_text_encoders(str(file))[0].model.state_dict() for file in files]
    assert_same_tensors(*texts)


def test_a_merge_into_a_quantised_base_is_that_into_what_its_numbers_mean(
    files: tuple[Path, Path], adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = []
    for file in files:
        merged.append(tmp_path / f"of_{file.name}")
        words = ("--models", adapter_file, "--pretrained_model_name_or_path", file, "--save_to", merged[-1])
        assert run_merge(*words, "--save_precision", "fp16") == 0
    assert_same_tensors(*merged)
    assert "float16, 90 scaled weights multiplied out" in (tmp_path / "of_quantised_merge_report.md").read_text()
    capsys.readouterr()
    assert run_merge(*words[:3], files[0], "--save_to", tmp_path / "as_it_is.safetensors") == 2
    error = capsys.readouterr().err
    assert (
        f"{files[0]} has 90 weights stored as small numbers with a scale" in error and "--save_precision fp16" in error
    )
    assert not (tmp_path / "as_it_is.safetensors").exists()


def test_a_diffusers_folder_of_scaled_weights_is_read_alike(tiny_sdxl: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(tiny_sdxl, tmp_path / name)) for name in ("stored", "plain")]
    for component in ("unet", "text_encoder_2"):
        both = quantised(load_file(tiny_sdxl / FILES[component]), scaled_fp8)
        for folder, tensors in zip(folders, both, strict=True):
            save(tensors, folder / FILES[component])
    found, expected = (load_unet(str(folder), families=(SDXL,)).state_dict() for folder in folders)
    assert_same_tensors(found, expected)
    opened = [open_checkpoint(locate_base(str(folder))) for folder in folders]
    assert opened[0].shapes == opened[1].shapes
    key = next(key for key in opened[0].scaled if "fc1" in key)
    assert torch.equal(*(checkpoint.read("text_encoder_2", key) for checkpoint in opened))


LAYER = "model.diffusion_model.middle_block.1.proj_in"
OTHERS: dict[str, tuple[Tensors, str]] = {
    "4 bits": (
        {f"{LAYER}.weight.absmax": torch.zeros(4), f"{LAYER}.weight.quant_map": torch.zeros(16)},
        "bitsandbytes' 4 bits",
    ),
    "4 bits, state": (
        {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
        "bitsandbytes' 4 bits",
    ),
    "8 bits": ({f"{LAYER}.SCB": torch.zeros(4)}, "bitsandbytes' 8 bits"),
    "quanto": ({f"{LAYER}.weight._data": torch.zeros(4, 4, dtype=torch.int8)}, "optimum-quanto's"),
    "GPTQ": ({f"{LAYER}.qweight": torch.zeros(4, 4, dtype=torch.int32)}, "GPTQ's"),
    "NVFP4": ({f"{LAYER}.weight_scale_2": torch.zeros(1)}, "scales by block"),
    "by block": (
        {f"{LAYER}.weight": torch.zeros(4, 4).to(FP8), f"{LAYER}.weight_scale": torch.zeros(2, 2)},
        r"scales by block, F32 \[2, 2\] for a weight \[4, 4\]",
    ),
    "packed": (
        {f"{LAYER}.weight": torch.zeros(4, 2, dtype=torch.uint8), f"{LAYER}.weight_scale": torch.zeros(4)},
        "weights packed as U8 with a scale",
    ),
    "GGUF's blocks": ({f"{LAYER}.weight": torch.zeros(4, 18, dtype=torch.uint8)}, "U8 without a scale that is known"),
    "int8 alone": ({f"{LAYER}.weight": torch.zeros(4, 4, dtype=torch.int8)}, "I8 without a scale that is known"),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_other_layouts_are_refused_by_name_wherever_a_base_is_read(
    layout: str, tiny_sd15: Path, adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, name = OTHERS[layout]
    file = single_file(tiny_sd15, tmp_path / "base.safetensors", extra=tensors)
    for read in (family_of, open_checkpoint):
        with pytest.raises(UserError, match=f"base.safetensors is quantised in a form that is not read here: .*{name}"):
            read(locate_base(str(file)))
    assert (
        run_merge(
            "--models", adapter_file, "--pretrained_model_name_or_path", file, "--save_to", tmp_path / "x.safetensors"
        )
        == 2
    )
    assert "quantised in a form" in capsys.readouterr().err


def test_a_folder_of_another_layout_is_refused_by_name(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "base"))
    unet = load_file(folder / FILES["unet"])
    save(unet | {"mid_block.attentions.0.proj_in.weight.absmax": torch.zeros(3)}, folder / FILES["unet"])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors is quantised .*: bitsandbytes' 4 bits"):
        family_of(locate_base(str(folder)))


def test_a_gguf_file_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "sd15-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is quantised \\(GGUF\\), which is not read here"):
        check_base(str(tmp_path / "sd15-Q8_0.gguf"))
