"""Runs a study: its workers ask for trials, have them trained and store the results, until the budget is spent."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import RunFailed, UserError
from library.files import write_json
from library.options.search import CONFIRMING
from library.progress import doing
from library.search.constraints import constraints_measured
from library.search.half_batch import halving_in_words, with_half_batch
from library.search.messages import Begun, Job, Outcome
from library.search.messages import Progress as JobProgress
from library.search.results.best_trial import write_best
from library.search.results.dashboard import attach_pictures
from library.search.results.kept_adapters import keep_best_adapters
from library.search.results.running_report import RunningReport
from library.search.results.status import StudyView, now_lines
from library.search.run.console import Console
from library.search.run.failures import FailuresInARow, ending_words
from library.search.run.interrupts import Interrupts
from library.search.run.plan import Result, StudyPlan, Trainer
from library.search.study.convergence import announce, has_converged
from library.search.study.leases import Heartbeat
from library.search.study.ledger import RETRY_OF, Ledger
from library.search.study.presence import Presence
from library.search.study.progress import StudyLog, change_budget, progress, set_budget
from library.search.study.proposals import choose_sampler
from library.search.study.running import OF_TRIAL, Running
from library.search.study.storage import is_storage_failure, storage_failed
from library.search.study.study import open_study, require_own_folder
from library.search.study.trial_values import counts
from library.search.study.verdict import (
    PICKED,
    Verdict,
    enqueue_baselines,
    enqueue_confirmations,
    enqueue_initial,
    judge,
    most_confirmations,
    top,
)
from library.search.trial_files import DETAILS_FILE, PARAMS_FILE, trial_folder
from library.words import plural

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FAILURES_IN_A_ROW = 3
STATUS_EVERY = 30.0
SHOWN_HERE = 3
"""So many of the best trials are shown while the study runs."""


class Driver:
    """Runs the study of a plan.

    make_trainer: called with a worker's number, from 0, when it has its first job, and again after a failure.
    """

    def __init__(self, plan: StudyPlan, make_trainer: Callable[[int], Trainer]) -> None:
        self.plan = plan
        self.make_trainer = make_trainer
        plan.output_dir.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        self.say = StudyLog(plan.output_dir, self.console.print, quiet=plan.quiet)
        self.interrupts = Interrupts(self.say, self._halt, self._tell_presence)
        self._presences: list[Presence] = []
        self._study: optuna.Study | None = None
        self._trainers: dict[int, Trainer] = {}
        self._fatal: BaseException | None = None
        self._failures = FailuresInARow()
        self._report_page = RunningReport(plan.output_dir, self.say)
        self._more = most_confirmations(plan.n_trials, plan.confirm, plan.new_seeds)
        self._writing = threading.Lock()
        """Held by the worker that writes the study's files after a trial."""
        self._aborted = threading.Event()
        """Set after a fatal error: no worker starts another trial."""

    def run(self) -> Result:
        """Run the study to its end, or until it is interrupted. To resume, run it again.

        Raises UserError: the study has other terms, or the script refuses the configuration. RunFailed: the storage failed, or
        several trainings in a row.
        """
        plan = self.plan
        try:
            ledger = self._open(plan.name)
            self._study = ledger.study
            with self.interrupts.listening(), self._present(ledger):
                set_budget(ledger.study, plan.n_trials, plan.workers, self._more, plan.command)
                enqueue_baselines(ledger)
                enqueue_initial(ledger, plan.initial)
                self._work(ledger)
                confirmed = self._confirm(ledger)
            return self._conclude(ledger, confirmed)
        except Exception as error:
            if isinstance(error, UserError) or not is_storage_failure(error):
                raise
            raise storage_failed(plan.storage, error) from error

    # The study.

    @contextmanager
    def _present(self, ledger: Ledger) -> Iterator[None]:
        """While the context lasts, the study knows that this process works on it."""
        presence = Presence(ledger.study, ledger.holder)
        self._presences.append(presence)
        try:
            yield
        finally:
            self._presences.remove(presence)
            presence.leave()

    def _tell_presence(self) -> None:
        for presence in tuple(self._presences):
            presence.stopping()

    def _open(self, name: str, *, confirming: bool = False) -> Ledger:
        plan = self.plan
        study = open_study(name, plan.storage, plan.terms, self.say)
        if not confirming:
            require_own_folder(plan.output_dir, name, has_trials=bool(study.get_trials(deepcopy=False)))
        sampler, why = choose_sampler(plan.sampler, plan.workers, plan.n_trials)
        if not confirming:
            trials = plural(plan.n_trials, "trial")
            self.say(f"study {name}: {trials}, sampler {sampler} ({why}), space {plan.terms.space.hash}")
        return Ledger(
            study,
            plan.terms.space,
            n_trials=10**6 if confirming else plan.n_trials,
            sampler=sampler,
            seed=plan.terms.seed,
            folder=lambda number: trial_folder(plan.output_dir, number, confirms=confirming),
            prunes=plan.prunes and not confirming,
            creates=not confirming,
            stale_after=plan.stale_after,
            say=self.say,
            constraints=constraints_measured(plan.terms),
        )

    def _confirm(self, ledger: Ledger) -> list[FrozenTrial]:
        """Train the best again with new seeds, together with all other parents; returns these trials."""
        plan = self.plan
        if plan.confirm == 0 or self.interrupts.is_asked:
            return []
        confirming = self._open(f"{plan.name}{CONFIRMING}", confirming=True)
        count = enqueue_confirmations(confirming, top(ledger.trials(), plan.confirm), plan.new_seeds)
        seeds, trainings = plural(plan.new_seeds, "new seed"), plural(count, "training")
        self.say(f"the best are trained again with {seeds} each: {trainings}")
        self._more = 0
        change_budget(ledger.study, plan.n_trials, more=0)  # from now on they are counted as trials
        with self._present(confirming):
            self._work(confirming)
        return confirming.trials()

    def _conclude(self, ledger: Ledger, confirmed: list[FrozenTrial]) -> Result:
        trials = ledger.trials()
        verdict = self._record(ledger, confirmed)
        if not self.interrupts.is_asked:
            change_budget(ledger.study, self.plan.n_trials, more=0, ended=True)
        self.say(verdict.words)
        done = progress(trials, ledger.n_trials).done
        return Result(verdict, done, self.interrupts.is_asked)

    def _record(self, ledger: Ledger, confirmed: list[FrozenTrial]) -> Verdict:
        plan, trials = self.plan, ledger.trials()
        verdict = judge(trials, confirmed, ledger.study.user_attrs.get(PICKED))
        if plan.facts is not None:
            write_best(plan.output_dir, plan.name, plan.terms, plan.facts, verdict, trials)
        # Any of those that are trained again may still win.
        is_final = plan.confirm == 0 or bool(confirmed and not self.interrupts.is_asked)
        keep = plan.keep if is_final else max(plan.keep, plan.confirm)
        keep_best_adapters(plan.output_dir, trials, verdict, keep, confirmed, is_final=is_final)
        return verdict

    # Workers.

    def _work(self, ledger: Ledger) -> None:
        """Run all workers until no trial is left."""
        self._failures = FailuresInARow()
        heartbeat = Heartbeat(ledger.renew, self.plan.renew_after)
        threads = [
            threading.Thread(
                target=self._worker, args=(ledger, heartbeat, number), name=f"worker {number}", daemon=True
            )
            for number in range(self.plan.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            with doing(""):  # the console says how it stands
                self._watch(ledger, threads)
        finally:
            self.console.close()
            heartbeat.close()
        if self._fatal is not None:
            raise self._fatal

    def _watch(self, ledger: Ledger, threads: list[threading.Thread]) -> None:
        """Show how the study stands until the workers have ended."""
        shown = logged = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2 / len(threads))
            now = time.monotonic()
            if now - shown >= self.console.every and not self._aborted.is_set():
                shown = now
                self._show(ledger)
            if now - logged >= STATUS_EVERY and not self._aborted.is_set():
                logged = now
                self.say.keep(self._line(ledger))
                for presence in tuple(self._presences):
                    presence.tell()

    def _worker(self, ledger: Ledger, heartbeat: Heartbeat, number: int) -> None:
        try:
            while not (self.interrupts.is_asked or self._aborted.is_set()):
                converged = self._stops_here(ledger)
                running = None if converged else ledger.ask(number)
                if running is None:
                    if ledger.is_done() or (converged and not ledger.is_training()):
                        return
                    self._aborted.wait(self.plan.poll)
                    continue
                heartbeat.add(running.trial._trial_id)
                try:
                    outcome = self._train(ledger, running, number)
                finally:
                    heartbeat.remove(running.trial._trial_id)
                self._settle(ledger, running, outcome)
        except BaseException as error:
            self._end(error)
        finally:
            self._replace(number)

    def _stops_here(self, ledger: Ledger) -> bool:
        """Whether to start no trial because the study has converged. A running trial may be better, and then it goes on."""
        return self.plan.stop_on_convergence and ledger.creates and has_converged(ledger)

    def _train(self, ledger: Ledger, running: Running, number: int) -> Outcome:
        """Train one trial, again with half the batch where it does not fit. Any error becomes an Outcome."""
        folder = ledger.folder(running.number)
        try:
            options = self._write_job(ledger, running, folder)
            outcome = self._run(ledger, running, number, options)
            smaller = with_half_batch(options, self.plan.terms.script, folder) if outcome.ending == "memory" else None
            if smaller is not None and not self.interrupts.is_asked:
                words = halving_in_words(options, self.plan.terms.script)
                self.say(f"{_called(running)}: out of memory; trained again with {words}")
                ledger.study._storage.set_trial_user_attr(running.trial._trial_id, "half_batch", True)
                outcome = self._run(ledger, running, number, smaller)
            return outcome
        except RunFailed as error:
            return Outcome(running.number, "failed", str(error))
        except UserError as error:
            return Outcome(running.number, "refused", str(error))
        except Exception as error:
            if is_storage_failure(error) and not isinstance(error, OSError):
                raise
            self.say.keep(traceback.format_exc())
            self._replace(number)
            return Outcome(running.number, "failed", f"{type(error).__name__}: {str(error).rstrip('.')}.")

    def _write_job(self, ledger: Ledger, running: Running, folder: Path) -> dict[str, Any]:
        """Write params.json and trial.json into the trial's folder; returns the script's options."""
        terms = self.plan.terms
        options = terms.space.resolve(running.params, terms.options)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PARAMS_FILE, terms.space.searched(running.params, terms.options))
        details = {"trial": running.number, "study": self.plan.name, "script": terms.script, "seed": running.seed}
        details |= {name: running.attrs[name] for name in (RETRY_OF, OF_TRIAL) if name in running.attrs}
        write_json(folder / DETAILS_FILE, {**details, "suggested": running.params, "options": options})
        return options

    def _run(self, ledger: Ledger, running: Running, number: int, options: dict[str, Any]) -> Outcome:
        trainer = self._trainers.get(number)
        if trainer is None:
            trainer = self._trainers[number] = self.make_trainer(number)
        terms = self.plan.terms
        folder = ledger.folder(running.number).resolve()
        judging = dict(terms.judging)
        job = Job(running.number, str(folder), terms.script, terms.objective, options, running.seed, judging)

        def on_begun(begun: Begun) -> None:
            ledger.begin_steps(running, begun.steps)

        def on_progress(now: JobProgress) -> None:
            running.reached(now.step, now.images_per_second)

        def on_tick() -> None:
            if running.lost:
                trainer.stop()

        outcome = trainer.run(
            job,
            lambda slot: ledger.report(running, slot) and not self.interrupts.is_now,
            on_begun=on_begun,
            on_progress=on_progress,
            on_tick=on_tick,
        )
        pruned = running.prune_at is not None and outcome.ending == "stopped"
        if outcome.ending != "done" and not pruned:
            self._replace(number)
        asked = pruned or running.lost or self.interrupts.is_now or self._aborted.is_set()
        if outcome.ending == "stopped" and not asked:
            return Outcome(running.number, "failed", f"Its trainer was stopped from outside. {outcome.message}".strip())
        return outcome

    def _settle(self, ledger: Ledger, running: Running, outcome: Outcome) -> None:
        attach_pictures(running, outcome, ledger.folder(running.number), self.plan.output_dir, self.say)
        trial = ledger.settle(running, outcome)
        if trial is None:
            self.say(
                f"trial {running.number}: its lease was lost and another process trains it; the result here is not used"
            )
            return
        self.say(f"{_called(running)}: {ending_words(trial, outcome)}")
        if outcome.ending == "refused":
            self._end(UserError(f"Trial {running.number} cannot be trained, nor can any other: {outcome.message}"))
        with self._writing:
            self._failures.add(running.number, outcome, running.attrs.get(RETRY_OF))
            if self._failures.count >= FAILURES_IN_A_ROW:
                logs = f"{ledger.folder(running.number)}/logs and {self.plan.output_dir}/optimization.log"
                self._end(RunFailed(f"{self._failures.words()} See {logs}. Run the same command again to continue."))
            if ledger.creates:
                self._report(ledger)
            self._report_page(lambda: StudyView(self.plan.name, self.plan.storage, self._study))

    def _report(self, ledger: Ledger) -> None:
        """After each trial: alerts, best_params.json, the progress."""
        for alert in announce(ledger, self.plan.output_dir):
            self.say(f"{alert.level}: {alert.words}")
        self._record(ledger, [])
        line = self._line(ledger)
        self.say.keep(line) if self.console.is_live else self.say(line)

    def _show(self, ledger: Ledger) -> None:
        """How the study stands: on a terminal what `status` shows, elsewhere its first lines."""
        if self.plan.quiet:
            return
        if not self.console.is_live and self._writing.locked():
            return  # a trial has just ended, and is about to be reported
        try:
            view = StudyView(self.plan.name, self.plan.storage, self._study, ledger.fresh_leases())
            lines = now_lines(view, time.time(), SHOWN_HERE)
        except Exception as error:
            if is_storage_failure(error):  # which is for those who store trials to tell
                return
            raise
        if self.console.is_live:
            self.console.show(lines)
            return
        first = takewhile(lambda line: line.startswith(("progress", "confirming", "running", " ")), lines)
        for line in first:
            self.console.print(line)

    def _line(self, ledger: Ledger) -> str:
        fresh = ledger.fresh_leases()
        rate = sum(lease["images_per_second"] for lease in fresh.values())
        trials = ledger.trials()
        total = ledger.n_trials if ledger.creates else sum(map(counts, trials))
        return progress(trials, total, self.plan.workers, self._more, fresh=fresh).line(rate)

    # The end.

    def _end(self, error: BaseException) -> None:
        """Stop running trials and start no other; `run` raises the first such error."""
        self._fatal = self._fatal or error
        self._aborted.set()
        self._halt()

    def _halt(self) -> None:
        for trainer in tuple(self._trainers.values()):
            trainer.stop()

    def _replace(self, number: int) -> None:
        trainer = self._trainers.pop(number, None)
        if trainer is not None:
            trainer.close()


def _called(running: Running) -> str:
    """What a training is called in messages."""
    confirmed = running.attrs.get(OF_TRIAL)
    return f"trial {running.number}" if confirmed is None else f"trial {confirmed} with seed {running.seed}"
