"""A study that somebody stops, and what its console and `status` show of it: who works on it, what is left, how to go on."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.search.lines import folded
from library.search.results.status import now_lines, status_text
from library.search.results.study_report import build_report
from library.search.run import console
from library.search.run.console import Console
from library.search.run.driver import Driver
from library.search.study.convergence import alerts
from library.search.study.pace import pace_of
from library.search.study.presence import Presence
from library.search.study.progress import progress, set_budget
from tests.tools.search import SPACE, FakeTrainer, dead_lease, ledger, next_trial, plan, run, said, trial, view


class Slow(FakeTrainer):
    """Stops itself, as Ctrl-C twice would, in its second training."""

    def run(self, job: Any, on_slot: Any, **more: Any) -> Any:
        if job.trial == 2:
            threading.Thread(
                target=lambda: [os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.1) for _ in range(2)]
            ).start()
            self.seconds = 60
        return super().run(job, on_slot, **more)


def stopped(folder: Path, **changes: Any) -> None:
    """A study that was stopped in its second trial."""
    trainers: list[FakeTrainer] = []

    def make(number: int) -> FakeTrainer:
        trainers.append(Slow())
        return trainers[-1]

    made = replace(plan(folder, 4, **changes), command="python optimize.py --n-trials 4 --study-name test")
    assert Driver(made, make).run().interrupted


def test_a_stopped_trial_is_interrupted_and_status_says_how_to_go_on(tmp_path: Path) -> None:
    stopped(tmp_path)
    text = status_text(view(tmp_path))
    assert "interrupted, and trained again from the start: trial 2 as trial 4" in text and "failed" not in text
    assert "works on this study now. To go on: python optimize.py --n-trials 4 --study-name test" in text
    assert "left" not in text.partition("stopped ")[0], "nobody works, so no time is left"
    assert "trial 2: interrupted." in said(tmp_path) and "failed" not in said(tmp_path)
    html = build_report(view(tmp_path), tmp_path / "out").html()
    assert "interrupted, and trained again under another number" in html

    run(plan(tmp_path, 4))
    text = status_text(view(tmp_path))
    assert "interrupted" not in text and "nobody" not in text and view(tmp_path).is_done
    assert ledger(tmp_path).trials()[3].user_attrs["attempt"] == 0


def test_interrupted_trials_are_no_failures(tmp_path: Path) -> None:
    some = [trial(n, None, "FAIL", interrupted=True, message="Stopped.") for n in range(1, 11)]
    assert not alerts(some, SPACE, 50)
    assert any(one.level == "FAILURES" for one in alerts([trial(n, None, "FAIL") for n in range(1, 7)], SPACE, 50))


def test_a_trial_of_a_parent_that_was_stopped_and_then_killed_is_interrupted(tmp_path: Path) -> None:
    first = ledger(tmp_path)
    for is_stopped in (True, False):
        running = next_trial(first)
        presence = Presence(first.study, replace(first.holder, pid=2**22 + 1))
        if is_stopped:
            presence.stopping()
        first.storage.set_trial_user_attr(
            running.trial._trial_id, "lease", dead_lease(pid_start=first.holder.pid_start)
        )
        other = ledger(tmp_path)
        again = next_trial(other)
        attrs = other.trials()[running.number - 1].user_attrs
        assert ("interrupted" in attrs) is is_stopped and again.attrs["attempt"] == (0 if is_stopped else 1)
        first = other


def test_a_parent_between_two_trials_is_somebody(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    set_budget(mine.study, 8, 1, 0)
    assert "nobody" in status_text(view(tmp_path))
    presence = Presence(mine.study, mine.holder)
    assert "nobody" not in status_text(view(tmp_path))
    assert "nobody" in status_text(view(tmp_path), time.time() + 3600), "a parent elsewhere that is silent is dead"
    presence.leave()
    assert "nobody" in status_text(view(tmp_path))
    next_trial(mine)
    assert "nobody" not in status_text(view(tmp_path))


def test_a_parent_that_was_killed_is_nobody(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    Presence(mine.study, replace(mine.holder, pid=2**22 + 1))
    text = status_text(view(tmp_path))
    assert "nobody" in text and "run the command that started it again" in text


# --- the time left before the first trial has ended ---


def begun(step: int, steps: int, *, now: float = 1000.0) -> Any:
    """A trial that was claimed 60 s ago, prepared for 20 s, and does a step in 2 s."""
    lease = {
        "at": now,
        "began": now - 20 - 2 * step,
        "since": now - 2 * step,
        "stepped": now,
        "step": step,
        "steps": steps,
    }
    return trial(1, None, "RUNNING", lease=lease)


def test_the_time_left_follows_from_the_steps_of_the_first_trial() -> None:
    running = begun(20, 50)
    pace = pace_of(running, running.user_attrs["lease"], 1000.0)
    assert (pace.share, pace.whole, pace.left) == (0.4, 20 + 50 * 2, 60)
    assert pace_of(running, running.user_attrs["lease"], 1030.0).left == 30, "time goes on between two reports"
    now = progress([running], 10, now=1000.0)
    assert now.seconds_left == pytest.approx((10 - 0.4) * 120) and "left 0:19:12" in now.line()
    assert progress([begun(0, 50)], 10, now=1000.0).seconds_left is None
    done = trial(2, -0.1, seconds=40.0)
    assert progress([done, running], 10, now=1000.0).seconds_left == pytest.approx((10 - 1 - 0.4) * 40), (
        "what ended tells more"
    )


def test_status_shows_it_of_a_study_whose_first_trial_runs(tmp_path: Path) -> None:
    seen: list[str] = []

    def ending(job: Any) -> str:
        return "done"

    class Watched(FakeTrainer):
        def run(self, job: Any, on_slot: Any, **more: Any) -> Any:
            def slot(found: Any) -> bool:
                time.sleep(0.01)
                goes_on = on_slot(found)
                if job.trial == 1 and found.slot == 5:
                    seen.append(status_text(view(tmp_path)))
                return goes_on

            return super().run(job, slot, **more)

    run(plan(tmp_path, 3), lambda: Watched(ending))
    (text,) = seen
    first, running = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("progress", "running")
    )
    assert re.search(r"trial 0/3  running 1 .*left 0:00:0\d", first)
    assert re.search(r"trial 1  50 %  step 50/100 .*left 0:00:00", running)


# --- the console ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rows_of(written: str, columns: int) -> list[str]:
    """What stands on a terminal after `written`."""
    rows = [""]
    for part in re.split(r"(\r|\n|\033\[\d*[AJ])", written):
        if part == "\n":
            rows.append("")
        elif match := re.fullmatch(r"\033\[(\d*)([AJ])", part):
            if match[2] == "A":
                rows = rows[: len(rows) - int(match[1])] if match[1] else rows
        elif part != "\r":
            assert len(part) <= columns, part
            rows[-1] = part if part else rows[-1]
    return rows


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_the_status_stands_below_the_lines(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "40")
    shown = Console()
    shown.print("study mio")
    shown.show(["progress   " + "word " * 40, "running    trial 1"])
    shown.print("trial 1: value -0.1")
    shown.show(["progress   all"])
    text = terminal.getvalue()
    assert all(len(line) <= columns for line in re.sub(r"\033\[\d*[AJ]", "\n", text).splitlines())
    assert rows_of(text, columns)[-2:] == ["progress   all", ""]
    shown.close()
    assert rows_of(terminal.getvalue(), columns)[-2] == "trial 1: value -0.1"


def test_elsewhere_lines_are_plain_and_none_is_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Console().every == console.EARLY_EVERY <= 5
    monkeypatch.setattr(console, "EARLY_EVERY", 0.05)
    run(plan(tmp_path, 2, quiet=False), lambda: FakeTrainer(seconds=1.0))
    out = capsys.readouterr().out
    assert "\033" not in out and re.search(r"progress   \[\.+\] trial 0/2  running 1", out)
    assert re.search(r"running    trial 1  \d+ %  step \d+/100", out) and max(map(len, out.splitlines())) <= 120


def test_the_console_shows_what_status_shows(tmp_path: Path) -> None:
    run(plan(tmp_path, 4))
    seen = view(tmp_path)
    assert "\n".join(now_lines(seen, time.time())) in status_text(seen)


def test_long_lines_go_on_below_where_they_began() -> None:
    text = folded("best       " + "word " * 20 + "\nnote       x", 60)
    first, second, *_, last = text.splitlines()
    assert len(first) <= 60 and second.startswith(" " * 11 + "word") and last == "note       x"
