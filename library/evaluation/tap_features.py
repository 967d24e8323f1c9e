"""Features of cached pictures at a tap of a U-Net, before and after the AlignHead.

The prompt is always the empty one: a class prompt would give the label away. The noise depends on (seed, picture, timestep) alone,
so that every model sees the same inputs whatever the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.evaluation.feature_model import FeatureModel
from library.evaluation.probe_pictures import StoredPictures
from library.evaluation.similarity import pool_tokens
from library.training.randomness import sample_noise
from networks.features import TIME, capture_alone


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
    for start in range(0, len(samples), batch_size):
        indices = range(start, min(start + batch_size, len(samples)))
        latents = samples.read_latents(indices)
        ids = [f"{samples.sample_ids[i]}@{timestep}" for i in indices]
        noise = sample_noise(seed, ids, tuple(latents.shape[1:]))
        timesteps = torch.full((len(indices),), timestep, device=device)
        noisy = model.parametrisation.add_noise(latents.to(device), noise.to(device), timesteps)
        with capture_alone(model.unet, captured) as features:
            model.unet(noisy.to(model.dtype), timesteps, text.expand(len(indices), -1, -1), return_dict=False)
        maps.append(features[tap].float().cpu())
        if heads is not None:
            tokens.append(heads.tokens(tap, features).float().cpu())
    return TapFeatures(torch.cat(maps), torch.cat(tokens) if tokens else None)
