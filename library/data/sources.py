"""Where pictures and their classes come from: a folder of class folders, a CSV manifest, or a ZIP of either."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from library.data.caption_files import ByName, alike
from library.data.image_headers import unread_pictures
from library.data.manifests import CLASS_ID, COLUMNS, Sample, check_ids, check_paths, examples, parse_manifest, refuse
from library.data.pixels import UnreadableImage
from library.errors import UserError
from library.files import human_bytes, read_json

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_MEMBER_BYTES = 256 << 20  # a ZIP member that declares more is a bomb or no picture

_WNID = re.compile(r"n[0-9]{8}")  # of WordNet 3.0, as ImageNet names its class folders


class ImageSource(ABC):
    """Samples and the bytes of their files. Can be pickled, and read from threads."""

    def __init__(self, location: Path, samples: list[Sample], folder_names: list[str] | None = None) -> None:
        self.location = location
        self.samples = samples
        self.folder_names = folder_names
        """Class folders in the order of their class ids; None where a manifest gave the ids."""
        self.notes: list[str] = []
        """What the user should hear about it."""

    def describe(self) -> str:
        """Say in one phrase what is here: `data/demo/train.csv (images: 400, classes: 16)`."""
        classes = len({sample.class_id for sample in self.samples})
        return f"{self.location} (images: {len(self.samples)}, classes: {classes})"

    @abstractmethod
    def read(self, sample: Sample) -> bytes:
        """The bytes of one file. Raises UnreadableImage where it is missing or damaged."""

    @abstractmethod
    def signature(self, sample: Sample) -> bytes:
        """16 cheap bytes that change when the file does. Raises UnreadableImage where it is missing."""

    @abstractmethod
    def present(self) -> set[str]:
        """The paths, in the form of `Sample.path`, of every file that is there now."""


class FileSource(ImageSource):
    """Pictures that are files of their own. The signature is size and modification time."""

    def read(self, sample: Sample) -> bytes:
        try:
            return Path(sample.path).read_bytes()
        except OSError as error:
            raise UnreadableImage(sample.path, error.strerror or str(error)) from error

    def signature(self, sample: Sample) -> bytes:
        try:
            status = os.stat(sample.path)
        except OSError as error:
            raise UnreadableImage(sample.path, error.strerror or str(error)) from error
        return struct.pack("<Qq", status.st_size, status.st_mtime_ns)

    def present(self) -> set[str]:
        # One listing per folder instead of one stat per file, which on a network disk is one round trip each.
        found: set[str] = set()
        for folder in {os.path.dirname(sample.path) for sample in self.samples}:
            found.update(entry.path for entry in _scan(folder) if entry.is_file())
        return found


class ZipSource(ImageSource):
    """Pictures that are members of one ZIP. The signature is CRC-32 and size.

    The archive is opened at the first use in each process, and again after a fork, since a shared file descriptor
    has one position. Threads share it: ZipFile locks around each of its reads.
    """

    _opened: tuple[int, zipfile.ZipFile] | None = None

    def read(self, sample: Sample) -> bytes:
        name = f"{self.location}:{sample.path}"
        info = self._member(sample)
        try:
            with self._archive().open(info) as file:
                # Never more than declared: what is behind it would not be checked against the CRC either.
                return file.read(info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
            raise UnreadableImage(name, f"damaged in the archive ({error})") from error

    def signature(self, sample: Sample) -> bytes:
        info = self._member(sample)
        return struct.pack("<QQ", info.CRC, info.file_size)

    def present(self) -> set[str]:
        return set(self._archive().namelist())

    def _member(self, sample: Sample) -> zipfile.ZipInfo:
        try:
            return self._archive().getinfo(sample.path)
        except KeyError:
            raise UnreadableImage(f"{self.location}:{sample.path}", "not in the archive") from None

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.location))
            except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
                raise UserError(
                    f"{self.location} is not a readable ZIP ({error}). Download or pack it again."
                ) from None
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


def open_source(path: Path | str, *, image_root: Path | None = None) -> ImageSource:
    """Find out what `path` is, list its samples and check all that can be checked without reading a picture.

    - A folder of class folders (ImageNet's layout): class ids by sorted folder name; sample_id is the file's stem, or
      `<class>/<stem>` for a stem that occurs more than once. Deeper folders and hidden files are left out.
    - A `.csv` with the columns sample_id, path, class_id; paths are relative to `image_root`, else to the CSV.
    - A `.zip` with `manifest.csv` (or one other CSV) whose paths are member names, or with class folders inside.

    Raises:
        UserError: nothing there, no such layout, a bad or duplicate row, a path that leaves its root, a ZIP bomb.
            Files that a manifest names in vain are the caller's to judge; see `missing_files`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder of class folders, a CSV manifest or a ZIP.")
    if path.is_file() and path.suffix.lower() == ".csv":
        return _open_manifest(path, image_root)
    if image_root is not None:
        raise UserError(f"--image_root {image_root} goes with a CSV manifest, but {path} is none. Leave it out.")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return _open_archive(path)
    raise UserError(f"{path} is neither a folder of class folders, a CSV manifest (.csv) nor a ZIP.")


def missing_files(source: ImageSource) -> list[Sample]:
    """The samples whose file is not there, in order. Lists each folder once, so a million rows take seconds."""
    present = source.present()
    return [sample for sample in source.samples if sample.path not in present]


def load_class_names(path: Path | str | None, *, folder_names: Sequence[str] | None = None) -> dict[int, str]:
    """Read what each class id is called.

    The JSON is `["tench", ...]`, `{"0": "tench"}`, `{"0": ["n01440764", "tench"]}` (torchvision's
    imagenet_class_index) or `{"n01440764": "tench"}`, as dataset_configs/imagenet_classes.json is. Where the source has
    class folders and the JSON knows their names, these decide, so that a subset of ImageNet's folders gets the right
    names from the whole list. Where a manifest numbers the classes, those of WordNet ids are numbered in their order,
    which is ImageNet's. Without a JSON the folder names serve. Underscores of folder names and of torchvision's list
    become spaces.

    Raises:
        UserError: not JSON, none of these forms, or neither a JSON nor folder names.
    """
    folders = {name: number for number, name in enumerate(folder_names or [])}
    if path is None:
        if not folders:
            raise UserError('The classes have no names: give a JSON file with them, such as {"0": "tench"}.')
        return {number: name.replace("_", " ") for name, number in folders.items()}
    content = read_json(path)
    entries = dict(enumerate(content)) if isinstance(content, list) else content
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'{path} has no class names. Expected {{"0": "tench", ...}} or ["tench", ...].')
    named: list[tuple[str, str]] = []  # (class id or folder, name)
    for key, value in entries.items():
        folder, name = str(key), value
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            folder, name = value[0] if value[0] in folders else folder, value[1].replace("_", " ")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: class {key!r} has the name {value!r}. Expected a text that is not empty.")
        named.append((folder, name))
    if any(folder in folders for folder, _ in named):
        return {folders[folder]: name for folder, name in named if folder in folders}
    if folder_names is None and all(is_wnid(key) for key, _ in named):
        return dict(enumerate(name for _, name in sorted(named)))
    if unknown := [folder for folder, _ in named if not CLASS_ID.fullmatch(folder)]:
        raise UserError(
            f"{path} has keys that are neither a class id nor a class folder of the data set ({examples(unknown)}). "
            "Name the classes by number, or use a folder of class folders."
        )
    return {int(number): name for number, name in named}


