"""report.html and the terminal's view of a study, of fake trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.search.results.best_trial import pick_trial
from library.search.results.charts import importances
from library.search.results.recipe import recipe_command, recipe_words
from library.search.results.running_report import REPORT, RunningReport
from library.search.results.status import StudyView, status_text
from library.search.results.study_report import build_report
from library.search.study.progress import set_budget
from library.search.study.trial_values import is_real
from tests.tools.search import FACTS, FakeTrainer, dead_lease, ledger, plan, run, view


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 12 fake trials, of which one diverged, with the best two trained again."""
    folder = tmp_path_factory.mktemp("study")
    run(plan(folder, confirm=2, facts=FACTS), lambda: FakeTrainer(lambda job: "diverged" if job.trial == 6 else "done"))
    return folder


def test_the_report_has_every_chapter_and_opens_without_a_network(finished: Path) -> None:
    html = build_report(view(finished), finished / "out").html()
    for heading in ("Recommendation", "The best", "The search", "What the parameters do", "Cost", "All trials"):
        assert f">{heading}</h2>" in html
    assert html.count('id="figure-') >= 5
    assert "<script src" not in html and "default-src 'none'" in html


def test_it_begins_with_the_recipe_the_command_and_the_best_pictures(finished: Path) -> None:
    out = finished / "out"
    view_, best = view(finished), view(finished).verdict.best
    assert best is not None
    (out / "contact_sheet").mkdir(exist_ok=True)
    hostile = "<script>alert(1)</script><b>"
    index = []
    for number, name in enumerate(["base", "trial 1", "trial 2", "trial 3", "trial 4", "trial 5"]):
        Image.new("RGB", (4, 4)).save(out / "contact_sheet" / f"{number}.png")
        index.append({"file": f"{number}.png", "caption": f"{name}, {hostile}"})
    (out / "contact_sheet" / "pictures.json").write_text(json.dumps(index))
    html = build_report(view_, out, is_running=True).html()
    words = recipe_words(view_)
    assert f"learning_rate {best.params['learning_rate']:.3g}" in words and words.endswith(f"(trial {best.trial}).")
    command = recipe_command(out, "test")
    assert (
        command is not None
        and command.startswith("python train_network.py ")
        and f"--network_dim {best.params['network_dim']}" in command
    )
    order = (">Recommendation<", words[:30], "train_network.py --", "<img", ">How certain it is<")
    places = [html.index(part, html.index("</nav>")) for part in order]
    assert places == sorted(places) and "data-reload=" in html
    assert "<b>" not in html and hostile not in html and html.count("<img") == 4 + 6
    for file in (out / "contact_sheet").iterdir():
        file.unlink()


def test_a_running_study_reports_at_most_once_a_minute_and_never_fails(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    report = RunningReport(tmp_path, said.append)
    report(lambda: view(finished))
    assert not (tmp_path / REPORT).exists(), "a minute has not gone by"
    monkeypatch.setattr("library.search.results.running_report.EVERY", 0.0)
    report(lambda: view(finished))
    assert "data-reload=" in (tmp_path / REPORT).read_text()

    def broken() -> StudyView:
        raise OSError("the disk has gone")

    report(broken)
    report(broken)
    assert said == ["report.html could not be written, and the study goes on: the disk has gone"]


def test_the_report_says_how_sure_it_is(finished: Path) -> None:
    html = build_report(view(finished), finished / "out").html()
    assert "sigma" in html and "which is the value to expect" in html
    assert view(finished).verdict.words.split(",")[0] in html


def test_penalties_are_no_best_value(finished: Path) -> None:
    html = build_report(view(finished), finished / "out").html()
    assert "diverged: counts as" in html
    assert 6 not in [one.trial for one in view(finished).verdict.candidates]


def test_a_study_without_a_value_has_a_report(tmp_path: Path) -> None:
    ledger(tmp_path)
    assert "No trial has a value yet." in build_report(view(tmp_path), tmp_path / "out").html()
    assert "No trial has a value yet." in status_text(view(tmp_path))


def test_status_shows_progress_best_and_verdict(finished: Path) -> None:
    text = status_text(view(finished))
    assert "trial 12/12" in text and "verdict" in text
    assert f"trial {view(finished).verdict.candidates[0].trial}" in text


def test_status_shows_running_trials_and_which_of_them_are_dead(tmp_path: Path) -> None:
    own = ledger(tmp_path)
    set_budget(own.study, 8, 2, 0)
    first, second = own.ask(), own.ask()
    assert first is not None and second is not None
    first.trial.report(-0.1, 5)
    own.storage.set_trial_user_attr(second.trial._trial_id, "lease", dead_lease())
    lines = status_text(view(tmp_path)).splitlines()
    assert any("trial 1  50 %" in line and "lease" in line and "left" in line for line in lines)
    assert any("trial 2" in line and "DEAD" in line for line in lines)


def test_the_report_says_what_matters_by_fanova(finished: Path) -> None:
    trials = view(finished).trials
    found = importances(trials)
    assert found is not None and next(iter(found)) == "learning_rate" and 0.5 < sum(found.values()) <= 1
    html = build_report(view(finished), finished / "out").html()
    assert "Importance by fANOVA" in html and f"From {sum(map(is_real, trials))} trials it is unstable" in html


@pytest.mark.parametrize("count", [1, 2])
def test_of_few_trials_the_report_says_that_they_tell_nothing(tmp_path: Path, count: int) -> None:
    run(plan(tmp_path, n_trials=count))
    html = build_report(view(tmp_path), tmp_path / "out").html()
    assert "too few to estimate which parameters matter; that takes 6." in html and "fANOVA" not in html
    assert ("1 complete trial is" if count == 1 else "2 complete trials are") in html


def test_of_equal_values_the_report_says_that_they_do_not_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.tools.search.value_at", lambda *_: -0.25)
    run(plan(tmp_path, n_trials=8))
    assert importances(view(tmp_path).trials) is None
    html = build_report(view(tmp_path), tmp_path / "out").html()
    assert "complete trials do not differ in their parameters, or not in their values" in html


def test_an_unknown_study_is_one_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no study other"):
        StudyView("other", f"sqlite:///{tmp_path / 'study.db'}")
    assert not (tmp_path / "study.db").exists()


def test_a_trial_that_diverged_cannot_be_picked(finished: Path) -> None:
    with pytest.raises(UserError, match="Trial 6 cannot be picked"):
        pick_trial(view(finished), 6, finished / "out")
