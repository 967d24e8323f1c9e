"""Where pictures and their classes come from: a folder of class folders, a CSV manifest, or a ZIP of either."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import os
import posixpath
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.pixels import UnreadableImage
from library.errors import UserError
from library.files import human_bytes, read_json
from library.text_files import NotText, decoded

COLUMNS = ("sample_id", "path", "class_id")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_ID_BYTES = 480  # LMDB keys end at 511, and the stores append "_mid" and "#shape"
MAX_MEMBER_BYTES = 256 << 20  # a ZIP member that declares more is a bomb or no picture

_CLASS_ID = re.compile(r"\s*[0-9]{1,9}\s*")
# Empty, absolute, upward. Either separator and drive letters, whatever the system that reads it.
_OUTSIDE = re.compile(r"\A(?:\Z|[/\\]|[A-Za-z]:)|(?:\A|[/\\])\.\.(?:[/\\]|\Z)|\0")


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture: its key in every cache, its file path or ZIP member name, and its class number."""

    sample_id: str
    path: str
    class_id: int


class ImageSource(ABC):
    """Samples and the bytes of their files. Can be pickled, and read from DataLoader workers and threads."""

    def __init__(self, location: Path, samples: list[Sample], folder_names: list[str] | None = None) -> None:
        self.location = location
        self.samples = samples
        self.folder_names = folder_names
        """Class folders in the order of their class ids; None where a manifest gave the ids."""

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
    imagenet_class_index) or `{"n01440764": "tench"}`. Where the source has class folders and the JSON knows their
    names, these decide, so that a subset of ImageNet's folders gets the right names from the whole list.
    Without a JSON the folder names serve. Underscores of folder names and of torchvision's list become spaces.

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
    if unknown := [folder for folder, _ in named if not _CLASS_ID.fullmatch(folder)]:
        raise UserError(
            f"{path} has keys that are neither a class id nor a class folder of the data set ({_examples(unknown)}). "
            "Name the classes by number, or use a folder of class folders."
        )
    return {int(number): name for number, name in named}


def check_class_names(samples: Sequence[Sample], names: dict[int, str]) -> None:
    """Raise UserError where samples have class ids without a name."""
    nameless = sorted({sample.class_id for sample in samples} - names.keys())
    if nameless:
        known = f"names for ids {min(names)} to {max(names)} ({len(names)} in all)" if names else "no names"
        raise UserError(
            f"The data set has class ids without a name ({_examples(nameless)}); there are {known}. "
            "Add the missing names, or correct the class ids."
        )


def _open_folder(path: Path) -> FileSource:
    root = os.path.abspath(path)
    entries = sorted(_scan(root), key=lambda entry: entry.name)
    # Not is_file(): a broken symlink is a missing picture, to be reported, not one that never was.
    folders = {
        folder.name: sorted(file.path for file in _scan(folder.path) if _is_image(file.name) and not file.is_dir())
        for folder in entries
        if folder.is_dir() and not folder.name.startswith(".")
    }
    empty = [name for name, images in folders.items() if not images]
    if len(empty) == len(folders):
        manifests = [entry.name for entry in entries if entry.name.lower().endswith(".csv")]
        hint = f" Or name a manifest in it ({_examples(manifests)})." if manifests else ""
        raise UserError(f"{path} has no class folders with images; expected {path}/<class name>/*.jpg.{hint}")
    remedy = "Class ids follow the sorted folder names, so none is skipped: fill or remove it."
    _refuse(str(path), empty, "class folders without images", remedy)
    return FileSource(path, _samples_of_classes(path, folders), list(folders))


def _samples_of_classes(where: Path, folders: dict[str, list[str]]) -> list[Sample]:
    stems = {path: os.path.splitext(os.path.basename(path))[0] for paths in folders.values() for path in paths}
    times = Counter(stems.values())
    samples = [
        Sample(stems[path] if times[stems[path]] == 1 else f"{folder}/{stems[path]}", path, class_id)
        for class_id, (folder, paths) in enumerate(folders.items())
        for path in paths
    ]
    _check_ids(str(where), samples, [sample.path for sample in samples])
    return samples


def _open_manifest(path: Path, image_root: Path | None) -> FileSource:
    root = os.path.abspath(path.parent if image_root is None else image_root)
    if not os.path.isdir(root):
        raise UserError(f"--image_root {image_root} is not a folder. Give the one that the paths of {path} start in.")
    source = FileSource(path, [])
    rows, places = _parse_manifest(source, str(path), str(path))
    remedy = f"Write paths relative to {root}, or give another folder for them to start in with --image_root."
    _check_paths(str(path), rows, places, remedy)
    source.samples = [
        Sample(row.sample_id, os.path.normpath(os.path.join(root, row.path)), row.class_id) for row in rows
    ]
    if outside := _links_outside(root, source.samples):
        found = [
            f"{place}: {row.path!r}"
            for place, row, sample in zip(places, rows, source.samples, strict=True)
            if sample.path in outside or os.path.dirname(sample.path) in outside
        ]
        _refuse(str(path), found, f"path is a link to outside of {root}", remedy)
    return source


