"""Before the long run: one batch, one validation batch and one save, timed, and reference values for the losses to come.

What the first step is going to try anyway is left to it: a batch as large as any.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from library.data.cached_samples import Batch, CachedSamples, Request, requests_in_order
from library.diffusion import alignment_losses as losses
from library.diffusion.loss import masked_mean
from library.diffusion.noise import Draw
from library.files import beside
from library.training.checkpoints import Checkpoints
from library.training.loop import Run
from library.training.randomness import StepRandomness, stratified_places
from library.training.speed import explained_kernels
from library.training.state import save_state
from library.training.task import LoraTask
from library.words import plural, wrapped
from networks.taps import tap_channels

REFERENCE_SAMPLES = 256
"""Enough that the frozen base's loss is known to a few per cent."""


def preflight(run: Run, task: LoraTask, first: Request, say: Callable[..., None]) -> dict[str, float]:
    """Try every part of the run once, leaving no trace in it; print and return the reference values.

    first: the batch that the run begins with.
    """
    largest = _largest(task.training, run.processes.world_size)
    seconds = {}
    if not _comes_at_once(run, task, first, largest):
        seconds["training batch"] = _time(run, lambda: _try_batch(run, task, largest))
        run.guesses["step"] = seconds["training batch"] * run.plan.accumulation
    if task.validation:
        seconds["validation batch"] = _time(run, lambda: _try_validation(task))
    if run.processes.is_main:
        seconds["save"] = _time(run, lambda: try_save(run.checkpoints))
    run.guesses["save"] = seconds.get("save", 0.0)
    if task.validation:
        batches = sum(math.ceil(len(samples) / run.plan.batch_size) for samples in task.validation.values())
        run.guesses["validation"] = seconds["validation batch"] * min(batches, task.validation_batches or batches)
    if seconds:
        say("preflight: " + ", ".join(f"{what} {taken:.2f} s" for what, taken in seconds.items()))
    # Without heads there are no token losses to compare, and 256 pictures would take minutes on a large base.
    chosen = _spread(task.training) if task.alignment is not None else [largest]
    started = time.perf_counter()
    facts = reference_values(task, chosen)
    if task.alignment is None:  # one batch forwards; through frozen weights, backwards takes about as long
        run.guesses.setdefault("step", 2 * (time.perf_counter() - started) * run.plan.accumulation)
    say(
        wrapped(
            f"frozen base's loss {facts['frozen_base_loss']:.4f}, zero predictor's {facts['zero_predictor_loss']:.4f}, standard "
            f"deviation of latents {facts['latent_std']:.3f} (over {plural(int(facts['samples']), 'training sample')})"
        )
    )
    if "constant_token_loss" in facts:
        ceilings = ", ".join(
            f"{name.removeprefix('grid_ceiling_')} {value:.3f}"
            for name, value in facts.items()
            if name.startswith("grid_ceiling")
        )
        say(
            wrapped(
                f"token loss of the heads as they are {facts['token_loss']:.4f}, of the best constant "
                f"{facts['constant_token_loss']:.4f}, of the best per position "
                f"{facts['positional_token_loss']:.4f}; grid ceiling of the token cosine: {ceilings}"
            )
        )
    return {f"reference/{name}": value for name, value in facts.items() if math.isfinite(value)}


