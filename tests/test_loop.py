"""The loop around a tiny task: float16 with a loss scaler, schedule-free weights, and what happens after each step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.data.batches import AnyBatch
from library.options.training import OptimizerOptions, OutputOptions, TrainingOptions
from library.processes import Processes
from library.training.checkpoints import Checkpoints
from library.training.loop import Run, train
from library.training.loss_scaling import LossScaler
from library.training.optimizers import ParameterGroup, make_optimizer
from library.training.plan import make_plan
from library.training.schedules import learning_rates_of
from library.training.state import Trained
from library.training.tracking import MetricLog
from tests.tools.orders import whole_steps

STEPS = 6


class Counted:
    """Batches that are nothing but their number."""

    waited = 0.0

    def __init__(self, first: int) -> None:
        self.number = first - 1

    def __next__(self) -> AnyBatch:
        self.number += 1
        return AnyBatch(np.array([self.number]))

    def close(self) -> None:
        pass


@dataclass
class Regression:
    """A linear layer learns the identity, under float16 autocast or without; validation shows the weights it sees."""

    half: bool = False
    overflow_at: int | None = None
    seen: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 4)
        self.groups = [ParameterGroup("lora", list(self.model.parameters()), 1e-2)]

    def losses(self, batch: Any, generator: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(8, 4, generator=generator)
        with torch.autocast("cpu", dtype=torch.float16, enabled=self.half):
            loss = (self.model(x) - x).float().square().mean()
        # The value stays and the gradient is infinite.
        if step == self.overflow_at:
            loss = loss.detach() + (loss - loss.detach()) * 1e38 * 1e38
        return {"loss": loss}

    def validate(self, step: int) -> dict[str, float]:
        self.seen.append(self.model.weight.detach().clone())
        return {"val/total": 0.0}

    def sample_ids(self, indices: np.ndarray) -> list[str]:
        return [str(i) for i in indices]


def run_of(
    task: Regression, folder: Path, name: str = "AdamW", scaler: LossScaler | None = None, **changes: Any
) -> Run:
    free = "schedulefree" in name.lower()
    options = OptimizerOptions(
        optimizer_type=name, learning_rate=1e-2, ema_decay=0.0, lr_scheduler="constant" if free else "cosine"
    )
    order = whole_steps(60, 1)
    plan = make_plan(order, TrainingOptions(max_train_steps=STEPS), options)
    output = OutputOptions(
        output_dir=folder, log_every_n_steps=1, validate_every_n_steps=3, save_every_n_steps=3, **changes
    )
    processes = Processes("cpu")
    trained = Trained(
        {"lora": dict(task.model.named_parameters())}, make_optimizer(task.groups, options), None, {}, scaler
    )
    folder.mkdir(exist_ok=True)

    def export(step: int, name: str, finished: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return {name: weight.detach() for name, weight in trained.parameters.items()}, {}

    return Run(
        task=task,
        plan=plan,
        trained=trained,
        batches=Counted,
        rates=learning_rates_of(options, plan, task.groups),
        max_grad_norm=1.0,
        seed=0,
        output=output,
        processes=processes,
        checkpoints=Checkpoints(output, {}, {}, plan, trained, processes, order, export),
        validates=True,
        log=MetricLog(folder / "metrics.jsonl", folder / "logs", 0),
    )


def rows(run: Run) -> list[dict[str, float]]:
    assert run.log is not None
    run.log.close()
    lines = (run.output.output_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.bits
@pytest.mark.parametrize("name", ["AdamW", "AdamWScheduleFree", "Prodigy", "AdamW8bit"])
def test_a_resumed_loop_gives_the_bits_of_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = run_of(Regression(), tmp_path / "whole", name)
    train(whole, 0)
    resumed = run_of(Regression(), tmp_path / "resumed", name)
    step = resumed.checkpoints.resume(tmp_path / "whole" / "step_000003")
    train(resumed, step)
    for key, weight in whole.trained.parameters.items():
        assert torch.equal(weight, resumed.trained.parameters[key])
    assert [r["train/loss"] for r in rows(whole)][3:] == [r["train/loss"] for r in rows(resumed)]


@pytest.mark.bits
def test_validation_sees_the_weights_that_a_schedule_free_state_keeps(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    task = Regression()
    train(run_of(task, tmp_path, "AdamWScheduleFree"), 0)
    for seen, step in zip(task.seen, (3, 6), strict=True):
        assert torch.equal(seen, load_file(tmp_path / f"step_{step:06d}" / "lora.safetensors")["weight"])
    assert not torch.equal(task.seen[-1], task.model.weight)


def test_a_float16_run_leaves_out_an_overflowed_step_and_goes_on(tmp_path: Path) -> None:
    scaler = LossScaler(torch.device("cpu"), init_scale=2.0**14)
    run = run_of(Regression(half=True, overflow_at=2), tmp_path, scaler=scaler)
    train(run, 0)
    logged = rows(run)
    assert [row["train/skipped"] for row in logged] == [0, 0, 1, 0, 0, 0]
    assert [row["train/loss_scale"] for row in logged] == [2**14] * 3 + [2**13] * 3
    assert logged[2]["train/grad_norm"] == 0 and all(0 < logged[i]["train/grad_norm"] < 10 for i in (0, 1, 3, 4, 5))


def test_what_follows_a_step_runs_after_it_and_is_logged(tmp_path: Path) -> None:
    task = Regression()
    run = run_of(task, tmp_path)

    def halve() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            task.model.weight.mul_(0.5)
        return {"keys_scaled": torch.tensor(1.0), "norm": task.model.weight.detach().norm()}

    run.after_step = halve
    train(run, 0)
    logged = rows(run)
    assert all(row["train/keys_scaled"] == 1.0 for row in logged)
    assert logged[-1]["train/norm"] == pytest.approx(task.model.weight.norm().item())
    assert logged[-1]["train/norm"] < logged[0]["train/norm"] / 8
