"""The base model, how long and how fast a LoRA is trained on it, and what a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from library.options.checks import positive, require
from library.options.given import OFF_AT_ZERO, Needed, OptionalCount
from library.options.model import ModelOptions, SpeedOptions
from library.options.training import OutputOptions, TrainingOptions
from networks.families import UNET


@dataclass(frozen=True)
class NetworkConfigOptions:
    """Files of options, and --dry_run."""

    config_file: str | None = None
    """TOML file with any of these options, in any sections; .toml may be left out. The command line overrides it."""
    dataset_config: Path | None = None
    """TOML file of data sets ([general], [[datasets]]), kohya's. What it does not say, the data options do."""
    output_config: bool = False
    """Write the resolved options to config_file, which must not exist yet, and stop."""
    ignore_unknown_keys: bool = False
    """Go on with a warning where config_file has keys that are no options."""
    dry_run: bool = False
    """Print the resolved plan and stop."""
    report: bool = False
    """With dry_run: look at pictures and captions as doctor.py does, and write output_dir/doctor.html and .json."""

    def __post_init__(self) -> None:
        require(
            not self.output_config or self.config_file is not None,
            "output_config",
            "needs config_file, the file to write.",
        )
        require(not self.report or self.dry_run, "report", "looks before a training: it needs --dry_run.")


@dataclass(frozen=True)
class NetworkModelOptions(ModelOptions):
    pretrained_model_name_or_path: Needed = "tiny-shapes"
    """Base model, SD1.5 or SDXL: a hub id, a diffusers folder, one .safetensors file, tiny-shapes or tiny-sdxl."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # type: ignore[assignment]
    """Number format in which frozen weights are kept and everything but losses and trained weights is computed; no is float32."""
    sdxl: bool | None = None
    """Whether the base is SDXL. Not needed: bases are told apart by their weights, and a wrong word is said."""
    vae: str | None = None
    """Another VAE than the base's, of a model or alone: a hub id, a folder or one .safetensors file."""
    no_half_vae: bool = False
    """Compute the VAE in float32 with mixed_precision bf16 too. With fp16, which it overflows, that is always so."""
    full_bf16: bool = False
    """Keep trained weights and gradients in bfloat16 too: half their memory, and small updates are lost."""
    base_quantization: Literal["none", "stored", "fp8", "int8", "nf4"] = "none"
    """How frozen weights of U-Net and text encoders lie in memory; they are computed with in mixed_precision. nf4 takes a quarter
    of bf16, int8 and fp8 half; stored is as the file has them. Files with LoRAs are for the base as it was."""
    fp8_base: bool = False
    """kohya's name for base_quantization fp8 (e4m3)."""
    fp8_base_unet: bool = False
    """The same for the U-Net alone."""
    disable_mmap_load_safetensors: bool = False
    """Files are read and closed, never kept mapped, in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.full_bf16 or self.mixed_precision == "bf16",
            "full_bf16",
            f"needs mixed_precision bf16, and it is {self.mixed_precision}.",
        )
        for name, same in (("fp8_base", ("none", "fp8")), ("fp8_base_unet", ("none",))):
            require(
                not getattr(self, name) or self.base_quantization in same,
                name,
                f"and base_quantization {self.base_quantization} both say how frozen weights are kept. Leave one of them out.",
            )

    def format_at_rest(self, component: str) -> str | None:
        """In which the frozen weights of a part of the base are kept; None is the one that is computed in."""
        if self.fp8_base or (self.fp8_base_unet and component == UNET):
            return "fp8"
        return None if self.base_quantization == "none" else self.base_quantization

    @property
    def vae_precision(self) -> Literal["bf16", "no"]:
        """Number format of the VAE: SDXL's overflows float16 (NaN latents)."""
        return "bf16" if self.mixed_precision == "bf16" and not self.no_half_vae else "no"


@dataclass(frozen=True)
class TextEncoderOptions:
    """How captions are encoded."""

    clip_skip: OptionalCount = None
    """Layer of CLIP-L that the U-Net sees, counted from the end; 1 is the last, SD1.5's. SDXL always sees the second last."""
    max_token_length: Annotated[Literal[75, 150, 225] | None, OFF_AT_ZERO] = None
    """Longest caption in tokens; longer ones are cut, and the cut is said. Default: 75."""

    def __post_init__(self) -> None:
        # CLIP-L has 12 layers (Radford et al. 2021).
        require(
            self.clip_skip is None or 1 <= self.clip_skip <= 12,
            "clip_skip",
            f"must lie between 1 and 12, the layers of CLIP-L, got {self.clip_skip}.",
        )

    @property
    def chunks(self) -> int:
        """Pieces of 75 tokens that a caption is encoded in."""
        return 1 if self.max_token_length is None else self.max_token_length // 75


