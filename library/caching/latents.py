"""Latents of bucketed pictures: one store per shape, and one more for mirrored pictures.

    cache_dir/latents_<hash of VAE and precision>/0512x0768            width x height of the bucket in pixels
    cache_dir/latents_<hash of VAE and precision>/0512x0768_flipped

A value is float16 [8, h/8, w/8]: mean and log-variance of the posterior, unscaled (see `library.models.encoders`). Its
key is the sample id. What an entry was made from says how its picture was cut, so other bucket settings make anew just
the entries that they cut in another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.caching.fill import Filling, Say, dropped_of, list_dropped, nothing_usable
from library.caching.geometry import BucketCrop, Cut
from library.caching.kohya_npz import KohyaLatents
from library.caching.pictures import Importer
from library.caching.producers import Wanted, fingerprint
from library.caching.survey import Survey, Target
from library.data.buckets import Fitted, Size
from library.data.pixels import PIXELS_VERSION
from library.data.sources import FileSource, Sample
from library.data.store import TensorStore, disk_bytes
from library.files import human_bytes
from library.models.encoders import VAE_FACTOR, MomentsEncoder, weight_fingerprint
from library.models.load import load_vae
from library.models.locate import BaseLocation
from library.processes import Processes
from networks.original_names import SD15, SDXL, VAE, Family

KIND = "moments"
CHANNELS = 8
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NPZ_SUFFIXES = {SD15.key: "sd", SDXL.key: "sdxl"}
LABEL = "latents"
FILES_PER_STORE = 3  # data, its lock and LMDB's


@dataclass(frozen=True)
class BucketedPicture:
    """A picture that is to be cached, and what its bucket keeps of it.

    sample_id is unique in a run: a picture that is trained at two resolutions has two. flip: its mirror image, too.
    """

    sample_id: str
    path: Path
    fitted: Fitted
    interpolation: str | None
    flip: bool


@dataclass
class LatentCaches:
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


def latent_precision(family: Family, precision: str) -> str:
    """What the VAE runs in: SDXL's overflows in fp16 (madebyollin/sdxl-vae-fp16-fix tells why), so there it is float32."""
    return "no" if family == SDXL and precision == "fp16" else precision


def prepare_latents(
    pictures: Sequence[BucketedPicture],
    *,
    base: BaseLocation,
    vae: BaseLocation | None = None,
    family: Family,
    fit_facts: dict[str, Any],
    precision: str,
    cache_dir: Path,
    batch_size: int,
    workers: int,
    processes: Processes,
    say: Say,
    kohya_caches: bool = False,
) -> LatentCaches:
    """Make the latents of all pictures of a run complete, encoding what is missing or no longer fits; say what was done.

    Args:
        vae: where another VAE than the base's lies.
        fit_facts: options that decide how pictures are cut, by name: kept with the stores to explain differences.
        precision: no, bf16 or fp16 (see `latent_precision`).
        kohya_caches: take latents from kohya's .npz files beside the images where these fit. Without it, entries that
            were taken from there are encoded.

    Raises UserError: no picture can be read, a store in use, no space.
    """
    used = latent_precision(family, precision)
    if used != precision:
        say(f"{LABEL}: the VAE of {family.title} overflows in {precision}, so it runs in float32")
    location = vae or base
    with processes.main_first():
        weights = weight_fingerprint(location, VAE, cache_dir / "weight_hashes.json")
    producer = {
        "model": location.name,
        "weights": weights,
        "value": "posterior mean and log-variance",
        "pixels": PIXELS_VERSION,
        "precision": used,
        "fit": json.loads(json.dumps(fit_facts)),  # as it is read back
    }
    samples, targets = _targets(pictures, cache_dir, producer, accept_imported=kohya_caches)
    _allow_open_files(FILES_PER_STORE * len(targets))
    crop = BucketCrop({one.sample_id: Cut(one.fitted, one.interpolation) for one in pictures})
    importer: Importer | None = None
    if kohya_caches:
        importer = KohyaLatents(crop, _NPZ_SUFFIXES[family.key], {name: _is_flipped(name) for name in targets})
    source = FileSource(Path("the training images"), samples)
    filling = Filling(
        LABEL, source, crop, processes, batch_size=batch_size, workers=workers, say=say, importer=importer
    )
    encoder = _LazyVae(location, (SD15, SDXL) if vae else (family,), DTYPES[used], processes.device)
    states = filling.survey(targets)
    _tell(states, producer, cache_dir, say)
    states = filling.fill(states, encoder.of_store)
    dropped = dropped_of(states.values())
    size = sum(disk_bytes(state.path) for state in states.values())
    say(
        f"{LABEL}: {len(samples) - len(dropped)} pictures cached in {len(targets)} stores, {len(dropped)} unreadable; "
        f"{human_bytes(size)} in {_folder(cache_dir, producer)}"
    )
    list_dropped(cache_dir / "latents_unreadable.tsv", LABEL, samples, dropped, processes, say)
    if samples and len(dropped) == len(samples):
        raise nothing_usable(str(source.location), len(samples), dropped)
    return _open(states, crop, dropped)


