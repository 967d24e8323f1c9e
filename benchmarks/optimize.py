"""What a study of optimize.py finds for its steps, what its parent costs between trainings, and eight parents on one database.

    python benchmarks/optimize.py                          # all three; the search takes about 80 minutes of one core
    python benchmarks/optimize.py --only search --seeds 5 --trials 50 --steps 40 --threads 1
    python benchmarks/optimize.py --only search --first_seed 4 --seeds 2 --output half   # at the same time, on another core
    python benchmarks/optimize.py --only overhead

search: the Gaussian process with pruning until it has found a value as good as the best of `--trials` random trials, or
has spent their steps; with --full it spends them all. Both train the tiny base on the pictures of the default study, every
trial for the same number of steps, so that steps are compute; gradient accumulation and epochs are not searched. The default
configuration is not tried first and nothing is trained again with new seeds, on either side. The first trials of both are
the same random ones. To go on after an interruption, run the same command again: each side of each seed is a study of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from common import save
from optuna.trial import FrozenTrial
from study_curves import Point, curve, mean_regrets, middle, regrets, steps_to

from library.files import write_json
from library.options.parser import parse
from library.options.search import DIALECT, OptimizeOptions
from library.options.toml_file import PROJECT_ROOT
from library.search.messages import Begun, Job, Outcome, Slot
from library.search.run.driver import Driver, StudyPlan
from library.search.run.setup import set_up
from library.search.space import Space
from library.search.study.ledger import DONE, PRUNED_AT
from library.search.study.proposals import GP_STARTUP
from library.search.study.study import open_study
from library.search.trainer.parent_side import TrainerProcess
from tests.tools.postgresql import NoServer, postgresql_server
from tests.tools.search import FakeTrainer, in_a_process, ledger, plan

PARTS = ("workers", "overhead", "search")
TARGET_SHARE, TARGET_OVERHEAD = 0.4, 1.0
UNSEARCHED = ("max_train_epochs", "gradient_accumulation_steps")
OVERHEAD_TRIALS, OVERHEAD_STEPS = 24, 10
PARENTS, SHARED_TRIALS = 8, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=50, help="of random search")
    parser.add_argument("--steps", type=int, default=40, help="of each trial that is not pruned")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument(
        "--full", action="store_true", help="have both sides spend the same steps, for regret to the end"
    )
    parser.add_argument(
        "--base_model", "--base-model", default=None, help="another tiny base than the scripts' default"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of trainer and parent")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/benchmark_optimize"), help="of the search's studies"
    )
    parser.add_argument("--output", default="optimize", help="results/OUTPUT_PART.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # torch is not loaded yet
    if arguments.only in (None, "workers"):  # first, as it forks
        save(f"{arguments.output}_workers", *share_databases())
    if arguments.only in (None, "overhead"):
        save(f"{arguments.output}_overhead", *measure_overhead(arguments))
    if arguments.only in (None, "search"):
        save(f"{arguments.output}_search", *compare_search(arguments))


def small_study(arguments: argparse.Namespace, folder: Path, sampler: str, seed: int, steps: int) -> StudyPlan:
    """The plan of the study that `optimize.py` makes without a dataset, with trials of `steps` steps, in `folder`."""
    words = ["--study_name", folder.name, "--output_dir", str(folder), "--sampler", sampler, "--seed", str(seed)]
    words += ["--confirm", "0", "--keep", "1", "--device", arguments.device]
    if arguments.base_model is not None:
        words += ["--base_model", arguments.base_model]
    made = set_up(parse(OptimizeOptions, words, prog="optimize.py", description=None, dialect=DIALECT)).plan
    terms = made.terms
    searched = tuple(one for one in terms.space.parameters if one.name not in UNSEARCHED)
    options = {
        **terms.options,
        "resolution": f"{arguments.resolution},{arguments.resolution}",
        "max_train_steps": steps,
        "max_data_loader_n_workers": 1,
        "cache_dir": str(folder.parent / "caches"),
    }
    space = Space(terms.script, searched, terms.space.options)
    return replace(made, terms=replace(terms, space=space, options=options), quiet=True)


def settings_of(arguments: argparse.Namespace, made: StudyPlan, steps: int) -> dict[str, Any]:
    options = made.terms.options
    return {
        "base": options["pretrained_model_name_or_path"],
        "data": Path(options["train_data_dir"]).parent.name,
        "resolution": arguments.resolution,
        "batch": options["train_batch_size"],
        "steps": steps,
        "searched": ", ".join(one.name for one in made.terms.space.parameters),
        "threads": arguments.threads,
    }


# Search: what is found for how many steps.


@dataclass
class KeptWarm:
    """A trainer that outlives the drivers it works for."""

    trainer: TrainerProcess

    def run(self, job: Job, on_slot: Callable[[Slot], bool], **more: Any) -> Outcome:
        return self.trainer.run(job, on_slot, **more)

    def stop(self) -> None:
        self.trainer.stop()

    def close(self) -> None:
        pass


def compare_search(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    base = (arguments.base_model or "default").replace("/", "-")
    folder = arguments.folder / f"{base}_{arguments.resolution}px_{arguments.steps}_steps"
    records = []
    with ExitStack() as context:
        context.enter_context(mock.patch("library.search.run.driver.enqueue_baselines", lambda ledger: None))
        trainer = KeptWarm(context.enter_context(TrainerProcess({}, folder / "trainers.log")))
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            records.append(compare_one(arguments, folder, seed, trainer))
            write_json(folder / f"seed_{seed}.json", records[-1])
            print(f"seed {seed}: {records[-1]}", flush=True)
    settings = settings_of(
        arguments, small_study(arguments, folder / "none", "gp", 1, arguments.steps), arguments.steps
    )
    settings |= {"trials": arguments.trials, "seeds": arguments.seeds, "full": arguments.full}
    shares = [one["share"] for one in records]
    share = middle(shares)
    measured = {
        "median_share_of_steps": share,
        "worst_share_of_steps": None if None in shares else max(shares),
        "seeds_that_reached_it": sum(one is not None for one in shares),
        "median_random_steps": median(one["random_steps"] for one in records),
        "median_gp_steps_to_random_best": middle([one["gp_steps_to_random_best"] for one in records]),
        "median_share_of_gp_trials_pruned": median(one["gp_pruned"] / one["gp_trials"] for one in records),
        **(mean_regrets(records) if arguments.full else {}),
        "seeds": records,
    }
    met = share is not None and share <= TARGET_SHARE
    return settings, measured, {"median_share_of_steps": {"at_most": TARGET_SHARE, "met": met}}


def compare_one(arguments: argparse.Namespace, folder: Path, seed: int, trainer: KeptWarm) -> dict[str, Any]:
    """Both sides of one seed. Values are log-ratios to the base's loss; regret is against the best value of either side.

    Regret is told with --full alone: where the Gaussian process stopped early, the two did not spend the same.
    """

    def side(sampler: str, *, prunes: bool) -> StudyPlan:
        made = small_study(arguments, folder / f"{sampler}_seed_{seed}", sampler, seed, arguments.steps)
        return replace(made, prunes=prunes)

    random = search(side("random", prunes=False), trainer, lambda points: len(points) >= arguments.trials)
    points = curve(random)
    target, budget = points[-1].best, points[-1].steps
    if target is None:
        sys.exit(f"Seed {seed}: all {len(random)} random trials diverged; there is nothing to reach.")

    def is_over(points: list[Point]) -> bool:
        reached = steps_to(points, target) is not None
        return bool(points) and (points[-1].steps >= budget or (reached and not arguments.full))

    found = search(side("gp", prunes=True), trainer, is_over)
    guided = curve(found)
    reached = steps_to(guided, target)
    if reached is not None and reached > budget:  # the last trial went beyond
        reached = None
    record = {
        "seed": seed,
        "random_best": target,
        "random_steps": budget,
        "gp_best": guided[-1].best,
        "gp_steps": guided[-1].steps,
        "gp_trials": len(guided),
        "gp_pruned": sum(PRUNED_AT in trial.user_attrs for trial in found),
        "gp_steps_to_random_best": reached,
        "share": None if reached is None else reached / budget,
    }
    if arguments.full:
        best = min(point.best for point in (points[-1], guided[-1]) if point.best is not None)
        record |= {"random_regret": regrets(points, budget, best), "gp_regret": regrets(guided, budget, best)}
    return record


def search(made: StudyPlan, trainer: KeptWarm, is_over: Callable[[list[Point]], bool]) -> list[FrozenTrial]:
    """Add trials to the study, one at a time, until `is_over` says so of its curve; its trials in their order."""
    study = open_study(made.name, made.storage, made.terms, lambda words: None)
    while not is_over(points := curve(study.get_trials(deepcopy=False))):
        result = Driver(replace(made, n_trials=len(points) + 1), lambda number: trainer).run()
        if result.interrupted:
            sys.exit("Interrupted. Run the same command again to go on.")
        if result.done <= len(points):
            sys.exit(f"{made.name}: no trial was added, see {made.output_dir}/optimization.log.")
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in DONE]


# Overhead: what the parent costs between two trainings.


@dataclass
class Timed:
    """A trainer with a clock: how long it waits for the parent, and what it needs itself."""

    trainer: TrainerProcess
    rows: list[dict[str, float]] = field(default_factory=list)
    _ended: float | None = None

    def run(self, job: Job, on_slot: Callable[[Slot], bool], **more: Any) -> Outcome:
        begun_by_parent = more.pop("on_begun")
        started = time.perf_counter()
        begun = answered = started
        answers = 0.0

        def on_begun(what: Begun) -> None:
            nonlocal begun
            begun = time.perf_counter()
            begun_by_parent(what)

        def timed(slot: Slot) -> bool:
            nonlocal answers, answered
            asked = time.perf_counter()
            goes_on = on_slot(slot)
            answered = time.perf_counter()
            answers += answered - asked
            return goes_on

        outcome = self.trainer.run(job, timed, on_begun=on_begun, **more)
        now = time.perf_counter()
        if self._ended is not None:
            waits = {"between": started - self._ended, "answers": answers}
            own = {"preparing": begun - started, "finishing": now - answered, "whole": now - self._ended}
            self.rows.append({"trial": job.trial, **waits, **own})
        self._ended = now
        return outcome

    def stop(self) -> None:
        self.trainer.stop()

    def close(self) -> None:
        self.trainer.close()


def measure_overhead(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of warm trials that the Gaussian process proposes; those before it has something to go by cost less."""
    with tempfile.TemporaryDirectory() as temporary:
        made = small_study(arguments, Path(temporary) / "study", "gp", 1, OVERHEAD_STEPS)
        timed = Timed(TrainerProcess({}, Path(temporary) / "trainers.log"))
        Driver(replace(made, n_trials=OVERHEAD_TRIALS), lambda number: timed).run()
    rows = [row for row in timed.rows if row["trial"] > GP_STARTUP + 1]
    parent = [row["between"] + row["answers"] for row in rows]
    measured = {
        "parent_seconds_per_trial": median(parent),
        "parent_seconds_per_trial_worst": max(parent),
        "parent_seconds_between_trials": median(row["between"] for row in rows),
        "parent_seconds_for_all_slots": median(row["answers"] for row in rows),
        "trainer_seconds_before_first_step": median(row["preparing"] for row in rows),
        "trainer_seconds_after_last_slot": median(row["finishing"] for row in rows),
        "whole_seconds_per_trial": median(row["whole"] for row in rows),
    }
    settings = {**settings_of(arguments, made, OVERHEAD_STEPS), "trials": OVERHEAD_TRIALS, "storage": "SQLite"}
    met = measured["parent_seconds_per_trial"] <= TARGET_OVERHEAD
    return settings, measured, {"parent_seconds_per_trial": {"at_most": TARGET_OVERHEAD, "met": met}}


