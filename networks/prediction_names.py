"""What files call the kinds of output that a network can have: the one table. `library.diffusion.predictions` computes them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple


class PredictionName(NamedTuple):
    scheduler: str
    """`prediction_type` of diffusers' scheduler_config.json; state.json says it too."""
    modelspec: str
    """`modelspec.prediction_type` (ModelSpec 1.0.1)."""
    mark: str | None = None
    """The empty tensor that marks a model in a single file, as ComfyUI reads it."""
    version_ending: str = ""
    """Of `ss_base_model_version` in kohya's files for SD1.5."""


EPSILON_NAME = PredictionName("epsilon", "epsilon")
VELOCITY_NAME = PredictionName("v_prediction", "v", mark="v_pred", version_ending="_v")

PREDICTION_NAMES = (EPSILON_NAME, VELOCITY_NAME)
BY_SCHEDULER = {name.scheduler: name for name in PREDICTION_NAMES}


def name_by_marks(tensors: Container[str]) -> PredictionName:
    """Of a model whose single file has these tensors; without any mark it predicts epsilon."""
    return next((name for name in PREDICTION_NAMES if name.mark is not None and name.mark in tensors), EPSILON_NAME)


def name_by_metadata(metadata: Mapping[str, str]) -> PredictionName:
    """Of an adapter's file, by its version before its ModelSpec; where neither tells, epsilon."""
    version, said = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.prediction_type")
    for name in PREDICTION_NAMES:
        if name.version_ending and version.endswith(name.version_ending):
            return name
    return next((name for name in PREDICTION_NAMES if name.modelspec == said), EPSILON_NAME)
