"""Safetensors files of any size in little memory: ranges of bytes are read and copied, nothing is mapped.

Reading a memory map would count every page it touches as resident. The safetensors library still judges each file that
is opened; it has no writer that streams, so the one here follows its format (8 bytes of length, a JSON header, the
tensors' bytes without gaps).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from library.errors import UserError
from library.models.header import with_safetensors
from library.models.threads import in_threads

# The format's names of number formats, as far as checkpoints use them, in the order in which the library writes them.
DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

COPY_BYTES = 1 << 26


class ByteSource:
    """The bytes of a file, or of memory, from any place on. The file stays open as long as this lives."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        """`content` takes the place of what is on the disk."""
        self.path = path
        self._content = None if content is None else memoryview(content)
        self._descriptor = -1
        self._position = threading.Lock()
        if content is None:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill `target` with the bytes from `start` on."""
        if self._content is not None:
            target[:] = self._content[start : start + len(target)]
            return
        done = 0
        while done < len(target):
            count = self._read_some(target[done:], start + done)
            if count == 0:
                raise UserError(f"{self.path} became shorter while it was read.")
            done += count

    def _read_some(self, target: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], start)
        with self._position:  # Windows has one position for all threads
            os.lseek(self._descriptor, start, os.SEEK_SET)
            block = os.read(self._descriptor, min(len(target), COPY_BYTES))
        target[: len(block)] = block
        return len(block)

    def copy_to(self, target: ByteTarget, start: int, end: int, at: int) -> None:
        """Bytes `start` to `end` into an open file from `at` on, inside the kernel where it can."""
        if self._content is None:
            done = self._copy_in_kernel(target, start, end, at)
            start, at = start + done, at + done
        while start < end:
            block = bytearray(min(COPY_BYTES, end - start))
            self.read_into(memoryview(block), start)
            target.write(memoryview(block), at)
            start, at = start + len(block), at + len(block)

    def _copy_in_kernel(self, target: ByteTarget, start: int, end: int, at: int) -> int:
        """Copy as far as the kernel will; returns how much that was."""
        done = 0
        if not hasattr(os, "copy_file_range"):  # Linux only
            return done
        try:
            while done < end - start:
                count = os.copy_file_range(
                    self._descriptor, target.descriptor, end - start - done, start + done, at + done
                )
                if count == 0:
                    break
                done += count
        except OSError as error:
            # Across some file systems it is refused, which reading and writing is not.
            if error.errno not in _NOT_SUPPORTED:
                raise
        return done

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


