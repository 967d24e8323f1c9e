"""What the network's output is compared with, and how much each timestep counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Objective:
    """The diffusion loss of a run.

    kind "base": the base's own prediction type. "v": velocities, to which an epsilon base is converted exactly, so the
    loss is |eps' - eps|^2 / alphas_cumprod. "raw_v": the network's output taken for v whatever the base predicts.
    """

    schedule: NoiseSchedule
    kind: str = "base"
    min_snr_gamma: float | None = None

    @property
    def compares_velocities(self) -> bool:
        return self.kind != "base" or self.schedule.prediction_type == "v_prediction"

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.schedule.velocity(latents, noise, timesteps) if self.compares_velocities else noise

    def prediction(self, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The network's output, float32, in the form that the target has."""
        output = output.float()
        if self.kind == "v" and self.schedule.prediction_type == "epsilon":
            return self.schedule.velocity_from_epsilon(output, noisy, timesteps)
        return output

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Min-SNR weights [B]: min(snr, gamma) / snr for epsilon, / (snr + 1) for v (arXiv 2303.09556)."""
        if self.min_snr_gamma is None:
            return None
        snr = self.schedule.snr(timesteps)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1.0 if self.compares_velocities else snr)

    def losses(
        self,
        output: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted mean squared error of each sample, [B] float32. latents, noise, noisy: [B, C, h, w] float32."""
        difference = self.prediction(output, noisy, timesteps) - self.target(latents, noise, timesteps)
        losses = difference.square().mean(dim=(1, 2, 3))
        weights = self.weights(timesteps)
        return losses if weights is None else losses * weights
