"""DoRA's magnitude around whatever an adapter adds: a norm per output or per input that is kept apart from the direction.

Sources: DoRA (arXiv 2402.09353, equation 5); LyCORIS puts the same around LoHa and LoKr (weight_decompose).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks import AdapterError


def with_magnitude(weight: Tensor, added: Tensor, magnitude: Tensor | None) -> Tensor:
    """m * V / ||V|| - W with V = W + added, float32, of the weight's shape; `added` where there is no magnitude.

    The norm is that of PEFT and LyCORIS, over everything but the axis that m keeps.
    """
    if magnitude is None:
        return added
    before = weight.float()
    direction = before + added
    magnitude = magnitude.to(weight.device, torch.float32)
    magnitude = magnitude.reshape(*magnitude.shape[:2], *(1 for _ in direction.shape[2:]))
    other_axes = [axis for axis in range(direction.ndim) if magnitude.shape[axis] == 1]
    norm = torch.linalg.vector_norm(direction, dim=other_axes, keepdim=True)
    return magnitude * direction / norm.clamp(min=torch.finfo(torch.float32).tiny) - before


def read_magnitude(name: str, value: Tensor, shape: Sequence[int], is_pefts: bool = False) -> Tensor:
    """As [out, 1, ...] or [1, in, ...]. PEFT keeps [out], of convolutions [1, out, 1, 1]; LyCORIS either of the two forms.

    shape: of the weight as far as it is known, [out, in * kh * kw] where a kernel is not. Raises AdapterError for other shapes.
    """
    out, inner = shape[:2]
    ones = [1] * (len(shape) - 2)
    found = list(value.shape)
    if is_pefts:
        fits = found in ([out], [1, out, 1, 1])
        wanted = [out, 1, *ones]
    else:
        fits = len(found) in (2, 4) and all(side == 1 for side in found[2:])
        kernel_is_unknown = len(found) == 4 and len(shape) == 2
        per_input = found[:2] == [1, inner] or (kernel_is_unknown and found[0] == 1 and inner % max(found[1], 1) == 0)
        fits = fits and (found[:2] == [out, 1] or per_input)
        wanted = [*found[:2], *ones]
    if not fits:
        raise AdapterError(f"the DoRA magnitude of {name} has the shape {found}, which is of no weight {list(shape)}.")
    return value.reshape(wanted)


def magnitude_fits(magnitude: Tensor | None, shape: Sequence[int]) -> bool:
    """Whether it can be of a weight of this shape."""
    return magnitude is None or list(magnitude.shape[:2]) in ([shape[0], 1], [1, shape[1]])
