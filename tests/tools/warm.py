"""Scripts as processes of their own, forked from one that has imported what they need: each is under way at once."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from library.options.toml_file import PROJECT_ROOT
from tests.tools.waiting import wait_until

IMPORTED = (
    "prepare_cache", "train_repa", "train_network", "library.training.session", "torch.utils.tensorboard",
    "diffusers.optimization", "diffusers.schedulers.scheduling_ddpm", "typeguard", "toml",
)  # fmt: skip


def serve() -> None:
    """Fork a process for each script that a line of the input orders, and say how the process of a number ended."""
    from library import progress
    from library.quiet import quiet_libraries

    quiet_libraries()
    setattr(os, "fsync", os.fstat)  # noqa: B010  # as for the tests themselves
    progress.SILENCE = math.inf  # a slow machine says no more than a fast one
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, int):
            ended, status = os.waitpid(order, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif not (answer := os.fork()):
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            said = os.open(order["said"], os.O_WRONLY | os.O_APPEND)
            os.dup2(said, 1), os.dup2(said, 2)
            os.environ.update(order["env"])
            sys.argv = order["words"]
            if sys.argv[0] == "-c":
                exec(sys.argv.pop(1), {"__name__": "__main__"})
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            return  # and end as any script does
        print(json.dumps(answer), flush=True)


@cache
def server() -> subprocess.Popen[str]:
    """One for all tests of this process."""
    code = "import tests.tools.warm as warm; warm.serve()"
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(started.kill)
    return started


def ask(order: object) -> int | None:
    process = server()
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps(order), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(world: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each of several processes on the CPU."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    own = ("RANK", "LOCAL_RANK")
    return [shared | dict.fromkeys(own, str(rank)) | {"WORLD_SIZE": str(world)} for rank in range(world)]


class Run:
    """A script, or Python's -c and a program, that runs as `processes` processes, which end together."""

    def __init__(self, script: str | Path, words: list[str], processes: int = 1) -> None:
        self._said = tempfile.NamedTemporaryFile()  # noqa: SIM115
        order = {"words": [str(script if script == "-c" else PROJECT_ROOT / script), *words], "said": self._said.name}
        environments = ranks(processes) if processes > 1 else [{}]
        self.pids = [ask({**order, "env": environment}) for environment in environments]
        self.code: int | None = None
        """Negative a signal; where a process failed, that of the first that did; None before `running` has seen the end."""

    def running(self) -> bool:
        if self.code is None:
            ended = {pid: code for pid in self.pids if (code := ask(pid)) is not None}
            self.pids = [pid for pid in self.pids if pid not in ended]
            if failed := [code for code in ended.values() if code]:
                self.send(signal.SIGKILL)
            self.code = failed[0] if failed else None if self.pids else 0
        return self.code is None

    @property
    def said(self) -> str:
        return Path(self._said.name).read_text()

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that comes about while it runs."""
        wait_until(lambda: condition() or not self.running(), 1200)
        assert self.running(), self.said[-3000:]

    def end(self, code: int = 0) -> str:
        """Wait for its end, which must have this exit code; what was said."""
        wait_until(lambda: not self.running(), 1200)
        assert self.code == code, (self.code, self.said[-3000:])
        return self.said
