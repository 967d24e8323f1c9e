"""timestep_bins.json: how well noise levels can be told from each other, as a block probe measured it and training reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json, write_json
from library.options.checks import require

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LevelAccuracy:
    """log_snr: [N + 1] ascending edges of bins of log((alpha / sigma)^2). accuracy: [N] in 0..1. facts: where it comes from."""

    log_snr: list[float]
    accuracy: list[float]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        values = {"format_version": FORMAT_VERSION, "log_snr": self.log_snr, "accuracy": self.accuracy}
        write_json(path, {**values, **self.facts})

    @classmethod
    def read(cls, path: Path, least: float = 0.0) -> LevelAccuracy:
        """Raises UserError where it is no such file, or no bin has the accuracy `least`."""
        found = read_json(path)
        try:
            version, edges, accuracy = found.pop("format_version"), found.pop("log_snr"), found.pop("accuracy")
            numbers = all(math.isfinite(value) for value in (*edges, *accuracy))
            ascend = all(a < b for a, b in pairwise(edges))
            fits = version == FORMAT_VERSION and len(edges) == len(accuracy) + 1 > 1
            if not (numbers and ascend and fits and all(0 <= value <= 1 for value in accuracy)):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} is no timestep_bins.json: it should have log_snr, N + 1 ascending numbers, and accuracy, N numbers from 0 "
                "to 1. evaluate.py --block_probe writes one."
            ) from None
        require(
            max(accuracy) >= least,
            "timestep_bin_min_acc",
            f"{least:g} is reached by no bin of {path}, whose best has {max(accuracy):.3f}. Lower it.",
        )
        return cls(edges, accuracy, found)
