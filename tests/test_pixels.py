"""Every kind of image file becomes upright 8-bit RGB, or is refused with a reason."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.pixels import UnreadableImage, decode_rgb, square_crop

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_rgb(data, name="x")
    assert image.mode == "RGB"
    return np.array(image)


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of forms that Pillow itself does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth, and different in every corner."""
    y, x = np.mgrid[0:30, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 8, 255 - x * 3 - y * 4], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_lossless_file_keeps_its_pixels(photo: Image.Image, kind: str) -> None:
    assert np.array_equal(decoded(encoded(photo, kind)), np.array(photo))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_lossy_file_keeps_them_nearly(photo: Image.Image, kind: str) -> None:
    assert np.abs(decoded(encoded(photo, kind, quality=95)).astype(int) - np.array(photo)).mean() < 4


def test_a_path_reads_like_its_bytes(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "wrong_suffix.jpg").write_bytes(encoded(photo))
    assert np.array_equal(np.array(decode_rgb(tmp_path / "wrong_suffix.jpg", name="x")), np.array(photo))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What the EXIF standard says each orientation must look like, in numpy."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_turned_upright(photo: Image.Image, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(photo, kind, exif=exif)), turned(np.array(photo), orientation))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_only_the_orientation(photo: Image.Image) -> None:
    for exif in (b"garbage", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0"):
        assert decoded(encoded(photo, "JPEG", exif=exif)).shape == (30, 40, 3)


def test_grey_and_black_and_white_become_rgb() -> None:
    grey = Image.frombytes("L", (3, 1), bytes([0, 100, 255]))
    assert decoded(encoded(grey)).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    assert decoded(encoded(grey.point([0] * 128 + [255] * 128).convert("1"))).tolist() == [
        [[0] * 3, [0] * 3, [255] * 3]
    ]


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (*RED, alpha))
    # Red over white at 51/255 = 1/5: the other channels keep 4/5 of 255.
    assert decoded(encoded(image)).tolist() == [[[255, 255, 255], [255, 204, 204], [255, 0, 0]]]
    grey = Image.merge(
        "LA", [Image.frombytes("L", (2, 1), bytes([0, 0])), Image.frombytes("L", (2, 1), bytes([0, 255]))]
    )
    assert decoded(encoded(grey)).tolist() == [[[255] * 3, [0] * 3]]


def test_a_palette_is_looked_up_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert decoded(encoded(image)).tolist() == [[list(RED), list(BLUE)]]
    assert decoded(encoded(image, "GIF")).tolist() == [[list(RED), list(BLUE)]]
    assert decoded(encoded(image, transparency=0)).tolist() == [[[255] * 3, list(BLUE)]]
    assert decoded(encoded(image, transparency=b"\x00\xff")).tolist() == [[[255] * 3, list(BLUE)]]
    assert decoded(encoded(image, "GIF", transparency=0)).tolist() == [[[255] * 3, list(BLUE)]]


def test_a_palette_with_alpha_is_laid_on_white() -> None:
    image = Image.new("PA", (1, 1))
    image.putpalette([*RED])
    image.putalpha(0)
    assert decoded(encoded(image, "TIFF")).tolist() == [[[255] * 3]]


def test_cmyk_comes_out_in_its_colours() -> None:
    for kind, options in (("TIFF", {}), ("JPEG", {"quality": 100})):  # Pillow writes the inverted form of Adobe
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        assert np.abs(decoded(encoded(image, kind, **options)).astype(int) - RED).max() <= 3, kind


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decoded(data)[0, 0].astype(int) - RED).max() <= 3, kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(values.astype(np.float64) / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(decoded(encoded(Image.fromarray(values), kind))[..., 1], expected)


def test_big_endian_16_bit_and_the_wide_integers_of_tiff_are_scaled_alike() -> None:
    values = np.array([[0, 257, 32896, 65535]])
    for image in (Image.fromarray(values.astype(">u2")), Image.fromarray(values.astype(np.int32))):
        assert decoded(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 1, 128, 255], image.mode


def test_16_bit_grey_with_a_transparent_value_shows_white_there() -> None:
    data = png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0, 32896, 65535), chunk(b"tRNS", struct.pack(">H", 0)))
    assert decoded(data)[0, :, 0].tolist() == [255, 128, 255]


