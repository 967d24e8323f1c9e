"""What the network's output is compared with, how, and how much each timestep and each pixel counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.diffusion.loss import PointwiseLoss, masked_mean, timestep_weights
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import EPSILON, FLOW, VELOCITY, Prediction
from library.options.checks import positive, require


@dataclass(frozen=True)
class Objective:
    """The diffusion loss of a run. With the defaults, the mean squared error.

    compares: what the loss compares, by default what the network's output is; another kind is an exact conversion of the
    output: an epsilon compared as a velocity has the loss |eps' - eps|^2 / alphas_cumprod. kohya's v_parameterization is no
    conversion but a parametrisation whose output is VELOCITY whatever the base's files say.

    min_snr_gamma and the four after it: weights by timestep, see `timestep_weights`. masked_loss_renormalize: masked
    samples count as much as others whatever the mask's area; kohya's lose what is masked away.
    """

    parametrisation: Parametrisation
    compares: Prediction | None = None
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False
    flow_loss_weight: str = "none"
    pointwise: PointwiseLoss = PointwiseLoss()
    masked_loss_renormalize: bool = False

    def __post_init__(self) -> None:
        positive("min_snr_gamma", self.min_snr_gamma)
        positive("v_pred_like_loss", self.v_pred_like_loss)
        require(
            self.compared is VELOCITY or not self.scale_v_pred_loss_like_noise_pred,
            "scale_v_pred_loss_like_noise_pred",
            f"weights a loss on velocities, and this run compares {self.compared.noun}. Leave it out, or use v_parameterization.",
        )
        require(
            self.compared is EPSILON or self.v_pred_like_loss is None,
            "v_pred_like_loss",
            f"adds to a loss on noise, and this run compares {self.compared.noun}. Leave it out.",
        )
        require(
            self.compared is FLOW or self.flow_loss_weight == "none",
            "flow_loss_weight",
            f"weights a loss on flow velocities, and this run compares {self.compared.noun}. Leave it out.",
        )
        self.parametrisation.require_conversion(self.compared)

    @property
    def compared(self) -> Prediction:
        return self.parametrisation.output if self.compares is None else self.compares

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.parametrisation.target(latents, noise, timesteps, self.compared)

    def prediction(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The network's output, float32, in the form that the target has."""
        return self.parametrisation.convert(output.float(), noisy, timesteps, self.compared)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Weight of each sample by its timestep, [B]; None where all are 1."""
        options = {
            "min_snr_gamma": self.min_snr_gamma,
            "scale_v_pred_loss_like_noise_pred": self.scale_v_pred_loss_like_noise_pred,
            "v_pred_like_loss": self.v_pred_like_loss,
            "debiased_estimation_loss": self.debiased_estimation_loss,
            "flow_loss_weight": None if self.flow_loss_weight == "none" else self.flow_loss_weight,
        }
        if not any(options.values()):
            return None
        return timestep_weights(self.parametrisation.snr(timesteps), self.compared, **options)  # type: ignore[arg-type]

    def losses(
        self,
        output: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        sample_weights: torch.Tensor | None = None,
        preserved: torch.Tensor | None = None,
        preserve_mask: torch.Tensor | None = None,
        weighted: bool = True,
    ) -> torch.Tensor:
        """Weighted loss of each sample, [B] float32. latents, noise, noisy: [B, C, h, w] float32.

        mask: [B, 1, H, W] in 0..1, how much each pixel counts. sample_weights: [B], as prior_loss_weight is.
        preserved: the frozen network's output [B, C, h, w], the target of the samples with preserve_mask [B] bool (all
        of them where it is absent): diff_output_preservation. weighted: False leaves out the weights by timestep.
        """
        target = self.target(latents, noise, timesteps)
        if preserved is not None:
            kept = self.prediction(preserved.detach(), noisy, timesteps)
            target = kept if preserve_mask is None else torch.where(preserve_mask.view(-1, 1, 1, 1), kept, target)
        prediction = self.prediction(output, noisy, timesteps)
        losses = masked_mean(
            self.pointwise(prediction, target, self.parametrisation, timesteps),
            mask,
            renormalize=self.masked_loss_renormalize,
        )
        if sample_weights is not None:
            losses = losses * sample_weights
        weights = self.weights(timesteps) if weighted else None
        return losses if weights is None else losses * weights
