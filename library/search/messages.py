"""Messages between the parent of a study and the process that trains: one JSON object a line, in both directions.

    parent -> trainer   {"kind": "job", ...Job}    {"kind": "stop", "trial": 7}    end of input: end at once
    trainer -> parent   {"kind": "ready"}    {"kind": "begun", ...Begun}    {"kind": "slot", ...Slot}
                        {"kind": "alive", ...Progress}    {"kind": "ended", ...Outcome}

The parent answers each slot but the last with {"kind": "go", "trial": 7} or with a stop, and the trainer waits for that:
whether a trial is pruned must not depend on which of the two is faster. While it works, a trainer sends "alive" every few seconds.
A trial's Outcome is also written into its folder, where it is found if the parent dies before it reads the message.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from library.files import write_json
from library.options.search import ObjectiveName, Script

SLOTS = 10
"""A trial is judged at each tenth of its steps: steps of trials of different lengths cannot be compared, their tenths can."""

Ending = Literal["done", "stopped", "diverged", "memory", "refused", "failed"]
"""How a trial ended. stopped: the study asked for it. refused: its configuration is wrong. failed: the machine's fault."""

OUTCOME_FILE = "outcome.json"

Message = TypeVar("Message")


@dataclass(frozen=True)
class Job:
    """One training run to do.

    Attributes:
        trial: number of the trial, from 1.
        folder: where all files of the trial go, absolute.
        options: flat names of the script's options and their values, as in a --config_file.
        seed: of the training. The evaluation has fixed seeds.
        judging: settings of the objective image, see `library.search.judging`; the objective loss has none.
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
    """A trial starts to train. steps: optimizer steps of the whole trial."""

    trial: int
    steps: int


@dataclass(frozen=True)
class Progress:
    """How far a trial is. step: 0 while it prepares."""

    trial: int
    step: int
    images_per_second: float = 0.0


@dataclass(frozen=True)
class Slot:
    """A value measured at the end of a tenth of a trial; lower is better.

    Attributes:
        slot: 1 to SLOTS.
        value: of the objective.
        components: the terms of the value, such as the log-ratio in each band of timesteps.
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
        value: of the best slot; None where no slot was reached.
        file: the adapter of the best slot, absolute; None where none was written.
        seconds: time of the whole trial.
    """

    trial: int
    ending: Ending
    message: str = ""
    value: float | None = None
    best_slot: int | None = None
    components: dict[str, float] = field(default_factory=dict)
    file: str | None = None
    seconds: float = 0.0


_OUTCOME = TypeAdapter(Outcome)


def to_line(kind: str, message: Any = None, **values: Any) -> bytes:
    """A message as a line of JSON. message: a dataclass. Raises ValueError for NaN and infinity, which JSON does not have."""
    content = {} if message is None else dataclasses.asdict(message)
    return json.dumps({"kind": kind, **content, **values}, allow_nan=False).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any] | None:
    """The message in a line; None where there is none, such as in a line that a kill cut off."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("kind"), str) else None


def read_as(kind: type[Message], content: dict[str, Any]) -> Message:
    """A message as its dataclass. Unknown fields are left out. Raises TypeError where fields are missing."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in names})


def write_outcome(folder: Path | str, outcome: Outcome) -> None:
    """Write the outcome into the trial's folder, before it is sent. Raises RunFailed where the disk refuses."""
    write_json(Path(folder) / OUTCOME_FILE, dataclasses.asdict(outcome))


def read_outcome(folder: Path | str, trial: int) -> Outcome | None:
    """The outcome of that trial in its folder; None where there is none, or it is damaged or of another trial."""
    try:
        outcome = _OUTCOME.validate_json((Path(folder) / OUTCOME_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return outcome if outcome.trial == trial else None
