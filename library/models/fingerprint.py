"""Which weights a frozen model has; no torch, so that a study can tell before anything is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from library.files import remembered_hash
from library.models.locate import BaseLocation, weight_files

HASHES = "weight_hashes.json"
"""File in a cache folder: hashes of the weight files that were used with it."""


def weight_fingerprint(location: BaseLocation, component: str, cache_dir: Path) -> str:
    """SHA-256 (hex) of a component's weight file, remembered in `cache_dir` while the file is unchanged.

    Of a single file: that file. Of shards: of their hashes in order.
    """
    files = [location.path] if location.is_file else weight_files(location.path, component)
    hashes = [remembered_hash(file, cache_dir / HASHES) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
