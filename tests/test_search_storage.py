"""Where studies are kept: what is refused, a torn journal, a fresh database that many open at once."""

from __future__ import annotations

import builtins
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from library.errors import RunFailed, UserError
from library.options.search import without_password
from library.options.toml_file import PROJECT_ROOT
from library.search.study import storage
from library.search.study.storage import open_storage, remove_torn_line
from library.search.study.study import load_study, open_study
from tests.tools.search import TERMS, claims_of_two, in_a_process, ledger, plan, run, settled

DOCS = PROJECT_ROOT / "docs" / "optimize.md"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("study.db", "--storage study.db is not a storage. Use one of sqlite:///"),
        ("mysql://u:secret@host/db", r"--storage mysql://u:\*\*\*@host/db is not a storage"),
        ("grpc://host", "must be grpc://host:port"),
        ("sqlite:////dev/null/x/study.db", "cannot be created"),
    ],
)
def test_what_is_no_storage_is_refused_in_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_storage(url)


def test_a_missing_driver_of_postgresql_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r'pip install "psycopg\[binary\]"'):
        open_storage("postgresql://u:p@localhost:1/db")


def test_missing_packages_of_grpc_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**place: Any) -> None:
        raise ImportError("no grpc")

    monkeypatch.setattr("optuna.storages.GrpcStorageProxy", missing)
    with pytest.raises(UserError, match="grpc:// needs packages .*: pip install grpcio protobuf"):
        open_storage("grpc://localhost:1")


def test_where_no_grpc_server_answers_the_page_with_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc")
    from optuna.storages import GrpcStorageProxy

    wait = GrpcStorageProxy.wait_server_ready
    monkeypatch.setattr(GrpcStorageProxy, "wait_server_ready", lambda self, timeout: wait(self, timeout=1))
    with pytest.raises(UserError, match="No server answers at grpc://localhost:1 .*docs/optimize.md, Many workers"):
        open_storage("grpc://localhost:1")


def test_a_study_runs_over_the_documented_grpc_server(tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (block,) = re.findall(r"```python\n(.*run_grpc_proxy_server.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    code = (
        block.replace("10.0.0.1", "127.0.0.1").replace("13000", str(port)).replace("study.db", f"{tmp_path}/study.db")
    )
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=PROJECT_ROOT, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)  # gRPC itself would wait longer and longer
        storage = f"grpc://127.0.0.1:{port}"
        run(plan(tmp_path, 3, storage=storage, workers=2, prunes=False))
        settled(tmp_path, 3, storage)
    finally:
        server.kill()
        server.wait()
    settled(tmp_path, 3, f"sqlite:///{tmp_path}/study.db")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:p@ss@host/db", "postgresql+psycopg://u:***@host/db"),
        (
            "postgresql://host/db?user=u&password=secret&sslmode=require",
            "postgresql://host/db?user=u&password=***&sslmode=require",
        ),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
    ],
)
def test_passwords_are_never_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_file_that_is_no_database_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("a text" * 1000)
    with pytest.raises(UserError, match="cannot be opened: file is not a database"):
        open_storage(f"sqlite:///{tmp_path}/study.db")


def test_a_network_file_system_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(storage, "file_system", lambda path: "nfs4")
    open_storage(f"journal:{tmp_path}/study.log", said.append)
    assert len(said) == 1 and "network file system (nfs4)" in said[0]


def test_the_kind_of_a_file_system_is_found() -> None:
    assert storage.file_system(Path("/proc/self")) == "proc"


def test_a_torn_journal_line_is_cut_and_kept_and_the_study_goes_on(tmp_path: Path) -> None:
    run(plan(tmp_path, 4))
    journal = tmp_path / "study.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":5,"worker_id":"a-')
    run(plan(tmp_path, 6))
    kept = list(tmp_path.glob("study.log.torn.*"))
    assert [one.read_bytes() for one in kept] == [b'{"op_code":5,"worker_id":"a-']
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert len(ledger(tmp_path, 6).trials()) == 6


def test_a_line_that_another_parent_tears_is_cut_before_the_next_is_written(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    with open(tmp_path / "study.log", "a") as journal:
        journal.write('{"op_code":')
    mine.enqueue(TERMS.space.defaults, "one")
    assert len(ledger(tmp_path).trials()) == 1


def test_a_journal_with_whole_lines_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "study.log"
    for content in (b"", b'{"a":1}\n'):
        file.write_bytes(content)
        assert remove_torn_line(file) is None and file.read_bytes() == content


def test_a_full_disk_leaves_a_journal_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ledger(tmp_path)
    mine.enqueue(TERMS.space.defaults, "one")
    before = (tmp_path / "study.log").read_bytes()
    real_open = builtins.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def full(file: Any, mode: str = "r", **more: Any) -> Any:
        opened = real_open(file, mode, **more)
        return Full(opened) if mode == "ab" and str(file).endswith("study.log") else opened

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(
        RunFailed, match=r"storage .*study.log failed: .*No space left on device.*run the same command again"
    ):
        run(plan(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "study.log").read_bytes() == before
    run(plan(tmp_path, 4))
    assert len(ledger(tmp_path).trials()) == 4


def test_a_damaged_journal_is_said_to_be_damaged(tmp_path: Path) -> None:
    run(plan(tmp_path, 3))
    lines = (tmp_path / "study.log").read_text().splitlines()
    (tmp_path / "study.log").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="The journal .* is damaged"):
        open_storage(f"journal:{tmp_path}/study.log")


@pytest.mark.parametrize("form", ["sqlite:///{}/study.db", "journal:{}/study.log"])
def test_many_that_open_a_fresh_storage_at_once_share_one_study(tmp_path: Path, form: str) -> None:
    import optuna  # noqa: F401  (once, before the processes are forked)

    url = form.format(tmp_path)
    processes = [in_a_process(lambda: open_study("test", url, TERMS, lambda words: None) and None) for _ in range(6)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 6
    assert load_study("test", url).user_attrs["terms"]["seed"] == 7


def test_a_study_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    run(plan(tmp_path, 1))
    with pytest.raises(UserError, match="There is no study other in this storage. Its studies: test."):
        load_study("other", f"journal:{tmp_path}/study.log")


def test_of_two_that_claim_a_trial_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claims_of_two(f"sqlite:///{tmp_path}/study.db", monkeypatch) == [True, False]
