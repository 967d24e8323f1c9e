"""Text encoders fused with others by a file of train_lyra.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.checks import require


@dataclass(frozen=True)
class TextFusionOptions:
    """Text encoders fused with others, as train_lyra.py learned it."""

    text_fusion: Path | None = None
    """File of train_lyra.py: other encoders read each text too, and what it decodes of all takes the place of the text encoders'
    states."""
    text_fusion_encoders: tuple[str, ...] = ()
    """Where its other encoders are, in its order: folders or hub ids. Default: where the file says."""

    def __post_init__(self) -> None:
        path = self.text_fusion
        require(path is None or path.is_file(), "text_fusion", f"{path} does not exist, or is no file.")
        require(
            path is not None or not self.text_fusion_encoders,
            "text_fusion_encoders",
            "has no effect without text_fusion.",
        )
