"""Studies on PostgreSQL, on a server that the tests start: many parents, dead ones, a server that goes away, wrong urls."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from library.errors import RunFailed, UserError
from library.search.messages import Job
from library.search.study import storage
from library.search.study.storage import open_storage
from tests.tools.postgresql import PASSWORD, USER, NoServer, Server, postgresql_server
from tests.tools.search import (
    FakeTrainer,
    claims_of_two,
    eight_parents_share_a_study,
    in_a_process,
    ledger,
    parent,
    plan,
    run,
    said,
    settled,
    statuses,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    try:
        with postgresql_server() as server:
            yield server
    except NoServer as reason:
        pytest.skip(str(reason))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two attempts."""
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def url(server: Server, tmp_path: Path) -> str:
    """An empty database."""
    return server.create(tmp_path.name)


def test_eight_parents_share_a_study_on_an_empty_database_without_a_lost_or_doubled_trial(
    tmp_path: Path, url: str
) -> None:
    eight_parents_share_a_study(tmp_path, url)


def test_of_two_that_claim_a_trial_at_once_one_gets_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claims_of_two(url, monkeypatch) == [True, False]


def test_parents_with_folders_of_their_own_share_a_budget(tmp_path: Path, url: str) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]

    def ending(job: Job) -> str:
        while not all([*folder.glob("out/trial_*")] for folder in folders):  # the other one has begun too
            time.sleep(0.01)
        return "done"

    def work(folder: Path) -> None:
        run(plan(folder, 8, storage=url, prunes=False), lambda: FakeTrainer(ending, seconds=0.1))

    assert statuses([in_a_process(lambda one=folder: work(one)) for folder in folders]) == [0, 0]  # type: ignore[misc]
    done = {one.number + 1 for one in ledger(tmp_path, 8, url).trials() if one.state == TrialState.COMPLETE}
    trained = [{int(path.name[-4:]) for path in folder.glob("out/trial_*")} for folder in folders]
    assert not trained[0] & trained[1]
    assert len(done) == 8 and done <= trained[0] | trained[1]


def test_after_a_killed_parent_the_study_goes_on_with_the_same_parameters(tmp_path: Path, url: str) -> None:
    for number in range(1, 4):
        victim = parent(tmp_path, 6, seconds=0.5, storage=url)
        while not (tmp_path / "out" / f"trial_{number:04d}" / "trial.json").exists():
            time.sleep(0.01)
        time.sleep(0.1 * number)
        os.killpg(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    run(plan(tmp_path, 6, storage=url))
    trials = settled(tmp_path, 6, url)
    assert any("retry_of" in one.user_attrs for one in trials)


def test_a_server_that_goes_away_ends_the_study_in_a_sentence_and_it_goes_on_when_it_is_back(
    tmp_path: Path, server: Server, url: str, hurried: None
) -> None:
    sentence = tmp_path / "sentence.txt"

    def work() -> None:
        try:
            run(plan(tmp_path, 4, storage=url), lambda: FakeTrainer(seconds=1.0))
        except RunFailed as error:
            sentence.write_text(str(error))

    worker = in_a_process(work)
    while not (tmp_path / "out" / "trial_0002" / "trial.json").exists():
        time.sleep(0.01)
    server.stop()
    try:
        assert statuses([worker]) == [0]
    finally:
        server.start()
    said_at_the_end = sentence.read_text()
    assert said_at_the_end.startswith("The study's storage postgresql+psycopg://search:***@127.0.0.1:")
    assert said_at_the_end.endswith("run the same command again to continue.") and "\n" not in said_at_the_end
    run(plan(tmp_path, 4, storage=url))
    trials = settled(tmp_path, 4, url)
    assert any(one.user_attrs.get("retry_of") == 2 for one in trials)
    assert PASSWORD not in said_at_the_end + said(tmp_path)


def test_the_password_may_come_from_the_environment_and_is_in_no_file(
    tmp_path: Path, server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    run(plan(tmp_path, 2, storage=url.replace(f":{PASSWORD}", "")))
    run(plan(tmp_path, 3, storage=url))
    settled(tmp_path, 3, url)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 3 and not [path for path in written if PASSWORD.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("database", "user", "sentence"),
    [
        ("postgres", f"{USER}:wrong", "password authentication failed"),
        ("nowhere", f"{USER}:{PASSWORD}", 'database "nowhere" does not exist'),
    ],
)
def test_what_the_server_refuses_is_said_in_a_sentence_and_not_tried_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, database: str, user: str, sentence: str
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(UserError, match=rf"search:\*\*\*@.* cannot be opened: .*{sentence}") as raised:
        open_storage(server.url(database, user=user))
    assert "\n" not in str(raised.value) and PASSWORD not in str(raised.value)
    assert waits == []


def test_where_no_server_listens_is_said_in_a_sentence(hurried: None) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens at it
        url = f"postgresql+psycopg://search:secret@127.0.0.1:{taken.getsockname()[1]}/search"
        with pytest.raises(UserError, match=r"search:\*\*\*@.* cannot be opened: .*[Cc]onnection") as raised:
            open_storage(url)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
