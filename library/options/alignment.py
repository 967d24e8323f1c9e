"""What is trained inside the frozen U-Net, and what it is aligned to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.options.checks import not_negative, positive, require, share

Tap = Literal["enc_last", "mid", "dec_first"]


@dataclass(frozen=True)
class AdapterOptions:
    network_dim: int = 8
    """LoRA rank: inner dimension of each adapter. Size and capacity grow linearly."""
    network_alpha: float = 8.0
    """LoRA alpha. Adapters act with the scale network_alpha / network_dim."""
    network_dropout: float = 0.0
    """Share of each adapter's inputs that is dropped while training."""
    lora_scope: Literal["mid", "down_mid", "all"] = "mid"
    """Blocks with LoRA: mid (as documented), down_mid (what the alignment gradient reaches), all."""
    conv_dim: int | None = None
    """Rank of LoRA on the convolutions of these blocks. Default: none there."""
    conv_alpha: float = 1.0
    """LoRA alpha of these convolutions."""
    taps: tuple[Tap, ...] = ("mid",)
    """U-Net features that get an AlignHead: enc_last, mid, dec_first, or several."""
    align_head: Literal["mlp", "linear", "conv3x3"] = "mlp"
    """AlignHead: two 1x1 convolutions with GELU between, one 1x1, or one 3x3 (iREPA)."""

    def __post_init__(self) -> None:
        positive("network_dim", self.network_dim)
        positive("network_alpha", self.network_alpha)
        positive("conv_dim", self.conv_dim)
        positive("conv_alpha", self.conv_alpha)
        require(
            0 <= self.network_dropout < 1,
            "network_dropout",
            f"must be at least 0 and below 1, got {self.network_dropout}.",
        )
        require(len(self.taps) > 0, "taps", "is empty. Use --no_alignment to train without heads.")
        require(len(set(self.taps)) == len(self.taps), "taps", f"names a tap twice: {' '.join(self.taps)}.")


@dataclass(frozen=True)
class AlignmentOptions:
    alignment: bool = True
    """Train with AlignHeads. Without, this is plain LoRA training on class prompts."""
    align_coeff: float = 0.5
    """lambda: weight of the alignment losses beside the diffusion loss."""
    align_schedule: Literal["warmup", "constant", "cutoff"] = "warmup"
    """lambda over the steps: rising over align_warmup_steps, constant, or risen and then 0 from align_cutoff_step on."""
    align_warmup_steps: int = 3000
    """Optimizer steps over which lambda rises from 0 (schedules warmup and cutoff)."""
    align_cutoff_step: int | None = None
    """Optimizer step from which lambda is 0 (schedule cutoff; HASTE, arXiv 2505.16792)."""
    manifold_weight: float = 3.0
    """w: weight of the manifold loss beside the token loss."""
    manifold_mode: Literal["sample", "token", "random"] = "sample"
    """Gram matrices compared: of pooled samples in the global batch, of the tokens in each image, of random tokens."""
    manifold_margin: float = 0.0
    """Differences of similarity up to this cost nothing (VideoREPA's margin, arXiv 2505.23656)."""
    manifold_clip: float | None = None
    """Cap on the manifold loss: above it, value and gradient are scaled down to the cap."""
    manifold_random_tokens: int = 192
    """Tokens drawn from the batch in mode random (192: Manifold Distillation's K)."""

    def __post_init__(self) -> None:
        not_negative("align_coeff", self.align_coeff)
        not_negative("align_warmup_steps", self.align_warmup_steps)
        not_negative("manifold_weight", self.manifold_weight)
        not_negative("manifold_margin", self.manifold_margin)
        positive("manifold_clip", self.manifold_clip)
        require(self.manifold_random_tokens >= 2, "manifold_random_tokens", "must be at least 2.")
        if self.align_schedule == "cutoff":
            require(
                self.align_cutoff_step is not None, "align_cutoff_step", "is missing, and align_schedule is cutoff."
            )
        else:
            require(
                self.align_cutoff_step is None,
                "align_cutoff_step",
                f"has no effect with align_schedule {self.align_schedule}. Use align_schedule cutoff.",
            )
        not_negative("align_cutoff_step", self.align_cutoff_step)


@dataclass(frozen=True)
class ObjectiveOptions:
    v_parameterization: bool = False
    """Compare velocities. An epsilon base is asked for v through the exact v = (eps - sigma * x_t) / alpha."""
    raw_v_target: bool = False
    """Take the base's raw output for v, to the letter of the U-REPA document. On an epsilon base that cannot work well."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting of the diffusion loss (arXiv 2303.09556); 5 is the paper's value."""
    class_dropout: float = 0.1
    """Share of samples whose class prompt is replaced by the empty one, for classifier-free guidance."""

    def __post_init__(self) -> None:
        positive("min_snr_gamma", self.min_snr_gamma)
        share("class_dropout", self.class_dropout)
        require(
            not (self.v_parameterization and self.raw_v_target),
            "raw_v_target",
            "and v_parameterization exclude each other: the one is the document's way, the other the exact one.",
        )
