"""A merged diffusers folder: what is in it, what diffusers makes of it, and that the rest keeps its bytes."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from library.files import read_json
from library.models.load import load_unet
from networks.adapter_file import read_adapter
from networks.families import SDXL
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE
from tests.tools.adapters import TEXT_LAYER, run_tiny, text_lora, train_lora
from tests.tools.merging import (
    FILES,
    assert_same_folders,
    assert_same_tensors,
    picture,
    run_merge,
    save,
    single_file,
    without_complaint,
    write_whole_adapter,
)

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def merged(adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(tmp_path_factory.mktemp("merged") / "model", adapter_file)


@pytest.fixture(scope="module", params=PIPELINES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path, Path]:
    """(pipeline, base, adapter on everything, what they were merged into) of each family."""
    base, folder = request.getfixturevalue(f"tiny_{request.param}"), tmp_path_factory.mktemp(request.param)
    adapter = write_whole_adapter(base, folder)
    return PIPELINES[request.param], base, adapter, merge(folder / "merged", adapter)


def merge(output: Path, adapter: Path, *words: object) -> Path:
    assert run_merge("--models", adapter, "--output_dir", output, *words) == 0
    return output


def from_base(base: Path) -> tuple[object, ...]:
    return ("--pretrained_model_name_or_path", base)


def test_the_merged_folder_computes_as_the_adapter_does(merged: Path, tiny_sd15: Path) -> None:
    adapted = load_unet(str(tiny_sd15))
    train_lora(adapted)
    expected = run_tiny(adapted)
    torch.testing.assert_close(run_tiny(load_unet(str(merged))), expected, atol=1e-4, rtol=1e-4)
    assert (run_tiny(load_unet(str(tiny_sd15))) - expected).abs().max() > 1e-2


def test_diffusers_loads_it_without_a_complaint_and_draws_what_it_draws_with_the_adapter(
    whole: tuple[Any, Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    kind, base, adapter, output = whole
    with without_complaint(caplog):
        pipeline = kind.from_pretrained(output, local_files_only=True)
    found = picture(pipeline)
    at_run_time = kind.from_pretrained(base, local_files_only=True)
    plain = picture(at_run_time)
    at_run_time.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    np.testing.assert_allclose(found, picture(at_run_time), atol=2e-4)
    assert np.abs(found - plain).max() > 0.01


@pytest.mark.bits
def test_every_module_of_the_adapter_and_nothing_else_has_changed(whole: tuple[Any, Path, Path, Path]) -> None:
    _, base, adapter, output = whole
    changed = set()
    for component, file in FILES.items():
        if (base / file).exists():
            before, after = load_file(base / file), load_file(output / file)
            assert list(before) == list(after)
            changed |= {(component, key) for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {(target.component, f"{target.path}.weight") for target in read_adapter(adapter).modules}


def test_what_the_adapter_does_not_touch_keeps_its_bytes(merged: Path, tiny_sd15: Path) -> None:
    expected = {file.relative_to(tiny_sd15) for file in tiny_sd15.rglob("*") if file.is_file()} - {Path("tiny.json")}
    reports = {Path("merge_report.md"), Path("merge_report.json")}
    assert {file.relative_to(merged) for file in merged.rglob("*") if file.is_file()} == expected | reports
    changed = [file for file in expected if (tiny_sd15 / file).read_bytes() != (merged / file).read_bytes()]
    assert changed == [Path(FILES[UNET])]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_every_file_can_be_read_by_whoever_the_umask_allows(adapter_file: Path, tmp_path: Path) -> None:
    mask = 0o007
    before = os.umask(mask)
    try:
        merge(tmp_path / "m", adapter_file, "--save_single_file")
        assert run_merge("--models", adapter_file, "--save_to", tmp_path / "m.safetensors") == 0
    finally:
        os.umask(before)
    files = [tmp_path / "m.safetensors", *(file for file in (tmp_path / "m").rglob("*") if file.is_file())]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}
    folders = [tmp_path / "m", tmp_path / "m" / "unet"]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o777 & ~mask}


# ------------------------------------------------------------------------------------------------ number formats


@pytest.mark.bits
@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_save_precision_is_that_of_every_tensor(
    name: str, dtype: torch.dtype, adapter_file: Path, merged: Path, tmp_path: Path
) -> None:
    narrow = merge(tmp_path / "m", adapter_file, "--save_precision", name)
    for file in (FILES[UNET], FILES[VAE], FILES[TEXT_ENCODER]):
        expected = {key: value.to(dtype) for key, value in load_file(merged / file).items()}
        assert_same_tensors(load_file(narrow / file), expected)


@pytest.mark.bits
def test_a_base_in_half_precision_stays_so_and_can_be_widened(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    half = merge(tmp_path / "half", adapter_file, "--save_precision", "fp16", "--ratios", 0)
    again = merge(tmp_path / "again", adapter_file, *from_base(half))
    assert {value.dtype for value in load_file(again / FILES[UNET]).values()} == {torch.float16}
    assert filecmp.cmp(half / FILES[VAE], again / FILES[VAE], shallow=False)
    wide = merge(tmp_path / "wide", adapter_file, *from_base(half), "--save_precision", "float", "--ratios", 0)
    expected = {key: value.half().float() for key, value in load_file(tiny_sd15 / FILES[UNET]).items()}
    assert_same_tensors(load_file(wide / FILES[UNET]), expected)


# ------------------------------------------------------------------------------------------------ text encoders


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_the_text_encoder_is_merged_under_its_full_names(prefix: str, tiny_sd15: Path, tmp_path: Path) -> None:
    adapter = save(text_lora(prefix), tmp_path / "te.safetensors")
    output = merge(tmp_path / "m", adapter, *from_base(tiny_sd15))
    weights, before = (load_file(folder / FILES[TEXT_ENCODER]) for folder in (output, tiny_sd15))
    assert weights.keys() == before.keys() and all(name.startswith("text_model.") for name in weights)
    changed = [name for name in weights if not torch.equal(weights[name], before[name])]
    assert changed == [f"{TEXT_LAYER}.weight"]
    (module,) = read_adapter(adapter).modules.values()
    torch.testing.assert_close(weights[changed[0]], before[changed[0]] + module.product())
    assert filecmp.cmp(output / FILES[UNET], tiny_sd15 / FILES[UNET], shallow=False)


def test_a_text_encoder_without_text_model_in_its_names_gets_it(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers >= 5.6 writes it, which 5.5 and before would fill with random weights."""
    flat = shutil.copytree(tiny_sd15, tmp_path / "flat")
    weights = load_file(tiny_sd15 / FILES[TEXT_ENCODER])
    save({name.removeprefix("text_model."): value for name, value in weights.items()}, flat / FILES[TEXT_ENCODER])
    output = merge(tmp_path / "m", adapter_file, *from_base(flat))
    assert_same_tensors(load_file(output / FILES[TEXT_ENCODER]), weights)
    with without_complaint(caplog):
        StableDiffusionPipeline.from_pretrained(output, local_files_only=True)


