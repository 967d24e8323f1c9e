"""A PostgreSQL server of one's own in a temporary folder, from the programs of Debian's package, gone with its context."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.tools.warm import free_port

USER, PASSWORD = "search", "p4ss-of-the-test"
START_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1


class NoServer(Exception):
    """Why there can be none here, in a few words."""


@dataclass
class Server:
    """
    Attributes:
        options: of the command `postgres`.
        who: arguments of subprocess with the account it runs as.
    """

    programs: Path
    folder: Path
    port: int
    options: tuple[str, ...]
    who: dict[str, Any]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def url(self, database: str = "postgres", *, user: str = f"{USER}:{PASSWORD}") -> str:
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Create an empty database; its url."""
        with self._connection() as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def start(self) -> None:
        """Raises NoServer where it ends instead of taking connections."""
        place = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-h", "127.0.0.1", "-p", str(self.port)]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [str(self.programs / "postgres"), *place, *self.options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                preexec_fn=_end_with_parent,
                **self.who,
            )
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(Exception):
                self._connection().close()
                return
            time.sleep(0.1)
        self.stop()
        raise NoServer(f"PostgreSQL does not start here: {_last_line((self.folder / 'server.log').read_text())}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End its connections and itself; with SIGQUIT at once."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _connection(self) -> Any:
        import psycopg

        return psycopg.connect(self.url().replace("+psycopg", ""), autocommit=True, connect_timeout=5)


@contextmanager
def postgresql_server(*, durable: bool = False) -> Iterator[Server]:
    """A server that runs within the context. durable: it waits for the disk, which tests have no use for.

    Raises NoServer where the driver or the server is not installed or it cannot be started.
    """
    if find_spec("psycopg") is None:
        raise NoServer("psycopg, the driver of PostgreSQL, is not installed")
    programs = find_programs()
    who = _account()
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    try:
        if who:
            os.chown(folder, pwd.getpwnam(who["user"]).pw_uid, who["group"])
        _make_cluster(programs, folder, who)
        server = Server(programs, folder, free_port(), () if durable else ("-F",), who)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_programs() -> Path:
    """The folder with initdb and postgres: on the PATH, where pg_config says, or where Debian has them; the newest there."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path is not None]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True, timeout=10)
        found.append(Path(said.stdout.strip()))
    debian = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    found += sorted(debian, key=lambda path: int(path.parent.name), reverse=True)
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise NoServer("PostgreSQL's server is not installed (Debian: postgresql)")


def _account() -> dict[str, Any]:
    """Whom to run it as: it refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
    raise NoServer("PostgreSQL does not run as root, and there is neither an account postgres nor nobody")


def _make_cluster(programs: Path, folder: Path, who: dict[str, Any]) -> None:
    secret = folder / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    command = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", USER, "--pwfile", str(secret), "--no-sync"]
    # By password, as in the image of deploy/compose.yaml.
    command += ["-A", "scram-sha-256", "-E", "UTF8", "--no-locale"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, timeout=300, **who)
    except subprocess.CalledProcessError as error:
        raise NoServer(f"PostgreSQL's initdb does not work here: {_last_line(error.stderr)}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise NoServer(f"PostgreSQL's initdb cannot be run here: {error}") from None


def _end_with_parent() -> None:
    """A killed test leaves no server behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
