"""A number with its spread over seeds, and when two of them differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """values: one per seed. What no seed moves has one value and no deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None where there is one value."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; what is not defined (nan) is null."""
        return {
            "mean": _finite(self.mean),
            "deviation": _finite(self.deviation),
            "values": [_finite(value) for value in self.values],
        }

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ±{self.deviation:.3f}"


def differ(a: Spread, b: Spread, times: float = 2.0) -> bool:
    """Whether two means are further apart than `times` the standard error of their difference over the seeds.

    Two values of one seed each are never called different: nothing is known of their spread. Where one has none because no
    seed moves it, the other's alone decides. The spread is that of the seeds; the choice of pictures has its own on top.
    """
    errors = [s.deviation**2 / len(s.values) for s in (a, b) if s.deviation is not None]
    return bool(errors) and abs(a.mean - b.mean) > times * math.sqrt(sum(errors))


def transposed(by_seed: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Name -> spread, from one dictionary of numbers per seed; all have the same names."""
    return {name: Spread(tuple(one[name] for one in by_seed)) for name in by_seed[0]} if by_seed else {}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
