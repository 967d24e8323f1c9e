"""How long, how fast and in what batches a run trains, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import not_negative, positive, require


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = 1e-4
    """Peak learning rate of the LoRA weights."""
    align_learning_rate: float | None = None
    """Peak learning rate of the AlignHeads. Default: learning_rate."""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay of the LoRA weights."""
    align_weight_decay: float = 0.01
    """AdamW: decoupled weight decay of the AlignHeads."""
    lr_scheduler: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"
    ] = "cosine"
    """Learning rate after the warm-up, as diffusers defines it."""
    lr_warmup_steps: float = 0.1
    """Linear warm-up: optimizer steps, or below 1 a share of all steps."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns that off."""
    ema_decay: float = 0.9995
    """Decay of the exponential moving average of the trained weights; 0 turns it off."""

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        positive("align_learning_rate", self.align_learning_rate)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, name, f"must be at least 0 and below 1, got {value}.")
        positive("adam_epsilon", self.adam_epsilon)
        not_negative("weight_decay", self.weight_decay)
        not_negative("align_weight_decay", self.align_weight_decay)
        not_negative("lr_warmup_steps", self.lr_warmup_steps)
        not_negative("max_grad_norm", self.max_grad_norm)
        require(
            self.lr_warmup_steps < 1 or float(self.lr_warmup_steps).is_integer(),
            "lr_warmup_steps",
            f"must be a whole number of steps or a share below 1, got {self.lr_warmup_steps}.",
        )


@dataclass(frozen=True)
class TrainingOptions:
    train_batch_size: int = 128
    """Samples per step and process."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make one optimizer step."""
    max_train_epochs: int | None = 40
    """Passes over the data."""
    max_train_steps: int | None = None
    """Optimizer steps; given, it decides the length instead of max_train_epochs."""
    seed: int = 42
    """Root of all randomness: order of samples, noise, timesteps, dropout, initial weights."""

    def __post_init__(self) -> None:
        positive("train_batch_size", self.train_batch_size)
        positive("gradient_accumulation_steps", self.gradient_accumulation_steps)
        positive("max_train_epochs", self.max_train_epochs)
        positive("max_train_steps", self.max_train_steps)
        require(
            self.max_train_epochs is not None or self.max_train_steps is not None,
            "max_train_epochs",
            "and max_train_steps are both absent; one of them has to say how long to train.",
        )
        require(0 <= self.seed < 2**63, "seed", f"must be a whole number from 0 to 2^63 - 1, got {self.seed}.")


@dataclass(frozen=True)
class OutputOptions:
    output_dir: Path = Path("outputs/repa")
    """Folder of everything the run leaves: states, adapters, metrics, the resolved options."""
    output_name: str = "repa"
    """Stem of the adapter files."""
    logging_dir: Path | None = None
    """TensorBoard folder. Default: logs in output_dir."""
    log_every_n_steps: int = 10
    """Optimizer steps between status lines and metric rows."""
    validate_every_n_steps: int | None = 3000
    """Optimizer steps between validations; there is always one at the end."""
    save_every_n_steps: int | None = 6000
    """Optimizer steps between saved states; there is always one at the end."""
    save_last_n_states: int | None = None
    """Keep only the newest N states. Default: all."""
    resume: str = "auto"
    """State to continue from: auto (the newest in output_dir, if any), none, or a state's folder."""
    allow_changed_options: bool = False
    """Resume although options that change the outcome differ from those of the state."""

    def __post_init__(self) -> None:
        for name in ("log_every_n_steps", "validate_every_n_steps", "save_every_n_steps", "save_last_n_states"):
            positive(name, getattr(self, name))
        require(
            bool(self.output_name)
            and not any(c in self.output_name for c in '/\\:*?"<>|')
            and self.output_name not in (".", ".."),
            "output_name",
            f"is a file name without its ending and must have no path separators, got {self.output_name!r}.",
        )

    @property
    def log_dir(self) -> Path:
        return self.logging_dir or self.output_dir / "logs"
