"""Options of optimize.py and of its sub-commands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from library.options.checks import positive, require
from library.options.dialect import Alias, Dialect
from library.search.messages import ObjectiveName, Script
from library.search.study.proposals import SamplerName
from library.search.study.storage import require_form
from library.search.study.study import CONFIRMING
from library.search.to_sdxl.trainings import SdxlOptions

DIALECT = Dialect(config_option="study_config", aliases={"pretrained_model_name_or_path": Alias("base_model")})

N_TRIALS = 50
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu")
SMALL_STUDY = 20
"""Trials below which no more than a quarter of them is trained again."""


@dataclass(frozen=True)
class PlaceOptions:
    """Which study, and where it is kept."""

    study_name: str = "search"
    """Name of the study. To go on with one, give the same name."""
    output_dir: Path | None = None
    """Folder of the study: trials, best_params.json, report.html, study.db. Default: outputs/ and the study's name."""
    storage: str | None = None
    """Where the trials are kept: sqlite:///study.db, journal:study.log, postgresql+psycopg://user:password@host/name or
    grpc://host:port. Default: study.db in output_dir."""

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[\w][\w.+ -]*", self.study_name)),
            "study_name",
            f"must be letters, digits, dots, dashes and underscores, got {self.study_name!r}.",
        )
        of = self.study_name.removesuffix(CONFIRMING)
        require(
            of == self.study_name,
            "study_name",
            f"must not end with {CONFIRMING}, got {self.study_name!r}: under that name {of} trains its best again. Name {of}.",
        )
        require(self.storage != "", "storage", "is empty. Leave it out for study.db in output_dir.")
        if self.storage is not None:
            require_form(self.storage)

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
    """The pictures: for train_network a dataset TOML, for train_repa the file that it takes under that name. Default: what
    config_file names, else a dozen generated pictures of something new to the embedded base."""
    config_file: str | None = None
    """TOML file with options of the script, fixed for all trials. What the space searches is not taken from it."""
    device: str | None = None
    """Device to train on, as torch names it (cuda, cuda:1, cpu). Default: what accelerate finds."""

    def __post_init__(self) -> None:
        require(
            self.device is None or bool(re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", self.device)),
            "device",
            f"must be one of {', '.join(DEVICES)}, or one of several such as cuda:1, got {self.device!r}.",
        )


@dataclass(frozen=True)
class SearchOptions:
    """How the best one is looked for."""

    space: str | None = None
    """Search space: a TOML file, or the name of one in search_spaces/. Default: the script's own, see docs/optimize.md."""
    n_trials: int | None = None
    """Trials of the whole study, with those of earlier runs and of other machines. Default: 50, and 15 on SDXL after a study
    on SD1.5."""
    workers: int = 1
    """Trials trained at once on this machine, each on a GPU of its own."""
    sampler: SamplerName = "auto"
    """What proposes trials. auto: a Gaussian process; TPE with more than 4 workers or 200 trials."""
    objective: ObjectiveName = "loss"
    """What is made small: the loss on held-out pictures against the untouched base's, or (image) drift minus likeness to
    held-out photos of pictures that are drawn."""
    objective_args: tuple[str, ...] = ()
    """Settings of the objective image, as key=value: seeds, steps, size, drift_weight, dino_model, clip_model and others."""
    init_params: Path | None = None
    """Parameters to begin with: best_params.json of a study, params.json of a trial, or a table with kohya's names."""
    prune: bool = True
    """End trials early that fall behind; --no_prune trains all of them to the end."""
    confirm: int | None = None
    """Train so many of the best again with 2 new seeds each. Default: 5, in studies below 20 trials a quarter of them."""
    stop_on_convergence: bool = False
    """End the search when nothing better has been found for long. Without, that is only said."""
    keep: int = 10
    """Adapters of so many of the best trials stay on the disk, with those of their trainings with new seeds."""
    seed: int = 42
    """Of the sampler, and of every training, so that trials differ by their parameters alone."""
    pick: int | None = None
    """Make this trial the study's choice, whatever the objective says, and write best_params.json, report and export anew."""

    def __post_init__(self) -> None:
        require(self.n_trials is None or self.n_trials > 0, "n_trials", f"must be at least 1, got {self.n_trials}.")
        require(self.workers > 0, "workers", f"must be at least 1, got {self.workers}.")
        require(self.keep > 0, "keep", f"must be at least 1, got {self.keep}.")
        # The best are trained again with the seeds that follow.
        require(0 <= self.seed < 2**32, "seed", f"must be a whole number from 0 to 2^32 - 1, got {self.seed}.")
        require(
            self.confirm is None or self.confirm >= 0,
            "confirm",
            f"must not be negative, got {self.confirm}. 0 is none.",
        )
        require(
            not self.objective_args or self.objective == "image",
            "objective_args",
            "are settings of the objective image; the loss has none.",
        )

    def confirmed(self, n_trials: int) -> int:
        """How many of the best are trained again, in a study of so many trials."""
        if self.confirm is not None:
            return self.confirm
        return 5 if n_trials >= SMALL_STUDY else min(5, max(2, n_trials // 4))


@dataclass(frozen=True)
class OutcomeOptions:
    """What becomes of the result."""

    sdxl_base: str | None = None
    """SDXL base that the result is carried to at the end. Default: stabilityai/stable-diffusion-xl-base-1.0, and for the
    embedded base tiny-sdxl."""
    export: bool = True
    """Write sdxl_dataset.toml, sdxl_config.toml and sdxl_train.sh at the end; --no_export does not."""
    sheet: bool = True
    """Draw a contact sheet with the five best for the report; --no_sheet does not."""


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
    """Look again every so many seconds, until all trials are done or Ctrl-C."""

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
    """The trial to pick: `pick 7` for short."""

    def __post_init__(self) -> None:
        require(self.trial > 0, "trial", "is missing: name the number of a trial, such as optimize.py pick 7.")


@dataclass(frozen=True)
class ExportOptions:
    """optimize.py export"""

    place: PlaceOptions = field(default_factory=PlaceOptions)
    wishes: SdxlOptions = field(default_factory=SdxlOptions)
    to: Literal["sdxl"] = "sdxl"
    """What to carry the result to."""
    base_model: str | None = None
    """SDXL base: a file, a folder, a hub id or tiny-sdxl. Default: stabilityai/stable-diffusion-xl-base-1.0, and after a
    study on the embedded base tiny-sdxl."""
    dataset_config: str | None = None
    """The study's dataset file, where it lies elsewhere now."""
