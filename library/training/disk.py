"""What the caches of a run will take on which disk, worked out from the pictures before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.data.collect import TrainingData
from library.data.store import StoreMeta, disk_bytes
from library.errors import UserError
from library.files import disk_of, free_bytes, human_bytes
from library.models.encoders import grid_in_aspect
from library.models.locate import dino_status
from library.options.data import ClassCacheOptions
from library.options.model import token_kinds
from library.options.run import RunOptions
from networks.families import Family

# Widths of DINOv2 ViT-S, B, L and g (Oquab et al. 2023, table 17), for a teacher that is not on this machine yet.
TEACHER_WIDTHS = {
    "small": 384,
    "vits": 384,
    "base": 768,
    "vitb": 768,
    "large": 1024,
    "vitl": 1024,
    "giant": 1536,
    "vitg": 1536,
}


@dataclass(frozen=True)
class CacheSize:
    """Bytes of all entries of a kind (latents, tokens of all teachers together), and what is in the stores there already."""

    kind: str
    path: Path
    needed: int
    there: int

    @property
    def lacking(self) -> int:
        """Nobody has looked which entries fit: those there are counted as if all did, and a store that is about full as whole."""
        return self.needed - self.there if self.there < 0.9 * self.needed else 0


def cache_sizes(options: RunOptions, family: Family, data: TrainingData) -> list[CacheSize]:
    """Of latents and tokens, each picture with its mirror image where that is shown; latents of a teacher are there already."""
    if data.drawn is not None:
        return []
    tokens = options.alignment if options.alignment.needs_teacher else None
    widths = wanted_widths(options)
    moments = 1 if data.classes is not None else 2
    needed = {"latents": 0, "tokens": 0}
    for picture in data.every:
        times, bucket = 1 + picture.image.subset.flip_aug, picture.fitted.bucket
        shape = (moments * family.latent_channels, *family.latent_size(*bucket))
        needed["latents"] += times * StoreMeta("latents", "float16", shape).entry_bytes
        if tokens is not None:
            rows, columns = grid_in_aspect(tokens.token_grid, *bucket)
            for width in widths.values():
                entry = StoreMeta("tokens", tokens.token_dtype, (rows * columns, width))
                needed["tokens"] += times * entry.entry_bytes
    found = []
    for kind, size in needed.items():
        if not size:
            continue
        path = options.cache.cache_dir
        stores = list(path.glob(f"{kind}_*/*"))
        if data.classes is not None and isinstance(options.cache, ClassCacheOptions):
            names = ["latents"] if kind == "latents" else list(token_kinds(widths).values())
            stores = [options.cache.store_path("train", name) for name in names]
            path = stores[0]
        found.append(CacheSize(kind, path, size, sum(map(disk_bytes, stores))))
    return found


def shortages(sizes: list[CacheSize]) -> Iterator[str]:
    """A sentence for each disk that has too little room."""
    disks: dict[int, list[CacheSize]] = {}
    for size in sizes:
        disks.setdefault(disk_of(size.path), []).append(size)
    for together in disks.values():
        lacking, free = sum(size.lacking for size in together), free_bytes(together[0].path)
        if lacking > free:
            kinds, path = " and ".join(size.kind for size in together), together[0].path
            yield (
                f"The caches of {kinds} still need {human_bytes(lacking)} on the disk of {path}, and {human_bytes(free)} are free "
                f"there. Free {human_bytes(lacking - free)}, or keep them on another disk."
            )


def require_cache_space(sizes: list[CacheSize]) -> None:
    """Raise UserError where the caches will not fit, before the first of them is begun."""
    if short := list(shortages(sizes)):
        raise UserError("\n".join(short))


def wanted_widths(options: RunOptions) -> dict[str, int]:
    """Widths of the teachers' tokens, guessed by the name of one that is not on this machine yet; empty without a teacher."""
    if not options.alignment.needs_teacher:
        return {}
    return {teacher: _width(name) for teacher, name in options.model.teachers.items()}


def _width(name: str) -> int:
    if dino_status(name) is None:
        from library.models.teachers import teacher_size

        return teacher_size(name).width
    return next((width for word, width in TEACHER_WIDTHS.items() if word in name.lower()), 1024)
