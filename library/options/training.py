"""How long, how fast and in what batches a run trains, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from library.options.arguments import parse_arguments
from library.options.checks import not_negative, positive, require, share
from library.options.given import OptionalCount
from library.precision import Precision

Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
]

# Names of devices on Windows, whatever ending follows (Microsoft, "Naming Files, Paths, and Namespaces").
RESERVED = frozenset(
    (
        "CON",
        "PRN",
        "AUX",
        "NUL",
        "CONIN$",
        "CONOUT$",
        *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"),
    )
)

# Which schedules read which option.
READ_BY = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}


@dataclass(frozen=True)
class OptimizerOptions:
    optimizer_type: str = "AdamW"
    """AdamW, AdamW8bit, Lion, Prodigy, Adafactor, AdamWScheduleFree, ..., any class of torch.optim, bitsandbytes or
    pytorch_optimizer by its name, or any other by its dotted path."""
    optimizer_args: tuple[str, ...] = ()
    """Arguments of the optimizer as key=value, such as weight_decay=0.01 betas=0.9,0.99."""
    learning_rate: float = 1e-4
    """Peak learning rate of the trained weights. Prodigy and D-Adaptation want 1.0."""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the trained weights."""
    lr_scheduler: Schedule = "cosine"
    """Learning rate after the warm-up, as diffusers and transformers define it."""
    lr_scheduler_type: str = ""
    """Scheduler class to use instead: a name in torch.optim.lr_scheduler, or a dotted path. It warms up only if asked to."""
    lr_scheduler_args: tuple[str, ...] = ()
    """Arguments of the schedule as key=value, such as T_max=1000, or step_rules=1:500,0.1 for piecewise_constant."""
    lr_warmup_steps: float = 0.1
    """Linear warm-up: optimizer steps, or below 1 a share of all steps."""
    lr_decay_steps: float = 0
    """warmup_stable_decay: optimizer steps of the decay at the end, or below 1 a share of all steps."""
    lr_scheduler_num_cycles: int = 1
    """cosine_with_restarts: cycles. cosine_with_min_lr, warmup_stable_decay: half waves."""
    lr_scheduler_power: float = 1.0
    """polynomial: exponent of the decay."""
    lr_scheduler_timescale: OptionalCount = None
    """inverse_sqrt: steps over which the rate falls to 1 / sqrt(2). Default: the warm-up."""
    lr_scheduler_min_lr_ratio: float | None = None
    """cosine_with_min_lr, warmup_stable_decay: share of the peak learning rate that is left at the end."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns that off."""
    align_max_grad_norm: float | None = None
    """The same of the AlignHeads alone, which then have no part in max_grad_norm; 0 turns it off. Default: one norm for all."""
    ema_decay: float = 0.9995
    """Decay of the exponential moving average of the trained weights; 0 turns it off."""

    def __post_init__(self) -> None:
        has_rate = self.learning_rate > 0 or (self.learning_rate == 0 and self._has_other_rates)
        require(has_rate, "learning_rate", f"must be positive, got {self.learning_rate}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, name, f"must be at least 0 and below 1, got {value}.")
        positive("adam_epsilon", self.adam_epsilon)
        not_negative("weight_decay", self.weight_decay)
        not_negative("max_grad_norm", self.max_grad_norm)
        not_negative("align_max_grad_norm", self.align_max_grad_norm)
        self._check_optimizer()
        self._check_schedule()

    @property
    def _has_other_rates(self) -> bool:
        """Whether a part has a rate of its own."""
        return False

    @property
    def optimizer_name(self) -> str:
        return self.optimizer_type or "AdamW"

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        return parse_arguments("optimizer_args", self.optimizer_args)

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        return parse_arguments("lr_scheduler_args", self.lr_scheduler_args)

    @property
    def is_schedule_free(self) -> bool:
        return "schedulefree" in self.optimizer_name.lower()

    @property
    def optimizer_sets_rate(self) -> bool:
        """Adafactor with relative steps, its default, goes by no learning rate and no schedule."""
        return self.optimizer_name.lower() == "adafactor" and bool(self.optimizer_arguments.get("relative_step", True))

    def _check_optimizer(self) -> None:
        given = self.optimizer_arguments
        for name in ("lr", "params"):
            require(name not in given, "optimizer_args", f"gives {name}. The rate is learning_rate.")
        for name, default, argument in (
            ("adam_beta1", 0.9, "betas"),
            ("adam_beta2", 0.999, "betas"),
            ("adam_epsilon", 1e-8, "eps"),
        ):
            if getattr(self, name) != default:
                is_adamw = self.optimizer_name.lower() == "adamw"
                require(is_adamw, name, f"is AdamW's. Give {self.optimizer_type} its {argument} by optimizer_args.")
                require(argument not in given, name, f"and {argument} in optimizer_args say the same thing. Give one.")
        if self.is_schedule_free:
            constant = self.lr_scheduler in ("constant", "constant_with_warmup") and not self.lr_scheduler_type
            require(
                constant and self.ema_decay == 0,
                "optimizer_type",
                f"{self.optimizer_type} needs no schedule and averages the weights itself: it wants lr_scheduler constant "
                "(or constant_with_warmup) and ema_decay 0.",
            )

    def _check_schedule(self) -> None:
        for name in ("lr_warmup_steps", "lr_decay_steps"):
            value = getattr(self, name)
            not_negative(name, value)
            require(
                value < 1 or float(value).is_integer(),
                name,
                f"must be a whole number of steps or a share below 1, got {value}.",
            )
        positive("lr_scheduler_timescale", self.lr_scheduler_timescale)
        share("lr_scheduler_min_lr_ratio", self.lr_scheduler_min_lr_ratio)
        schedule = self.lr_scheduler_type or self.lr_scheduler
        defaults = {field.name: field.default for field in fields(self)}
        for name, readers in READ_BY.items():
            unread = schedule not in readers and getattr(self, name) not in (0, defaults[name])
            require(not unread, name, f"has no effect with the schedule {schedule}; it is for {' and '.join(readers)}.")
            if schedule in readers and name in ("lr_scheduler_num_cycles", "lr_scheduler_power"):
                positive(name, getattr(self, name))
        given = self.scheduler_arguments
        if schedule == "cosine_with_min_lr":
            ratio = self.lr_scheduler_min_lr_ratio is not None or given.keys() & {"min_lr", "min_lr_rate"}
            require(bool(ratio), "lr_scheduler_min_lr_ratio", "is missing, and lr_scheduler is cosine_with_min_lr.")
        if schedule == "warmup_stable_decay":
            require(self.lr_decay_steps > 0, "lr_decay_steps", "is missing, and lr_scheduler is warmup_stable_decay.")
        if schedule == "piecewise_constant":
            require(
                isinstance(given.get("step_rules"), str),
                "lr_scheduler_args",
                "lacks step_rules, and lr_scheduler is piecewise_constant. 1:500,0.1 is the full rate for 500 steps and a "
                "tenth after that.",
            )
        require(
            schedule != "adafactor" or self.optimizer_sets_rate,
            "lr_scheduler",
            f"adafactor is for optimizer_type Adafactor with relative steps; this is {self.optimizer_name}.",
        )


@dataclass(frozen=True)
class TrainingOptions:
    train_batch_size: int = 128
    """Samples per step and process."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make one optimizer step."""
    max_train_epochs: OptionalCount = 40
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
    """What is saved, when, and what is resumed."""

    output_dir: Path = Path("outputs/repa")
    """Folder of everything the run leaves: states, adapters, metrics, the resolved options."""
    output_name: str = "repa"
    """Stem of the adapter files."""
    save_precision: Precision | None = None
    """Number format of the adapter files. Default: float32, as trained."""
    logging_dir: Path | None = None
    """TensorBoard folder. Default: logs in output_dir."""
    log_every_n_steps: int = 10
    """Optimizer steps between status lines and metric rows."""
    validate_every_n_steps: OptionalCount = 3000
    """Optimizer steps between validations; there is always one at the end."""
    save_every_n_steps: OptionalCount = 6000
    """Optimizer steps between saved states; there is always one at the end."""
    save_last_n_states: OptionalCount = None
    """Keep only the newest N states. Default: all."""
    resume: str = "auto"
    """State to continue from: auto (the newest in output_dir, if any), none, or a state's folder."""
    allow_changed_options: bool = False
    """Resume although options that change the outcome differ from those of the state."""
    overwrite: bool = False
    """Begin anew where output_dir has an adapter or states of another run of this name, or of a finished one, and replace them."""

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
        require(
            self.output_name.isprintable(),
            "output_name",
            f"has characters that cannot be seen in a file name, got {self.output_name!r}.",
        )
        require(
            self.output_name.partition(".")[0].rstrip().upper() not in RESERVED,
            "output_name",
            f"{self.output_name} is a device on Windows, where no file can be called so. Choose another name.",
        )

    @property
    def log_dir(self) -> Path:
        return self.logging_dir or self.output_dir / "logs"
