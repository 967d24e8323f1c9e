"""Latents that a frozen base drew from prompts: a store of kind latents, scaled, that knows how each entry came to be.

Beside an entry is `{key}#drawn`, JSON: prompt, negative_prompt, seed. The producer in `__meta__` says by which base, sampler, steps
and guidance, and the statistics of all latents by channel. The noise of an entry is torch's on the CPU for its seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from library.data.store import DRAWN, TensorStore
from library.errors import UserError

VALUE = "latents that a base drew, scaled"
"""What a producer calls them."""
SPREAD = (0.5, 2.0)
"""Between these lies the standard deviation of scaled latents: unscaled ones of SD1.5 have 5.5 times that of scaled ones, twice
scaled ones a fifth."""
CHECKED = 256
"""Entries whose spread is measured before a training."""


class Drawn(NamedTuple):
    """How an entry came to be."""

    prompt: str
    negative_prompt: str
    seed: int

    def to_json(self) -> bytes:
        return json.dumps(self._asdict(), sort_keys=True).encode()


@dataclass(frozen=True)
class TeacherLatents:
    store: TensorStore
    drawn: dict[str, Drawn]
    """By sample id, in order."""

    @property
    def producer(self) -> dict[str, Any]:
        return self.store.meta.producer

    def close(self) -> None:
        self.store.close()


class Spread:
    """Mean and standard deviation of latents by channel."""

    def __init__(self, channels: int) -> None:
        self.sums, self.count = np.zeros((2, channels)), 0
        self.entries = 0

    def add(self, latents: np.ndarray) -> None:
        """latents: [B, C, h, w]"""
        values = latents.astype(np.float64)
        self.sums += [values.sum(axis=(0, 2, 3)), (values**2).sum(axis=(0, 2, 3))]
        self.count += values.size // values.shape[1]
        self.entries += len(values)

    @property
    def means(self) -> np.ndarray:
        return self.sums[0] / self.count

    @property
    def deviations(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.sums[1] / self.count - self.means**2, 0))

    @property
    def deviation(self) -> float:
        """Of all channels together."""
        total, squares = self.sums.sum(axis=1) / (self.count * self.sums.shape[1])
        return float(max(squares - total**2, 0)) ** 0.5

    def check(self, what: str) -> None:
        """Raise UserError where this is no spread of scaled latents. what: whose they are."""
        low, high = SPREAD
        if low <= self.deviation <= high:
            return
        why = (
            "as if they were not multiplied with the autoencoder's scaling factor, or drawn in too few steps with too much guidance"
            if self.deviation > high
            else "as if they were multiplied with the autoencoder's scaling factor twice"
        )
        raise UserError(
            f"{what} have a standard deviation of {self.deviation:.3g}, {why}: that of scaled latents lies between {low:g} and "
            f"{high:g}. A model trained on them would draw hazy or glaring pictures."
        )


def spread_of(store: TensorStore, sample_ids: Iterable[str]) -> Spread:
    """Raises UserError where an entry is not finite."""
    spread = Spread(store.meta.shape[0])
    for sample_id in sample_ids:
        latents = store.read(sample_id)
        if not np.isfinite(latents).all():
            raise UserError(
                f"Entry {sample_id} of the store {store.path} is not finite. Delete the store and draw it again."
            )
        spread.add(latents[None])
    return spread


def open_teacher_latents(path: Path) -> TeacherLatents:
    """The store at `path`, to train on. Raises UserError where it is another kind of store, unfinished, or not scaled once."""
    store = TensorStore(path, "latents", made_elsewhere=("float16", (0,)))
    if store.foreign or store.meta.producer.get("value") != VALUE:
        raise UserError(
            f"teacher_latents {path} was not drawn by prepare_cache.py --teacher_latents: its entries have no prompts and seeds."
        )
    if not store.meta.complete:
        raise UserError(
            f"teacher_latents {path} is not complete. Run prepare_cache.py again with the options that began it."
        )
    drawn = read_drawn(store)
    some = np.unique(np.linspace(0, len(drawn) - 1, min(CHECKED, len(drawn))).astype(int))
    names = list(drawn)
    spread_of(store, (names[place] for place in some)).check(f"The latents in {path}")
    return TeacherLatents(store, drawn)


def read_drawn(store: TensorStore) -> dict[str, Drawn]:
    """How the entries came to be, by sample id, in order. Raises UserError where the store does not say of one."""
    found = {}
    for sample_id in sorted(store.sample_ids()):
        note = store.get_raw(store.key(sample_id) + DRAWN)
        if note is None:
            raise UserError(
                f"Entry {sample_id} of the store {store.path} has no prompt and no seed. Draw the store again."
            )
        found[sample_id] = Drawn(**json.loads(bytes(note)))
    return found
