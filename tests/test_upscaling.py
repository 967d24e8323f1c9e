"""Upscalers by A1111's names, on latents and on pictures, and the size they lead to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.inference.upscaling import (
    LATENT_UPSCALERS,
    PICTURE_UPSCALERS,
    UPSCALERS,
    LatentUpscaler,
    PictureUpscaler,
    find_upscaler,
    target_size,
)


def _wave(side: int, cycles: float = 1.0) -> torch.Tensor:
    """[1, 4, side, side]: a wave along x, sampled at the centres of latents."""
    x = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    return torch.sin(2 * math.pi * cycles * x).expand(1, 4, side, side).contiguous()


@pytest.mark.parametrize("name", LATENT_UPSCALERS)
def test_latents_get_the_size_asked_for_and_keep_what_they_show(name: str) -> None:
    upscale = find_upscaler(name)
    assert isinstance(upscale, LatentUpscaler)
    large = upscale(_wave(16), 192, 256)
    assert large.shape == (1, 4, 32, 24), "width and height are not exchanged"
    assert (upscale(_wave(16), 256, 256) - _wave(32)).abs().max() < (0.25 if "nearest" in name else 0.11)
    flat = torch.full((2, 4, 8, 8), 0.7)
    assert torch.allclose(upscale(flat, 96, 96), torch.full((2, 4, 12, 12), 0.7), atol=1e-6)


def test_each_way_is_known_by_what_it_makes_of_an_edge() -> None:
    edge = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(1, 4, 6, 6).contiguous()

    def row(name: str) -> torch.Tensor:
        upscale = find_upscaler(name)
        assert isinstance(upscale, LatentUpscaler)
        return upscale(edge, 96, 96)[0, 0, 0, 4:8]

    assert row("Latent").tolist() == [0, 0.25, 0.75, 1], "a straight ramp"
    assert row("Latent (nearest)").tolist() == row("Latent (nearest-exact)").tolist() == [0, 0, 1, 1]
    for name in ("Latent (bicubic)", "Latent (bicubic antialiased)"):
        assert row(name)[0] < 0 and row(name)[3] > 1 and 0.1 < row(name)[1] < 0.25, "a curve that overshoots"
    third = torch.arange(6.0).expand(1, 4, 6, 6).contiguous()
    down, exact = (
        LATENT_UPSCALERS[name](third, 16, 16)[0, 0, 0] for name in ("Latent (nearest)", "Latent (nearest-exact)")
    )
    assert down.tolist() == [0, 3] and exact.tolist() == [1, 4], "the first of three latents, or the one in the middle"


def test_antialiasing_acts_where_latents_shrink() -> None:
    fine = _wave(64, cycles=31.0)  # above what 16 latents can hold
    plain, smooth = find_upscaler("Latent"), find_upscaler("Latent (antialiased)")
    assert isinstance(plain, LatentUpscaler) and isinstance(smooth, LatentUpscaler)
    assert smooth(fine, 128, 128)[..., 2:-2].abs().max() < 0.05
    assert torch.allclose(plain(_wave(16), 256, 256), smooth(_wave(16), 256, 256), atol=1e-6), "and nowhere else"


def test_nearest_keeps_the_very_values_and_half_precision_stays() -> None:
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    for name in LATENT_UPSCALERS:
        upscale = find_upscaler(name)
        assert isinstance(upscale, LatentUpscaler)
        large = upscale(latents, 64, 64)
        assert large.dtype == torch.float16
        if "nearest" in name:
            assert torch.equal(large[..., ::2, ::2], latents) and torch.equal(large[..., 1::2, 1::2], latents)


def test_latents_have_no_size_between_multiples_of_8() -> None:
    with pytest.raises(UserError, match="width must be a multiple of 8, got 100"):
        LATENT_UPSCALERS["Latent"](_wave(8), 100, 96)


@pytest.mark.parametrize("name", PICTURE_UPSCALERS)
def test_pictures_get_the_size_asked_for(name: str) -> None:
    upscale = find_upscaler(name)
    assert isinstance(upscale, PictureUpscaler)
    assert upscale(Image.new("RGB", (64, 32), (10, 200, 30)), 128, 72).size == (128, 72)


def test_nearest_repeats_pixels_and_lanczos_blends_them() -> None:
    edge = Image.fromarray(np.repeat(np.uint8([[0, 0, 255, 255]]), 4, axis=0)).convert("RGB")

    def values(name: str) -> set[int]:
        return set(np.asarray(PICTURE_UPSCALERS[name](edge, 16, 16)).ravel().tolist())

    assert values("Nearest") == {0, 255} and len(values("Lanczos")) > 2
    assert values("None") == values("Lanczos"), "A1111's None resizes too"


def test_names_are_a1111s_in_any_case_and_unknown_ones_are_refused_with_the_nearest() -> None:
    assert list(UPSCALERS)[0] == "Latent" and len(UPSCALERS) == 9
    assert find_upscaler("latent (Nearest-Exact)") is UPSCALERS["Latent (nearest-exact)"]
    with pytest.raises(UserError, match=r"^Latent \(bicubik\) is no upscaler \(did you mean Latent \(bicubic\)\?\)"):
        find_upscaler("Latent (bicubik)")
    with pytest.raises(
        UserError,
        match=r"^R-ESRGAN 4x\+ is no upscaler\. Known are Latent, .*neural upscalers \(ESRGAN\) are not supported",
    ):
        find_upscaler("R-ESRGAN 4x+")


@pytest.mark.parametrize(
    ("size", "scale", "found"),
    [
        ((512, 768), 2.0, (1024, 1536)),
        ((512, 768), 1.5, (768, 1152)),
        ((512, 512), 1.1, (560, 560)),
        ((360, 800), 1.4, (504, 1120)),
        ((800, 800), 1.15, (920, 920)),
        ((64, 64), 0.5, (32, 32)),
        ((512, 512), 1.0, (512, 512)),
    ],
)
def test_the_target_is_the_multiple_of_8_below(size: tuple[int, int], scale: float, found: tuple[int, int]) -> None:
    assert target_size(*size, scale) == found


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_has_to_be_a_positive_number(scale: float) -> None:
    with pytest.raises(UserError, match="scale must be above 0"):
        target_size(512, 512, scale)


def test_a_scale_has_to_leave_something() -> None:
    with pytest.raises(UserError, match=r"64 x 512 times 0\.1 leaves a side below 8 pixels"):
        target_size(64, 512, 0.1)
