"""What the options of every training have in common: what the engine reads, whichever script they are of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from library.options.alignment import AlignmentOptions
from library.options.checks import require
from library.options.data import ClassPictureOptions
from library.options.flow import FlowOptions
from library.options.kohya.dataset import DEMO_DATA, CaptionOptions, DatasetOptions, NetworkCacheOptions
from library.options.kohya.network import NetworkOptions
from library.options.kohya.objective import NetworkObjectiveOptions, NoiseOptions
from library.options.kohya.optimizer import NetworkOptimizerOptions
from library.options.kohya.training import (
    NetworkModelOptions,
    NetworkSpeedOptions,
    NetworkTrainingOptions,
    TextEncoderOptions,
)
from library.options.kohya.watching import MetadataOptions, SampleOptions, ValidationOptions
from library.options.teacher import DistillationOptions
from library.options.text_fusion import TextFusionOptions
from library.options.timestep_bins import TimestepBinOptions
from library.options.training import OutputOptions
from library.words import plural


@dataclass(frozen=True)
class RunOptions:
    """Groups of options that every training has; a script gives them its defaults."""

    model: NetworkModelOptions = field(default_factory=NetworkModelOptions)
    text: TextEncoderOptions = field(default_factory=TextEncoderOptions)
    fusion: TextFusionOptions = field(default_factory=TextFusionOptions)
    data: DatasetOptions = field(default_factory=DatasetOptions)
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    cache: NetworkCacheOptions = field(default_factory=NetworkCacheOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    objective: NetworkObjectiveOptions = field(default_factory=NetworkObjectiveOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    bins: TimestepBinOptions = field(default_factory=TimestepBinOptions)
    optimizer: NetworkOptimizerOptions = field(default_factory=NetworkOptimizerOptions)
    training: NetworkTrainingOptions = field(default_factory=NetworkTrainingOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    speed: NetworkSpeedOptions = field(default_factory=NetworkSpeedOptions)

    options_beside_datasets: ClassVar[bool] = False
    """Whether the dataset file may hold options, too."""

    def __post_init__(self) -> None:
        self._check_data()
        self._check_caches()
        self._check_trained_parts()
        self._check_effects()

    def _check_data(self) -> None:
        """Where the pictures come from, once."""
        require(
            self.data.conditioning_data_dir is None or self.objective.masked_loss,
            "conditioning_data_dir",
            "has masks, which have no effect without masked_loss.",
        )

    def _check_caches(self) -> None:
        cache, data = self.cache, self.data
        if cache.asks_for_latents:
            for name in ("color_aug", "random_crop", "face_crop_aug_range"):
                require(
                    not getattr(data, name),
                    name,
                    "needs fresh pixels each time and cannot be used with cache_latents. Leave one of them out.",
                )
        if not cache.caches_text:
            return
        changed = self.captions.changes_captions
        require(
            changed is None,
            "cache_text_encoder_outputs",
            f"encodes each caption once, and {changed} changes captions each time. Leave one of them out.",
        )
        require(
            not self.trains_text_encoders,
            "cache_text_encoder_outputs",
            "keeps what the text encoders say, and they are trained. Add --network_train_unet_only.",
        )

    def _check_trained_parts(self) -> None:
        network, optimizer = self.network, self.optimizer
        require(
            not (network.network_train_unet_only and any(optimizer.text_encoder_lr)),
            "text_encoder_lr",
            "has no effect with network_train_unet_only. Leave one of them out.",
        )
        require(
            not (network.network_train_text_encoder_only and optimizer.unet_lr),
            "unet_lr",
            "has no effect with network_train_text_encoder_only. Leave one of them out.",
        )
        require(
            self.trains_unet or self.trains_text_encoders,
            "unet_lr",
            "and text_encoder_lr leave nothing to train. Raise one of them.",
        )
        require(
            self.trains_unet or not network.train_parts,
            "train_parts",
            "are of the U-Net, and the U-Net is not trained.",
        )
        require(
            bool(network.train_parts) or optimizer.train_parts_lr is None,
            "train_parts_lr",
            "has no effect without train_parts.",
        )
        require(
            self.trains_unet or not self.alignment.alignment,
            "alignment",
            "trains features of the U-Net, and the U-Net is not trained.",
        )
        require(
            not self.alignment.alignment or optimizer.learning_rate > 0 or optimizer.align_learning_rate is not None,
            "align_learning_rate",
            "is missing: AlignHeads learn at learning_rate, which is 0.",
        )

    def _check_effects(self) -> None:
        """What would have no effect beside the rest, or cannot be had together."""
        self._check_teachers()
        require(
            not self.bins.given or self.flow.kind == "bins",
            next(iter(self.bins.given), ""),
            "has no effect without timestep_sampling bins.",
        )
        require(
            self.fusion.text_fusion is None or not self.trains_text_encoders,
            "text_fusion",
            "is for text encoders as they were, and they are trained. Add --network_train_unet_only.",
        )
        require(
            self.speed.compile != "graphs" or not self.noise.multires_noise_iterations,
            "compile",
            "graphs repeats the same kernels each step, and multires_noise_iterations draws noise of other sizes each time. Leave "
            "one of them out.",
        )
        require(
            self.model.base_quantization != "stored" or not self.network.base_weights,
            "base_quantization",
            "stored is the base as its file has it, and base_weights change it. Leave one of them out.",
        )
        require(
            self.training.initial_step is None or self.output.resume == "auto",
            "initial_step",
            "has no effect with resume: a state knows its own step.",
        )
        require(
            self.training.initial_epoch is None or self.output.resume == "auto",
            "initial_epoch",
            "has no effect with resume: a state knows its own step.",
        )

    def _check_teachers(self) -> None:
        o, teachers = self.alignment, plural(len(self.model.dino_model), "teacher")
        for name, allowed in (("teacher_weights", (0,)), ("dino_resolution", (1,))):
            count = len(getattr(o, name))
            require(
                count in (*allowed, len(self.model.dino_model)),
                name,
                f"has {plural(count, 'number')} for {teachers} (dino_model): give one for each, or "
                f"{'none' if 0 in allowed else 'one for all'}.",
            )
        require(
            not o.alignment or o.needs_teacher or len(self.model.dino_model) == 1,
            "dino_model",
            "has no effect with manifold_target latents, which asks no teacher.",
        )

    def metrics_folder(self, now: datetime) -> Path:
        """Where TensorBoard finds the metrics of a run that begins now."""
        return self.output.log_dir

    @property
    def dataset_file(self) -> Path | None:
        """The TOML file of captioned data sets, where one is given."""
        return None

    @property
    def class_pictures(self) -> ClassPictureOptions | None:
        """The class pictures that are trained on, where these are no captioned ones."""
        return None

    @property
    def teacher(self) -> DistillationOptions | None:
        """Where a teacher drew the latents that are trained on; None for pictures."""
        return None

    @property
    def uses_demo(self) -> bool:
        """Whether the generated pictures are trained on, with captions."""
        return str(self.data.train_data_dir) == DEMO_DATA

    @property
    def trains_unet(self) -> bool:
        return not self.network.network_train_text_encoder_only and self.optimizer.unet_rate > 0

    @property
    def trains_text_encoders(self) -> bool:
        return not self.network.network_train_unet_only and self.optimizer.trains_text_encoders

    def dataset_defaults(self) -> dict[str, Any]:
        """What a dataset TOML inherits where it says nothing, under kohya's names; None is not given."""
        values = {
            f.name: getattr(group, f.name) for group in (self.data, self.captions) for f in dataclasses.fields(group)
        }
        values["keep_tokens_separator"] = values["keep_tokens_separator"] or None
        values["train_batch_size"] = self.training.train_batch_size
        values["validation_split"] = self.validation.validation_split
        values["validation_seed"] = self.validation.validation_seed
        return values
