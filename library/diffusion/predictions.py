"""What a network's output says of its noisy input x = alpha * latents + sigma * noise.

Of each kind: the target, the way to noise and back, clean latents for a sampler, and weights by signal-to-noise ratio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from networks.prediction_names import EPSILON_NAME, FLOW_NAME, VELOCITY_NAME, PredictionName


class Prediction(ABC):
    """One kind of output. latents, noise, noisy, output: [B, C, h, w] float32; alpha, sigma: of the timesteps, [B, 1, 1, 1].

    Any kind becomes any other by way of the noise.
    """

    name: ClassVar[PredictionName]
    noun: ClassVar[str]
    """What a run that compares this kind compares, for messages."""
    needs_signal: ClassVar[bool] = True
    """Whether `of_noise` divides by alpha."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect network says."""

    @abstractmethod
    def noise(self, output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise that an output means."""

    @abstractmethod
    def of_noise(self, noise: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output that means this noise: the inverse of `noise`."""

    @abstractmethod
    def clean(self, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The clean latents that an output means, for a sampler: x = latents + sigma * noise, and the network saw alpha * x."""

    @abstractmethod
    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        """min(snr, gamma) times |d latents|^2 / |d output|^2: the loss is then one on clean latents, of bounded weight.

        [B] from [B]; arXiv 2303.09556, section 3.4. Finite at an SNR of 0.
        """

    @abstractmethod
    def debiasing(self, snr: Tensor) -> Tensor:
        """What kohya's debiased estimation loss (arXiv 2310.08442) divides by, [B] from [B]."""


class Epsilon(Prediction):
    """The noise itself (Ho et al. 2020, equation 14)."""

    name, noun, needs_signal = EPSILON_NAME, "noise", False

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def noise(self, output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def of_noise(self, noise: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def clean(self, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return x - sigma * output

    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        # min(snr, gamma) / snr, also at 0.
        return gamma / snr.clamp(min=gamma)

    def debiasing(self, snr: Tensor) -> Tensor:
        return snr.sqrt()


class Velocity(Prediction):
    """v = alpha * noise - sigma * latents, where alpha^2 + sigma^2 = 1 (Salimans and Ho 2022, appendix D)."""

    name, noun = VELOCITY_NAME, "velocities"

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * latents

    def noise(self, output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * output + sigma * noisy

    def of_noise(self, noise: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (noise - sigma * noisy) / alpha

    def clean(self, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return x * alpha**2 - (sigma * alpha) * output

    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        return snr.clamp(max=gamma) / (snr + 1.0)

    def debiasing(self, snr: Tensor) -> Tensor:
        return snr + 1.0


class FlowVelocity(Prediction):
    """u = noise - latents, the direction of rectified flow (Liu et al. 2022; Esser et al. 2024), of any alpha and sigma.

    Where alpha + sigma = 1, u is the derivative of x by sigma, as ComfyUI, kohya and diffusers have its sign. Of a network that
    predicts epsilon or v on SD's own schedule it follows as exactly: u = ((alpha + sigma) eps - x) / alpha, which is
    (alpha + sigma) v + (sigma - alpha) x. The flow's own sigma is sigma / (alpha + sigma), which is 1 / (1 + sqrt(snr)).
    """

    name, noun = FLOW_NAME, "flow velocities"

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - latents

    def noise(self, output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (noisy + alpha * output) / (alpha + sigma)

    def of_noise(self, noise: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return ((alpha + sigma) * noise - noisy) / alpha

    def clean(self, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x - sigma * output) * (1 / (1 + sigma))

    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        return snr.clamp(max=gamma) / (1.0 + snr.sqrt()).square()

    def debiasing(self, snr: Tensor) -> Tensor:
        """What makes it the loss on noise over sqrt(snr)."""
        return (1.0 + snr.sqrt()).square() / snr.sqrt()


EPSILON, VELOCITY, FLOW = Epsilon(), Velocity(), FlowVelocity()
