"""A number measured with several seeds, its deviation, and the difference of two of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.evaluation.estimates import Estimate


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


def paired(a: Spread, b: Spread) -> Estimate:
    """How far `a` is above `b`, seed by seed of the same noise. What no seed moves is compared with each value of the other.

    The error is nan where both have one value. It is that of the seeds; the choice of pictures has its own on top.
    """
    count = max(len(a.values), len(b.values))
    gaps = [x - y for x, y in zip(_repeated(a, count), _repeated(b, count), strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(count) if count > 1 and all(map(math.isfinite, gaps)) else math.nan
    return Estimate(statistics.fmean(gaps), error, count - 1 if math.isfinite(error) else 0)


def _repeated(spread: Spread, count: int) -> tuple[float, ...]:
    return spread.values * count if len(spread.values) == 1 else spread.values


def transposed(by_seed: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Name -> spread, from one dictionary of numbers per seed; all have the same names."""
    return {name: Spread(tuple(one[name] for one in by_seed)) for name in by_seed[0]} if by_seed else {}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
