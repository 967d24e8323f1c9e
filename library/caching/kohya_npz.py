"""Latents that kohya's sd-scripts left beside the images, read so that nothing has to be encoded again.

    <image>_<width>x<height>_sd.npz, ..._sdxl.npz    width and height of the image; legacy: <image>.npz
    latents [4, h/8, w/8], latents_flipped           or latents_<h/8>x<w/8>, ...: one draw from the posterior, unscaled
    original_size [width, height]

They tell nothing of the VAE that made them, nor of how the picture was cut.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.caching.decoding import Imported
from library.caching.geometry import BucketCrop
from library.data.buckets import Fitted
from library.data.sources import Sample
from library.models.encoders import LOG_VARIANCE_FLOOR
from networks.families import Family

_HEADER_BYTES = 10_000  # numpy refuses longer ones
_VALUE_BYTES = 8  # of float64, the widest there is


class _Unusable(Exception):
    """Why a file is not used, in a few words."""


@dataclass(frozen=True)
class KohyaLatents:
    """Finds the entries of bucketed pictures in kohya's files.

    flipped: by the name of a store, whether its
    pictures are mirrored.
    """

    crop: BucketCrop
    family: Family
    flipped: Mapping[str, bool]

    def __call__(self, sample: Sample, stores: tuple[str, ...]) -> Imported:
        """Entries [2C, h/f, w/f] float16, the draw as mean and log-variances at their floor."""
        refused = None
        for path in self._files(sample):
            try:
                return Imported({name: self._entry(path, sample, self.flipped[name]) for name in stores})
            except _Unusable as error:
                refused = refused or str(error)
            except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
                # Also an array of objects, which is a pickle.
                refused = refused or "damaged, or of a kind that is not read"
        return Imported(refused=refused)

    def _files(self, sample: Sample) -> list[Path]:
        """Files that are there, kohya's first choice first."""
        image = Path(sample.path)
        width, height = self.crop.cuts[sample.sample_id].fitted.original
        names = [f"{image.stem}.npz", f"{image.stem}_{width:04d}x{height:04d}_{self.family.npz_suffix}.npz"]
        return [path for name in names if (path := image.with_name(name)).is_file()]

    def _entry(self, path: Path, sample: Sample, flipped: bool) -> np.ndarray:
        if os.stat(path).st_mtime_ns < os.stat(sample.path).st_mtime_ns:
            raise _Unusable("older than the image")
        fitted = self.crop.cuts[sample.sample_id].fitted
        if fitted.crop != _centred(fitted).crop:
            raise _Unusable("of the centre of an image that is cut elsewhere")
        channels, size = self.family.latent_channels, self.family.latent_size(*fitted.bucket)
        with open(path, "rb") as stream, zipfile.ZipFile(stream) as file:
            original = _read(file, "original_size", size, limit=64)
            if original is not None and tuple(original.ravel().tolist()) != fitted.original:
                raise _Unusable("of an image of another size")
            key = "latents_flipped" if flipped else "latents"
            draw = _read(file, key, size, limit=channels * size[0] * size[1] * _VALUE_BYTES)
        if draw is None:
            raise _Unusable("without flipped latents" if flipped else "without latents of this bucket")
        if draw.shape != (channels, *size) or draw.dtype.kind != "f":
            raise _Unusable("of another shape than the bucket")
        mean = draw.astype(np.float16)
        if not np.isfinite(mean).all():
            raise _Unusable("not finite")
        return np.concatenate([mean, np.full_like(mean, LOG_VARIANCE_FLOOR)])


def _centred(fitted: Fitted) -> Fitted:
    """The same picture with its centre kept, as kohya cuts all that it caches."""
    left, top = ((full - kept) // 2 for full, kept in zip(fitted.resized, fitted.bucket, strict=True))
    return fitted.cropped_at(left, top)


def _read(file: zipfile.ZipFile, key: str, size: tuple[int, int], limit: int) -> np.ndarray | None:
    """An array of the file, under its name with the size of the latents or else without; None where it has none."""
    for name in (f"{key}_{size[0]}x{size[1]}.npy", f"{key}.npy"):
        if name in file.NameToInfo:
            # What a member declares is allocated before it is read.
            if file.getinfo(name).file_size > limit + _HEADER_BYTES:
                raise _Unusable("of another shape than the bucket")
            with file.open(name) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    return None
