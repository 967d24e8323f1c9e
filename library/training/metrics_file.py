"""A run's metrics.jsonl: a row for every step that was said. No torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def metric_rows(file: Path) -> list[dict[str, Any]]:
    """The rows in their order, without lines that a kill tore. Raises OSError where the file is not there."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows
