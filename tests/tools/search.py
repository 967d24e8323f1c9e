"""Studies as tests need them: a small space, trainers that compute a value instead of training, plans of fast studies."""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from library.search.best_params import BaseModel
from library.search.messages import SLOTS, Begun, Job, Outcome, Slot, read_outcome, write_outcome
from library.search.results.best_trial import Facts
from library.search.results.status import StudyView
from library.search.run.driver import Driver
from library.search.run.plan import StudyPlan, Trainer
from library.search.space import Parameter, Space
from library.search.study.ledger import Ledger
from library.search.study.running import Running
from library.search.study.storage import open_storage
from library.search.study.study import open_study
from library.search.terms import Terms

if TYPE_CHECKING:
    import pytest

SPACE = Space(
    "train_network",
    (
        Parameter("learning_rate", 3e-4, 1e-5, 1e-2, log=True, option="learning_rate"),
        Parameter("text_encoder_ratio", 0.5, 0.1, 1.0, option="text_encoder_lr", times=("learning_rate",)),
        Parameter("network_dim", 16, choices=(8, 16, 32), option="network_dim"),
    ),
)
DISTRIBUTIONS = {
    "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "text_encoder_ratio": FloatDistribution(0.1, 1.0),
    "network_dim": CategoricalDistribution((8, 16, 32)),
}
"""What Optuna makes of SPACE."""
TERMS = Terms("train_network", "loss", SPACE, {"train_batch_size": 4}, seed=7)
FACTS = Facts(BaseModel("sd15", "tiny-sd15"))


def value_at(options: dict[str, Any], seed: int, slot: int = SLOTS, sigma: float = 0.01) -> float:
    """What a training with these options is worth after a slot: least at learning_rate 1e-3 and network_dim 32."""
    distance = (math.log10(options["learning_rate"]) + 3) ** 2 + 0.05 * (options["network_dim"] != 32)
    noise = random.Random(f"{sorted(options.items())}/{seed}").gauss(0, sigma)
    return -0.5 * (slot / SLOTS) + 0.3 * distance + noise


class FakeTrainer:
    """Ends at once.

    ending: what becomes of a job, by default "done"; may raise.
    seconds: a whole training takes.
    """

    def __init__(self, ending: Callable[[Job], str] = lambda job: "done", seconds: float = 0.0) -> None:
        self.ending, self.seconds = ending, seconds
        self.jobs: list[Job] = []
        self.closed = False
        self._stopped = threading.Event()

    def run(self, job: Job, on_slot: Callable[[Slot], bool], **more: Callable[..., None]) -> Outcome:
        if self._stopped.is_set():
            return Outcome(job.trial, "stopped", "Stopped before it began.")
        self.jobs.append(job)
        more["on_begun"](Begun(job.trial, 10 * SLOTS))
        ending = self.ending(job)
        if ending != "done":
            return Outcome(job.trial, ending, f"it is {ending}.")  # type: ignore[arg-type]
        values = []
        for slot in range(1, SLOTS + 1):
            self._stopped.wait(self.seconds / SLOTS)
            more["on_tick"]()
            values.append(value_at(job.options, job.seed, slot))
            goes_on = on_slot(Slot(job.trial, slot, 10 * slot, values[-1], {"low": values[-1]}, 5.0))
            if self._stopped.is_set() or not goes_on:
                return Outcome(job.trial, "stopped", value=min(values))
        outcome = Outcome(job.trial, "done", "", min(values), values.index(min(values)) + 1, {"low": 1.0}, seconds=0.1)
        write_outcome(job.folder, outcome)
        return outcome

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.closed = True


def plan(folder: Path, n_trials: int = 12, **changes: Any) -> StudyPlan:
    defaults: dict[str, Any] = {
        "name": "test",
        "storage": f"journal:{folder / 'study.log'}",
        "output_dir": folder / "out",
        "terms": TERMS,
        "n_trials": n_trials,
        "sampler": "random",
        "confirm": 0,
        "poll": 0.05,
        "quiet": True,
    }
    return StudyPlan(**defaults | changes)


def run(plan: StudyPlan, trainer: Callable[[], Trainer] = FakeTrainer) -> Driver:
    driver = Driver(plan, lambda number: trainer())
    driver.run()
    return driver


def ledger(folder: Path, n_trials: int = 12, storage: str | None = None, **changes: Any) -> Ledger:
    """Another parent's view of the study that `plan` names."""
    study = open_study("test", storage or f"journal:{folder / 'study.log'}", TERMS, lambda words: None)
    settings: dict[str, Any] = {"sampler": "random", "seed": 7, "say": lambda words: None}
    return Ledger(study, SPACE, n_trials, folder=lambda n: folder / "out" / f"trial_{n:04d}", **settings | changes)


def next_trial(mine: Ledger) -> Running:
    running = mine.ask()
    assert running is not None
    return running


def view(folder: Path, name: str = "test") -> StudyView:
    """The study that `plan` names, as `optimize.py status` sees it."""
    return StudyView(name, f"journal:{folder / 'study.log'}")


def said(folder: Path) -> str:
    return (folder / "out" / "optimization.log").read_text()


