"""Options of optimize.py and of its sub-commands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.options.checks import positive, require
from library.options.dialect import Alias, Dialect
from library.options.given import Needed
from networks.families import SDXL

DIALECT = Dialect(config_option="study_config", aliases={"pretrained_model_name_or_path": Alias("base_model")})

Script = Literal["train_network", "train_repa"]
ObjectiveName = Literal["loss", "image"]
SamplerName = Literal["auto", "gp", "tpe", "random"]

N_TRIALS = 50
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu")
SMALL_STUDY = 20
"""With fewer trials, at most a quarter of them is trained again."""
CONFIRMING = "-confirm"
"""The best of a study are trained again in a second study, whose name is the first one's with this at its end."""

STORAGE_FORMS = "sqlite:///study.db, journal:study.log, postgresql+psycopg://user:password@host/name, grpc://host:port"

DIMS = (64, 96, 128)
SMALL_DIMS = (16, 32)
SDXL_CLIP_SKIP = SDXL.text_layer


def require_storage_form(url: str) -> None:
    """Raises UserError where `url` has none of STORAGE_FORMS, before anything is opened."""
    if not re.match(r"(sqlite:///|journal:|postgresql(\+psycopg)?://|grpc://).", url):
        raise UserError(f"--storage {without_password(url)} is not a storage. Use one of {STORAGE_FORMS}.")


def without_password(url: str) -> str:
    """A storage's address as it may be shown."""
    url = re.sub(r"(://[^:/@]+):[^/]*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


@dataclass(frozen=True)
class PlaceOptions:
    """Which study, and where it is stored."""

    study_name: Needed = "search"
    """Name of the study. Give the same name to continue it."""
    output_dir: Path | None = None
    """Folder of the study: trials, best_params.json, report.html, study.db. Default: outputs/ and the study's name."""
    storage: str | None = None
    """Where the trials are stored: sqlite:///study.db, journal:study.log, postgresql+psycopg://user:password@host/name or
    grpc://host:port. Default: study.db in output_dir."""

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[\w][\w.+ -]*", self.study_name)),
            "study_name",
            f"must be letters, digits, dots, dashes and underscores, got {self.study_name!r}.",
        )
        first = self.study_name.removesuffix(CONFIRMING)
        require(
            first == self.study_name,
            "study_name",
            f"must not end with {CONFIRMING}, got {self.study_name!r}: {first} trains its best again under that name. Use {first}.",
        )
        require(self.storage != "", "storage", "is empty. Leave it out to store the study in study.db in output_dir.")
        if self.storage is not None:
            require_storage_form(self.storage)

    @property
    def folder(self) -> Path:
        return Path("outputs") / self.study_name if self.output_dir is None else self.output_dir.expanduser()

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder / 'study.db'}" if self.storage is None else self.storage


