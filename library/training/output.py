"""The output folder of a run: locked by one process at a time, with the resolved options in it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from library.files import lock_folder, recover_folders, write_text
from library.training.tracking import MetricLog


def own_output(folder: Path) -> AbstractContextManager[object]:
    """Lock the output folder for this run, and tidy up after one that was killed."""
    lock = lock_folder(folder, exclusive=True, what="The output folder")
    recover_folders(folder)
    return nullcontext() if lock is None else lock


def open_log(
    folder: Path, board: Path, options: Mapping[str, Any], step: int, references: Mapping[str, float]
) -> MetricLog:
    """Metrics of the main process, headed by the resolved options and the reference values."""
    import toml

    resolved = toml.dumps({name: value for name, value in options.items() if value is not None})
    write_text(folder / "options.toml", resolved)
    log = MetricLog(folder / "metrics.jsonl", board, step)
    log.text("options", f"```\n{resolved}```")
    log.add(step, dict(references))
    return log
