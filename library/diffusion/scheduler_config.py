"""From a base's scheduler_config.json to its parametrisation, by the one table of those that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import EPSILON, VELOCITY, Prediction
from library.diffusion.variance_preserving import VariancePreserving
from library.errors import UserError

PARAMETRISATIONS: dict[str, tuple[type[Parametrisation], Prediction]] = {
    output.name.scheduler: (process, output)
    for process, output in (
        (VariancePreserving, EPSILON),
        (VariancePreserving, VELOCITY),
    )
}
"""By the prediction_type of the file."""


def parametrisation_of(config: Mapping[str, Any], device: torch.device | str = "cpu") -> Parametrisation:
    """Of a diffusers scheduler_config.json. Raises UserError for a prediction_type that is not known."""
    prediction_type = config.get("prediction_type", _unsaid(config))
    if prediction_type not in PARAMETRISATIONS:
        *others, last = PARAMETRISATIONS
        raise UserError(
            f"The base's scheduler says prediction_type {prediction_type!r}; this program trains {', '.join(others)} and {last}."
        )
    process, output = PARAMETRISATIONS[prediction_type]
    return process.from_config(config, output, device)


def _unsaid(config: Mapping[str, Any]) -> str:
    """What a file without prediction_type means: epsilon, but of flow matching what diffusers calls it where it is said."""
    is_flow = str(config.get("_class_name", "")).startswith("FlowMatch")
    return "flow_prediction" if is_flow else EPSILON.name.scheduler
