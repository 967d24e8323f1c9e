"""Samplers by the names people know, as functions of a denoiser and an array of noise levels.

sampler(denoise, x, sigmas, noise) -> x at the last level. denoise(x, sigma) is the model's prediction of the clean latents for
x = latents + sigma * noise; x [B, ...] starts at noise level sigmas[0]; sigmas fall and may end in 0; noise(sigma, next) gives a
standard normal for the step between two levels (`library.inference.sampler_noise`). Formulas: k-diffusion (Katherine Crowson, MIT),
unless a docstring names another source; results agree with k-diffusion's to rounding.

Every coefficient is a float64 number on the host, so that nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.polynomial import polyfromroots
from torch import Tensor

from library.inference.sampler_noise import NoiseSource

Denoiser = Callable[[Tensor, float], Tensor]

_LMS_ORDER = 4
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_UNIPC_ORDER = 3


class SamplerFunction(Protocol):
    def __call__(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """A sampler and its properties."""

    function: SamplerFunction
    noise: str = "none"
    """none, step (StepNoise) or brownian (BrownianNoise)"""
    calls_per_step: int = 1
    """calls of the model in each step but the last"""
    extra_calls: int = 0
    """more calls of the model in the first step"""
    discard_next_to_last: bool = False
    """A1111 leaves out the last level but one"""
    is_straight: bool = False
    """Whether every step goes along a slope (x - latents) / level, in proportion to the difference of levels"""


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """Euler's method; arXiv 2206.00364, algorithm 2 without churn."""
    for sigma, after in _steps(sigmas):
        x = x + (x - denoise(x, sigma)) * ((after - sigma) / sigma)
    return x


def euler_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0) -> Tensor:
    """Euler down to a lower level, and noise up again."""
    for sigma, after in _steps(sigmas):
        down, up = _ancestral(sigma, after, eta)
        x = x + (x - denoise(x, sigma)) * ((down - sigma) / sigma)
        x = _with_noise(x, noise, sigma, after, up)
    return x


def ddim(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 0.0) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12). Divided by sqrt(alphas_cumprod), its step of any eta is Euler's ancestral one.

    Its customary levels ("DDIM" of `library.inference.sigmas`) end above 0: then the result times 1 / sqrt(1 + sigma^2) is what
    diffusers returns.
    """
    return euler_ancestral(denoise, x, sigmas, noise, eta=eta)


def lms(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """Linear multistep of order 4: the slopes' polynomial in sigma, integrated exactly."""
    levels = _levels(sigmas)
    slopes: list[Tensor] = []  # the newest first
    for index, (sigma, after) in enumerate(_steps(sigmas)):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[: _LMS_ORDER - 1]]
        known = [levels[index - back] for back in range(len(slopes))]
        for slope, weight in zip(slopes, _lagrange_integrals(known, sigma, after), strict=True):
            x = x + weight * slope
    return x


