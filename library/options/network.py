"""All options of train_network.py: kohya's, under kohya's names, and the few of this project beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.checks import require
from library.options.data import DEMO_DATA
from library.options.dialect import Dialect
from library.options.kohya_dataset import CaptionOptions, DatasetOptions, NetworkCacheOptions
from library.options.kohya_network import NetworkAlignmentOptions, NetworkOptions
from library.options.kohya_objective import NetworkObjectiveOptions, NoiseOptions
from library.options.kohya_optimizer import NetworkOptimizerOptions
from library.options.kohya_refused import ALIASES, REFUSED
from library.options.kohya_samples import LoggingOptions, MetadataOptions, SampleOptions, ValidationOptions
from library.options.kohya_training import (
    NetworkConfigOptions,
    NetworkModelOptions,
    NetworkOutputOptions,
    NetworkSpeedOptions,
    NetworkTrainingOptions,
    TextEncoderOptions,
)
from library.options.parser import flatten, parse

KOHYA = Dialect(
    config_option="config_file",
    output_option="output_config",
    ignore_option="ignore_unknown_keys",
    later_section_wins=True,
    loose_values=True,
    aliases=ALIASES,
    refused=REFUSED,
)

# What is about reading and writing such a file, not about training.
_NOT_IN_A_FILE = ("config_file", "output_config", "ignore_unknown_keys", "dry_run")


@dataclass(frozen=True)
class TrainNetworkOptions:
    """kohya's defaults, but for those in library/options/kohya_differences.py."""

    config: NetworkConfigOptions = field(default_factory=NetworkConfigOptions)
    model: NetworkModelOptions = field(default_factory=NetworkModelOptions)
    text: TextEncoderOptions = field(default_factory=TextEncoderOptions)
    data: DatasetOptions = field(default_factory=DatasetOptions)
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    cache: NetworkCacheOptions = field(default_factory=NetworkCacheOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    alignment: NetworkAlignmentOptions = field(default_factory=NetworkAlignmentOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    objective: NetworkObjectiveOptions = field(default_factory=NetworkObjectiveOptions)
    optimizer: NetworkOptimizerOptions = field(default_factory=NetworkOptimizerOptions)
    training: NetworkTrainingOptions = field(default_factory=NetworkTrainingOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    output: NetworkOutputOptions = field(default_factory=NetworkOutputOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    speed: NetworkSpeedOptions = field(default_factory=NetworkSpeedOptions)

    def __post_init__(self) -> None:
        self._check_data()
        self._check_caches()
        self._check_trained_parts()
        self._check_effects()

    def _check_data(self) -> None:
        """Where the data come from, once."""
        data, config = self.data, self.config
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            require(
                config.dataset_config is None or getattr(data, name) is None,
                name,
                "has no effect with dataset_config, which names the pictures. Leave one of them out.",
            )
        has_data = config.dataset_config is not None or data.train_data_dir is not None
        require(
            has_data or self.model.pretrained_model_name_or_path.startswith("tiny-"),
            "dataset_config",
            f"and train_data_dir are both absent: nothing to train {self.model.pretrained_model_name_or_path} on. "
            f"--train_data_dir {DEMO_DATA} generates pictures.",
        )
        require(
            data.conditioning_data_dir is None or self.objective.masked_loss,
            "conditioning_data_dir",
            "has masks, which have no effect without masked_loss.",
        )
        if config.dataset_config is None:
            self._check_without_dataset_file()

    def _check_without_dataset_file(self) -> None:
        """What would have no effect, had a dataset TOML not its own say in it."""
        has_masks = self.data.alpha_mask or self.data.conditioning_data_dir is not None
        for name in ("masked_loss", "masked_loss_renormalize"):
            require(
                has_masks or not getattr(self.objective, name),
                name,
                "needs masks: conditioning_data_dir or alpha_mask.",
            )
        if self.validation.validation_split > 0:
            return
        for group in (self.validation, self.output):
            for name in (
                "validation_seed",
                "validate_every_n_epochs",
                "validate_every_n_steps",
                "max_validation_steps",
                "early_stop",
            ):
                require(
                    getattr(group, name, None) is None,
                    name,
                    "has no effect without validation_split, the share that is held out.",
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
            self.trains_unet or not self.alignment.alignment,
            "alignment",
            "trains features of the U-Net, and the U-Net is not trained.",
        )

    def _check_effects(self) -> None:
        """What would have no effect beside the rest."""
        defaults = {f.name: f.default for f in dataclasses.fields(NetworkModelOptions)}
        if not self.alignment.alignment:
            require(self.model.dino_model == defaults["dino_model"], "dino_model", "has no effect without --alignment.")
            of_heads = (f for f in dataclasses.fields(NetworkOptimizerOptions) if f.name.startswith("align_"))
            for one in of_heads:
                require(
                    getattr(self.optimizer, one.name) == one.default, one.name, "has no effect without --alignment."
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

    @property
    def trains_unet(self) -> bool:
        return not self.network.network_train_text_encoder_only and self.optimizer.unet_rate > 0

    @property
    def trains_text_encoders(self) -> bool:
        return not self.network.network_train_unet_only and self.optimizer.trains_text_encoders

    @property
    def uses_demo(self) -> bool:
        """Whether the generated demo pictures are trained on, by name or because nothing else is given."""
        folder = self.data.train_data_dir
        return str(folder) == DEMO_DATA or (folder is None and self.config.dataset_config is None)

    @property
    def caches_latents(self) -> bool:
        """Whether latents are cached, as far as these options go; a dataset TOML may ask for fresh pixels."""
        return self.cache.cache_latents is not False and not self.data.needs_fresh_pixels

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


def parse_network_options(argv: list[str], *, prog: str, description: str | None) -> TrainNetworkOptions:
    """`argv` and the --config_file it names, as checked options.

    Raises UserError: unknown options and keys (all, with the nearest names and lines), refused ones with the reason,
    mistyped values, combinations that cannot be.
    """
    return parse(TrainNetworkOptions, argv, prog=prog, description=description, dialect=KOHYA)


def write_config(options: TrainNetworkOptions) -> Path:
    """Write every option that has a value into a new config_file, a section for each group, and return its path.

    Read back with --config_file it gives the same options. Raises UserError where the file is there already.
    """
    import toml

    from library.files import write_text

    name = options.config.config_file
    assert name is not None
    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    if path.exists():
        raise UserError(f"{path} is there already. Name another file with --config_file, or remove it.")
    sections: dict[str, dict[str, Any]] = {}
    for group in dataclasses.fields(options):
        values = flatten(getattr(options, group.name))
        section = {name: value for name, value in values.items() if value is not None and name not in _NOT_IN_A_FILE}
        sections |= {group.name: section} if section else {}
    write_text(path, toml.dumps(sections))
    return path
