"""Small image, caption and metadata files for the tests of datasets, and what those tests look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.training_images import Collected
from library.errors import UserError


def picture(path: Path | str, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options: Any) -> Path:
    """A black image; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def text(path: Path | str, content: str | bytes) -> Path:
    """A file of exactly this content; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def captions(collected: Collected) -> dict[str, str]:
    """File name -> caption of every image."""
    return {image.path.name: image.caption for image in collected.images}


def refusal(call: Callable[[], object]) -> str:
    """The one line of a UserError of exit code 2."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)