def plms(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """Pseudo linear multistep (arXiv 2202.09778, section 3.3): Adams-Bashforth's weights whatever the widths of the steps.

    The first step calls the model twice. On "DDIM" levels this is what diffusers calls PNDM.
    """
    slopes: list[Tensor] = []  # the newest first
    for sigma, after in _steps(sigmas):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[: _LMS_ORDER - 1]]
        slope = sum(weight * old for weight, old in zip(_ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))
        if len(slopes) == 1 and after > 0:
            ahead = x + (after - sigma) * slopes[0]
            slope = (slopes[0] + (ahead - denoise(ahead, after)) / after) / 2
        x = x + (after - sigma) * slope
    return x


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """Heun's method; arXiv 2206.00364, algorithm 1 without churn. The last step, to 0, is Euler's."""
    for sigma, after in _steps(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        if after > 0:
            ahead = x + (after - sigma) * slope
            slope = (slope + (ahead - denoise(ahead, after)) / after) / 2
        x = x + (after - sigma) * slope
    return x


def dpm2(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1) with the midpoint in log sigma."""
    return dpm2_ancestral(denoise, x, sigmas, noise, eta=0.0)


def dpm2_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0) -> Tensor:
    """DPM-Solver-2 down to a lower level, and noise up again."""
    for sigma, after in _steps(sigmas):
        down, up = _ancestral(sigma, after, eta)
        slope = (x - denoise(x, sigma)) / sigma
        if down > 0:
            middle = math.sqrt(sigma * down)
            halfway = x + (middle - sigma) * slope
            slope = (halfway - denoise(halfway, middle)) / middle
        x = x + (down - sigma) * slope
        x = _with_noise(x, noise, sigma, after, up)
    return x


def dpm_solver_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """DPM-Solver of order 2 with several steps, on predicted noise (arXiv 2206.00927); diffusers' "dpmsolver"."""
    last: Tensor | None = None
    h_last = 0.0
    for sigma, after in _steps(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        predicted = slope
        if after > 0:
            h = math.log(sigma / after)
            predicted = slope if last is None else slope + (slope - last) * (h / (2 * h_last))
            last, h_last = slope, h
        x = x + (after - sigma) * predicted
    return x


def dpmpp_2s(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """DPM-Solver++(2S), arXiv 2211.01095, algorithm 1: two levels are one step of order 2, the first of them its midpoint.

    The last step is of order 1. That is diffusers' DPMSolverSinglestepScheduler.
    """
    steps = _steps(sigmas)
    begin, first, begin_sigma = x, x, 0.0
    for index, (sigma, after) in enumerate(steps):
        denoised = denoise(x, sigma)
        if after == 0:
            return denoised
        if index % 2 == 0 or index == len(steps) - 1:
            begin, first, begin_sigma = x, denoised, sigma
            x = (after / sigma) * x - math.expm1(-math.log(sigma / after)) * denoised
        else:
            h = math.log(begin_sigma / after)
            predicted = first + (denoised - first) * (h / (2 * math.log(begin_sigma / sigma)))
            x = (after / begin_sigma) * begin - math.expm1(-h) * predicted
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2."""
    last: Tensor | None = None
    h_last = 0.0
    for sigma, after in _steps(sigmas):
        denoised = denoise(x, sigma)
        if after == 0:
            return denoised
        h = math.log(sigma / after)
        predicted = denoised if last is None else denoised + (denoised - last) * (h / (2 * h_last))
        x = (after / sigma) * x - math.expm1(-h) * predicted
        last, h_last = denoised, h
    return x


def dpmpp_2s_ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0) -> Tensor:
    """DPM-Solver++(2S), arXiv 2211.01095, algorithm 1 with the midpoint, with ancestral noise."""
    for sigma, after in _steps(sigmas):
        denoised = denoise(x, sigma)
        down, up = _ancestral(sigma, after, eta)
        if down == 0:
            x = x + (x - denoised) * ((down - sigma) / sigma)
        else:
            middle = math.sqrt(sigma * down)
            halfway = (middle / sigma) * x - (middle / sigma - 1) * denoised
            x = (down / sigma) * x - (down / sigma - 1) * denoise(halfway, middle)
        x = _with_noise(x, noise, sigma, after, up)
    return x


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0) -> Tensor:
    """DPM-Solver++(2M) for the SDE, in k-diffusion's midpoint form, A1111's default."""
    last: Tensor | None = None
    h_last = 0.0
    for sigma, after in _steps(sigmas):
        denoised = denoise(x, sigma)
        if after == 0:
            return denoised
        h = math.log(sigma / after)
        gain = -math.expm1(-h * (1 + eta))
        predicted = denoised if last is None else denoised + (denoised - last) * (h / (2 * h_last))
        x = math.exp(-h * (1 + eta)) * x + gain * predicted
        x = _with_noise(x, noise, sigma, after, after * math.sqrt(-math.expm1(-2 * h * eta)))
        last, h_last = denoised, h
    return x


def dpmpp_3m_sde(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0) -> Tensor:
    """DPM-Solver++(3M) for the SDE. The third-order term has k-diffusion's sign; that of diffusers 0.42 is a mistake."""
    predictions: list[Tensor] = []
    widths: list[float] = []
    for sigma, after in _steps(sigmas):
        denoised = denoise(x, sigma)
        if after == 0:
            return denoised
        h = math.log(sigma / after)
        decay = h * (1 + eta)
        x_next = math.exp(-decay) * x - math.expm1(-decay) * denoised
        phi_2 = math.expm1(-decay) / decay + 1
        if predictions:
            first = (denoised - predictions[0]) * (h / widths[0])
            slope = first
            if len(predictions) > 1:
                second = (predictions[0] - predictions[1]) * (h / widths[1])
                curve = (first - second) * (h / (widths[0] + widths[1]))
                slope = first + curve * (widths[0] / h)
                x_next = x_next - (phi_2 / decay - 0.5) * curve
            x_next = x_next + phi_2 * slope
        x = _with_noise(x_next, noise, sigma, after, after * math.sqrt(-math.expm1(-2 * h * eta)))
        predictions, widths = [denoised, *predictions[:1]], [h, *widths[:1]]
    return x


def unipc(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, order: int = _UNIPC_ORDER) -> Tensor:
    """UniPC (arXiv 2302.04867, algorithms 5 to 8) of predicted latents, with B(h) = h ("bh1") and lower orders at the end.

    Order 3 and bh1 are A1111's.
    """
    levels = _levels(sigmas)
    last_step = len(levels) - 2
    predictions: list[Tensor] = []  # of the levels passed, the newest first
    before, used = x, 0
    for index, (sigma, after) in enumerate(_steps(sigmas)):
        denoised = denoise(x, sigma)
        if used:
            x = _unipc_step(before, [denoised, *predictions], levels, index - 1, used, corrects=True)
        predictions = [denoised, *predictions[: order - 1]]
        if after == 0:
            return denoised
        used = min(order, len(predictions), last_step - index + 1)
        before, x = x, _unipc_step(x, predictions, levels, index, used, corrects=False)
    return x


def _unipc_step(
    x: Tensor, predictions: Sequence[Tensor], levels: Sequence[float], index: int, order: int, *, corrects: bool
) -> Tensor:
    """From level `index` to the next one. corrects: predictions[0] is that of the next level, known already."""
    ahead = list(predictions[:1]) if corrects else []
    here, *back = predictions[len(ahead) :]
    sigma, after = levels[index], levels[index + 1]
    h = math.log(sigma / after)
    ratios = [math.log(sigma / levels[index - k]) / h for k in range(1, order)]  # negative
    differences = [(old - here) / ratio for old, ratio in zip(back, ratios, strict=False)]
    if corrects:
        ratios, differences = [*ratios, 1.0], [*differences, ahead[0] - here]
    x_next = (after / sigma) * x - math.expm1(-h) * here
    for difference, weight in zip(differences, _unipc_weights(ratios, -h), strict=True):
        x_next = x_next - weight * difference
    return x_next


def _unipc_weights(ratios: Sequence[float], step: float) -> list[float]:
    """Equation 8 of the paper times B = h. For a single earlier value the paper uses 1/2 (its section 3.4)."""
    count = len(ratios)
    if count == 0:
        return []
    if count == 1:
        return [step / 2]
    right, phi, factorial = [], math.expm1(step) / step - 1, 1
    for power in range(1, count + 1):
        right.append(phi * factorial / step)
        factorial *= power + 1
        phi = phi / step - 1 / factorial
    matrix = np.vander(np.array(ratios), count, increasing=True).T
    return [float(value) * step for value in np.linalg.solve(matrix, np.array(right))]


SAMPLERS: dict[str, Sampler] = {
    "Euler": Sampler(euler, is_straight=True),
    "Euler a": Sampler(euler_ancestral, noise="step"),
    "DDIM": Sampler(ddim, is_straight=True),
    "PLMS": Sampler(plms, extra_calls=1),
    "LMS": Sampler(lms, is_straight=True),
    "Heun": Sampler(heun, calls_per_step=2, is_straight=True),
    "DPM2": Sampler(dpm2, calls_per_step=2, discard_next_to_last=True),
    "DPM2 a": Sampler(dpm2_ancestral, noise="step", calls_per_step=2, discard_next_to_last=True),
    "DPM-Solver 2M": Sampler(dpm_solver_2m),
    "DPM++ 2S": Sampler(dpmpp_2s),
    "DPM++ 2M": Sampler(dpmpp_2m),
    "DPM++ 2S a": Sampler(dpmpp_2s_ancestral, noise="step", calls_per_step=2),
    "DPM++ 2M SDE": Sampler(dpmpp_2m_sde, noise="brownian"),
    "DPM++ 3M SDE": Sampler(dpmpp_3m_sde, noise="brownian", discard_next_to_last=True),
    "UniPC": Sampler(unipc),
}


def no_noise(_sigma: float, _after: float) -> Tensor:
    """The noise source of deterministic samplers; calling it is a bug."""
    raise ValueError("this sampler was given no source of noise")


def _levels(sigmas: Tensor) -> list[float]:
    return [float(sigma) for sigma in sigmas.tolist()]


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    levels = _levels(sigmas)
    return list(zip(levels, levels[1:], strict=False))


def _ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """The level to denoise down to, and the deviation of the noise that leads from there up to `after`."""
    up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    return math.sqrt(after**2 - up**2), up


def _with_noise(x: Tensor, noise: NoiseSource, sigma: float, after: float, deviation: float) -> Tensor:
    if deviation == 0:
        return x
    return x + deviation * noise(sigma, after).to(device=x.device, dtype=x.dtype)


def _lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals over [start, end] of the polynomials that are 1 at one node and 0 at the others."""
    found = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        # Measured from the middle, which avoids cancellation.
        centre = (start + end) / 2
        integral = Polynomial(polyfromroots([other - centre for other in others])).integ()
        scale = math.prod(node - other for other in others)
        found.append(float(integral(end - centre) - integral(start - centre)) / scale)
    return found
