"""Noise levels drawn by how hard they are (--timestep_sampling bins): how many bins, what is known of each, how far it counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import finite, not_negative, require, share


@dataclass(frozen=True)
class TimestepBinOptions:
    """Noise levels drawn by how hard they are (timestep_sampling bins); of any base."""

    timestep_bins: int = 100
    """How many bins, of equal probability in what would be drawn without them."""
    timestep_bin_source: Literal["loss", "probe"] = "loss"
    """What a bin's difficulty is: loss, the average of the losses met so far; probe, 1 - accuracy in timestep_bin_file."""
    timestep_bin_file: Path | None = None
    """Of source probe: timestep_bins.json, which evaluate.py --block_probe writes."""
    timestep_bin_power: float = 1.0
    """Bins are drawn in proportion to difficulty to this power; 0: all alike."""
    timestep_bin_floor: float = 0.2
    """Share of the draws that all bins have alike, above 0; corrections of the loss are at most 1 / floor."""
    timestep_bin_min_acc: float = 0.0
    """Of source probe: bins of a lower accuracy get the floor's share alone."""
    timestep_bin_jitter: float | None = None
    """Half of a bin's width, in thousandths of all that is drawn; up to twice that for hard ones. Default: half a bin, 5 of 100."""
    timestep_bin_correct: Literal["importance", "none"] = "importance"
    """importance: losses are divided by how much more often their bin is drawn, so that their mean stays the same. none: what is
    drawn more often counts more."""

    def __post_init__(self) -> None:
        require(
            2 <= self.timestep_bins <= 1000, "timestep_bins", f"must lie between 2 and 1000, got {self.timestep_bins}."
        )
        for name in ("timestep_bin_power", "timestep_bin_jitter"):
            finite(name, getattr(self, name) or 0.0)
            not_negative(name, getattr(self, name))
        floor = self.timestep_bin_floor
        require(
            0 < floor <= 1,
            "timestep_bin_floor",
            f"must be above 0 and at most 1, got {floor}: a bin that is never drawn is never measured again.",
        )
        share("timestep_bin_min_acc", self.timestep_bin_min_acc)
        file, probed = self.timestep_bin_file, self.timestep_bin_source == "probe"
        for name in ("timestep_bin_file", "timestep_bin_min_acc"):
            require(
                probed or not getattr(self, name),
                name,
                "belongs to timestep_bin_source probe; source loss learns what is hard while training.",
            )
        require(
            not probed or file is not None,
            "timestep_bin_file",
            "is missing: timestep_bin_source probe reads the file that evaluate.py --block_probe writes.",
        )
        require(file is None or file.is_file(), "timestep_bin_file", f"{file} does not exist.")

    @property
    def jitter(self) -> float:
        return 500 / self.timestep_bins if self.timestep_bin_jitter is None else self.timestep_bin_jitter

    @property
    def given(self) -> list[str]:
        """The options that differ from their defaults."""
        return [one.name for one in dataclasses.fields(self) if getattr(self, one.name) != one.default]
