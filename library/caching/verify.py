"""Read back everything that a cache holds, and encode a few entries again."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from library.caching.class_caches import Cached, Caches, Preparation
from library.data.class_pictures import Pictures, PictureSet
from library.data.pixels import UnreadableImage, decode_rgb, square_crop
from library.data.store import TensorStore
from library.errors import RunFailed
from library.models.encoders import dequantize_tokens
from library.words import plural

REENCODED = 8
# A batch of another size may take other kernels; in bf16 single values then differ in the second digit.
LEAST_COSINE = 0.999


def verify(preparation: Preparation, pictures: Pictures, caches: Caches, *, say: Callable[..., None]) -> None:
    """Check counts, shapes, finiteness and spread of every entry, and 8 random ones against a fresh encoding.

    Raises RunFailed naming the first entries that do not hold.
    """
    for picture_set, cached in zip(pictures.sets, [caches.train, caches.val], strict=False):
        assert cached is not None
        for name, store in cached.stores.items():
            say(f"{picture_set.name} {name}: {_read_all(store, cached)}")
            if not store.foreign:
                say(f"{picture_set.name} {name}: {_encode_again(preparation, picture_set, cached, name)}")
    finite = bool(caches.text.embeddings.isfinite().all())
    say(
        f"text: {caches.text.embeddings.shape[0]} rows of {tuple(caches.text.embeddings.shape[1:])}, all finite: {finite}"
    )


def _read_all(store: TensorStore, cached: Cached) -> str:
    """Sentence on all entries of a store; entries of the wrong length are refused by the store itself."""
    total = squares = count = 0.0
    bad = []
    for sample in cached.samples:
        values = store.read(sample.sample_id).astype(np.float32)
        if store.meta.has_scale:
            scale = np.empty((1, store.meta.shape[0]), np.float16)
            store.read_scales_into([sample.sample_id], scale)
            values = dequantize_tokens(torch.from_numpy(values), torch.from_numpy(scale[0])).numpy()
        if not np.isfinite(values).all():
            bad.append(sample.sample_id)
        total, squares, count = total + float(values.sum()), squares + float((values**2).sum()), count + values.size
    if bad:
        raise RunFailed(
            f"{len(bad)} entries of {store.path} are not finite (first: {', '.join(bad[:3])}). Delete the store and rebuild."
        )
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5
    orphans = sum(1 for _ in store.sample_ids()) - len(cached.samples)
    beside = f", {plural(orphans, 'entry', 'entries')} of samples outside this manifest" if orphans else ""
    return (
        f"{len(cached.samples)} entries of {store.meta.shape} {store.meta.dtype}, all finite, mean {mean:.3f}, "
        f"standard deviation {deviation:.3f}{beside}"
    )


def _encode_again(preparation: Preparation, picture_set: PictureSet, cached: Cached, name: str) -> str:
    chosen = random.Random(0).sample(cached.samples, min(REENCODED, len(cached.samples)))
    store, worst, least = cached.stores[name], 0.0, 1.0
    gone = 0
    for sample in chosen:
        try:
            picture = decode_rgb(picture_set.source.read(sample), name=sample.path)
        except UnreadableImage:
            gone += 1  # a picture may be deleted once it is cached
            continue
        pixels = square_crop(picture, preparation.side)
        batch = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(preparation.processes.device)
        with torch.no_grad():
            fresh = preparation.encoder(name).encode(batch)[0].float().cpu()
        kept = torch.from_numpy(store.read(sample.sample_id).astype(np.float32))
        if store.meta.has_scale:
            scale = np.empty((1, store.meta.shape[0]), np.float16)
            store.read_scales_into([sample.sample_id], scale)
            kept = dequantize_tokens(kept, torch.from_numpy(scale[0]))
        cosine = F.cosine_similarity(fresh.flatten(), kept.flatten(), dim=0).item()
        worst, least = max(worst, (fresh - kept).abs().max().item()), min(least, cosine)
        if cosine < LEAST_COSINE:
            raise RunFailed(
                f"Entry {sample.sample_id} of {store.path} is not what encoding its picture gives (cosine {cosine:.4f}). Delete "
                "the store and build it again."
            )
    beside = f" ({gone} more could not be: their pictures are gone)" if gone else ""
    return f"{len(chosen) - gone} encoded again: least cosine {least:.6f}, largest difference {worst:.2g}{beside}"
