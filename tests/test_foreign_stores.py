"""Stores made elsewhere: raw float16 values and no __meta__."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest

from library.errors import UserError
from tests.tools.caches import CacheSetting


def foreign_store(path: Path, ids: list[str], shape: tuple[int, ...], suffix: str = "") -> None:
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, sample_id in enumerate(ids):
            transaction.put(f"{sample_id}{suffix}".encode(), np.full(shape, i, np.float16).tobytes())


def test_stores_made_elsewhere_are_used_as_they_are(cache_setting: CacheSetting, tmp_path: Path) -> None:
    for name, ids in (("train", range(8)), ("val", range(8, 12))):
        foreign_store(tmp_path / f"{name}_l", [f"p{i}" for i in ids], (4, 8, 8))
        foreign_store(tmp_path / f"{name}_t", [f"p{i}" for i in ids], (16, 99), "_mid")
    places = {f"{n}_{k}": tmp_path / f"{n}_{k[0]}" for n in ("train", "val") for k in ("latents", "tokens")}
    caches = cache_setting.build(latent_shape="4 8 8", token_shape="16 99", **places)
    assert caches.train.stores["tokens"].foreign and caches.train.stores["tokens"].meta.shape == (16, 99)
    assert (caches.train.stores["latents"].read("p3") == 3).all() and cache_setting.counts == []


def test_a_store_made_elsewhere_that_lacks_samples_or_has_another_shape_is_refused(
    cache_setting: CacheSetting, tmp_path: Path
) -> None:
    foreign_store(tmp_path / "l", [f"p{i}" for i in range(5)], (4, 8, 8))
    with pytest.raises(
        UserError, match=r"3 of 8 samples of the manifest are not in the store .* \(first: p5, p6, p7\)"
    ):
        cache_setting.build(latent_shape="4 8 8", train_latents=tmp_path / "l")
    with pytest.raises(UserError, match=r"latent_shape \(4, 16, 16\) .* is not what this run needs, \(4, 8, 8\)"):
        cache_setting.build(latent_shape="4 16 16", train_latents=tmp_path / "l")
    with pytest.raises(UserError, match="has no __meta__. If it was made elsewhere .* give latent_shape"):
        cache_setting.build(train_latents=tmp_path / "l")
