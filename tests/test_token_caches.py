"""Teacher tokens of bucketed pictures: what each entry is, what makes it anew, and what stays beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.caching.by_bucket import BucketCaches, BucketedPicture
from library.caching.tokens import Teacher, prepare_tokens
from library.data.pixels import decode_rgb, square_crop
from library.models.encoders import TeacherEncoder, dequantize_tokens
from library.models.locate import BaseLocation
from library.models.teachers import load_teacher
from library.processes import Processes
from tests.test_bucket_caches import LatentSetting, cut_pixels, draw, read


class TokenSetting(LatentSetting):
    """The same pictures, seen by a teacher."""

    def __init__(self, folder: Path, dino: Path) -> None:
        super().__init__(folder, dino)
        self.teacher = Teacher(BaseLocation("tiny", dino), 56, 4, "float16", "no")

    def build(self, pictures: list[BucketedPicture] | None = None, **changes: Any) -> BucketCaches:
        self.said.clear()
        if self.last is not None:
            self.last.close()
        self.last = prepare_tokens(
            self.pictures() if pictures is None else pictures,
            replace(self.teacher, **changes),
            cache_dir=self.cache_dir,
            workers=0,
            processes=Processes("cpu"),
            say=self.said.append,
        )
        return self.last


@pytest.fixture
def setting(tmp_path: Path, tiny_dinov2: Path) -> TokenSetting:
    return TokenSetting(tmp_path, tiny_dinov2)


def fresh(dino: Path, pixels: list[np.ndarray]) -> np.ndarray:
    batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    return TeacherEncoder(load_teacher(str(dino)), 56, 4).encode(batch).numpy()


@pytest.mark.bits
def test_every_entry_is_what_the_teacher_says_of_the_buckets_crop_and_of_its_mirror_image(
    setting: TokenSetting, tiny_dinov2: Path
) -> None:
    pictures = setting.pictures(flip=True)
    caches = setting.build(pictures)
    grids = {bucket: store.meta.producer["grid"] for bucket, store in caches.stores.items()}
    assert grids == {(64, 64): [4, 4], (80, 48): [3, 5], (48, 80): [5, 3]} and set(caches.flipped) == set(grids)
    assert caches.stores[80, 48].meta.producer["input_pixels"] == [42, 70]
    for bucket, (rows, columns) in grids.items():
        members = [one for one in pictures if one.fitted.bucket == bucket]
        assert caches.stores[bucket].meta.shape == (rows * columns, 64)
        # The same batches as in the build.
        pixels = [cut_pixels(one) for one in members]
        straight = fresh(tiny_dinov2, pixels)
        mirrored = fresh(tiny_dinov2, [np.ascontiguousarray(part[:, ::-1]) for part in pixels])
        for row, one in enumerate(members):
            assert np.array_equal(read(caches, one), straight[row])
            assert np.array_equal(read(caches, one, flipped=True), mirrored[row])
    # A square picture's tokens are those that prepare_cache.py makes of it.
    square = square_crop(decode_rgb(pictures[0].path, name=""), 64)
    np.testing.assert_allclose(read(caches, pictures[0]), fresh(tiny_dinov2, [square])[0], atol=2e-3)
    setting.build(pictures)
    assert not setting.built and not setting.tells("missing")


@pytest.mark.bits
def test_an_edited_or_recropped_picture_is_encoded_again_and_said(setting: TokenSetting) -> None:
    pictures = setting.pictures()
    old = read(setting.build(), pictures[0])
    draw(pictures[0].path, (64, 64), 99)
    pictures[5] = replace(pictures[5], fitted=pictures[5].fitted.cropped_at(0, 0))
    caches = setting.build(pictures)
    assert setting.tells("tokens: 2 encoded, 0 unchanged, 0 unreadable")
    assert setting.tells("tokens: 1 picture changed since being cached, read again (first: 64:p0.png)")
    assert setting.tells("some entries were cut differently")
    assert not np.array_equal(read(caches, pictures[0]), old)


def test_tokens_of_another_teacher_stay_beside_and_int8_keeps_scales(setting: TokenSetting) -> None:
    one = setting.pictures()[2]
    plain = read(setting.build(), one)
    for changes in ({"grid": 2}, {"resolution": 112}, {"precision": "bf16"}, {"dtype": "int8"}):
        caches = setting.build(**changes)
        assert setting.tells("6 encoded") and setting.tells(
            "has those of another teacher, resolution, grid or precision"
        )
    scales = np.empty((1, 15), np.float16)
    caches.stores[80, 48].read_scales_into([one.sample_id], scales)
    again = dequantize_tokens(torch.from_numpy(read(caches, one)), torch.from_numpy(scales[0]))
    torch.testing.assert_close(again, torch.from_numpy(plain).float(), atol=0.02, rtol=0)
    setting.build()
    assert not setting.built


def test_unreadable_pictures_are_left_out_with_the_reason(setting: TokenSetting) -> None:
    pictures = setting.pictures()
    pictures[0].path.write_bytes(b"no picture")
    caches = setting.build(pictures)
    assert set(caches.dropped) == {"64:p0.png"} and setting.tells("5 encoded, 0 unchanged, 1 unreadable")
    assert "not a PNG" in (setting.cache_dir / "tokens_unreadable.tsv").read_text()
