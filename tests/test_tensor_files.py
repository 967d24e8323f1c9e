"""Safetensors files read and written in pieces: the library's own reader finds what was put in."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from library.errors import UserError
from library.models import tensor_files
from library.models.tensor_files import (
    DTYPES,
    ByteSource,
    ByteTarget,
    NewTensor,
    Range,
    TensorFile,
    file_bytes,
    in_library_order,
    open_pickled,
    write_tensor_file,
)
from tests.tools.merging import assert_same_tensors, metadata_of

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).half(),
    "number": torch.tensor(0.5, dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 3),
    "integers": torch.arange(3),
    "flags": torch.tensor([True, False, True]),
    "kernel": torch.arange(18.0).reshape(2, 1, 3, 3),
}


@pytest.fixture
def source(tmp_path: Path) -> TensorFile:
    save_file(TENSORS, tmp_path / "source.safetensors", metadata={"title": "x"})
    return TensorFile(tmp_path / "source.safetensors")


def made(name: str, value: Tensor) -> NewTensor:
    return NewTensor(name, value.dtype, tuple(value.shape), make=lambda: [value])


def copied(name: str, *ranges: Range, shape: tuple[int, ...] | None = None) -> NewTensor:
    return NewTensor(name, ranges[0].dtype, shape or ranges[0].shape, copied=ranges)


def test_every_tensor_is_read_as_the_library_reads_it(source: TensorFile) -> None:
    assert source.metadata == {"title": "x"}
    assert_same_tensors({name: stored.read() for name, stored in source.tensors.items()}, TENSORS)
    assert list(source.tensors) == sorted(source.tensors, key=lambda name: source.tensors[name].start)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_number_format_is_read_and_written(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([0, 1, 2, 1]).to(dtype)
    write_tensor_file(tmp_path / "a.safetensors", [made("x", value)], {})
    (stored,) = TensorFile(tmp_path / "a.safetensors").tensors.values()
    for found in (stored.read(), load_file(tmp_path / "a.safetensors")["x"]):
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def test_a_file_that_is_written_holds_what_save_file_would(source: TensorFile, tmp_path: Path) -> None:
    tensors = [
        copied(name, stored) if name in ("half", "kernel") else made(name, TENSORS[name])
        for name, stored in source.tensors.items()
    ]
    write_tensor_file(tmp_path / "a.safetensors", tensors, {"format": "pt", "name": "ü"})
    assert_same_tensors(tmp_path / "a.safetensors", TENSORS)
    assert metadata_of(tmp_path / "a.safetensors") == {"format": "pt", "name": "ü"}
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size == file_bytes(tensors, {"format": "pt", "name": "ü"})
    # Also in size: the library's header has the same entries, spaces up to a multiple of 8.
    assert abs(size - len(save(TENSORS, {"format": "pt", "name": "ü"}))) <= 16


def test_tensors_lie_in_the_order_given_and_begin_on_a_multiple_of_8(source: TensorFile, tmp_path: Path) -> None:
    names = ["kernel", "matrix", "integers"]
    write_tensor_file(tmp_path / "a.safetensors", [copied(name, source.tensors[name]) for name in names], {})
    written = TensorFile(tmp_path / "a.safetensors").tensors
    assert list(written) == names and written["kernel"].start % 8 == 0


def test_tensors_are_laid_out_as_the_library_does(source: TensorFile) -> None:
    shuffled = [copied(name, source.tensors[name]) for name in sorted(source.tensors, reverse=True)]
    assert [tensor.name for tensor in in_library_order(shuffled)] == list(source.tensors)


@pytest.mark.parametrize("dtypes", zip(DTYPES.values(), list(DTYPES.values())[1:], strict=False))
def test_number_formats_are_in_the_order_of_the_library(
    dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    first, second = dtypes
    save_file({"a": torch.zeros(1).to(second), "b": torch.zeros(1).to(first)}, tmp_path / "a.safetensors")
    assert list(TensorFile(tmp_path / "a.safetensors").tensors) == ["b", "a"]


def test_a_tensor_may_begin_anywhere(tmp_path: Path) -> None:
    """The library's own writer puts wide formats first; here the order is the one given."""
    tensors = {"flags": torch.tensor([True, False, True]), "matrix": TENSORS["matrix"]}
    write_tensor_file(tmp_path / "a.safetensors", [made(name, value) for name, value in tensors.items()], {})
    assert_same_tensors(tmp_path / "a.safetensors", tensors)
    source = TensorFile(tmp_path / "a.safetensors")
    assert torch.equal(source.tensors["matrix"].read(), tensors["matrix"])


