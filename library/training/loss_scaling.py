"""Loss scaling for float16: small gradients survive the backward pass, and a step that overflowed is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class LossScaler:
    """torch's GradScaler with metrics that stay on the device.

    An optimizer that knows about scaling (fused AdamW) skips an overflowed step by itself; for any other the host has to
    ask, once a step, whether there was an overflow.
    """

    def __init__(self, device: torch.device, **settings: Any) -> None:
        self._scaler = torch.amp.GradScaler(device.type, **settings)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale. Call after they are averaged over processes and before they are clipped."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, grad_norms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Step unless a gradient overflowed, and adapt the scale.

        Returns the scale used, whether the step was left out (0 or 1), and the gradient norms, 0 where it was: an overflow
        is no divergence.
        """
        scale = self._scaler._get_scale_async().clone()  # type: ignore[union-attr]
        self._scaler.step(optimizer)
        self._scaler.update()
        finite = torch.stack(list(grad_norms.values())).isfinite().all()
        return {
            **{name: torch.where(finite, norm, 0.0) for name, norm in grad_norms.items()},
            "loss_scale": scale.to(finite.device),
            "skipped": 1.0 - finite.float(),
        }

    def state(self) -> dict[str, Any]:
        """Scale and steps since it grew last, as plain numbers."""
        return self._scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)
