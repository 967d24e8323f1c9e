"""What the scripts share. Rooms and the arrows between them: docs/architecture.md."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("Interrupted.", file=sys.stderr)


# Ctrl-C while a script still imports; later `library.errors.script` answers it.
sys.excepthook = _without_traceback


def project_version() -> str:
    """Of this project, as installed; "unknown" where it only lies there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("repa-scripts")
    except PackageNotFoundError:
        return "unknown"
