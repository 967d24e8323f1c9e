"""Before a long LoRA training: one batch of the largest shape and one save, and the frozen base's loss to judge by."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable

import torch

from library.diffusion.alignment import constant_baselines
from library.training.loop import Run
from library.training.network import NetworkTask, validation_requests
from library.training.randomness import StepRandomness
from library.training.speed import explained_kernels
from library.training.state import save_state


def preflight(run: Run, task: NetworkTask, say: Callable[..., None]) -> dict[str, float]:
    """Try every part of the run once, leaving no trace in it; the frozen base's loss on the largest batch."""
    started = time.perf_counter()
    batch = _largest(run, task)
    randomness = StepRandomness(run.seed, run.processes.rank, run.processes.device)
    # The warmed-up lambda, so that the heads' memory is needed now and not thousands of steps later.
    warm = 0 if task.alignment is None else task.alignment.warm_step
    with explained_kernels(run.processes.device):
        task.losses(batch, randomness.at(0), warm)["loss"].backward()
    run.trained.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), task.network.disabled():
        parts = task.losses(batch, randomness.at(0), warm)
        loss = parts["diffusion"].item()
    saved = time.perf_counter()
    if run.processes.is_main:
        folder = run.checkpoints.output.output_dir / ".preflight"
        try:
            save_state(folder, run.trained, run.checkpoints.describe(0))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    say(
        f"preflight: largest batch {saved - started:.2f} s, save {time.perf_counter() - saved:.2f} s; frozen base's loss on "
        f"that batch {loss:.4f}"
    )
    found = {"frozen_base_loss": loss}
    if task.alignment is not None:
        rows, columns = batch.token_grid
        constant, _ = constant_baselines(batch.target_tokens())
        found |= {"token_loss": parts["token"].item(), "constant_token_loss": constant.item()}
        say(
            f"{rows} x {columns} teacher tokens a picture there; token loss of the heads as they begin "
            f"{found['token_loss']:.4f}, of the best constant {found['constant_token_loss']:.4f}"
        )
    return {f"reference/{name}": value for name, value in found.items() if math.isfinite(value)}


def _largest(run: Run, task: NetworkTask):  # type: ignore[no-untyped-def]
    """A batch of the most latents that a step will have at once."""
    requests = list(validation_requests(task.training))
    images = task.training.images

    def size(request) -> int:  # type: ignore[no-untyped-def]
        width, height = images[request.micro.indices[0]].fitted.bucket
        return len(request.micro.indices) * width * height

    request = max(requests, key=size)
    batch = task.training.empty_batch(request, pin=False)
    task.training.fill(batch, slice(0, len(batch)))
    return batch.to(run.processes.device)
