"""All options of train_repa.py: Track A's defaults over the options of every training; prepare_cache.py takes the same ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from library.options.alignment import AlignmentOptions
from library.options.checks import positive, require
from library.options.data import ClassCacheOptions, ClassPictureOptions
from library.options.dialect import Dialect
from library.options.given import OptionalCount
from library.options.kohya import network_args
from library.options.kohya.dataset import DatasetOptions
from library.options.kohya.network import NetworkOptions
from library.options.kohya.network_args import NetworkArgs
from library.options.kohya.objective import NetworkObjectiveOptions
from library.options.kohya.optimizer import OPTIMIZER_KEYS, NetworkOptimizerOptions
from library.options.kohya.training import NetworkModelOptions, NetworkTrainingOptions
from library.options.kohya.values import OptionalSize, StepsOrShare
from library.options.parser import ConfigOptions, parse
from library.options.run import RunOptions
from library.options.teacher import TeacherDrawingOptions
from library.options.toml_file import find_config, read_toml
from library.options.training import OutputOptions, Schedule

REPA = Dialect(
    datasets_beside=True,
    words_of={"network_args": network_args.KEYS - {"conv_dim", "conv_alpha"}, "optimizer_args": OPTIMIZER_KEYS},
)


@dataclass(frozen=True)
class RepaModelOptions(NetworkModelOptions):
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"  # type: ignore[assignment]
    """Number format in which frozen weights are kept and everything but losses and trained weights is computed; no is float32."""


@dataclass(frozen=True)
class RepaDatasetOptions(DatasetOptions):
    resolution: OptionalSize = (512, 512)
    """Side in pixels of the square that class pictures are scaled (short side) and centre-cropped to; of captioned pictures in
    buckets the area."""


@dataclass(frozen=True)
class RepaNetworkOptions(NetworkOptions):
    network_dim: int | None = 8
    """LoRA rank: inner dimension of each adapter. Size and capacity grow linearly."""
    network_alpha: float = 8.0
    """LoRA alpha. Adapters act with the scale network_alpha / network_dim; 0 stands for network_dim."""
    network_train_unet_only: bool = True
    """Adapters on the U-Net alone; --no_network_train_unet_only trains the text encoders too (captioned pictures only)."""
    lora_scope: Literal["mid", "down_mid", "all"] = "mid"
    """Blocks with adapters on their attention: mid (as documented), down_mid (what the alignment gradient reaches), all."""
    conv_dim: OptionalCount = None
    """Rank of adapters on the convolutions of these blocks. Default: none there."""
    conv_alpha: float = 1.0
    """Alpha of these adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("conv_dim", self.conv_dim)
        positive("conv_alpha", self.conv_alpha)
        require(
            self.conv_dim is None or super().args.conv_dim is None,
            "conv_dim",
            "and conv_dim in network_args say the same thing. Give one.",
        )

    @property
    def args(self) -> NetworkArgs:
        args = super().args
        return args if self.conv_dim is None else replace(args, conv_dim=self.conv_dim, conv_alpha=self.conv_alpha)

    @property
    def scope(self) -> Literal["mid", "down_mid", "all"]:
        return self.lora_scope

    @property
    def drawn_by_module(self) -> bool:
        # A seed gives the run that it always gave.
        return True

    @property
    def targets(self) -> Literal["attention", "kohya"]:
        return "attention"


@dataclass(frozen=True)
class RepaObjectiveOptions(NetworkObjectiveOptions):
    raw_v_target: bool = False
    """Take the base's raw output for v, to the letter of the U-REPA document. On an epsilon base that cannot work well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.raw_v_target or (self.objective == "auto" and not self.v_parameterization),
            "raw_v_target",
            "is the document's way, --objective v the exact one, and --v_parameterization for a base that predicts velocities: "
            "give one of them.",
        )


@dataclass(frozen=True)
class RepaOptimizerOptions(NetworkOptimizerOptions):
    optimizer_type: str = "AdamW"
    """AdamW, AdamW8bit, Lion, Prodigy, Adafactor, AdamWScheduleFree, ..., any class of torch.optim, bitsandbytes or
    pytorch_optimizer by its name, or any other by its dotted path."""
    weight_decay: float | None = 0.0
    """Decoupled weight decay of the adapters."""
    lr_scheduler: Schedule = "cosine"
    """Learning rate after the warm-up, as diffusers and transformers define it."""
    lr_warmup_steps: StepsOrShare = 0.1
    """Linear warm-up: optimizer steps, or below 1 a share of all steps."""
    ema_decay: float = 0.9995
    """Decay of the exponential moving average of the trained weights; 0 turns it off."""


@dataclass(frozen=True)
class RepaTrainingOptions(NetworkTrainingOptions):
    train_batch_size: int = 128
    """Samples per step and process. A dataset TOML's batch_size has the last word."""
    max_train_epochs: OptionalCount = 40
    """Passes over the data."""
    max_train_steps: OptionalCount = None
    """Optimizer steps; given, it decides the length instead of max_train_epochs."""

    def __post_init__(self) -> None:
        if self.max_train_steps is not None:
            object.__setattr__(self, "max_train_epochs", None)
        super().__post_init__()


