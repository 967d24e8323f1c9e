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
"""What the pipeline before this one called these options (evaluate_single_checkpoint)."""

DEFAULT_REFERENCES = 64


@dataclass(frozen=True)
class JudgedOptions:
    checkpoint: tuple[Path, ...] = ()
    """What to judge: adapter files, training states, or a folder of them, such as the output_dir of a training."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, a hub id, one .safetensors file, or a model of the project. Default: the one the adapters name."""
    weight: float = 1.0
    """How strongly the adapters act: 1 is as trained."""
    use_ema: bool = False
    """Judge the averaged weights (NAME-ema.safetensors, and those of states)."""
    output_dir: Path = Path("outputs/evaluation")
    """Folder for report.html, metrics.json, the sheets and all pictures."""
    overwrite: bool = False
    """Replace an evaluation that is there."""

    def __post_init__(self) -> None:
        require(
            bool(self.checkpoint), "checkpoint", "is missing: name an adapter, a training state or a folder of them."
        )
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
class DrawnOptions:
    prompt: tuple[str, ...] = ()
    """Prompts with the subject, as in training: "a photo of zorb". Default: the captions of the held-out photos, else what
    the adapter says of its training's captions."""
    prompts: Path | None = None
    """Instead of --prompt: a file of prompts in kohya's syntax (.txt, .toml, .json). What a line says of steps, scale, sampler
    and negative prompt counts; its seed and size do not."""
    unrelated_prompts: Path | None = None
    """A file of prompts that have nothing to do with the subject, for drift and adherence. Default: eight of ours."""
    num_samples: int = 16
    """Pictures with the subject per checkpoint, spread over the prompts, and as many of unrelated ones; at least two seeds each."""
    negative_prompt: str = ""
    """What to stay away from, for all prompts that name nothing of their own."""
    resolution: int | None = None
    """Side of the pictures in pixels, a multiple of 8. Default: what the base was trained at."""
    seed: int = 42
    """The first seed; the next ones count up from it, the same for every prompt and every checkpoint."""
    batch_size: int = 1
    """Pictures drawn at once. A picture is the same in every batch."""

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
        require(self.num_samples >= 2, "num_samples", f"must be at least 2, to know a spread, got {self.num_samples}.")
        require(self.batch_size >= 1, "batch_size", f"must be at least 1, got {self.batch_size}.")
        require(0 <= self.seed < 2**62, "seed", f"must lie between 0 and 2^62, got {self.seed}.")
        positive("resolution", self.resolution)
        require(
            self.resolution is None or self.resolution % 8 == 0,
            "resolution",
            f"must be a multiple of 8, got {self.resolution}.",
        )


@dataclass(frozen=True)
class MeasuredOptions:
    reference_dir: Path | None = None
    """Folder of photos of the subject that were not trained on, captions beside them as .txt. Default: the training's
    val_data, or a folder held_out beside its pictures."""
    max_references: int = DEFAULT_REFERENCES
    """Photos that are used at most, spread evenly over the folder."""
    dino_model: str = ModelOptions.dino_model
    """DINOv2 that judges likeness, drift and diversity: a hub id (facebook/dinov2-large), a folder, Meta's .pth, or ours."""
    clip_model: str | None = None
    """CLIP that judges adherence: a hub id or folder of a transformers CLIPModel. Default: ours with a base of ours, else none."""
    representation: bool | None = None
    """Compare what the newest training state with heads knows of the teacher with its baselines. Default: where its caches are."""
    representation_samples: int = 512
    """Training and held-out pictures for that, at most."""
    representation_timesteps: tuple[int, ...] = (1, 50, 100, 261, 400, 500, 750)
    """Timesteps at which the network is looked at for that."""

    def __post_init__(self) -> None:
        require(bool(self.dino_model), "dino_model", "is empty.")
        require(
            self.max_references >= 2,
            "max_references",
            f"must be at least 2, to know a spread, got {self.max_references}.",
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
        if self.reference_dir is not None:
            require(self.reference_dir.is_dir(), "reference_dir", f"{self.reference_dir} is no folder.")


@dataclass(frozen=True)
class EvaluateOptions:
    judged: JudgedOptions
    drawn: DrawnOptions
    sampling: SamplingOptions
    measured: MeasuredOptions
    dtype: Precision | None = None
    """Number format of the base. Default: fp16 on a GPU, float elsewhere."""
    device: str | None = None
    """Device as torch names it (cuda, cuda:1, mps, cpu). Default: the best there is."""
    dry_run: bool = False
    """Print the plan and stop."""
