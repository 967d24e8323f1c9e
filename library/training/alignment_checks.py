"""Whether what heads are to learn can be learned on a base: asked before anything slow."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from library.diffusion.alignment_schedules import timestep_weights
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.models.base_family import native_side
from library.models.encoders import patches_of
from library.models.load import load_scheduler_config, unet_config
from library.models.locate import BaseLocation, dino_status
from library.models.teachers import require_layer, teacher_size
from library.options.alignment import RECIPES
from library.options.checks import OptionError
from library.options.run import RunOptions
from library.training.flow import flow_mode, trained_path
from networks import AdapterError
from networks.families import Family
from networks.taps import tap_channels

_PLACES = 100_000


def check_alignment(options: RunOptions, base: BaseLocation, family: Family) -> list[str]:
    """What to say of the alignment. Raises UserError for what does not fit the base or the teacher."""
    if not options.alignment.alignment:
        return []
    notes = list(_teacher_notes(options))
    _check_taps(options, base, family)
    _check_window(options, base, family)
    if (recipe := options.alignment.align_recipe) is not None:
        notes.append(f"alignment recipe {recipe}: {RECIPES[recipe].source}")
    return notes


def _teacher_notes(options: RunOptions) -> Iterator[str]:
    """What the teachers that are on this machine see, where dino_resolution does not say it of one. Raises UserError where one of
    them gives no such tokens."""
    o, teachers = options.alignment, options.model.dino_model
    for number, name in enumerate(teachers if o.needs_teacher else ()):
        if dino_status(name) is not None:
            continue
        size = teacher_size(name)
        require_layer(o.teacher_layer, size, name)
        resolution = o.resolution(number, size.patch)
        try:
            side = patches_of(size.patch, resolution, o.token_grid)
        except UserError as error:
            raise UserError(f"{error} The teacher is {name}.") from None
        if len(teachers) > 1 or resolution != o.dino_resolution[0]:
            yield f"teacher {name}: {resolution} x {resolution} pixels, {side} x {side} patches of {size.patch}"


def _check_taps(options: RunOptions, base: BaseLocation, family: Family) -> None:
    try:
        tap_channels(unet_config(base, families=(family,)), options.alignment.taps)
    except AdapterError as error:
        raise UserError(str(error)) from None


def _check_window(options: RunOptions, base: BaseLocation, family: Family) -> None:
    """Raise OptionError where no timestep that is trained lies in align_window."""
    o = options.alignment
    if o.align_timesteps == "all" or o.align_window is None:
        return
    scheduler = load_scheduler_config(base)
    path = parametrisation_of(scheduler)
    if (mode := flow_mode(options, scheduler)) is not None:
        path = trained_path(options, scheduler, family, native_side(base), mode)
    elif options.noise.zero_terminal_snr:
        path = path.with_zero_terminal_snr()
    first, end = options.noise.timesteps
    timesteps = path.spread(torch.arange(_PLACES, dtype=torch.float64) / _PLACES)
    timesteps = timesteps[(timesteps >= first) & (timesteps < end)]
    snr = path.snr(timesteps)
    if timestep_weights(snr, o.align_timesteps, o.align_window).any():
        return
    values = snr.log() if o.align_timesteps == "log_snr" else 1 / (1 + snr.sqrt())
    low, high = o.align_window
    raise OptionError(
        "align_window",
        f"{low:g} {high:g} holds no timestep that is trained: their {o.align_timesteps} goes from {values.min():.3g} to "
        f"{values.max():.3g}.",
    )
