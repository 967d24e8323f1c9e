"""Several processes: the global manifold loss, training and resume together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from library.diffusion import alignment_losses as losses
from library.processes import Processes
from tests.tools.network_runs import NetworkSetting, draw_pictures
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows
from tests.tools.warm import Run

WORLD = 2


def global_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [8, 3, 5] of a linear head, its weight [5, 6], and targets [8, 3, 6]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((8, 3, 5), (5, 6), (8, 3, 6)))  # type: ignore[return-value]


def in_two(work: Callable[..., object], folder: Path, *arguments: Path) -> list[Any]:
    """What a function of this file returns in each of two processes; `folder` is to hold it."""
    code = (
        "import sys, torch; from pathlib import Path; import tests.test_processes as here\n"
        "folder, *arguments = map(Path, sys.argv[1:])\n"
        f"found = here.{work.__name__}(*arguments)\n"
        "torch.save(found, folder / f'{here.Processes(\"cpu\").rank}.pt')"
    )
    Run("-c", [code, str(folder), *map(str, arguments)], WORLD).end()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def worker() -> tuple[float, torch.Tensor]:
    processes = Processes("cpu")
    rank = processes.rank
    inputs, weight, target = global_batch()
    weight = torch.nn.Parameter(weight)
    part = slice(rank * 4, rank * 4 + 4)
    loss = losses.sample_manifold_loss(inputs[part] @ weight, target[part], 0.0, processes.gather_rows)
    loss.backward()
    processes.average_gradients([weight])
    assert processes.agree(rank, 5 - rank) == [1, 5] and processes.gather([rank]) == [0, 1]
    return loss.item(), weight.grad


def test_the_sample_loss_and_its_gradient_are_those_of_one_process_on_the_same_global_batch(tmp_path: Path) -> None:
    inputs, weight, target = global_batch()
    weight = torch.nn.Parameter(weight)
    loss = losses.sample_manifold_loss(inputs @ weight, target)
    loss.backward()
    for value, gradient in in_two(worker, tmp_path):
        assert value == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.bits
def test_two_processes_train_validate_save_and_resume_exactly(
    tmp_path: Path, tiny_sd15: Path, tiny_dinov2: Path
) -> None:
    """With bins of timesteps and the cosine of gradients: processes that disagreed about either would resume as another run."""
    setting = RepaSetting(tmp_path / "data", tiny_sd15, tiny_dinov2)
    changes = {
        "processes": WORLD, "train_batch_size": 2, "save_every_n_steps": 2, "validate_every_n_steps": 2,
        "timestep_sampling": "bins", "timestep_bins": 4,
        "align_gradient_every": 1, "align_stop_on_conflict": 1, "align_timesteps": "v",
    }  # fmt: skip
    output = setting.start(tmp_path / "whole", **changes).end()
    assert "batch 2 x 1 accumulated x 2 processes" in output
    copy_until(tmp_path / "whole", tmp_path / "resumed", 2)
    output = setting.start(tmp_path / "resumed", **changes).end()
    assert output.count("resuming from") == 1, output[-3000:]
    assert_equal_states(tmp_path / "whole" / "step_000004", tmp_path / "resumed" / "step_000004")
    rows = metric_rows(tmp_path / "whole", "val/total")
    assert [row["step"] for row in rows] == [2, 4]
    # The same weights judged by one process: the whole set, the same noise, the same global Gram matrix.
    measured = metric_rows(tmp_path / "whole", "align/gradient_cosine")
    assert measured and all(-1 <= row["align/gradient_cosine"] <= 1 for row in measured)
    still = {"max_train_steps": 1, "learning_rate": 1e-30, "align_schedule": "constant"}
    assert setting.train(tmp_path / "one", **still) == 0
    setting.start(tmp_path / "both", **still, train_batch_size=2, processes=WORLD).end()
    one, both = (metric_rows(tmp_path / name, "val/total")[0] for name in ("one", "both"))
    for name in ("val/loss", "val/token", "val/manifold", "val/total"):
        assert both[name] == pytest.approx(one[name], rel=1e-4), name


def aligned_gradients(data: Path, base: Path, teacher: Path) -> dict[str, torch.Tensor]:
    """Gradients of one step of train_network.py --alignment over five pictures, of which the first of two processes has three."""
    from library.data.cached_samples import Request
    from library.data.order import MicroBatch
    from library.diffusion.noise import Draw
    from library.training.randomness import sample_noise

    processes = Processes("cpu")
    options = {
        "alignment": "", "dino_model": teacher, "dino_resolution": 56, "token_grid": 4, "align_schedule": "constant",
        "train_batch_size": 3, "manifold_mode": "sample", "network_train_unet_only": "",
        "dataset_config": data / "five.toml", "cache_dir": data / "caches",
    }  # fmt: skip
    built = NetworkSetting(data, base).build(**options).stir()
    task, world = built.task, processes.world_size
    chosen = np.array(([0, 1, 2], [3, 4])[processes.rank] if world > 1 else range(5), np.int64)
    micro = MicroBatch(0, chosen, np.zeros_like(chosen), len(chosen), 5, world)
    batch = task.training.read(Request(0, 0, micro, len(chosen) * world / 5))
    ids = task.training.ids_of(batch)
    noise = sample_noise(0, ids, tuple(task.latents(batch).shape[1:]))
    timesteps = torch.tensor([100 + 150 * int(name[-5]) for name in ids])
    with mock.patch("library.training.task.draw", lambda *_: Draw(noise, noise, timesteps)):
        loss = task.losses(batch, torch.Generator().manual_seed(0), 9)["loss"]
    assert batch.share is not None
    (loss * batch.share).backward()
    processes.average_gradients(parameter for group in task.groups for parameter in group.parameters)
    built.close()
    heads = {f"head {name}": one.grad for name, one in task.alignment.heads.named_parameters()}
    return heads | {name: one.grad for name, one in task.network.parameters.items()}


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
    one = aligned_gradients(*folders)
    for gradients in in_two(aligned_gradients, tmp_path, *folders):
        assert one.keys() == gradients.keys() and len(one) > 20
        for name, gradient in one.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=2e-3, atol=5e-6, msg=name)
