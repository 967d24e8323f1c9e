"""Hashes of inputs, taken while the work that needs no hash goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from library.errors import UserError
from library.files import file_hash


class Hashes:
    """SHA-256 of some files, in a thread of its own: hashing runs outside of Python's lock."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._found: dict[Path, Future[str]] = {path: Future() for path in dict.fromkeys(files)}

    def start(self) -> None:
        # No pool: a process that fails would wait for its threads, and gigabytes take seconds.
        threading.Thread(target=self._take, daemon=True).start()

    def of(self, path: Path) -> str:
        """Hex; waits for it. To be asked for after `start`."""
        return self._found[path].result()

    def all(self) -> dict[str, str]:
        return {str(path): self.of(path) for path in self._found}

    def _take(self) -> None:
        for path, found in self._found.items():
            try:
                found.set_result(file_hash(path))
            except OSError as error:
                found.set_exception(UserError(f"{path} cannot be read: {error.strerror or error}."))
