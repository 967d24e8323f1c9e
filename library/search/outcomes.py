"""How a training ended, kept in its folder: whoever finds its parent dead need not train it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from library.files import write_json
from library.search.messages import Outcome

OUTCOME_FILE = "outcome.json"

_ADAPTER = TypeAdapter(Outcome)


def write_outcome(folder: Path | str, outcome: Outcome) -> None:
    """Write it before it is sent: a trainer's last act. Raises RunFailed where the disk refuses."""
    write_json(Path(folder) / OUTCOME_FILE, dataclasses.asdict(outcome))


def read_outcome(folder: Path | str, trial: int) -> Outcome | None:
    """What was written for that trial; None where there is nothing, or nothing of use."""
    try:
        outcome = _ADAPTER.validate_json((Path(folder) / OUTCOME_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return outcome if outcome.trial == trial else None