# Workers: many parents on one database, with trainers that compute a value instead of training.


def share_databases() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    settings: dict[str, Any] = {"parents": PARENTS, "trials": SHARED_TRIALS, "sampler": "tpe", "trainings": "none"}
    measured: dict[str, Any] = {}
    with databases(settings) as urls:
        for name, url in urls.items():
            for figure, value in shared(url).items():
                measured[f"{name}_{figure}"] = value
    none = {f"{name}_{figure}" for name in urls for figure in ("lost", "doubled", "parents_failed")}
    return settings, measured, {name: {"at_most": 0, "met": measured[name] == 0} for name in sorted(none)}


@contextmanager
def databases(settings: dict[str, Any]) -> Iterator[dict[str, str]]:
    with ExitStack() as context:
        folder = context.enter_context(tempfile.TemporaryDirectory())
        urls = {"sqlite": f"sqlite:///{folder}/study.db"}
        try:
            urls["postgresql"] = context.enter_context(postgresql_server(durable=True)).url()
            settings["postgresql"] = "on this machine"
        except NoServer as reason:
            settings["postgresql"] = f"not measured: {reason}"
        yield urls


def shared(url: str) -> dict[str, float]:
    """One study by eight parents at once, on an empty database."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun = folder / "begun.txt"

        def ending(job: Job) -> str:
            with open(begun, "a") as file:
                file.write(f"{job.trial}\n")
            return "done"

        def work() -> None:
            made = plan(folder, SHARED_TRIALS, storage=url, sampler="tpe")
            Driver(made, lambda number: FakeTrainer(ending)).run()

        started = time.perf_counter()
        parents = [in_a_process(work) for _ in range(PARENTS)]
        failed = sum(os.waitpid(parent, 0)[1] != 0 for parent in parents)
        seconds = time.perf_counter() - started
        done = sum(trial.state in DONE for trial in ledger(folder, SHARED_TRIALS, url).trials())
        trained = Counter(begun.read_text().split())
    return {
        "trials_per_second": done / seconds,
        "lost": max(0, SHARED_TRIALS - done),
        "doubled": sum(count - 1 for count in trained.values()) + max(0, done - SHARED_TRIALS),
        "parents_failed": failed,
    }


if __name__ == "__main__":
    os.chdir(PROJECT_ROOT)
    main()
