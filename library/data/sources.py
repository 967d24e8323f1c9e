"""Where pictures and their classes come from: a folder of class folders, a CSV manifest, or a ZIP of either."""

from __future__ import annotations

import csv
import difflib
import io
import os
import posixpath
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.pixels import UnreadableImage
from library.errors import UserError
from library.files import human_bytes, read_json

COLUMNS = ("sample_id", "path", "class_id")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_ID_BYTES = 480  # LMDB keys end at 511, and the stores append "_mid" and "#shape"
MAX_MEMBER_BYTES = 256 << 20  # a ZIP member that declares more is a bomb or no picture

# Either separator and drive letters, whatever the system: a manifest is as dangerous as the machine that reads it.
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")
_UPWARD = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")


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
        """Say in one phrase what is here: `400 images of 16 classes in data/demo/train.csv`."""
        classes = len({sample.class_id for sample in self.samples})
        return f"{_count(len(self.samples), 'image')} of {_count(classes, 'class')} in {self.location}"

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
                data = file.read(info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise UnreadableImage(name, f"damaged in the archive ({error})") from error
        if len(data) != info.file_size:
            raise UnreadableImage(name, f"damaged in the archive ({len(data)} of {info.file_size} bytes)")
        return data

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
            self._opened = (os.getpid(), _open_zip(self.location))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


def open_source(path: Path | str, *, image_root: Path | None = None) -> ImageSource:
    """Find out what `path` is, list its samples and check all that can be checked without reading a picture.

    - A folder of class folders (ImageNet's layout): class ids by sorted folder name; sample_id is the file's stem, or
      `<class>/<stem>` for a stem that occurs more than once. Deeper folders and hidden files are left out.
    - A `.csv` with the columns sample_id, path, class_id; paths are relative to `image_root`, else to the CSV.
    - A `.zip` with `manifest.csv` (or one other CSV) whose paths are member names, or with class folders inside.

    Files that a manifest names and nobody has are not looked for here; see `missing_files`.

    Raises:
        UserError: nothing there, no such layout, a bad or duplicate row, a path that leaves its root, a ZIP bomb.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder of class folders, a CSV manifest or a ZIP.")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if image_root is not None and kind != ".csv":
        raise UserError(f"--image_root {image_root} goes with a CSV manifest, but {path} is none. Leave it out.")
    if kind == "folder":
        return _open_folder(path)
    if kind == ".csv":
        return _open_manifest(path, image_root)
    if kind == ".zip" or zipfile.is_zipfile(path):
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
            folder = value[0] if value[0] in folders else folder
            name = value[1].replace("_", " ")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: class {key!r} has the name {value!r}. Expected a text that is not empty.")
        named.append((folder, name))
    if any(folder in folders for folder, _ in named):
        return {folders[folder]: name for folder, name in named if folder in folders}
    if unknown := [folder for folder, _ in named if not _is_class_id(folder)]:
        raise UserError(
            f"{_count(len(unknown), 'key')} of {path} could be matched with neither a class id nor a class folder of "
            f"the data set ({_examples(map(repr, unknown))}). Name the classes by number, or use class folders."
        )
    return {int(number): name for number, name in named}


def check_class_names(samples: Sequence[Sample], names: dict[int, str]) -> None:
    """Raise UserError where samples have class ids without a name."""
    nameless = sorted({sample.class_id for sample in samples} - names.keys())
    if nameless:
        known = f"names for ids {min(names)} to {max(names)} ({len(names)} in all)" if names else "no names"
        raise UserError(
            f"No class name for {_count(len(nameless), 'class id')} of the data set ({_examples(map(str, nameless))}); "
            f"there are {known}. Add the missing names, or correct the class ids."
        )


def _open_folder(path: Path) -> FileSource:
    root = os.path.abspath(path)
    entries = sorted(_scan(root), key=lambda entry: entry.name)
    folders = {entry.name: _images_in(entry.path) for entry in entries if entry.is_dir() and entry.name[0] != "."}
    empty = [name for name, images in folders.items() if not images]
    if len(empty) == len(folders):
        manifests = [entry.name for entry in entries if entry.name.lower().endswith(".csv")]
        hint = f"; or give one of its manifests ({_examples(manifests)})" if manifests else ""
        raise UserError(f"{path} has no class folders with images. Expected {path}/<class name>/*.jpg{hint}.")
    if empty:
        raise UserError(
            f"{_count(len(empty), 'class folder')} of {path} without images ({_examples(empty)}). Class ids follow the "
            "sorted folder names, so none is skipped: fill or remove it."
        )
    return FileSource(path, _samples_of_classes(path, folders), list(folders))


def _images_in(folder: str) -> list[str]:
    # Not is_file(): a broken symlink is a missing picture, to be reported, not one that never was.
    return sorted(entry.path for entry in _scan(folder) if _is_image(entry.name) and not entry.is_dir())


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _samples_of_classes(where: Path, folders: dict[str, list[str]]) -> list[Sample]:
    def stem(path: str) -> str:
        return os.path.splitext(os.path.basename(path))[0]

    times = Counter(stem(path) for paths in folders.values() for path in paths)
    samples = [
        Sample(stem(path) if times[stem(path)] == 1 else f"{folder}/{stem(path)}", path, class_id)
        for class_id, (folder, paths) in enumerate(folders.items())
        for path in paths
    ]
    _check_ids(str(where), samples, lambda index: samples[index].path)
    return samples


def _open_manifest(path: Path, image_root: Path | None) -> FileSource:
    root = os.path.abspath(path.parent if image_root is None else image_root)
    if not os.path.isdir(root):
        raise UserError(f"--image_root {image_root} is not a folder. Give the folder that the paths of {path} start in.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror or error}.") from None
    rows, lines = _parse_manifest(content, str(path))

    def place(index: int) -> str:
        return f"line {lines[index]}"

    remedy = f"Write paths relative to {root}, or give the folder they start in with --image_root."
    _check_paths(str(path), rows, place, remedy)
    samples = [Sample(row.sample_id, os.path.normpath(os.path.join(root, row.path)), row.class_id) for row in rows]
    if outside := _links_outside(root, samples):
        found = [
            f"{place(index)}: {rows[index].path!r}"
            for index, sample in enumerate(samples)
            if sample.path in outside or os.path.dirname(sample.path) in outside
        ]
        _refuse(str(path), found, f"path is a link that leaves {root}", remedy)
    return FileSource(path, samples)


def _links_outside(root: str, samples: list[Sample]) -> set[str]:
    """The folders and files in use that are symbolic links, or lie behind one, to outside of `root`."""
    real_root = os.path.realpath(root)

    def leaves(path: str) -> bool:
        return not Path(os.path.realpath(path)).is_relative_to(real_root)

    outside: set[str] = set()
    for folder in {os.path.dirname(sample.path) for sample in samples}:
        if leaves(folder):
            outside.add(folder)
        else:
            outside.update(entry.path for entry in _scan(folder) if entry.is_symlink() and leaves(entry.path))
    return outside


def _open_archive(path: Path) -> ZipSource:
    source = ZipSource(path, [])
    archive = source._archive()
    # Folder entries end in a slash; macOS adds a shadow tree named __MACOSX.
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    manifests = [name for name in names if name.lower().endswith(".csv")]
    if len(manifests) == 1 or "manifest.csv" in manifests:
        manifest = Sample("manifest", "manifest.csv" if "manifest.csv" in manifests else manifests[0], 0)
        where = f"{path}:{manifest.path}"
        _check_members(path, archive, [manifest])
        try:
            source.samples, lines = _parse_manifest(source.read(manifest), where)
        except UnreadableImage as error:
            raise UserError(f"{error}. Download or pack it again.") from None
        remedy = "Write the member names of the archive."
        _check_paths(where, source.samples, lambda index: f"line {lines[index]}", remedy)
    elif manifests:
        raise UserError(f"{path} has several CSV files ({_examples(manifests)}). Name the one to use manifest.csv.")
    else:
        folders: dict[str, list[str]] = {}
        for name in sorted(name for name in names if _is_image(posixpath.basename(name))):
            folders.setdefault(posixpath.dirname(name), []).append(name)
        if "" in folders or len({posixpath.dirname(folder) for folder in folders}) != 1:
            raise UserError(
                f"{path} has neither a manifest.csv nor class folders side by side ({len(names)} files inside). "
                f"Add a manifest with the columns {', '.join(COLUMNS)}, or pack as <class name>/*.jpg."
            )
        by_class = {posixpath.basename(folder): folders[folder] for folder in sorted(folders)}
        source.samples = _samples_of_classes(path, by_class)
        source.folder_names = list(by_class)
        remedy = "Pack it again without such names."
        _check_paths(str(path), source.samples, lambda index: f"member {index + 1}", remedy)
    _check_members(path, archive, source.samples)
    return source


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise UserError(f"{path} is not a readable ZIP ({error}). Download or pack it again.") from None


def _check_members(path: Path, archive: zipfile.ZipFile, samples: list[Sample]) -> None:
    """Refuse what cannot be read within the memory it declares. zipfile bounds deflate, but not bzip2 and LZMA."""
    infos = archive.NameToInfo
    found = []
    for sample in samples:
        info = infos.get(sample.path)
        if info is None:
            continue  # for missing_files to report
        if info.file_size > MAX_MEMBER_BYTES:
            found.append(f"{sample.path}: declares {human_bytes(info.file_size)}")
        elif info.flag_bits & 1:
            found.append(f"{sample.path}: encrypted")
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = zipfile.compressor_names.get(info.compress_type, str(info.compress_type))
            found.append(f"{sample.path}: compressed with {method}")
    if found:
        raise UserError(
            f"{path}: {_count(len(found), 'member')} refused ({_examples(found)}). Members may be stored or deflated, "
            f"without a password, up to {human_bytes(MAX_MEMBER_BYTES)}: pack them again."
        )


def _parse_manifest(content: bytes, where: str) -> tuple[list[Sample], list[int]]:
    """The rows of a CSV as samples with the paths as written, and the line that each row ends in."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} is not UTF-8 (line {line}, byte {error.start}). Save it as CSV UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        table = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}, is not CSV ({error}). Check its quotes.") from None
    header = [name.strip() for name in table[0][1]] if table else []
    _check_header(where, header)
    if len(table) == 1:
        raise UserError(f"{where} has a header but no rows. Write one row per image.")
    id_at, path_at, class_at = (header.index(name) for name in COLUMNS)
    samples, lines, ragged, unnumbered = [], [], [], []
    for line, row in table[1:]:
        if len(row) != len(header):
            ragged.append(f"line {line}: {len(row)}")
        elif not _is_class_id(row[class_at].strip()):
            unnumbered.append(f"line {line}: {row[class_at]!r}")
        else:
            samples.append(Sample(row[id_at], row[path_at], int(row[class_at])))
            lines.append(line)
    _refuse(where, ragged, f"the number of columns is not {len(header)}", "Put quotes around a path with a comma.")
    _refuse(where, unnumbered, "class_id is not a whole number from 0", "Number the classes, the first one 0.")
    _check_ids(where, samples, lambda index: f"line {lines[index]}")
    return samples, lines