def test_both_text_encoders_of_sdxl_carry_text_model(whole: tuple[Any, Path, Path, Path]) -> None:
    output = whole[3]
    for component in (TEXT_ENCODER, TEXT_ENCODER_2):
        if (output / component).exists():
            names = set(load_file(output / FILES[component])) - {"text_projection.weight"}
            assert names and all(name.startswith("text_model.") for name in names)


# ------------------------------------------------------------------------------------------------ other bases


@pytest.mark.bits
def test_a_single_file_merges_into_the_same_folder(
    whole: tuple[Any, Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, base, adapter, expected = whole
    file = single_file(base, tmp_path / "base.safetensors")
    output = merge(tmp_path / "m", adapter, *from_base(file))
    assert_same_folders(output, expected)
    with without_complaint(caplog):
        ours = kind.from_pretrained(output, local_files_only=True)
    theirs = kind.from_pretrained(expected, local_files_only=True)
    assert ours.tokenizer("a red square").input_ids == theirs.tokenizer("a red square").input_ids
    configs = [{k: v for k, v in each.unet.config.items() if k[0] != "_"} for each in (ours, theirs)]
    differing = {key for key, value in configs[0].items() if value != configs[1][key]}
    assert differing <= {"sample_size"}  # leaves no trace in the shapes of a checkpoint
    assert np.array_equal(picture(ours), picture(theirs))


def sharded(folder: Path) -> None:
    file = folder / FILES[UNET]
    tensors = list(load_file(file).items())
    for i, part in enumerate((tensors[:300], tensors[300:])):
        save(dict(part), file.with_name(f"{file.stem}-{i + 1:05}-of-00002.safetensors"))
    file.with_suffix(".safetensors.index.json").write_text("{}")
    file.unlink()


def pickled(folder: Path) -> None:
    file = folder / FILES[UNET]
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def variant(folder: Path) -> None:
    for file in (FILES[UNET], FILES[VAE], FILES[TEXT_ENCODER]):
        (folder / file).rename((folder / file).with_suffix(".fp16.safetensors"))


def with_old_names(folder: Path) -> None:
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, value in load_file(folder / FILES[VAE]).items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[name] = value[:, :, None, None] if ".proj_attn.weight" in name else value
    save(tensors, folder / FILES[VAE])


@pytest.mark.bits
@pytest.mark.parametrize("change", [sharded, pickled, variant, with_old_names])
def test_every_way_to_save_a_base_merges_into_the_same_folder(
    change: Callable[[Path], None], adapter_file: Path, merged: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_sd15, tmp_path / "base")
    change(base)
    output = merge(tmp_path / "m", adapter_file, *from_base(base))
    assert_same_folders(output, merged)
    assert sorted(file.name for file in (output / UNET).iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_parts_that_the_base_names_but_lacks_become_null_and_are_told(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(tiny_sd15, tmp_path / "base")
    index = read_json(tiny_sd15 / "model_index.json")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))
    output = merge(tmp_path / "m", adapter_file, *from_base(base))
    assert "Without safety_checker, which the base names but does not hold here." in capsys.readouterr().out
    assert read_json(output / "merge_report.json")["absent"] == ["safety_checker"]
    assert read_json(output / "model_index.json")["safety_checker"] == [None, None]


def test_a_safety_checker_that_is_there_is_copied(adapter_file: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_sd15, tmp_path / "base")
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "model.safetensors").write_bytes(b"whatever")
    output = merge(tmp_path / "m", adapter_file, *from_base(base))
    assert (output / "safety_checker" / "model.safetensors").read_bytes() == b"whatever"


def test_an_sdxl_that_predicts_velocity_says_so_as_a_folder_too(tiny_sdxl: Path, tmp_path: Path) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = single_file(tiny_sdxl, tmp_path / "base.safetensors", extra=marks)
    output = merge(tmp_path / "m", write_whole_adapter(tiny_sdxl, tmp_path), *from_base(file), "--save_single_file")
    config = read_json(output / "scheduler" / "scheduler_config.json")
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert marks.keys() <= load_file(output / "model.safetensors").keys()
    assert read_json(output / "merge_report.json")["family"] == SDXL.title
