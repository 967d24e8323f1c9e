"""The training loop of every script: what it trains is a Task, how long a Plan, what it leaves a Checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch

from library.errors import Stopped
from library.options.training import OutputOptions
from library.processes import Processes
from library.progress import Activity, doing
from library.training.alignment_end import GradientCosine
from library.training.checkpoints import Checkpoints
from library.training.loop_interfaces import Batches, Look, Task, Watch, Watched
from library.training.loss_scaling import LossScaler
from library.training.optimizers import learning_rates, set_rates
from library.training.pace import Pace
from library.training.plan import Plan
from library.training.randomness import StepRandomness
from library.training.speed import explained_kernels
from library.training.state import Trained
from library.training.stop import NOTHING, SAMPLE, SAVE, STOP, Requests
from library.training.tracking import AnomalyWatch, Clock, MetricLog, MetricWindow, status_words
from library.words import wrapped


@dataclass
class Run:
    """All that the loop works with, built by a script.

    rates: learning rate of each group in a step.
    micro_batches: how many a step has, where not every step has as many as the plan says.
    look: called before each step and at the end.
    page: written after each validation, save and look, by the main process, which alone has one.
    after_step: called when the optimizer has stepped, before the average takes the weights; gives metrics on the device.
    validation_due: whether to validate after so many steps; default: every output.validate_every_n_steps.
    enough: asked after each validation, with its metrics, whether the run may end there as if this were its last step.
    watch: sees the metrics of every step. A step whose gradients are measured has "alignment" among its loss parts.
    graphs: the forward and backward pass of a micro-batch (batch, generator, step, share of the step), in place of the plain one.
    guesses: seconds of a "step", "validation", "save" and "samples", for the time left until one was measured.
    """

    task: Task
    plan: Plan
    trained: Trained
    batches: Callable[[int], Batches]
    rates: Callable[[int], list[float]]
    max_grad_norm: float
    seed: int
    output: OutputOptions
    processes: Processes
    checkpoints: Checkpoints
    validates: bool
    log: MetricLog | None = None
    after_step: Callable[[], dict[str, torch.Tensor]] | None = None
    micro_batches: Callable[[int], int] | None = None
    look: Look | None = None
    page: Watched | None = None
    validation_due: Callable[[int], bool] | None = None
    enough: Callable[[dict[str, float]], bool] | None = None
    graphs: Callable[[Any, torch.Generator, int, float], dict[str, torch.Tensor]] | None = None
    watch: Watch | None = None
    guesses: dict[str, float] = field(default_factory=dict)

    def validation_comes(self, step: int) -> bool:
        """Whether to validate after so many steps, the end apart."""
        due = self.validation_due or (lambda step: _due(step, self.output.validate_every_n_steps, finished=False))
        return self.validates and due(step)

    def pace(self, first_step: int) -> Pace:
        last = self.plan.last_step
        due: dict[str, Callable[[int], bool]] = {"save": lambda step: self.checkpoints.due(step, step == last)}
        if self.validates:
            due["validation"] = lambda step: step == last or self.validation_comes(step)
        if (look := self.look) is not None:
            due["samples"] = lambda step: look.due(step, step == last)
        return Pace(first_step, last, due, self.guesses)


def train(run: Run, first_step: int) -> dict[str, float]:
    """Train from `first_step` to the plan's last step, or until it is enough; return the last validation's metrics.

    Raises Stopped after saving when asked to stop, Diverged when a loss is not finite.
    """
    plan, output, processes = run.plan, run.output, run.processes
    requests, window, clock = Requests(output.output_dir), MetricWindow(), Clock()
    lookout, pace = _Lookout(processes, first_step), run.pace(first_step)
    batches = run.batches(first_step)
    randomness = StepRandomness(run.seed, processes.rank, processes.device)
    step, results = first_step, {}

    with requests.listening(), doing("step", plan.last_step, done=first_step) as activity:
        report = _Reporter(run, clock, batches, pace, activity)
        while True:
            # Report status: the only read from the device.
            finished = step >= plan.last_step
            pace.arrive(step)
            validating = step > first_step and (run.validates and finished or run.validation_comes(step))
            saving = run.checkpoints.due(step, finished) and step > first_step
            request = lookout(step, requests.look()) if lookout.due(step) or finished else NOTHING
            watching = run.watch is not None and run.watch.due(step)
            if window and (
                _due(step, output.log_every_n_steps, finished) or validating or saving or request or watching
            ):
                report(step, window)

            # Validate, save, draw, obey a stop: maintenance, timed apart.
            if validating:
                with pace.interruption("validation", "validating"):
                    results = _validate(run, step)
                finished = finished or (run.enough is not None and run.enough(results))
            if (saving or request in (SAVE, STOP) or finished) and step > first_step:
                with pace.interruption("save", "saving"):
                    run.checkpoints.save(step, finished=finished, asked=request in (SAVE, STOP))
            if request == SAMPLE:
                requests.done(SAMPLE)  # now, because its file lies where the folder of samples will
            if looking := _looks(run, step, request, finished):
                with pace.interruption("samples", "drawing samples"):
                    run.look(step, finished)  # type: ignore[misc]
            if request in (SAVE, STOP):
                requests.done(request)
            if run.page is not None and (validating or saving or looking or request or run.page.due(step)):
                run.page(step)
            clock.to_other()
            if finished:
                batches.close()
                return results
            if request == STOP:
                raise Stopped(
                    f"Stopped at step {step} of {plan.last_step} by {requests.reason}. Run the same command again to continue."
                )

            window.add(step, *take_step(run, batches, randomness, step))
            step += 1
            activity.advance()
            clock.to_train()


def _looks(run: Run, step: int, request: int, finished: bool) -> bool:
    """Whether it is time to look: by its own plan, or because somebody asks for samples."""
    if run.look is None:
        if request == SAMPLE:
            run.processes.say("warning: samples were asked for, and there are no prompts. Give --sample_prompts.")
        return False
    return request != STOP and (request == SAMPLE or run.look.due(step, finished))


def take_step(
    run: Run, batches: Batches, randomness: StepRandomness, step: int
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """One optimizer step; its metrics on the device, and its sample indices. Nothing in it waits for the device."""
    # Forward and backward, each micro-batch with its own randomness from (seed, rank, step).
    set_rates(run.trained.optimizer, run.rates(step))
    measuring = None if run.watch is None else run.watch.measures(step)
    metrics, indices = _accumulate(run, batches, randomness, step, measuring)

    # Clip, step, average.
    parameters = list(run.trained.parameters.values())
    run.processes.average_gradients(parameters)
    if measuring is not None:
        measuring.finish()
    metrics |= _step(run, parameters)
    if run.after_step is not None:
        metrics |= run.after_step()
    if run.trained.average is not None:
        run.trained.average.update()
    return metrics, indices


def _accumulate(
    run: Run, batches: Batches, randomness: StepRandomness, step: int, measuring: GradientCosine | None
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Accumulate the gradients of one optimizer step; return mean loss parts over its micro-batches, and their sample indices."""
    totals: dict[str, torch.Tensor] = {}
    indices = []
    count = run.plan.accumulation if run.micro_batches is None else run.micro_batches(step)
    for micro in range(count):
        batch = next(batches)
        share = 1.0 / count if batch.share is None else batch.share
        generator = randomness.at(step, micro)
        with explained_kernels(run.processes.device):
            if run.graphs is None or measuring is not None:
                parts = run.task.losses(batch, generator, step)
                if measuring is not None:
                    measuring.add(parts["alignment"], share, run.trained.scaler)
                backward(parts, share, run.trained.scaler)
            else:
                parts = run.graphs(batch, generator, step, share)
        for name, value in parts.items():
            totals[name] = totals[name] + value.detach() * share if name in totals else value.detach() * share
        indices.append(batch.indices)
    return totals, np.concatenate(indices)