def _check_header(where: str, header: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in header]
    if not missing:
        return
    near = {name: difflib.get_close_matches(name, header, n=1) for name in missing}
    hints = "".join(f" Is {found[0]!r} meant to be {name!r}?" for name, found in near.items() if found)
    raise UserError(
        f"{where} has no column {' or '.join(missing)}; its first line is {','.join(header)!r}.{hints} "
        f"The first line must name {', '.join(COLUMNS)}."
    )


def _check_ids(where: str, samples: list[Sample], place: Callable[[int], str]) -> None:
    first: dict[str, int] = {}
    unusable, repeated = [], []
    for index, sample in enumerate(samples):
        size = len(sample.sample_id.encode("utf-8", "surrogateescape"))
        if not sample.sample_id.strip() or size > MAX_ID_BYTES or _has_surrogates(sample.sample_id):
            unusable.append(f"{place(index)}: {sample.sample_id[:24]!r}, {size} bytes")
        elif (before := first.setdefault(sample.sample_id, index)) != index:
            repeated.append(f"{sample.sample_id!r} in {place(before)} and {place(index)}")
    _refuse(where, unusable, f"sample_id is not 1 to {MAX_ID_BYTES} bytes of UTF-8", "It is a key in the caches: rename.")
    _refuse(where, repeated, "sample_id is taken already", "Give every image a name of its own.")
