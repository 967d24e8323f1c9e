"""Options of evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.checks import positive, require
from library.options.dialect import Alias, Dialect
from library.options.generate import PROMPT_FILES, SamplingOptions
from library.options.model import ModelOptions
from library.precision import Precision

KOHYA = Dialect(aliases={"base_model": Alias("pretrained_model_name_or_path")})
"""Option names of the former pipeline (evaluate_single_checkpoint)."""

DEFAULT_REFERENCES = 64


@dataclass(frozen=True)
class CheckpointOptions:
    """What is judged."""

    checkpoint: tuple[Path, ...] = ()
    """What to evaluate: adapter files, training states, or a folder of them, such as the output_dir of a training."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, a hub id, one .safetensors file, or a model of the project. Default: the one the adapters name."""
    weight: float = 1.0
    """Weight of the adapters; 1: as trained."""
    use_ema: bool = False
    """Evaluate the averaged weights (NAME-ema.safetensors, and those of states)."""
    output_dir: Path = Path("outputs/evaluation")
    """Folder for report.html, metrics.json, the sheets and all pictures."""
    overwrite: bool = False
    """Replace an evaluation in that folder."""

    def __post_init__(self) -> None:
        for path in self.checkpoint:
            require(path.expanduser().exists(), "checkpoint", f"{path} does not exist.")
        require(
            self.pretrained_model_name_or_path != "",
            "pretrained_model_name_or_path",
            "is empty. Leave it out for the base that the adapters name.",
        )
        require(
            -10 <= self.weight <= 10 and self.weight != 0,
            "weight",
            f"must lie between -10 and 10 and not be 0, which is the base, got {self.weight}.",
        )


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures are drawn to judge by."""

    prompt: tuple[str, ...] = ()
    """Prompts with the subject, as in training: "a photo of zorb". Default: captions of the held-out photos, else those
    of the training, from the adapter's metadata."""
    prompts: Path | None = None
    """Instead of --prompt: a file of prompts in kohya's syntax (.txt, .toml, .json). A line's steps, scale, sampler
    and negative prompt are used; its seed and size are not."""
    unrelated_prompts: Path | None = None
    """A file of prompts that do not mention the subject, for drift and adherence. Default: eight built-in prompts."""
    num_samples: int = 16
    """Pictures of the subject per checkpoint, and as many of unrelated prompts; each prompt gets at least two seeds."""
    negative_prompt: str = ""
    """What the pictures should not show, for prompts without a negative prompt of their own."""
    resolution: int | None = None
    """Side of the pictures in pixels, a multiple of 8. Default: the size that the base was trained at."""
    seed: int = 42
    """The first seed; the next ones count up from it, the same for every prompt and every checkpoint."""
    batch_size: int = 1
    """Pictures drawn at once. It does not change the pictures."""

    def __post_init__(self) -> None:
        require(not (self.prompt and self.prompts), "prompts", "and prompt exclude each other.")
        for name in ("prompts", "unrelated_prompts"):
            file = getattr(self, name)
            require(file is None or file.is_file(), name, f"{file} does not exist.")
            require(
                file is None or file.suffix.lower() in PROMPT_FILES,
                name,
                f"must be a {', '.join(PROMPT_FILES)} file, got {file}.",
            )
        require(all(text.strip() for text in self.prompt), "prompt", "is empty.")
        require(
            self.num_samples >= 2,
            "num_samples",
            f"must be at least 2, to estimate a standard error, got {self.num_samples}.",
        )
        require(self.batch_size >= 1, "batch_size", f"must be at least 1, got {self.batch_size}.")
        require(0 <= self.seed < 2**62, "seed", f"must lie between 0 and 2^62, got {self.seed}.")
        positive("resolution", self.resolution)
        require(
            self.resolution is None or self.resolution % 8 == 0,
            "resolution",
            f"must be a multiple of 8, got {self.resolution}.",
        )


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and how."""

    reference_dir: Path | None = None
    """Folder of photos of the subject that were not trained on, with captions as .txt beside them. Default: the training's
    val_data, or a folder held_out beside its pictures."""
    train_data_dir: Path | None = None
    """Folder of the pictures that were trained on, among which copies are looked for. Default: those of the training, by the
    options.toml beside the checkpoints."""
    max_references: int = DEFAULT_REFERENCES
    """At most so many photos are used, spread evenly over the folder."""
    dino_model: str = ModelOptions.dino_model[0]
    """DINOv2 for likeness, drift and diversity: a hub id (facebook/dinov2-large), a folder, Meta's .pth, or the project's own."""
    clip_model: str | None = None
    """CLIP for adherence: a hub id or folder of a transformers CLIPModel. Default: the project's own for its bases, else none."""
    representation: bool | None = None
    """Measure how well the newest state with heads predicts the teacher, beside baselines. Default: where its caches exist."""
    representation_samples: int = 512
    """At most so many training pictures, and so many held-out ones, for --representation."""
    representation_timesteps: tuple[int, ...] = (1, 50, 100, 261, 400, 500, 750)
    """Timesteps at which --representation measures the network."""

    def __post_init__(self) -> None:
        require(bool(self.dino_model), "dino_model", "is empty.")
        require(
            self.max_references >= 2,
            "max_references",
            f"must be at least 2, to estimate a standard error, got {self.max_references}.",
        )
        require(
            self.representation_samples >= 10,
            "representation_samples",
            f"must be at least 10, got {self.representation_samples}.",
        )
        require(
            all(0 <= timestep < 1000 for timestep in self.representation_timesteps)
            and 0 < len(self.representation_timesteps) == len(set(self.representation_timesteps)),
            "representation_timesteps",
            f"must name different numbers from 0 to 999, got {list(self.representation_timesteps)}.",
        )
        for name in ("reference_dir", "train_data_dir"):
            folder = getattr(self, name)
            require(folder is None or folder.is_dir(), name, f"{folder} is no folder.")


