"""What the scripts share. Rooms and the arrows between them: docs/architecture.md."""

from __future__ import annotations


def project_version() -> str:
    """Of this project, as installed; "unknown" where it only lies there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("repa-scripts")
    except PackageNotFoundError:
        return "unknown"