def is_wnid(name: str) -> bool:
    """Whether a class is called by its WordNet id."""
    return _WNID.fullmatch(name) is not None


def check_class_names(samples: Sequence[Sample], names: dict[int, str]) -> None:
    """Raise UserError where samples have class ids without a name."""
    nameless = sorted({sample.class_id for sample in samples} - names.keys())
    if nameless:
        known = f"names for ids {min(names)} to {max(names)} ({len(names)} in all)" if names else "no names"
        raise UserError(
            f"The data set has class ids without a name ({examples(nameless)}); there are {known}. "
            "Add the missing names, or correct the class ids."
        )


def _open_folder(path: Path) -> FileSource:
    root = os.path.abspath(path)
    entries = sorted(_scan(root), key=lambda entry: entry.name)
    # Not is_file(): a broken symlink is a missing picture, to be reported, not one that never was.
    files = {
        folder.name: [file for file in _scan(folder.path) if not file.is_dir()]
        for folder in entries
        if folder.is_dir() and not folder.name.startswith(".")
    }
    folders = {name: sorted(file.path for file in found if _is_image(file.name)) for name, found in files.items()}
    unread = _unread([f"{name}/{file.name}" for name, found in files.items() for file in found])
    empty = [name for name, images in folders.items() if not images]
    if len(empty) == len(folders):
        manifests = [entry.name for entry in entries if entry.name.lower().endswith(".csv")]
        hint = f" Or name a manifest in it ({examples(manifests)})." if manifests else ""
        raise UserError(
            f"{path} has no class folders with images; expected {path}/<class name>/*.jpg.{hint}{' '.join(['', *unread])}"
        )
    remedy = "Class ids follow the sorted folder names, so none is skipped: fill or remove it."
    refuse(str(path), empty, "class folders without images", " ".join([remedy, *unread]))
    source = FileSource(path, _samples_of_classes(path, folders), list(folders))
    source.notes += [f"{path}: {sentence}" for sentence in unread]
    return source


