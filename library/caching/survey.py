"""What is in a store, what is missing and what no longer fits: the plan of a cache build."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from library.caching.decoding import NO_SIGNATURE
from library.caching.geometry import Geometry
from library.caching.producers import Wanted, imported
from library.data.pixels import UnreadableImage
from library.data.sources import ImageSource, Sample
from library.data.store import META_KEY, SUFFIXES, StoreMeta, read_transactions, unpack_source
from library.errors import UserError


@dataclass(frozen=True)
class Target:
    """A store, and the samples that are to have an entry in it."""

    path: Path
    wanted: Wanted
    samples: list[Sample]
    made_elsewhere: tuple[int, ...] | None = None
    """Shape of the values of a store without `__meta__`, in which nothing can be rebuilt."""
    accept_imported: bool = False
    """Whether entries that were taken from another program's cache will do."""


@dataclass(frozen=True)
class Entry:
    """One entry to make. `shard` is where an older one stands; `content` its picture's hash, if only that is in doubt."""

    sample: Sample
    fingerprint: bytes
    """Of the entry once it is made."""
    shard: int | None = None
    content: bytes | None = None
    stands: bytes | None = None
    """Fingerprint of the older one that may stay, if only its picture is in doubt."""


@dataclass
class Survey:
    """State of one store against one manifest."""

    target: Target
    meta: StoreMeta | None = None
    foreign: bool = False
    shards: int = 0
    present: int = 0
    missing: list[Entry] = field(default_factory=list)
    stale: list[Entry] = field(default_factory=list)
    doubtful: list[Entry] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.target.path

    @property
    def wanted(self) -> Wanted:
        return self.target.wanted

    @property
    def work(self) -> list[Entry]:
        return [*self.missing, *self.stale, *self.doubtful]

    @property
    def differences(self) -> list[str]:
        return [] if self.meta is None or self.foreign else self.wanted.differences(self.meta)

    @property
    def complete(self) -> bool:
        return not self.work and self.meta is not None and (self.foreign or self.meta.complete)

    @property
    def needed_bytes(self) -> int:
        """Disk that the work will take. Stale entries are replaced on the pages they free, as far as these suffice."""
        entry = self.wanted.meta(complete=False).entry_bytes
        growth = entry if self.meta is None else max(0, entry - self.meta.entry_bytes)
        return len(self.missing) * entry + len(self.stale) * growth


def survey(target: Target, source: ImageSource, geometry: Geometry, *, lock: bool = True) -> Survey:
    """Compare a store with what is wanted and what the picture files say, reading 48 bytes per entry.

    A store without `__meta__` is accepted as made elsewhere where its shape is given; nothing can be rebuilt in it.
    lock: False where this process holds the lock of the store.
    Raises UserError where such a store lacks samples (count and three examples), or has another shape.
    """
    result = Survey(target)
    path, wanted, samples, made_elsewhere = target.path, target.wanted, target.samples, target.made_elsewhere
    with read_transactions(path, lock=lock) as transactions:
        result.shards = len(transactions)
        if transactions:
            data = transactions[0].get(META_KEY)
            result.meta = StoreMeta.from_json(bytes(data), path) if data is not None else None
            if result.meta is None and made_elsewhere is not None:
                _survey_foreign(result, transactions, samples, made_elsewhere)
                return result
            if result.meta is None and transactions[0].stat()["entries"] > 0:
                option = "latent_shape" if wanted.kind == "latents" else "token_shape"
                raise UserError(
                    f"The store {path} has no __meta__. If it was made elsewhere with raw float16 values, give {option}; if "
                    "not, delete it."
                )
        for sample in samples:
            expected = wanted.entry_fingerprint(geometry.facts(sample))
            _survey_sample(result, transactions, source, sample, expected)
    return result


def _survey_sample(
    result: Survey, transactions: list[lmdb.Transaction], source: ImageSource, sample: Sample, expected: bytes
) -> None:
    accepted = (expected, imported(expected)) if result.target.accept_imported else (expected,)
    key = f"{sample.sample_id}{SUFFIXES[result.wanted.kind]}".encode()
    for shard, transaction in enumerate(transactions):
        record = transaction.get(key + b"#source")
        if record is not None:
            signature, content, producer = unpack_source(record)
            if producer not in accepted:
                result.stale.append(Entry(sample, expected, shard))
            elif _signature(source, sample) not in (signature, None):
                result.doubtful.append(Entry(sample, expected, shard, content, producer))
            else:
                result.present += 1
            return
        record = transaction.get(key + b"#unreadable")
        if record is not None:
            signature, _, producer = unpack_source(record)
            if producer == expected and signature == (_signature(source, sample) or NO_SIGNATURE):
                result.unreadable[sample.sample_id] = bytes(record[48:]).decode()
            else:
                result.missing.append(Entry(sample, expected, shard))
            return
    result.missing.append(Entry(sample, expected))


def _signature(source: ImageSource, sample: Sample) -> bytes | None:
    """None where the picture is gone: its entry still stands for it."""
    try:
        return source.signature(sample)
    except UnreadableImage:
        return None


def _survey_foreign(
    result: Survey, transactions: list[lmdb.Transaction], samples: list[Sample], shape: tuple[int, ...]
) -> None:
    result.foreign = True
    result.meta = StoreMeta(result.wanted.kind, "float16", shape, complete=True)
    if tuple(shape) != tuple(result.wanted.shape):
        option = "latent_shape" if result.wanted.kind == "latents" else "token_shape"
        raise UserError(
            f"{option} {tuple(shape)} of the store {result.path} is not what this run needs, {tuple(result.wanted.shape)}: it "
            "was made for another resolution or teacher."
        )
    suffix = SUFFIXES[result.wanted.kind]
    absent = []
    for sample in samples:
        value = next(
            (v for t in transactions if (v := t.get(f"{sample.sample_id}{suffix}".encode())) is not None), None
        )
        if value is None:
            absent.append(sample.sample_id)
        elif len(value) != result.meta.value_bytes:
            raise UserError(
                f"Entry {sample.sample_id}{suffix} of the store {result.path} has {len(value)} bytes, but {tuple(shape)} in "
                f"float16 are {result.meta.value_bytes}."
            )
    if absent:
        raise UserError(
            f"{len(absent)} of {len(samples)} samples of the manifest are not in the store {result.path} (first: "
            f"{', '.join(absent[:3])}), and it was made elsewhere, so they cannot be added to it. Check that manifest and "
            "store belong together."
        )
    result.present = len(samples)
