"""The training that a study on SD1.5 found, and the one on SDXL that the rules make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from library.data.dataset_schema import Dataset
from library.options.network import TrainNetworkOptions
from library.search.best_params import RateReference


@dataclass(frozen=True)
class PictureFacts:
    """What the rules need to know of a dataset's pictures.

    Attributes:
        count: without regularisation pictures.
        median_area: in pixels; 0 where there are no pictures.
    """

    count: int
    median_area: float


@dataclass(frozen=True)
class Sd15Training:
    """The best training of a study on SD1.5.

    Attributes:
        pictures: one for each dataset.
        validation_share: the validation_split that holds out as many pictures as a study does by itself; 0 where there are too
            few pictures for that, None where the datasets' own validation_split holds some out.
        pictures_per_step: with which the learning rate was found; None where the datasets are the study's own.
    """

    options: TrainNetworkOptions
    datasets: tuple[Dataset, ...]
    pictures: tuple[PictureFacts, ...]
    reference: RateReference
    validation_share: float | None = None
    pictures_per_step: int | None = None

    @property
    def accumulation(self) -> Fraction:
        """Batches per step: the option, or what makes the datasets' batches the study's pictures per step."""
        if self.pictures_per_step is None:
            return Fraction(self.options.training.gradient_accumulation_steps)
        return Fraction(self.pictures_per_step, max(dataset.batch_size for dataset in self.datasets))

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
        """Whether the optimizer finds the learning rate by itself: one for all weights."""
        name = self.options.optimizer.optimizer_name.rpartition(".")[2].lower()
        return name.startswith(("prodigy", "dadapt")) or self.options.optimizer.optimizer_sets_rate


@dataclass(frozen=True)
class SdxlTraining:
    """The training on SDXL, so far as the rules have made it.

    Attributes:
        options: flat, under the script's names, without those of datasets; absent ones have the script's default.
        settled: names that a rule has set, so that they are written even where they are the default.
        warnings: sentences for the user.
    """

    options: Mapping[str, Any]
    datasets: tuple[Dataset, ...]
    settled: frozenset[str] = field(default=frozenset())
    warnings: tuple[str, ...] = ()

    def with_options(self, **values: Any) -> SdxlTraining:
        return replace(self, options={**self.options, **values}, settled=self.settled | values.keys())

    def without(self, names: Iterable[str]) -> SdxlTraining:
        dropped = set(names)
        kept = {name: value for name, value in self.options.items() if name not in dropped}
        return replace(self, options=kept, settled=self.settled - dropped)

    def with_datasets(self, datasets: Iterable[Dataset]) -> SdxlTraining:
        return replace(self, datasets=tuple(datasets))

    def warn(self, *sentences: str) -> SdxlTraining:
        return replace(self, warnings=(*self.warnings, *sentences))
