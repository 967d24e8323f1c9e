"""Standard errors over random seeds, and whether a difference is significant.

`jackknife`: of a number computed from many pictures. One picture at a time is left out, within each prompt: the prompts are fixed,
the seeds are the sample. Of a prompt with m pictures, the others then weigh m/(m - 1), so that the prompt counts as much as
before. For a mean this is the standard error of stratified samples; a distance between sets needs no formula of its own. Source:
Rao and Wu 1988, "Resampling inference with complex survey data", JASA 83; Shao and Tu 1995, "The Jackknife and Bootstrap",
6.2.3; quantiles of Student's t from Abramowitz and Stegun, 26.7.5.
`Spread`: of a number that was measured once per noise seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

CONFIDENCE = 0.95
ROUNDING = 1e-9
"""Sums of cosines in float64 can differ by so much where they should be equal."""

Statistic = Callable[[Tensor], float]
"""Weights of the pictures, float64 [n], 0 for one that is left out -> the number; nan where it is undefined."""


@dataclass(frozen=True)
class Estimate:
    value: float
    error: float
    """Standard error; nan where it is unknown."""
    freedom: int
    """Degrees of freedom of the error."""

    @property
    def margin(self) -> float:
        """Half of the 95 % confidence interval."""
        return student_quantile(self.freedom) * self.error if self.freedom > 0 else math.nan

    @property
    def is_significant(self) -> bool:
        """Whether the 95 % interval excludes 0. False where the error is unknown, and for what rounding alone explains."""
        return abs(self.value) > self.margin and abs(self.value) > ROUNDING

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; nan becomes null."""
        return {name: _finite(getattr(self, name)) for name in ("value", "error", "margin")}

    def __str__(self) -> str:
        """0.612 ± 0.021: two significant digits of the margin, between three and five decimals."""
        if not math.isfinite(self.value):
            return "–"
        if not self.margin > ROUNDING:
            return _fixed(self.value, 3)
        digits = min(max(3, 1 - math.floor(math.log10(self.margin))), 5)
        return f"{_fixed(self.value, digits)} ± {_fixed(self.margin, digits)}"


def jackknife(statistic: Statistic, groups: Tensor) -> Estimate:
    """`statistic` of all pictures, and its standard error. groups [n] int64: the prompt of each picture.

    The error is nan where a prompt has a single picture, or the statistic is undefined without one of them. Degrees of freedom are
    counted as if all prompts had the same variance.
    """
    value = of_all(statistic, len(groups))
    variance, freedom = 0.0, 0
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        count = len(members)
        if count < 2:
            return Estimate(value, math.nan, 0)
        values = torch.tensor(
            [statistic(_without(picture, groups, members)) for picture in members], dtype=torch.float64
        )
        variance += (count - 1) / count * float((values - values.mean()).square().sum())
        freedom += count - 1
    return Estimate(value, math.sqrt(variance), freedom) if math.isfinite(variance) else Estimate(value, math.nan, 0)


def _without(picture: Tensor, groups: Tensor, members: Tensor) -> Tensor:
    """Weights where one picture of the `members` of its prompt is left out."""
    weights = torch.ones(len(groups), dtype=torch.float64)
    weights[members] = len(members) / (len(members) - 1)
    weights[picture] = 0
    return weights


def of_all(statistic: Statistic, count: int) -> float:
    return statistic(torch.ones(count, dtype=torch.float64))


def mean_of(values: Tensor) -> Statistic:
    """The weighted mean of one number per picture [n]."""
    numbers = values.double()
    return lambda weights: float((weights * numbers).sum() / weights.sum())


def difference(of: Statistic, to: Statistic) -> Statistic:
    """Of two statistics over the same prompts and seeds: what a seed does to both cancels."""
    return lambda weights: of(weights) - to(weights)


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Half of the interval in standard errors; within 0.2 % at 95 %, exact for 1 and 2 degrees of freedom."""
    p = (1 + confidence) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _fixed(value: float, digits: int) -> str:
    """Without "-0"."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


@dataclass(frozen=True)
class Spread:
    """values: one per noise seed. A number that depends on no seed has one value and no deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None of a single value."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; nan becomes null."""
        return {
            "mean": _finite(self.mean),
            "deviation": _finite(self.deviation),
            "values": [_finite(value) for value in self.values],
        }

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ±{self.deviation:.3f}"


def paired_difference(a: Spread, b: Spread) -> Estimate:
    """The mean of a - b over the same noise seeds. A single value is paired with each value of the other.

    The error is nan where both have one value. It covers the seeds only, not the choice of pictures.
    """
    count = max(len(a.values), len(b.values))
    gaps = [x - y for x, y in zip(_repeated(a, count), _repeated(b, count), strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(count) if count > 1 and all(map(math.isfinite, gaps)) else math.nan
    return Estimate(statistics.fmean(gaps), error, count - 1 if math.isfinite(error) else 0)


def _repeated(spread: Spread, count: int) -> tuple[float, ...]:
    return spread.values * count if len(spread.values) == 1 else spread.values


def transposed(by_seed: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Name -> spread, from one dictionary of numbers per seed; all have the same names."""
    return {name: Spread(tuple(numbers[name] for numbers in by_seed)) for name in by_seed[0]} if by_seed else {}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