class ByteTarget:
    """A new file that is written from any place on, by several threads. To be closed."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self.descriptor = os.open(path, flags, 0o666)
        self._position = threading.Lock()

    def write(self, data: memoryview, at: int) -> None:
        """All of `data`, from `at` on."""
        while data:
            count = self._write_some(data, at)
            data, at = data[count:], at + count

    def _write_some(self, data: memoryview, at: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.descriptor, data, at)
        with self._position:  # Windows has one position for all threads
            os.lseek(self.descriptor, at, os.SEEK_SET)
            return os.write(self.descriptor, data)

    def close(self) -> None:
        os.close(self.descriptor)


class Range(NamedTuple):
    """Some bytes of a file that hold a tensor, or a part of one."""

    file: ByteSource
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        raw = torch.empty(self.end - self.start, dtype=torch.uint8)
        self.file.read_into(raw.numpy().data, self.start)
        return raw.view(self.dtype).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Range:
        """The bytes of these rows, along the first axis."""
        size = (self.end - self.start) // self.shape[0]
        first = self.start + start * size
        return Range(self.file, first, first + (stop - start) * size, self.dtype, (stop - start, *self.shape[1:]))


class TensorFile:
    """What a safetensors file holds: names -> ranges of bytes, which keep it open."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        """`content` takes the place of what is on the disk. Raises UserError for what is not a whole safetensors file."""
        if content is None:
            with_safetensors(path, lambda file: None)  # judges it
        source = ByteSource(path, content)
        head = bytearray(8)
        source.read_into(memoryview(head), 0)
        header = bytearray(int.from_bytes(head, "little"))
        source.read_into(memoryview(header), 8)
        entries = json.loads(header)
        self.path = path
        self.metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
        begin = 8 + len(header)
        self.tensors: dict[str, Range] = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name} is of the number format {entry['dtype']}, which is not supported here."
                )
            start, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            self.tensors[name] = Range(source, begin + start, begin + end, dtype, shape)


def _errors(*names: str) -> frozenset[int]:
    import errno

    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_NOT_SUPPORTED = _errors("EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EPERM")


def open_pickled(path: Path, tensors: Mapping[str, Tensor]) -> TensorFile:
    """Tensors that came from a pickle (read before, by weights alone), as if from a safetensors file; all in memory."""
    return TensorFile(path, save({name: value.contiguous() for name, value in tensors.items()}))


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a file to be written: bytes copied from elsewhere, or made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    copied: tuple[Range, ...] = ()
    """Ranges that hold its bytes, one after the other."""
    make: Callable[[], Iterable[Tensor]] | None = None
    """Called once while the file is written, in any thread; gives its values in pieces of `dtype`, one after the other."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_library_order(tensors: Iterable[NewTensor]) -> list[NewTensor]:
    """As the library's own writer lays them out: by number format, then by name."""
    formats = list(DTYPES.values())
    return sorted(tensors, key=lambda tensor: (formats.index(tensor.dtype), tensor.name))


def write_tensor_file(
    path: Path,
    tensors: Sequence[NewTensor],
    metadata: Mapping[str, str],
    *,
    final: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write a safetensors file, a piece of a tensor for each thread in memory at a time. Flushing and renaming are the caller's.

    final: called when all tensors are written, gives the metadata that takes the place of `metadata`. It must be as long.
    """
    header = _header(tensors, metadata)
    target = ByteTarget(path)
    try:
        target.write(memoryview(header), 0)
        for _ in in_threads(lambda part: part.write(target), list(_parts(tensors, len(header)))):
            pass
        if final is not None:
            known = _header(tensors, final())
            assert len(known) == len(header)
            target.write(memoryview(known), 0)
    finally:
        target.close()


def file_bytes(tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> int:
    """How large `write_tensor_file` would make the file."""
    return len(_header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors)


def _header(tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin on a multiple of 8, as in the library's own files
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Copied:
    """Bytes `start` to `end` of a file, that go to `at`."""

    source: ByteSource
    start: int
    end: int
    at: int

    def write(self, target: ByteTarget) -> None:
        self.source.copy_to(target, self.start, self.end, self.at)


@dataclass(frozen=True)
class _Made:
    tensor: NewTensor
    at: int

    def write(self, target: ByteTarget) -> None:
        assert self.tensor.make is not None
        at = self.at
        for piece in self.tensor.make():
            if piece.dtype != self.tensor.dtype:
                raise AssertionError(f"{self.tensor.name} was made as {piece.dtype}")
            target.write(piece.contiguous().flatten().view(torch.uint8).numpy().data, at)
            at += piece.nbytes
        if at - self.at != self.tensor.nbytes:
            raise AssertionError(f"{self.tensor.name} was made as {at - self.at} bytes")


def _parts(tensors: Sequence[NewTensor], begin: int) -> Iterator[_Copied | _Made]:
    """What the file consists of from `begin` on; bytes to copy that are neighbours in both files are one part."""
    run: _Copied | None = None
    at = begin
    for tensor in tensors:
        for source, start, end, *_ in tensor.copied:
            if run is not None and run.source is source and run.end == start:
                run = replace(run, end=end)
            else:
                if run is not None:
                    yield run
                run = _Copied(source, start, end, at)
            at += end - start
        if tensor.make is not None:
            if run is not None:
                yield run
            run = None
            yield _Made(tensor, at)
            at += tensor.nbytes
    if run is not None:
        yield run
