"""Options of merge_lora.py: kohya's names, what is refused, what is said of options that have no effect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import files
from library.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, UserError
from library.files import file_hash
from library.merging import lora_file
from library.merging.source import newest_output, read_source
from library.models.header import read_shapes
from networks.adapter_file import BASE_MODEL_KEY, read_adapter
from networks.adapters import Adapter
from tests.tools.adapters import text_lora
from tests.tools.merging import (
    assert_same_tensors,
    left_over,
    metadata_of,
    run_merge,
    save,
    single_file,
    write_whole_adapter,
)


def test_kohyas_commands_run(adapter_file: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    """sdxl_merge_lora.py --sd_model ... --lbws ..., svd_merge_lora.py --device ..., resize_lora.py --model ..."""
    base = single_file(tiny_sd15, tmp_path / "base.safetensors")
    lists = ["--block_ratios", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0]"]
    ours = ["--pretrained_model_name_or_path", base, "--models", adapter_file, "--ratios", 0.5, *lists]
    theirs = [
        "--sd_model",
        base,
        "--models",
        adapter_file,
        "--ratios",
        0.5,
        "--lbws",
        *lists[1:],
        "--precision",
        "float",
    ]
    for name, words in (("a", ours), ("b", theirs)):
        assert run_merge(*words, "--save_to", tmp_path / f"{name}.safetensors") == EXIT_OK
    assert_same_tensors(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    resized = ["--model", adapter_file, "--lora_only", "--new_rank", 4, "--device", "cuda"]
    dynamic = ["--dynamic_method", "sv_ratio", "--dynamic_param", 1]
    assert run_merge(*resized, *dynamic, "--save_to", tmp_path / "c.safetensors") == EXIT_OK
    assert {module.rank for module in read_adapter(tmp_path / "c.safetensors").modules.values()} == {1}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--concat"], "Not offered here: --concat: sums of LoRAs are exact without it, with --lora_only."),
        (["--precision", "fp16"], "Not offered here: --precision: merging is computed in float32."),
        (["--unet_ratio", "11"], "unet_ratio must lie between -10 and 10, got 11.0."),
        (["--ratios", "nan"], "ratios must lie between -10 and 10, got nan."),
        (["--ratio", "1", "2"], "ratios wants one entry per adapter, got 2 for 1 in models."),
        (["--lora_only", "--sd_model", "x"], "With --lora_only a base says the family alone: --family sd15"),
        (
            ["--lora_only", "--sd_model", "x", "--family", "sdxl"],
            "family and pretrained_model_name_or_path both say what the adapters are for; give one of the two.",
        ),
        (["--new_rank", "4"], "new_rank is for --lora_only."),
        (["--lora_only", "--dynamic_method", "sv_fro"], "dynamic_method needs new_rank as well"),
        (
            ["--lora_only", "--new_rank", "4", "--dynamic_param", "0.9"],
            "and dynamic_method belong together; give both.",
        ),
        (
            ["--lora_only", "--new_rank", "4", "--dynamic_method", "sv_fro", "--dynamic_param", "2"],
            "dynamic_param of sv_fro must be above 0 and at most 1, got 2.0.",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], sentence: str, adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_merge("--models", adapter_file, *words, "--save_to", tmp_path / "a.safetensors") == EXIT_BAD_INPUT
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_alpha_that_is_not_needed_is_told(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", adapter_file, "--save_to", tmp_path / "a.safetensors", "--dry_run", "--network_alpha"]
    assert run_merge(*words, 8) == EXIT_OK
    assert "its alpha is known, so --network_alpha 8 is not taken" in capsys.readouterr().out
    assert run_merge(*words, 2) == EXIT_OK
    assert "is not taken" not in capsys.readouterr().out


def test_a_dry_run_tells_what_the_merge_would_stop_at(
    adapter_file: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", adapter_file, "--save_to", tmp_path / "a.safetensors", "--sd_model"]
    assert "It looks like an SD1.5 LoRA on an SDXL model." in refused_by_both([*words, tiny_sdxl], capsys)
    assert "gone does not exist" in refused_by_both([*words, tmp_path / "gone"], capsys)
    assert run_merge(*words, "owner/other", "--dry_run") == EXIT_OK
    assert "missing    owner/other is not on this machine" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def refused_by_both(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What the dry run says, and the real run in the same words."""
    said = []
    for more in (["--dry_run"], []):
        assert run_merge(*words, *more) == EXIT_BAD_INPUT
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and said[0].count("\n") == 1
    return said[0]


