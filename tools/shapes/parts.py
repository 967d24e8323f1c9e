"""The trained parts as they lie in the working folder: NAME.pt with weights and the record of their training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tools.shapes.fit import Record

Model = TypeVar("Model", bound=nn.Module)


def save_part(work: Path, name: str, model: nn.Module, record: Record) -> None:
    file = work / f"{name}.pt"
    torch.save({"weights": model.state_dict(), "record": asdict(record)}, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def has_part(work: Path, name: str) -> bool:
    return (work / f"{name}.pt").exists()


def load_model(work: Path, name: str, model: Model, prefix: str = "") -> Model:
    """Fill a model with a part's weights of the same names behind `prefix`; it may be a piece of what was trained."""
    weights: dict[str, Tensor] = torch.load(work / f"{name}.pt", weights_only=True)["weights"]
    model.load_state_dict({key: weights[prefix + key] for key in model.state_dict()})
    return model.eval()


def record_of(work: Path, name: str) -> dict[str, Any]:
    return dict(torch.load(work / f"{name}.pt", weights_only=True)["record"])
