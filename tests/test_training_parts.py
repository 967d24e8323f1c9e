"""The small parts of a run: arithmetic, randomness, average, schedule, requests, reports."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.errors import Diverged, UserError
from library.options.training import OptimizerOptions, TrainingOptions
from library.training import preflight
from library.training.ema import ExponentialAverage
from library.training.loop import clip_gradients
from library.training.optimizers import ParameterGroup, make_optimizer
from library.training.plan import make_plan
from library.training.randomness import StepRandomness, sample_noise, seed_of, stratified_places
from library.training.schedules import learning_rates_of
from library.training.stop import NOTHING, SAVE, STOP, Requests
from library.training.tracking import AnomalyWatch, MetricLog, MetricWindow, status_words
from tests.tools.orders import whole_steps


def test_track_a_is_1562_steps_per_epoch_and_62480_in_all() -> None:
    plan = make_plan(whole_steps(200_000, 128), TrainingOptions(), OptimizerOptions())
    assert (plan.steps_per_epoch, plan.last_step, plan.warmup_steps) == (1562, 62480, 6248)


def test_track_b_is_10009_steps_per_epoch() -> None:
    assert whole_steps(1_281_167, 128).steps_per_epoch == 10009


def test_processes_and_accumulation_divide_the_steps() -> None:
    order = whole_steps(1000, 10, world_size=3, accumulation=2)
    plan = make_plan(order, TrainingOptions(), OptimizerOptions())
    assert (plan.samples_per_step, plan.steps_per_epoch) == (60, 16)


def test_a_batch_larger_than_the_data_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(
        UserError, match="is 128 samples a step, but the training set has only 100. Lower .* at most 100"
    ):
        whole_steps(100, 128)


def test_steps_beat_epochs_and_warm_up_is_a_share_or_a_count() -> None:
    plan = make_plan(whole_steps(1000, 10), TrainingOptions(max_train_steps=77), OptimizerOptions(lr_warmup_steps=5))
    assert (plan.last_step, plan.warmup_steps) == (77, 5)


def test_the_learning_rate_is_the_documents_warm_up_and_cosine() -> None:
    options = OptimizerOptions()
    plan = make_plan(whole_steps(200_000, 128), TrainingOptions(), options)
    rates = learning_rates_of(options, plan, [ParameterGroup("x", [], 1.0)])

    def reference(step: int) -> float:
        if step < 6248:
            return step / 6248
        return 0.5 * (1 + math.cos(math.pi * (step - 6248) / (62480 - 6248)))

    for step in (0, 1, 3124, 6248, 34364, 62479):
        assert rates(step) == pytest.approx([reference(step)], abs=1e-12)
    assert rates(3124) == [0.5] and rates(34364) == pytest.approx([0.5])


def test_adamw_is_the_published_formula() -> None:
    options = OptimizerOptions()
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([ParameterGroup("x", [weight], 0.1, 0.01)], options)
    gradients = [[0.5, -1.0], [0.1, 2.0], [-3.0, 0.2]]
    w, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for t, gradient in enumerate(gradients, start=1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        for i, g in enumerate(gradient):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            step = (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            w[i] -= 0.1 * (step + 0.01 * w[i])
    assert weight.tolist() == pytest.approx(w, abs=1e-5)


def test_gradients_are_scaled_to_the_global_norm() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, 0.0).item() == 5 and parameters[1].grad.item() == 4
    assert clip_gradients(parameters, 1.0).item() == 5
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0]) and parameters[1].grad.item() == pytest.approx(0.8)


@pytest.mark.bits
def test_the_average_is_the_recursion_and_swaps_in_and_out_to_the_bit() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = ExponentialAverage({"w": weight}, 0.9)
    expected = [1.0, 2.0]
    for step in range(5):
        with torch.no_grad():
            weight.add_(0.3 * step)
        average.update()
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, weight.tolist(), strict=True)]
    before = weight.detach().clone()
    with average.swapped_in():
        assert weight.tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(weight, before)


def test_the_randomness_of_a_step_depends_on_seed_rank_step_and_micro_batch_alone() -> None:
    def draw(seed: int, rank: int, step: int, micro: int = 0) -> list[float]:
        randomness = StepRandomness(seed, rank, torch.device("cpu"))
        randomness.at(99)
        return torch.randn(3, generator=randomness.at(step, micro)).tolist() + torch.rand(1).tolist()

    assert draw(1, 0, 5) == draw(1, 0, 5)
    different = [draw(1, 0, 5), draw(2, 0, 5), draw(1, 1, 5), draw(1, 0, 6), draw(1, 0, 5, 1)]
    assert len({tuple(values) for values in different}) == 5
    assert seed_of(1, 23) != seed_of(12, 3)


@pytest.mark.bits
def test_validation_noise_belongs_to_the_sample_and_not_to_the_batch() -> None:
    together = sample_noise(0, ["a", "b", "c"], (4, 2, 2))
    assert torch.equal(sample_noise(0, ["c"], (4, 2, 2))[0], together[2])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("count", [60, 1000])
def test_validation_timesteps_are_evenly_spread(count: int) -> None:
    places = stratified_places(count)
    assert places.min() >= 0 and places.max() < 1
    histogram = torch.histc(places, bins=10, min=0, max=1)
    assert (histogram - count / 10).abs().max() <= 2


def test_files_and_signals_are_requests(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    assert requests.look() == NOTHING
    (tmp_path / "save").touch()
    requests._looked = 0.0
    assert requests.look() == SAVE
    (tmp_path / "stop").touch()
    requests.done(SAVE)
    assert not (tmp_path / "save").exists() and (tmp_path / "stop").exists()
    requests._looked = 0.0
    assert requests.look() == STOP
    requests.done(STOP)
    assert not (tmp_path / "save").exists() and requests.look() == NOTHING
    with requests.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.look() == STOP and requests.reason == "SIGTERM"
    with requests.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_window_is_read_in_one_piece_and_starts_anew() -> None:
    window = MetricWindow()
    for step in range(3):
        window.add(step, {"loss": torch.tensor(float(step)), "token": torch.tensor(0.5)}, np.array([step]))
    names, steps, values, samples = window.read()
    assert names == ["loss", "token"] and steps == [0, 1, 2] and values[:, 0].tolist() == [0, 1, 2]
    assert [s.tolist() for s in samples] == [[0], [1], [2]] and len(window) == 0


def test_a_manifold_loss_of_5_medians_is_written_down_with_its_samples(tmp_path: Path) -> None:
    watch = AnomalyWatch(tmp_path / "anomalies.jsonl")
    for _ in range(30):
        assert not watch.is_anomalous({"loss": 1.0, "manifold": 0.02})
        watch.remember({"loss": 1.0, "manifold": 0.02})
    unusual = {"loss": 2.0, "manifold": 0.5}
    assert watch.is_anomalous(unusual) and not watch.is_anomalous({"loss": 2.0, "manifold": 0.09})
    assert "25 times its running median" in watch.record(30, unusual, ["x", "y"])
    record = json.loads((tmp_path / "anomalies.jsonl").read_text())
    assert record["step"] == 30 and record["samples"] == ["x", "y"] and record["median"] == 0.02


def test_a_loss_that_is_no_number_names_step_parts_samples_and_the_last_state(tmp_path: Path) -> None:
    with pytest.raises(
        Diverged, match=r"step 7: token nan .*Samples of that step: a, b. The last good state is .*step_000005"
    ):
        AnomalyWatch.refuse_non_finite(7, {"loss": 1.0, "token": math.nan}, ["a", "b"], tmp_path / "step_000005")


def test_metric_rows_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl", tmp_path / "logs", 0)
    for step in (10, 20, 30):
        log.add(step, {"train/loss": 1.0 / step})
    log.close()
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('{"step": 40, "train/lo')
    log = MetricLog(tmp_path / "m.jsonl", tmp_path / "logs", 20)
    log.add(30, {"train/loss": 5.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30] and rows[-1]["train/loss"] == 5.0


ROW = {
    "train/loss": 0.0812, "lr/lora": 8.1e-5, "time/step_ms": 412.0, "time/samples_per_second": 310.0,
    "time/data_wait_share": 0.004, "memory/peak_gb": 38.0, "memory/total_gb": 139.0,
}  # fmt: skip
ALIGNED = ROW | {"train/diffusion": 0.0502, "train/token": 0.671, "train/manifold": 0.02, "lambda": 0.045}


def test_the_status_line_reads_as_documented() -> None:
    assert status_words("epoch 2/4", ROW, 1160.0, 120) == (
        "epoch 2/4  left 19:20  loss 0.0812  lr 8.1e-05  412 ms  310 img/s  wait 0.4%  38/139 GB"
    )
    assert status_words("epoch 2/4", ALIGNED, 1160.0, 120) == (
        "epoch 2/4  left 19:20  L_diff 0.0502  token 0.671  manifold 0.020  lambda 0.045  lr 8.1e-05  412 ms  38/139 GB"
    )
    assert status_words("epoch 1/4", {}, None, 120) == "epoch 1/4"


def test_a_narrow_status_line_keeps_epoch_and_losses() -> None:
    assert status_words("epoch 2/4", ROW, 1160.0, 50) == "epoch 2/4  left 19:20  loss 0.0812  lr 8.1e-05"
    assert status_words("epoch 2/4", ALIGNED, 1160.0, 53) == "epoch 2/4  left 19:20  L_diff 0.0502  lambda 0.045"


@given(st.integers(1, 200))
def test_a_status_line_is_never_wider_than_there_is_room_and_keeps_the_time_left_longest(width: int) -> None:
    line = status_words("epoch 2/4", ALIGNED, 1160.0, width)
    assert len(line) <= width or line == "left 19:20"
    assert "left 19:20" in line


@pytest.mark.parametrize(
    ("first", "processes", "coefficient", "left_to_the_step"),
    [(0, 1, None, True), (1, 1, None, False), (0, 2, None, False), (0, 1, 0.0, False), (0, 1, 0.5, True)],
)
def test_the_preflight_leaves_a_batch_to_the_first_step_only_where_that_takes_as_much(
    first: int, processes: int, coefficient: float | None, left_to_the_step: bool
) -> None:
    """With several processes all have to try, or one would wait for the others in the manifold loss."""
    images = [SimpleNamespace(fitted=SimpleNamespace(bucket=bucket)) for bucket in ((128, 64), (64, 64))]
    large, small = (SimpleNamespace(step=0, micro=SimpleNamespace(indices=[place])) for place in (0, 1))
    alignment = None if coefficient is None else SimpleNamespace(coefficient=lambda step: coefficient)
    task: Any = SimpleNamespace(training=SimpleNamespace(images=images), alignment=alignment)
    run: Any = SimpleNamespace(processes=SimpleNamespace(world_size=processes))
    request: Any = (large, small)[first]
    assert preflight._comes_at_once(run, task, request, large) is left_to_the_step  # type: ignore[arg-type]
