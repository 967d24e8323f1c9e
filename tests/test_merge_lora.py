"""merge_lora.py: what it reads, which base it takes, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_lora
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.merging.diffusers_folder import check_output
from library.merging.source import base_model_of, read_source
from networks.adapter_file import read_adapter
from networks.names import kohya_name
from tests.tools.adapters import SPEC, write_lora


@pytest.fixture(scope="module")
def params(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return write_lora(tiny_sd15, tmp_path_factory.mktemp("adapter") / "demo.safetensors")


def write_state(folder: Path, params: dict[str, Tensor], *, ema: bool = True, base_model: str = "tiny-sd15") -> Path:
    """A training state as train_repa.py leaves it."""
    metadata = {"format": "pt", "lora_spec": SPEC.to_json()}
    folder.mkdir(parents=True)
    save_file(params, folder / "lora.safetensors", metadata=metadata)
    if ema:
        heads = {"align_heads.mid.proj.0.weight": torch.zeros(2, 2)}
        halved = {name: value / 2 for name, value in params.items()}
        save_file({**halved, **heads}, folder / "ema.safetensors", metadata=metadata)
    (folder / "state.json").write_text(json.dumps({"step": 150, "base_model": base_model}))
    return folder


def test_a_training_state_is_read_with_its_base(params: dict[str, Tensor], adapter_file: Path, tmp_path: Path) -> None:
    source = read_source(write_state(tmp_path / "step_000150", params))
    expected = read_adapter(adapter_file)
    assert (source.base_model, source.named_in) == ("tiny-sd15", "state.json")
    assert source.adapter.modules.keys() == expected.modules.keys()
    for name, module in source.adapter.modules.items():
        assert torch.equal(module.down, expected.modules[name].down)
        assert module.alpha == expected.modules[name].alpha


def test_the_average_of_a_training_state_is_read_without_heads(params: dict[str, Tensor], tmp_path: Path) -> None:
    source = read_source(write_state(tmp_path / "step_000150", params), use_ema=True)
    assert source.file.name == "ema.safetensors"
    assert source.adapter.left_out == ("align_heads.mid.proj.0.weight",)
    name = next(name for name in params if ".lora_A." in name)
    assert torch.equal(source.adapter.modules[kohya_name(name.split(".lora_A.")[0])].down, params[name] / 2)


def refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert sentence in str(caught.value)


def test_what_cannot_be_read_is_named(params: dict[str, Tensor], adapter_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    state = write_state(tmp_path / "step_000150", params, ema=False)
    refused(lambda: read_source(tmp_path / "empty"), "empty is no training state: there is no state.json in it.")
    refused(lambda: read_source(tmp_path), f"there is no state.json in it. Its newest state is {state}.")
    refused(lambda: read_source(state, use_ema=True), "has no ema.safetensors. The run kept no moving average")
    refused(
        lambda: read_source(adapter_file, use_ema=True), "--use_ema picks the averaged weights of a training state, but"
    )
    refused(lambda: read_source(tmp_path / "no.safetensors"), "no.safetensors does not exist.")
    broken = dict(params) | {next(iter(params)): torch.full_like(next(iter(params.values())), torch.nan)}
    refused(lambda: read_source(write_state(tmp_path / "step_2", broken)), "has values that are not finite")


def test_the_base_is_the_given_one_else_the_one_the_adapter_names(adapter_file: Path, tiny_sd15: Path) -> None:
    source = read_source(adapter_file)
    assert base_model_of(source, "other") == "other"
    assert base_model_of(source, None) == str(tiny_sd15)
    unnamed = replace(
        source, base_model=None, adapter=replace(source.adapter, metadata={"ss_sd_model_name": "v1-5.ckpt"})
    )
    refused(lambda: base_model_of(unnamed, None), "only says that its base was called v1-5.ckpt. Name the base with")
    unnamed = replace(unnamed, adapter=replace(source.adapter, metadata={}))
    refused(lambda: base_model_of(unnamed, None), "does not say which base model it belongs to. Name the base with")


def test_only_an_earlier_merge_is_replaced(tmp_path: Path) -> None:
    photos, merged = tmp_path / "photos", tmp_path / "merged"
    photos.mkdir()
    (merged / "unet").mkdir(parents=True)
    (merged / "model_index.json").write_text("{}")
    refused(
        lambda: check_output(merged, [], overwrite=False), "exists already. Name another --output_dir, or replace it"
    )
    refused(lambda: check_output(photos, [], overwrite=True), "photos is no diffusers folder, so --overwrite does not")
    refused(lambda: check_output(merged, [merged], overwrite=True), "which is to be read. Name another --output_dir.")
    refused(lambda: check_output(merged, [merged / "unet"], overwrite=True), "which is to be read.")
    check_output(merged, [tmp_path], overwrite=True)
    check_output(tmp_path / "new", [], overwrite=False)


def test_the_script_merges_reports_and_replaces(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(adapter_file), "--output_dir", str(tmp_path / "m")]
    assert merge_lora.main(arguments) == EXIT_OK
    said = capsys.readouterr().out
    assert f"base       {tiny_sd15} (named in the adapter's metadata)" in said
    assert re.search(r"unet +686 +686 +278 +\d\.\d\de[+-]\d\d  \S+\.weight\n", said)
    assert re.search(r"text_encoder +196 +196 +0 +copied as it is\n", said)
    assert f"Wrote {tmp_path / 'm'} (" in said
    assert merge_lora.main(arguments) == EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    assert merge_lora.main([*arguments, "--overwrite", "--ratio", "0"]) == EXIT_OK
    assert "Nothing has changed: the adapter is zero (was it trained?) or the ratio is." in capsys.readouterr().out
    file = "unet/diffusion_pytorch_model.safetensors"
    base, merged = load_file(tiny_sd15 / file), load_file(tmp_path / "m" / file)
    assert all(torch.equal(merged[name], value) for name, value in base.items())


def test_another_base_than_the_adapters_own_is_told(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(adapter_file), "--output_dir", str(tmp_path / "m"), "--dry_run"]
    assert merge_lora.main([*arguments, "--pretrained_model_name_or_path", "owner/other"]) == EXIT_OK
    assert f"base       owner/other (the adapter was trained on {tiny_sd15})" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge_lora.main(["--model", str(adapter_file), "--output_dir", str(tmp_path / "m"), "--dry-run"]) == EXIT_OK
    assert "278 modules, rank 2 to 4, alpha 1 to 2" in capsys.readouterr().out
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "absent.safetensors"], "model absent.safetensors does not exist."),
        (["--model", ".", "--ratio", "11"], "ratio must lie between -10 and 10, got 11.0."),
        (["--model", ".", "--network_alpha", "0"], "network_alpha must be positive, got 0.0."),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_lora.main([*arguments, "--output_dir", str(tmp_path / "m")]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {sentence}\n"