@dataclass(frozen=True)
class TrainedOptions:
    """What is trained."""

    script: Script = "train_network"
    """Which training is tuned: train_network.py or train_repa.py."""
    base_model: str | None = None
    """Base model: a folder, a hub id, one .safetensors file, or a model of the project. Default: config_file's, else the
    script's."""
    dataset_config: str | None = None
    """The pictures: for train_network a dataset TOML, for train_repa the file that it takes under that name. Default: the one
    that config_file names, else a dozen generated pictures of something that the embedded base does not know."""
    config_file: str | None = None
    """TOML file with options of the script, fixed for all trials. Options that the space searches are not taken from it."""
    device: str | None = None
    """Device to train on, as torch names it (cuda, cuda:1, cpu). Default: the one that accelerate finds."""

    def __post_init__(self) -> None:
        require(
            self.device is None or bool(re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", self.device)),
            "device",
            f"must be one of {', '.join(DEVICES)}, or one of several such as cuda:1, got {self.device!r}.",
        )


@dataclass(frozen=True)
class SearchOptions:
    """How the study searches."""

    space: str | None = None
    """Search space: a TOML file, or the name of one in search_spaces/. Default: the script's own, see docs/optimize.md."""
    n_trials: int | None = None
    """Trials of the whole study, including those of earlier runs and of other machines. Default: 50, or 15 on SDXL after a
    study on SD1.5."""
    workers: int = 1
    """Trials trained at once on this machine, each on its own GPU."""
    sampler: SamplerName = "auto"
    """How trials are proposed. auto: by a Gaussian process, or by TPE with more than 4 workers or 200 trials."""
    objective: ObjectiveName = "loss"
    """What the study minimises. loss: the loss on held-out pictures relative to the untouched base's. image: drift on
    unrelated prompts minus likeness to held-out photos, of pictures that each trial draws."""
    objective_args: tuple[str, ...] = ()
    """Settings of the objective image, as key=value: seeds, steps, size, drift_weight, dino_model, clip_model and others."""
    init_params: Path | None = None
    """Parameters to begin with: best_params.json of a study, params.json of a trial, or a table with kohya's names."""
    prune: bool = True
    """Stop trials early that fall behind; --no_prune trains all of them to the end."""
    confirm: int | None = None
    """Train this many of the best trials again, with 2 new seeds each. Default: 5, or a quarter of a study below 20 trials."""
    stop_on_convergence: bool = False
    """End the search when it has converged: many trials without a better one. Without this option it only says so."""
    keep: int = 10
    """Keep the adapters of this many best trials, and those of their trainings with new seeds; delete all others."""
    seed: int = 42
    """Seed of the sampler and of every training, so that trials differ by their parameters alone."""
    pick: int | None = None
    """Make this trial the study's choice, whatever its value, and write best_params.json, report and export again."""

    def __post_init__(self) -> None:
        require(self.n_trials is None or self.n_trials > 0, "n_trials", f"must be at least 1, got {self.n_trials}.")
        require(self.workers > 0, "workers", f"must be at least 1, got {self.workers}.")
        require(self.keep > 0, "keep", f"must be at least 1, got {self.keep}.")
        # Trainings of the best with new seeds take the seeds after it.
        require(0 <= self.seed < 2**32, "seed", f"must be a whole number from 0 to 2^32 - 1, got {self.seed}.")
        require(
            self.confirm is None or self.confirm >= 0,
            "confirm",
            f"must not be negative, got {self.confirm}. 0 trains none again.",
        )
        require(
            not self.objective_args or self.objective == "image",
            "objective_args",
            "are settings of the objective image; the objective loss has none.",
        )

    def confirmed(self, n_trials: int) -> int:
        """How many of the best are trained again, in a study of so many trials."""
        if self.confirm is not None:
            return self.confirm
        return 5 if n_trials >= SMALL_STUDY else min(5, max(2, n_trials // 4))


@dataclass(frozen=True)
class OutcomeOptions:
    """What is made of the result."""

    sdxl_base: str | None = None
    """SDXL base for the export at the end. Default: stabilityai/stable-diffusion-xl-base-1.0, or tiny-sdxl for the embedded
    base."""
    export: bool = True
    """Write sdxl_dataset.toml, sdxl_config.toml and sdxl_train.sh at the end; --no_export does not."""
    sheet: bool = True
    """Draw a contact sheet of the five best for the report; --no_sheet does not."""


@dataclass(frozen=True)
class OptimizeOptions:
    """optimize.py itself."""

    place: PlaceOptions = field(default_factory=PlaceOptions)
    trained: TrainedOptions = field(default_factory=TrainedOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    outcome: OutcomeOptions = field(default_factory=OutcomeOptions)
    study_config: str | None = None
    """TOML file with any of these options. The command line overrides it."""
    dry_run: bool = False
    """Check everything, print the plan and stop."""


@dataclass(frozen=True)
class StatusOptions:
    """optimize.py status"""

    place: PlaceOptions = field(default_factory=PlaceOptions)
    watch: float | None = None
    """Print again every so many seconds, until all trials are done or Ctrl-C."""

    def __post_init__(self) -> None:
        positive("watch", self.watch)


@dataclass(frozen=True)
class ReportOptions:
    """optimize.py report"""

    place: PlaceOptions = field(default_factory=PlaceOptions)


@dataclass(frozen=True)
class PickOptions:
    """optimize.py pick"""

    place: PlaceOptions = field(default_factory=PlaceOptions)
    trial: int = 0
    """The trial to pick; `pick 7` for short."""

    def __post_init__(self) -> None:
        require(self.trial > 0, "trial", "is missing: name the number of a trial, such as optimize.py pick 7.")


@dataclass(frozen=True)
class SdxlOptions:
    """What may be asked of the export to SDXL; without any of it the rules decide."""

    sdxl_dim: int | None = None
    """network_dim on SDXL: 64, 96 or 128. Default: the study's, or the next one above it."""
    allow_small_dim: bool = False
    """Let network_dim be 16 or 32 on SDXL too: enough for a subject of some hundred pictures, and files are small."""
    sdxl_alpha: float | None = None
    """network_alpha on SDXL; learning rates follow with the root of the ratio. Default: the study's."""
    max_batch: int = 4
    """Largest batch on SDXL. Batches are at least halved, and gradient_accumulation_steps makes up for it exactly."""
    rate_factor: float = 1.0
    """Multiply all learning rates; 0.7 is what theory asks for SDXL's width."""
    train_text_encoders: bool = True
    """Train the text encoders if the study did; --no_train_text_encoders does not, and caches their outputs."""
    sdxl_clip_skip: int | None = None
    """Write clip_skip 2 into the configuration, which SDXL uses in any case. Default: left out."""

    def __post_init__(self) -> None:
        smaller = "" if self.allow_small_dim else f"; --allow_small_dim adds {' and '.join(map(str, SMALL_DIMS))}"
        require(
            self.sdxl_dim is None or self.sdxl_dim in self.dims,
            "sdxl_dim",
            f"must be one of {', '.join(map(str, self.dims))}, got {self.sdxl_dim}{smaller}.",
        )
        positive("sdxl_alpha", self.sdxl_alpha)
        positive("max_batch", self.max_batch)
        positive("rate_factor", self.rate_factor)
        require(
            self.sdxl_clip_skip in (None, SDXL_CLIP_SKIP),
            "sdxl_clip_skip",
            f"must be {SDXL_CLIP_SKIP}: SDXL was trained on the second last layer, got {self.sdxl_clip_skip}.",
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """Ranks that may be written, ascending."""
        return (*SMALL_DIMS, *DIMS) if self.allow_small_dim else DIMS


@dataclass(frozen=True)
class ExportOptions:
    """optimize.py export"""

    place: PlaceOptions = field(default_factory=PlaceOptions)
    wishes: SdxlOptions = field(default_factory=SdxlOptions)
    to: Literal["sdxl"] = "sdxl"
    """The kind of base to export to."""
    base_model: str | None = None
    """SDXL base: a file, a folder, a hub id or tiny-sdxl. Default: stabilityai/stable-diffusion-xl-base-1.0, or tiny-sdxl after
    a study on the embedded base."""
    dataset_config: str | None = None
    """The study's dataset file, if it has moved since."""
