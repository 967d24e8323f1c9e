"""Whether values are numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or not a number; several times as fast as isfinite on the CPU."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    wide = values if values.dtype.itemsize > 1 else values.float()  # 8-bit floats have no arithmetic
    low, high = torch.aminmax(wide)  # both are not a number where one value is
    return bool(torch.isfinite(low) & torch.isfinite(high))
