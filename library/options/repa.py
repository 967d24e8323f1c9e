"""All options of train_repa.py; prepare_cache.py takes its share of them, from the same file."""

from __future__ import annotations

from dataclasses import dataclass, field

from library.options.alignment import AdapterOptions, AlignmentOptions, ObjectiveOptions
from library.options.checks import require
from library.options.data import CacheOptions, DataOptions
from library.options.model import ModelOptions, SpeedOptions
from library.options.parser import ConfigOptions
from library.options.training import OptimizerOptions, OutputOptions, TrainingOptions


@dataclass(frozen=True)
class CachedRunOptions:
    """What building caches and training on them have in common."""

    config: ConfigOptions = field(default_factory=ConfigOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)


@dataclass(frozen=True)
class TrainRepaOptions(CachedRunOptions):
    """Track A of the U-REPA document, where nothing else is said."""

    adapters: AdapterOptions = field(default_factory=AdapterOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)

    def __post_init__(self) -> None:
        limit = self.data.max_train_samples
        require(
            limit is None or self.training.train_batch_size <= limit,
            "train_batch_size",
            f"{self.training.train_batch_size} is larger than max_train_samples {limit}.",
        )


@dataclass(frozen=True)
class PrepareCacheOptions(CachedRunOptions):
    max_data_loader_n_workers: int = 8
    """Worker processes that decode images."""
    alignment: bool = True
    """Cache teacher tokens; --no_alignment caches latents and prompts only."""
    verify: bool = False
    """Re-read every entry: counts, shapes, finiteness, spread; re-encode 8 at random and compare."""