@dataclass(frozen=True)
class NetworkTrainingOptions(TrainingOptions):
    """How long, in what batches and from which seed."""

    train_batch_size: int = 1
    """Samples per step and process. A dataset TOML's batch_size has the last word."""
    max_train_epochs: OptionalCount = None
    """Passes over the data; given, it decides the length instead of max_train_steps."""
    max_train_steps: int | None = 1600
    """Optimizer steps."""
    initial_step: OptionalCount = None
    """Begin as if so many optimizer steps were done: for runs that go on from network_weights without a state."""
    initial_epoch: int | None = None
    """The same, counted in epochs: 1 is the first."""
    skip_until_initial_step: bool = False
    """Pass over the data of the steps before. That is always so, and costs nothing: order follows from seed and step."""

    def __post_init__(self) -> None:
        if self.max_train_epochs is not None:
            # make_plan asks max_train_steps first; in kohya epochs decide.
            object.__setattr__(self, "max_train_steps", None)
        super().__post_init__()
        positive("initial_step", self.initial_step)
        positive("initial_epoch", self.initial_epoch)
        require(
            self.initial_step is None or self.initial_epoch is None,
            "initial_step",
            "and initial_epoch are both given; one of them says where to begin.",
        )
        for name, end_name in (("initial_step", "max_train_steps"), ("initial_epoch", "max_train_epochs")):
            begin, end = getattr(self, name), getattr(self, end_name)
            first = begin if name == "initial_step" or begin is None else begin - 1
            require(
                first is None or end is None or first < end,
                name,
                f"{begin} leaves nothing to train: {end_name} is {end}.",
            )


@dataclass(frozen=True)
class NetworkOutputOptions(OutputOptions):
    """What is saved, when, and what is resumed."""

    output_dir: Path = Path("outputs/network")
    """Folder of everything the run leaves: adapters, states, pictures, metrics, the resolved options."""
    output_name: str = "last"
    """Stem of the adapter files."""
    save_model_as: Literal["safetensors", "ckpt", "pt"] = "safetensors"
    """Format of the adapter files: safetensors."""
    save_every_n_epochs: OptionalCount = None
    """Epochs between saved adapters; there is always one at the end."""
    save_every_n_steps: OptionalCount = None
    """Optimizer steps between saved adapters."""
    save_n_epoch_ratio: OptionalCount = None
    """Save at least so many adapters over the run, at even distances in epochs."""
    save_last_n_epochs: OptionalCount = None
    """Keep only the adapters of the newest N epochs. Default: all."""
    save_last_n_steps: OptionalCount = None
    """Keep only adapters saved in the newest N steps. Default: all."""
    save_state: bool = False
    """Save the training state beside each adapter, to go on from exactly there. An interrupted run saves one anyway."""
    save_state_on_train_end: bool = False
    """Save the training state at the end, whatever save_state says."""
    save_last_n_epochs_state: OptionalCount = None
    """Keep only the states of the newest N epochs. Default: save_last_n_epochs."""
    save_last_n_steps_state: OptionalCount = None
    """Keep only states saved in the newest N steps. Default: save_last_n_steps."""
    validate_every_n_steps: OptionalCount = None
    """Optimizer steps between validations, beside validate_every_n_epochs. Default: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "save_every_n_epochs",
            "save_n_epoch_ratio",
            "save_last_n_epochs",
            "save_last_n_steps",
            "save_last_n_epochs_state",
            "save_last_n_steps_state",
        ):
            positive(name, getattr(self, name))
        require(
            self.save_model_as == "safetensors",
            "save_model_as",
            f"{self.save_model_as} is a pickle, which runs code when it is loaded and has no metadata. Use safetensors.",
        )
        require(
            self.save_n_epoch_ratio is None or self.save_every_n_epochs is None,
            "save_n_epoch_ratio",
            "and save_every_n_epochs are both given; one of them says when to save.",
        )
        by_epoch = self.save_every_n_epochs is not None or self.save_n_epoch_ratio is not None
        for name, due, needed in (
            ("save_last_n_epochs", by_epoch, "save_every_n_epochs"),
            ("save_last_n_epochs_state", by_epoch and self.save_state, "save_every_n_epochs and save_state"),
            ("save_last_n_steps", self.save_every_n_steps is not None, "save_every_n_steps"),
            (
                "save_last_n_steps_state",
                self.save_every_n_steps is not None and self.save_state,
                "save_every_n_steps and save_state",
            ),
        ):
            require(getattr(self, name) is None or due, name, f"has no effect without {needed}.")
        require(
            self.resume in ("auto", "none") or Path(self.resume).is_dir(),
            "resume",
            f"{self.resume} is no folder. It takes auto, none, or the folder of a saved state (NAME-000002-state).",
        )


@dataclass(frozen=True)
class NetworkSpeedOptions(SpeedOptions):
    xformers: bool = False
    """Attention by xformers where it is installed and there is a CUDA device; elsewhere by sdpa, and that is said."""
    persistent_data_loader_workers: bool = False
    """Workers live as long as the run in any case: they are threads."""