def _unread(names: list[str]) -> list[str]:
    """A sentence about the pictures among file names that are not read, if there are any."""
    unread = unread_pictures(sorted(names), EXTENSIONS)
    return [f"Pictures of kinds that are not read are left out: {unread}."] if unread else []


def _samples_of_classes(where: Path, folders: dict[str, list[str]]) -> list[Sample]:
    stems = {path: os.path.splitext(os.path.basename(path))[0] for paths in folders.values() for path in paths}
    times = Counter(stems.values())
    samples = [
        Sample(stems[path] if times[stems[path]] == 1 else f"{folder}/{stems[path]}", path, class_id)
        for class_id, (folder, paths) in enumerate(folders.items())
        for path in paths
    ]
    check_ids(str(where), samples, [sample.path for sample in samples])
    return samples


def _open_manifest(path: Path, image_root: Path | None) -> FileSource:
    root = os.path.abspath(path.parent if image_root is None else image_root)
    if not os.path.isdir(root):
        raise UserError(f"--image_root {image_root} is not a folder. Give the one that the paths of {path} start in.")
    source = FileSource(path, [])
    rows, places = _read_manifest(source, str(path), str(path))
    remedy = f"Write paths relative to {root}, or give another folder for them to start in with --image_root."
    check_paths(str(path), rows, places, remedy)
    samples = [Sample(row.sample_id, os.path.normpath(os.path.join(root, row.path)), row.class_id) for row in rows]
    entries = [entry for folder in {os.path.dirname(sample.path) for sample in samples} for entry in _scan(folder)]
    source.samples = _as_spelled_there(samples, [entry.path for entry in entries])
    if outside := _links_outside(root, source.samples, entries):
        found = [
            f"{place}: {row.path!r}"
            for place, row, sample in zip(places, rows, source.samples, strict=True)
            if sample.path in outside or os.path.dirname(sample.path) in outside
        ]
        refuse(str(path), found, f"path is a link to outside of {root}", remedy)
    source.notes += _twice(str(path), source.samples, places)
    return source


def _twice(where: str, samples: list[Sample], places: list[str]) -> list[str]:
    """A warning about pictures with two ids, if there are any: they are trained twice, perhaps as two classes."""
    named: dict[str, list[str]] = {}
    for place, sample in zip(places, samples, strict=True):
        named.setdefault(sample.path, []).append(place)
    twice = [f"{os.path.basename(path)} in {' and '.join(at)}" for path, at in named.items() if len(at) > 1]
    return [f"warning: {where}: pictures that are there twice under two ids ({examples(twice)})."] if twice else []


