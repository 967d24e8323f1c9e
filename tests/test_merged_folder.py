"""A merged diffusers folder: what is in it, what diffusers makes of it, and that the rest keeps its bytes."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

from library.merging.diffusers_folder import write_merged_folder
from library.merging.merge import fold
from library.models.load import load_text_encoder, load_unet
from library.models.locate import BaseLocation
from networks.adapter_file import read_adapter
from tests.tools.adapters import TEXT_LAYER, run_tiny, text_lora, train_lora
from tests.tools.ldm_layout import ldm_checkpoint


@pytest.fixture(scope="module")
def base(tiny_sd15: Path) -> BaseLocation:
    return BaseLocation("tiny", tiny_sd15)


@pytest.fixture(scope="module")
def merged(base: BaseLocation, adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "model"
    write_merged_folder(base, read_adapter(adapter_file), output)
    return output


def test_the_merged_folder_computes_as_the_adapter_does(merged: Path, base: BaseLocation) -> None:
    adapted = load_unet(base)
    train_lora(adapted)
    expected = run_tiny(adapted)
    torch.testing.assert_close(run_tiny(load_unet(str(merged))), expected, atol=1e-4, rtol=1e-4)
    assert (run_tiny(load_unet(base)) - expected).abs().max() > 1e-2


def test_diffusers_loads_our_file_whole_and_agrees_with_the_merge(
    adapter_file: Path, tiny_sd15: Path, base: BaseLocation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(load_file(adapter_file) | text_lora(), tmp_path / "both.safetensors")
    adapter = read_adapter(tmp_path / "both.safetensors")
    write_merged_folder(base, adapter, tmp_path / "m")

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True)
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "diffusers"):
        pipeline.load_lora_weights(tmp_path, weight_name="both.safetensors")
    diffusers_logging.disable_propagation()
    assert not [record.message for record in caplog.records if record.name.startswith("diffusers")]
    models = (pipeline.unet, pipeline.text_encoder)
    adapted = [name for model in models for name, _ in model.named_modules() if name.endswith(".lora_A.default_0")]
    assert len(adapted) == len(adapter.modules)

    again = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    torch.testing.assert_close(run_tiny(again.unet), run_tiny(pipeline.unet), atol=1e-4, rtol=1e-4)
    words = torch.arange(77)[None]
    with torch.no_grad():
        ours, theirs = (each.text_encoder(words).last_hidden_state for each in (again, pipeline))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_the_adapter_does_not_touch_keeps_its_bytes(merged: Path, tiny_sd15: Path) -> None:
    expected = {file.relative_to(tiny_sd15) for file in tiny_sd15.rglob("*") if file.is_file()} - {Path("tiny.json")}
    assert {file.relative_to(merged) for file in merged.rglob("*") if file.is_file()} == expected
    changed = [file for file in expected if not filecmp.cmp(tiny_sd15 / file, merged / file, shallow=False)]
    assert changed == [Path("unet/diffusion_pytorch_model.safetensors")]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_every_file_can_be_read_by_whoever_the_umask_allows(merged: Path) -> None:
    os.umask(mask := os.umask(0))
    assert {file.stat().st_mode & 0o777 for file in merged.rglob("*") if file.is_file()} == {0o666 & ~mask}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_save_precision_holds_for_the_unet(
    dtype: torch.dtype, base: BaseLocation, adapter_file: Path, merged: Path, tmp_path: Path
) -> None:
    write_merged_folder(base, read_adapter(adapter_file), tmp_path / "m", dtype=dtype)
    narrow, wide = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "m", merged)
    )
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(value, wide[name].to(dtype)) for name, value in narrow.items())


def test_a_base_in_half_precision_stays_so(base: BaseLocation, adapter_file: Path, tmp_path: Path) -> None:
    write_merged_folder(base, read_adapter(adapter_file), tmp_path / "half", dtype=torch.float16)
    write_merged_folder(BaseLocation("half", tmp_path / "half"), read_adapter(adapter_file), tmp_path / "again")
    weights = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_the_text_encoder_is_merged_under_its_full_names(prefix: str, base: BaseLocation, tmp_path: Path) -> None:
    save_file(text_lora(prefix), tmp_path / "te.safetensors")
    adapter = read_adapter(tmp_path / "te.safetensors")
    report = write_merged_folder(base, adapter, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "text_encoder" / "model.safetensors")
    before = load_text_encoder(base)[1].state_dict()
    assert weights.keys() == before.keys() and all(name.startswith("text_model.") for name in weights)
    changed = [name for name in weights if not torch.equal(weights[name], before[name])]
    assert changed == [f"{TEXT_LAYER}.weight"]
    (module,) = adapter.modules.values()
    torch.testing.assert_close(weights[changed[0]], fold(before[changed[0]], module, 1.0))
    assert [part.copied for part in report.components] == [False, False]


def test_a_text_encoder_without_text_model_in_its_names_gets_it(
    tiny_sd15: Path, adapter_file: Path, tmp_path: Path, base: BaseLocation
) -> None:
    """As transformers >= 5.6 writes it, which 5.5 and before would fill with random weights."""
    shutil.copytree(tiny_sd15, tmp_path / "flat")
    file = tmp_path / "flat" / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file(
        {name.removeprefix("text_model."): value for name, value in weights.items()}, file, metadata={"format": "pt"}
    )
    write_merged_folder(BaseLocation("flat", tmp_path / "flat"), read_adapter(adapter_file), tmp_path / "m")
    again = load_file(tmp_path / "m" / "text_encoder" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_parts_that_the_base_names_but_lacks_become_null_and_are_told(
    tiny_sd15: Path, adapter_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    index = json.loads((tiny_sd15 / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    report = write_merged_folder(BaseLocation("b", tmp_path / "base"), read_adapter(adapter_file), tmp_path / "m")
    assert report.absent == ["safety_checker"]
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["safety_checker"] == [None, None]


def write_single_file(base: Path, folder: Path) -> Path:
    tensors = {name: value.contiguous() for name, value in ldm_checkpoint(base).items()}
    save_file(tensors, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def test_a_single_file_merges_into_the_same_folder(
    tiny_sd15: Path, adapter_file: Path, merged: Path, tmp_path: Path
) -> None:
    file = write_single_file(tiny_sd15, tmp_path)
    report = write_merged_folder(BaseLocation("tiny", file), read_adapter(adapter_file), tmp_path / "m")
    assert [(part.component, part.keys_before, part.keys_after) for part in report.components] == [
        ("unet", 686, 686),
        ("text_encoder", 196, 196),
    ]
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        ours, expected = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "m", merged))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in ours.items()), name


def test_diffusers_loads_what_a_single_file_became(
    tiny_sd15: Path, adapter_file: Path, merged: Path, tmp_path: Path
) -> None:
    file = write_single_file(tiny_sd15, tmp_path)
    write_merged_folder(BaseLocation("tiny", file), read_adapter(adapter_file), tmp_path / "m")
    ours, expected = (
        StableDiffusionPipeline.from_pretrained(folder, local_files_only=True) for folder in (tmp_path / "m", merged)
    )
    assert ours.tokenizer("a red square").input_ids == expected.tokenizer("a red square").input_ids
    assert ours.scheduler.config["beta_schedule"] == expected.scheduler.config["beta_schedule"]
    differing = {key for key, value in ours.unet.config.items() if value != expected.unet.config[key]}
    assert differing <= {"sample_size", "_name_or_path"}  # the former leaves no trace in the shapes of a checkpoint
    assert torch.equal(run_tiny(ours.unet), run_tiny(expected.unet))
