"""What the U-Net sees of a few held-out pictures in noise: tokens that a head reads off the trunks of checkpoint and base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.diffusion.dense_maps import DenseMaps, dense_maps
from library.evaluation.feature_model import FeatureModel
from library.evaluation.probe_pictures import ProbePictures, StoredPictures
from library.evaluation.tap_features import features_at_tap

TIMESTEPS = (100, 400, 750)
"""Little noise, a picture in outlines, hardly any picture."""
PICTURES, NOISE_SEED = 2, 0


@dataclass(frozen=True)
class Sight:
    """Of one model at one timestep, the maps of the same pictures in the same colours."""

    name: str
    timestep: int
    maps: list[DenseMaps]


def spread_over(count: int, most: int) -> list[int]:
    """Places of at most so many of `count` pictures, even over all."""
    return torch.linspace(0, count - 1, min(most, count)).long().unique().tolist()


def what_is_seen(
    model: FeatureModel, base: FeatureModel | None, pictures: ProbePictures, target: Tensor, tap: str
) -> list[Sight]:
    """By the head at `tap` of `model`, timestep by timestep: on the base's trunk, where there is one, and on its own.

    base: the model without its adapter, where that cannot be switched off. target: [n, N, D], what the head learned to say of the
    held-out pictures; it gives the colours. Noise belongs to picture and timestep.
    """
    models: list[tuple[str, FeatureModel, Callable[[], AbstractContextManager[Any]]]] = []
    if model.network is not None:
        models.append(("base", model, model.network.disabled))
    elif base is not None:
        models.append(("base", replace(base, heads=model.heads), nullcontext))
    models.append(("checkpoint", model, nullcontext))
    sides, places = pictures.test, spread_over(len(pictures.test), PICTURES)
    shown = StoredPictures([sides.ids[place] for place in places], sides.samples.latents, sides.samples.tokens)
    photos, found = [sides.photo(place) for place in places], []
    last = model.parametrisation.timesteps - 1
    for timestep in sorted({min(timestep, last) for timestep in TIMESTEPS}):
        for name, one, context in models:
            with context():
                seen = features_at_tap(
                    one,
                    shown,
                    pictures.empty_prompt,
                    tap=tap,
                    timestep=timestep,
                    seed=NOISE_SEED,
                    batch_size=len(places),
                )
            assert seen.tokens is not None
            maps = dense_maps(shown.sample_ids, photos, target[places], seen.tokens, seen.maps)
            found.append(Sight(name, timestep, maps))
    return found
