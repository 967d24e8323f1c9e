"""What a merge wrote is read again: each check fails when it should, and then nothing stands at the output."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from library.files import read_json
from library.merging import write
from library.merging.layouts import Merging, single_file_tensors
from library.merging.read_back import Check, verify
from library.models.tensor_files import TensorFile, write_tensor_file
from networks.adapter_file import read_adapter
from networks.names import TEXT_ENCODER, UNET, VAE
from tests.tools.merging import FILES, left_over, merging_of, opened, run_merge, save, single_file, write_whole_adapter

Change = Callable[[dict[str, Tensor]], object]

NAMES = {
    *("keys and shapes", "leftovers of training", "critical layers", "untouched tensors", "merged layers", "finite"),
}
VAE_IN = "first_stage_model.encoder.conv_in.weight"
UNET_OUT = "model.diffusion_model.out.2.weight"
TO_Q = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
TO_K = TO_Q.replace("to_q", "to_k")
STACK = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias"
PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def merging(tiny_sd15: Path, adapter_file: Path) -> Merging:
    return merging_of(tiny_sd15, (read_adapter(adapter_file), 1.0))


@pytest.fixture(scope="module")
def tensors(merging: Merging, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return written(merging, tmp_path_factory.mktemp("right") / "a.safetensors")


def written(merging: Merging, path: Path) -> dict[str, Tensor]:
    write_tensor_file(path, single_file_tensors(merging), {})
    return load_file(path)


def check(merging: Merging, path: Path, names: Iterable[str] = ()) -> dict[str, Check]:
    names = names or TensorFile(path).tensors
    return {c.name.removeprefix("file: "): c for c in verify(merging, opened(path), names, "file")}


def failed(checks: dict[str, Check]) -> set[str]:
    assert checks.keys() == NAMES
    return {name for name, one in checks.items() if not one.passed}


def nudge(key: str) -> Change:
    """The next number that can be written, in one value."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1).view(torch.int32)[5] ^= 1

    return change


