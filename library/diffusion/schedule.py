"""The noise schedule of a base model, read from its own scheduler config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from library.errors import UserError


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod [T] float32 on the training device, and what the base predicts: epsilon or v_prediction."""

    alphas_cumprod: torch.Tensor
    prediction_type: str

    @staticmethod
    def from_config(config: dict[str, Any], device: torch.device | str = "cpu") -> NoiseSchedule:
        """From a diffusers scheduler_config.json.

        SD1.5's betas are scaled_linear, 0.00085 to 0.012 (Rombach et al. 2022, and the file itself). The sum is
        diffusers' own, so that training and sampling agree to the bit.
        """
        from diffusers import DDPMScheduler

        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"The base's scheduler says prediction_type {prediction_type!r}; this program trains epsilon and v_prediction."
            )
        names = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        scheduler = DDPMScheduler(**{name: config[name] for name in names if name in config})
        return NoiseSchedule(scheduler.alphas_cumprod.to(device=device, dtype=torch.float32), prediction_type)

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule that ends in pure noise: sqrt(alphas_cumprod) shifted to end at 0 and scaled to begin as before.

        Lin et al. 2023 (arXiv 2305.08891), algorithm 1. SNRs, and weights by them, are those of the new schedule.
        """
        alphas = self.alphas_cumprod.double().sqrt()
        first, last = alphas[0], alphas[-1]
        shifted = (alphas - last) * (first / (first - last))
        return replace(self, alphas_cumprod=shifted.square().float())

    @property
    def timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    @cached_property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the latents at the last timestep. Read from the device once."""
        return self.alphas_cumprod[-1].item() == 0

    def require_signal(self) -> None:
        """Raise UserError where the schedule ends in pure noise, out of which no velocity follows from a predicted epsilon."""
        if self.ends_in_noise:
            raise UserError(
                "zero_terminal_snr ends the schedule in pure noise, where a base that predicts epsilon says nothing of the "
                "picture, and its velocity (eps - sigma * x_t) / alpha divides by 0. Leave zero_terminal_snr out, or take the "
                "base's raw output for v."
            )

    def at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha = sqrt(alphas_cumprod) and sigma = sqrt(1 - alphas_cumprod), each [B, 1, 1, 1] float32."""
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha * x_0 + sigma * eps, [B, C, h, w] float32."""
        alpha, sigma = self.at(timesteps)
        return alpha * latents + sigma * noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = alpha * eps - sigma * x_0 (Salimans and Ho 2022, appendix D)."""
        alpha, sigma = self.at(timesteps)
        return alpha * noise - sigma * latents

    def velocity_from_epsilon(
        self, epsilon: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """v = (eps - sigma * x_t) / alpha, exact for any predicted eps. Refused where the schedule ends in pure noise."""
        self.require_signal()
        alpha, sigma = self.at(timesteps)
        return (epsilon - sigma * noisy) / alpha

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod), [B] float32."""
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return alphas_cumprod / (1.0 - alphas_cumprod)
