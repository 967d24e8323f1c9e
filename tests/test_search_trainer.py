"""The process that trains trials, from its parent's side: whatever becomes of it, there is an outcome, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from library.options.toml_file import PROJECT_ROOT
from library.search.messages import Outcome, Slot, from_line
from library.search.trainer import parent_side
from library.search.trainer.parent_side import TrainerProcess, memory_kills
from tests.tools.network_runs import NetworkSetting
from tests.tools.trials import job, network_options
from tests.tools.waiting import wait_until
from tests.tools.warm import Run

# -------------------------------------------------------------------------------------- the process, with stand-ins


class StandIn(TrainerProcess):
    """Starts a few lines of Python in place of a trainer."""

    code = ""

    def _start(self) -> subprocess.Popen[bytes]:
        head = "import json, os, signal, sys, time\nsay = lambda **m: print(json.dumps(m), flush=True)\njob = json.loads(input())\n"
        return subprocess.Popen(
            [sys.executable, "-S", "-c", head + self.code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )


def run_stand_in(code: str, folder: Path, *, silent: float = 600.0, on_slot: Any = lambda slot: True) -> Outcome:
    with StandIn({}, folder / "log", silent=silent) as process:
        process.code = code
        outcome = process.run(job(folder, {}, 5), on_slot)
    assert outcome.trial == 5
    return outcome


@pytest.mark.parametrize(
    ("code", "ending", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "SIGKILL"),
        ("sys.exit(77)", "memory", "exit code 77"),
        ("sys.exit(76)", "diverged", "exit code 76"),
        ("sys.exit(3)", "failed", "exit code 3"),
        ("time.sleep(60)", "failed", "sent no message"),
        ("print('{\"kind\": \"en'); print('not json'); os._exit(1)", "failed", "exit code 1"),
        ("os.fork() or time.sleep(60)\nsys.exit(1)", "failed", "exit code 1"),  # something of it holds the pipe open
        ("say(kind='ended', trial=5, ending='refused', message='bad')", "refused", "bad"),
    ],
)
def test_whatever_becomes_of_a_trainer_there_is_an_outcome(
    code: str, ending: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_side, "memory_kills", lambda: 0)
    outcome = run_stand_in(code, tmp_path, silent=1.0 if said == "sent no message" else 600.0)
    assert outcome.ending == ending and said in outcome.message


def test_kill_that_the_kernel_counts_is_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter(range(100))
    monkeypatch.setattr(parent_side, "memory_kills", lambda: next(counted))
    assert run_stand_in("os.kill(os.getpid(), signal.SIGKILL)", tmp_path).ending == "memory"


def test_kills_are_read_from_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "memory.events"
    file.write_text("low 0\noom 4\noom_kill 3\noom_group_kill 0\n")
    monkeypatch.setattr(parent_side, "_memory_counters", lambda: [tmp_path / "absent", file])
    assert memory_kills() == 3


def test_outcome_that_was_written_before_the_trainer_died_counts(tmp_path: Path) -> None:
    written = Outcome(5, "done", value=-0.5, best_slot=9)
    code = f"open({str(tmp_path / 'outcome.json')!r}, 'w').write({json.dumps(vars(written))!r})\nsys.exit(1)"
    assert run_stand_in(code, tmp_path) == written


def test_outcome_of_an_earlier_attempt_does_not(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps(vars(Outcome(5, "done", value=-0.5))))
    assert run_stand_in("sys.exit(1)", tmp_path).ending == "failed"


def test_each_slot_is_answered_and_none_is_asked_of_after_a_no(tmp_path: Path) -> None:
    code = (
        "heard = []\n"
        "for n in (1, 2, 3):\n"
        "    say(kind='slot', trial=5, slot=n, step=n, value=0.5); heard.append(json.loads(input())['kind'])\n"
        "say(kind='ended', trial=5, ending='stopped', message=' '.join(heard))"
    )
    asked: list[int] = []
    outcome = run_stand_in(code, tmp_path, on_slot=lambda slot: asked.append(slot.slot) or slot.slot < 2)
    assert (outcome.message, asked) == ("go stop stop", [1, 2])


def test_trainer_that_ignores_sigterm_is_killed_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nchild = os.fork()\n"
        "if child: say(kind='begun', trial=5, steps=child)\ntime.sleep(600)"
    )
    with StandIn({}, tmp_path / "log") as process:
        process.code = code
        children: list[int] = []

        def begun(begun: Any) -> None:
            children.append(begun.steps)
            process.stop(grace=0.5)

        outcome = process.run(job(tmp_path, {}, 5), lambda slot: True, on_begun=begun)
        assert outcome.ending == "stopped"
        wait_until(lambda: is_gone(children[0]))
        assert process.run(job(tmp_path, {}, 6), lambda slot: True).ending == "stopped"


def test_trouble_in_the_study_ends_the_trainer(tmp_path: Path) -> None:
    with StandIn({}, tmp_path / "log") as process:
        process.code = "say(kind='slot', trial=5, slot=1, step=1, value=0.5)\ntime.sleep(60)"

        def trouble(slot: Slot) -> bool:
            raise RuntimeError("the storage is gone")

        with pytest.raises(RuntimeError, match="storage"):
            process.run(job(tmp_path, {}, 5), trouble)
        assert process.process is None


# -------------------------------------------------------------------------------------------- the process, for real


def test_trainer_that_is_killed_fails_the_trial_and_is_replaced(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    options = network_options(network_setting)
    with TrainerProcess({}, tmp_path / "trainer.log") as process:
        first = process.run(job(tmp_path / "1", options), lambda slot: True)
        assert first.ending == "done", (first.message, (tmp_path / "trainer.log").read_text())
        assert process.process is not None
        number = process.process.pid
        killed = process.run(
            job(tmp_path / "2", {**options, "max_train_epochs": 1000}, 2),
            lambda slot: True,
            on_begun=lambda begun: os.kill(number, signal.SIGKILL),
        )
        assert killed.ending == "failed" and is_gone(number)
        stopped = process.run(
            job(tmp_path / "3", {**options, "max_train_epochs": 30}, 3), lambda slot: bool(process.stop())
        )
        assert stopped.ending == "stopped" and stopped.best_slot == 1 and stopped.file is not None
    assert "Stopped" in (tmp_path / "3" / "logs" / "trainer.log").read_text()


PARENT = """
import json, sys
from tests.tools.trials import job
from library.search.trainer.parent_side import TrainerProcess
process = TrainerProcess({}, sys.argv[1] + "/trainer.log")
process.run(job(sys.argv[1], json.loads(sys.argv[2])), lambda slot: True,
            on_begun=lambda begun: print(process.process.pid, flush=True))
"""


def test_trainer_does_not_outlive_its_parent(network_setting: NetworkSetting, tmp_path: Path) -> None:
    options = network_options(network_setting, max_train_epochs=1000)
    parent = Run("-c", [PARENT, str(tmp_path), json.dumps(options)])
    parent.until(lambda: parent.said.endswith("\n"))
    number = int(parent.said.splitlines()[-1])
    assert psutil.pid_exists(number)
    parent.send(signal.SIGKILL)
    parent.end(-signal.SIGKILL)
    wait_until(lambda: is_gone(number))


WATCHED = """
import os, sys, time
from library.search.trainer import child
os.environ[child.PARENT_VARIABLE] = str(os.getppid())
wire = child.Wire(*child.private_descriptors())
print("to the log, not to the parent")
wire.send("ready")
time.sleep(60)
"""


def test_end_of_input_ends_the_trainer_at_once_and_prints_do_not_reach_the_parent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        cwd=PROJECT_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdin is not None and process.stderr is not None
    assert from_line(process.stdout.readline()) == {"kind": "ready"}
    process.stdin.close()
    process.wait(60)
    assert b"to the log" in process.stderr.read() and process.stdout.read() == b""


def is_gone(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
