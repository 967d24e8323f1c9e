"""benchmarks/on_gpu.sh at tiny size without a GPU: every part works, and what cannot be done is said."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from library.files import read_json
from library.options.toml_file import PROJECT_ROOT


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(PROJECT_ROOT / "benchmarks"), *sys.path])
    import on_gpu

    return on_gpu


@pytest.fixture
def on_gpu(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver, whose parts run in this process, and so do the scripts that they start."""
    import common

    def start(part: Any, log: Path, folder: Path, seconds: float, *, tiny: bool) -> int:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = driver.carry_out(part, folder, tiny=tiny)
        log.write_text(said.getvalue())
        return code

    def run_script(words: list[str]) -> None:
        with mock.patch.object(sys, "argv", words), pytest.raises(SystemExit) as end:
            runpy.run_path(str(PROJECT_ROOT / words[0]), run_name="__main__")
        if end.value.code:
            raise end.value

    monkeypatch.setattr(driver, "start", start)
    monkeypatch.setattr(common, "run_script", run_script)
    return driver


def test_every_part_works_at_tiny_size(on_gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = on_gpu.main(["--tiny", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    outcomes = read_json(tmp_path / "tiny_results" / "on_gpu.json")["outcomes"]
    assert list(outcomes) == [part.name for part in on_gpu.PARTS]
    for part in on_gpu.PARTS:
        unknown = [name for name in ("--base_quantization", "--blocks_to_swap") if name in part.unknown]
        if unknown:
            assert outcomes[part.name] == f"skipped: train_network.py does not know {unknown[0]}"
        elif "--compile graphs" in part.options and not on_gpu.has_gpu():
            assert outcomes[part.name].startswith("refused: --compile graphs records CUDA graphs"), outcomes[part.name]
        else:
            assert outcomes[part.name] == "done", (tmp_path / "logs" / f"{part.name}.txt").read_text()[-3000:]
            result = read_json(tmp_path / "tiny_results" / f"{part.result}.json")
            assert all(value >= 0 for value in result["measured"].values()), part.name
    assert code == int(any(outcome != "done" for outcome in outcomes.values()))
    resumed = read_json(tmp_path / "tiny_results" / "gpu_resume.json")
    assert resumed["measured"]["tensors_that_differ"] == 0 and resumed["measured"]["tensors"] > 20
    assert resumed["measured"]["steps_after_resuming"] == 1
    assert "Tiny models" in said and "tensors_that_differ" in said.partition("target\n")[2]


@contextmanager
def ends(on_gpu: Any, code: int | None, said: str) -> Iterator[None]:
    """Within the context every part ends with this code, having said this."""

    def start(part: Any, log: Path, folder: Path, seconds: float, *, tiny: bool) -> int | None:
        log.write_text(said)
        return code

    with mock.patch.object(on_gpu, "start", start):
        yield


@pytest.mark.parametrize(
    ("code", "said", "outcome"),
    [
        (2, "loading\nerror: no such thing\nTraceback\n", "refused: no such thing"),
        (77, "error: CUDA out of memory.\n", "failed: CUDA out of memory."),
        (1, "Traceback\n  ...\nValueError: odd\n", "failed: ValueError: odd"),
        (-9, "", "failed: exit code -9"),
        (None, "step 1\n", "failed: took longer than 120 s"),
    ],
)
def test_what_fails_is_said_and_the_others_run(
    on_gpu: Any, tmp_path: Path, code: int | None, said: str, outcome: str
) -> None:
    with ends(on_gpu, code, said):
        assert on_gpu.main(["--tiny", "--folder", str(tmp_path), "--only", "lora_sd15", "repa"]) == 1
    outcomes = read_json(tmp_path / "tiny_results" / "on_gpu.json")["outcomes"]
    assert outcomes == {"lora_sd15": outcome, "repa": outcome}


def test_parts_for_which_no_time_is_left_are_skipped(on_gpu: Any, tmp_path: Path) -> None:
    with ends(on_gpu, 0, ""):
        on_gpu.main(["--tiny", "--folder", str(tmp_path), "--minutes", "0.2", "--only", "resume"])
    assert read_json(tmp_path / "tiny_results" / "on_gpu.json")["outcomes"] == {"resume": "skipped: no time left"}


def test_a_part_that_hangs_is_ended_with_all_that_it_started(driver: Any, tmp_path: Path) -> None:
    ended = mock.Mock(pid=4711)
    ended.wait.side_effect = [subprocess.TimeoutExpired("part", 1), 0]
    ended.poll.return_value = None
    with mock.patch("subprocess.Popen", return_value=ended) as popen, mock.patch("os.killpg") as killpg:
        assert driver.start(driver.BY_NAME["repa"], tmp_path / "log.txt", tmp_path, 1.0, tiny=False) is None
    assert popen.call_args.kwargs["start_new_session"] and killpg.call_args.args == (4711, 9)
    assert popen.call_args.args[0][1:] == [
        str(PROJECT_ROOT / "benchmarks" / "on_gpu.py"), "--part", "repa", "--folder", str(tmp_path),
    ]  # fmt: skip


def test_the_shell_script_starts_the_driver() -> None:
    said = subprocess.run(
        [str(PROJECT_ROOT / "benchmarks" / "on_gpu.sh"), "--help"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "--minutes" in said.stdout
