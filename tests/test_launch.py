"""Several CPU processes under accelerate, which starts one and says nothing."""

from __future__ import annotations

import pytest

from library import launch
from library.errors import UserError


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["python", "accelerate", "launch", "--num_processes", "2", "--cpu", "train_repa.py"], 2),
        (["accelerate", "launch", "--num-processes=3", "train_repa.py"], 3),
        (["accelerate", "launch", "train_repa.py"], None),
        (["accelerate", "launch", "--num_processes"], None),
    ],
)
def test_the_number_of_processes_is_read_off_the_launchers_command_line(words: list[str], count: int | None) -> None:
    assert launch.number_of_processes(words) == count


def test_nothing_is_started_where_nobody_asked_or_somebody_has_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.JOINED, "ACCELERATE_USE_CPU", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started something"))
    launch.start_cpu_processes("train_repa.py", [])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch.start_cpu_processes("train_repa.py", [])
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "0")
    launch.start_cpu_processes("train_repa.py", [])


def test_an_unknown_number_names_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.JOINED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(launch, "number_of_processes", lambda _: None)
    with pytest.raises(UserError, match="torchrun --standalone --nproc_per_node N train_repa.py --device cpu"):
        launch.start_cpu_processes("train_repa.py", [])