def _as_spelled_there(samples: list[Sample], there: Collection[str]) -> list[Sample]:
    """The samples with the paths that there are, where they differ in Unicode form or the case of the ending alone."""
    present = set(there)
    if all(sample.path in present for sample in samples):
        return samples
    spelled = ByName({path: path for path in there}, alike)
    return [replace(sample, path=spelled.get(sample.path) or sample.path) for sample in samples]


def _links_outside(root: str, samples: list[Sample], entries: list[os.DirEntry[str]]) -> set[str]:
    """The folders and files in use that are symbolic links, or lie behind one, to outside of `root`."""
    real_root = os.path.realpath(root)
    folders = {os.path.dirname(sample.path) for sample in samples}
    links = (entry.path for entry in entries if entry.is_symlink())
    return {path for path in (*folders, *links) if not Path(os.path.realpath(path)).is_relative_to(real_root)}


def _open_archive(path: Path) -> ZipSource:
    source = ZipSource(path, [])
    archive = source._archive()
    # Folder entries end in a slash; macOS adds a shadow tree named __MACOSX.
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    manifests = [name for name in names if name.lower().endswith(".csv")]
    if len(manifests) == 1 or "manifest.csv" in manifests:
        manifest = "manifest.csv" if "manifest.csv" in manifests else manifests[0]
        where = f"{path}:{manifest}"
        _check_members(path, archive, [manifest])
        samples, places = _read_manifest(source, manifest, where)
        source.samples = _as_spelled_there(samples, names)
        check_paths(where, source.samples, places, "Write the member names of the archive.")
        source.notes += _twice(where, source.samples, places)
    else:
        images = sorted(name for name in names if _is_image(posixpath.basename(name)))
        source.notes += [f"{path}: {sentence}" for sentence in _unread(names)]
        folders = {folder: list(paths) for folder, paths in itertools.groupby(images, posixpath.dirname)}
        if manifests or "" in folders or len({posixpath.dirname(folder) for folder in folders}) != 1:
            found = f"{len(manifests)} CSV files and {len(images)} images in {len(folders)} folders"
            raise UserError(
                f"{path} has neither a manifest.csv nor class folders side by side, but {found}. Add a manifest.csv "
                f"with the columns {', '.join(COLUMNS)}, or pack the images as <class name>/*.jpg."
            )
        classes = {posixpath.basename(folder): paths for folder, paths in sorted(folders.items())}
        samples = _samples_of_classes(path, classes)
        check_paths(str(path), samples, [sample.path for sample in samples], "Pack it again without such names.")
        source.samples, source.folder_names = samples, list(classes)
    _check_members(path, archive, [sample.path for sample in source.samples])
    return source


def _check_members(path: Path, archive: zipfile.ZipFile, names: list[str]) -> None:
    """Refuse what cannot be read within the memory it declares: zipfile bounds deflate, but not bzip2 and LZMA."""
    usual = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    found = [
        f"{info.filename}: {human_bytes(info.file_size)}, method {info.compress_type}, flags {info.flag_bits}"
        for info in (archive.NameToInfo[name] for name in names if name in archive.NameToInfo)
        if info.file_size > MAX_MEMBER_BYTES or info.flag_bits & 1 or info.compress_type not in usual
    ]
    remedy = f"Pack it again: stored or deflated, no password, no member above {human_bytes(MAX_MEMBER_BYTES)}."
    refuse(str(path), found, "members that are not read", remedy)


def _read_manifest(source: ImageSource, name: str, where: str) -> tuple[list[Sample], list[str]]:
    try:
        data = source.read(Sample("manifest", name, 0))
    except UnreadableImage as error:
        raise UserError(f"{error}. Make it readable, or get it again.") from None
    return parse_manifest(data, where)


def _scan(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} could not be listed: {error.strerror or error}.") from None


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)
