"""Which weights a frozen model has; no torch, so that a study can tell before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from library.files import file_hash, file_mark, read_json, remembered_hash
from library.hashes import Hashes
from library.models.locate import TINY_BASES, BaseLocation, base_status, locate_base, weight_files
from networks.families import UNET

HASHES = "weight_hashes.json"
"""File in a cache folder: hashes of the weight files that were used with it."""


def weight_fingerprint(location: BaseLocation, component: str, cache_dir: Path) -> str:
    """SHA-256 (hex) of a component's weight file, remembered in `cache_dir` while the file is unchanged.

    Of a single file: that file. Of shards: of their hashes in order.
    """
    files = [location.path] if location.is_file else weight_files(location.path, component)
    hashes = [remembered_hash(file, cache_dir / HASHES, _begun_or_new) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def hash_ahead(name: str, components: Sequence[str], cache_dir: Path) -> None:
    """Begin to hash, on a thread, those weights of a base that are on this machine and were never used with this cache folder.

    name: as `locate_base` takes it. components: of those that it has. `weight_fingerprint` waits for the hashes. Called before the
    libraries are imported, which takes longer, on another core.
    """
    if name in TINY_BASES or base_status(name, (UNET,)) is not None or os.environ.get("RANK", "0") != "0":
        return
    base = locate_base(name, (UNET,))
    there = [part for part in components if (base.path / part).is_dir()]
    files = [base.path] if base.is_file else [file for part in there for file in weight_files(base.path, part)]
    known = read_json(cache_dir / HASHES) if (cache_dir / HASHES).exists() else {}
    files = [file for file in map(Path.resolve, files) if str(file) not in known]
    hashes = Hashes(files)
    _begun.update({file: (file_mark(file), hashes) for file in files})
    hashes.start()


_begun: dict[Path, tuple[dict[str, int], Hashes]] = {}
"""By file: how it was when hashing began."""


def _begun_or_new(path: Path) -> str:
    mark, hashes = _begun.pop(path, (None, None))
    return file_hash(path) if hashes is None or mark != file_mark(path) else hashes.of(path)
