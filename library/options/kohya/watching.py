"""What is looked at while training, and what is written into files about it: validation, pictures, logs, metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import positive, require
from library.options.given import OptionalCount, Verbatim

PROMPT_FILES = (".txt", ".toml", ".json")


@dataclass(frozen=True)
class ValidationOptions:
    """Pictures held out to measure the loss on."""

    validation_split: float = 0.0
    """Share of the training pictures that is held out, chosen by a stable hash, to measure the loss on."""
    validation_seed: int | None = None
    """Seed of the noise of validation, and of this choice. Default: seed."""
    validate_every_n_epochs: OptionalCount = None
    """Epochs between validations. Default: 1, or none where validate_every_n_steps is given."""
    max_validation_steps: int | None = None
    """Batches of a validation at most. Default: all that was held out."""
    early_stop: OptionalCount = None
    """Stop after so many validations without a better loss. Default: never."""

    def __post_init__(self) -> None:
        require(
            0 <= self.validation_split < 1,
            "validation_split",
            f"must be at least 0 and below 1, got {self.validation_split}.",
        )
        for name in ("validate_every_n_epochs", "max_validation_steps", "early_stop"):
            positive(name, getattr(self, name))
        require(
            self.validation_seed is None or 0 <= self.validation_seed < 2**63,
            "validation_seed",
            f"must be a whole number from 0 to 2^63 - 1, got {self.validation_seed}.",
        )


@dataclass(frozen=True)
class SampleOptions:
    """Pictures drawn while training."""

    sample_prompts: Path | None = None
    """Prompts to draw while training, .txt (one a line), .toml or .json. Read anew each time."""
    sample_every_n_steps: OptionalCount = None
    """Optimizer steps between pictures. With neither this nor sample_every_n_epochs they are drawn at the end."""
    sample_every_n_epochs: OptionalCount = None
    """Epochs between pictures; decides where both are given."""
    sample_at_first: bool = False
    """Draw pictures before the first step too."""
    sample_sampler: str | None = None
    """Sampler of prompts that name none: kohya's word (euler_a), A1111's (DPM++ 2M Karras) or ComfyUI's (dpmpp_2m_karras).
    Default: DPM++ 2M Karras."""

    def __post_init__(self) -> None:
        positive("sample_every_n_steps", self.sample_every_n_steps)
        positive("sample_every_n_epochs", self.sample_every_n_epochs)
        if self.sample_prompts is None:
            for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
                require(
                    getattr(self, name) in (None, False),
                    name,
                    "has no effect without sample_prompts, the file of prompts. Give one, or leave it out.",
                )
            return
        require(
            self.sample_prompts.suffix.lower() in PROMPT_FILES,
            "sample_prompts",
            f"must be a {', '.join(PROMPT_FILES)} file, got {self.sample_prompts}.",
        )
        require(self.sample_prompts.is_file(), "sample_prompts", f"{self.sample_prompts} does not exist.")


@dataclass(frozen=True)
class LoggingOptions:
    """Metrics for TensorBoard."""

    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Where metrics go. They go to TensorBoard and metrics.jsonl in any case; wandb is not offered."""
    log_prefix: str | None = None
    """Text that the name of the TensorBoard run begins with, before its time."""
    log_tracker_name: str | None = None
    """Name of the innermost TensorBoard folder. Default: network_train."""
    log_config: bool = False
    """The resolved options go to TensorBoard and to options.toml in any case."""

    def __post_init__(self) -> None:
        require(
            self.log_with in (None, "tensorboard"),
            "log_with",
            f"{self.log_with} is not offered: nothing is sent to other machines. Use tensorboard; metrics.jsonl has the same "
            "rows for wandb to import.",
        )
        for name in ("log_prefix", "log_tracker_name"):
            value = getattr(self, name)
            require(
                value is None or not set(value) & set('/\\:*?"<>|'),
                name,
                f"is part of a folder's name and must have no path separators, got {value!r}.",
            )


@dataclass(frozen=True)
class MetadataOptions:
    """What the adapter file says about itself."""

    no_metadata: bool = False
    """Leave all ss_* metadata out of the adapter but what is needed to load it."""
    training_comment: Verbatim | None = None
    """Text for ss_training_comment, such as the trigger words."""
    metadata_title: Verbatim | None = None
    """modelspec.title. Default: output_name."""
    metadata_author: Verbatim | None = None
    """modelspec.author of the adapter file."""
    metadata_description: Verbatim | None = None
    """modelspec.description of the adapter file."""
    metadata_license: Verbatim | None = None
    """modelspec.license of the adapter file."""
    metadata_tags: Verbatim | None = None
    """modelspec.tags, separated by commas."""
    metadata_usage_hint: Verbatim | None = None
    """modelspec.usage_hint of the adapter file."""
    metadata_thumbnail: str | None = None
    """modelspec.thumbnail, a picture as a data: URL."""
    metadata_merged_from: str | None = None
    """modelspec.merged_from, where the adapter is a mixture."""
    metadata_trigger_phrase: Verbatim | None = None
    """modelspec.trigger_phrase of the adapter file."""
    metadata_preprocessor: Verbatim | None = None
    """modelspec.preprocessor of the adapter file."""
    metadata_is_negative_embedding: str | None = None
    """modelspec.is_negative_embedding of the adapter file."""

    def __post_init__(self) -> None:
        require(
            not (self.no_metadata and self.training_comment),
            "training_comment",
            "has no effect with no_metadata, which leaves it out.",
        )
        require(
            self.metadata_thumbnail is None or self.metadata_thumbnail.startswith("data:"),
            "metadata_thumbnail",
            "must be a data: URL, such as data:image/jpeg;base64,...",
        )
