"""Files that appear whole or not at all, and hashes of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from library.errors import RunFailed, UserError
from library.progress import doing
from library.text_files import NotText, decoded


def _fsync_folder(folder: Path) -> None:
    # Windows cannot open a folder; there the rename alone has to do.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _readable_mode() -> int:
    """0666 less the umask: safetensors 0.8 and mkstemp create files as 0600, which no other user's UI can read."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


_BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<process>[0-9]+)-[0-9a-f]{8}")


def beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path` that no thread, process or container has: process numbers repeat, see `recover_folders`."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{uuid4().hex[:8]}")


def _is_write_failure(error: Exception) -> bool:
    # safetensors reports a full disk as an exception of its own; known by name, so that nothing is imported for it.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    On any exception the temporary file is removed and `path` is what it was before.
    """
    path = Path(path)
    temporary = beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync_file(temporary)
        os.chmod(temporary, _readable_mode())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except Exception as error:
        if not _is_write_failure(error):
            raise
        raise RunFailed(
            f"{path} could not be written: {_reason(error)}. What was there before is untouched."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success flush every file in it and rename it into place.

    With `overwrite`, an existing folder is moved aside first and removed only when the new one stands.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already. Name another folder, or remove this one first.")
    temporary = beside(path, "tmp")
    aside = beside(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        mode = _readable_mode()
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
                os.chmod(file, mode)
        for folder in [*(f for f in temporary.rglob("*") if f.is_dir()), temporary]:
            _fsync_folder(folder)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except Exception as error:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        if not _is_write_failure(error):
            raise
        raise RunFailed(f"{path} could not be written: {_reason(error)}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def recover_folders(parent: Path) -> None:
    """Tidy up after processes that were killed inside `whole_folder`: an old folder moved aside comes back if its
    successor never took its place, and half-written ones go. What a living process works on is left alone."""
    for path in [*parent.glob(".*.old-*"), *parent.glob(".*.tmp-*")]:
        found = _BESIDE.fullmatch(path.name)
        if found is None:  # another program's
            continue
        process = int(found["process"])
        if process != os.getpid() and _is_alive(process):
            continue
        target = parent / found["name"]
        if path.is_dir() and found["kind"] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    import psutil

    return psutil.pid_exists(process)


def lock_folder(folder: Path, *, exclusive: bool, what: str) -> IO[bytes] | None:
    """Hold a lock on `folder` as long as the returned file is open: shared by readers, exclusive for a writer.

    Raises UserError when somebody else holds it the other way. The kernel lets go of it when the last process that has
    the file open dies. Where flock does not exist (Windows) or the file system is read-only, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+b")  # noqa: SIM115
    except OSError as error:
        if exclusive:
            raise UserError(f"{folder} cannot be written to: {_reason(error)}.") from None
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{what} {folder} is {'in use' if exclusive else 'being written'} by another process. Wait for it, or stop it."
        ) from None
    except OSError:
        file.close()
        return None
    return file


def require_writable(folder: Path) -> None:
    """Raise UserError where nothing can be written to `folder`, or to the nearest folder there is on the way to it."""
    there = folder
    while not os.path.exists(there):
        if os.path.islink(there):
            raise UserError(f"{folder} cannot be written to: {there} is a link that leads nowhere.")
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder} cannot be written to: {there} is a file.")
    for part in folder.parts[len(there.parts) :]:
        _require_length(part, there)
    try:
        with tempfile.TemporaryFile(dir=there):  # whatever permissions say, and leaves nothing
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {there} is not writable ({_reason(error)}).") from None


def require_file_name(path: Path) -> None:
    """Raise UserError where the file system does not take the name of `path`, with its temporary ending, or its length."""
    there = _nearest_folder(path.parent)
    _require_length(beside(path, "tmp").name, there, path.name)
    whole, most = os.path.abspath(path), _most(there, "PC_PATH_MAX", 4096)
    if _length(whole) >= most:
        raise UserError(
            f"{shortened(whole)} cannot be written: it has {_length(whole)} bytes, and a path at most {most - 1}."
        )


def _require_length(name: str, there: Path, shown: str | None = None) -> None:
    length, most = _length(name), _most(there, "PC_NAME_MAX", 255)
    if length > most:
        shown = name if shown is None else shown
        with_ending = f"with its temporary ending {length}" if shown != name else f"{length}"
        raise UserError(
            f"{shortened(shown)} is too long a name: it has {with_ending} bytes, and {there} takes names of at most {most}."
        )


def _most(there: Path, what: str, otherwise: int) -> int:
    return os.pathconf(there, what) if hasattr(os, "pathconf") else otherwise


def _length(name: str) -> int:
    # Windows counts characters.
    return len(os.fsencode(name)) if os.name == "posix" else len(name)


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 23]}...{text[-20:]}"


def write_text(path: Path | str, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Parse a JSON file. Raises UserError naming file, line and column where it is not JSON."""
    try:
        return json.loads(decoded(Path(path).read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from None
    except NotText as error:
        raise UserError(f"{path} is not valid JSON: it is {error}.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


def _nearest_folder(path: Path | str) -> Path:
    """`path`, or the nearest of the folders above it that is there."""
    there = Path(path).absolute()
    while not os.path.exists(there):  # pathlib raises for names that are too long
        there = there.parent
    return there


def free_bytes(path: Path | str) -> int:
    """Bytes that can still be written where `path` is or would be."""
    return shutil.disk_usage(_nearest_folder(path)).free


def disk_of(path: Path | str) -> int:
    """Number of the file system that `path` is or would be on."""
    return _nearest_folder(path).stat().st_dev


def require_space(path: Path | str, needed: int, what: str) -> None:
    """Raise UserError before the first write when `needed` bytes do not fit where `path` is or would be."""
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            f"{what} needs {human_bytes(needed)} ({needed} bytes) in {path}, but only {human_bytes(free)} ({free} bytes) are "
            "free there."
        )


def public_name(model: str) -> str:
    """A published file should not tell where its author keeps things: a path's last part, a hub id whole."""
    return Path(model).name if Path(model).expanduser().exists() else model


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file.read)
        )


def _digest(read: Callable[[int], bytes]) -> str:
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    while block := read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def remembered_hash(path: Path | str, memory: Path | str, take: Callable[[Path], str] = file_hash) -> str:
    """`file_hash(path)`, looked up in the JSON file `memory` while size and modification time are unchanged, else by `take`."""
    path, memory = Path(path).resolve(), Path(memory)
    mark = file_mark(path)
    known = read_json(memory) if memory.exists() else {}
    entry = known.get(str(path), {})
    if {name: entry.get(name) for name in mark} == mark:
        return entry["sha256"]
    with doing(f"hashing {path.name}"):
        digest = take(path)
    known[str(path)] = {**mark, "sha256": digest}
    write_json(memory, known)
    return digest


def file_mark(path: Path) -> dict[str, int]:
    """What tells, without reading it, that a file is another than it was."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
