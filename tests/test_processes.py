"""Several processes: the global manifold loss, training and resume under accelerate."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from library.diffusion import alignment_losses as losses
from tests.tools.network_runs import NetworkSetting, draw_pictures
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows

WORLD = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def global_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [8, 3, 5] of a linear head, its weight [5, 6], and targets [8, 3, 6]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((8, 3, 5), (5, 6), (8, 3, 6)))  # type: ignore[return-value]


def worker(rank: int, port: int, results: dict[int, tuple[float, torch.Tensor]]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    from library.processes import Processes

    processes = Processes("cpu")
    inputs, weight, target = global_batch()
    weight = torch.nn.Parameter(weight)
    part = slice(rank * 4, rank * 4 + 4)
    loss = losses.sample_manifold_loss(inputs[part] @ weight, target[part], 0.0, processes.gather_rows)
    loss.backward()
    processes.average_gradients([weight])
    assert processes.agree(rank, 5 - rank) == [1, 5] and processes.gather([rank]) == [0, 1]
    results[rank] = (loss.item(), weight.grad.clone())
    processes.wait()
    torch.distributed.destroy_process_group()


def test_the_sample_loss_and_its_gradient_are_those_of_one_process_on_the_same_global_batch() -> None:
    inputs, weight, target = global_batch()
    weight = torch.nn.Parameter(weight)
    loss = losses.sample_manifold_loss(inputs @ weight, target)
    loss.backward()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, (free_port(), results), nprocs=WORLD)
        found = [results[rank] for rank in range(WORLD)]
    for value, gradient in found:
        assert value == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.bits
def test_two_processes_train_validate_save_and_resume_exactly(
    tmp_path: Path, tiny_sd15: Path, tiny_dinov2: Path
) -> None:
    setting = RepaSetting(tmp_path / "data", tiny_sd15, tiny_dinov2)
    changes = {"train_batch_size": 2, "save_every_n_steps": 2, "validate_every_n_steps": 2}
    run = setting.start(tmp_path / "whole", processes=WORLD, **changes)
    output, _ = run.communicate(timeout=1200)
    assert run.returncode == 0, output[-3000:]
    assert "batch 2 x 1 accumulated x 2 processes" in output
    copy_until(tmp_path / "whole", tmp_path / "resumed", 2)
    run = setting.start(tmp_path / "resumed", processes=WORLD, **changes)
    output, _ = run.communicate(timeout=1200)
    assert run.returncode == 0 and output.count("resuming from") == 1, output[-3000:]
    assert_equal_states(tmp_path / "whole" / "step_000004", tmp_path / "resumed" / "step_000004")
    rows = metric_rows(tmp_path / "whole", "val/total")
    assert [row["step"] for row in rows] == [2, 4]
    # The same weights judged by one process: the whole set, the same noise, the same global Gram matrix.
    assert setting.train(tmp_path / "one", max_train_steps=1, learning_rate=1e-30, align_schedule="constant") == 0
    run = setting.start(
        tmp_path / "both",
        processes=WORLD,
        max_train_steps=1,
        learning_rate=1e-30,
        align_schedule="constant",
        train_batch_size=2,
    )
    output, _ = run.communicate(timeout=1200)
    assert run.returncode == 0, output[-3000:]
    one, both = (metric_rows(tmp_path / name, "val/total")[0] for name in ("one", "both"))
    for name in ("val/loss", "val/token", "val/manifold", "val/total"):
        assert both[name] == pytest.approx(one[name], rel=1e-4), name


def aligned_gradients(data: Path, base: Path, teacher: Path, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Gradients of one step of train_network.py --alignment over five pictures, of which the first process has three."""
    from unittest import mock

    from library.data.cached_samples import Request
    from library.data.order import MicroBatch
    from library.diffusion.noise import Draw
    from library.processes import Processes
    from library.training.randomness import sample_noise

    aligned = {
        "alignment": "", "dino_model": teacher, "dino_resolution": 56, "token_grid": 4, "align_schedule": "constant",
        "train_batch_size": 3, "manifold_mode": "sample", "network_train_unet_only": "",
    }  # fmt: skip
    built = (
        NetworkSetting(data, base).build(dataset_config=data / "five.toml", cache_dir=data / "caches", **aligned).stir()
    )
    task, samples = built.task, built.task.training
    parts = [[0, 1, 2, 3, 4]] if world_size == 1 else [[0, 1, 2], [3, 4]]
    chosen = np.array(parts[rank], np.int64)
    micro = MicroBatch(0, chosen, np.zeros_like(chosen), len(chosen), 5, world_size)
    batch = samples.read(Request(0, 0, micro, len(chosen) * world_size / 5))
    ids = samples.ids_of(batch)
    noise = sample_noise(0, ids, tuple(task.latents(batch).shape[1:]))
    timesteps = torch.tensor([100 + 150 * int(name[-5]) for name in ids])
    with mock.patch("library.training.task.draw", lambda *_: Draw(noise, noise, timesteps)):
        loss = task.losses(batch, torch.Generator().manual_seed(0), 9)["loss"]
    assert batch.share is not None
    (loss * batch.share).backward()
    parameters = [parameter for group in task.groups for parameter in group.parameters]
    Processes("cpu").average_gradients(parameters)
    built.close()
    heads = {f"head {name}": one.grad for name, one in task.alignment.heads.named_parameters()}
    return heads | {name: one.grad for name, one in task.network.parameters.items()}


def aligned_worker(
    rank: int, port: int, folders: tuple[Path, ...], results: dict[int, dict[str, torch.Tensor]]
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    results[rank] = aligned_gradients(*folders, rank, WORLD)
    torch.distributed.destroy_process_group()


def test_two_processes_of_unequal_batches_align_as_one_with_the_global_batch(
    tmp_path: Path, tiny_sd15: Path, tiny_dinov2: Path
) -> None:
    """train_network.py --alignment, manifold_mode sample: the Gram matrix is over the pictures of both processes."""
    data = tmp_path / "data"
    pictures = draw_pictures(data / "five", ((64, 64),) * 5)
    (data / "five.toml").write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = '{pictures}'\n"
    )
    folders = (data, tiny_sd15, tiny_dinov2)
    one = aligned_gradients(*folders, 0, 1)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(aligned_worker, (free_port(), folders, results), nprocs=WORLD)
        both = results[0]
    assert one.keys() == both.keys() and len(one) > 20
    for name, gradient in one.items():
        torch.testing.assert_close(both[name], gradient, rtol=2e-3, atol=1e-6, msg=name)
