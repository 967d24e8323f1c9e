"""What a script says while it works: bars on a terminal, plain lines elsewhere, and how long is left."""

import io
import os
import re
import sys
import time

import pytest

import library.progress as progress
from library.errors import script
from library.progress import clock_text, doing
from library.training.pace import Pace
from library.words import wrapped
from tests.tools.waiting import wait_until


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAWN", 0.01)


def wait_for(text: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def there() -> bool:
        said.append(capsys.readouterr().err)
        return text in "".join(said)

    wait_until(there)


def test_an_activity_is_named_when_nothing_was_said_for_a_while(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.02)
    said: list[str] = []
    with doing("training"), doing("drawing pictures", 4) as activity:
        activity.advance()
        wait_for("drawing pictures 1/4  0:00, 0:00 left\n", said, capsys)
    assert "training" not in "".join(said)


def test_every_script_says_that_it_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.02)
    said: list[str] = []

    @script
    def main(argv: list[str]) -> None:
        wait_for("test_progress.py  0:00\n", said, capsys)

    assert main([]) == 0


def test_what_is_said_otherwise_needs_no_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 3600.0)
    with doing("loading"):
        print("first\nand half", end="")
        sys.stdout.flush()
        print(" a line")
        screen = sys.stdout._screen  # type: ignore[attr-defined]
        screen.spoken -= 4000
        print("last")
        time.sleep(0.1)
    assert tuple(capsys.readouterr()) == ("first\nand half a line\nlast\n", "")
    assert not isinstance(sys.stdout, progress._Beside)


def test_only_the_first_process_shows_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    before = sys.stdout
    with doing("loading"):
        assert sys.stdout is before


def test_a_forked_process_does_not_show_what_its_parent_does() -> None:
    with doing("loading"):
        if not (child := os.fork()):
            os._exit(len(progress._activities))
        assert os.waitpid(child, 0)[1] == 0 and len(progress._activities) == 1


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_lines_stand_above_the_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with doing("script.py"), doing("step", 8) as activity:
        activity.words = lambda width: "epoch 1/2  left 0:07"[:width]
        wait_until(lambda: "step   0%|            | 0/8, epoch 1/2  left 0:07" in terminal.getvalue())
        assert activity.live
        print("validation at step 1")
        activity.advance(4)
        wait_until(lambda: "step  50%|██████      | 4/8" in terminal.getvalue())
    shown = [part for part in re.split(r"[\r\n]+", terminal.getvalue()) if part.strip()]
    assert "validation at step 1" in shown and "script.py" not in terminal.getvalue().rpartition("step")[2]
    assert terminal.getvalue().endswith("\r")  # the bar has gone


def test_long_lines_go_on_in_the_next() -> None:
    lines = wrapped("reference " + "0.123 " * 30).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 120 and lines[1].startswith("  0.123")


def test_the_time_left_counts_what_interrupts_the_steps() -> None:
    """100 steps of 2 s; a validation (30 s) every 10, a save (5 s) every 50, samples (100 s) every 40 and at the end."""
    due = {
        "validation": lambda step: step % 10 == 0,
        "save": lambda step: step % 50 == 0,
        "samples": lambda step: step % 40 == 0 or step == 100,
    }
    pace = Pace(0, 100, due, {"step": 2.0, "validation": 30.0, "save": 5.0, "samples": 100.0})
    assert pace.left(0) == pytest.approx(200 + 300 + 10 + 300, abs=1)
    assert pace.left(40) == pytest.approx(120 + 180 + 10 + 200, abs=1)
    assert pace.left(100) == 0
    pace.stepped(40.0, 10)
    assert pace.left(10) == pytest.approx(360 + 270 + 10 + 300, abs=1)
    with pace.interruption("samples", "drawing samples"):
        pass
    assert pace.left(10) == pytest.approx(360 + 270 + 10, abs=1)


def test_what_interrupts_after_the_newest_step_is_still_to_come() -> None:
    due = {"save": lambda step: step == 100, "samples": lambda step: step % 50 == 0}
    pace = Pace(0, 100, due, {"step": 2.0, "save": 5.0, "samples": 60.0})
    pace.stepped(100.0, 50)
    pace.arrive(50)
    assert pace.left(50) == pytest.approx(100 + 60 + 60 + 5, abs=1)
    with pace.interruption("samples", "drawing samples"):
        pace._interrupted = ("samples", time.perf_counter() - 20)
        assert pace.left(50) == pytest.approx(100 + 40 + 60 + 5, abs=1)
    pace._seconds["samples"] = 60.0
    assert pace.left(50) == pytest.approx(100 + 60 + 5, abs=1)
    pace.stepped(100.0, 50)
    pace.arrive(100)
    assert pace.left(100) == pytest.approx(65, abs=1)


def test_one_slow_step_is_not_what_all_will_take() -> None:
    pace = Pace(0, 100, {}, {})
    pace.stepped(10.0, 10)
    pace._since -= 6.0
    assert pace.left(10) == pytest.approx(90, abs=1)
    assert pace.left(11) == pytest.approx(89 * (1 + 2 / 9), rel=0.1)


def test_before_the_first_report_the_steps_made_correct_the_guess() -> None:
    pace = Pace(0, 100, {}, {"step": 16.0})
    pace._since -= 4.0
    pace.arrive(4)
    assert pace.left(4) == pytest.approx(96 * (16 + 4) / 5, rel=0.01)


def test_reports_of_few_steps_count_for_few() -> None:
    pace = Pace(0, 1000, {}, {})
    for at in range(40):
        pace.stepped(9.0 if at == 39 else 1.0, 1)
        pace.arrive(at + 1)
    assert pace.left(40) == pytest.approx(960, rel=0.4)


def test_steps_slower_than_those_before_count_at_once() -> None:
    pace = Pace(0, 100, {}, {})
    assert pace.left(0) is None
    pace.stepped(10.0, 10)
    pace._since -= 50.0
    assert pace.left(19) == pytest.approx(81 * 5, rel=0.1)


def test_the_time_left_does_not_grow_while_one_part_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    activity = progress.Activity("caching", 10, 0)
    now += 8
    activity.advance(4)
    assert activity.line() == "caching 4/10  0:08, 0:12 left"
    now += 1
    assert activity.line() == "caching 4/10  0:09, 0:11 left"
    now += 60
    assert activity.line() == "caching 4/10  1:09, 0:04 left", "another four are made by then"


def test_clock_text() -> None:
    assert [clock_text(seconds) for seconds in (7.9, 750, 3661)] == ["0:07", "12:30", "1:01:01"]
