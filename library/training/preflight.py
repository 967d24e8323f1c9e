"""Before the long run: one batch, one validation batch and one save, timed, and the numbers to judge the rest by."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import numpy as np
import torch

from library.data.batches import Batch
from library.diffusion import alignment as losses
from library.training.checkpoints import Checkpoints
from library.training.loop import Run
from library.training.randomness import StepRandomness, sample_noise, stratified_timesteps
from library.training.repa import RepaTask
from library.training.speed import explained_kernels
from library.training.state import save_state
from networks.features import tap_channels
from networks.lora import lora_disabled

# Enough samples that the frozen base's loss is known to a few per cent.
REFERENCE_SAMPLES = 256


def preflight(run: Run, task: RepaTask, say: Callable[..., None]) -> dict[str, float]:
    """Try every part of the run once, leaving no trace in it; return and print the reference values."""
    seconds = {"training batch": _time(run, lambda: _try_batch(run, task))}
    if task.validation is not None:
        seconds["validation batch"] = _time(run, lambda: _try_validation(task))
    if run.processes.is_main:
        seconds["save"] = _time(run, lambda: _try_save(run.checkpoints))
    say("preflight: " + ", ".join(f"{what} {taken:.2f} s" for what, taken in seconds.items()))
    facts = reference_values(task)
    say(
        f"frozen base's loss {facts['reference/frozen_base_loss']:.4f}, zero predictor's "
        f"{facts['reference/zero_predictor_loss']:.4f}, standard deviation of latents {facts['reference/latent_std']:.3f} "
        f"(over {int(facts['reference/samples'])} training samples)"
    )
    if "reference/constant_token_loss" in facts:
        ceilings = ", ".join(
            f"{name.rpartition('_')[2]} {value:.3f}"
            for name, value in facts.items()
            if name.startswith("reference/grid_ceiling")
        )
        say(
            f"token loss of the best constant {facts['reference/constant_token_loss']:.4f}, of the best per position "
            f"{facts['reference/positional_token_loss']:.4f}; grid ceiling of the token cosine: {ceilings}"
        )
    return facts


def _time(run: Run, action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    if run.processes.device.type == "cuda":
        torch.cuda.synchronize(run.processes.device)
    return time.perf_counter() - start


def _first(task: RepaTask, count: int) -> Batch:
    samples = task.training
    indices = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)
    return samples.read(np.unique(indices)).to(task.processes.device)


def _try_batch(run: Run, task: RepaTask) -> None:
    randomness = StepRandomness(run.seed, run.processes.rank, run.processes.device)
    # The warmed-up lambda, so that the heads' memory is needed now and not thousands of steps later.
    warm = 0 if task.alignment is None else task.alignment.warm_step
    with explained_kernels(run.processes.device):
        parts = task.losses(_first(task, task.batch_size), randomness.at(0), warm)
        parts["loss"].backward()
    run.trained.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _try_validation(task: RepaTask) -> None:
    assert task.validation is not None
    batch = task.validation.read(np.arange(min(task.batch_size, len(task.validation)))).to(task.processes.device)
    task.unet.eval()
    _frozen_terms(task, batch, task.validation.sample_ids)
    task.unet.train()


def _frozen_terms(task: RepaTask, batch: Batch, ids: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Diffusion loss of each sample and mean square of each target, [B] both."""
    device, known = batch.latents.device, task.objective.parametrisation.timesteps
    noise = sample_noise(task.seed, [ids[i] for i in batch.indices], tuple(batch.latents.shape[1:])).to(device)
    timesteps = stratified_timesteps(len(batch.indices), known).to(device)
    generator = torch.Generator(device).manual_seed(0)
    terms = task.terms(batch, noise, timesteps, batch.text_rows, generator, with_gradient=False)
    zero = task.objective.target(batch.latents.float(), noise, timesteps).square().mean(dim=(1, 2, 3))
    weights = task.objective.weights(timesteps)
    return terms.diffusion, zero if weights is None else zero * weights


def _try_save(checkpoints: Checkpoints) -> None:
    folder = checkpoints.output.output_dir / ".preflight"
    try:
        save_state(folder, checkpoints.trained, checkpoints.describe(0))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def reference_values(task: RepaTask) -> dict[str, float]:
    """Losses of the frozen base and of predictors that know nothing, over up to 256 training samples."""
    everything = _first(task, REFERENCE_SAMPLES)
    count = len(everything.indices)
    task.unet.eval()
    with lora_disabled(task.unet):
        parts = [
            _frozen_terms(task, task.training.read(everything.indices[i : i + task.batch_size]).to(task.processes.device),
                          task.training.sample_ids)
            for i in range(0, count, task.batch_size)
        ]  # fmt: skip
    task.unet.train()
    own, zero = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    facts = {
        "reference/samples": float(count),
        "reference/frozen_base_loss": own.mean().item(),
        "reference/zero_predictor_loss": zero.mean().item(),
        "reference/latent_std": everything.latents.float().std().item(),
    }
    if task.alignment is not None:
        target = everything.target_tokens()
        constant, positional = losses.constant_baselines(target)
        facts["reference/constant_token_loss"] = constant.item()
        facts["reference/positional_token_loss"] = positional.item()
        side = everything.latents.shape[-1]
        for tap, shape in tap_channels(task.unet_config, list(task.alignment.heads)).items():
            facts[f"reference/grid_ceiling_{tap}"] = losses.grid_ceiling(target, side // shape.stride).item()
    return facts
