"""Hashes of inputs, taken while the work that needs no hash goes on."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.files import file_hash


class Hashes:
    """SHA-256 of some files, in a thread of its own: hashing runs outside of Python's lock."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found = {path: self._pool.submit(file_hash, path) for path in dict.fromkeys(files)}

    def of(self, path: Path) -> str:
        """Hex; waits for it."""
        return self._found[path].result()

    def all(self) -> dict[str, str]:
        return {str(path): self.of(path) for path in self._found}