def _folder(cache_dir: Path, producer: dict[str, Any]) -> Path:
    return cache_dir / f"latents_{fingerprint(producer)[:4].hex()}"


def _is_flipped(store: str) -> bool:
    return store.endswith("_flipped")


def _targets(
    pictures: Iterable[BucketedPicture], cache_dir: Path, producer: dict[str, Any], *, accept_imported: bool
) -> tuple[list[Sample], dict[str, Target]]:
    """All samples, and by name the stores that they go to, those of one bucket beside each other."""
    samples: dict[str, Sample] = {}
    members: dict[tuple[Size, bool], list[Sample]] = {}
    for one in pictures:
        if one.sample_id in samples:
            raise ValueError(f"two pictures have the sample id {one.sample_id!r}")
        sample = samples[one.sample_id] = Sample(one.sample_id, str(one.path), 0)
        for flipped in (False, True)[: 1 + one.flip]:
            members.setdefault((one.fitted.bucket, flipped), []).append(sample)
    targets = {}
    for (width, height), flipped in sorted(members):
        name = f"{width:04d}x{height:04d}" + "_flipped" * flipped
        shape = (CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
        wanted = Wanted(KIND, "float16", shape, producer, remedy="--no_half_vae may help")
        path = _folder(cache_dir, producer) / name
        targets[name] = Target(path, wanted, members[(width, height), flipped], accept_imported=accept_imported)
    return list(samples.values()), targets


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


def _tell(states: dict[str, Survey], producer: dict[str, Any], cache_dir: Path, say: Say) -> None:
    """Why entries are made although there were some: another VAE or precision, other bucket settings."""
    folder = _folder(cache_dir, producer)
    others = [path.name for path in sorted(cache_dir.glob("latents_*")) if path.is_dir() and path != folder]
    if others and not folder.is_dir():
        say(f"{LABEL}: {cache_dir} has those of another VAE or precision, which stay: {', '.join(others)}")
    outdated = [state for state in states.values() if state.stale]
    if outdated:
        meta, here = outdated[0].meta, producer["fit"]
        there = meta.producer.get("fit", {}) if meta is not None else {}
        changed = [
            f"{name} {there.get(name)} there, {here.get(name)} here"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        why = f" ({'; '.join(changed)})" if changed else ""
        say(f"{LABEL}: some entries were cut differently or imported{why}: these are made anew, the others stay")


def _open(states: dict[str, Survey], crop: BucketCrop, dropped: dict[str, str]) -> LatentCaches:
    caches = LatentCaches({}, {}, dropped)
    for name, state in states.items():
        readable = [sample for sample in state.target.samples if sample.sample_id not in dropped]
        if readable:
            stores = caches.flipped if _is_flipped(name) else caches.stores
            stores[crop.size(readable[0])] = TensorStore(state.path, KIND)
    return caches


class _LazyVae:
    """The VAE, loaded when the first picture has to be encoded: where all are imported or only touched it is not."""

    def __init__(
        self, location: BaseLocation, families: tuple[Family, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._load: Callable[[], Any] = lambda: load_vae(location, families=families, dtype=dtype, device=device)
        self._vae: Any = None

    def of_store(self, name: str) -> _LazyEncoder:
        return _LazyEncoder(self, _is_flipped(name))

    def get(self) -> Any:
        if self._vae is None:
            self._vae = self._load()
        return self._vae


@dataclass(frozen=True)
class _LazyEncoder:
    vae: _LazyVae
    flipped: bool

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return MomentsEncoder(self.vae.get(), flipped=self.flipped).encode(pixels)