def fill(key: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[-1] = value

    return change


def cast(key: str) -> Change:
    return lambda tensors: tensors.update({key: tensors[key].half()})


def swap(tensors: dict[str, Tensor]) -> None:
    tensors[TO_Q], tensors[TO_K] = tensors[TO_K].clone(), tensors[TO_Q].clone()


def cut(key: str) -> Change:
    return lambda tensors: tensors.update({key: tensors[key][1:].clone()})


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda tensors: None, set()),
        (nudge(VAE_IN), {"untouched tensors"}),
        (nudge(TO_Q), {"merged layers"}),
        (cast(VAE_IN), {"untouched tensors"}),
        (cast(TO_Q), {"merged layers"}),
        (swap, {"merged layers"}),
        (cut(VAE_IN), {"keys and shapes", "untouched tensors"}),
        (cut(TO_Q), {"keys and shapes", "merged layers"}),
        (lambda tensors: tensors.pop(VAE_IN), {"keys and shapes"}),
        (lambda tensors: tensors.pop(UNET_OUT), {"keys and shapes", "critical layers"}),
        (fill(VAE_IN, torch.nan), {"untouched tensors", "finite"}),
        (fill(TO_Q, torch.inf), {"merged layers", "finite"}),
    ],
    ids=[
        *("right", "untouched_bit", "merged_bit", "untouched_format", "merged_format", "swapped", "untouched_shape"),
        *("merged_shape", "missing", "missing_critical", "nan", "infinite"),
    ],
)
def test_each_check_fails_when_it_should(
    change: Change, failing: set[str], merging: Merging, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = dict(tensors)
    change(changed)
    checks = check(merging, save(changed, tmp_path / "a.safetensors"))
    assert failed(checks) == failing
    for name in failing - {"critical layers"}:
        assert re.fullmatch(r"\d+ are not \(first: \S+(, \S+)*\)", checks[name].found)


@pytest.mark.parametrize("key", [STACK, PROJECTION])
def test_tensors_that_are_laid_out_otherwise_are_compared_too(key: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """SDXL's second text encoder: stacked, and transposed, against a folder."""
    merging = merging_of(tiny_sdxl, (read_adapter(write_whole_adapter(tiny_sdxl, tmp_path)), 1.0))
    tensors = written(merging, tmp_path / "b.safetensors")
    assert not failed(check(merging, tmp_path / "b.safetensors"))
    nudge(key)(tensors)
    assert failed(check(merging, save(tensors, tmp_path / "c.safetensors"))) == {"untouched tensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_told_and_is_no_failure(
    dtype: torch.dtype, tiny_sd15: Path, adapter_file: Path, tmp_path: Path
) -> None:
    merging = merging_of(tiny_sd15, (read_adapter(adapter_file), 1.0), dtype=dtype)
    written(merging, tmp_path / "a.safetensors")
    checks = check(merging, tmp_path / "a.safetensors")
    assert not failed(checks)
    name = str(dtype).removeprefix("torch.")
    assert checks["untouched tensors"].found == f"852 equal to the base's, 852 of them rounded to {name}"
    largest = float(checks["merged layers"].found.split()[-1])
    assert 0 < largest < 4 * torch.finfo(dtype).eps


def test_the_adapter_is_recomputed_and_not_believed(
    merging: Merging, tiny_sd15: Path, adapter_file: Path, tmp_path: Path
) -> None:
    """A file of another ratio, whole and sound in itself."""
    other = merging_of(tiny_sd15, (read_adapter(adapter_file), 0.999))
    written(other, tmp_path / "a.safetensors")
    checks = check(merging, tmp_path / "a.safetensors")
    assert failed(checks) == {"merged layers"}
    assert checks["merged layers"].found.startswith("278 are not (first: ")


@pytest.mark.parametrize("name", ["a.base_layer.weight", "unet.lora_A", "align_heads.x", "base_model.model.x"])
def test_leftovers_are_looked_for_in_every_name(
    name: str, merging: Merging, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(tensors, tmp_path / "a.safetensors")
    checks = check(merging, path, [*tensors, name])
    assert failed(checks) == {"leftovers of training"}
    assert checks["leftovers of training"].found == f"1 are not (first: {name})"


# ------------------------------------------------------------------------------------------------ the whole script


def flip_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def add_leftover(path: Path) -> None:
    tensors = load_file(path)
    first = next(name for name in tensors if "conv_in" in name or "input_blocks" in name)
    save(tensors | {first.rpartition(".")[0] + ".lora_A.weight": torch.zeros(1)}, path)


def drop_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save(tensors, path)


def break_writer(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], only: str = "") -> None:
    """Let every file (whose path contains `only`) be damaged right after it was written."""

    def broken(path: Path, *arguments: Any, **options: Any) -> None:
        write_tensor_file(path, *arguments, **options)
        if only in str(path):
            harm(path)

    monkeypatch.setattr(write, "write_tensor_file", broken)


OUTPUTS = {"file": ["--save_to", "m.safetensors"], "folder": ["--output_dir", "m", "--save_single_file"]}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("harm", [flip_last_byte, cut_off, add_leftover, drop_one])
def test_damage_while_writing_leaves_nothing_and_exit_code_1(
    harm: Callable[[Path], None], output: str, adapter_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    # Of a folder, the U-Net's file alone: what comes after it is sound.
    break_writer(monkeypatch, harm, "unet" if output == "folder" else "")
    assert run_merge("--models", adapter_file, *OUTPUTS[output]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_that_is_not_the_folder_fails_the_whole(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_writer(monkeypatch, lambda path: flip_last_byte(path) if path.parent.name.startswith(".m.tmp") else None)
    assert run_merge("--models", adapter_file, "--output_dir", tmp_path / "m", "--save_single_file") == EXIT_FAILED
    said = capsys.readouterr().err
    assert "1 checks of the merged model failed, so nothing was written to" in said
    assert re.search(r": single file: untouched tensors: 1 are not \(first: \S+\)\n", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_earlier_output_outlives_a_failed_check(
    output: str, adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--models", adapter_file, *OUTPUTS[output]]
    assert run_merge(*arguments) == EXIT_OK
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    break_writer(monkeypatch, flip_last_byte)
    assert run_merge(*arguments, "--overwrite") == EXIT_FAILED
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert left_over(tmp_path) == []


def test_a_full_disk_while_writing_leaves_nothing_and_exit_code_1(
    adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    break_writer(monkeypatch, full)
    for output in (("--save_to", tmp_path / "m.safetensors"), ("--output_dir", tmp_path / "m")):
        assert run_merge("--models", adapter_file, *output) == EXIT_FAILED
        assert "m could not be written: No space left on device." in capsys.readouterr().err.replace(".safetensors", "")
        assert list(tmp_path.iterdir()) == []


def damaged_base(base: Path, folder: Path, component: str, key: str, value: float = torch.nan) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / FILES[component])
    fill(key, value)(tensors)
    save(tensors, folder / FILES[component])
    return folder


@pytest.mark.parametrize(
    ("component", "key", "value", "precision", "code", "sentence"),
    [
        (VAE, "quant_conv.bias", torch.nan, "", EXIT_FAILED, "folder: finite: 1 are not (first: quant_conv.bias)"),
        (UNET, "mid_block.attentions.0.proj_in.weight", torch.nan, "", EXIT_BAD_INPUT,
         "mid_block.attentions.0.proj_in.weight of the base has values that are not finite: the base is damaged."),
        (TEXT_ENCODER, "text_model.final_layer_norm.bias", torch.inf, "fp16", EXIT_BAD_INPUT,
         "text_model.final_layer_norm.bias of the base has values that are not finite: the base is damaged."),
        (VAE, "quant_conv.bias", 1e6, "fp16", EXIT_BAD_INPUT,
         "quant_conv.bias has values that are not finite as float16. Try --save_precision float."),
    ],
)  # fmt: skip
def test_a_base_with_numbers_that_are_none_is_refused(
    component: str, key: str, value: float, precision: str, code: int, sentence: str, adapter_file: Path,
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = damaged_base(tiny_sd15, tmp_path / "base", component, key, value)
    options = ["--models", adapter_file, "--pretrained_model_name_or_path", base, "--output_dir", tmp_path / "m"]
    assert run_merge(*options, *(("--save_precision", precision) if precision else ())) == code
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_report_names_every_check(adapter_file: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    base = single_file(tiny_sd15, tmp_path / "base.safetensors", torch.float16)
    options = ["--models", adapter_file, "--pretrained_model_name_or_path", base]
    assert run_merge(*options, "--output_dir", tmp_path / "m", "--save_single_file") == EXIT_OK
    checks = read_json(tmp_path / "m" / "merge_report.json")["checks"]
    assert {check["name"] for check in checks} == {f"folder: {name}" for name in NAMES} | {
        f"single file: {name}" for name in NAMES - {"merged layers"}
    }
    assert all(check["passed"] for check in checks)
