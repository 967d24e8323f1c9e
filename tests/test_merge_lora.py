"""merge_lora.py: what it reads, which base it takes, where it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge_lora
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.merging.source import base_model_of, read_source
from library.merging.write import Output, check_output
from networks.adapter_file import read_adapter
from networks.network import Network
from tests.tools.adapters import one_module, write_lora
from tests.tools.merging import FILES, assert_same_tensors, metadata_of, run_merge, save, single_file, write_state


@pytest.fixture(scope="module")
def network(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return write_lora(tiny_sd15, tmp_path_factory.mktemp("adapter") / "demo.safetensors")


def refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert sentence in str(caught.value)


# ------------------------------------------------------------------------------------------------ what is read


def test_a_training_state_is_read_with_its_base(network: Network, adapter_file: Path, tmp_path: Path) -> None:
    source = read_source(write_state(tmp_path / "step_000150", network))
    expected = read_adapter(adapter_file)
    assert (source.base_model, source.named_in) == ("tiny-sd15", "state.json")
    assert source.adapter.modules.keys() == expected.modules.keys()
    for target, module in source.adapter.modules.items():
        assert torch.equal(module.down, expected.modules[target].down)
        assert module.alpha == expected.modules[target].alpha


def test_the_average_of_a_training_state_is_read_without_heads(network: Network, tmp_path: Path) -> None:
    source = read_source(write_state(tmp_path / "step_000150", network), use_ema=True)
    assert source.file.name == "ema.safetensors"
    assert source.adapter.left_out == ("align_heads.mid.proj.0.weight",)
    for target, module in network.adapter().modules.items():
        assert torch.equal(source.adapter.modules[target].down, module.down / 2)


def test_what_cannot_be_read_is_named(network: Network, adapter_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    state = write_state(tmp_path / "step_000150", network)
    refused(lambda: read_source(tmp_path / "empty"), "empty is no training state: there is no state.json in it.")
    refused(lambda: read_source(tmp_path), f"there is no state.json in it. Its newest state is {state}.")
    (state / "ema.safetensors").unlink()
    refused(lambda: read_source(state, use_ema=True), "has no ema.safetensors. The run kept no moving average")
    sentence = "--use_ema picks the averaged weights of a training state, but"
    refused(lambda: read_source(adapter_file, use_ema=True), sentence)
    save(load_file(adapter_file), tmp_path / "empty" / "model.safetensors")
    refused(lambda: read_source(tmp_path / "empty", use_ema=True), sentence)


def test_the_base_is_the_given_one_else_the_one_the_adapters_name(adapter_file: Path, tiny_sd15: Path) -> None:
    source = read_source(adapter_file)
    other = replace(source, base_model="owner/other")
    assert base_model_of([source], "given") == ("given", f"the adapter was trained on {tiny_sd15}")
    assert base_model_of([source], str(tiny_sd15)) == (str(tiny_sd15), "as given")
    assert base_model_of([source, source], None) == (str(tiny_sd15), "named in the adapter's metadata")
    assert base_model_of([source, replace(source, base_model=None)], None)[0] == str(tiny_sd15)
    refused(
        lambda: base_model_of([source, other], None),
        f"The adapters were trained on different bases ({tiny_sd15}, owner/other). Name the one to merge into with",
    )
    assert base_model_of([source, other], "given")[1] == f"the adapter was trained on {tiny_sd15}, owner/other"
    unnamed = replace(
        source, base_model=None, adapter=replace(source.adapter, metadata={"ss_sd_model_name": "v1-5.ckpt"})
    )
    refused(lambda: base_model_of([unnamed], None), "only says that its base was called v1-5.ckpt. Name the base with")
    unnamed = replace(unnamed, adapter=replace(source.adapter, metadata={}))
    refused(lambda: base_model_of([unnamed], None), "does not say which base model it belongs to. Name the base with")
    wrapped = replace(unnamed, adapter=replace(unnamed.adapter, frozen=("x",)))
    assert base_model_of([wrapped], None)[0] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_a_base_that_kohyas_metadata_names_is_found_beside_the_adapter(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = single_file(tiny_sd15, tmp_path / "mine.safetensors")
    adapter = save(load_file(adapter_file), tmp_path / "a.safetensors", {"ss_sd_model_name": base.name})
    assert run_merge("--models", adapter, "--save_to", tmp_path / "m.safetensors") == EXIT_OK
    assert f"base       {base} (named in the adapter's metadata by its file name)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the bare command


@pytest.fixture
def project(network: Network, adapter_file: Path, tiny_sd15: Path, tmp_path: Path) -> Path:
    """A folder with training outputs: an older adapter file, a newer state, and files of other kinds, newer still."""
    outputs = tmp_path / "outputs"
    trained = save(load_file(adapter_file), outputs / "old" / "old.safetensors", metadata_of(adapter_file))
    state = write_state(outputs / "new" / "step_000150", network, str(tiny_sd15))
    os.utime(trained, (1000, 1000))
    os.utime(state / "state.json", (2000, 2000))
    save({"x": torch.zeros(1)}, outputs / "new" / "model.safetensors")
    (outputs / "new" / "broken.safetensors").write_bytes(b"being written")
    return tmp_path


def test_a_bare_command_merges_the_newest_training_output_into_its_own_base(
    project: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert run_merge() == EXIT_OK
    said = capsys.readouterr()
    assert "No --models given: taking the newest training output, outputs/new/step_000150.\n" in said.err
    assert f"base       {tiny_sd15} (named in state.json)\n" in said.out
    assert "Wrote outputs/new/merged (" in said.out
    assert (project / "outputs" / "new" / "merged" / "model_index.json").exists()
    assert run_merge() == EXIT_BAD_INPUT  # nothing newer has been trained
    assert "outputs/new/merged exists already. Name another output, or replace it" in capsys.readouterr().err


def test_a_bare_command_takes_a_finished_adapter_that_is_newer_and_its_average_when_asked(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    os.utime("outputs/old/old.safetensors", (3000, 3000))
    Path("outputs/old/older-ema.safetensors").write_bytes(Path("outputs/old/old.safetensors").read_bytes())
    assert run_merge("--dry_run") == run_merge("--dry_run", "--use_ema") == EXIT_OK
    taken = re.findall(r"training output, (\S+)\.\n", capsys.readouterr().err)
    assert taken == ["outputs/old/old.safetensors", "outputs/old/older-ema.safetensors"]


def test_a_sum_of_adapters_is_no_training_output(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    os.utime("outputs/old/old.safetensors", (3000, 3000))
    for _ in range(2):
        assert run_merge("--lora_only", "--overwrite") == EXIT_OK
        assert "training output, outputs/old/old.safetensors." in capsys.readouterr().err
    assert Path("outputs/old/merged_lora.safetensors").exists()


def test_a_bare_command_without_training_output_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_merge() == EXIT_BAD_INPUT
    assert f"There is no training output in {tmp_path / 'outputs'} to merge. Name adapters" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ where it writes


@pytest.mark.bits
def test_the_script_merges_reports_and_replaces(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--models", adapter_file, "--output_dir", tmp_path / "m"]
    assert run_merge(*arguments) == EXIT_OK
    said = capsys.readouterr().out
    assert f"base       {tiny_sd15} (named in the adapter's metadata)" in said
    assert re.search(r"unet +686 +686 +278 +\d\.\d\de[+-]\d\d  \S+\.weight\n", said)
    assert re.search(r"text_encoder +196 +196 +0 +as in the base\n", said)
    assert f"Wrote {tmp_path / 'm'} (" in said
    assert run_merge(*arguments) == EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    assert run_merge(*arguments, "--overwrite", "--ratios", 0) == EXIT_OK
    said = capsys.readouterr().out
    assert f"output     {tmp_path / 'm'} (replacing what is there)\n" in said
    assert "Nothing has changed: the adapter is zero (was it trained?) or the ratio is." in said
    assert_same_tensors(tmp_path / "m" / FILES["unet"], tiny_sd15 / FILES["unet"])


def test_the_options_of_the_conversion_script_still_work(network: Network, tiny_sd15: Path, tmp_path: Path) -> None:
    state = write_state(tmp_path / "step_000150", network, str(tiny_sd15))
    arguments = ["--checkpoint", state, "--output_dir", tmp_path / "sd15", "--save_single_file"]
    assert run_merge(*arguments) == EXIT_OK
    found = {path.name for path in (tmp_path / "sd15").iterdir()}
    assert found == {
        *("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", "model.safetensors"),
        *("merge_report.md", "merge_report.json"),
    }


def test_without_an_output_it_lies_beside_the_adapter(
    adapter_file: Path, network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a state: beside the run's states, not in one."""
    state = write_state(tmp_path / "run" / "step_000150", network)
    outputs = {(): "merged", ("--lora_only",): "merged_lora.safetensors"}
    for model, folder in ((adapter_file, adapter_file.parent), (state, tmp_path / "run")):
        for words, name in outputs.items():
            assert run_merge("--models", model, "--dry_run", *words) == EXIT_OK
            assert f"output     {folder / name}\n" in capsys.readouterr().out