def _links_outside(root: str, samples: list[Sample]) -> set[str]:
    """The folders and files in use that are symbolic links, or lie behind one, to outside of `root`."""
    real_root = os.path.realpath(root)
    folders = {os.path.dirname(sample.path) for sample in samples}
    links = (entry.path for folder in folders for entry in _scan(folder) if entry.is_symlink())
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
        source.samples, places = _parse_manifest(source, manifest, where)
        _check_paths(where, source.samples, places, "Write the member names of the archive.")
    else:
        images = sorted(name for name in names if _is_image(posixpath.basename(name)))
        folders = {folder: list(paths) for folder, paths in itertools.groupby(images, posixpath.dirname)}
        if manifests or "" in folders or len({posixpath.dirname(folder) for folder in folders}) != 1:
            found = f"{len(manifests)} CSV files and {len(images)} images in {len(folders)} folders"
            raise UserError(
                f"{path} has neither a manifest.csv nor class folders side by side, but {found}. Add a manifest.csv "
                f"with the columns {', '.join(COLUMNS)}, or pack the images as <class name>/*.jpg."
            )
        classes = {posixpath.basename(folder): paths for folder, paths in sorted(folders.items())}
        samples = _samples_of_classes(path, classes)
        _check_paths(str(path), samples, [sample.path for sample in samples], "Pack it again without such names.")
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
    _refuse(str(path), found, "members that are not read", remedy)


def _parse_manifest(source: ImageSource, name: str, where: str) -> tuple[list[Sample], list[str]]:
    """The rows of a CSV as samples, with their paths as written, and the place of each: `line 2`."""
    try:
        text = decoded(source.read(Sample("manifest", name, 0)))
    except UnreadableImage as error:
        raise UserError(f"{error}. Make it readable, or get it again.") from None
    except NotText as error:
        raise UserError(f"{where} is {error}. Save it as CSV UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        table = [(f"line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}, is not CSV ({error}). Check its quotes.") from None
    header = [name.strip() for name in table[0][1]] if table else []
    if missing := [name for name in COLUMNS if name not in header]:
        near = [(found, name) for name in missing for found in difflib.get_close_matches(name, header, n=1)]
        hints = "".join(f" Is {found!r} meant to be {name!r}?" for found, name in near)
        raise UserError(
            f"{where} has no column {' or '.join(missing)}; its first line is {','.join(header)!r}.{hints} "
            f"The first line must name {', '.join(COLUMNS)}."
        )
    if len(table) == 1:
        raise UserError(f"{where} has a header but no rows. Write one row per image.")
    id_at, path_at, class_at = (header.index(name) for name in COLUMNS)
    ragged = [f"{place}: {len(row)}" for place, row in table if len(row) != len(header)]
    _refuse(where, ragged, f"the number of columns is not {len(header)}", "Put quotes around a path with a comma.")
    places, rows = [place for place, _ in table[1:]], [row for _, row in table[1:]]
    unnumbered = [f"{place}: {row[class_at]!r}" for place, row in table[1:] if not _CLASS_ID.fullmatch(row[class_at])]
    _refuse(where, unnumbered, "class_id is not a whole number from 0", "Number the classes, the first one 0.")
    samples = [Sample(row[id_at], row[path_at], int(row[class_at])) for row in rows]
    _check_ids(where, samples, places)
    return samples, places


def _check_ids(where: str, samples: list[Sample], places: list[str]) -> None:
    first: dict[str, str] = {}
    unusable, repeated = [], []
    for place, sample in zip(places, samples, strict=True):
        key = sample.sample_id.encode("utf-8", "replace")
        if not sample.sample_id.strip() or len(key) > MAX_ID_BYTES or key.decode() != sample.sample_id:
            unusable.append(f"{place}: {sample.sample_id[:24]!r}, {len(key)} bytes")
        elif first.setdefault(sample.sample_id, place) is not place:
            repeated.append(f"{sample.sample_id!r} in {first[sample.sample_id]} and {place}")
    _refuse(where, unusable, f"sample_id is not 1 to {MAX_ID_BYTES} bytes of UTF-8", "It is a cache key: rename it.")
    _refuse(where, repeated, "sample_id is there twice", "Give every image a name of its own.")


def _check_paths(where: str, samples: list[Sample], places: list[str], remedy: str) -> None:
    """Refuse paths that are empty or could name anything outside of the folder or archive they start in."""
    found = [f"{place}: {s.path!r}" for place, s in zip(places, samples, strict=True) if _OUTSIDE.search(s.path)]
    _refuse(where, found, "path is empty, absolute or leaves the folder it starts in", remedy)


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


def _refuse(where: str, found: Sequence[str], problem: str, remedy: str) -> None:
    if found:
        raise UserError(f"{where}: {problem} ({_examples(found)}). {remedy}")


def _examples(found: Sequence[object]) -> str:
    return "; ".join([*(str(one) for one in found[:3]), f"{len(found)} in all"])
