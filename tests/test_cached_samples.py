"""Batches of a LoRA training: every picture once an epoch, and captions, mirroring, sizes, masks and weights of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.batches import Prefetcher
from library.data.cached_samples import Batch, CachedSamples, requests
from library.training.plan import make_order
from tests.tools.network_runs import Built, NetworkSetting, draw_pictures


@pytest.fixture(scope="module")
def built(network_setting: NetworkSetting) -> Built:
    """Two data sets over the same pictures, two and three showings an epoch, with all that varies from one to the next."""
    second = (
        f"[[datasets]]\nresolution = 64\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = '{network_setting.data}'"
    )
    subset = "num_repeats = 2\nflip_aug = true\nshuffle_caption = true\nkeep_tokens = 1\ncaption_dropout_rate = 0.2"
    config = network_setting.dataset("varied", subset=subset, more=second + "\nnum_repeats = 3\ncolor_aug = false")
    return network_setting.build(dataset_config=config, network_train_unet_only="", gradient_accumulation_steps=2)


def epoch(built: Built, number: int, rank: int = 0, world: int = 1, workers: int = 4) -> list[Batch]:
    """Every batch of one process in an epoch, as its training sees them."""
    order = make_order(built.prepared.data, built.options, rank, world)
    first = number * order.steps_per_epoch
    count = sum(len(order.step(first + step).micro_batches) for step in range(order.steps_per_epoch))
    batches = Prefetcher(built.task.training, requests(order, first), torch.device("cpu"), workers=workers)
    found = [
        replace(batch, latents=batch.latents.clone(), mask=None if batch.mask is None else batch.mask.clone())
        for batch in islice(batches, count)
    ]
    batches.close()
    return found


def shown(batches: list[Batch]) -> Counter[int]:
    return Counter(i for batch in batches for i in batch.indices[batch.real.numpy() > 0].tolist())


@pytest.mark.parametrize("workers", [1, 5])
def test_an_epoch_shows_each_picture_as_often_as_its_repeats_say(built: Built, workers: int) -> None:
    expected = {i: one.repeats for i, one in enumerate(built.prepared.data.training)}
    assert sorted(expected.values()) == [2] * 6 + [3] * 6
    first, second = (epoch(built, number, workers=workers) for number in (0, 1))
    assert shown(first) == expected and shown(second) == expected
    assert [batch.indices.tolist() for batch in first] != [batch.indices.tolist() for batch in second]


def test_two_processes_show_together_what_one_does(built: Built) -> None:
    parts = [epoch(built, 1, rank, 2) for rank in (0, 1)]
    assert shown(parts[0]) + shown(parts[1]) == {i: one.repeats for i, one in enumerate(built.prepared.data.training)}
    assert len(parts[0]) == len(parts[1]), "the same number of passes, or one would wait for ever"


def test_a_steps_pictures_weigh_alike_whatever_batch_they_are_in(built: Built) -> None:
    """Averaged over processes and summed over micro-batches, each picture is one part in the step's pictures."""
    orders = [make_order(built.prepared.data, built.options, rank, 2) for rank in (0, 1)]
    for step in range(orders[0].steps_per_epoch):
        weights = []
        for order in orders:
            for request in islice(requests(order, step), len(order.step(step).micro_batches)):
                weights += [request.share / max(request.micro.real, 1) / 2] * request.micro.real
        assert weights == pytest.approx([1 / len(weights)] * len(weights))