def test_a_dry_run_of_a_sum_tells_what_the_sum_would_stop_at(
    adapter_file: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdxl = write_whole_adapter(tiny_sdxl, tmp_path)
    text = save(text_lora(), tmp_path / "text.safetensors", {"ss_base_model_version": "sd_v1"})
    out = ["--lora_only", "--save_to", tmp_path / "out.safetensors"]
    for words, said in (
        ([adapter_file, sdxl], "Adapters of SD1.5 and SDXL cannot be added"),
        ([text, "--lora_format", "peft"], "PEFT's format holds an adapter of one model"),
        ([adapter_file, "--ratios", 0], "Nothing remains of the sum"),
        ([adapter_file, "--ratios", 0, "--new_rank", 2], "Nothing remains of the sum"),
    ):
        assert said in refused_by_both(["--models", *words, *out], capsys)


def test_a_dry_run_finds_a_full_disk(
    adapter_file: Path,
    tiny_sd15: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    words = ["--models", adapter_file, "--sd_model", tiny_sd15, "--output_dir", tmp_path / "out", "--save_single_file"]
    assert "The merged model needs" in refused_by_both(words, capsys)


def test_home_is_meant_by_a_tilde_and_an_empty_folder_is_filled(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = save(load_file(adapter_file), tmp_path / "my lora ü.safetensors", metadata_of(adapter_file))
    (tmp_path / "merged").mkdir()
    assert run_merge("--models=~/my lora ü.safetensors", "--output_dir=~/merged") == EXIT_OK
    assert run_merge("--models=~/my lora ü.safetensors", "--lora_only", "--save_to=~/b.safetensors") == EXIT_OK
    assert (tmp_path / "merged" / "model_index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "merged", model.name]


def test_a_link_is_followed_and_stays(adapter_file: Path, tmp_path: Path) -> None:
    """Outputs often lie on another disk."""
    (tmp_path / "disk").mkdir()
    for name in ("merged", "a.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for _ in range(2):
        assert run_merge("--models", adapter_file, "--output_dir", tmp_path / "merged", "--overwrite") == EXIT_OK
        assert run_merge("--models", adapter_file, "--save_to", tmp_path / "a.safetensors", "--overwrite") == EXIT_OK
    assert all((tmp_path / name).is_symlink() for name in ("merged", "a.safetensors"))
    assert left_over(tmp_path) == left_over(tmp_path / "disk") == []
    assert read_shapes(tmp_path / "disk" / "a.safetensors").keys()


def test_what_is_made_of_adapters_says_of_which(adapter_file: Path, tmp_path: Path) -> None:
    lora = tmp_path / "a.safetensors"
    assert run_merge("--models", adapter_file, "--ratios", 0.5, "--lora_only", "--save_to", lora) == EXIT_OK
    record = json.loads(metadata_of(lora)["repa_merge"])
    assert record["adapters"] == [{"file": adapter_file.name, "sha256": file_hash(adapter_file), "strength": "0.5"}]


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_a_lora_that_reads_back_otherwise_never_takes_its_place(
    form: str, adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", adapter_file, "--lora_only", "--lora_format", form, "--save_to", tmp_path / "a.safetensors"]
    assert run_merge(*words) == EXIT_OK
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    inner = lora_file.read_adapter

    def halved(path: Path) -> Adapter:
        adapter = inner(path)
        modules = {target: replace(m, up=m.up / 2) for target, m in adapter.lora_modules("this test").items()}
        return replace(adapter, modules=modules)

    monkeypatch.setattr(lora_file, "read_adapter", halved)
    assert run_merge(*words, "--overwrite", "--ratios", 0.5) == EXIT_FAILED
    assert "safetensors reads back differently from what was written, so it was removed." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


# ------------------------------------------------------------------------------------------------ what --models may name


def test_an_adapter_that_names_its_base_and_is_no_sum_is_a_training_output(adapter_file: Path, tmp_path: Path) -> None:
    metadata = metadata_of(adapter_file)
    file = save(load_file(adapter_file), tmp_path / "mine" / "mine.safetensors", metadata)
    assert newest_output(tmp_path) == file
    save(load_file(adapter_file), file, metadata | {"repa_merge": "{}"})
    with pytest.raises(UserError, match="There is no training output"):
        newest_output(tmp_path)
    save(load_file(adapter_file), file, {key: value for key, value in metadata.items() if key != BASE_MODEL_KEY})
    with pytest.raises(UserError, match="There is no training output"):
        newest_output(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights", "model"])
def test_a_folder_of_peft_diffusers_or_accelerate_is_read(name: str, adapter_file: Path, tmp_path: Path) -> None:
    file = save(load_file(adapter_file), tmp_path / f"{name}.safetensors")
    assert read_source(tmp_path).file == file


def test_a_state_in_parts_names_the_file_to_take(tmp_path: Path) -> None:
    state = tmp_path / "mine-state"
    save({"x": torch.zeros(1)}, state / "lora_unet.safetensors")
    (state / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"keeps its adapter in parts. Name the adapter file that was saved with it\.$"):
        read_source(state)
    file = save({"x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=f"that was saved with it, {file}"):
        read_source(state)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".PTH"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle, which can run code .* convert it once .*: python -c "):
        read_source(path)
