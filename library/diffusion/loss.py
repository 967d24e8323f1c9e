"""How far a prediction is from its target: loss per element, masks, and weights of whole samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import Prediction

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]

# kohya takes SNRs above 1000 for 1000. Here the other end is bounded alike: at an SNR of 0, the end of a schedule with
# zero terminal SNR, debiasing would divide by it. SD's own schedule ends at 0.0047 and never comes near.
LARGEST_SNR, SMALLEST_SNR = 1000.0, 1 / 1000.0

# A mask darker than this all over is one without any area.
SMALLEST_MASK_AREA = 1e-6


_LUNE_GAMMA = 5.0


def _lune_min_snr(sigma: torch.Tensor) -> torch.Tensor:
    """min(snr, 5) / snr / (snr + 1): of noise and of v, each divided by its own; almost 0 where there is little noise."""
    snr = ((1.0 - sigma) / sigma).square()
    return _LUNE_GAMMA / snr.clamp(min=_LUNE_GAMMA) / (snr + 1.0)


FLOW_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigma": lambda sigma: sigma,
    "cosmap": lambda sigma: 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma.square())),
    "eps": lambda sigma: (1.0 - sigma).square(),
    "lune_min_snr": _lune_min_snr,
}
"""Weights of a loss on flow velocities by the flow's sigma. eps: that loss is then the one on noise, |d eps|^2."""


@dataclass(frozen=True)
class PointwiseLoss:
    """Loss of one element, under kohya's names: squared, absolute, or one between the two with a bend at huber_c."""

    loss_type: LossType = "l2"
    """l2, l1, huber (quadratic near 0, then linear), smooth_l1 (huber over huber_c)."""
    huber_schedule: HuberSchedule = "snr"
    """Where the bend lies over the timesteps: constant, exponential or snr (small where there is much noise)."""
    huber_c: float = 0.1
    """Place of the bend; with schedules exponential and snr, its place at the noisy end."""
    huber_scale: float = 1.0
    """Factor on the bend's place, in every schedule (in kohya, schedule snr ignores it)."""

    def __call__(
        self, prediction: torch.Tensor, target: torch.Tensor, parametrisation: Parametrisation, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each element, [B, C, h, w] float32.

        l2: d^2. l1: |d|. huber: 2 c (sqrt(d^2 + c^2) - c). smooth_l1: 2 (sqrt(d^2 + c^2) - c), c from `bend`
        (pseudo-Huber loss; its schedules: arXiv 2403.16728).
        """
        difference = prediction - target
        if self.loss_type == "l2":
            return difference.square()
        if self.loss_type == "l1":
            return difference.abs()
        bend = self.bend(parametrisation, timesteps)
        loss = 2.0 * ((difference.square() + bend.square()).sqrt() - bend)
        return bend * loss if self.loss_type == "huber" else loss

    def bend(self, parametrisation: Parametrisation, timesteps: torch.Tensor) -> torch.Tensor:
        """c of each sample, [B, 1, 1, 1].

        constant: huber_c. exponential: huber_c^(t / T). snr: (1 - huber_c) / (1 + sigma/alpha)^2 + huber_c, written so
        that alpha = 0 gives huber_c. All times huber_scale.
        """
        if self.huber_schedule == "exponential":
            bend = torch.exp(timesteps.view(-1, 1, 1, 1).float() * (math.log(self.huber_c) / parametrisation.timesteps))
        elif self.huber_schedule == "snr":
            alpha, sigma = parametrisation.at(timesteps)
            bend = (1.0 - self.huber_c) * (alpha / (alpha + sigma)).square() + self.huber_c
        else:
            bend = torch.full((timesteps.shape[0], 1, 1, 1), self.huber_c, device=timesteps.device)
        return bend * self.huber_scale


def masked_mean(losses: torch.Tensor, mask: torch.Tensor | None, *, renormalize: bool = False) -> torch.Tensor:
    """Mean over each sample of `losses` [B, C, h, w] weighted by `mask` [B, 1, H, W] in 0..1; [B].

    The mask is averaged down to the size of the latents. renormalize: divide by the mask's area, so that a sample's
    weight does not depend on how much of it counts; kohya divides by the whole area.
    """
    if mask is None:
        return losses.mean(dim=(1, 2, 3))
    mask = F.interpolate(mask.float(), size=losses.shape[-2:], mode="area")
    means = (losses * mask).mean(dim=(1, 2, 3))
    return means / mask.mean(dim=(1, 2, 3)).clamp(min=SMALLEST_MASK_AREA) if renormalize else means


def timestep_weights(
    snr: torch.Tensor,
    compared: Prediction,
    *,
    min_snr_gamma: float | None = None,
    scale_v_pred_loss_like_noise_pred: bool = False,
    v_pred_like_loss: float | None = None,
    debiased_estimation_loss: bool = False,
    flow_loss_weight: str | None = None,
) -> torch.Tensor:
    """Weight of each sample's loss, [B], from its signal-to-noise ratio [B], in kohya's order; finite at an SNR of 0.

    min_snr_gamma: min(snr, gamma) / snr on noise, / (snr + 1) on velocities (arXiv 2303.09556).
    scale_v_pred_loss_like_noise_pred: times s = snr / (snr + 1), which is |d eps|^2 / |d v|^2. v_pred_like_loss w: times
    1 + w / s. debiased_estimation_loss: over sqrt(snr) (arXiv 2310.08442), on velocities over snr + 1. flow_loss_weight: times one
    of FLOW_WEIGHTS.
    """
    weights = torch.ones_like(snr)
    bounded = snr.clamp(SMALLEST_SNR, LARGEST_SNR)
    noise_like = bounded / (bounded + 1.0)
    if min_snr_gamma is not None:
        weights = compared.min_snr_weight(snr, min_snr_gamma)
    if scale_v_pred_loss_like_noise_pred:
        weights = weights * noise_like
    if v_pred_like_loss is not None:
        weights = weights + weights / noise_like * v_pred_like_loss
    if debiased_estimation_loss:
        weights = weights / compared.debiasing(bounded)
    if flow_loss_weight is not None:
        weights = weights * FLOW_WEIGHTS[flow_loss_weight](1.0 / (1.0 + snr.sqrt()))
    return weights
