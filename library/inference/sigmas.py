"""The noise levels (sigmas) of a picture's steps, highest first.

Levels are those of `library.diffusion.noise_levels`; names are A1111's. Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.diffusion.noise_levels import FlowLevels, Levels, NoiseLevels
from library.errors import UserError
from library.inference.sampler_names import require_schedule_along_flow, schedule_named
from networks.families import Family

_RHO = 7.0  # Karras et al. 2022, table 1
_ALL = 0.999  # A1111's largest denoising strength

# Align Your Steps (arXiv 2404.14507) as reForge has them: 11 levels from NVIDIA's how-to, and 32.
_AYS: dict[int, dict[str, tuple[float, ...]]] = {
    11: {
        "sd15": (
            14.61464123, 6.475250877, 3.861199796, 2.69742363, 1.886003514, 1.395992094, 0.9630100968,
            0.6520027316, 0.398990997, 0.1519967679, 0.029,
        ),
        "sdxl": (
            14.61464123, 6.315748154, 3.771520317, 2.180964219, 1.342023988, 0.8620172956, 0.554993401,
            0.3799958718, 0.2339952484, 0.1129974735, 0.029,
        ),
    },
    32: {
        "sd15": (
            14.61464123, 11.23923761, 8.643418625, 6.647131061, 5.572371825, 4.716369679, 3.991862655, 3.519474501,
            3.134827704, 2.792219335, 2.487675211, 2.216584236, 1.975035025, 1.779273521, 1.614713711, 1.465373557,
            1.314816723, 1.166396336, 1.034730069, 0.9157149604, 0.8074618678, 0.7120061312, 0.6217237375,
            0.5306389935, 0.4528984819, 0.3749053466, 0.2746114486, 0.2011479621, 0.1410552673, 0.06682716948,
            0.03166043278, 0.015,
        ),
        "sdxl": (
            14.61464123, 11.14888811, 8.505012483, 6.488112235, 5.43694055, 4.603873171, 3.898451338, 3.273994198,
            2.743897911, 2.299630137, 1.954437161, 1.671046128, 1.428746446, 1.231779851, 1.067870275,
            0.9257717035, 0.8028891501, 0.6965841098, 0.6043541939, 0.5285125457, 0.467721958, 0.4139236287,
            0.3625729593, 0.310077558, 0.2651827401, 0.2232591293, 0.1765344363, 0.1395884933, 0.105871211,
            0.0551923351, 0.02877263367, 0.015,
        ),
    },
}  # fmt: skip


def noise_levels(
    name: str,
    steps: int,
    levels: Levels,
    family: Family,
    *,
    discard_next_to_last: bool = False,
) -> Tensor:
    """[steps + 1] float64, falling to 0 ("DDIM": to the lowest level of the training).

    discard_next_to_last: of one more level, the last but one is left out, as A1111 does for some samplers. Raises UserError for a
    name that is not in SCHEDULES, and for schedules that a rectified flow does not have.
    """
    make = SCHEDULES[schedule_named(name)]
    if isinstance(levels, FlowLevels):
        require_schedule_along_flow(schedule_named(name))
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    if not discard_next_to_last:
        return make(steps, levels, family)
    found = make(steps + 1, levels, family)
    return torch.cat([found[:-2], found[-1:]])


def part_of(sigmas: Tensor, strength: float) -> Tensor:
    """The last levels, over which img2img runs: int(strength * steps) + 1 steps, as in A1111.

    At strength 1 these are all levels. The picture is noised to the first of these levels.
    """
    if not 0 < strength <= 1:
        raise UserError(f"denoising strength must be above 0 and at most 1, got {strength}.")
    steps = len(sigmas) - 1
    encoded = int(min(strength, _ALL) * steps)
    return sigmas[steps - encoded - 1 :]


def last_steps(
    name: str, steps: int, strength: float, levels: Levels, family: Family, *, discard_next_to_last: bool = False
) -> Tensor:
    """[steps + 1] levels of the hires fix: the end of a schedule of int(steps / strength) steps, as in A1111.

    The picture is noised to the first of these levels; at strength 1 that is nearly the highest.
    """
    if not 0 < strength <= 1:
        raise UserError(f"denoising strength must be above 0 and at most 1, got {strength}.")
    whole = int(steps / min(strength, _ALL))
    return noise_levels(name, whole, levels, family, discard_next_to_last=discard_next_to_last)[-(steps + 1) :]


def _normal(steps: int, levels: Levels, _: Family) -> Tensor:
    """Equally spaced timesteps; along a rectified flow shifted."""
    return torch.tensor(levels.spaced(steps), dtype=torch.float64)


def _karras(steps: int, levels: NoiseLevels, _: Family) -> Tensor:
    """arXiv 2206.00364, equation 5."""
    low, high = levels.low ** (1 / _RHO), levels.high ** (1 / _RHO)
    return _with_zero([(high + way * (low - high)) ** _RHO for way in np.linspace(0, 1, steps)])


def _exponential(steps: int, levels: NoiseLevels, _: Family) -> Tensor:
    return _with_zero(np.exp(np.linspace(math.log(levels.high), math.log(levels.low), steps)))


def _align_your_steps(table: int) -> Callable[[int, NoiseLevels, Family], Tensor]:
    """As A1111 and reForge: `steps` levels, interpolated in log sigma unless the table has as many, then 0.

    ComfyUI takes steps + 1 levels and replaces the last by 0, so that its 10 steps are the table of 11. The tables are the paper's
    for SD1.5 and SDXL; bases with another noise schedule use them too.
    """

    def levels_of(steps: int, _: NoiseLevels, family: Family) -> Tensor:
        known = _AYS[table][family.key]
        if steps == len(known):
            return _with_zero(known)
        ways = np.linspace(0, 1, steps)
        return _with_zero(np.exp(np.interp(ways, np.linspace(0, 1, len(known)), np.log(known))))

    return levels_of


def _ddim(steps: int, levels: NoiseLevels, _: Family) -> Tensor:
    """Timesteps 1 + k * (T // steps), then 0: "leading" spacing with an offset of 1 (DDIM, CompVis' code)."""
    stride = len(levels.sigmas) // steps
    if stride < 1:
        raise UserError(f"DDIM's schedule has at most {len(levels.sigmas)} steps, got {steps}.")
    last = len(levels.sigmas) - 1
    timesteps = [min(1 + stride * k, last) for k in reversed(range(steps))]
    return torch.cat([levels.sigmas[timesteps], levels.sigmas[:1]])


def _with_zero(sigmas: np.ndarray | list[float] | tuple[float, ...]) -> Tensor:
    return torch.cat([torch.tensor(np.asarray(sigmas), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


SCHEDULES: dict[str, Callable[[int, Any, Family], Tensor]] = {
    "Normal": _normal,
    "Karras": _karras,
    "Exponential": _exponential,
    "Align Your Steps 11": _align_your_steps(11),
    "Align Your Steps 32": _align_your_steps(32),
    "DDIM": _ddim,
}