def dead_lease(**changes: Any) -> dict[str, Any]:
    """Of a process of this machine that is no more."""
    from library.search.study.leases import this_process

    return {**this_process().lease(0), "pid": 2**22 + 1, **changes}


def params_key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def trial(number: int, value: float | None, state: str = "COMPLETE", rate: float = 1e-4, **attrs: Any) -> FrozenTrial:
    """Trial `number`, from 1, which took a minute. params: others than learning_rate `rate`, a little more for each number."""
    params = {**SPACE.defaults, "learning_rate": rate * (1 + number / 1000), **attrs.pop("params", {})}
    found = create_trial(
        state=TrialState[state], value=value, params=params, distributions=DISTRIBUTIONS, user_attrs=attrs
    )
    found.number = number - 1
    found.datetime_start = datetime(2026, 1, 1) + timedelta(minutes=number)
    if found.state.is_finished():
        found.datetime_complete = found.datetime_start + timedelta(minutes=1)
    return found


def in_a_process(work: Callable[[], None]) -> int:
    """Fork a process that does `work` and ends at once, with nothing of pytest's; its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setsid()
            work()
            status = 0
        finally:
            os._exit(status)
    return process


def parent(
    folder: Path, n_trials: int, seconds: float = 0.05, ending: Callable[[Job], str] | None = None, **changes: Any
) -> int:
    """A process that works on the study and prunes nothing; its id."""
    made = plan(folder, n_trials, **{"prunes": False, **changes})
    trainer = {"seconds": seconds} | ({} if ending is None else {"ending": ending})
    return in_a_process(lambda: run(made, lambda: FakeTrainer(**trainer)) and None)  # type: ignore[arg-type]


def statuses(parents: list[int]) -> list[int]:
    """How processes ended, once they have."""
    return [os.waitpid(process, 0)[1] for process in parents]


def eight_parents_share_a_study(folder: Path, storage: str, n_trials: int = 12) -> None:
    """Check that eight processes at once lose and double no trial."""
    assert statuses([parent(folder, n_trials, storage=storage) for _ in range(8)]) == [0] * 8
    trials = settled(folder, n_trials, storage)
    # Not what a late parent enqueued a second time, see `settled`.
    counted = [one for one in trials if one.state.is_finished() and "withdrawn" not in one.user_attrs]
    assert len(counted) == n_trials
    assert [one.user_attrs.get("baseline") for one in counted].count(0) == 1
    assert len({one.user_attrs["lease"]["pid"] for one in trials}) > 1


def settled(folder: Path, n_trials: int, storage: str) -> list[FrozenTrial]:
    """Check that a study that was run to its end has what it must; its trials."""
    trials = ledger(folder, n_trials, storage).trials()
    done = [one for one in trials if one.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(done) == n_trials, Counter(one.state.name for one in trials)
    # Only what a late parent enqueued a second time, when the budget was spent, may be left.
    tickets = {one.user_attrs.get("ticket") for one in done}
    assert all(one.state.is_finished() or one.user_attrs.get("ticket", "") in tickets for one in trials)
    by_number = {one.number + 1: one for one in trials}
    for one in trials:
        if (origin := one.user_attrs.get("retry_of")) is not None:
            # Either may have died while its parameters were written down.
            enqueued = one.system_attrs["fixed_params"]
            assert by_number[origin].params.items() <= enqueued.items() >= one.params.items()
            assert one.user_attrs.get("seed", 7) == by_number[origin].user_attrs.get("seed", 7)
    # Every training that reached its end was told as what it came to, and was the only one of its kind.
    ended = {int(path.parent.name[-4:]) for path in (folder / "out").glob("trial_*/outcome.json")}
    complete = {one.number + 1 for one in trials if one.state == TrialState.COMPLETE}
    assert ended == complete
    assert all(read_outcome(folder / "out" / f"trial_{n:04d}", n).value == by_number[n].value for n in ended)  # type: ignore[union-attr]
    trained = Counter((params_key(by_number[n].params), by_number[n].user_attrs["seed"]) for n in ended)
    assert max(trained.values()) == 1
    return trials


def claims_of_two(url: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each of two parents gets one waiting trial, of which the second learns while the first is claiming it."""
    from optuna.storages._rdb.models import TrialModel

    study = open_study("test", url, TERMS, lambda words: None)
    study.enqueue_trial(SPACE.defaults)
    trial_id = study.get_trials()[0]._trial_id
    storages = [open_storage(url), open_storage(url)]
    found: dict[int, bool] = {}

    def claim(number: int) -> None:
        found[number] = storages[number].set_trial_state_values(trial_id, TrialState.RUNNING)

    read = TrialModel.find_or_raise_by_id
    second = threading.Thread(target=claim, args=(1,))

    def read_slowly(trial_id: int, session: Any, for_update: bool = False) -> TrialModel:
        trial = read(trial_id, session, for_update)
        if threading.current_thread() is not second and second.ident is None:
            second.start()
            second.join(1.0)
        return trial

    monkeypatch.setattr(TrialModel, "find_or_raise_by_id", read_slowly)
    claim(0)
    second.join()
    return [found[0], found[1]]