def backward(parts: dict[str, torch.Tensor], share: float | torch.Tensor, scaler: LossScaler | None) -> None:
    """Add the gradients of a micro-batch's loss to the parameters'. share: of the step's loss that it is."""
    loss = parts["loss"] * share
    (loss if scaler is None else scaler.scale(loss)).backward()


def _step(run: Run, parameters: list[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Clip the gradients, step, drop them; the gradient norm, and what the loss scaler has to say."""
    optimizer, scaler = run.trained.optimizer, run.trained.scaler
    if scaler is None:
        metrics = _clip(run, parameters)
        optimizer.step()
    else:
        scaler.unscale(optimizer)
        metrics = scaler.step(optimizer, _clip(run, parameters))
    optimizer.zero_grad(set_to_none=True)
    return metrics


def _clip(run: Run, parameters: list[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Clip what is clipped together, and each group that has a norm of its own; the norms before."""
    apart = [group for group in run.task.groups if group.max_grad_norm is not None]
    own = {id(parameter) for group in apart for parameter in group.parameters}
    norms = {"grad_norm": clip_gradients([p for p in parameters if id(p) not in own], run.max_grad_norm)}
    for group in apart:
        norms[f"grad_norm/{group.name}"] = clip_gradients(group.parameters, group.max_grad_norm or 0.0)
    return norms


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients down to a global norm of `max_norm` (0: leave them); the norm before, on the device; 0 without gradients.

    torch's clip_grad_norm_ to the bit, which on some devices takes the gradients one by one.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return parameters[0].new_zeros((), dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _due(step: int, every: int | None, finished: bool) -> bool:
    return finished or (every is not None and step % every == 0)


def _validate(run: Run, step: int) -> dict[str, float]:
    with run.trained.judged():
        results = run.task.validate(step)
    if run.log is not None:
        run.log.add(step, results)
    parts = "  ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in results.items())
    run.processes.say(wrapped(f"validation at step {step}: {parts}"))
    return results


class _Lookout:
    """When several processes look together for requests: about every five seconds, counted in steps so that all agree."""

    SECONDS = 5.0

    def __init__(self, processes: Processes, first_step: int) -> None:
        self.processes = processes
        self.next = first_step
        self.looked, self.at = time.perf_counter(), first_step

    def due(self, step: int) -> bool:
        return self.processes.world_size == 1 or step >= self.next

    def __call__(self, step: int, request: int) -> int:
        """The strongest request made to any process."""
        now = time.perf_counter()
        per_step = (now - self.looked) / max(step - self.at, 1)
        strongest, slowest = self.processes.agree(request, per_step)
        # Before the first step there is nothing to go by.
        self.next = step + (1 if step == self.at else max(1, int(self.SECONDS / max(slowest, 1e-6))))
        self.looked, self.at = now, step
        return int(strongest)


class _Reporter:
    """Turns a window of device metrics into a status line, metric rows, warnings, or the end of a diverged run."""

    def __init__(self, run: Run, clock: Clock, batches: Batches, pace: Pace, activity: Activity) -> None:
        self.run, self.clock, self.batches, self.pace, self.activity = run, clock, batches, pace, activity
        self.newest: dict[str, float] = {}
        activity.words = self._words
        self.anomalies = AnomalyWatch(run.output.output_dir / "anomalies.jsonl")
        self.last_time = time.perf_counter()
        self.last_other = 0.0
        self.last_waited = 0.0

    def __call__(self, step: int, window: MetricWindow) -> None:
        run = self.run
        names, steps, on_device, samples = window.read()
        shared = run.processes.mean(on_device).cpu().numpy().astype(float)
        # The wait for the device that the read above brought was training.
        self.clock.to_train()
        watched: dict[str, float] = {}
        for at, row, indices in zip(steps, shared, samples, strict=True):
            values = dict(zip(names, row.tolist(), strict=True))
            # Every process sees the same means, so all of them come here together or none does.
            if AnomalyWatch.is_not_finite(values) or self.anomalies.is_anomalous(values):
                ids = run.processes.gather(run.task.sample_ids(indices))
                AnomalyWatch.refuse_non_finite(at, values, ids, run.checkpoints.newest)
                if run.processes.is_main:
                    run.processes.say(self.anomalies.record(at, values, ids))
            self.anomalies.remember(values)
            if run.watch is not None:
                watched |= run.watch.see(at, values)
        means = dict(zip(names, shared.mean(axis=0).tolist(), strict=True))
        self.newest = self._row(means, len(set(steps))) | watched
        if run.log is not None:
            run.log.add(step, self.newest)
        if not self.activity.live:
            run.processes.say(self.activity.line())

    def _words(self, width: int) -> str:
        """What stands behind "step 12/400": all from the host, and the losses as last read."""
        plan, step = self.run.plan, self.activity.done
        epoch = f"epoch {min(step // plan.steps_per_epoch, ceil(plan.epochs) - 1) + 1}/{ceil(plan.epochs)}"
        return status_words(epoch, self.newest, self.pace.left(step), width)

    def _row(self, means: dict[str, float], steps: int) -> dict[str, float]:
        run = self.run
        now = time.perf_counter()
        other = self.clock.other - self.last_other
        seconds = max(now - self.last_time - other, 1e-9)
        waited = self.batches.waited - self.last_waited
        self.last_time, self.last_other, self.last_waited = now, self.clock.other, self.batches.waited
        per_step = seconds / max(steps, 1)
        self.pace.stepped(seconds, steps)
        own = ("lambda", "align/")
        row = {name if name.startswith(own) else f"train/{name}": value for name, value in means.items()}
        row |= learning_rates(run.trained.optimizer)
        row["time/step_ms"] = 1000 * per_step
        row["time/samples_per_second"] = run.plan.samples_per_step / per_step
        row["time/data_wait_share"] = waited / seconds
        row["time/train_s"], row["time/other_s"] = self.clock.train, self.clock.other
        device = run.processes.device
        if device.type == "cuda":
            row["memory/peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            row["memory/total_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
        return row
