"""Which images a dataset has, each with its caption and mask, and which of them are held out for validation.

Only headers of images are read here; pixels are the business of the caches.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from library.data.caption_files import ByName, CaptionFolders, names_in, one_form, read_captions, some
from library.data.dataset_schema import Dataset, Subset
from library.data.image_headers import Header, endings, hiding_colours, read_headers, unread_pictures
from library.data.picture_files import Found, image_names, in_folder, in_metadata
from library.data.pixels import UnreadableImage
from library.errors import UserError
from library.words import plural

CaptionSource = Literal["file", "class_tokens", "metadata", "none", "class"]
MissingCaption = Literal["empty", "class_tokens", "skip", "error"]

DEFAULT_EXTENSION = ".caption"

_NO_CAPTION = "without a caption"


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
    hidden_colours: bool = False
    """Whether colours under transparent pixels count: the image's own, with `subset.alpha_mask`, or those of its mask."""

    @property
    def shows_hidden_colours(self) -> bool:
        return self.hidden_colours and self.mask is None

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
    """(training, validation), as `held_out` chooses by the images' identities: one that is trained at several resolutions is
    on the same side in all of them. Regularisation images are never held out.
    """
    images = list(images)
    held = held_out((image.identity for image in images if not image.subset.is_reg), share, seed)
    training: list[TrainingImage] = []
    validation: list[TrainingImage] = []
    for image in images:
        (validation if image.identity in held and not image.subset.is_reg else training).append(image)
    return training, validation


def caption_endings(subset: Subset) -> tuple[str, ...]:
    """Endings of caption files, the first one first; of a picture. Nobody has to say which of the two usual ones it is."""
    extension = subset.caption_extension
    return (extension, ".txt") if extension == DEFAULT_EXTENSION else (extension,)


def held_out(identities: Iterable[str], share: float, seed: int | None) -> set[str]:
    """About `share` of the identities, chosen by a hash of each and the seed; of two or more one at least, of twenty two.

    None that stands below the share changes sides when others come or go. Where fewer than the least number do, the
    lowest of the others are held out too, and one that comes may take the place of one of these.
    """
    places = sorted((split_place(identity, seed), identity) for identity in set(identities))
    least = 0 if share <= 0 or len(places) < 2 else 1 if len(places) < 20 else 2
    return {name for rank, (place, name) in enumerate(places) if rank < least or place < share * 2**64}


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
        found = in_metadata(subset, dropped)
        captions: list[str | None] = [image.metadata_caption for image in found]
        source: CaptionSource = "metadata"
    else:
        found = in_folder(subset, dropped, collected.notes)
        captions = _captions(found, subset, collected.notes)
        source = "file"
    total = len(found) + len(dropped)
    headers = read_headers([image.path for image in found])
    masks = _masks(found, headers, subset, collected.notes)
    own_alpha = [
        image.path
        for image, header in zip(found, headers, strict=True)
        if subset.alpha_mask and isinstance(header, Header) and header.has_alpha
    ]
    hiding = hiding_colours([*own_alpha, *masks.with_alpha])
    images, without_caption = [], []
    for image, caption, header, mask in zip(found, captions, headers, masks.files, strict=True):
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
        hides = (image.path if mask is None else mask) in hiding
        images.append(TrainingImage(sample_id, image.path, header.size, *chosen, mask, subset, hides))
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


def _captions(found: Sequence[Found], subset: Subset, notes: list[str]) -> list[str | None]:
    """The caption of each image in its file, None where there is no such file."""
    if not found:
        return []
    folder, extension = found[0].path.parent, subset.caption_extension
    folders = CaptionFolders(folder)
    files = [folders.find(image.path.stem, extension) for image in found]
    without = [index for index, file in enumerate(files) if file is None]
    other = ".txt" if extension == DEFAULT_EXTENSION else DEFAULT_EXTENSION
    instead = {index: file for index in without if (file := folders.find(found[index].path.stem, other))}
    if instead and other in caption_endings(subset):
        files = [instead.get(index, file) for index, file in enumerate(files)]
        notes.append(
            f"{folder}: captions are taken from {plural(len(instead), f'{other} file')}, since "
            f"{'there are' if len(without) == len(found) else 'these pictures have'} no {extension} files."
        )
    elif instead:
        notes.append(
            f"{folder}: {plural(len(instead), f'{other} file is', f'{other} files are')} not read, since caption_extension is "
            f"{extension} ({some([file.name for file in instead.values()])})."
        )
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


class _Masks(NamedTuple):
    files: Sequence[Path | None]
    """Of each image."""
    with_alpha: Sequence[Path] = ()


def _masks(
    found: Sequence[Found], headers: Sequence[Header | UnreadableImage], subset: Subset, notes: list[str]
) -> _Masks:
    """The mask of each image in conditioning_data_dir, checked to be there and of the same aspect."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return _Masks([None] * len(found))
    by_stem: dict[str, list[str]] = {}
    for name in image_names(folder):
        by_stem.setdefault(Path(name).stem, []).append(name)
    masks: dict[Path, Path] = {}
    of_stem = ByName(by_stem, one_form)
    for image in found:
        if names := of_stem.get(image.path.stem):
            masks[image.path] = folder / (image.path.name if image.path.name in names else names[0])
    if missing := [image.path.name for image in found if image.path not in masks]:
        unread = unread_pictures(names_in(folder), endings())
        hint = f" Pictures of kinds that are not read: {unread}." if unread else ""
        raise UserError(f"{folder} has no mask for {len(missing)} of {len(found)} images ({some(missing)}).{hint}")
    used = {mask.stem for mask in masks.values()}
    if unused := sorted(by_stem.keys() - used):
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
    with_alpha = [path for path in paths if isinstance(header := sizes[path], Header) and header.has_alpha]
    return _Masks([masks[image.path] for image in found], with_alpha)


def _same_aspect(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether one is the other scaled, up to a pixel."""
    (mask_width, mask_height), (width, height) = mask, image
    return abs(mask_width - width * mask_height / height) <= 1 or abs(mask_height - height * mask_width / width) <= 1
