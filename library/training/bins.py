"""The bins that a run draws its timesteps from (--timestep_sampling bins)."""

from __future__ import annotations

from pathlib import Path

import torch

from library.diffusion.level_accuracy import LevelAccuracy
from library.diffusion.noise import timesteps_in
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.timestep_bins import TimestepBins
from library.options.run import RunOptions


def make_bins(options: RunOptions, parametrisation: Parametrisation, device: torch.device | str) -> TimestepBins | None:
    """None where timesteps are drawn without them. Nothing is read from the device. Raises UserError as `LevelAccuracy.read`."""
    if options.flow.kind != "bins":
        return None
    chosen, count = options.bins, options.bins.timestep_bins
    settings = {
        "power": chosen.timestep_bin_power,
        "floor": chosen.timestep_bin_floor,
        "jitter": chosen.jitter,
        "corrects": chosen.timestep_bin_correct == "importance",
    }
    if chosen.timestep_bin_file is None:
        return TimestepBins.learning(count, device, **settings)
    probed = LevelAccuracy.read(chosen.timestep_bin_file, chosen.timestep_bin_min_acc)
    middles = (torch.arange(count, device=device) + 0.5) / count
    timesteps = parametrisation.timesteps_at(middles, *timesteps_in(options.noise, parametrisation))
    edges, accuracy = (torch.tensor(values, device=device) for values in (probed.log_snr[1:-1], probed.accuracy))
    each = accuracy[torch.searchsorted(edges, parametrisation.snr(timesteps).log())]
    return TimestepBins.known(1 - each, each >= chosen.timestep_bin_min_acc, **settings)


def describe_bins(options: RunOptions) -> list[str]:
    """What to say of them; nothing where there are none."""
    if options.flow.kind != "bins":
        return []
    chosen = options.bins
    source = "their losses so far" if chosen.timestep_bin_file is None else f"{chosen.timestep_bin_file}"
    corrected = "corrected by importance" if chosen.timestep_bin_correct == "importance" else "not corrected"
    count, floor = chosen.timestep_bins, chosen.timestep_bin_floor
    return [f"timesteps: {count} bins by {source}, floor {floor:g}, losses {corrected}"]


def bin_facts(options: RunOptions) -> dict[str, str]:
    """What an adapter's file says of them; nothing where there were none."""
    if options.flow.kind != "bins":
        return {}
    values = {
        name: Path(value).name if isinstance(value, Path) else value for name, value in vars(options.bins).items()
    }
    return {"ss_timestep_sampling": "bins"} | {f"ss_{name}": str(value) for name, value in values.items()}
