"""Adherence to prompts, a constraint: who measures it, who is told, and that a trial that broke it is never the best."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from library.errors import Diverged
from library.search.best_params import read_best_params
from library.search.constraints import constraints_measured
from library.search.judging import Judging
from library.search.messages import Job, Outcome
from library.search.results.kept_adapters import adapter_of, keep_best_adapters
from library.search.results.status import status_text
from library.search.results.study_report import build_report
from library.search.run.driver import Driver
from library.search.study.trial_values import best_of, predicted
from library.search.study.verdict import judge, top
from library.search.terms import Terms
from library.search.trainer.judge_by_loss import Measured
from library.search.trainer.judge_by_pictures import Embedded, ImageJudge, allowed_fall
from tests.tools.search import FACTS, SPACE, TERMS, FakeTrainer, ledger, next_trial, plan, said, view
from tests.tools.search import trial as made_trial

IMAGE = replace(TERMS, objective="image", judging={"clip_model": "somewhere"})
BROKE, KEPT = {"constraint_adherence": 0.01}, {"constraint_adherence": -0.01}


def trial(number: int, value: float, components: dict[str, float] = KEPT, **attrs: Any) -> FrozenTrial:
    """Trial `number`, from 1; of the default configuration where attrs say so."""
    params = SPACE.defaults if "baseline" in attrs or "of_trial" in attrs else {}
    return made_trial(number, value, params=params, **{"components": components, "seed": 6 + number, **attrs})


def defaults(components: dict[str, float] = KEPT) -> list[FrozenTrial]:
    return [trial(n, -0.1 - 0.01 * n, components, baseline=n - 1) for n in range(1, 4)]


class Drawing(FakeTrainer):
    """As if pictures were judged: learning rates above 5e-4, where the value is the best, no longer follow prompts."""

    def run(self, job: Job, on_slot: Any, **more: Any) -> Outcome:
        outcome = super().run(job, on_slot, **more)
        kept = math.log10(job.options["learning_rate"] / 5e-4)
        return replace(outcome, components={"likeness": 0.5, "constraint_adherence": kept})


# What is measured.


def looking(monkeypatch: pytest.MonkeyPatch, *cosines: torch.Tensor, **settings: Any) -> ImageJudge:
    """A judge that sees these cosines to prompts, those of the base first."""
    looks = iter(Embedded(torch.eye(4), torch.eye(4), one) for one in cosines)
    monkeypatch.setattr(ImageJudge, "_embedded", lambda self, folder: next(looks))
    models: Any = SimpleNamespace(dino=lambda photos: torch.eye(4))
    task: Any = SimpleNamespace(network=SimpleNamespace(disabled=contextlib.nullcontext))
    return ImageJudge(Judging(("a",), ("b", "c"), **settings), models, task, lambda: None, [], Path(), {})  # type: ignore[arg-type,return-value]


def test_adherence_may_fall_by_the_margin_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.tensor([0.3, 0.3, 0.2, 0.2])  # no noise: seeds of a prompt are equal
    judged = looking(monkeypatch, base, base - 0.019, base - 0.021)
    kept, broke = judged(5), judged(10)
    assert kept.components["constraint_adherence"] == pytest.approx(-0.001, abs=1e-6)
    assert broke.components["constraint_adherence"] == pytest.approx(0.001, abs=1e-6)
    assert broke.components["adherence"] == pytest.approx(-0.021, abs=1e-6)
    assert broke.details["adherence_may_fall"] == 0.02 and kept.value == broke.value


def test_a_noisy_base_allows_two_of_its_standard_errors() -> None:
    told = torch.tensor([0.1, 0.3, 0.4, 0.2])
    noise = 2 * math.sqrt(0.02 / 4)  # the variance of two values that differ by 0.2
    assert allowed_fall(told, Judging(seeds=2)) == pytest.approx(noise, abs=1e-6)
    assert allowed_fall(told, Judging(seeds=2, adherence_margin=0.5)) == 0.5
    assert allowed_fall(told, Judging(seeds=1)) == 0.02, "the prompts' own differences are no noise"


def test_without_clip_there_is_no_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = looking(monkeypatch, None, None)  # type: ignore[arg-type]
    assert not any("adherence" in name for name in judged(5).components)


def test_adherence_that_is_no_number_is_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = looking(monkeypatch, torch.full((4,), 0.3), torch.full((4,), math.nan))
    with pytest.raises(Diverged, match="embedding of a picture that this trial drew is not finite"):
        judged(5)


def test_the_best_slot_keeps_the_constraint_where_one_does() -> None:
    broke, kept, worse = Measured(-0.9, dict(BROKE)), Measured(-0.5, dict(KEPT)), Measured(-0.4, dict(KEPT))
    assert min((broke, kept, worse), key=lambda one: one.rank) is kept
    assert Measured(-0.9, {"low": 1.0}).rank < Measured(-0.8, {"low": -1.0}).rank


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        (TERMS, ()),
        (IMAGE, ("adherence",)),
        (replace(IMAGE, judging={}), ()),
        (replace(IMAGE, judging={}, options={"pretrained_model_name_or_path": "tiny-shapes"}), ("adherence",)),
    ],
)
def test_which_studies_have_the_constraint(terms: Terms, names: tuple[str, ...]) -> None:
    assert constraints_measured(terms) == names


# What follows from it.


def test_a_trial_that_broke_it_is_never_the_best() -> None:
    trials = [*defaults(), trial(4, -9.0, BROKE), trial(5, -0.5)]
    best, verdict = best_of(trials), judge(trials)
    assert best is not None and best.number == 4
    assert 4 not in [one.number + 1 for one in top(trials)]
    assert verdict.best is not None and verdict.best.trial == 5 and verdict.is_winner
    assert verdict.broke == (4,) and 4 not in [one.trial for one in verdict.candidates]


def test_where_all_broke_it_there_is_no_best_and_that_is_said() -> None:
    verdict = judge([*defaults(BROKE), trial(4, -9.0, BROKE)])
    assert verdict.best is None and verdict.broke == (1, 2, 3, 4)
    assert verdict.words.startswith("No trial can be the best: all 4 ")


def test_a_default_that_broke_it_is_not_recommended() -> None:
    words = judge([*defaults(BROKE), trial(4, -0.121)]).words
    assert words.startswith("No winner: the best is trial 4") and "the default follows prompts less" in words
    assert "the default follows prompts less" not in judge([*defaults(), trial(4, -0.131)]).words


def test_a_trial_that_breaks_it_with_most_seeds_is_no_winner() -> None:
    trials = [*defaults(), trial(4, -0.9), trial(5, -0.5)]
    again = [trial(n, -0.9, BROKE, of_trial=4, seed=10 + n) for n in (1, 2)]
    other = [trial(n, -0.5, of_trial=5, seed=8 + n) for n in (3, 4)]
    verdict = judge(trials, [*again, *other])
    assert verdict.best is not None and verdict.best.trial == 5 and verdict.broke == (4,)
    once = judge(trials, [again[0], trial(2, -0.9, of_trial=4, seed=12), *other])
    assert once.best is not None and once.best.trial == 4


def test_a_person_may_pick_it_and_hears_of_it() -> None:
    verdict = judge([*defaults(), trial(4, -9.0, BROKE)], picked=4)
    assert verdict.best is not None and verdict.best.trial == 4 and "follows prompts less" in verdict.words


def test_adapters_of_trials_that_may_win_stay_before_others(tmp_path: Path) -> None:
    trials = []
    for number in range(1, 6):
        trials.append(trial(number, -1.0 / number, BROKE if number < 3 else KEPT))
        file = adapter_of(tmp_path, trials[-1])
        file.parent.mkdir()
        file.write_bytes(b"weights")
    keep_best_adapters(tmp_path, trials, judge(trials), 3)
    assert [number for number in range(1, 6) if adapter_of(tmp_path, trials[number - 1]).is_file()] == [3, 4, 5]


def test_a_prediction_is_held_against_what_may_win() -> None:
    trials = [trial(1, -9.0, BROKE), trial(2, -0.5)]
    assert predicted(trials, 5, -3.0) == pytest.approx(-0.5, abs=1e-5)


# What samplers are told.


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_every_ended_trial_has_the_constraint_whatever_came_of_it(tmp_path: Path, sampler: Any) -> None:
    mine = ledger(tmp_path, 30, sampler=sampler, constraints=("adherence",))
    kept = {1: None, 2: -0.02, 3: 0.03, 4: None}  # the first and the fourth diverge
    for number in range(1, 12):
        running = next_trial(mine)
        value = kept.get(number, -0.01)
        components = {} if value is None else {"constraint_adherence": value}
        ending = "diverged" if value is None else "done"
        mine.settle(
            running, Outcome(number, ending, value=None if value is None else 0.1 * number, components=components)
        )
    told = [one.constraints["adherence"] for one in mine.trials()]
    assert told[:5] == [0.0, -0.02, 0.03, 0.03, -0.01], "what was not measured counts as the worst so far"
    assert mine.study.best_trial.number == 1
    assert mine.ask() is not None, "the Gaussian process takes all or none"


def test_a_study_that_began_without_constraints_goes_on_without(tmp_path: Path) -> None:
    old = ledger(tmp_path, 30, sampler="gp")
    for number in range(1, 10):
        mine = old if number < 9 else ledger(tmp_path, 30, sampler="gp", constraints=("adherence",))
        running = next_trial(mine)
        mine.settle(running, Outcome(number, "done", value=0.1 * number, components=dict(KEPT)))
    assert not any(one.constraints for one in mine.trials()) and mine.ask() is not None


def test_the_gaussian_process_keeps_away_from_what_breaks_it(tmp_path: Path) -> None:
    proposed = {}
    for constraints in ((), ("adherence",)):
        mine = ledger(tmp_path / str(len(constraints)), 40, sampler="gp", constraints=constraints)
        for number in range(20):  # the higher the rate the better, and above 5e-4 no longer allowed
            ratio, dim = 0.1 + 0.9 * (7 * number % 20) / 20, (8, 16, 32)[number % 3]
            params = {"learning_rate": 1e-5 * 10 ** (3 * number / 19), "text_encoder_ratio": ratio, "network_dim": dim}
            mine.enqueue(params, str(number))
            running = next_trial(mine)
            kept = {"constraint_adherence": math.log10(params["learning_rate"] / 5e-4)}
            mine.settle(running, Outcome(number + 1, "done", value=-3 * number / 19, components=kept))
        after = next_trial(mine)
        proposed[constraints] = float(after.params["learning_rate"])
    assert proposed[()] == pytest.approx(1e-2) and proposed[("adherence",)] < 4e-3


# A whole study.


def test_the_winner_and_what_is_exported_follow_prompts(tmp_path: Path) -> None:
    settings = {"terms": IMAGE, "prunes": False, "facts": FACTS, "confirm": 2}
    result = Driver(plan(tmp_path, 14, **settings), lambda number: Drawing()).run()
    seen = view(tmp_path)
    fast = [one for one in seen.trials if one.params["learning_rate"] > 5e-4]
    assert fast and min(one.value or 0.0 for one in fast) == min(one.value or 0.0 for one in seen.trials)
    best = read_best_params(tmp_path / "out" / "best_params.json")
    assert best.train_config["learning_rate"] <= 5e-4
    assert all(one.params["learning_rate"] <= 5e-4 for one in best.top5)
    assert all(one.params["learning_rate"] <= 5e-4 for one in seen.confirmed)
    assert sorted(result.verdict.broke) == sorted(one.number + 1 for one in fast)
    assert f"{len(fast)} trials follow prompts less than the base does and cannot be the best" in status_text(seen)
    assert "prompts less than the base does and cannot be the best" in said(tmp_path)


def test_the_report_counts_those_that_broke_it(tmp_path: Path) -> None:
    fast = {**SPACE.defaults, "learning_rate": 2e-3}
    Driver(plan(tmp_path, 4, terms=IMAGE, initial=(fast,)), lambda number: Drawing()).run()
    html = build_report(view(tmp_path), tmp_path / "out").html()
    assert "1 trial follows prompts less than the base does and cannot be the best: 4." in html
    assert "initial parameters, left out: it follows prompts less" in html


def test_best_params_of_a_trial_that_turned_out_to_break_it_go(tmp_path: Path) -> None:
    class AgainWorse(Drawing):
        def run(self, job: Job, on_slot: Any, **more: Any) -> Outcome:
            kept = -0.1 if Path(job.folder).name.startswith("trial_") else 0.1
            return replace(super().run(job, on_slot, **more), components={"constraint_adherence": kept})

    settings = {"terms": IMAGE, "facts": FACTS, "confirm": 5, "new_seeds": 4}
    result = Driver(plan(tmp_path, 3, **settings), lambda number: AgainWorse()).run()
    assert result.verdict.best is None and not (tmp_path / "out" / "best_params.json").exists()


def test_the_objective_loss_knows_of_no_constraint(tmp_path: Path) -> None:
    Driver(plan(tmp_path, 4), lambda number: FakeTrainer()).run()
    seen = view(tmp_path)
    assert not any(one.constraints for one in seen.trials)
    assert all(
        set(one.system_attrs) <= {"fixed_params"} | {f"completed_rung_{n}" for n in range(4)} for one in seen.trials
    )
    assert seen.verdict.broke == () and "follow" not in status_text(seen)
    assert all(one.state == TrialState.COMPLETE for one in seen.trials)