def test_a_batch_is_of_one_bucket_and_holds_the_latents_of_its_pictures(built: Built) -> None:
    for batch in epoch(built, 0):
        images = [built.task.training.images[i] for i in batch.indices]
        (bucket,) = {one.fitted.bucket for one in images}
        assert len({id(one.dataset) for one in images}) == 1
        assert batch.latents.shape[1:] == (8, bucket[1] // 8, bucket[0] // 8)
        for row, one in enumerate(images):
            stores = (
                built.prepared.training.latents.flipped
                if batch.flipped[row]
                else built.prepared.training.latents.stores
            )
            alone = np.empty((1, *batch.latents.shape[1:]), np.float16)
            stores[bucket].read_into([one.image.sample_id], alone)
            assert torch.equal(batch.latents[row], torch.from_numpy(alone[0]))


def test_captions_and_mirroring_are_drawn_by_seed_epoch_picture_and_repeat(built: Built) -> None:
    """Workers and processes change nothing; the next epoch draws anew."""

    def drawn(batches: list[Batch]) -> list[tuple[int, str, bool]]:
        return sorted(
            (int(i), caption, bool(flip))
            for batch in batches
            for i, caption, flip, real in zip(batch.indices, batch.captions, batch.flipped, batch.real, strict=True)
            if real
        )

    one = drawn(epoch(built, 0))
    assert one == drawn(epoch(built, 0, workers=1)) and one != drawn(epoch(built, 1))
    assert one == sorted(drawn(epoch(built, 0, 0, 2)) + drawn(epoch(built, 0, 1, 2)))
    varied = [entry for entry in one if entry[0] < 6]
    assert {flip for _, _, flip in varied} == {True, False} and "" in {caption for _, caption, _ in varied}
    assert all(caption == "" or caption.startswith("mio, ") for _, caption, _ in varied)
    assert not any(flip for index, _, flip in one if index >= 6)
    assert {caption for index, caption, _ in one if index >= 6} == {
        caption.image.caption for caption in built.prepared.data.training
    }


def test_the_unet_is_told_of_the_size_and_of_what_was_cut(network_setting: NetworkSetting, tmp_path: Path) -> None:
    """160 x 96 covers 128 x 64 at 128 x 77: 6 pixels are gone above it. 110 x 100 is cut at its sides, 106 x 96 to 96 x 96."""
    folder = draw_pictures(tmp_path / "wide", ((160, 96), (110, 100)))
    config = network_setting.dataset("wide", folder=folder, subset="flip_aug = true")
    built = network_setting.build(dataset_config=config, network_train_unet_only="", cache_dir=tmp_path / "caches")
    found = {}
    for number in range(16):  # each is mirrored in half of them
        for batch in epoch(built, number):
            for i, flip, sizes in zip(batch.indices, batch.flipped, batch.sizes.tolist(), strict=True):
                found[built.task.training.images[i].image.path.name, bool(flip)] = sizes
    assert found["p0.png", False] == found["p0.png", True] == [96, 160, 6, 0, 64, 128]
    assert found["p1.png", False] == found["p1.png", True] == [100, 110, 0, 5, 96, 96]


def test_masks_of_a_folder_and_of_transparency_come_with_their_picture(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    folder = draw_pictures(tmp_path / "data", ((96, 96), (96, 96)))
    half = np.zeros((96, 96), np.uint8)
    half[:, :48] = 255
    (tmp_path / "masks").mkdir()
    for number in (0, 1):
        Image.fromarray(half).save(tmp_path / "masks" / f"p{number}.png")
    masks = f"conditioning_data_dir = '{tmp_path / 'masks'}'\nflip_aug = true"
    config = network_setting.dataset("masks", folder=folder, subset=masks)
    from_folder = network_setting.build(
        dataset_config=config, network_train_unet_only="", cache_dir=tmp_path / "caches", masked_loss=""
    )
    first = [epoch(from_folder, number) for number in range(10)]
    from_folder.close()
    transparent = tmp_path / "alpha"
    draw_pictures(transparent, ((96, 96), (96, 96)))
    for number in (0, 1):
        path = transparent / "images" / f"p{number}.png"
        image = Image.open(path)
        image.putalpha(Image.fromarray(half))
        image.save(path)
    config = network_setting.dataset("alpha", folder=transparent, subset="alpha_mask = true\nflip_aug = true")
    from_alpha = network_setting.build(dataset_config=config, network_train_unet_only="", cache_dir=tmp_path / "caches")
    seen = set()
    for number in range(10):
        for a, b in zip(first[number], epoch(from_alpha, number), strict=True):
            assert a.mask is not None and b.mask is not None and a.mask.shape == (2, 1, 12, 12)
            for row, flip in enumerate(a.flipped.tolist()):
                left = torch.zeros(12, 12)
                left[:, :6] = 1
                assert torch.equal(a.mask[row, 0], left.flip(1) if flip else left)
                seen.add(flip)
            if (a.flipped == b.flipped).all():
                assert torch.equal(a.mask, b.mask)
    assert seen == {True, False}


def test_a_picture_without_mask_beside_a_masked_one_counts_in_full(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    folder = draw_pictures(tmp_path / "data", ((96, 96),))
    image = Image.open(folder / "images" / "p0.png")
    image.putalpha(0)
    image.save(folder / "images" / "p0.png")
    more = f"[[datasets.subsets]]\nimage_dir = '{folder}'\nalpha_mask = true"
    built = network_setting.build(
        dataset_config=network_setting.dataset("mixed", more=more),
        network_train_unet_only="",
        cache_dir=tmp_path / "caches",
    )
    masked = [batch for batch in epoch(built, 0) if batch.mask is not None]
    assert len(masked) == 1
    for one, mask in zip(masked[0].indices, masked[0].mask, strict=True):
        is_transparent = built.task.training.images[one].image.subset.alpha_mask
        assert torch.equal(mask, torch.full_like(mask, 0.0 if is_transparent else 1.0))


def test_memory_that_is_used_again_keeps_nothing_of_the_batch_before(built: Built) -> None:
    samples: CachedSamples = built.task.training
    first, *others = list(islice(requests(built.order, 0), 12))
    batch = samples.empty_batch(first, pin=False)
    samples.fill(batch, slice(0, len(batch)))
    again = next(r for r in (samples.relabel(batch, other) for other in others) if r is not None)
    assert again.latents.data_ptr() == batch.latents.data_ptr() and again.captions != batch.captions
    assert again.share is not None and not np.array_equal(again.indices, batch.indices)
