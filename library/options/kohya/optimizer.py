"""Optimizer, learning rates and their course, with kohya's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.checks import not_negative, positive, require
from library.options.kohya.values import StepsOrShare
from library.options.training import OptimizerOptions, Schedule

# Schedules that begin at the full rate whatever lr_warmup_steps says.
_WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor")

OPTIMIZER_KEYS = frozenset(
    """
    betas eps amsgrad momentum nesterov d0 d_coef growth_rate decouple use_bias_correction safeguard_warmup relative_step
    scale_parameter warmup_init
    """.split()  # noqa: SIM905
)
"""Arguments of optimizers that people write as options of their own."""


@dataclass(frozen=True)
class NetworkOptimizerOptions(OptimizerOptions):
    """Optimizer, learning rates and their course."""

    optimizer_type: str = ""
    """AdamW (the default), AdamW8bit, Lion, Prodigy, Adafactor, AdamWScheduleFree, ..., any class of torch.optim,
    bitsandbytes or pytorch_optimizer by its name, or any other by its dotted path."""
    learning_rate: float = 1e-4
    """Peak learning rate where unet_lr and text_encoder_lr say nothing; 0 beside one of them trains that one alone. Prodigy and
    D-Adaptation want 1.0."""
    unet_lr: float | None = None
    """Peak learning rate of adapters on the U-Net; 0 trains none there. Default: learning_rate."""
    text_encoder_lr: tuple[float, ...] = ()
    """The same for the text encoders, on SDXL one for both or one for each; 0 trains none there. Default: learning_rate."""
    train_parts_lr: float | None = None
    """Peak learning rate of train_parts. Default: that of the adapters on the U-Net."""
    align_learning_rate: float | None = None
    """Peak learning rate of the AlignHeads. Default: learning_rate."""
    weight_decay: float | None = None  # type: ignore[assignment]
    """Decoupled weight decay of the adapters. Default: as optimizer_args says, else the optimizer's own (AdamW: 0.01)."""
    align_weight_decay: float = 0.01
    """Decoupled weight decay of the AlignHeads."""
    lr_scheduler: Schedule = "constant"
    """Learning rate after the warm-up, as diffusers and transformers define it."""
    lr_warmup_steps: StepsOrShare = 0
    """Linear warm-up: optimizer steps, or below 1 a share of all steps, or such as 10%."""
    lr_decay_steps: StepsOrShare = 0
    """warmup_stable_decay: optimizer steps of the decay at the end, or a share as above."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the trained weights, such as 0.999; 0 turns it off."""

    def __post_init__(self) -> None:
        not_negative("unet_lr", self.unet_lr)
        positive("train_parts_lr", self.train_parts_lr)
        positive("align_learning_rate", self.align_learning_rate)
        not_negative("align_weight_decay", self.align_weight_decay)
        for rate in self.text_encoder_lr:
            not_negative("text_encoder_lr", rate)
        require(
            len(self.text_encoder_lr) <= 2,
            "text_encoder_lr",
            f"has {len(self.text_encoder_lr)} values; SD1.5 has one text encoder and SDXL two.",
        )
        super().__post_init__()
        require(
            self.weight_decay is None or "weight_decay" not in self.optimizer_arguments,
            "weight_decay",
            "and weight_decay in optimizer_args say the same thing. Give one.",
        )
        schedule = self.lr_scheduler_type or self.lr_scheduler
        warms_up = not self.lr_scheduler_type and schedule not in _WITHOUT_WARMUP
        instead = " Use constant_with_warmup." if schedule == "constant" else ""
        require(
            warms_up or self.lr_warmup_steps in (0, type(self).lr_warmup_steps),
            "lr_warmup_steps",
            f"has no effect with the schedule {schedule}.{instead}",
        )

    @property
    def _has_other_rates(self) -> bool:
        return bool(self.unet_lr) or any(self.text_encoder_lr)

    @property
    def unet_rate(self) -> float:
        """Peak learning rate of adapters on the U-Net."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    @property
    def trains_text_encoders(self) -> bool:
        """Whether any rate is above 0; network_train_unet_only is not asked here."""
        return any(rate > 0 for rate in self.text_encoder_lr or (self.learning_rate,))

    def text_encoder_rates(self, count: int) -> tuple[float, ...]:
        """Peak learning rate of each of `count` text encoders. Raises OptionError where more rates are given."""
        rates = self.text_encoder_lr or (self.learning_rate,)
        require(
            len(rates) <= count,
            "text_encoder_lr",
            f"has {len(rates)} values, and the base has {count} text encoder{'s' if count > 1 else ''}.",
        )
        return rates if len(rates) == count else rates * count
