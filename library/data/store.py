"""The LMDB tensor store: one environment (or several shards that read as one) of tensors of one kind.

Key = sample id plus the kind's suffix; value = raw little-endian tensor bytes and nothing else, so that
`np.frombuffer(value, np.float16)` reads it. Beside them:

    __meta__            JSON: format version, kind, dtype, shape, producer, complete or not
    {key}#scale         float16 scale per token, where dtype is int8
    {key}#source        what the entry was made from (library.caching.producers)
    {key}#unreadable    why there is no entry
    {key}#drawn         prompt and seed of latents that a base drew (library.data.teacher_latents)

Rank 0 of a cache build writes `folder/data.mdb`, rank r > 0 `folder/shard-00r/data.mdb`.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from library.errors import UserError
from library.files import lock_folder

META_KEY = b"__meta__"
FORMAT_VERSION = 1
SUFFIXES = {"latents": "", "tokens": "_mid", "moments": "", "prompts": "", "pooled": ""}
"""What the keys of each kind end in. moments are means and log-variances; prompts and pooled what text encoders say."""
DRAWN = b"#drawn"
NOTES = (b"#scale", b"#source", b"#unreadable", b"#shape", DRAWN)
LMDB_PAGE = 4096


@dataclass(frozen=True)
class StoreMeta:
    """What `__meta__` says of a store."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    producer: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def value_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def has_scale(self) -> bool:
        return self.dtype == "int8"

    @property
    def entry_bytes(self) -> int:
        """Bytes one entry takes on disk: its values on whole LMDB pages, and its share of the key pages."""
        value_pages = -(-(self.value_bytes + 16) // LMDB_PAGE)
        scale = self.shape[0] * 2 + 64 if self.has_scale else 0
        return value_pages * LMDB_PAGE + scale + 256

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes, path: Path) -> StoreMeta:
        try:
            values = json.loads(data)
            version = values["format_version"]
            if version > FORMAT_VERSION:
                raise UserError(
                    f"The store {path} has format version {version}, this program reads up to {FORMAT_VERSION}. Update the program."
                )
            return StoreMeta(
                kind=values["kind"],
                dtype=values["dtype"],
                shape=tuple(values["shape"]),
                producer=values.get("producer", {}),
                complete=bool(values.get("complete", False)),
                format_version=version,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"__meta__ of the store {path} is damaged ({error}). Delete the store and build it again."
            ) from None


def shard_folders(path: Path) -> list[Path]:
    """Folders of the environments that make up the store at `path`, the root first; empty when there is none."""
    roots = [path] if (path / "data.mdb").is_file() else []
    return roots + sorted(p.parent for p in path.glob("shard-*/data.mdb"))


def shard_folder(path: Path, rank: int) -> Path:
    return path if rank == 0 else path / f"shard-{rank:03d}"


