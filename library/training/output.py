"""The output folder of a run: locked by one process at a time, with the resolved options in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from library.files import lock_folder, recover_folders, write_text
from library.options.toml_file import read_toml
from library.training.earlier import RESOLVED
from library.training.metrics_file import METRICS
from library.training.tracking import MetricLog

RUN_PAGE = "run.html"


def own_output(folder: Path) -> AbstractContextManager[object]:
    """Lock the output folder for this run, and tidy up after one that was killed."""
    lock = lock_folder(folder, exclusive=True, what="The output folder")
    recover_folders(folder)
    return nullcontext() if lock is None else lock


def set_aside(folder: Path, name: str) -> None:
    """Keep the metrics and options that a run of another name left in the folder, as metrics-NAME.jsonl, options-NAME.toml and
    run-NAME.html; a run that comes back finds its own again."""
    if not (folder / RESOLVED).is_file():
        return
    last = read_toml(folder / RESOLVED).get("output_name", name)
    if last == name:
        return
    for file in (RESOLVED, METRICS, RUN_PAGE):
        path = folder / file
        of_last, own = (path.with_name(f"{path.stem}-{run}{path.suffix}") for run in (last, name))
        if path.exists():
            os.replace(path, of_last)
        if own.exists():
            os.replace(own, path)


def open_log(
    folder: Path, board: Path, options: Mapping[str, Any], step: int, references: Mapping[str, float]
) -> MetricLog:
    """Metrics of the main process, headed by the resolved options and the reference values."""
    import toml

    resolved = toml.dumps({name: value for name, value in options.items() if value is not None})
    set_aside(folder, options["output_name"])
    write_text(folder / RESOLVED, resolved)
    log = MetricLog(folder / METRICS, board, step)
    log.text("options", f"```\n{resolved}```")
    log.add(step, dict(references))
    return log
