"""How much alignment counts: by the step of a run, and by the noise of a picture."""

from __future__ import annotations

import math
from typing import Literal

import torch

By = Literal["v", "t", "log_snr"]


def align_coefficient(
    step: int, coeff: float, schedule: str, warmup_steps: int, cutoff_step: int | None, last_step: int | None = None
) -> float:
    """lambda at an optimizer step.

    constant: coeff. All others rise to it linearly over warmup_steps; cutoff is 0 from cutoff_step on; linear and cosine fall to
    0 there, from the end of the warm-up. last_step: the end of the run, where they fall to 0 without a cutoff_step.
    """
    if schedule == "constant":
        return coeff
    end = last_step if cutoff_step is None else cutoff_step
    falls = schedule in ("linear", "cosine")
    if (falls or schedule == "cutoff") and end is not None and step >= end:
        return 0.0
    if step < warmup_steps:
        return coeff * step / warmup_steps
    if not falls or end is None:
        return coeff
    place = (step - warmup_steps) / (end - warmup_steps)
    return coeff * (1.0 - place if schedule == "linear" else (1.0 + math.cos(math.pi * place)) / 2)


def timestep_weights(snr: torch.Tensor, by: By, window: tuple[float, float] | None = None) -> torch.Tensor:
    """How much pictures count by their noise, [B] float32. snr: (alpha / sigma)^2 of each, [B].

    v: min(1, max(1.5 - 2t, 2t - 0.5)) (U-REPA, arXiv 2503.18414, section 4). t, log_snr: 1 within `window`, 0 outside. t is the
    sigma of a rectified flow with this signal-to-noise ratio, so that a picture is as noisy whatever the network predicts.
    """
    value = snr.log() if by == "log_snr" else 1.0 / (1.0 + snr.sqrt())
    if by == "v":
        return torch.maximum(1.5 - 2.0 * value, 2.0 * value - 0.5).clamp(max=1.0)
    assert window is not None
    low, high = window
    return ((value >= low) & (value <= high)).float()
