"""From a base's scheduler_config.json to its parametrisation, by the one table of those that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import EPSILON, FLOW, VELOCITY, Prediction
from library.diffusion.rectified_flow import RectifiedFlow
from library.diffusion.variance_preserving import VariancePreserving
from library.errors import UserError
from networks.prediction_names import schedule_of

PARAMETRISATIONS: dict[str, tuple[type[Parametrisation], Prediction]] = {
    output.name.scheduler: (process, output)
    for process, output in (
        (VariancePreserving, EPSILON),
        (VariancePreserving, VELOCITY),
        (RectifiedFlow, FLOW),
    )
}
"""By the prediction_type of the file. Of which schedulers' files: `networks.prediction_names.SCHEDULE_NAMES`."""


def parametrisation_of(config: Mapping[str, Any], device: torch.device | str = "cpu") -> Parametrisation:
    """Of a diffusers scheduler_config.json. Raises UserError for a class, prediction_type or schedule that is not known."""
    found = schedule_of(config)
    if isinstance(found, str):
        raise UserError(f"The base's scheduler {found}")
    process, output = PARAMETRISATIONS[found[1].scheduler]
    return process.from_config(config, output, device)