@dataclass(frozen=True)
class StrengthOptions:
    """At which weight to use the best checkpoint."""

    strength: bool = False
    """Draw the checkpoint to use at each of --strengths too, and recommend the weight from which on likeness no longer rises
    beyond its interval. It draws as many pictures again for each weight."""
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
    """Weights for --strength."""
    write: bool = False
    """Write the recommended weight into the adapter (ss_recommended_weight) and into the .json beside it, with a preview .png, as
    A1111 and ComfyUI's managers show them. The adapter's tensors stay as they are, byte by byte."""

    def __post_init__(self) -> None:
        require(
            self.strength or not self.write, "write", "needs --strength, which finds the weight. Give both, or neither."
        )
        require(
            self.strength or self.strengths == StrengthOptions.strengths,
            "strengths",
            "has no effect without --strength. Give both, or leave it out.",
        )
        require(
            len(self.strengths) >= 2
            and list(self.strengths) == sorted(set(self.strengths))
            and all(0 < weight <= 10 for weight in self.strengths),
            "strengths",
            f"must name two weights or more above 0 and up to 10, ascending, got {list(self.strengths)}.",
        )


@dataclass(frozen=True)
class BlockProbeOptions:
    """What each block of the U-Net knows of noise and picture."""

    block_probe: bool = False
    """Instead of drawing: measure what can be read from each block's features, with and without its timestep, of the base and the
    newest checkpoint, or of the base alone; writes timestep_bins.json for --timestep_bin_source probe."""
    block_probe_bins: int = 100
    """Bins of log-SNR between which noise levels are told apart."""
    block_probe_samples: int = 256
    """At most so many pictures of --reference_dir, each at ten noise levels. Default pictures: those of the training's caches, a
    folder held_out beside it, or for the project's own bases generated ones."""

    def __post_init__(self) -> None:
        for name, least, most in (("block_probe_bins", 10, 1000), ("block_probe_samples", 12, 100_000)):
            value, default = getattr(self, name), getattr(BlockProbeOptions, name)
            require(least <= value <= most, name, f"must lie between {least} and {most}, got {value}.")
            require(self.block_probe or value == default, name, "has no effect without block_probe.")


@dataclass(frozen=True)
class EvaluateOptions:
    checkpoints: CheckpointOptions
    pictures: PictureOptions
    sampling: SamplingOptions
    measures: MeasureOptions
    strengths: StrengthOptions
    probe: BlockProbeOptions
    dtype: Precision | None = None
    """Number format of the base. Default: fp16 on a GPU, float elsewhere."""
    device: str | None = None
    """Device as torch names it (cuda, cuda:1, mps, cpu). Default: the best there is."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        require(
            bool(self.checkpoints.checkpoint) or self.probe.block_probe,
            "checkpoint",
            "is missing: name an adapter, a training state or a folder of them.",
        )
