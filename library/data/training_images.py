"""Which images a dataset has, each with its caption and mask, and which of them are held out for validation.

Only headers of images are read here; pixels are the business of the caches.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from library.data.caption_files import CaptionFolders, names_in, read_captions, read_metadata, some
from library.data.dataset_schema import Dataset, Subset
from library.data.image_headers import Header, endings, read_headers
from library.data.pixels import UnreadableImage
from library.errors import UserError
from library.words import plural

CaptionSource = Literal["file", "class_tokens", "metadata", "none", "class"]
MissingCaption = Literal["empty", "class_tokens", "skip", "error"]

MAX_ID_BYTES = 400  # LMDB keys end at 511, and stores append what they hold
DEFAULT_EXTENSION = ".caption"

_NO_CAPTION = "without a caption"
_IMAGE_LIKE = (".tif", ".tiff", ".gif", ".avif", ".jxl", ".heic")  # pictures that a user may wonder about
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image of one dataset. With several datasets over the same folder, each has one of its own."""

    sample_id: str
    """`<dataset>:<identity>`, unique in a run, at most MAX_ID_BYTES of UTF-8, and the same whatever other images do."""
    path: Path
    size: tuple[int, int]
    """(width, height) after the EXIF rotation, from the header."""
    caption: str
    """The first line of the caption, or all of them with enable_wildcard; nothing else has been done to it."""
    caption_source: CaptionSource
    mask: Path | None
    """Image of the same aspect. None also where the mask is the image's own alpha (`subset.alpha_mask`)."""
    subset: Subset

    @property
    def identity(self) -> str:
        """The sample_id without its dataset: the same for an image that is trained at several resolutions."""
        return self.sample_id.partition(":")[2]


