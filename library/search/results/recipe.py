"""What a study recommends, as words and as a command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.scripts import option_default, option_types
from library.search.best_params import BestParams, read_best_params
from library.search.results.best_trial import BEST_FILE
from library.search.results.status import StudyView, shown_params

OF_A_TRIAL = frozenset(
    {"output_dir", "output_name", "logging_dir", "cache_dir", "resume", "config_file", "dry_run", "overwrite"}
)
"""Options that say where a trial went, and not what it was."""


def recipe_words(view: StudyView) -> str:
    """The best parameters and what they are worth, in a sentence; "" before there is a value."""
    best = view.verdict.best
    if best is None:
        return ""
    value = best.mean if best.again else best.value
    worth = f"the value is {value:.4f}"
    if view.terms["objective"] == "loss":
        percent = 100 * (math.exp(value) - 1)
        worth = (
            f"the loss on held-out pictures is {abs(percent):.1f} % {'below' if percent < 0 else 'above'} the base's"
        )
    sure = "" if view.verdict.is_winner else ", which may be chance"
    return f"{shown_params(best.params, ', ')}: {worth}{sure} (trial {best.trial})."


def recipe_command(folder: Path, name: str) -> str | None:
    """What trains the best of the study again: the options that differ from the script's defaults. None where there is no best."""
    try:
        best = read_best_params(folder / BEST_FILE)
    except UserError:
        return None
    words = ["python", f"{best.script}.py", *_given(best)]
    words += ["--output_dir", f"outputs/{name}_best", "--output_name", name]
    return " ".join(map(shlex.quote, words))


def _given(best: BestParams) -> list[str]:
    config: Mapping[str, Any] = {"pretrained_model_name_or_path": best.base_model.path, **best.train_config}
    known, words = option_types(best.script), list[str]()
    for option, value in config.items():
        if option in OF_A_TRIAL or option not in known or value is None:
            continue
        if _plain(option_default(best.script, option)) == _plain(value):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no_{option}")
        elif isinstance(value, list | tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


def _plain(value: Any) -> Any:
    """For comparing: paths and tuples are texts and lists in a file."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
