"""Entries of bucketed pictures: one store per shape, and one more for mirrored pictures.

    cache_dir/latents_<hash of what makes them>/0512x0768            width x height of the bucket in pixels
    cache_dir/latents_<hash of what makes them>/0512x0768_flipped

The key of an entry is the sample id. What an entry was made from says how its picture was cut, so other bucket settings
make anew just the entries that they cut in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from library.caching.decoding import Importer
from library.caching.fill import Filling, Say, dropped_of, list_dropped, nothing_usable
from library.caching.geometry import BucketCrop, Cut
from library.caching.pipeline import PixelEncoder
from library.caching.producers import Wanted, fingerprint
from library.caching.survey import Survey, Target
from library.data.buckets import Fitted, Size
from library.data.sources import FileSource, Sample
from library.data.store import TensorStore, disk_bytes
from library.files import human_bytes
from library.processes import Processes
from library.words import plural

FILES_PER_STORE = 3  # data, its lock and LMDB's


@dataclass(frozen=True)
class BucketedPicture:
    """A picture that is to be cached, and what its bucket keeps of it.

    sample_id is unique in a run: a picture that is trained at two resolutions has two. flip: its mirror image, too.
    hidden_colours: see `Cut`.
    """

    sample_id: str
    path: Path
    fitted: Fitted
    interpolation: str | None
    flip: bool
    hidden_colours: bool = False


@dataclass
class BucketCaches:
    """Complete caches of the pictures that are not in `dropped`, which maps sample ids to reasons.

    stores, flipped: by bucket, (width, height) in pixels; a bucket without readable pictures has none. Entries are
    found by sample_id. Open stores cannot be written to: close them before more is cached in this process.
    """

    stores: dict[Size, TensorStore]
    flipped: dict[Size, TensorStore]
    dropped: dict[str, str]

    def close(self) -> None:
        for store in (*self.stores.values(), *self.flipped.values()):
            store.close()

    @property
    def width(self) -> int:
        """Length of the last axis of every entry."""
        return next(iter(self.stores.values())).meta.shape[-1]

    def producers(self, prefix: str = "") -> dict[str, Any]:
        """What made the entries of each bucket, for a state to remember."""
        return {f"{prefix}{w}x{h}": store.meta.producer for (w, h), store in sorted(self.stores.items())}


@dataclass(frozen=True)
class BucketKind:
    """What is kept of each picture.

    label: plural noun for messages, and first word of the folder. kind: of the stores. producer: what makes entries of
    every bucket, and what the folder is named by. others: what makes another folder, in words. wanted: form and
    producer of the entries of a bucket.
    """

    label: str
    kind: str
    cache_dir: Path
    producer: Mapping[str, Any]
    others: str
    wanted: Callable[[Size], Wanted]

    @property
    def folder(self) -> Path:
        return self.cache_dir / f"{self.label}_{fingerprint(dict(self.producer))[:4].hex()}"


class StorePlan(NamedTuple):
    """All samples; by name the stores they go to, those of one bucket beside each other; how they are cut."""

    samples: list[Sample]
    targets: dict[str, Target]
    crop: BucketCrop


def plan_stores(pictures: Sequence[BucketedPicture], kind: BucketKind, *, accept_imported: bool = False) -> StorePlan:
    samples: dict[str, Sample] = {}
    members: dict[tuple[Size, bool], list[Sample]] = {}
    for picture in pictures:
        if picture.sample_id in samples:
            raise ValueError(f"two pictures have the sample id {picture.sample_id!r}")
        sample = samples[picture.sample_id] = Sample(picture.sample_id, str(picture.path), 0)
        for flipped in (False, True)[: 1 + picture.flip]:
            members.setdefault((picture.fitted.bucket, flipped), []).append(sample)
    targets = {}
    for bucket, flipped in sorted(members):
        name = "{:04d}x{:04d}".format(*bucket) + "_flipped" * flipped
        own = members[bucket, flipped]
        targets[name] = Target(kind.folder / name, kind.wanted(bucket), own, accept_imported=accept_imported)
    crop = BucketCrop(
        {one.sample_id: Cut(one.fitted, one.interpolation, one.hidden_colours) for one in pictures},
    )
    return StorePlan(list(samples.values()), targets, crop)


def is_flipped(store: str) -> bool:
    return store.endswith("_flipped")


class FlippingEncoder:
    """An encoder that is loaded when the first picture has to be encoded: where all are there it is not."""

    def __init__(self, load: Callable[[], PixelEncoder]) -> None:
        self._load = load
        self._encoder: PixelEncoder | None = None

    def of_store(self, name: str) -> PixelEncoder:
        return _OfStore(self, is_flipped(name))

    def get(self) -> PixelEncoder:
        if self._encoder is None:
            self._encoder = self._load()
        return self._encoder


@dataclass(frozen=True)
class _OfStore:
    encoder: FlippingEncoder
    flipped: bool

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder.get().encode(pixels.flip(-1) if self.flipped else pixels)


def fill_stores(
    plan: StorePlan,
    kind: BucketKind,
    encoder: FlippingEncoder,
    *,
    batch_size: int,
    workers: int,
    processes: Processes,
    say: Say,
    importer: Importer | None = None,
) -> BucketCaches:
    """Make all entries of a plan complete, encoding what is missing or no longer fits; say what was done.

    Raises UserError: no picture can be read, a store in use, no space.
    """
    _allow_open_files(FILES_PER_STORE * len(plan.targets))
    label, samples = kind.label, plan.samples
    source = FileSource(Path("the training images"), samples)
    filling = Filling(
        label, source, plan.crop, processes, batch_size=batch_size, workers=workers, say=say, importer=importer
    )
    states = filling.survey(plan.targets)
    _tell(states, kind, say)
    states = filling.fill(states, encoder.of_store)
    dropped = dropped_of(states.values())
    size = sum(disk_bytes(state.path) for state in states.values())
    say(
        f"{label}: {plural(len(samples) - len(dropped), 'picture')} cached in {plural(len(plan.targets), 'store')}, {len(dropped)} "
        f"unreadable; "
        f"{human_bytes(size)} in {kind.folder}"
    )
    list_dropped(kind.cache_dir / f"{label}_unreadable.tsv", label, samples, dropped, processes, say)
    if samples and len(dropped) == len(samples):
        raise nothing_usable(str(source.location), len(samples), dropped)
    return _open(states, kind.kind, plan.crop, dropped)


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files (often 1024) so far that `count` more fit, as far as the system lets us."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 1024 + count)
    if soft != resource.RLIM_INFINITY:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _tell(states: Mapping[str, Survey], kind: BucketKind, say: Say) -> None:
    """Why entries are made although there were some: another producer, other bucket settings."""
    paths = sorted(kind.cache_dir.glob(f"{kind.label}_*"))
    others = [path.name for path in paths if path.is_dir() and path != kind.folder]
    if others and not kind.folder.is_dir():
        say(f"{kind.label}: {kind.cache_dir} has those of another {kind.others}, which stay: {', '.join(others)}")
    outdated = [state for state in states.values() if state.stale]
    if outdated:
        meta, here = outdated[0].meta, kind.producer.get("fit", {})
        there = meta.producer.get("fit", {}) if meta is not None else {}
        changed = [
            f"{name} {there.get(name)} there, {here.get(name)} here"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        why = f" ({'; '.join(changed)})" if changed else ""
        say(f"{kind.label}: some entries were cut differently or imported{why}: these are made anew, the others stay")


def _open(states: Mapping[str, Survey], kind: str, crop: BucketCrop, dropped: dict[str, str]) -> BucketCaches:
    caches = BucketCaches({}, {}, dropped)
    for name, state in states.items():
        readable: Iterable[Sample] = (sample for sample in state.target.samples if sample.sample_id not in dropped)
        if (first := next(iter(readable), None)) is not None:
            stores = caches.flipped if is_flipped(name) else caches.stores
            stores[crop.size(first)] = TensorStore(state.path, kind)
    return caches