@dataclass(frozen=True)
class TrainRepaOptions(RunOptions):
    """Track A of the U-REPA document, where nothing else is said."""

    config: ConfigOptions = field(default_factory=ConfigOptions)
    model: RepaModelOptions = field(default_factory=RepaModelOptions)
    classes: ClassPictureOptions = field(default_factory=ClassPictureOptions)
    data: RepaDatasetOptions = field(default_factory=RepaDatasetOptions)
    cache: ClassCacheOptions = field(default_factory=ClassCacheOptions)
    network: RepaNetworkOptions = field(default_factory=RepaNetworkOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    objective: RepaObjectiveOptions = field(default_factory=RepaObjectiveOptions)
    optimizer: RepaOptimizerOptions = field(default_factory=RepaOptimizerOptions)
    training: RepaTrainingOptions = field(default_factory=RepaTrainingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    options_beside_datasets: ClassVar[bool] = True
    most_used: ClassVar[tuple[str, ...]] = (
        *("dataset_config", "train_data", "val_data", "class_names", "pretrained_model_name_or_path", "dino_model"),
        *("output_dir", "output_name", "cache_dir", "network_dim", "network_alpha", "lora_scope", "align_coeff"),
        *("train_batch_size", "gradient_accumulation_steps", "max_train_epochs", "learning_rate", "mixed_precision"),
        *("gradient_checkpointing", "dry_run"),
    )

    @property
    def dataset_file(self) -> Path | None:
        """The file of options, where it has [[datasets]] too."""
        if self.config.dataset_config is None:
            return None
        path = find_config(self.config.dataset_config)
        return path if "datasets" in read_toml(path) else None

    @property
    def class_pictures(self) -> ClassPictureOptions | None:
        captioned = self.data.train_data_dir is not None or self.dataset_file is not None
        return None if captioned else self.classes

    def _check_data(self) -> None:
        super()._check_data()
        if self.class_pictures is None:
            _require_defaults(self.classes, "is for class pictures, and the pictures have captions.")
            return
        for group in (self.data, self.captions):
            _require_defaults(group, "is for captioned pictures ([[datasets]], train_data_dir), not for train_data.")
        width, height = self.data.resolution or (0, 0)
        require(
            width == height and width > 0 and width % 64 == 0,
            "resolution",
            f"must be a positive multiple of 64 (VAE 8 x U-Net 8), got {width if width == height else self.data.resolution}.",
        )
        require(
            self.network.network_train_unet_only,
            "network_train_unet_only",
            "cannot be off with class pictures, whose prompts are encoded beforehand.",
        )
        limit = self.classes.max_train_samples
        require(
            limit is None or self.training.train_batch_size <= limit,
            "train_batch_size",
            f"{self.training.train_batch_size} is larger than max_train_samples {limit}.",
        )


@dataclass(frozen=True)
class PrepareCacheOptions(TrainRepaOptions):
    """Those of the training that the caches are for; what is not about pictures and caches is not looked at."""

    drawing: TeacherDrawingOptions = field(default_factory=TeacherDrawingOptions)

    verify: bool = False
    """Re-read every entry: counts, shapes, finiteness, spread; re-encode 8 at random and compare. Of teacher_latents, draw every
    k-th again, 8 in all."""


def parse_repa_options(argv: list[str], *, prog: str, description: str | None) -> TrainRepaOptions:
    """`argv` and the TOML file it names (--dataset_config), as checked options. Raises UserError; see `parse`."""
    return parse(
        TrainRepaOptions,
        argv,
        prog=prog,
        description=description,
        default_config="demo.toml",
        also_known=[PrepareCacheOptions],
        dialect=REPA,
    )


def _require_defaults(group: object, message: str) -> None:
    for option in dataclasses.fields(group):  # type: ignore[arg-type]
        if option.name != "resolution":
            require(getattr(group, option.name) == option.default, option.name, message)
