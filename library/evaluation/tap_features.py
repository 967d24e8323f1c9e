"""Features of cached pictures at a tap of a U-Net, before and after the AlignHead.

The prompt is always the empty one: a class prompt would give the label away. The noise depends on (seed, picture, timestep) alone,
so that every model sees the same inputs whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.evaluation.feature_model import FeatureModel
from library.evaluation.probe_pictures import StoredPictures
from library.evaluation.similarity import pool_tokens
from library.training.randomness import sample_noise
from networks.features import TIME, capture, tap_block


@dataclass
class TapFeatures:
    """Of n pictures, float32 on the CPU. maps [n, C, h, w]: the tap's feature maps. tokens [n, N, D]: the head's, or None."""

    maps: Tensor
    tokens: Tensor | None

    @property
    def trunk(self) -> Tensor:
        """The map's mean over its places, [n, C]."""
        return self.maps.mean(dim=(2, 3))

    @property
    def head(self) -> Tensor | None:
        """Pooled tokens, [n, D]."""
        return None if self.tokens is None else pool_tokens(self.tokens)


@torch.no_grad()
def features_at_tap(
    model: FeatureModel,
    samples: StoredPictures,
    empty_prompt: Tensor,
    *,
    tap: str,
    timestep: int,
    seed: int,
    batch_size: int,
) -> TapFeatures:
    """Features of all `samples` at one timestep. empty_prompt: [77, D] embedding of the empty prompt."""
    device = next(model.unet.parameters()).device
    heads = model.heads if tap in model.heads else None
    captured = [tap, TIME] if heads is not None and heads.timed else [tap]
    text = empty_prompt.to(device, model.dtype)
    maps, tokens = [], []
    with capture(model.unet, captured) as features, _stopped_after(model.unet, tap):
        for start in range(0, len(samples), batch_size):
            indices = range(start, min(start + batch_size, len(samples)))
            latents = samples.read_latents(indices)
            ids = [f"{samples.sample_ids[i]}@{timestep}" for i in indices]
            noise = sample_noise(seed, ids, tuple(latents.shape[1:]))
            timesteps = torch.full((len(indices),), timestep, device=device)
            noisy = model.parametrisation.add_noise(latents.to(device), noise.to(device), timesteps)
            with suppress(_Stopped):
                model.unet(noisy.to(model.dtype), timesteps, text.expand(len(indices), -1, -1), return_dict=False)
            maps.append(features[tap].float().cpu())
            if heads is not None:
                tokens.append(heads.tokens(tap, features).float().cpu())
    return TapFeatures(torch.cat(maps), torch.cat(tokens) if tokens else None)


class _Stopped(Exception):
    """The forward pass has passed the tap; the rest of it is not needed."""


@contextmanager
def _stopped_after(unet: Any, tap: str) -> Iterator[None]:
    """Within the context a forward pass stops after `tap`, which saves the decoder. Enter it after capture()."""

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Stopped

    hook = tap_block(unet, tap).register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()
