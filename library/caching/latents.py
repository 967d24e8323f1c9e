"""Latents of bucketed pictures, by bucket.

A value is float16 [2C, h/f, w/f] of a picture of h x w pixels: mean and log-variance of the posterior, unscaled (see
`library.models.encoders`). Another VAE or precision has a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.caching.by_bucket import (
    BucketCaches,
    BucketedPicture,
    BucketKind,
    FlippingEncoder,
    fill_stores,
    is_flipped,
    plan_stores,
)
from library.caching.fill import Say
from library.caching.kohya_npz import KohyaLatents
from library.caching.producers import Wanted
from library.data.buckets import Size
from library.data.pixels import PIXELS_VERSION
from library.device import named_dtype
from library.models.encoders import MomentsEncoder
from library.models.fingerprint import weight_fingerprint
from library.models.load import load_vae
from library.models.locate import BaseLocation
from library.processes import Processes
from networks.families import VAE, Family

KIND = "moments"
LABEL = "latents"


def latent_precision(family: Family, precision: str) -> str:
    """What the VAE runs in: float32 where it would overflow fp16."""
    return "no" if family.vae_overflows and precision == "fp16" else precision


def prepare_latents(
    pictures: Sequence[BucketedPicture],
    *,
    base: BaseLocation,
    vae: BaseLocation | None = None,
    family: Family,
    fit_facts: dict[str, Any],
    precision: str,
    cache_dir: Path,
    batch_size: int,
    workers: int,
    processes: Processes,
    say: Say,
    kohya_caches: bool = False,
) -> BucketCaches:
    """Make the latents of all pictures of a run complete, encoding what is missing or no longer fits; say what was done.

    Args:
        vae: where another VAE than the base's lies.
        fit_facts: options that decide how pictures are cut, by name: kept with the stores to explain differences.
        precision: no, bf16 or fp16 (see `latent_precision`).
        kohya_caches: take latents from kohya's .npz files beside the images where these fit. Without it, entries that
            were taken from there are encoded.

    Raises UserError: no picture can be read, a store in use, no space.
    """
    used = latent_precision(family, precision)
    if used != precision:
        say(f"{LABEL}: the VAE of {family.title} overflows in {precision}, so it runs in float32")
    location = vae or base
    with processes.main_first():
        weights = weight_fingerprint(location, VAE, cache_dir)
    producer = {
        "model": location.name,
        "weights": weights,
        "value": "posterior mean and log-variance",
        "pixels": PIXELS_VERSION,
        "precision": used,
        "fit": json.loads(json.dumps(fit_facts)),  # as it is read back
    }

    def wanted(bucket: Size) -> Wanted:
        shape = (2 * family.latent_channels, *family.latent_size(*bucket))
        return Wanted(KIND, "float16", shape, producer, remedy="--no_half_vae may help")

    kind = BucketKind(LABEL, KIND, cache_dir, producer, "VAE or precision", wanted)
    plan = plan_stores(pictures, kind, accept_imported=kohya_caches)
    importer = None
    if kohya_caches:
        importer = KohyaLatents(plan.crop, family, {name: is_flipped(name) for name in plan.targets})

    def load() -> MomentsEncoder:
        return MomentsEncoder(load_vae(location, serves=family, dtype=named_dtype(used), device=processes.device))

    return fill_stores(
        plan,
        kind,
        FlippingEncoder(load),
        batch_size=batch_size,
        workers=workers,
        processes=processes,
        say=say,
        importer=importer,
    )