def test_16_bit_colour_keeps_its_high_byte() -> None:
    assert decoded(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0, 32896, 65535))).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_grey_is_scaled_from_the_range_it_uses(white: float) -> None:
    image = Image.fromarray(np.array([[0, white / 2, white]], dtype=np.float32))
    assert decoded(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "reason"),
    [([-1.0, 0.5], "grey values from -1 to 0.5, outside 0 to 65535"), ([0.0, float("nan")], "grey values from nan")],
)
def test_float_grey_without_a_known_white_is_refused(values: list[float], reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decoded(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_file_gives_all_of_its_picture_or_none(photo: Image.Image, kind: str) -> None:
    data = encoded(photo, kind)
    whole, refused = decoded(data), 0
    for length in range(0, len(data), max(1, len(data) // 50)):
        try:
            # What follows the last pixel, such as PNG's end mark, may be lacking.
            assert np.array_equal(decoded(data[:length]), whole), length
        except UnreadableImage:
            refused += 1
    assert refused > 35


def test_damaged_bytes_never_raise_anything_else(photo: Image.Image) -> None:
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        intact = np.frombuffer(encoded(photo, kind), np.uint8)
        for _ in range(40):
            data = intact.copy()
            places = generator.integers(0, min(len(data), 200), 3)
            data[places] = generator.integers(0, 256, 3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert decode_rgb(data.tobytes(), name="x").mode == "RGB"
                except UnreadableImage as error:
                    assert error.name == "x" and error.reason and "\n" not in error.reason


def test_other_files_are_refused(photo: Image.Image, tmp_path: Path) -> None:
    kinds = r"not a PNG, JPEG, WebP, BMP, GIF or TIFF image"
    with pytest.raises(UnreadableImage, match=rf"^a.txt: {kinds} \(5 bytes\)$"):
        decode_rgb(b"hello", name="a.txt")
    with pytest.raises(UnreadableImage, match=rf"^empty.png: {kinds} \(0 bytes\)$"):
        decode_rgb(b"", name="empty.png")
    with pytest.raises(UnreadableImage, match=kinds):
        decode_rgb(encoded(photo, "ICO"), name="x")
    with pytest.raises(UnreadableImage, match=r"^gone.png: No such file or directory$"):
        decode_rgb(tmp_path / "gone.png", name="gone.png")


@pytest.mark.parametrize("limit", [1000, 100])  # 1200 pixels: Pillow warns above the limit, and refuses above twice it
def test_a_decompression_bomb_is_refused_without_a_warning(
    photo: Image.Image, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match=r"^x: .*(1200|40 x 30) pixels.* limit of"):
            decode_rgb(data, name="x")


def test_the_refusal_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "empty")))
    assert (error.name, error.reason, str(error)) == ("a.png", "empty", "a.png: empty")


def lanczos(pixels: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Lanczos-3 along one axis in float64, one output at a time, straight from the definition."""
    count = pixels.shape[axis]
    scale = count / length
    stretch = max(scale, 1.0)
    centres = np.arange(count) + 0.5
    outputs = []
    for index in range(length):
        distance = (centres - (index + 0.5) * scale) / stretch
        weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
        outputs.append(np.tensordot(weights / weights.sum(), pixels, axes=(0, axis)))
    return np.stack(outputs, axis=axis)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (31, 47), (90, 33), (33, 90), (64, 64), (17, 20)])
def test_the_crop_is_the_centre_of_the_whole_picture_scaled(width: int, height: int) -> None:
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([128 + 90 * np.sin(9 * x), 128 + 90 * np.cos(7 * y), 40 + 150 * x * y], -1).round()
    scale = 32 / min(width, height)
    columns, rows = int(width * scale + 0.5), int(height * scale + 0.5)
    left, top = (columns - 32) // 2, (rows - 32) // 2
    expected = lanczos(lanczos(pixels, columns, 1), rows, 0)[top : top + 32, left : left + 32]
    square = square_crop(Image.fromarray(pixels.astype(np.uint8)), 32)
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8
    assert square.flags.c_contiguous and square.flags.writeable
    assert np.abs(square - expected.clip(0, 255)).max() <= 1.5  # rounded once per pass


def test_a_picture_of_the_right_size_passes_unchanged(photo: Image.Image) -> None:
    assert np.array_equal(square_crop(photo, 30), np.array(photo)[:, 5:35])


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 1)])
def test_a_strip_is_no_memory_bomb(size: tuple[int, int]) -> None:
    assert (square_crop(Image.new("RGB", size, RED), 64) == RED).all()