def test_a_file_without_tensors_or_metadata_is_one(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / "a.safetensors", [], {})
    assert load_file(tmp_path / "a.safetensors") == {} and metadata_of(tmp_path / "a.safetensors") == {}


def test_metadata_that_is_known_at_the_end_takes_the_place_of_what_stood_there(tmp_path: Path) -> None:
    order: list[str] = []
    value = torch.arange(4.0)
    tensor = NewTensor("x", value.dtype, (4,), make=lambda: order.append("made") or [value])  # type: ignore[func-returns-value]
    final = lambda: order.append("final") or {"hash": "abc"}  # type: ignore[func-returns-value]  # noqa: E731
    write_tensor_file(tmp_path / "a.safetensors", [tensor], {"hash": "000"}, final=final)
    assert order == ["made", "final"] and metadata_of(tmp_path / "a.safetensors") == {"hash": "abc"}
    assert_same_tensors(tmp_path / "a.safetensors", {"x": value})


@pytest.mark.parametrize("made_value", [torch.zeros(2, 3), torch.zeros(4).half()])
def test_a_tensor_that_is_made_otherwise_than_announced_is_a_defect(made_value: Tensor, tmp_path: Path) -> None:
    tensor = NewTensor("x", torch.float32, (4,), make=lambda: [made_value])
    with pytest.raises(AssertionError, match="x was made as"):
        write_tensor_file(tmp_path / "a.safetensors", [tensor], {})


def test_a_tensor_may_be_made_of_several_ranges(tmp_path: Path) -> None:
    """SDXL's second text encoder stacks queries, keys and values."""
    parts = {name: torch.randn(2, 3) for name in "qkv"}
    save_file(parts, tmp_path / "parts.safetensors")
    stored = TensorFile(tmp_path / "parts.safetensors").tensors
    stack = copied("in_proj", stored["v"], stored["q"], stored["k"], shape=(6, 3))
    write_tensor_file(tmp_path / "a.safetensors", [stack], {})
    assert_same_tensors(tmp_path / "a.safetensors", {"in_proj": torch.cat([parts["v"], parts["q"], parts["k"]])})


