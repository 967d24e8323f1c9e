"""What is carried from SD1.5 to SDXL: options and datasets, what was measured of them, and what a user may ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from library.data.dataset_schema import Dataset
from library.options.checks import positive, require
from library.options.network import TrainNetworkOptions
from library.search.best_params import RateReference

DIMS = (64, 96, 128)
SMALL_DIMS = (16, 32)

# The second last layer is the only one that SDXL's U-Net was trained on.
SDXL_CLIP_SKIP = 2


@dataclass(frozen=True)
class SdxlOptions:
    """What may be asked of the export; without any of it the rules decide."""

    sdxl_dim: int | None = None
    """network_dim on SDXL: 64, 96 or 128. Default: the study's, or the next one above it."""
    allow_small_dim: bool = False
    """Let network_dim be 16 or 32 on SDXL too: a subject of some hundred pictures needs no more, and files are small."""
    sdxl_alpha: float | None = None
    """network_alpha on SDXL; learning rates follow with the root of the ratio. Default: the study's."""
    max_batch: int = 4
    """Largest batch on SDXL. Batches are halved at least, and gradient_accumulation_steps makes up for it exactly."""
    rate_factor: float = 1.0
    """Multiply all learning rates; 0.7 is what SDXL's width asks for in theory."""
    train_text_encoders: bool = True
    """Train the text encoders if the study did; --no_train_text_encoders leaves them alone and caches their outputs."""
    sdxl_clip_skip: int | None = None
    """Write clip_skip 2 into the configuration, which SDXL has in any case. Default: left out."""

    def __post_init__(self) -> None:
        allowed = (*SMALL_DIMS, *DIMS) if self.allow_small_dim else DIMS
        smaller = "" if self.allow_small_dim else f"; --allow_small_dim adds {' and '.join(map(str, SMALL_DIMS))}"
        require(
            self.sdxl_dim is None or self.sdxl_dim in allowed,
            "sdxl_dim",
            f"must be one of {', '.join(map(str, allowed))}, got {self.sdxl_dim}{smaller}.",
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
class Pictures:
    """What the rules have to know of a dataset's pictures.

    Attributes:
        count: regularisation pictures are not counted.
        median_area: in pixels; 0 where there is none.
    """

    count: int
    median_area: float


@dataclass(frozen=True)
class Found:
    """The best training of a study, on SD1.5.

    Attributes:
        pictures: one for each dataset.
        validation_share: validation_split that holds out what a study does by itself; 0 where there are too few pictures for
            that, None where the datasets' own holds some out.
    """

    options: TrainNetworkOptions
    datasets: tuple[Dataset, ...]
    pictures: tuple[Pictures, ...]
    reference: RateReference
    validation_share: float | None = None

    @property
    def alpha(self) -> float:
        network = self.options.network
        return self.reference.alpha if network.dim_from_weights else network.alpha

    @property
    def dim(self) -> int:
        network = self.options.network
        return self.reference.dim if network.dim_from_weights else network.rank

    @property
    def finds_rate(self) -> bool:
        """Whether the optimizer works its learning rate out by itself: one for all weights."""
        name = self.options.optimizer.optimizer_name.rpartition(".")[2].lower()
        return name.startswith(("prodigy", "dadapt")) or self.options.optimizer.optimizer_sets_rate


@dataclass(frozen=True)
class Recipe:
    """A training on its way from one base to the other.

    Attributes:
        options: flat, under the script's names; what is absent has the script's default. None of datasets.
        settled: names that a rule has written, so that they are shown even where they are the default.
        warnings: sentences for the user.
    """

    options: Mapping[str, Any]
    datasets: tuple[Dataset, ...]
    settled: frozenset[str] = field(default=frozenset())
    warnings: tuple[str, ...] = ()

    def with_options(self, **values: Any) -> Recipe:
        return replace(self, options={**self.options, **values}, settled=self.settled | values.keys())

    def without(self, names: Iterable[str]) -> Recipe:
        dropped = set(names)
        kept = {name: value for name, value in self.options.items() if name not in dropped}
        return replace(self, options=kept, settled=self.settled - dropped)

    def with_datasets(self, datasets: Iterable[Dataset]) -> Recipe:
        return replace(self, datasets=tuple(datasets))

    def warn(self, *sentences: str) -> Recipe:
        return replace(self, warnings=(*self.warnings, *sentences))
