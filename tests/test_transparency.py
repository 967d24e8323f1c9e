"""Colours under transparent pixels count where kohya's scripts count them: in masks, and with alpha_mask."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.caching.masks import alpha_channel, latent_mask
from library.data.buckets import Buckets, Fitted, resize_and_crop
from library.data.dataset_config import Dataset, Subset
from library.data.pixels import decode_rgb
from library.data.training_images import collect_images
from library.training.facts import samples_digest
from tests.test_collect import collected
from tests.tools.network_runs import NetworkSetting, draw_pictures

WHOLE = Fitted((64, 64), (64, 64), (64, 64), (0, 0, 64, 64))


def quarter() -> Image.Image:
    """White in one quarter and nothing elsewhere, as a mask painted on an empty layer is saved."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :32] = 255
    return Image.fromarray(pixels)


def palette_of(image: Image.Image) -> Image.Image:
    small = image.convert("RGB").quantize(4)
    small.info["transparency"] = small.getpixel((63, 63))
    return small


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: quarter(), 0.25),
        (lambda: quarter().convert("LA"), 0.25),
        (lambda: palette_of(quarter()), 0.25),
        (lambda: quarter().convert("RGB"), 0.25),
        (lambda: quarter().convert("L"), 0.25),
        # Opaque where it counts and transparent elsewhere, but white all over: kohya's scripts see white.
        (lambda: Image.merge("RGBA", [Image.new("L", (64, 64), 255)] * 3 + [quarter().getchannel("A")]), 1.0),
        # A soft brush: grey is in the colour, not in the alpha.
        (lambda: Image.new("RGBA", (64, 64), (51, 0, 0, 10)), 0.2),
    ],
)  # fmt: skip
def test_a_masks_colours_count_under_its_transparency(make, expected: float, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, options in (("m.png", {}), ("m.webp", {"lossless": True, "exact": True})):
        image = make()
        if name.endswith("webp") and image.mode in ("P", "L", "LA"):
            continue
        image.save(tmp_path / name, **options)
        assert latent_mask(tmp_path / name, WHOLE, (8, 8)).mean() == pytest.approx(expected, abs=1e-6)


def test_pictures_are_laid_on_white_unless_the_colours_under_it_are_asked_for() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode_rgb(file.getvalue(), name="a").getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(file.getvalue(), name="a", hidden_colours=True).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(("hidden", "expected"), [(True, (200, 0, 0)), (False, (228, 127, 127))])
def test_a_palette_with_an_alpha_of_each_colour_is_read_without_a_complaint(
    hidden: bool, expected: tuple[int, int, int]
) -> None:
    image, file = Image.new("P", (4, 4), 1), io.BytesIO()
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(file, "PNG", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_rgb(file.getvalue(), name="a", hidden_colours=hidden).getpixel((0, 0))
    assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(96, 64), (61, 100), (64, 64)])
def test_alpha_is_cut_and_mirrored_as_its_picture_is(
    size: tuple[int, int], flipped: bool, orientation: int, tmp_path: Path
) -> None:
    """Of a picture that is as bright as it is opaque, the mask is the brightness of the pixels that are encoded."""
    width, height = size
    ramp = np.add.outer(np.arange(height) * 2, np.arange(width) * 0.5).clip(0, 255).astype(np.uint8)
    channel, exif = Image.fromarray(ramp), Image.Exif()
    exif[0x0112] = orientation
    Image.merge("LA", [channel, channel]).save(tmp_path / "a.png", exif=exif)
    picture = decode_rgb(tmp_path / "a.png", name="a", hidden_colours=True)
    buckets = Buckets((64, 64), min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
    fitted = buckets.fit(*picture.size)
    pixels = resize_and_crop(picture, fitted, "area")[..., 0].astype(np.float32) / 255
    pixels = pixels[:, ::-1] if flipped else pixels
    rows, columns = pixels.shape[0] // 8, pixels.shape[1] // 8
    seen = pixels.reshape(rows, 8, columns, 8).mean((1, 3))
    mask = latent_mask(alpha_channel(tmp_path / "a.png"), fitted, (rows, columns), flipped)
    np.testing.assert_allclose(mask, seen, atol=0.01)


def cut_out(folder: Path, source: Path, alpha: Image.Image) -> Path:
    """The pictures of another folder with an alpha channel."""
    (folder / "images").mkdir(parents=True)
    for path in (source / "images").iterdir():
        image = Image.open(path).convert("RGB")
        image.putalpha(alpha.resize(image.size))
        image.save(folder / "images" / path.name)
    return folder


def test_latents_of_an_alpha_mask_are_those_of_the_colours_and_an_opaque_one_changes_nothing(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    plain = draw_pictures(tmp_path / "plain", ((96, 96),))
    half = Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8)[None] * 30, 8, 0))
    folders = {
        "plain": plain,
        "cut": cut_out(tmp_path / "cut", plain, half),
        "opaque": cut_out(tmp_path / "opaque", plain, Image.new("L", (8, 8), 255)),
    }

    def latents(name: str, *, alpha_mask: bool) -> np.ndarray:
        config = network_setting.dataset(
            f"{name}{alpha_mask}", folder=folders[name], subset=f"alpha_mask = {str(alpha_mask).lower()}"
        )
        built = network_setting.build(
            dataset_config=config, network_train_unet_only="", cache_dir=tmp_path / "caches" / name
        )
        try:
            store = built.prepared.training.latents.stores[(96, 96)]
            return store.read(built.prepared.data.training[0].image.sample_id)
        finally:
            built.close()

    expected = latents("plain", alpha_mask=False)
    # One cache: an entry that was laid on white is found and made anew, and back.
    for alpha_mask in (False, True, False):
        assert np.array_equal(latents("cut", alpha_mask=alpha_mask), expected) == alpha_mask
    assert np.array_equal(latents("opaque", alpha_mask=True), expected)


def test_states_know_whether_hidden_colours_count_and_others_stay_valid(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    plain = draw_pictures(tmp_path / "plain", ((96, 96),))

    def digest(masks: str) -> str:
        config = network_setting.dataset(masks, folder=plain, subset=f"conditioning_data_dir = '{tmp_path / masks}'")
        return samples_digest(collected(network_setting, dataset_config=config, masked_loss=""))

    for name, image in (
        ("grey", quarter().convert("L")),
        ("opaque", quarter().convert("RGB").convert("RGBA")),
        ("painted", quarter()),
    ):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "p0.png")
    assert digest("grey") == digest("opaque") != digest("painted")


def test_only_pictures_that_look_otherwise_are_marked(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "white.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 9)).save(tmp_path / "black.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
    for alpha_mask, expected in ((True, ["black.png"]), (False, [])):
        subset = Subset(image_dir=tmp_path, name="x", alpha_mask=alpha_mask)
        images = collect_images(Dataset((64, 64), subsets=(subset,))).images
        assert [image.path.name for image in images if image.shows_hidden_colours] == expected