@dataclass
class Collected:
    """What was found, and what the user should hear about it."""

    images: list[TrainingImage] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Path -> reason, such as `unreadable: image file is truncated`."""
    without_caption: list[str] = field(default_factory=list)
    """Paths of images that have neither a caption of their own nor class_tokens, whatever was done about them."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """An image file that is to be looked at."""

    path: Path
    identity: str
    metadata_caption: str | None = None


def has_images(folder: Path) -> bool:
    """Whether `folder`, or `images/` in it, has pictures to train on."""
    return any(_image_names(folder)) or any(_image_names(folder / "images"))


def collect_images(dataset: Dataset, *, missing_caption: MissingCaption = "class_tokens") -> Collected:
    """List the images of a dataset with their captions and masks.

    Images are those directly in `image_dir`, or in `image_dir/images` where it has none itself. Captions are files of
    the same stem beside the image, or in `captions/` beside `images/`; else the entry of `metadata_file`.

    Args:
        missing_caption: what becomes of an image without a caption of its own. class_tokens: the subset's class tokens,
            else an empty caption; empty: an empty caption even so; skip: it is dropped, and error: it ends the run,
            where there are no class tokens either.

    Raises UserError: a subset without images or with none left, a caption file or metadata that cannot be read or is
    not UTF-8, a missing mask or one of another aspect, metadata that name files outside of their root.
    """
    collected = Collected(notes=list(dataset.notes))
    sources: set[str] = set()
    times: Counter[str] = Counter()
    for subset in dataset.subsets:
        source = os.path.realpath(subset.metadata_file or subset.image_dir or "")
        if subset.num_repeats == 0:
            collected.notes.append(f"{_where(subset)} is left out: its num_repeats is 0.")
        elif source in sources:
            collected.notes.append(f"{_where(subset)} is in this dataset twice; the second subset is left out.")
        else:
            sources.add(source)
            _collect_subset(dataset, subset, missing_caption, collected, times)
    if not collected.images:
        raise UserError("The dataset has no images: num_repeats of all its subsets is 0.")
    return collected


def split_validation(
    images: Iterable[TrainingImage], share: float, seed: int | None
) -> tuple[list[TrainingImage], list[TrainingImage]]:
    """(training, validation): about `share` of the images, chosen by a hash of each one's identity and the seed.

    No image changes sides when others come or go, and one that is trained at several resolutions is on the same side
    in all of them. Of few images, the validation part may well be empty. Regularisation images are never held out.
    """
    training: list[TrainingImage] = []
    validation: list[TrainingImage] = []
    for image in images:
        held_out = is_held_out(image.identity, share, seed) and not image.subset.is_reg
        (validation if held_out else training).append(image)
    return training, validation


def is_held_out(identity: str, share: float, seed: int | None) -> bool:
    return split_place(identity, seed) < share * 2**64


def split_place(identity: str, seed: int | None) -> int:
    """Where an image stands between 0 and 2^64; what stands below the share of that is held out."""
    return int.from_bytes(blake2b(f"{seed}:{identity}".encode(), digest_size=8).digest(), "big")


def _where(subset: Subset) -> str:
    return str(subset.metadata_file or subset.image_dir)


def _collect_subset(
    dataset: Dataset, subset: Subset, missing_caption: MissingCaption, collected: Collected, times: Counter[str]
) -> None:
    dropped: dict[str, str] = {}
    if subset.metadata_file is not None:
        found = _in_metadata(subset, dropped)
        captions: list[str | None] = [image.metadata_caption for image in found]
        source: CaptionSource = "metadata"
    else:
        found = _in_folder(subset, dropped, collected.notes)
        captions = _captions(found, subset, collected.notes)
        source = "file"
    total = len(found) + len(dropped)
    headers = read_headers([image.path for image in found])
    masks = _masks(found, headers, subset, collected.notes)
    images, without_caption = [], []
    for image, caption, header, mask in zip(found, captions, headers, masks, strict=True):
        if isinstance(header, UnreadableImage):
            dropped[str(image.path)] = f"unreadable: {header.reason}"
            continue
        chosen: tuple[str, CaptionSource] = ("", "none")
        if caption is not None:
            chosen = caption, source
        elif subset.class_tokens is not None and missing_caption != "empty":
            chosen = subset.class_tokens, "class_tokens"
        elif subset.class_tokens is None:
            without_caption.append(str(image.path))
            if missing_caption == "skip":
                dropped[str(image.path)] = _NO_CAPTION
                continue
        times[image.identity] += 1
        sample_id = _sample_id(dataset.name, image.identity, times[image.identity])
        images.append(TrainingImage(sample_id, image.path, header.size, *chosen, mask, subset))
    if without_caption and missing_caption == "error":
        raise UserError(
            f"{_where(subset)}: {len(without_caption)} of {total} images have no caption ({some(without_caption)}). "
            "Write a text file of the same name for each, or set class_tokens, or let missing_caption be another than error."
        )
    if not images:
        raise UserError(_nothing_left(subset, total, dropped))
    opaque = sum(isinstance(header, Header) and not header.has_alpha for header in headers)
    if subset.alpha_mask and opaque:
        collected.notes.append(
            f"{_where(subset)}: {plural(opaque, 'image has', 'images have')} no alpha channel, so every pixel counts."
        )
    if subset.cache_info:
        collected.notes.append(f"{_where(subset)}: cache_info has no effect, sizes and captions are always read again.")
    collected.images += images
    collected.dropped |= dropped
    collected.without_caption += without_caption


def _nothing_left(subset: Subset, total: int, dropped: dict[str, str]) -> str:
    by_kind: dict[str, list[str]] = {}
    for path, reason in dropped.items():
        kind, _, detail = reason.partition(": ")
        name = os.path.basename(path)
        by_kind.setdefault(kind, []).append(f"{name}: {detail}" if detail else name)
    reasons = ", ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in by_kind.items())
    place = f" ({subset.place})" if subset.place else ""
    return f"No images left in {_where(subset)}: {total} found, {reasons}{place}."


def _sample_id(dataset: str, identity: str, occurrence: int) -> str:
    prefix = f"{dataset}+{occurrence}:" if occurrence > 1 else f"{dataset}:"
    return prefix + identity


def _identity(*parts: str) -> str:
    """The parts as one path; a long one as its hash and its end. 360 bytes leave room for the name of the dataset."""
    whole = posixpath.join(*parts).encode("utf-8", "backslashreplace")
    if len(whole) <= MAX_ID_BYTES - 40:
        return whole.decode()
    return f"{blake2b(whole, digest_size=16).hexdigest()}/{whole[-200:].decode('utf-8', 'ignore')}"


def _image_names(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.lower().endswith(endings()) and not name.startswith(".")]


def _in_folder(subset: Subset, dropped: dict[str, str], notes: list[str]) -> list[_Found]:
    assert subset.image_dir is not None  # checked when the subset was made
    folder = subset.image_dir
    names = _image_names(folder)
    inner = _image_names(folder / "images")
    name_parts: tuple[str, ...] = (subset.name,)
    if names and inner:
        notes.append(f"{folder}/images is left out, since {folder} has images itself.")
    elif inner:
        folder, names, name_parts = folder / "images", inner, (subset.name, "images")
    others = [name for name in names_in(folder) if name.lower().endswith(_IMAGE_LIKE) and name not in names]
    if others:
        notes.append(f"{folder}: pictures of kinds that are not read are left out ({some(others)}).")
    found = []
    for name in names:
        path = folder / name
        if not path.is_file():
            dropped[_printable(path)] = "not a file: " + ("a link to nothing" if path.is_symlink() else "a folder")
        elif _printable(path) != str(path):
            dropped[_printable(path)] = "with a name that is not UTF-8"
        else:
            found.append(_Found(path, _identity(*name_parts, name)))
    if not found and not dropped:
        kinds = ", ".join(ending[1:] for ending in endings())
        folders = [name for name in names_in(folder) if (folder / name).is_dir()]
        hint = f" It has folders ({some(folders)}), which are not looked into: name one of them." if folders else ""
        place = f" ({subset.place})" if subset.place else ""
        raise UserError(f"{folder} has no images{place}. Read are {kinds}.{hint}")
    return found


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _captions(found: Sequence[_Found], subset: Subset, notes: list[str]) -> list[str | None]:
    """The caption of each image in its file, None where there is no such file."""
    if not found:
        return []
    folder, extension = found[0].path.parent, subset.caption_extension
    folders = CaptionFolders(folder)
    files = [folders.find(image.path.stem, extension) for image in found]
    if extension == DEFAULT_EXTENSION and not any(files):
        files = [folders.find(image.path.stem, ".txt") for image in found]
        if count := sum(file is not None for file in files):
            notes.append(f"{folder}: captions are taken from {count} .txt files, since there are no {extension} files.")
    there = sorted({file for file in files if file is not None})
    texts = dict(zip(there, read_captions(there), strict=True))
    if empty := [file.name for file in there if not texts[file].lines]:
        notes.append(f"{folder}: caption files that are empty stand for an empty caption ({some(empty)}).")
    longer = [file.name for file in there if len(texts[file].lines) > 1]
    if longer and not subset.enable_wildcard:
        notes.append(
            f"{folder}: only the first line is used of captions with more ({some(longer)}); "
            "enable_wildcard draws one of the lines."
        )
    return [None if file is None else texts[file].caption(all_lines=subset.enable_wildcard) for file in files]


def _in_metadata(subset: Subset, dropped: dict[str, str]) -> list[_Found]:
    assert subset.metadata_file is not None
    entries = read_metadata(subset.metadata_file)
    roots = [Path(), subset.metadata_file.parent] if subset.image_dir is None else [subset.image_dir]
    outside = [entry.key for entry in entries if not _stays_inside(entry.key, subset.image_dir)]
    if outside:
        root = subset.image_dir or subset.metadata_file.parent
        raise UserError(
            f"{subset.metadata_file} names images outside of {root} ({some(outside)}). "
            "Write paths that start in it, or leave image_dir out and write whole paths."
        )
    found, listings = [], dict[Path, dict[str, str]]()
    for entry in entries:
        path = _locate(entry.key, roots, listings)
        if path is None:
            dropped[entry.key] = "not there"
            continue
        caption = entry.joined(subset.caption_separator, all_lines=subset.enable_wildcard)
        if subset.image_dir is not None:
            name = os.path.relpath(path, subset.image_dir)
        else:
            name = os.path.join(os.path.dirname(entry.key), path.name)
        found.append(_Found(path, _identity(subset.name, posixpath.normpath(Path(name).as_posix())), caption))
    return found


def _stays_inside(key: str, image_dir: Path | None) -> bool:
    """Whether a key does not climb out of the folder it starts in. A whole path may be anywhere if there is no image_dir."""
    key = posixpath.normpath(key.replace("\\", "/"))
    if key.startswith("/") or _DRIVE.match(key):
        roots = [] if image_dir is None else [os.path.abspath(image_dir), os.path.realpath(image_dir)]
        return image_dir is None or any(Path(key).is_relative_to(root) for root in roots)
    return key.split("/")[0] != ".." and "\0" not in key


def _locate(key: str, roots: Sequence[Path], listings: dict[Path, dict[str, str]]) -> Path | None:
    """The file of a metadata key, which may lack its ending, as kohya's older tools write it."""
    for root in roots:
        for spelling in dict.fromkeys([key, key.replace("\\", "/")]):
            path = root / spelling
            if path.is_file():
                return path
            if path.parent not in listings:
                # Of several endings the first by name.
                listings[path.parent] = {Path(name).stem: name for name in reversed(_image_names(path.parent))}
            if path.name in listings[path.parent]:
                return path.parent / listings[path.parent][path.name]
    return None


