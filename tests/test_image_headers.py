"""The size of a picture is known from its header, and is the one that decoding gives."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from library.data.image_headers import endings, read_header
from library.data.pixels import UnreadableImage, decode_rgb
from tests.tools.dataset_files import picture, text


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_the_one_after_decoding(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = picture(tmp_path / f"a.{kind}", (12, 7), exif=exif)
    assert read_header(path).size == decode_rgb(path, name="a").size == ((7, 12) if orientation > 4 else (12, 7))


def test_exif_behind_the_pixels_of_a_png_counts_too(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png", (12, 7)).read_bytes()
    body = b"eXIf" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path = text(tmp_path / "b.png", content[:-12] + chunk + content[-12:])
    assert read_header(path).size == decode_rgb(path, name="b").size == (7, 12)


def test_only_formats_that_the_decoder_reads_are_looked_for(tmp_path: Path) -> None:
    assert set(endings()) >= {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    for ending in endings():
        path = picture(tmp_path / f"a{ending}")
        assert read_header(path).size == decode_rgb(path, name="a").size
    with pytest.raises(UnreadableImage):
        read_header(tmp_path / "nothing.png")
