"""Options of doctor.py: those of the training that the pictures are for, whichever script's, and a few of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.checks import positive, require
from library.options.dialect import values_in
from library.options.given import Needed
from library.options.kohya.training import NetworkModelOptions
from library.options.network import KOHYA, TrainNetworkOptions
from library.options.parser import parse
from library.options.repa import REPA, PrepareCacheOptions, RepaModelOptions, TrainRepaOptions
from library.options.run import RunOptions
from library.options.toml_file import find_config, read_toml

SD15_HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class DoctorOptions:
    """What doctor.py looks for, and where its page goes."""

    page: Path = Path("outputs/doctor.html")
    """Page to write; the same findings are written beside it as .json."""
    trigger: str | None = None
    """Word that stands for the subject, which every caption should have. Default: what the captions and folder names suggest."""
    max_pictures: int = 2000
    """Look at so many pictures at most, chosen by a stable hash of their ids; captions and sizes are read of all."""
    deep: bool = False
    """Also ask the teacher (dino_model, the first of several) which pictures are alike, and show what it sees in each."""

    def __post_init__(self) -> None:
        positive("max_pictures", self.max_pictures)
        require(
            self.page.suffix.lower() == ".html",
            "page",
            f"must be a .html file, got {self.page}; findings go beside it as .json.",
        )


@dataclass(frozen=True)
class DoctorModelOptions(NetworkModelOptions):
    pretrained_model_name_or_path: Needed = SD15_HUB_ID
    """Base model that the training is for. Its size and its vocabulary count here; nothing of it is fetched."""


@dataclass(frozen=True)
class DoctorRepaModelOptions(RepaModelOptions):
    pretrained_model_name_or_path: Needed = SD15_HUB_ID
    """Base model that the training is for. Its size and its vocabulary count here; nothing of it is fetched."""


@dataclass(frozen=True)
class DoctorNetworkOptions(TrainNetworkOptions):
    model: DoctorModelOptions = field(default_factory=DoctorModelOptions)
    doctor: DoctorOptions = field(default_factory=DoctorOptions)

    most_used: ClassVar[tuple[str, ...]] = (
        *("dataset_config", "train_data_dir", "reg_data_dir", "config_file", "pretrained_model_name_or_path"),
        *("resolution", "enable_bucket", "validation_split", "caption_extension", "max_token_length"),
        *("page", "trigger", "max_pictures", "deep", "dino_model"),
    )

    def _check_effects(self) -> None:
        # dino_model has an effect without --alignment here: --deep asks it.
        RunOptions._check_effects(self)


@dataclass(frozen=True)
class DoctorRepaOptions(TrainRepaOptions):
    model: DoctorRepaModelOptions = field(default_factory=DoctorRepaModelOptions)
    doctor: DoctorOptions = field(default_factory=DoctorOptions)


def parse_doctor_options(
    argv: Sequence[str], *, prog: str, description: str | None
) -> tuple[RunOptions, DoctorOptions]:
    """Options of the training, of whichever script the words are, and doctor.py's own. Raises UserError; see `parse`."""
    words = list(argv)
    options: DoctorNetworkOptions | DoctorRepaOptions
    if _is_of_classes(words):
        others = [PrepareCacheOptions]
        options = parse(DoctorRepaOptions, words, prog=prog, description=description, also_known=others, dialect=REPA)
    else:
        options = parse(DoctorNetworkOptions, words, prog=prog, description=description, dialect=KOHYA)
    return options, options.doctor


def _is_of_classes(words: Sequence[str]) -> bool:
    """Whether they are options of train_repa.py: class pictures, or a TOML file that holds options."""
    if values_in(list(words), "train_data"):
        return True
    file = next(iter(reversed(values_in(list(words), "dataset_config"))), None)
    if file is None:
        return False
    try:
        content = read_toml(find_config(file))
    except UserError:
        return False  # to be said by the parser
    return bool(content.keys() - {"general", "datasets"})