def disk_bytes(path: Path) -> int:
    """Bytes the store at `path` really occupies (LMDB files are sparse)."""
    statuses = [(folder / "data.mdb").stat() for folder in shard_folders(path)]
    return sum(getattr(status, "st_blocks", -(-status.st_size // 512)) * 512 for status in statuses)


def open_environment(folder: Path, **options: Any) -> lmdb.Environment:
    """An LMDB environment. Raises UserError where it is damaged or cut off."""
    try:
        environment = lmdb.open(str(folder), subdir=True, max_dbs=0, **options)
        _refuse_truncated(environment, folder)
        return environment
    except (lmdb.Error, OSError) as error:
        raise UserError(
            f"{folder} could not be opened as an LMDB store: {error}. If it is damaged, delete it and build it again."
        ) from None


def _refuse_truncated(environment: lmdb.Environment, folder: Path) -> None:
    """A file that ends before its last page would end the process with SIGBUS at the first read behind its end."""
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    there = (folder / "data.mdb").stat().st_size
    if there < needed:
        environment.close()
        raise UserError(
            f"The store {folder} is cut off: {there} of {needed} bytes are there. Was a copy of it interrupted? Copy it again, or "
            "delete it and build it again."
        )


class _SharedEnvironments:
    """Read-only environments of this process: LMDB forbids opening one twice, and stores may share one."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, str], tuple[lmdb.Environment, int]] = {}
        self._guard = threading.Lock()

    def take(self, folder: Path) -> lmdb.Environment:
        key = (os.getpid(), str(folder.resolve()))
        with self._guard:
            if key not in self._open:
                self._open[key] = (
                    open_environment(folder, readonly=True, lock=False, readahead=False, max_spare_txns=64),
                    0,
                )
            environment, users = self._open[key]
            self._open[key] = (environment, users + 1)
            return environment

    def give_back(self, folder: Path) -> None:
        key = (os.getpid(), str(folder.resolve()))
        with self._guard:
            if key in self._open:
                environment, users = self._open.pop(key)
                if users > 1:
                    self._open[key] = (environment, users - 1)
                else:
                    environment.close()


_shared = _SharedEnvironments()


@contextmanager
def read_transactions(path: Path, *, lock: bool = True) -> Iterator[list[Any]]:
    """One read transaction on each environment of the store at `path`, for a look at it; none where there is no store.

    lock: False where this process holds the store's lock itself.
    """
    folders = shard_folders(path)
    held = lock_store(path, exclusive=False) if lock and folders else None
    transactions = [_shared.take(folder).begin(buffers=True) for folder in folders]
    try:
        yield transactions
    finally:
        for transaction in transactions:
            transaction.abort()
        for folder in folders:
            _shared.give_back(folder)
        if held is not None:
            held.close()


class TensorStore:
    """Read side. Opens its environments on first use in each process; a transaction per thread.

    Goes to other processes by pickling (spawn). A fork inherits LMDB's state and cannot use it: fork first, open after.

    made_elsewhere: (dtype, shape) of the values, for a store that carries no `__meta__`.
    Raises UserError where the store is absent, damaged, or without `__meta__` and made_elsewhere.
    """

    def __init__(
        self, path: Path | str, kind: str, *, made_elsewhere: tuple[str, tuple[int, ...]] | None = None
    ) -> None:
        self.path = Path(path)
        self.suffix = SUFFIXES[kind]
        self._environments: list[lmdb.Environment] | None = None
        self._folders: list[Path] = []
        self._owner: int | None = None
        self._local = threading.local()
        self._opening = threading.Lock()
        self._lock: Any = None
        self.foreign = False
        self.meta = self._read_meta(kind, made_elsewhere)
        self._dtype = np.dtype(self.meta.dtype).newbyteorder("<")

    def _read_meta(self, kind: str, made_elsewhere: tuple[str, tuple[int, ...]] | None) -> StoreMeta:
        data = self.get_raw(META_KEY)
        if data is not None:
            meta = StoreMeta.from_json(bytes(data), self.path)
            if meta.kind != kind:
                raise UserError(f"{self.path} holds {meta.kind}, not {kind}. Check the paths of the stores.")
            return meta
        if made_elsewhere is None:
            raise UserError(
                f"The store {self.path} has no __meta__, so the shape of its values is unknown. If it was made elsewhere "
                f"with raw float16 values, give {'latent_shape' if kind == 'latents' else 'token_shape'}."
            )
        self.foreign = True
        dtype, shape = made_elsewhere
        return StoreMeta(kind, dtype, shape, complete=True)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        return state | {"_environments": None, "_owner": None, "_local": None, "_opening": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()
        self._opening = threading.Lock()

    def _transactions(self) -> list[Any]:
        if self._owner != os.getpid():
            with self._opening:
                if self._owner != os.getpid():
                    folders = shard_folders(self.path)
                    if not folders:
                        raise UserError(f"There is no LMDB store at {self.path}. prepare_cache.py builds one.")
                    self._lock = lock_store(self.path, exclusive=False)
                    self._environments = [_shared.take(folder) for folder in folders]
                    self._folders = folders
                    self._local = threading.local()
                    self._owner = os.getpid()
        if not hasattr(self._local, "transactions"):
            assert self._environments is not None
            self._local.transactions = [environment.begin(buffers=True) for environment in self._environments]
        return self._local.transactions

    def close(self) -> None:
        self._local = threading.local()
        if self._environments is not None and self._owner == os.getpid():
            for folder in self._folders:
                _shared.give_back(folder)
        self._environments, self._owner = None, None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __del__(self) -> None:
        # An environment that stays open keeps this process from writing to the store.
        with suppress(Exception):
            self.close()

    def get_raw(self, key: bytes) -> Any:
        """The stored bytes as a memoryview straight from the memory map, valid until the store is closed; None if absent."""
        try:
            for transaction in self._transactions():
                value = transaction.get(key)
                if value is not None:
                    return value
        except lmdb.Error as error:
            raise UserError(f"The store {self.path} is damaged ({error}). Delete it and build it again.") from None
        return None

    def key(self, sample_id: str) -> bytes:
        return f"{sample_id}{self.suffix}".encode()

    def content(self, sample_id: str) -> bytes:
        """Hash of the picture file that an entry was made of; empty where the store does not know it."""
        record = self.get_raw(self.key(sample_id) + b"#source")
        content = b"" if record is None else unpack_source(record)[1]
        return content if any(content) else b""  # zeros: the entry was made without its picture

    def __contains__(self, sample_id: str) -> bool:
        return self.get_raw(self.key(sample_id)) is not None

    def missing(self, sample_ids: Sequence[str]) -> list[str]:
        return [sample_id for sample_id in sample_ids if sample_id not in self]

    def sample_ids(self) -> Iterator[str]:
        """Ids of all entries."""
        suffix = self.suffix.encode()
        for transaction in self._transactions():
            for key in transaction.cursor().iternext(keys=True, values=False):
                key = bytes(key)
                # Ids may have a # of their own, as those of a second data set of one resolution.
                if key != META_KEY and not key.endswith(NOTES) and key.endswith(suffix):
                    yield key[: len(key) - len(suffix)].decode()

    def read(self, sample_id: str) -> np.ndarray:
        """A copy of one entry, dtype and shape of the store, without its scale."""
        out = np.empty(self.meta.shape, self._dtype)
        self.read_into([sample_id], out[None])
        return out

    def read_into(self, sample_ids: Sequence[str], out: np.ndarray) -> None:
        """Copy entries into `out` [B, *shape], which is C-contiguous and of the store's dtype.

        Raises UserError naming the sample where an entry is absent or of another length.
        """
        rows = out.reshape(len(sample_ids), -1).view(np.uint8)
        self._copy([self.key(sample_id) for sample_id in sample_ids], rows)

    def read_scales_into(self, sample_ids: Sequence[str], out: np.ndarray) -> None:
        """Copy int8 scales into `out` [B, N] float16."""
        self._copy([self.key(sample_id) + b"#scale" for sample_id in sample_ids], out.view(np.uint8))

    def _copy(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        width = rows.shape[1]
        for row, key in zip(rows, keys, strict=True):
            value = self.get_raw(key)
            if value is None:
                raise UserError(
                    f"The store {self.path} has no entry {key.decode()}. prepare_cache.py builds what is missing."
                )
            if len(value) != width:
                raise UserError(
                    f"Entry {key.decode()} of the store {self.path} has {len(value)} bytes, and {self.meta.shape} of "
                    f"{self.meta.dtype} are {width}: it was made with another resolution, teacher or number format."
                )
            row[:] = np.frombuffer(value, np.uint8)


def lock_store(path: Path, *, exclusive: bool) -> Any:
    """Lock a store for reading, or for building (see library.files.lock_folder)."""
    return lock_folder(path, exclusive=exclusive, what="The store")


def pack_source(signature: bytes, content: bytes, producer: bytes) -> bytes:
    """48 bytes: 16 that change when the file changes, 16 of its content's hash, 16 of the producer's."""
    return struct.pack("16s16s16s", signature, content, producer)


def unpack_source(record: Any) -> tuple[bytes, bytes, bytes]:
    return struct.unpack("16s16s16s", bytes(record[:48]))
