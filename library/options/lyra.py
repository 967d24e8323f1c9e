"""All options of train_lyra.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from library.options.checks import not_negative, positive, require, share
from library.options.dialect import Dialect
from library.options.given import Needed, OptionalCount
from library.options.parser import ConfigOptions, parse
from library.options.toml_file import find_config, read_toml
from library.options.training import OptimizerOptions, OutputOptions, Schedule, TrainingOptions

DEMO_CAPTIONS = "demo"


@dataclass(frozen=True)
class LyraEncoderOptions:
    """The text encoders that are fused."""

    pretrained_model_name_or_path: Needed = "tiny-shapes"
    """Base whose text encoders are fused, SD1.5 or SDXL: a hub id, a diffusers folder, one .safetensors file, or tiny-shapes."""
    encoders: tuple[str, ...] = ("tiny-t5",)
    """Encoders to fuse with them, any number: folders or hub ids of a T5 (google-t5/t5-base) or a CLIP, or tiny-t5."""
    clip_skip: OptionalCount = None
    """Layer of SD1.5's text encoder, from its end: 1 is the last (default), 2 is for many anime models. SDXL's is fixed."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Number format in which the encoders compute; no is float32."""
    device: str | None = None
    """Device to compute on, as torch names it (cuda, cuda:1, cpu). Default: what accelerate finds."""

    def __post_init__(self) -> None:
        require(bool(self.pretrained_model_name_or_path), "pretrained_model_name_or_path", "is empty.")
        require(bool(self.encoders), "encoders", "is empty: one encoder beside the base's own is needed at least.")
        twice = [name for name in self.encoders if self.encoders.count(name) > 1]
        require(not twice, "encoders", f"names {twice[0] if twice else ''} twice.")
        positive("clip_skip", self.clip_skip)


@dataclass(frozen=True)
class LyraDataOptions:
    """Captions, and what the encoders say of them."""

    captions: str | None = None
    """Text file of captions, one a line, or demo, those of the generated pictures. Default: those of the data sets in
    dataset_config, else demo."""
    validation_split: float = 0.05
    """Share of the captions that is held out; the loss and the cosines on them are in the metrics. 0 holds none out."""
    empty_share: float = 0.05
    """Share of the samples that are the empty prompt, which guidance needs."""
    cache_dir: Path = Path("data/cache")
    """Folder of the LMDB stores of what the encoders say; those of the base's are train_network.py's too."""

    def __post_init__(self) -> None:
        share("validation_split", self.validation_split)
        require(0 <= self.empty_share < 1, "empty_share", f"must be at least 0 and below 1, got {self.empty_share}.")


@dataclass(frozen=True)
class LyraModelOptions:
    """The autoencoder that fuses them, and its loss."""

    latent_dim: OptionalCount = None
    """Channels of a token's latent. Default: the width of the base's first text encoder."""
    hidden_dim: OptionalCount = None
    """Width of the layers of encoder and decoders. Default: 4/3 of latent_dim, Lyra's 1024 over 768."""
    depth: int = 3
    """Linear layers of the encoder and of each decoder."""
    fusion: Literal["attention", "cantor"] = "attention"
    """Which encoders see each other at a position: all, or the three nearest by Cantor's pairing, which are all where there are no
    more than three."""
    fusion_heads: int = 8
    """Heads of this attention; they divide latent_dim."""
    kl_weight: float = 1e-3
    """Weight of the latents' distance to N(0, 1) in the loss. Lyra had 0.1."""
    kl_warmup: float = 0.2
    """Share of the steps over which this weight rises from 0."""
    cross_weight: float = 0.0
    """Weight of the squared distance between what different encoders' decoded states are projected to; Lyra had 0.05 at first, and
    0 later."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "depth", "fusion_heads"):
            positive(name, getattr(self, name))
        for name in ("kl_weight", "cross_weight"):
            not_negative(name, getattr(self, name))
        share("kl_warmup", self.kl_warmup)


@dataclass(frozen=True)
class LyraOptimizerOptions(OptimizerOptions):
    """Optimizer, learning rate and its course."""

    learning_rate: float = 1e-3
    """Peak learning rate. Prodigy and D-Adaptation want 1.0."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the trained weights, such as 0.999; 0 turns it off."""
    lr_scheduler: Schedule = "cosine"
    """Learning rate after the warm-up, as diffusers and transformers define it."""


@dataclass(frozen=True)
class LyraTrainingOptions(TrainingOptions):
    """How long, in what batches and from which seed."""

    train_batch_size: int = 16
    """Captions per step and process."""
    max_train_epochs: OptionalCount = 50
    """Passes over the captions."""
    seed: int = 42
    """Root of all randomness: order of captions, draws of latents, initial weights."""


@dataclass(frozen=True)
class LyraOutputOptions(OutputOptions):
    """What is saved, when, and what is resumed."""

    output_dir: Path = Path("outputs/lyra")
    """Folder of everything the run leaves: states, the fusion, metrics, the resolved options."""
    output_name: str = "lyra"
    """Stem of the fusion's file."""
    save_precision: Literal["float", "fp16", "bf16"] | None = None  # type: ignore[assignment]
    """Number format of the fusion's file. Default: float32, as trained."""
    validate_every_n_steps: OptionalCount = 500
    """Optimizer steps between validations; there is always one at the end."""
    save_every_n_steps: OptionalCount = 1000
    """Optimizer steps between saved states; there is always one at the end."""


@dataclass(frozen=True)
class TrainLyraOptions:
    """Groups of options of train_lyra.py."""

    config: ConfigOptions = field(default_factory=ConfigOptions)
    model: LyraEncoderOptions = field(default_factory=LyraEncoderOptions)
    data: LyraDataOptions = field(default_factory=LyraDataOptions)
    lyra: LyraModelOptions = field(default_factory=LyraModelOptions)
    optimizer: LyraOptimizerOptions = field(default_factory=LyraOptimizerOptions)
    training: LyraTrainingOptions = field(default_factory=LyraTrainingOptions)
    output: LyraOutputOptions = field(default_factory=LyraOutputOptions)

    most_used: ClassVar[tuple[str, ...]] = (
        *("pretrained_model_name_or_path", "encoders", "captions", "dataset_config", "output_dir", "output_name"),
        *("cache_dir", "clip_skip", "latent_dim", "hidden_dim", "fusion", "kl_weight", "cross_weight"),
        *("train_batch_size", "max_train_epochs", "max_train_steps", "learning_rate", "seed", "device", "dry_run"),
    )

    @property
    def dataset_file(self) -> Path | None:
        """The TOML file of data sets, where one is given and the captions are not."""
        if self.config.dataset_config is None or self.data.captions is not None:
            return None
        path = find_config(self.config.dataset_config)
        return path if "datasets" in read_toml(path) else None


def parse_lyra_options(argv: list[str], *, prog: str, description: str | None) -> TrainLyraOptions:
    """`argv` and the TOML file it names (--dataset_config), as checked options. Raises UserError; see `parse`."""
    return parse(TrainLyraOptions, argv, prog=prog, description=description, dialect=Dialect(datasets_beside=True))
