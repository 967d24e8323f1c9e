"""Write side of the LMDB tensor store: large transactions, of which an interruption loses at most the last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np

from library.data.store import (
    DRAWN,
    META_KEY,
    SUFFIXES,
    StoreMeta,
    open_environment,
    shard_folders,
    unpack_source,
)
from library.errors import RunFailed, UserError
from library.files import free_bytes

# What an interruption may cost: entries wait for a commit until there are so many bytes of them, or for so long.
COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 5.0
# Metadata of a shard is small; this leaves room for it, for free pages and for the B-tree of a small store.
MAP_SLACK = 64 << 20


class StoreWriter:
    """Write side of one environment: collects entries and commits them in large transactions.

    An interruption loses only what was not committed; a commit is on disk when it returns.
    """

    def __init__(self, folder: Path, kind: str, *, expected_bytes: int, commit_bytes: int | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}.") from None
        self.folder = folder
        self.suffix = SUFFIXES[kind]
        data = folder / "data.mdb"
        present = data.stat().st_size if data.exists() else 0
        self._environment = open_environment(
            folder, map_size=int((present + expected_bytes) * 1.25) + MAP_SLACK, readahead=False
        )
        self._commit_bytes = COMMIT_BYTES if commit_bytes is None else commit_bytes
        self._committed = time.monotonic()
        self._pending: list[tuple[bytes, bytes]] = []
        self._dropped: list[bytes] = []
        self._pending_bytes = 0

    def key(self, sample_id: str) -> bytes:
        return f"{sample_id}{self.suffix}".encode()

    def meta(self) -> StoreMeta | None:
        with self._environment.begin() as transaction:
            data = transaction.get(META_KEY)
        return StoreMeta.from_json(data, self.folder) if data is not None else None

    def set_meta(self, meta: StoreMeta) -> None:
        self.put_raw(META_KEY, meta.to_json())
        self.commit()

    def put(self, sample_id: str, value: np.ndarray, source: bytes, scale: np.ndarray | None = None) -> None:
        """Add or replace an entry with what it was made from; a note that it was unreadable goes."""
        key = self.key(sample_id)
        self.put_raw(key, np.ascontiguousarray(value).tobytes())
        if scale is not None:
            self.put_raw(key + b"#scale", np.ascontiguousarray(scale, np.float16).tobytes())
        self.put_raw(key + b"#source", source)
        self._dropped.append(key + b"#unreadable")
        self.commit_if_due()

    def put_source(self, sample_id: str, source: bytes) -> None:
        self.put_raw(self.key(sample_id) + b"#source", source)

    def put_unreadable(self, sample_id: str, source: bytes, reason: str) -> None:
        """Note that there is no entry, and why; an older entry of that id goes."""
        key = self.key(sample_id)
        self.put_raw(key + b"#unreadable", source + reason.encode())
        self._dropped += [key, key + b"#scale", key + b"#source"]

    def delete_raw(self, keys: Sequence[bytes]) -> None:
        """Delete entries by their whole keys, with all that belongs to them."""
        for key in keys:
            self._dropped += [key, key + b"#scale", key + b"#source", key + b"#unreadable", key + DRAWN]

    def put_raw(self, key: bytes, value: bytes) -> None:
        self._pending.append((key, value))
        self._pending_bytes += len(value)

    def commit_if_due(self) -> None:
        """Commit where enough is pending, or has been for long."""
        if self._pending_bytes >= self._commit_bytes or time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what is pending in one transaction. Raises RunFailed when the disk is full; what was committed stays."""
        if not self._pending and not self._dropped:
            return
        try:
            self._write_pending()
        except lmdb.MapFullError:
            # Free pages of replaced entries can be scattered; a larger map costs address space only.
            self._environment.set_mapsize(self._environment.info()["map_size"] + self._pending_bytes * 2 + MAP_SLACK)
            self.commit()
            return
        except lmdb.MapResizedError:
            # Another process that writes here has made the map larger.
            self._environment.set_mapsize(0)
            self.commit()
            return
        except (lmdb.Error, OSError) as error:
            # LMDB reports a write cut short by a full disk as an input/output error.
            free = free_bytes(self.folder)
            why = f"no space left ({free} bytes free)" if free < self._pending_bytes else str(error)
            raise RunFailed(
                f"Writing to {self.folder} failed: {why}. What was committed before is whole; make room and run the same "
                "command again to continue."
            ) from None
        self._pending, self._dropped, self._pending_bytes = [], [], 0
        self._committed = time.monotonic()

    def _write_pending(self) -> None:
        with self._environment.begin(write=True) as transaction:
            for key in self._dropped:
                transaction.delete(key)
            for key, value in self._pending:
                transaction.put(key, value)

    def close(self) -> None:
        """Close without committing what is pending."""
        self._environment.close()


def mark(path: Path, meta: StoreMeta) -> None:
    """Write `meta` to every shard of the store at `path`."""
    for folder in shard_folders(path):
        writer = StoreWriter(folder, meta.kind, expected_bytes=0)
        if writer.meta() != meta:
            writer.set_meta(meta)
        writer.close()


def purge(path: Path, kind: str, producer: bytes) -> int:
    """Delete the entries that another producer made; how many there were."""
    deleted = 0
    for folder in shard_folders(path):
        with open_environment(folder, readonly=True, lock=False) as environment, environment.begin() as transaction:
            # Keys only: reading the values along would read the whole store.
            notes = [
                key
                for key in transaction.cursor().iternext(keys=True, values=False)
                if key.endswith((b"#source", b"#unreadable"))
            ]
            keys = [(key.rpartition(b"#")[0], transaction.get(key) or b"") for key in notes]
            doomed = [key for key, note in keys if unpack_source(note)[2] != producer]
        if doomed:
            writer = StoreWriter(folder, kind, expected_bytes=0)
            writer.delete_raw(doomed)
            writer.commit()
            writer.close()
        deleted += len(doomed)
    return deleted