class Calls:
    """Copies, as (start, end), while the file is written as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[tuple[int, int]] = []
        inner = ByteSource.copy_to

        def counted(file: ByteSource, target: ByteTarget, start: int, end: int, at: int) -> None:
            self.copies.append((start, end))
            inner(file, target, start, end, at)

        monkeypatch.setattr(ByteSource, "copy_to", counted)


def test_neighbours_are_copied_in_one_go(source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    ranges = list(source.tensors.items())
    middle = [name for name, stored in ranges].index("kernel")
    tensors = [
        made(name, TENSORS[name] + 1) if i == middle else copied(name, stored)
        for i, (name, stored) in enumerate(ranges)
    ]
    write_tensor_file(tmp_path / "a.safetensors", tensors, {})
    before, after = ranges[:middle], ranges[middle + 1 :]
    assert calls.copies == [(run[0][1].start, run[-1][1].end) for run in (before, after) if run]
    assert_same_tensors(tmp_path / "a.safetensors", TENSORS | {"kernel": TENSORS["kernel"] + 1})


def test_what_lies_apart_or_in_another_file_is_not_joined(
    source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    other = TensorFile(source.path)  # the same bytes at the same places
    stored = [*source.tensors.items()]
    (a, first), (b, second), (c, third) = [item for item in stored if item[1].end > item[1].start][:3]
    tensors = [copied(a, first), copied(c, third), copied(b, other.tensors[b])]
    write_tensor_file(tmp_path / "a.safetensors", tensors, {})
    assert len(calls.copies) == 3
    assert_same_tensors(tmp_path / "a.safetensors", {name: TENSORS[name] for name in (a, b, c)})


# ------------------------------------------------------------------------------------------------ ways to copy


def big_source(folder: Path, count: int = 4, rows: int = 300) -> TensorFile:
    tensors = {f"t{i}": torch.randn(rows, 100, generator=torch.Generator().manual_seed(i)) for i in range(count)}
    save_file(tensors, folder / "big.safetensors")
    return TensorFile(folder / "big.safetensors")


def copy_all(source: TensorFile, path: Path) -> None:
    write_tensor_file(path, [copied(name, stored) for name, stored in source.tensors.items()], {})
    assert_same_tensors(path, source.path)


@pytest.mark.parametrize("name", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM"])
def test_a_kernel_that_will_not_copy_is_done_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(getattr(errno, name), "refused")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    copy_all(big_source(tmp_path), tmp_path / "a.safetensors")


def test_a_kernel_that_stops_halfway_is_gone_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("Linux has it")
    inner, counts = os.copy_file_range, iter([1000, 7, 0])

    def hesitant(source: int, target: int, count: int, *offsets: int) -> int:
        allowed = next(counts, 0)
        return inner(source, target, min(count, allowed), *offsets) if allowed else 0

    monkeypatch.setattr(os, "copy_file_range", hesitant)
    copy_all(big_source(tmp_path), tmp_path / "a.safetensors")


def test_a_system_without_it_copies_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    copy_all(big_source(tmp_path), tmp_path / "a.safetensors")


def test_a_full_disk_is_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        copy_all(big_source(tmp_path), tmp_path / "a.safetensors")


def test_no_more_than_a_chunk_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = big_source(tmp_path)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(tensor_files, "COPY_BYTES", 7000)
    sizes: list[int] = []
    inner = ByteSource.read_into
    monkeypatch.setattr(
        ByteSource,
        "read_into",
        lambda file, target, start: sizes.append(len(target)) or inner(file, target, start),  # type: ignore[func-returns-value]
    )
    tensors = [copied(name, stored) for name, stored in source.tensors.items()]
    write_tensor_file(tmp_path / "a.safetensors", tensors, {})
    assert max(sizes) == 7000 and sum(sizes) == sum(tensor.nbytes for tensor in tensors)
    assert_same_tensors(tmp_path / "a.safetensors", source.path)


def test_tensors_of_a_pickle_are_copied_from_memory(tmp_path: Path) -> None:
    copy = open_pickled(tmp_path / "model.bin", {name: value.clone() for name, value in TENSORS.items()})
    tensors = [copied(name, stored) for name, stored in copy.tensors.items()]
    write_tensor_file(tmp_path / "a.safetensors", tensors, {})
    assert_same_tensors(tmp_path / "a.safetensors", TENSORS)


# ------------------------------------------------------------------------------------------------ what is no such file


def damaged(tmp_path: Path, what: str) -> Path:
    path = tmp_path / "b.safetensors"
    whole = save(TENSORS)
    contents = {
        "truncated": whole[:-5],
        "header cut off": whole[:40],
        "empty": b"",
        "longer than its tensors": whole + b"1234",
        "pickle": b"\x80\x02}q\x00" + bytes(200),
        "no JSON": (16).to_bytes(8, "little") + b"not json at all!" + bytes(8),
        "length of terabytes": (1 << 43).to_bytes(8, "little") + whole[8:],
    }
    path.write_bytes(contents[what])
    return path


@pytest.mark.parametrize(
    "what",
    ["truncated", "header cut off", "empty", "longer than its tensors", "pickle", "no JSON", "length of terabytes"],
)
def test_what_is_not_a_whole_file_is_refused(what: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, what)
    sentence = f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: "
    with pytest.raises(UserError, match=re.escape(sentence)):
        TensorFile(path)


def test_absent_files_and_unknown_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no.safetensors does not exist\."):
        TensorFile(tmp_path / "no.safetensors")
    header = json.dumps({"x": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="x is of the number format U16, which is not supported here"):
        TensorFile(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    source = big_source(tmp_path)
    os.truncate(source.path, 5000)
    with pytest.raises(UserError, match=r"big.safetensors became shorter while it was read\."):
        source.tensors["t3"].read()
    with pytest.raises(UserError, match="became shorter while it was read"):
        copy_all(source, tmp_path / "a.safetensors")


def test_a_file_is_closed_with_the_last_that_may_read_it(tmp_path: Path) -> None:
    source = big_source(tmp_path)
    stored = source.tensors["t3"]
    descriptor = stored.file._descriptor
    del source
    assert stored.read().shape == (300, 100)
    del stored  # at once, without the garbage collector: an open file cannot be replaced on Windows
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
