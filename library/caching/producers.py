"""What a cache entry is made with. Entries of another producer are stale; this says which, and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from library.data.store import StoreMeta

# Facts that name a producer for people but do not change what it makes.
DESCRIPTIVE = frozenset({"model", "library", "fit", "statistics"})


@dataclass(frozen=True)
class Wanted:
    """The store that a run needs: its form and its producer."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    producer: dict[str, Any]
    remedy: str = "--encoder_precision no may help"
    """What to try where an entry comes out as infinity or no number."""

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that are equal exactly where entries are interchangeable."""
        return fingerprint(self.producer | {"dtype": self.dtype, "shape": list(self.shape)})

    def entry_fingerprint(self, cut: dict[str, Any] | None) -> bytes:
        """The same for one entry, where pictures are cut each in its own way (see `Geometry.facts`)."""
        return self.fingerprint if cut is None else fingerprint(cut | {"store": self.fingerprint.hex()})

    def meta(self, *, complete: bool) -> StoreMeta:
        return StoreMeta(self.kind, self.dtype, self.shape, self.producer, complete)

    def differences(self, meta: StoreMeta) -> list[str]:
        """ "dino_resolution 518 there, 224 here" for each fact in which a store differs from this."""
        there = meta.producer | {"dtype": meta.dtype, "shape": list(meta.shape)}
        here = self.producer | {"dtype": self.dtype, "shape": list(self.shape)}
        names = [name for name in sorted(there.keys() | here.keys()) if name not in DESCRIPTIVE]
        return [
            f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here"
            for name in names
            if there.get(name) != here.get(name)
        ]


def fingerprint(facts: dict[str, Any]) -> bytes:
    kept = {name: value for name, value in facts.items() if name not in DESCRIPTIVE}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).digest()


def imported(entry: bytes) -> bytes:
    """The fingerprint of an entry that was not encoded here but taken from another program's cache."""
    return hashlib.blake2b(entry + b"imported", digest_size=16).digest()


def content_hash(data: bytes) -> bytes:
    """16 bytes of a picture file's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
