"""Where a study is stored: a SQLite file, a journal file, PostgreSQL, or the storage of another machine over gRPC."""

from __future__ import annotations

import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from library.errors import RunFailed, UserError
from library.options.search import require_storage_form, without_password

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, JournalStorage, RDBStorage

Result = TypeVar("Result")

ATTEMPTS = 10
FINAL = re.compile(
    "is full|readonly|unable to open|No space|malformed|not a data"
    '|authentication failed|no password supplied|(database|role) ".*" does not exist'
)
NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "fuse.sshfs",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "9p",
)


def storage_file(url: str) -> Path | None:
    """The file of a SQLite or journal storage; None for a server."""
    for prefix in ("sqlite:///", "journal:"):
        if url.startswith(prefix):
            return Path(url.removeprefix(prefix)).expanduser()
    return None


def open_storage(url: str, say: Callable[[str], None] = print) -> BaseStorage:
    """Open the storage at `url`, and create its file or tables where they do not exist yet.

    Raises UserError: an address that is not one of STORAGE_FORMS, a driver that is not installed, a server that does not
    answer, a file that is damaged or was written by another version of Optuna.
    """
    import optuna

    require_storage_form(url)
    file = storage_file(url)
    if file is not None:
        _prepare_file(file, say)
    if url.startswith("journal:"):
        assert file is not None
        return _open_journal(file)
    if url.startswith("grpc://"):
        return _open_proxy(url)
    if url.startswith("sqlite:///"):
        # Each thread and process of a worker has its own connection; writers wait for each other.
        url, settings = f"sqlite:///{file}", {"connect_args": {"timeout": 60}}
    else:
        url = re.sub(r"^postgresql://", "postgresql+psycopg://", url)
        settings = {"pool_pre_ping": True, "pool_size": 2}  # type: ignore[dict-item]
    try:
        # Processes that create the tables of one empty database at once disturb each other: 8 of 24 failed.
        storage = insisting(lambda: optuna.storages.RDBStorage(url, engine_kwargs=settings), ATTEMPTS)
    except ImportError:
        raise UserError('PostgreSQL needs its driver, which is not installed: pip install "psycopg[binary]".') from None
    except RuntimeError as error:
        raise UserError(
            f"{without_password(url)} was written by another version of Optuna: {first_line(error)} "
            f"To upgrade it, run: optuna storage upgrade --storage {without_password(url)}"
        ) from None
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise UserError(f"The storage {without_password(url)} cannot be opened: {first_line(error)}") from None
    if file is not None:
        _lock_from_the_beginning(storage)
    return storage


def _lock_from_the_beginning(storage: RDBStorage) -> None:
    """Let each transaction on a SQLite file exclude all others from its first read on, not only from its first write.

    SQLite has no SELECT FOR UPDATE: without this, two parents could both read that a trial waits and both claim it.
    """
    from sqlalchemy import event

    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # else the driver would begin the transaction at the first write

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", connect)
    event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()  # connections that were opened before


def insisting(call: Callable[[], Result], attempts: int = 5) -> Result:
    """The result of `call()`, repeated after a moment where the storage failed, at most `attempts` times in all."""
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            if attempt + 1 == attempts or not is_storage_failure(error) or _is_final(error):
                raise
            time.sleep(random.uniform(0.02, 0.1) * 2 ** min(attempt, 4))
    raise AssertionError


def is_storage_failure(error: BaseException) -> bool:
    """Whether the storage failed, and not this program."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    # grpc is an optional dependency of Optuna, so its class is recognised by name.
    is_remote = any(kind.__name__ == "RpcError" for kind in type(error).__mro__)
    return isinstance(error, StorageInternalError | SQLAlchemyError | OSError) or is_remote


def storage_failed(url: str, error: BaseException) -> RunFailed:
    return RunFailed(
        f"The study's storage {without_password(url)} failed: {first_line(error)} Nothing that was stored is lost; run the "
        "same command again to continue."
    )


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would fail in the same way."""
    return FINAL.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The message of a storage's error, in one line that ends with a full stop; its class where there is no message."""
    cause = error.__cause__ if type(error).__name__ == "StorageInternalError" and error.__cause__ else error
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return f"{(lines or [type(error).__name__])[0].rstrip('.')}."


def check_storage_file(file: Path) -> None:
    """Raises UserError where a SQLite file or a journal can neither be opened nor made. It makes nothing."""
    if file.is_dir():
        raise UserError(f"The storage {file} is a folder. Name a file.")
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "not writable" if there.is_dir() else "a file"
        raise UserError(f"The storage {file} cannot be created: {there} is {why}.")
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"The storage {file} cannot be written to.")


def _prepare_file(file: Path, say: Callable[[str], None]) -> None:
    check_storage_file(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The storage {file} cannot be created: {error.strerror}.") from None
    kind = file_system(file)
    if kind in NETWORK_FILE_SYSTEMS:
        say(
            f"warning: {file} is on a network file system ({kind}), where file locks are unreliable and a study may be damaged. "
            "Use a local folder, or --storage postgresql+psycopg://... for several machines."
        )


def file_system(path: Path) -> str:
    """Type of the file system that `path` is or would be on, such as ext4; "" where it is unknown."""
    import psutil

    path = path.resolve()
    try:
        mounts = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
    except OSError:
        return ""
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype.lower() if mounts else ""


def _open_proxy(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    match = re.fullmatch(r"grpc://([^:/]+):(\d+)/?", url)
    if match is None:
        raise UserError(f"--storage {url} must be grpc://host:port.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns at each start that it is experimental
            proxy = GrpcStorageProxy(host=match[1], port=int(match[2]))
        proxy.wait_server_ready(timeout=20)
        return proxy
    except ImportError:
        raise UserError("grpc:// needs packages that are not installed: pip install grpcio protobuf.") from None
    except Exception as error:
        raise UserError(
            f"No server answers at {url} ({first_line(error).rstrip('.')}). Start it first, as docs/optimize.md, Many workers, "
            "describes."
        ) from None


def _open_journal(file: Path) -> JournalStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock

    class WholeLines(JournalFileBackend):
        """Removes an incomplete last line (of a kill, a full disk) before it appends, as the file would become unreadable."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            self._lock.acquire()
            try:
                remove_torn_line(file)
                whole = file.stat().st_size
                try:
                    with open(file, "ab") as journal:
                        journal.write(text.encode())
                        journal.flush()
                        os.fsync(journal.fileno())
                except OSError:
                    os.truncate(file, whole)
                    raise
            finally:
                self._lock.release()

    # A symbolic link needs a privilege on Windows.
    backend = WholeLines(str(file), (JournalFileOpenLock if os.name == "nt" else JournalFileSymlinkLock)(str(file)))
    try:
        backend.append_logs([])
        return JournalStorage(backend)
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"The journal {file} is damaged and cannot be read: {first_line(error)}") from None


def remove_torn_line(file: Path) -> Path | None:
    """Move an incomplete last line of a journal, whose lock is held, to a file beside it; that file, or None without one."""
    with open(file, "rb+") as journal:
        size = journal.seek(0, os.SEEK_END)
        if size == 0:
            return None
        journal.seek(size - 1)
        if journal.read(1) == b"\n":
            return None
        journal.seek(0)
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        kept = file.with_name(f"{file.name}.torn.{time.time_ns()}")
        kept.write_bytes(content[whole:])
        journal.truncate(whole)
        journal.flush()
        os.fsync(journal.fileno())
    return kept
