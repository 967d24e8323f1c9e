"""A merged single file: its names and bytes in both families, its metadata, what diffusers makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from library.files import file_hash, read_json
from networks.names import TEXT_ENCODER, VAE
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.merging import (
    EMA,
    FILES,
    assert_same_tensors,
    metadata_of,
    picture,
    run_merge,
    save,
    single_file,
    without_complaint,
    write_whole_adapter,
)

PIPELINES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Setting:
    """A family's tiny model, an adapter on all of it, and both outputs of their merge."""

    def __init__(self, kind: Any, base: Path, folder: Path) -> None:
        self.kind, self.base = kind, base
        self.adapter = write_whole_adapter(base, folder)
        self.folder = folder / "merged"
        assert run_merge("--models", self.adapter, "--output_dir", self.folder, "--save_single_file") == 0
        self.file = self.folder / "model.safetensors"
        self.expected = ldm_checkpoint(self.folder)

    def merge(self, output: Path, *words: object, base: Path | None = None) -> Path:
        options = ("--pretrained_model_name_or_path", base) if base else ()
        assert run_merge("--models", self.adapter, "--save_to", output, *options, *words) == 0
        return output


@pytest.fixture(scope="module")
def settings(tiny_sd15: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setting]:
    bases = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}
    return cache(lambda name: Setting(PIPELINES[name], bases[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", params=PIPELINES)
def setting(request: pytest.FixtureRequest, settings: Callable[[str], Setting]) -> Setting:
    return settings(request.param)


@pytest.fixture(scope="module")
def sd15(settings: Callable[[str], Setting]) -> Setting:
    return settings("sd15")


@pytest.mark.bits
def test_names_and_values_are_those_of_the_original_code(setting: Setting) -> None:
    """By a table that was written from that code. SD1.5's file has the 686 + 248 + 196 tensors of the real one."""
    assert_same_tensors(load_file(setting.file), {key: value.contiguous() for key, value in setting.expected.items()})
    if setting.kind is StableDiffusionPipeline:
        prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.")
        assert [sum(name.startswith(prefix) for name in setting.expected) for prefix in prefixes] == [686, 248, 196]


def test_the_vaes_attention_is_made_of_convolutions(setting: Setting) -> None:
    weights = {k: v for k, v in load_file(setting.file).items() if ".attn_1." in k and k.endswith("weight")}
    assert {tuple(v.shape) for k, v in weights.items() if ".norm." not in k} == {(48, 48, 1, 1)} and len(weights) == 10


@pytest.mark.bits
def test_the_file_alone_is_the_file_beside_a_folder(setting: Setting, tmp_path: Path) -> None:
    assert_same_tensors(setting.merge(tmp_path / "a.safetensors"), setting.file)


@pytest.mark.bits
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_single_file_base_gives_the_same_and_keeps_its_precision(
    setting: Setting, precision: str, tmp_path: Path
) -> None:
    dtype = PRECISIONS[precision]
    base = single_file(setting.base, tmp_path / "base.safetensors", dtype)
    file = setting.merge(tmp_path / "a.safetensors", base=base)
    found, before = load_file(file), load_file(base)
    assert found.keys() == before.keys() and {value.dtype for value in found.values()} == {dtype}
    for name, value in found.items():
        # The base was rounded before the merge, and the sum once more.
        torch.testing.assert_close(value, setting.expected[name].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    if precision == "float":
        assert_same_tensors(file, setting.file)
    if precision != "fp16":
        return
    wide = setting.merge(tmp_path / "wide.safetensors", "--save_precision", "float", base=base)
    assert_same_tensors({name: value.to(dtype) for name, value in load_file(wide).items()}, file)


@pytest.mark.bits
def test_the_save_precision_rounds_once(setting: Setting, tmp_path: Path) -> None:
    file = setting.merge(tmp_path / "a.safetensors", "--save_precision", "bf16")
    dtype = torch.bfloat16
    assert_same_tensors(load_file(file), {name: value.to(dtype) for name, value in load_file(setting.file).items()})


def test_what_is_no_part_of_the_models_is_left_behind_and_told(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(name.split("text_model.")[0] for name in setting.expected if "text_model." in name)
    extra = {
        **EMA,
        "alphas_cumprod": torch.ones(1000),
        f"{first}text_model.embeddings.position_ids": torch.arange(77)[None],
        "v_pred": torch.zeros(0),
    }
    if setting.kind is StableDiffusionXLPipeline:
        extra["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    base = single_file(setting.base, tmp_path / "base.safetensors", extra=extra)
    file = setting.merge(tmp_path / "a.safetensors", base=base)
    assert_same_tensors(load_file(file), load_file(setting.file) | {"v_pred": torch.zeros(0)})
    assert metadata_of(file)["modelspec.prediction_type"] == "v"
    left = len(extra) - 1
    assert f"Left behind: {left} tensors of the base that are no part of the models." in capsys.readouterr().out
    assert read_json(tmp_path / "a_merge_report.json")["left_behind"] == left
    assert f"Left behind: {left} tensors" in (tmp_path / "a_merge_report.md").read_text()


def test_tensors_that_are_not_touched_keep_their_bytes_in_whatever_format(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    """A file of several precisions, as trainers leave them, with the VAE's attention as matrices."""
    tensors: dict[str, Tensor] = load_file(single_file(tiny_sd15, tmp_path / "base.safetensors", torch.float16))
    for name, value in tensors.items():
        if name.startswith("first_stage_model."):
            tensors[name] = value.float().flatten(1) if ".attn_1." in name and value.ndim == 4 else value.bfloat16()
        elif name.endswith("token_embedding.weight"):
            tensors[name] = value.to(torch.float8_e4m3fn)
    base = save(tensors, tmp_path / "base.safetensors")
    options = ("--pretrained_model_name_or_path", base, "--save_to", tmp_path / "a.safetensors")
    assert run_merge("--models", adapter_file, *options) == 0
    found = load_file(tmp_path / "a.safetensors")
    changed = set()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        if not torch.equal(found[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8)):
            changed.add(name)
    assert len(changed) == 278 and all(name.startswith("model.diffusion_model.") for name in changed)
    assert found["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (48, 48, 1, 1)


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_ratio_zero_is_the_base_to_the_bit(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}")
    adapter = write_whole_adapter(folder, tmp_path)
    base = single_file(folder, tmp_path / "base.safetensors", torch.bfloat16)
    for name, words in (("folder", ()), ("file", ("--pretrained_model_name_or_path", base))):
        file = tmp_path / f"from_{name}.safetensors"
        assert run_merge("--models", adapter, "--ratios", 0, "--save_to", file, *words) == 0
        expected = ldm_checkpoint(folder) if name == "folder" else load_file(base)
        assert_same_tensors(load_file(file), {key: value.contiguous() for key, value in expected.items()})


def test_merging_twice_is_twice_the_ratio_and_minus_one_undoes_it(sd15: Setting, tmp_path: Path) -> None:
    once = sd15.merge(tmp_path / "once.safetensors")
    base = {name: value.contiguous() for name, value in ldm_checkpoint(sd15.base).items()}
    results = {
        "again": load_file(sd15.merge(tmp_path / "again.safetensors", base=once)),
        "double": load_file(sd15.merge(tmp_path / "double.safetensors", "--ratios", 2)),
        "undone": load_file(sd15.merge(tmp_path / "undone.safetensors", "--ratios", -1, base=once)),
    }
    for name, value in base.items():
        size = float(results["double"][name].abs().max())
        torch.testing.assert_close(results["again"][name], results["double"][name], rtol=0, atol=5e-7 * size)
        torch.testing.assert_close(results["undone"][name], value, rtol=0, atol=5e-7 * max(size, 1e-9))


# ------------------------------------------------------------------------------------------------ what others read


@pytest.mark.bits
def test_diffusers_draws_from_the_file_what_it_draws_from_the_folder(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    with without_complaint(caplog):
        from_folder = setting.kind.from_pretrained(setting.folder, local_files_only=True)
        from_file = setting.kind.from_single_file(str(setting.file), config=str(setting.folder), local_files_only=True)
    found, expected = picture(from_file), picture(from_folder)
    assert expected.std() > 0.02 and np.array_equal(found, expected)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_the_file_and_its_report_can_be_read_by_whoever_the_umask_allows(sd15: Setting, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        sd15.merge(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == dict.fromkeys(
        ("a.safetensors", "a_merge_report.md", "a_merge_report.json"), 0o640
    )


def test_metadata_say_what_it_is_and_what_it_was_made_of(setting: Setting, tmp_path: Path) -> None:
    file = setting.merge(tmp_path / "mine.safetensors", "--ratios", 0.7, "--text_encoder_ratio", 0.5)
    metadata = metadata_of(file)
    is_sdxl = setting.kind is StableDiffusionXLPipeline
    said = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert metadata["format"] == "pt" and said["sai_model_spec"] == "1.0.1" and said["title"] == "mine"
    assert said["architecture"] == ("stable-diffusion-xl-v1-base" if is_sdxl else "stable-diffusion-v1")
    assert said["resolution"] == ("1024x1024" if is_sdxl else "512x512") and said["prediction_type"] == "epsilon"
    assert said["merged_from"] == f"{setting.base.name}, a"
    record = json.loads(metadata["repa_merge"])
    parts = [file for file in FILES.values() if (setting.base / file).exists()]
    assert record["base"] == {
        "name": setting.base.name,
        "sha256": {part: file_hash(setting.base / part) for part in sorted(parts)},
    }
    strength = {"strength": "0.7, text encoders x 0.5"}
    assert record["adapters"] == [{"file": "a.safetensors", "sha256": file_hash(setting.adapter), **strength}]
    assert str(setting.base.parent) not in json.dumps(metadata)


def test_metadata_name_a_single_file_base_by_its_name(sd15: Setting, tmp_path: Path) -> None:
    base = single_file(sd15.base, tmp_path / "base.safetensors")
    record = json.loads(metadata_of(sd15.merge(tmp_path / "a.safetensors", base=base))["repa_merge"])
    assert record["base"] == {"name": base.name, "sha256": {base.name: file_hash(base)}}


def test_the_reports_say_the_same_in_two_ways(setting: Setting) -> None:
    report, text = read_json(setting.folder / "merge_report.json"), (setting.folder / "merge_report.md").read_text()
    assert report["passed"] and "**All checks passed.**" in text and len(report["checks"]) == 11
    for component in report["components"]:
        assert "| " + " | ".join(str(value) for value in component.values()) + " |" in text
    assert [component["changed"] for component in report["components"] if component["name"] == VAE] == [0]
    assert {component["name"] for component in report["components"]} >= {TEXT_ENCODER, VAE}
    assert report["sha256"][str(setting.adapter)] == file_hash(setting.adapter)
    assert report["outputs"]["model.safetensors"] == setting.file.stat().st_size
    assert (
        max(change["relative"] for change in report["largest_changes"]) == report["largest_changes"][0]["relative"] > 0
    )
