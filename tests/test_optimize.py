"""optimize.py: what it refuses before the first trial, and a study of fake trainings from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import optimize
from library.search import trainer_process
from tests.tools.search import FakeTrainer

WORDS = ["--no_sheet", "--no_export", "--sampler", "random", "--confirm", "0"]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--output-dir", str(folder / "out"), "--study-name", "mio", *WORDS, *more]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(env: Any, log: Any) -> FakeTrainer:
        return FakeTrainer()

    monkeypatch.setattr(trainer_process, "TrainerProcess", trainer)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--n-trials", "0"], "n_trials must be at least 1, got 0."),
        (["--n_trials", "-3"], "n_trials must be at least 1, got -3."),
        (["--base-model", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--space", "nosuch"], "No search space nosuch"),
        (["--objective_args", "steps=3"], "objective_args are settings of the objective image"),
        (["--n-trails", "3"], "did you mean n_trials?"),
        (["statsu"], "did you mean status?"),
        (["pick"], "name the number of a trial"),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    given = words if words[0][0] != "-" else arguments(tmp_path, *words)
    assert optimize.main(given) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("out/trial_*"))


def test_an_unknown_key_of_a_space_is_named_with_its_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.toml"
    space.write_text("[parameters.learning_rte]\nlow = 1e-5\nhigh = 1e-3\ndefault = 1e-4\n")
    assert optimize.main(arguments(tmp_path, "--space", str(space))) == 2
    assert "did you mean learning_rate?" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimize.main(arguments(tmp_path, "--dry_run", "--n-trials", "5")) == 0
    assert "searches   learning_rate" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_study_runs_resumes_and_is_looked_at_from_the_command_line(
    tmp_path: Path, fake: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimize.main(arguments(tmp_path, "--n-trials", "5")) == 0
    out = tmp_path / "out"
    best = json.loads((out / "best_params.json").read_text())
    assert (out / "report.html").stat().st_size > 100_000
    assert len(list(out.glob("trial_*"))) == 5 and best["study"] == "mio" and best["dataset"]
    place = ["--output-dir", str(out), "--study-name", "mio"]
    capsys.readouterr()

    assert optimize.main(["status", *place]) == 0
    assert "trial 5/5" in capsys.readouterr().out
    other = next(n for n in range(1, 6) if n != best["trial"])
    assert optimize.main(["pick", str(other), *place]) == 0
    assert json.loads((out / "best_params.json").read_text())["trial"] == other

    # The same command goes on to the new total, and a study of another objective is refused.
    assert optimize.main(arguments(tmp_path, "--n-trials", "6")) == 0
    assert len(list(out.glob("trial_*"))) == 6
    assert optimize.main(arguments(tmp_path, "--objective", "image")) == 2
    assert "is judged by loss, and image is asked for" in capsys.readouterr().err
