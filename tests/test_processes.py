"""Several processes: the global manifold loss, training and resume together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.diffusion import alignment as losses
from library.processes import Processes
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows
from tests.tools.warm import Run

WORLD = 2


def global_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [8, 3, 5] of a linear head, its weight [5, 6], and targets [8, 3, 6]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((8, 3, 5), (5, 6), (8, 3, 6)))  # type: ignore[return-value]


def worker(folder: Path) -> None:
    processes = Processes("cpu")
    rank = processes.rank
    inputs, weight, target = global_batch()
    weight = torch.nn.Parameter(weight)
    part = slice(rank * 4, rank * 4 + 4)
    loss = losses.sample_manifold_loss(inputs[part] @ weight, target[part], 0.0, processes.gather_rows)
    loss.backward()
    processes.average_gradients([weight])
    assert processes.agree(rank, 5 - rank) == [1, 5] and processes.gather([rank]) == [0, 1]
    torch.save((loss.item(), weight.grad), folder / f"{rank}.pt")


def test_the_sample_loss_and_its_gradient_are_those_of_one_process_on_the_same_global_batch(
    tmp_path: Path,
) -> None:
    inputs, weight, target = global_batch()
    weight = torch.nn.Parameter(weight)
    loss = losses.sample_manifold_loss(inputs @ weight, target)
    loss.backward()
    code = "import pathlib, sys, tests.test_processes as here; here.worker(pathlib.Path(sys.argv[1]))"
    Run("-c", [code, str(tmp_path)], WORLD).end()
    for rank in range(WORLD):
        value, gradient = torch.load(tmp_path / f"{rank}.pt")
        assert value == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.bits
def test_two_processes_train_validate_save_and_resume_exactly(
    tmp_path: Path, tiny_sd15: Path, tiny_dinov2: Path
) -> None:
    setting = RepaSetting(tmp_path / "data", tiny_sd15, tiny_dinov2)
    changes = {"processes": WORLD, "train_batch_size": 2, "save_every_n_steps": 2, "validate_every_n_steps": 2}
    output = setting.start(tmp_path / "whole", **changes).end()
    assert "batch 2 x 1 accumulated x 2 processes" in output
    copy_until(tmp_path / "whole", tmp_path / "resumed", 2)
    output = setting.start(tmp_path / "resumed", **changes).end()
    assert output.count("resuming from") == 1, output[-3000:]
    assert_equal_states(tmp_path / "whole" / "step_000004", tmp_path / "resumed" / "step_000004")
    rows = metric_rows(tmp_path / "whole", "val/total")
    assert [row["step"] for row in rows] == [2, 4]
    # The same weights judged by one process: the whole set, the same noise, the same global Gram matrix.
    still = {"max_train_steps": 1, "learning_rate": 1e-30, "align_schedule": "constant"}
    assert setting.train(tmp_path / "one", **still) == 0
    setting.start(tmp_path / "both", **still, train_batch_size=2, processes=WORLD).end()
    one, both = (metric_rows(tmp_path / name, "val/total")[0] for name in ("one", "both"))
    for name in ("val/diffusion", "val/token", "val/manifold", "val/total"):
        assert both[name] == pytest.approx(one[name], rel=1e-4), name
