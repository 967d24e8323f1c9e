"""What a picture's header tells, without decoding it: the size it is seen in, and whether it has transparency.

Only of pictures with transparency whose colours under it count are the pixels looked at.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from library.data.pixels import FORMATS, UnreadableImage, hides_colours

_FORMATS_BY_ENDING = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".avif": "AVIF",
    ".jxl": "JXL",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
}
# Pictures all the same, which a user may wonder about. What Pillow knows would hold PDFs and films as well.
_PICTURES = frozenset(
    """
    .png .apng .jpg .jpeg .jpe .jfif .pjp .pjpeg .jif .jfi .webp .bmp .dib .gif .tif .tiff .avif .avifs .jxl .jp2 .j2k .jpf .jpx
    .jpm .j2c .jpc .heic .heics .heif .heifs .hif .tga .icb .vda .vst .psd .psb .xcf .kra .svg .svgz .ico .cur .icns .dds .exr
    .hdr .qoi .pcx .ppm .pgm .pbm .pnm .pam .pfm .sgi .rgb .rgba .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef
    .srw .x3f .3fr .raw
    """.split()  # noqa: SIM905
)
_READERS = 8  # threads: reading headers waits for the disk
_TURNED = range(5, 9)  # values of the EXIF orientation that swap width and height


class Header(NamedTuple):
    size: tuple[int, int]
    """(width, height) after the EXIF rotation."""
    has_alpha: bool


@cache
def endings() -> tuple[str, ...]:
    """File name endings of the pictures to train on, lower case: kohya's and JPEG's, as far as `decode_rgb` reads them."""
    Image.init()
    return tuple(ending for ending, kind in _FORMATS_BY_ENDING.items() if kind in FORMATS and kind in Image.OPEN)


def unread_pictures(names: Sequence[str], read: Sequence[str]) -> str | None:
    """A phrase such as "2 .heic (a.heic; b.heic), 1 .tga (c.tga)" for the pictures among file names that are not read.

    read: endings of those that are, lower case. Hidden files do not count. None where there is none.
    """
    kinds = {name: os.path.splitext(name)[1].lower() for name in names if not os.path.basename(name).startswith(".")}
    found = {name: kind for name, kind in kinds.items() if kind in _PICTURES and kind not in read}
    counted = sorted(Counter(found.values()).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {kind} ({_first(found, kind)})" for kind, n in counted) or None


def _first(found: dict[str, str], kind: str) -> str:
    own = [name for name, its in found.items() if its == kind]
    return "; ".join([*own[:3], *(["..."] if len(own) > 3 else [])])


def read_header(path: Path) -> Header:
    """Read the header of an image file. Raises UnreadableImage as `decode_rgb` does, but for damaged pixels."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if 0 in image.size:
                raise UnreadableImage(str(path), f"{image.width} x {image.height} pixels, nothing to see")
            if limit is not None and image.width * image.height > limit:
                raise UnreadableImage(
                    str(path), f"{image.width} x {image.height} pixels, more than the limit of {limit}"
                )
            size, has_alpha = image.size, image.has_transparency_data
            if image.format == "PNG" and _has_text_behind_pixels(file):
                image.load()  # brings in the EXIF chunk that some tools write at the end
            orientation = None
            with suppress(Exception):  # damaged EXIF says nothing about the pixels
                # The method of the base class: the one of PNG decodes the whole picture where there is no EXIF.
                orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            return Header(size[::-1] if orientation in _TURNED else size, has_alpha)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(str(path), "not an image, or of a format that is not read") from None
    except Exception as error:
        # Damaged files make Pillow raise nearly anything: OSError, SyntaxError, struct.error, KeyError ...
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(str(path), (text.splitlines() or [type(error).__name__])[0]) from error


def read_headers(paths: Iterable[Path]) -> list[Header | UnreadableImage]:
    """The headers of many files, in order; the error in the place of one that cannot be read."""

    def read(path: Path) -> Header | UnreadableImage:
        try:
            return read_header(path)
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such sizes are refused
        return list(pool.map(read, paths))


def hiding_colours(paths: Iterable[Path]) -> set[Path]:
    """Those of some pictures with transparency of which `hides_colours` holds."""

    def hides(path: Path) -> bool:
        try:
            return hides_colours(path)
        except UnreadableImage:
            return False  # to be found when it is encoded

    chosen = list(paths)
    with ThreadPoolExecutor(_READERS) as pool:
        return {path for path, hiding in zip(chosen, pool.map(hides, chosen), strict=True) if hiding}


def _has_text_behind_pixels(file: IO[bytes]) -> bool:
    """Whether a PNG has chunks that may hold EXIF or XMP after those of its pixels. Leaves the position as it was."""
    before = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            seen_pixels = seen_pixels or kind == b"IDAT"
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(before)
