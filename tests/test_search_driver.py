"""The driver: whole studies with trainers that compute instead of training, and what goes wrong with them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from library.errors import RunFailed, UserError
from library.search.best_params import BaseModel, read_best_params
from library.search.half_batch import with_half_batch
from library.search.messages import Job
from library.search.results.best_trial import Facts, pick_trial, rate_reference
from library.search.run.driver import Driver, Result
from library.search.space import Parameter, Space
from library.search.study.study import check_study
from library.search.terms import Terms
from tests.tools.search import FACTS, SPACE, TERMS, FakeTrainer, ledger, plan, run, said, view


def test_a_study_leaves_what_it_promises(tmp_path: Path) -> None:
    driver = Driver(plan(tmp_path, 12, confirm=5, facts=FACTS), lambda number: FakeTrainer())
    result = driver.run()
    assert result.done == 12 and not result.interrupted
    out = tmp_path / "out"
    trials = ledger(tmp_path).trials()
    assert [one.number for one in trials] == list(range(12))
    assert sorted(path.name for path in out.glob("trial_*")) == [f"trial_{n:04d}" for n in range(1, 13)]
    assert len(list(out.glob("confirm_*"))) == 10
    params = json.loads((out / "trial_0001" / "params.json").read_text())
    assert params == {"learning_rate": 3e-4, "text_encoder_lr": 1.5e-4, "network_dim": 16}
    details = json.loads((out / "trial_0001" / "trial.json").read_text())
    assert details["options"]["train_batch_size"] == 4 and details["suggested"] == SPACE.defaults
    best = read_best_params(out / "best_params.json")
    assert best.confirmed is not None and best.confirmed.seeds == (10, 11) and len(best.top5) == 5
    assert best.lr_reference.effective_batch == 4 and best.search_space == SPACE.hash
    assert best.train_config["learning_rate"] == best.params["learning_rate"]
    assert "BUDGET" in (out / "CONVERGENCE_ALERT.txt").read_text() and "trial 12/12" in said(tmp_path)
    assert result.verdict.words in said(tmp_path)


def test_a_study_that_is_done_does_nothing_when_it_is_run_again(tmp_path: Path) -> None:
    run(plan(tmp_path, 4))
    trainers: list[FakeTrainer] = []
    Driver(plan(tmp_path, 4), lambda number: trainers.append(FakeTrainer()) or trainers[-1]).run()
    assert trainers == []
    run(plan(tmp_path, 6))
    assert len(ledger(tmp_path).trials()) == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "image"}, "is judged by loss, not image"),
        ({"script": "train_repa"}, "trains with train_network, not train_repa"),
        ({"options": {"train_batch_size": 8}}, "has other fixed options: train_batch_size was 4, is 8"),
        ({"space": Space("train_network", SPACE.parameters[:2])}, "searches another space: network_dim is gone"),
        ({"seed": 8}, "trains with the seed 7, not 8"),
        ({"base": "b"}, "was made on other weights of the base"),
        ({"settings": "b"}, "was made with other settings of its datasets"),
    ],
)
def test_a_study_with_other_terms_is_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    known = replace(TERMS, base="a", settings="a")
    run(plan(tmp_path, 1, terms=known))
    with pytest.raises(UserError, match=sentence):
        run(plan(tmp_path, 2, terms=replace(known, **changes)))
    with pytest.raises(UserError, match=sentence):
        check_study("test", f"journal:{tmp_path / 'study.log'}", tmp_path / "out", lambda: replace(known, **changes))


def test_where_a_study_runs_may_change(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 4,
        "dataset_config": "here/sdxl_dataset.toml",
        "learning_rate": 1.0,
        "save_state": True,
    }
    run(plan(tmp_path, 1, terms=Terms("train_network", "loss", SPACE, given, 7, settings="a")))
    # What trials decide themselves and what is searched have no part in them.
    other = {"train_batch_size": 4, "dataset_config": "there/sdxl_dataset.toml", "device": "cuda", "seed": 3}
    run(plan(tmp_path, 2, terms=Terms("train_network", "loss", SPACE, other, 7, settings="a")))
    # A study that knows less still goes on.
    run(plan(tmp_path, 3, terms=Terms("train_network", "loss", SPACE, given, 7, base="a", dataset="a")))


def test_a_new_study_does_not_write_over_the_trials_of_another(tmp_path: Path) -> None:
    run(plan(tmp_path, 2))
    with pytest.raises(UserError, match="has trials of another study: other has no trials yet"):
        run(plan(tmp_path, 2, name="other"))


def test_a_configuration_that_is_refused_ends_the_study_before_another_trial(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Trial 1 cannot be trained, nor can any other: it is refused"):
        run(plan(tmp_path), lambda: FakeTrainer(lambda job: "refused"))
    assert [one.state for one in ledger(tmp_path).trials()].count(TrialState.FAIL) == 1
    run(plan(tmp_path, 4))  # once mended it goes on, with the same parameters
    done = [one for one in ledger(tmp_path, 4).trials() if one.state == TrialState.COMPLETE]
    assert len(done) == 4 and [one.user_attrs.get("baseline") for one in done].count(0) == 1


def test_three_failures_in_a_row_end_the_study_and_nothing_is_lost(tmp_path: Path) -> None:
    trainers: list[FakeTrainer] = []
    # Trial 4 is trial 2 again, and 5 is 4 again; 6 to 8 have one set of parameters, 9 has another.
    endings = iter(["done", "failed", "done", *["failed"] * 6])

    def make(number: int) -> FakeTrainer:
        trainers.append(FakeTrainer(lambda job: next(endings)))
        return trainers[-1]

    words = r"3 trainings in a row failed, not counting retries \(trials 4, 5, 6, 7, 8, 9\).*it is failed. See .*optimization.log"
    with pytest.raises(RunFailed, match=words):
        Driver(plan(tmp_path), make).run()
    assert len(trainers) == 7 and all(one.closed for one in trainers), "a trainer is replaced after each failure"
    run(plan(tmp_path, 12))
    assert sum(one.state in (TrialState.COMPLETE, TrialState.PRUNED) for one in ledger(tmp_path).trials()) == 12


def test_one_configuration_that_cannot_be_trained_is_given_up_and_the_study_goes_on(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = []

    def ending(job: Job) -> str:
        if job.trial == 6:
            bad.append(job.options)
        return "failed" if job.options in bad else "done"

    result = Driver(plan(tmp_path, 10), lambda number: FakeTrainer(ending)).run()
    assert result.done == 10 and said(tmp_path).count("trial 8: failed. it is failed. It is given up.") == 1
    assert [one.state for one in ledger(tmp_path, 10).trials()].count(TrialState.FAIL) == 3


def test_a_trainer_that_breaks_is_a_failure_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    broken = iter([True])

    def ending(job: Job) -> str:
        if next(broken, False):
            raise ZeroDivisionError("of a defect")
        return "done"

    run(plan(tmp_path, 3), lambda: FakeTrainer(ending))
    log = said(tmp_path)
    assert "Traceback" in log and "failed. ZeroDivisionError: of a defect. Its parameters are enqueued again." in log
    assert [one.state.name for one in ledger(tmp_path).trials()] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_diverging_trials_do_not_stop_a_study(tmp_path: Path) -> None:
    result: list[Result] = []
    trainer = FakeTrainer(lambda job: "diverged" if job.options["learning_rate"] > 1e-3 else "done")
    driver = Driver(plan(tmp_path, 15), lambda number: trainer)
    result.append(driver.run())
    trials = ledger(tmp_path, 15).trials()
    penalties = [one for one in trials if "failure" in one.user_attrs]
    assert result[0].done == 15 and len(penalties) > 2
    assert all(one.state == TrialState.COMPLETE for one in penalties)
    assert result[0].verdict.best is not None and result[0].verdict.best.params["learning_rate"] <= 1e-3


def test_tpe_leaves_a_region_that_diverges(tmp_path: Path) -> None:
    trainer = FakeTrainer(lambda job: "diverged" if job.options["learning_rate"] < 1e-4 else "done")
    Driver(plan(tmp_path, 40, sampler="tpe", prunes=False), lambda number: trainer).run()
    failed = ["failure" in one.user_attrs for one in ledger(tmp_path, 40).trials()]
    # The region is a third of the space, by the logarithm.
    assert sum(failed[:20]) >= 3 and sum(failed[20:]) <= 2


def test_out_of_memory_is_tried_again_with_half_the_batch_in_the_same_trial(tmp_path: Path) -> None:
    trainer = FakeTrainer(lambda job: "memory" if job.options["train_batch_size"] > 2 else "done")
    Driver(plan(tmp_path, 1), lambda number: trainer).run()
    batches = [(job.trial, job.options["train_batch_size"]) for job in trainer.jobs]
    assert batches == [(1, 4), (1, 2)] and trainer.jobs[1].options["gradient_accumulation_steps"] == 2
    trial = ledger(tmp_path).trials()[0]
    assert trial.user_attrs["half_batch"] is True and trial.state == TrialState.COMPLETE
    assert "failure" not in trial.user_attrs


@pytest.mark.parametrize(("batch", "trained", "effective"), [(4, 2, 4), (3, 2, 4)])
def test_what_was_trained_after_running_out_of_memory_is_what_is_recorded(
    tmp_path: Path, batch: int, trained: int, effective: int
) -> None:
    trainer = FakeTrainer(lambda job: "memory" if job.options["train_batch_size"] > 2 else "done")
    terms = replace(TERMS, options={"train_batch_size": batch})
    Driver(plan(tmp_path, 1, facts=FACTS, terms=terms), lambda number: trainer).run()
    best = read_best_params(tmp_path / "out" / "best_params.json")
    assert best.train_config["train_batch_size"] == trained and best.train_config["gradient_accumulation_steps"] == 2
    assert best.lr_reference.effective_batch == effective
    assert ("so a step has 2 x 2 pictures instead of 3 x 1" in said(tmp_path)) == (batch == 3)


def test_the_record_has_the_verdict_and_the_batch_that_was_searched(tmp_path: Path) -> None:
    searched = Parameter("train_batch_size", 2, choices=(2, 8), option="train_batch_size")
    terms = Terms("train_network", "loss", Space("train_network", (*SPACE.parameters, searched)), seed=7)
    facts = Facts(BaseModel("sd15", "tiny-sd15", "ab" * 32), scales={"low": 1.0})
    driver = Driver(plan(tmp_path, 12, facts=facts, terms=terms), lambda number: FakeTrainer())
    verdict = driver.run().verdict
    best = read_best_params(tmp_path / "out" / "best_params.json")
    assert (best.verdict, best.is_winner) == (verdict.words, verdict.is_winner)
    assert best.lr_reference.effective_batch == best.params["train_batch_size"]
    assert best.base_model.sha256 == "ab" * 32 and best.objective.scales == {"low": 1.0}
    other = next(one for one in best.top5 if one.params["train_batch_size"] != best.params["train_batch_size"])
    pick_trial(view(tmp_path), other.trial, tmp_path / "out")
    picked = read_best_params(tmp_path / "out" / "best_params.json")
    assert picked.lr_reference.effective_batch == other.params["train_batch_size"] and picked.is_winner
    assert picked.base_model == best.base_model and "picked by a person" in picked.verdict


def test_defaults_of_the_script_stand_in_the_record() -> None:
    def of(script: Any, **config: Any) -> tuple[float, int, int]:
        found = rate_reference(script, config, 9)
        return found.alpha, found.dim, found.effective_batch

    assert of("train_network", network_dim=16) == (1.0, 16, 1) and of("train_network") == (1.0, 4, 1)
    assert of("train_network", network_dim=16, network_alpha=0) == (16.0, 16, 1)
    assert of("train_repa") == (8.0, 8, 128)


def test_out_of_memory_with_half_the_batch_too_is_a_penalty(tmp_path: Path) -> None:
    trainer = FakeTrainer(lambda job: "memory")
    Driver(plan(tmp_path, 1), lambda number: trainer).run()
    trial = ledger(tmp_path).trials()[0]
    assert len(trainer.jobs) == 2 and trial.user_attrs["failure"] == "memory" and trial.value == 1.0


def test_half_a_batch_is_one_of_the_dataset_file_where_that_has_the_say(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "set.toml"
    file.write_text(
        "[general]\nbatch_size = 8\n[[datasets]]\nresolution = 512\n[[datasets]]\nresolution = 768\nbatch_size = 3\n"
        '[[datasets.subsets]]\nimage_dir = "images"\n'
    )
    options = {"dataset_config": str(file), "gradient_accumulation_steps": 2}
    halved = with_half_batch(options, "train_network", tmp_path / "trial")
    assert halved is not None and halved["gradient_accumulation_steps"] == 4
    text = Path(halved["dataset_config"]).read_text()
    assert "batch_size = 4" in text and "batch_size = 2" in text and f'"{tmp_path / "images"}"' in text
    assert options == {"dataset_config": str(file), "gradient_accumulation_steps": 2}
    assert with_half_batch({"train_batch_size": 1}, "train_network", tmp_path) is None
    assert with_half_batch({}, "train_repa", tmp_path) == {"train_batch_size": 64, "gradient_accumulation_steps": 2}


def test_pruned_trials_stop_early(tmp_path: Path) -> None:
    run(plan(tmp_path, 30))
    pruned = [one for one in ledger(tmp_path, 30).trials() if one.state == TrialState.PRUNED]
    assert 4 <= len(pruned) <= 22 and {one.last_step for one in pruned} <= {2, 4, 8}
    assert all(one.number >= 8 for one in pruned)


def test_many_workers_share_the_budget(tmp_path: Path) -> None:
    jobs: list[int] = []

    class Counting(FakeTrainer):
        def run(self, job: Job, on_slot: Any, **more: Any) -> Any:
            jobs.append(job.trial)
            return super().run(job, on_slot, **more)

    storage = f"sqlite:///{tmp_path}/study.db"
    run(plan(tmp_path, 10, workers=4, storage=storage, prunes=False), lambda: Counting(seconds=0.02))
    assert sorted(jobs) == list(range(1, 11))
    trials = ledger(tmp_path, 10, storage).trials()
    assert {one.user_attrs["lease"]["worker"] for one in trials} <= set(range(4))
    assert all(one.state.is_finished() for one in trials)


def test_many_workers_write_the_files_of_the_study_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.files._sync_file", lambda path: time.sleep(0.01))  # so that they would meet
    # Values of all trials get worse and most diverge, so that there is much to announce at once.
    driver = Driver(
        plan(tmp_path, 24, workers=4, facts=FACTS, prunes=False),
        lambda number: FakeTrainer(lambda job: "diverged" if job.trial > 12 else "done"),
    )
    assert driver.run().done == 24
    assert read_best_params(tmp_path / "out" / "best_params.json").trial <= 12
    told = ledger(tmp_path).study.user_attrs["alerts"]
    lines = (tmp_path / "out" / "CONVERGENCE_ALERT.txt").read_text().splitlines()
    assert len(told) == len(lines) >= 4 and all(any(f" {level}: " in line for line in lines) for level in told)
    assert not list((tmp_path / "out").glob(".*"))


def interrupt(*signals: int, trainer: FakeTrainer, folder: Path) -> Result:
    """Run a study and send it the signals once the first training has begun, which does not end before."""
    sent = threading.Event()
    trainer.ending = lambda job: "done" if sent.wait() else ""

    def send() -> None:
        while not trainer.jobs:
            time.sleep(0.005)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return Driver(plan(folder, 12, confirm=5), lambda number: trainer).run()
    finally:
        sender.join()


def test_one_ctrl_c_lets_the_running_trial_end_and_begins_none(tmp_path: Path) -> None:
    result = interrupt(signal.SIGINT, trainer=FakeTrainer(seconds=0.5), folder=tmp_path)
    assert result.interrupted and result.done == 1
    assert [one.state.name for one in ledger(tmp_path).trials()] == ["COMPLETE", "WAITING", "WAITING"]


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)])
def test_twice_stops_the_running_trial_and_gives_it_back(tmp_path: Path, signals: tuple[int, ...]) -> None:
    result = interrupt(*signals, trainer=FakeTrainer(seconds=60), folder=tmp_path)
    assert result.interrupted and result.done == 0
    again = ledger(tmp_path)
    assert sorted(one.state.name for one in again.trials()) == ["FAIL", "WAITING", "WAITING", "WAITING"]
    back = again.trials()[3]
    assert back.user_attrs["attempt"] == 0 and back.user_attrs["baseline"] == 0
    assert back.system_attrs["fixed_params"] == SPACE.defaults


def test_a_stop_that_nobody_here_asked_for_is_a_failure(tmp_path: Path) -> None:
    endings = iter(["stopped"])
    run(plan(tmp_path, 2), lambda: FakeTrainer(lambda job: next(endings, "done")))
    assert "stopped from outside" in said(tmp_path)
