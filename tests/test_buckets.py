"""Buckets are kohya's to the pixel, and what a picture loses in one is what SDXL is told."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.buckets import (
    INTERPOLATIONS,
    Buckets,
    Fitted,
    UnfitImage,
    bucket_resolutions,
    bucket_table,
    resize_and_crop,
)
from library.errors import UserError

SDXL = Buckets((1024, 1024), max_bucket_reso=2048)


@pytest.mark.parametrize(
    ("side", "low", "high", "steps", "count"),
    [
        (512, 256, 1024, 64, 17),
        (768, 256, 1024, 64, 19),
        (1024, 256, 1024, 64, 25),
        (1024, 256, 2048, 64, 41),
        (1024, 512, 2048, 64, 33),
        (1024, 256, 2048, 32, 81),
    ],
)
def test_there_are_as_many_buckets_as_in_kohya(side: int, low: int, high: int, steps: int, count: int) -> None:
    assert len(bucket_resolutions((side, side), low, high, steps)) == count


def test_the_buckets_of_sdxl_are_the_known_ones() -> None:
    sizes = set(SDXL.resolutions)
    for width, heights in (
        (1024, [1024]),
        (960, [1088]),
        (896, [1152]),
        (832, [1216]),
        (768, [1280, 1344]),
        (704, [1408, 1472]),
        (640, [1536, 1600]),
        (576, [1664, 1728, 1792]),
        (512, [1856, 1920, 1984, 2048]),
        (448, [2048]),
        (256, [2048]),
    ):
        assert [h for w, h in SDXL.resolutions if w == width and h >= w] == heights
        assert all((height, width) in sizes for height in heights)


def test_a_low_max_bucket_reso_takes_elongated_buckets_away() -> None:
    buckets = Buckets((1024, 1024))
    assert (832, 1024) in buckets.resolutions and (832, 1216) not in buckets.resolutions
    assert min(math.prod(size) for size in buckets.resolutions) == 256 * 1024


def slow_resolutions(area: int, low: int, high: int, steps: int) -> set[tuple[int, int]]:
    """Every pair of multiples tried: of each width the tallest that fits, lying and standing, and the square."""
    sides = [side for side in range(steps, high + 1, steps) if side >= low]
    found = set()
    for width in sides:
        fitting = [height for height in sides if width * height <= area]
        if fitting:
            found |= {(width, max(fitting)), (max(fitting), width)}
    square = max(range(steps, math.isqrt(area) + 1, steps))
    return found | {(square, square)}


@given(steps=st.sampled_from([8, 32, 64, 96]), low=st.integers(1, 6), extra=st.integers(0, 12), data=st.data())
def test_buckets_stay_within_area_and_limits(steps: int, low: int, extra: int, data: st.DataObject) -> None:
    least, most = low * steps, (low + extra) * steps
    resolution = (data.draw(st.integers(least, most)), data.draw(st.integers(least, most)))
    sizes = bucket_resolutions(resolution, least, most, steps)
    assert sizes == sorted(slow_resolutions(math.prod(resolution), least, most, steps))
    for width, height in sizes:
        assert width * height <= math.prod(resolution)
        assert width % steps == height % steps == 0
        assert least <= width <= most and least <= height <= most
        assert (height, width) in sizes


def test_limits_are_rounded_outwards_to_the_steps() -> None:
    assert Buckets((512, 512), min_bucket_reso=300, max_bucket_reso=1000).limits == (256, 1024)
    assert Buckets((64, 64), min_bucket_reso=10, max_bucket_reso=64).limits == (64, 64)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1500, 1000), (1216, 832), (1248, 832)),
        ((1000, 1500), (832, 1216), (832, 1248)),
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((10, 10), (1024, 1024), (1024, 1024)),
        ((512, 2048), (512, 2048), (512, 2048)),
        ((512, 4096), (256, 2048), (256, 2048)),
        ((1408, 704), (1408, 704), (1408, 704)),
    ],
)
def test_a_picture_takes_the_bucket_of_the_nearest_aspect(
    size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]
) -> None:
    fitted = SDXL.fit(*size)
    assert (fitted.original, fitted.bucket, fitted.resized) == (size, bucket, resized)
    assert fitted.aspect_error == pytest.approx(abs(bucket[0] / bucket[1] - size[0] / size[1]))


@pytest.mark.parametrize("buckets", [SDXL, Buckets((512, 512)), Buckets((768, 640), bucket_reso_steps=8)])
def test_a_picture_of_the_size_of_a_bucket_is_left_as_it_is(buckets: Buckets) -> None:
    for size in buckets.resolutions:
        assert buckets.fit(*size) == Fitted(size, size, size, (0, 0, *size))


@pytest.mark.parametrize("enable_bucket", [True, False])
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_a_scaled_picture_covers_its_bucket_on_one_side_exactly(enable_bucket: bool, width: int, height: int) -> None:
    buckets = Buckets((512, 448), enable_bucket=enable_bucket)
    fitted = buckets.fit(width, height)
    assert fitted.bucket in buckets.resolutions
    slack = [full - kept for full, kept in zip(fitted.resized, fitted.bucket, strict=True)]
    assert min(slack) == 0 and max(slack) >= 0
    assert fitted.crop[:2] == (slack[0] // 2, slack[1] // 2)
    errors = [abs(w / h - width / height) for w, h in buckets.resolutions]
    assert fitted.aspect_error == pytest.approx(min(errors))


def test_without_bucketing_every_picture_gets_the_resolution() -> None:
    buckets = Buckets((512, 512), enable_bucket=False)
    assert buckets.resolutions == [(512, 512)]
    assert buckets.fit(1500, 1000) == Fitted((1500, 1000), (512, 512), (768, 512), (128, 0, 640, 512))
    assert buckets.fit(30, 40).resized == (512, 683)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((500, 400), (448, 384), (500, 400)),  # small: as it is, cut to the steps
        ((512, 512), (512, 512), (512, 512)),
        ((2000, 100), (1984, 64), (2000, 100)),  # beyond max_bucket_reso, which does not count here
        # sqrt(262144 * 1.5) = 627.07 by 418.05. Width on the steps: 576 by 384, aspect 1.5 exactly.
        ((1500, 1000), (576, 384), (576, 384)),
        # 591.2 by 443.4. Width: 576 and 432 -> 384, aspect 1.5. Height: 384 and 512, aspect 4/3 exactly.
        ((1600, 1200), (512, 384), (512, 384)),
        # 456.6 by 574.1, both 0.795. Width: 448 and 563 -> 512, 0.875. Height: 512 and 407 -> 384, 0.75.
        ((1050, 1320), (384, 512), (407, 512)),
    ],
)
def test_without_upscaling_a_picture_is_only_shrunk(
    size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]
) -> None:
    fitted = Buckets((512, 512), bucket_no_upscale=True).fit(*size)
    assert (fitted.bucket, fitted.resized) == (bucket, resized)


@given(width=st.integers(1, 6000), height=st.integers(1, 6000), steps=st.sampled_from([8, 64]))
@settings(max_examples=150)
def test_without_upscaling_nothing_is_enlarged_and_area_is_kept(width: int, height: int, steps: int) -> None:
    buckets = Buckets((512, 448), bucket_no_upscale=True, bucket_reso_steps=steps)
    try:
        fitted = buckets.fit(width, height)
    except UnfitImage:
        scale = min(1.0, math.sqrt(512 * 448 / (width * height)))
        assert min(width, height) * scale < 2 * 64
        return
    assert all(side >= 64 and side % steps == 0 for side in fitted.bucket)
    assert fitted.resized[0] <= width and fitted.resized[1] <= height
    assert all(0 <= full - kept < steps for full, kept in zip(fitted.resized, fitted.bucket, strict=True))
    if width * height <= 512 * 448:
        assert fitted.resized == (width, height)
    else:
        assert any(side % steps == 0 for side in fitted.resized)


@pytest.mark.parametrize("size", [(63, 500), (5, 5), (20000, 30), (30, 20000), (100000, 1), (1, 100000)])
def test_without_upscaling_a_strip_is_refused_with_the_reason(size: tuple[int, int]) -> None:
    with pytest.raises(UnfitImage, match=rf"^{size[0]} x {size[1]} pixels fill a bucket of \d+ x \d+, less than 64 a"):
        Buckets((512, 512), bucket_no_upscale=True).fit(*size)


def test_small_resolutions_lower_what_is_too_small() -> None:
    buckets = Buckets((40, 40), bucket_no_upscale=True, bucket_reso_steps=32)
    assert buckets.fit(45, 35).bucket == (32, 32)
    fine = Buckets((40, 40), bucket_no_upscale=True, bucket_reso_steps=8)
    assert fine.fit(60, 25).bucket == (56, 24)
    with pytest.raises(UnfitImage, match="of 80 x 16, less than 20 a side"):
        fine.fit(80, 20)


def test_sdxl_is_told_what_was_cut() -> None:
    fitted = SDXL.fit(1500, 1000)
    assert fitted.crop == (16, 0, 1232, 832)
    assert fitted.conditioning() == ((1000, 1500), (0, 16), (832, 1216))
    assert fitted.conditioning().time_ids == (1000, 1500, 0, 16, 832, 1216)
    assert Buckets((1024, 1024), True, 512, 2048).fit(512, 4096).conditioning().crop_top_left == (1024, 0)
    moved = fitted.cropped_at(5, 0)
    assert moved.conditioning().crop_top_left == (0, 5)
    assert moved.conditioning(flipped=True).crop_top_left == (0, 27)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), shift=st.integers(-500, 500))
@settings(max_examples=60)
def test_a_mirrored_picture_is_told_what_a_crop_of_the_mirror_would_be(width: int, height: int, shift: int) -> None:
    centred = SDXL.fit(width, height)
    fitted = centred.cropped_at(centred.crop[0] + shift, centred.crop[1] + shift)
    left, top, right, bottom = fitted.crop
    mirrored = fitted.cropped_at(fitted.resized[0] - right, top)
    assert fitted.conditioning(flipped=True) == mirrored.conditioning()
    assert min(left, top) >= 0 and right <= fitted.resized[0] and bottom <= fitted.resized[1]
    assert (right - left, bottom - top) == fitted.bucket


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    y, x = np.mgrid[0:60, 0:100] / 100
    pixels = np.stack([128 + 90 * np.sin(9 * x), 128 + 90 * np.cos(7 * y), 40 + 150 * x * y], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("name", sorted(INTERPOLATIONS))
@pytest.mark.parametrize("resized", [(50, 30), (200, 120), (125, 75)])
def test_the_crop_is_part_of_the_whole_picture_scaled(photo: Image.Image, name: str, resized: tuple[int, int]) -> None:
    fitted = Fitted((100, 60), (24, 16), resized, (0, 0, 24, 16)).cropped_at(17, 9)
    expected = np.array(photo.resize(resized, INTERPOLATIONS[name]))[9:25, 17:41]
    pixels = resize_and_crop(photo, fitted, name)
    assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    # Where the nearest of two pixels is a tie, either may be taken: neighbours differ by up to 8.
    assert np.abs(pixels.astype(int) - expected).max() <= (8 if name in ("nearest", "area", "box") else 1)
    assert np.array_equal(resize_and_crop(np.array(photo), fitted, name), pixels)


def test_shrinking_averages_and_enlarging_uses_lanczos(photo: Image.Image) -> None:
    for resized, name in (((50, 30), "area"), ((200, 120), "lanczos"), ((100, 120), "lanczos")):
        fitted = Fitted((100, 60), (24, 16), resized, (0, 0, 24, 16))
        assert np.array_equal(resize_and_crop(photo, fitted), resize_and_crop(photo, fitted, name))
    halves = resize_and_crop(photo, Fitted((100, 60), (50, 30), (50, 30), (0, 0, 50, 30))).astype(float)
    assert np.abs(halves - np.array(photo, float).reshape(30, 2, 50, 2, 3).mean((1, 3))).max() <= 1


def test_a_picture_of_the_right_size_is_only_cut(photo: Image.Image) -> None:
    fitted = Fitted((100, 60), (24, 16), (100, 60), (3, 5, 27, 21))
    assert np.array_equal(resize_and_crop(photo, fitted, "bicubic"), np.array(photo)[5:21, 3:27])


def test_a_mask_of_one_channel_stays_one(photo: Image.Image) -> None:
    mask = np.array(photo)[..., 0]
    fitted = Fitted((100, 60), (24, 16), (50, 30), (0, 0, 24, 16))
    assert np.array_equal(resize_and_crop(mask, fitted), resize_and_crop(photo, fitted)[..., 0])


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 1)])
def test_a_strip_is_no_memory_bomb(size: tuple[int, int]) -> None:
    fitted = SDXL.fit(*size)
    assert (resize_and_crop(Image.new("RGB", size, (9, 8, 7)), fitted) == (9, 8, 7)).all()


def test_a_picture_of_another_size_or_an_unknown_interpolation_is_refused(photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"\(100, 60\) pixels, not the \(10, 10\)"):
        resize_and_crop(photo, SDXL.fit(10, 10))
    with pytest.raises(UserError, match=r"^resize_interpolation must be one of lanczos, .*, box, got linaer\.$"):
        resize_and_crop(photo, SDXL.fit(100, 60), "linaer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": (500, 512), "enable_bucket": False}, "resolution must be a positive multiple of 8 on both"),
        ({"resolution": (0, 0), "enable_bucket": False}, "resolution must be a positive multiple of 8 on both sides"),
        ({"resolution": (512, 512), "bucket_reso_steps": 60}, "bucket_reso_steps must be a positive multiple of 8"),
        ({"resolution": (512, 512), "bucket_reso_steps": 0}, "bucket_reso_steps must be a positive multiple of 8"),
        ({"resolution": (48, 512)}, "resolution 48 x 512 is smaller than bucket_reso_steps 64"),
        ({"resolution": (128, 128)}, "min_bucket_reso must not exceed resolution, got 256 for 128 x 128. Set it to 64"),
        ({"resolution": (1280, 1024)}, "max_bucket_reso must not be below resolution, got 1024 for 1280 x 1024. Set"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Buckets(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_limits_do_not_count_where_buckets_come_from_the_pictures() -> None:
    assert Buckets((1280, 128), bucket_no_upscale=True).resolutions == []
    assert Buckets.of(SDXL) == SDXL


def test_the_table_counts_pictures_and_repeats() -> None:
    sizes = [(1500, 1000), (1024, 1024), (1510, 1000), (1000, 1500)]
    table = bucket_table([SDXL.fit(*size) for size in sizes], [10, 1, 10, 3])
    assert [row[:3] for row in table.rows] == [((832, 1216), 1, 3), ((1024, 1024), 1, 1), ((1216, 832), 2, 20)]
    info = json.loads(json.dumps(table.info()))
    assert info["buckets"]["2"] == {"resolution": [1216, 832], "count": 20} and set(info["buckets"]) == {"0", "1", "2"}
    errors = [abs(1216 / 832 - 1.5), 0, abs(1216 / 832 - 1.51), abs(832 / 1216 - 1000 / 1500)]
    assert info["mean_img_ar_error"] == pytest.approx(sum(errors) / 4)
    assert str(table).splitlines()[1:] == [
        "  832 x 1216       1        3     2.6%",
        " 1024 x 1024       1        1     0.0%",
        " 1216 x 832        2       20     2.9%",
        "    3 in all       4       24  mean aspect error 0.0261",
    ]


def test_an_empty_table_is_one() -> None:
    assert bucket_table([], []).info() == {"buckets": {}, "mean_img_ar_error": 0.0}
