"""All options of train_network.py: kohya's, under kohya's names, and the few of this project beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from library.errors import UserError
from library.options.checks import require
from library.options.dialect import Dialect
from library.options.kohya import network_args
from library.options.kohya.dataset import DEMO_DATA
from library.options.kohya.network import NetworkAlignmentOptions
from library.options.kohya.optimizer import OPTIMIZER_KEYS
from library.options.kohya.refused import ALIASES, REFUSED
from library.options.kohya.training import NetworkConfigOptions, NetworkOutputOptions
from library.options.kohya.watching import LoggingOptions
from library.options.parser import flatten, parse
from library.options.run import RunOptions
from library.options.teacher import DistillationOptions

KOHYA = Dialect(
    config_option="config_file",
    output_option="output_config",
    ignore_option="ignore_unknown_keys",
    later_section_wins=True,
    aliases=ALIASES,
    refused=REFUSED,
    words_of={"network_args": network_args.KEYS, "optimizer_args": OPTIMIZER_KEYS},
)

# What is about reading and writing such a file, not about training.
_NOT_IN_A_FILE = ("config_file", "output_config", "ignore_unknown_keys", "dry_run", "report")


@dataclass(frozen=True)
class TrainNetworkOptions(RunOptions):
    """kohya's defaults, but for those in library/options/kohya/differences.py."""

    config: NetworkConfigOptions = field(default_factory=NetworkConfigOptions)
    alignment: NetworkAlignmentOptions = field(default_factory=NetworkAlignmentOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    output: NetworkOutputOptions = field(default_factory=NetworkOutputOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)

    most_used: ClassVar[tuple[str, ...]] = (
        *(
            "config_file",
            "dataset_config",
            "train_data_dir",
            "pretrained_model_name_or_path",
            "output_dir",
            "output_name",
        ),
        *("network_dim", "network_alpha", "network_args", "network_train_unet_only", "resolution", "train_batch_size"),
        *("max_train_epochs", "learning_rate", "optimizer_type", "mixed_precision"),
        *("gradient_checkpointing", "save_every_n_epochs", "sample_prompts", "dry_run"),
    )

    def _check_data(self) -> None:
        super()._check_data()
        data, config = self.data, self.config
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            require(
                config.dataset_config is None or getattr(data, name) is None,
                name,
                "has no effect with dataset_config, which names the pictures. Leave one of them out.",
            )
        if self.teacher is not None:
            self._check_beside_teacher()
            return
        has_data = config.dataset_config is not None or data.train_data_dir is not None
        require(
            has_data or self.model.pretrained_model_name_or_path.startswith("tiny-"),
            "dataset_config",
            f"and train_data_dir are both absent: nothing to train {self.model.pretrained_model_name_or_path} on. "
            f"--train_data_dir {DEMO_DATA} generates pictures.",
        )
        if config.dataset_config is None:
            self._check_without_dataset_file()

    def _check_beside_teacher(self) -> None:
        """What is of pictures, and a teacher's latents are none."""
        given = [
            option.name for option in dataclasses.fields(self.data) if getattr(self.data, option.name) != option.default
        ]
        given += ["dataset_config"] if self.config.dataset_config is not None else []
        given += [name for name in ("masked_loss", "masked_loss_renormalize") if getattr(self.objective, name)]
        given += ["alignment"] if self.alignment.alignment else []
        given += ["vae"] if self.model.vae is not None else []
        for name in given:
            require(
                False,
                name,
                "is for pictures, and teacher_latents are latents already, with prompts for captions. Leave one of them out.",
            )
        self._check_without_validation()

    def _check_without_dataset_file(self) -> None:
        """What would have no effect, had a dataset TOML not its own say in it."""
        has_masks = self.data.alpha_mask or self.data.conditioning_data_dir is not None
        for name in ("masked_loss", "masked_loss_renormalize"):
            require(
                has_masks or not getattr(self.objective, name),
                name,
                "needs masks: conditioning_data_dir or alpha_mask.",
            )
        self._check_without_validation()

    def _check_without_validation(self) -> None:
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

    def _check_effects(self) -> None:
        super()._check_effects()
        if self.alignment.alignment:
            return
        groups = (
            (self.model, ("dino_model",)),
            (self.optimizer, ("align_learning_rate", "align_weight_decay", "align_max_grad_norm")),
        )
        for group, names in groups:
            for name in names:
                is_default = getattr(group, name) == getattr(type(group), name)
                require(is_default, name, "has no effect without --alignment.")

    def metrics_folder(self, now: datetime) -> Path:
        """{logging_dir}/{prefix}{time}/network_train, as kohya has it."""
        inner = self.logging.log_tracker_name or "network_train"
        return self.output.log_dir / f"{self.logging.log_prefix or ''}{now:%Y%m%d%H%M%S}" / inner

    @property
    def dataset_file(self) -> Path | None:
        return self.config.dataset_config

    @property
    def teacher(self) -> DistillationOptions | None:
        return None if self.distillation.teacher_latents is None else self.distillation

    @property
    def uses_demo(self) -> bool:
        """Whether the generated demo pictures are trained on, by name or because nothing else is given."""
        folder = self.data.train_data_dir
        if self.teacher is not None:
            return False
        return str(folder) == DEMO_DATA or (folder is None and self.config.dataset_config is None)


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