def _time(run: Run, action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    if run.processes.device.type == "cuda":
        torch.cuda.synchronize(run.processes.device)
    return time.perf_counter() - start


def _largest(samples: CachedSamples, world_size: int) -> Request:
    """A batch of the most latents that a step will have at once, as if every process had one."""

    request = max(requests_in_order(samples), key=lambda request: _latents(samples, request))
    return request._replace(micro=replace(request.micro, together=request.micro.real * world_size, sharing=world_size))


def _latents(samples: CachedSamples, request: Request) -> int:
    """How large a batch is, in pixels of its pictures."""
    width, height = samples.images[request.micro.indices[0]].fitted.bucket
    return len(request.micro.indices) * width * height


def _comes_at_once(run: Run, task: LoraTask, first: Request, largest: Request) -> bool:
    """Whether the first step takes as much as any: a batch as large, and heads that learn already.

    Several processes try together, since their first batches may be of different buckets and the manifold loss joins all of them.
    """
    heads_rest = task.alignment is not None and task.alignment.coefficient(first.step) == 0
    as_large = _latents(task.training, first) >= _latents(task.training, largest)
    return as_large and not heads_rest and run.processes.world_size == 1


def _spread(samples: CachedSamples) -> list[Request]:
    """Batches of REFERENCE_SAMPLES pictures, spread evenly over the set."""
    places = np.linspace(0, len(samples) - 1, min(REFERENCE_SAMPLES, len(samples))).astype(int)
    return list(requests_in_order(samples, indices=np.unique(places).tolist()))


def _try_batch(run: Run, task: LoraTask, largest: Request) -> None:
    randomness = StepRandomness(run.seed, run.processes.rank, run.processes.device)
    # The warmed-up lambda, so that the heads' memory is needed now and not thousands of steps later.
    warm = 0 if task.alignment is None else task.alignment.warm_step
    batch = task.training.read(largest).to(run.processes.device)
    with explained_kernels(run.processes.device):
        task.losses(batch, randomness.at(0), warm)["loss"].backward()
    run.trained.optimizer.zero_grad(set_to_none=True)
    if task.bins is not None:
        task.bins.forget()


@torch.no_grad()
def _try_validation(task: LoraTask) -> None:
    samples = task.validation["loss"]
    with _evaluating(task):
        largest = _largest(samples, 1)
        _frozen_losses(task, samples, largest, 0, len(largest.micro.indices))


def try_save(checkpoints: Checkpoints) -> None:
    """Save a state to a folder that goes again, so that what cannot be written is known at once."""
    folder = beside(checkpoints.output.output_dir / "preflight", "tmp")
    try:
        save_state(folder, checkpoints.trained, checkpoints.describe(0))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _evaluating(task: LoraTask) -> Iterator[None]:
    for model in task.models.values():
        model.eval()
    try:
        yield
    finally:
        for model in task.models.values():
            model.train()


@torch.no_grad()
def reference_values(task: LoraTask, chosen: Sequence[Request]) -> dict[str, float]:
    """Losses of the frozen base and of predictors that know nothing, over the training pictures of these batches.

    Of runs with heads also their token loss on the base's features and those of the two best predictors that never look at a
    picture, and for each tap the highest token cosine that a map of its size can reach; of several teachers their means.
    """
    count = sum(len(request.micro.indices) for request in chosen)
    own, zero, sums, place = [], [], torch.zeros(3, dtype=torch.float64), 0
    tokens: dict[str, losses.TokenConstants] = {}
    ceilings: dict[str, float] = {}
    head_losses: list[float] = []
    with _evaluating(task), task.network.disabled():
        for request in chosen:
            batch, of_base, of_zero = _frozen_losses(task, task.training, request, place, count)
            own.append(of_base)
            zero.append(of_zero)
            latents = task.latents(batch)
            sums += torch.stack([latents.sum(), latents.square().sum(), latents.new_tensor(latents.numel())]).cpu()
            place += len(batch)
            if (alignment := task.alignment) is not None and "token" in alignment.weights:
                targets, grid = alignment.targets(batch, latents)
                for teacher, target in targets.items():
                    tokens.setdefault(teacher, losses.TokenConstants()).add(target, grid)
                # Without the manifold loss, so that no process waits for another.
                head_losses.append(alignment.token_loss(targets, grid).item() * len(batch) / count)
                for tap, shape in tap_channels(task.unet.config, list(alignment.heads)).items():  # type: ignore[arg-type]
                    side = tuple(-(-side // shape.stride) for side in latents.shape[-2:])
                    ceiling = alignment.over_teachers(
                        [losses.grid_ceiling(target, grid, (side[0], side[1])).item() for target in targets.values()]
                    )
                    ceilings[tap] = ceilings.get(tap, 0.0) + ceiling * len(batch) / count
    total, squares, number = sums.tolist()
    facts = {
        "samples": float(count),
        "frozen_base_loss": torch.cat(own).mean().item(),
        "zero_predictor_loss": torch.cat(zero).mean().item(),
        "latent_std": math.sqrt(max(squares / number - (total / number) ** 2, 0.0) * number / max(number - 1, 1)),
    }
    if head_losses and task.alignment is not None:
        facts["token_loss"] = sum(head_losses)
        constants = zip(*(one.losses() for one in tokens.values()), strict=True)
        facts["constant_token_loss"], facts["positional_token_loss"] = map(task.alignment.over_teachers, constants)
        facts |= {f"grid_ceiling_{tap}": value for tap, value in ceilings.items()}
    return facts


def _frozen_losses(
    task: LoraTask, samples: CachedSamples, request: Request, place: int, count: int
) -> tuple[Batch, Tensor, Tensor]:
    """A batch, and the diffusion loss of each of its pictures, [B], of the models as they are and of predicting zero.

    place: of its first picture among `count`, over which timesteps are evenly spread.
    """
    device, objective = task.processes.device, task.objective
    batch = samples.read(request).to(device)
    latents = task.latents(batch)
    noise = task.fixed_noise(batch, samples, latents)
    timesteps = objective.parametrisation.spread(stratified_places(count)[place : place + len(batch)]).to(device)
    own = task.each(batch, latents, Draw(noise, noise, timesteps))
    zero = masked_mean(
        objective.target(latents, noise, timesteps).square(), batch.mask, renormalize=objective.masked_loss_renormalize
    )
    weights = objective.weights(timesteps)
    return batch, own, zero if weights is None else zero * weights
