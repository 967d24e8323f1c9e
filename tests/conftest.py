"""The tiny models, built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# Tiny tensors: threads cost more than they bring, above all where several processes share two cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in SD1.5's layout with small widths. Read it; copy it before changing anything in it."""
    from library.models.tiny import build_tiny_sd15

    return build_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny-sd15")


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a three-layer Dinov2Model. Read it; copy it before changing anything in it."""
    from library.models.tiny import build_tiny_dinov2

    return build_tiny_dinov2(tmp_path_factory.mktemp("models") / "tiny-dinov2")