def test_another_base_than_the_adapters_own_is_told(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--models", adapter_file, "--output_dir", tmp_path / "m", "--dry_run"]
    assert run_merge(*arguments, "--pretrained_model_name_or_path", "owner/other") == EXIT_OK
    assert f"base       owner/other (the adapter was trained on {tiny_sd15})" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", adapter_file, adapter_file, "--ratios", 0.7, -0.3, "--output_dir", tmp_path / "m"]
    blocks = ["--block_ratios", "MID=0", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0]"]
    assert run_merge(*arguments, *blocks, "--save_single_file", "--save-precision", "bf16", "--dry-run") == EXIT_OK
    assert re.sub(r"(adapter +)\S+/", r"\1", capsys.readouterr().out.replace(str(tmp_path), "")).startswith(
        "adapter    demo.safetensors: 278 modules, rank 2 to 4, alpha 1 to 2\n"
        "ratio      0.7, MID x 0\n"
        "adapter    demo.safetensors: 278 modules, rank 2 to 4, alpha 1 to 2\n"
        "ratio      -0.3, OUT11 x 0\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_test_picture_is_drawn_when_asked(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.inference import text_to_image

    monkeypatch.setattr(text_to_image, "native_size", lambda pipeline: 64)
    output = ("--save_to", tmp_path / "one.safetensors")
    assert run_merge("--models", adapter_file, *output, "--generate") == EXIT_OK
    assert (tmp_path / "one_test_generation.png").read_bytes()[:4] == b"\x89PNG"


def test_only_an_earlier_merge_is_replaced_and_never_an_input(tmp_path: Path) -> None:
    photos, merged, file = tmp_path / "photos", tmp_path / "merged", tmp_path / "a.safetensors"
    photos.mkdir()
    check_output(Output(photos, None), [])  # there is nothing in it to be lost
    (photos / "1.jpg").write_bytes(b"")
    (merged / "unet").mkdir(parents=True)
    (merged / "merge_report.json").write_text("{}")
    file.write_bytes(b"")

    def check(path: Path, *sources: Path, overwrite: bool = True) -> None:
        is_file = path.suffix == ".safetensors"
        check_output(Output(None if is_file else path, path if is_file else None, overwrite), sources)

    refused(lambda: check(merged, overwrite=False), f"{merged} exists already. Name another output, or replace it")
    refused(lambda: check(file, overwrite=False), f"{file} exists already. Name another output, or replace it")
    (photos / "model_index.json").write_text("{}")  # a model of another's making
    refused(lambda: check(photos), "photos is no earlier merge (it has no merge_report.json), so --overwrite does not")
    refused(lambda: check(merged, merged), f"{merged} is to be read. Name another output.")
    refused(lambda: check(merged, merged / "unet"), f"{merged} holds {merged / 'unet'}, which is to be read.")
    refused(lambda: check(file, tmp_path / "x", file), f"{file} is to be read. Name another output.")
    (tmp_path / "link.safetensors").symlink_to(file)
    refused(lambda: check(tmp_path / "link.safetensors", file), "link.safetensors is to be read.")
    (tmp_path / "folder.safetensors").mkdir()
    refused(
        lambda: check(tmp_path / "folder.safetensors"), "is a folder, so --overwrite does not replace it with a file"
    )
    check(merged, tmp_path)
    check(file)
    check(tmp_path / "new", overwrite=False)
    refused(lambda: check(file / "b.safetensors"), f"{file} cannot be written to: {file} is a file.")


# ------------------------------------------------------------------------------------------------ a LoRA of LoRAs


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_sum_of_adapters_merges_as_the_adapters_do(
    form: str, adapter_file: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    both = ["--models", adapter_file, adapter_file, "--ratios", 0.7, -0.3]
    lora, base = tmp_path / "both.safetensors", ("--pretrained_model_name_or_path", tiny_sd15)
    assert run_merge(*both, "--lora_only", "--lora_format", form, "--save_to", lora) == EXIT_OK
    assert {module.rank for module in read_adapter(lora).modules.values()} == {4, 8}
    for words, name in ((both, "a"), (["--models", lora], "b")):
        assert run_merge(*words, *base, "--save_to", tmp_path / f"{name}.safetensors") == EXIT_OK
    found, expected = (load_file(tmp_path / f"{name}.safetensors") for name in "ba")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_lora_can_be_cut_to_a_rank(adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--lora_only",
        "--new_rank",
        2,
        "--new_conv_rank",
        1,
        "--save_precision",
        "fp16",
        "--output_dir",
        tmp_path,
    ]
    assert run_merge("--models", adapter_file, adapter_file, *options) == EXIT_OK
    said = capsys.readouterr().out
    assert re.search(r"Of each module's norm \d+\.\d% to \d+\.\d% is kept \(mean", said)
    adapter = read_adapter(tmp_path / "merged_lora.safetensors")
    assert {(module.kernel, module.rank) for module in adapter.modules.values()} == {(1, 2), (3, 1)}
    assert {module.down.dtype for module in adapter.modules.values()} == {torch.float16}
    metadata = metadata_of(tmp_path / "merged_lora.safetensors")
    assert metadata["ss_network_dim"] == "2" and metadata["ss_base_model_version"] == "sd_v1"


def test_pefts_form_is_a_folder_of_its_own_so_that_its_configuration_speaks_of_no_other_adapter(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(one_module(), tmp_path / "other.safetensors")
    options = ["--models", adapter_file, "--lora_only", "--lora_format", "peft", "--save_to"]
    assert run_merge(*options, tmp_path / "mine.safetensors") == EXIT_OK
    folder = tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 2.0
    assert read_source(folder).adapter.modules.keys() == read_adapter(adapter_file).modules.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "other.safetensors"}
    capsys.readouterr()
    assert run_merge(*options, tmp_path / "mine.safetensors") == EXIT_BAD_INPUT
    assert "adapter_model.safetensors exists already. Name another output, or" in capsys.readouterr().err
    assert run_merge(*options, tmp_path / "mine.safetensors", "--overwrite") == EXIT_OK
    assert run_merge(*options, tmp_path / "adapter_model.safetensors") == EXIT_BAD_INPUT
    said = (
        f"{tmp_path} holds 2 other files (first: mine). An adapter in PEFT's form wants a folder of its own, for its "
    )
    assert said in capsys.readouterr().err
    assert read_adapter(other).notes[0].startswith("it does not say its alpha")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sum_keeps_the_adapters_number_format(dtype: torch.dtype, adapter_file: Path, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in load_file(adapter_file).items()}
    adapter = save(tensors, tmp_path / "a.safetensors")
    assert run_merge("--models", adapter, "--lora_only", "--save_to", tmp_path / "b.safetensors") == EXIT_OK
    found = load_file(tmp_path / "b.safetensors")
    assert {value.dtype for name, value in found.items() if ".lora_" in name} == {dtype}


def test_inspecting_shows_what_is_in_an_adapter_and_writes_nothing(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_merge("--models", adapter_file, "--inspect") == EXIT_OK
    said = capsys.readouterr().out
    assert str(adapter_file) in said and "SD1.5" in said and "278" in said
    assert list(tmp_path.iterdir()) == []


def test_the_help_is_of_every_option() -> None:
    with pytest.raises(SystemExit) as ended:
        merge_lora.main(["--help"])
    assert ended.value.code == 0


def test_what_is_computed_of_float8_or_of_two_formats_is_written_in_one_that_holds_it(
    adapter_file: Path, tmp_path: Path
) -> None:
    """Half of float8's bits would be lost; float16 has too small a range for bfloat16, which has too few bits for float16."""
    tensors = load_file(adapter_file)
    files = {}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16):
        of_that = {n: value.to(dtype) if ".lora_" in n else value for n, value in tensors.items()}
        files[dtype] = save(of_that, tmp_path / f"{dtype}.safetensors", metadata_of(adapter_file))
    output = tmp_path / "out.safetensors"
    for dtypes, words, expected in (
        ([torch.float8_e4m3fn], [], torch.float8_e4m3fn),
        ([torch.float8_e4m3fn], ["--ratios", "0.5"], torch.float16),
        ([torch.float8_e5m2], ["--new_rank", "2"], torch.float16),
        ([torch.float8_e4m3fn, torch.bfloat16], [], torch.float32),
        ([torch.float16, torch.bfloat16], [], torch.float32),
    ):
        models = [files[dtype] for dtype in dtypes]
        assert run_merge("--models", *models, *words, "--lora_only", "--save_to", output, "--overwrite") == EXIT_OK
        assert {value.dtype for name, value in load_file(output).items() if ".lora_" in name} == {expected}
