"""Runs a sampler over the levels of any process.

Samplers are written for x = latents + level * noise. Those whose steps are straight lines along a slope (Euler, Heun, LMS) hold as
they stand in a rectified flow's own x = (1 - sigma) * latents + sigma * noise, whose slope is the velocity: they are then what
ComfyUI and diffusers call by these names on flow models. Those that count in log SNR (DPM++, UniPC, ancestral noise) run over the
ratios sigma / (1 - sigma), which are levels of x / (1 - sigma).
"""

from __future__ import annotations

from torch import Tensor

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.inference.sampler_noise import NoiseSource
from library.inference.samplers import Denoiser, Sampler, euler

# A flow begins at a ratio of infinity, where x is noise alone; this one is sigma 0.9999.
_HIGHEST_RATIO = 1e4


def run_sampler(
    sampler: Sampler, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, process: Parametrisation
) -> Tensor:
    """x [B, ...] at the last of the levels, from x at the first one."""
    if sampler.is_straight or not isinstance(process, FlowPath):
        return sampler.function(denoise, x, sigmas, noise)
    if float(sigmas[0]) > 1 - 1 / _HIGHEST_RATIO and sampler.calls_per_step == 1 and len(sigmas) > 2:
        # Over a step of infinite width in log SNR a corrector (UniPC's) is wrong, and Euler's step exact.
        x, sigmas = euler(denoise, x, sigmas[:2], noise), sigmas[1:]
    ratios = (sigmas / (1 - sigmas)).clamp(max=_HIGHEST_RATIO)

    def denoise_ratio(y: Tensor, ratio: float) -> Tensor:
        return denoise(y * (1 / (1 + ratio)), ratio / (1 + ratio))

    y = x * (float(ratios[0]) / float(sigmas[0]))
    return sampler.function(denoise_ratio, y, ratios, noise) * (1 - float(sigmas[-1]))
