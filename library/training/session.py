"""A training from its options to its files: what train_repa.py and train_network.py both do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from library.data.cached_samples import requests
from library.data.collect import TrainingData
from library.errors import UserError
from library.models.locate import BaseLocation
from library.options.parser import flatten
from library.options.run import RunOptions
from library.options.training import OutputOptions
from library.processes import Processes
from library.progress import doing
from library.training.caches import prepare_caches
from library.training.checkpoints import changes_since, is_early_end
from library.training.disk import cache_sizes, require_cache_space
from library.training.earlier import Outputs, finished_adapter, state_to_resume
from library.training.facts import base_facts, samples_digest
from library.training.inputs import check_start
from library.training.loop import Run, train
from library.training.metrics_file import METRICS
from library.training.output import RUN_PAGE, open_log, own_output
from library.training.pictures import collect_pictures, print_data
from library.training.plan import Plan, make_order, make_plan
from library.training.preflight import preflight
from library.training.run import build_run
from library.training.run_page import RunPage
from library.training.sample_images import Sampler
from library.training.schedules import check_schedule
from library.training.speed import prepare_environment, resolved_speed
from library.training.trained_pictures import all_were_read, marks_of
from library.words import plural


def run_training(options: RunOptions, context: ExitStack) -> None:
    """Train to the end, from where a state left off. context: closes what was opened, whatever happens.

    Raises UserError for what is wrong with options, machine or pictures before anything slow; Stopped, Diverged.
    """
    prepare_environment(options.speed)
    processes = Processes(options.model.device)
    options = replace(options, speed=resolved_speed(options.speed, processes.device, processes.say))
    base, family = check_start(options, processes)
    output = options.output
    state, facts = state_to_resume(options, processes.world_size)
    data = _collect(options, base, processes)
    samples = samples_digest(data)
    with processes.main_first():
        weights = base_facts(options, base, family)
    if state is not None:
        known = {"base_weights": weights} | ({"samples": samples} if all_were_read(state) else {})
        state = unless_changed(state, changes_since(state, marks_of(data), known), output)
    plan = make_plan(
        make_order(data, options, processes.rank, processes.world_size), options.training, options.optimizer
    )
    check_schedule(options.optimizer, plan)
    first = first_step(options, plan)
    state, ended = end_of(state, facts, plan, output)
    if is_done(options, processes, state if ended else None, facts, samples, weights):
        return
    require_cache_space(cache_sizes(options, family, data))
    prepared = prepare_caches(options, processes, base, family, data)
    context.callback(prepared.close)
    order = make_order(prepared.data, options, processes.rank, processes.world_size)  # unreadable pictures have gone
    plan = make_plan(order, options.training, options.optimizer)
    upper = "" if order.whole_steps else "up to "
    processes.say(
        f"{plural(order.samples_per_epoch, 'sample')}, {plural(plan.steps_per_epoch, 'step')} per epoch, "
        f"{plural(plan.last_step, 'step')}, {upper}batch "
        f"{plan.batch_size} x {plan.accumulation} accumulated x {plan.world_size} processes on {processes.device}"
    )
    goes_on = state is not None and "log_folder" in facts
    metrics = Path(facts["log_folder"]) if goes_on else options.metrics_folder(datetime.now())
    with doing("loading the models"):
        run, task = build_run(options, processes, prepared, order, plan, metrics, context, samples)
    if processes.is_main:
        context.enter_context(own_output(output.output_dir))
    if state is not None:
        state = unless_changed(state, run.checkpoints.changes(state), output)
    step = first if state is None else run.checkpoints.resume(state)
    if ended:
        run.checkpoints.save(step, finished=True)  # the adapter was lost after the last state
        return
    if step:
        processes.say(f"resuming from {state} at step {step}" if state else f"beginning with step {step}")
    with doing("preflight"):
        references = preflight(run, task, next(requests(order, step)), processes.say)
    if processes.is_main:
        run.log = open_log(output.output_dir, metrics, flatten(options), step, references)
    if options.samples.sample_prompts is not None:
        run.look = sampler = Sampler(options, prepared, run, task, step, resumed=state is not None)
        run.guesses["samples"] = sampler.guess(run.guesses["step"])
    with RunPage.of(run, task, prepared.data, flatten(options), step) as run.page:
        train(run, step)
    if processes.is_main:
        finish(run, "adapter")


def end_of(state: Path | None, facts: Mapping[str, Any], plan: Plan, output: OutputOptions) -> tuple[Path | None, bool]:
    """The state, unless it is an end that is to be overwritten, and whether the run had ended with it."""
    ended = state is not None and (facts["step"] >= plan.last_step or is_early_end(facts, plan))
    return (None, False) if ended and output.overwrite else (state, ended)


def is_done(
    options: Outputs,
    processes: Processes,
    end: Path | None,
    facts: Mapping[str, Any],
    samples: str,
    weights: Mapping[str, Any],
) -> bool:
    """Whether nothing is left to do, which is said then. end: the state of the run's last step, where there is one."""
    output = options.output
    step = facts.get("step")
    if end is None or not (output.output_dir / f"{output.output_name}.safetensors").exists():
        finished = finished_adapter(options, samples, weights)
        if finished is None:
            return False
        end, step = finished.path, finished.step
    processes.say(f"{end} is the end of this run (step {step}). Nothing is left to do. --overwrite trains it anew.")
    return True


def unless_changed(state: Path, changes: list[str], output: OutputOptions) -> Path | None:
    """The state; where something changed, as the options say all the same or None to begin anew. Raises UserError otherwise."""
    if not changes or output.allow_changed_options:
        return state
    if output.overwrite and output.resume == "auto":
        return None
    raise UserError(
        f"{state} cannot be continued exactly: {'; '.join(changes)} since it was saved. Restore what was there, start anew in "
        "another --output_dir or with --overwrite, or continue all the same with --allow_changed_options."
    )


def _collect(options: RunOptions, base: BaseLocation, processes: Processes) -> TrainingData:
    """The pictures, in buckets, with a table of them and of what was left out."""
    with processes.main_first():
        data = collect_pictures(options, base, processes.world_size)
    if processes.is_main:
        print_data(data)
    return data


def first_step(options: RunOptions, plan: Plan) -> int:
    """The step that a run without a state begins with. Raises UserError where none is left then."""
    training = options.training
    step = training.initial_step or 0
    if training.initial_epoch is not None:
        step = (training.initial_epoch - 1) * plan.steps_per_epoch
    if step >= plan.last_step:
        name, value = ("initial_step", step) if training.initial_step else ("initial_epoch", training.initial_epoch)
        raise UserError(f"{name} {value} leaves nothing to train: the run has {plan.last_step} steps.")
    return step


def finish(run: Run, what: str) -> None:
    """Say what there is. what: the word for the file that was trained, in at most 12 letters."""
    output = run.output
    if run.log is not None:
        run.log.close()
    print(f"{what:12} {output.output_dir / output.output_name}.safetensors")
    if run.trained.average is not None:
        print(f"  averaged   {output.output_dir / output.output_name}-ema.safetensors")
    if run.checkpoints.newest is not None:
        print(f"states       {output.output_dir}")
    print(f"page         {output.output_dir / RUN_PAGE}")
    print(f"metrics      {output.output_dir / METRICS}")
    print(f"             tensorboard --logdir {output.log_dir}")