def _masks(
    found: Sequence[_Found], headers: Sequence[Header | UnreadableImage], subset: Subset, notes: list[str]
) -> list[Path | None]:
    """The mask of each image in conditioning_data_dir, checked to be there and of the same aspect."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return [None] * len(found)
    by_stem: dict[str, list[str]] = {}
    for name in _image_names(folder):
        by_stem.setdefault(Path(name).stem, []).append(name)
    masks: dict[Path, Path] = {}
    for image in found:
        if names := by_stem.get(image.path.stem):
            masks[image.path] = folder / (image.path.name if image.path.name in names else names[0])
    if missing := [image.path.name for image in found if image.path not in masks]:
        raise UserError(f"{folder} has no mask for {len(missing)} of {len(found)} images ({some(missing)}).")
    if unused := sorted(by_stem.keys() - {image.path.stem for image in found}):
        notes.append(f"{folder}: masks without an image are left out ({some(unused)}).")
    paths = sorted(set(masks.values()))
    sizes = dict(zip(paths, read_headers(paths), strict=True))
    wrong, unreadable = [], []
    for image, header in zip(found, headers, strict=True):
        mask, size = masks[image.path], sizes[masks[image.path]]
        if isinstance(size, UnreadableImage):
            unreadable.append(f"{mask}: {size.reason}")
        elif isinstance(header, Header) and not _same_aspect(size.size, header.size):
            wrong.append("{} is {}x{} for {}x{}".format(mask.name, *size.size, *header.size))
    if unreadable:
        raise UserError(f"Masks that cannot be read: {some(unreadable)}.")
    if wrong:
        raise UserError(f"{folder}: masks of another shape than their image ({some(wrong)}). Cut them alike.")
    return [masks[image.path] for image in found]


def _same_aspect(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether one is the other scaled, up to a pixel."""
    (mask_width, mask_height), (width, height) = mask, image
    return abs(mask_width - width * mask_height / height) <= 1 or abs(mask_height - height * mask_width / width) <= 1
