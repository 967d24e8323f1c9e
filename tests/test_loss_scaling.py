"""Loss scaling: float16 trains, an overflow costs one step, nothing is read from the device, and the scale resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.options.training import OptimizerOptions
from library.training.loss_scaling import LossScaler
from library.training.optimizers import ParameterGroup, make_optimizer
from library.training.state import Trained, load_state, save_state
from tests.tools.no_reads import NoReads

CPU = torch.device("cpu")


class HalfPrecision:
    """A tiny model under float16 autocast, clipped and scaled as the loop does it."""

    def __init__(self, **settings: float) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        self.scaler = LossScaler(CPU, **settings)
        named = dict(self.model.named_parameters())
        optimizer = make_optimizer([ParameterGroup("x", list(named.values()), 1e-2)], OptimizerOptions())
        self.trained = Trained({"lora": named}, optimizer, None, {}, self.scaler)

    def train(self, first: int, last: int, overflow_at: int | None = None) -> list[dict[str, float]]:
        """Metrics of the scaler at each step."""
        optimizer, rows = self.trained.optimizer, []
        for step in range(first, last):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (self.model(x) - x[:, :4]).float().square().mean()
            self.scaler.scale(loss * torch.inf if step == overflow_at else loss).backward()
            self.scaler.unscale(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            rows.append(
                {name: value.item() for name, value in self.scaler.step(optimizer, {"grad_norm": norm}).items()}
            )
            optimizer.zero_grad()
        return rows

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.model.parameters()]


@pytest.mark.bits
def test_an_overflowed_step_is_left_out_and_halves_the_scale() -> None:
    run = HalfPrecision(init_scale=1024.0)
    run.train(0, 2)
    before = run.weights()
    assert run.train(2, 3, overflow_at=2) == [{"grad_norm": 0.0, "loss_scale": 1024.0, "skipped": 1.0}]
    assert all(map(torch.equal, run.weights(), before))
    (row,) = run.train(3, 4)
    assert row["loss_scale"] == 512.0 and row["skipped"] == 0.0 and 0 < row["grad_norm"] < 100
    assert not any(map(torch.equal, run.weights(), before))


def test_the_scale_does_not_change_what_is_learnt() -> None:
    small, large = HalfPrecision(init_scale=256.0), HalfPrecision(init_scale=512.0)
    for run in (small, large):
        run.train(0, 3)
    torch.testing.assert_close(small.weights(), large.weights(), rtol=1e-2, atol=1e-3)


@pytest.mark.bits
def test_the_loss_scale_resumes_with_the_state(tmp_path: Path) -> None:
    whole, part, resumed = (HalfPrecision(init_scale=64.0, growth_interval=3) for _ in range(3))
    whole.train(0, 8, overflow_at=4)
    part.train(0, 5, overflow_at=4)
    save_state(tmp_path / "step_000005", part.trained, {"step": 5})
    load_state(tmp_path / "step_000005", resumed.trained)
    resumed.train(5, 8)
    assert whole.scaler.state() == resumed.scaler.state() and whole.scaler.state()["scale"] == 128.0
    assert all(map(torch.equal, whole.weights(), resumed.weights()))


@pytest.mark.bits
def test_a_fused_step_is_scaled_without_reading_the_device() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make_optimizer([ParameterGroup("x", [weight], 1e-2)], OptimizerOptions(optimizer_args=("fused=True",)))
    scaler = LossScaler(CPU, init_scale=64.0)
    for step in range(3):
        scaler.scale(weight.sum() * (torch.inf if step == 1 else 1.0)).backward()
        before = weight.detach().clone()
        with NoReads():
            scaler.unscale(optimizer)
            metrics = scaler.step(optimizer, {"grad_norm": torch.nn.utils.clip_grad_norm_([weight], 1.0)})
        assert metrics["skipped"].item() == (step == 1) and torch.equal(weight, before) == (step == 1)
        optimizer.zero_grad()
