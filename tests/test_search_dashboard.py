"""PictureFacts for optuna-dashboard, and the contact sheet that they come from; what fails there ends no study."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna.artifacts import get_all_artifact_meta
from PIL import Image
from safetensors.torch import save_file

import optimize
from library.errors import RunFailed, UserError
from library.options.toml_file import PROJECT_ROOT
from library.search.messages import Job, Outcome
from library.search.results import contact_sheet as sheet
from library.search.results.contact_sheet import draw_best, sheet_pictures
from library.search.run.driver import Driver
from tests.tools.search import FakeTrainer, ledger, plan, run, said, view


class Drawing(FakeTrainer):
    """Leaves two pictures of the subject and one of something else in each trial's slots 5 and 10, its best one."""

    def run(self, job: Job, on_slot: Any, **more: Any) -> Outcome:
        outcome = super().run(job, on_slot, **more)
        for slot, colour in ((5, "red"), (10, "blue")):
            folder = Path(job.folder) / "realtime_evaluations" / f"slot_{slot:02d}"
            folder.mkdir(parents=True)
            for name in ("subject_00", "subject_01", "unrelated_00"):
                Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        return outcome


def stored(folder: Path, owner: Any) -> list[tuple[str, Path]]:
    """Name and file of each artifact of a study or a trial."""
    storage = ledger(folder).storage
    return [
        (one.filename, folder / "out" / "artifacts" / one.artifact_id)
        for one in get_all_artifact_meta(owner, storage=storage)
    ]


def test_each_trial_has_the_pictures_of_its_best_slot_in_the_dashboard(tmp_path: Path) -> None:
    run(plan(tmp_path, 2, prunes=False), Drawing)
    for trial in ledger(tmp_path).trials():
        assert trial.user_attrs["best_slot"] == 10
        ((name, file),) = stored(tmp_path, trial)
        with Image.open(file) as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors() or []}
            assert name == "contact_sheet.png" and picture.size[0] >= 64 and picture.size[1] >= 64
        assert (0, 0, 255) in colours and (255, 0, 0) not in colours
        kept = tmp_path / "out" / f"trial_{trial.number + 1:04d}" / "realtime_evaluations" / name
        assert kept.read_bytes() == file.read_bytes()


def test_a_trial_that_drew_nothing_has_none(tmp_path: Path) -> None:
    run(plan(tmp_path, 1))
    assert stored(tmp_path, ledger(tmp_path).trials()[0]) == [] and not (tmp_path / "out" / "artifacts").exists()


def test_a_picture_that_cannot_be_stored_is_one_line_and_the_trial_counts(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "artifacts").write_text("in the way")
    run(plan(tmp_path, 2, prunes=False), Drawing)
    assert said(tmp_path).count("its pictures are not in the dashboard: FileExistsError") == 2
    assert [one.state.name for one in ledger(tmp_path).trials()] == ["COMPLETE", "COMPLETE"]


def test_the_documented_command_names_the_folder() -> None:
    text = (PROJECT_ROOT / "docs" / "optimize.md").read_text(encoding="utf-8")
    assert "optuna-dashboard sqlite:///outputs/mio/study.db --artifact-dir outputs/mio/artifacts" in text


# The contact sheet.


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A study of four trials with adapters that name a caption."""

    class Writing(FakeTrainer):
        def run(self, job: Job, on_slot: Any, **more: Any) -> Outcome:
            metadata = {"ss_tag_frequency": json.dumps({"1_cat": {"a red cat": 3}})}
            file = Path(job.folder) / f"lora_trial_{job.trial}.safetensors"
            save_file({"weight": torch.zeros(1)}, file, metadata=metadata)
            return super().run(job, on_slot, **more)

    Driver(plan(tmp_path, 4, prunes=False), lambda number: Writing()).run()
    return tmp_path


def drawn(command: list[str], **more: Any) -> Any:
    """What generate.py leaves: a picture for each line."""
    prompts = Path(command[command.index("--prompt_file") + 1])
    for number, _ in enumerate(prompts.read_text().splitlines()):
        Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(prompts.with_name(f"sheet_{number:02d}_{sheet.SEED}.png"))
    return SimpleNamespace(returncode=0, stderr="")


def test_the_study_has_a_row_for_each_of_the_best_and_each_once(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", drawn)
    for _ in range(2):
        draw_best(view(finished), finished / "out", "tiny-shapes")
    wanted = {"base.png", *(f"trial_{one.trial}.png" for one in view(finished).verdict.candidates)}
    rows = stored(finished, view(finished).study)
    assert len(rows) == len(wanted) and {name for name, _ in rows} == wanted
    assert all(Image.open(file).format == "PNG" for _, file in rows)
    assert len(sheet_pictures(finished / "out")) == len(wanted)


def test_a_row_that_was_deleted_in_the_dashboard_is_no_hindrance(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", drawn)
    study = view(finished).study
    study._storage.set_study_system_attr(study._study_id, "artifacts:gone", "null")
    draw_best(view(finished), finished / "out", "tiny-shapes")
    assert "not in the dashboard" not in said(finished) and len(list((finished / "out" / "artifacts").iterdir())) >= 2


def raising(error: Exception) -> Callable[..., Any]:
    def run(command: list[str], **more: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (raising(subprocess.TimeoutExpired("generate.py", 1800)), "took more than 30 minutes and was stopped"),
        (raising(OSError(12, "Cannot allocate memory")), "could not be started: Cannot allocate memory"),
        (lambda *_, **__: SimpleNamespace(returncode=1, stderr="\nerror: no\n"), "failed: no"),
    ],
)
def test_a_sheet_that_is_not_drawn_is_a_sentence_and_the_rest_goes_on(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., Any],
    sentence: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RunFailed, match=sentence):
        draw_best(view(finished), finished / "out", "tiny-shapes")
    optimize.attempt("contact sheet", lambda: draw_best(view(finished), finished / "out", "tiny-shapes"))
    assert f"No contact sheet: generate.py {sentence}" in capsys.readouterr().err


def test_a_damaged_adapter_is_a_sentence(finished: Path) -> None:
    best = view(finished).verdict.candidates[0].trial
    (finished / "out" / f"trial_{best:04d}" / f"lora_trial_{best}.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        draw_best(view(finished), finished / "out", "tiny-shapes")
