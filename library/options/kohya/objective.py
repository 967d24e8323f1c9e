"""Noise, loss and what the loss is weighted with. Nothing of them needs torch; library/diffusion computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.options.checks import not_negative, positive, require
from library.options.given import OptionalAmount, OptionalCount

# Of DDPM, in SD1.5 and SDXL.
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseOptions:
    """Departures from plain Gaussian noise at any timestep, which is what the defaults are."""

    min_timestep: int | None = None
    """First timestep that is drawn, 0 to 999. Default: 0."""
    max_timestep: int | None = None
    """Timesteps are drawn below this, 1 to 1000. Default: 1000."""
    noise_offset: OptionalAmount = None
    """Strength of noise that is the same all over a channel, so that very dark and light pictures are learnt; 0.05 is usual."""
    noise_offset_random_strength: bool = False
    """Draw the strength between 0 and noise_offset for each batch."""
    adaptive_noise_scale: OptionalAmount = None
    """Add this times the mean brightness of each latent channel to noise_offset."""
    multires_noise_iterations: OptionalCount = None
    """Pyramid noise: so many coarser layers are added; 6 to 10 are usual."""
    multires_noise_discount: float = 0.3
    """Pyramid noise: each coarser layer counts this times the one before."""
    ip_noise_gamma: OptionalAmount = None
    """Input perturbation (arXiv 2301.11706): the input gets this much more noise than the target knows; 0.1 is the paper's."""
    ip_noise_gamma_random_strength: bool = False
    """Draw this amount between 0 and ip_noise_gamma for each batch."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last step is pure noise (arXiv 2305.08891). For velocity models."""

    def __post_init__(self) -> None:
        first, end = self.timesteps
        require(
            0 <= first < TRAIN_TIMESTEPS,
            "min_timestep",
            f"must lie between 0 and {TRAIN_TIMESTEPS - 1}, got {self.min_timestep}.",
        )
        require(
            0 < end <= TRAIN_TIMESTEPS,
            "max_timestep",
            f"must lie between 1 and {TRAIN_TIMESTEPS}, got {self.max_timestep}.",
        )
        require(first < end, "min_timestep", f"{first} is not below max_timestep {end}; no timestep is left.")
        not_negative("noise_offset", self.noise_offset)
        positive("multires_noise_iterations", self.multires_noise_iterations)
        not_negative("multires_noise_discount", self.multires_noise_discount)
        not_negative("ip_noise_gamma", self.ip_noise_gamma)
        for name, needed in (
            ("noise_offset_random_strength", "noise_offset"),
            ("adaptive_noise_scale", "noise_offset"),
            ("ip_noise_gamma_random_strength", "ip_noise_gamma"),
        ):
            given = getattr(self, name) not in (None, False)
            require(not given or getattr(self, needed) is not None, name, f"has no effect without {needed}.")
        require(
            self.multires_noise_discount in (0, 0.3) or self.multires_noise_iterations is not None,
            "multires_noise_discount",
            "has no effect without multires_noise_iterations.",
        )

    @property
    def timesteps(self) -> tuple[int, int]:
        """First timestep, and the one after the last."""
        first = 0 if self.min_timestep is None else self.min_timestep
        return first, TRAIN_TIMESTEPS if self.max_timestep is None else self.max_timestep


@dataclass(frozen=True)
class NetworkObjectiveOptions:
    """The loss, and how it is weighted."""

    v_parameterization: bool = False
    """The base predicts velocities. Not needed where the base's own scheduler configuration says so."""
    objective: Literal["auto", "epsilon", "v"] = "auto"
    """What the loss compares: what the base predicts, or noise or velocities, to which its output is converted exactly."""
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    """Diffusion loss: absolute, squared, or squared near zero and absolute beyond (huber, smooth_l1)."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the width of huber and smooth_l1 depends on the timestep."""
    huber_c: float = 0.1
    """Width at the noisy end (exponential, snr) or everywhere (constant) beyond which a difference counts linearly."""
    huber_scale: float = 1.0
    """Factor of this width."""
    min_snr_gamma: OptionalAmount = None
    """Min-SNR weighting of the diffusion loss (arXiv 2303.09556); 5 is the paper's value."""
    debiased_estimation_loss: bool = False
    """Weight with 1 / sqrt(SNR), for velocities 1 / (SNR + 1) (arXiv 2310.08442)."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weight a velocity loss with SNR / (SNR + 1), as if noise were predicted."""
    v_pred_like_loss: OptionalAmount = None
    """Add this times the loss that a velocity model would have, to a noise model's."""
    prior_loss_weight: float = 1.0
    """Weight of the loss of regularisation pictures."""
    masked_loss: bool = False
    """Weight the loss with masks, from conditioning_data_dir or the transparency of the pictures (alpha_mask)."""
    masked_loss_renormalize: bool = False
    """Divide a masked loss by the mean of its mask, so that small masks do not learn more slowly."""

    def __post_init__(self) -> None:
        positive("min_snr_gamma", self.min_snr_gamma)
        positive("huber_c", self.huber_c)
        positive("huber_scale", self.huber_scale)
        not_negative("prior_loss_weight", self.prior_loss_weight)
        positive("v_pred_like_loss", self.v_pred_like_loss)
        if self.loss_type not in ("huber", "smooth_l1"):
            for name, default in (("huber_schedule", "snr"), ("huber_c", 0.1), ("huber_scale", 1.0)):
                require(
                    getattr(self, name) == default, name, f"has no effect with loss_type {self.loss_type}. Use huber."
                )
        require(
            self.huber_schedule != "exponential" or self.huber_c <= 1,
            "huber_c",
            f"must be at most 1 with huber_schedule exponential, got {self.huber_c}.",
        )
        require(
            self.v_parameterization or self.objective == "v" or not self.scale_v_pred_loss_like_noise_pred,
            "scale_v_pred_loss_like_noise_pred",
            "is for losses on velocities. Give --v_parameterization too, if the base predicts them, or --objective v.",
        )
        require(
            not (self.v_parameterization and self.objective == "auto" and self.v_pred_like_loss),
            "v_pred_like_loss",
            "is for noise models, and v_parameterization says that the base predicts velocities.",
        )
