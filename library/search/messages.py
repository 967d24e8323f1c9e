"""What the parent of a study and the process that trains say to each other: one JSON object a line, both ways.

    parent -> trainer   {"kind": "job", ...Job}    {"kind": "stop", "trial": 7}    end of input: end at once
    trainer -> parent   {"kind": "ready"}    {"kind": "begun", ...Begun}    {"kind": "slot", ...Slot}
                        {"kind": "alive", ...Progress}    {"kind": "ended", ...Outcome}

A slot is answered, with {"kind": "go", "trial": 7} or with a stop, before the training goes on: whether a trial is pruned
there must not depend on who is faster. The last slot is not. A trainer that is at work says that it is alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SLOTS = 10
"""A trial's own progress in tenths: steps of different trials cannot be compared, tenths of their budgets can."""

Script = Literal["train_network", "train_repa"]
ObjectiveName = Literal["loss", "image"]
Ending = Literal["done", "stopped", "diverged", "memory", "refused", "failed"]
"""How a trial ended: `stopped` was asked to, `refused` is a wrong configuration, `failed` the machine's fault."""


# What a trial decides itself, and what it has no use for: it leaves no states, and its slots are its validations.
OWN = frozenset(
    """
    output_dir output_name logging_dir log_prefix log_tracker_name seed resume allow_changed_options dry_run config_file
    output_config save_every_n_epochs save_n_epoch_ratio save_every_n_steps save_last_n_epochs save_last_n_steps
    save_last_n_epochs_state save_last_n_steps_state save_last_n_states save_state save_state_on_train_end
    sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first sample_sampler validate_every_n_epochs
    validate_every_n_steps max_validation_steps early_stop initial_step initial_epoch skip_until_initial_step
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Job:
    """One training run to do.

    Attributes:
        trial: number of the trial, from 1.
        folder: where everything of the trial goes, absolute.
        options: flat names of the script's options and their values, as in a --config_file.
        seed: of the training; the evaluation's seeds are fixed.
        judging: settings of the objective, see `library.search.trainer.judge_by_pictures`; that of the loss has none.
    """

    trial: int
    folder: str
    script: Script
    objective: ObjectiveName
    options: dict[str, Any]
    seed: int
    judging: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    trial: int
    steps: int


@dataclass(frozen=True)
class Progress:
    """Where a trial is. step: 0 while it prepares."""

    trial: int
    step: int
    images_per_second: float = 0.0


@dataclass(frozen=True)
class Slot:
    """A value at the end of a tenth of a trial; lower is better.

    Attributes:
        slot: 1 to SLOTS.
        value: of the objective.
        components: what the value was made of, such as the log-ratio in each band of timesteps.
    """

    trial: int
    slot: int
    step: int
    value: float
    components: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        message: one sentence where it did not end well.
        value: the best slot's; None where there is none.
        file: the adapter of the best slot, absolute; None where none was written.
        seconds: the whole trial took.
    """

    trial: int
    ending: Ending
    message: str = ""
    value: float | None = None
    best_slot: int | None = None
    components: dict[str, float] = field(default_factory=dict)
    file: str | None = None
    seconds: float = 0.0
