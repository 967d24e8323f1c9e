"""When alignment ends: decisions against slow loops over the same numbers, and runs that end it to the bit however they are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from library.options.alignment import AlignmentOptions
from library.processes import Processes
from library.training import alignment_end
from library.training.alignment_end import PLATEAU_EVERY, AlignmentEnd, GradientCosine
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows


def fed(end: AlignmentEnd, cosines: list[float], gradients: dict[int, float] | None = None) -> AlignmentEnd:
    for step, cosine in enumerate(cosines):
        if (measured := end.measures(step)) is not None and gradients is not None:
            measured.value = torch.tensor(gradients[step])
        end.see(step, {"token": 1 - cosine})
    return end


def slow_plateau(cosines: list[float], patience: int, warmup: int) -> int | None:
    mean, best, since = cosines[0], cosines[0], 1
    for step, cosine in enumerate(cosines[1:], start=1):
        mean = 0.99 * mean + 0.01 * cosine
        if mean > best + 0.001:
            best, since = mean, step + 1
        done = step + 1
        if done % PLATEAU_EVERY == 0 and done - max(since, warmup) >= patience:
            return done
    return None


@pytest.mark.parametrize(("patience", "warmup"), [(100, 0), (120, 300), (400, 10), (5000, 0)])
def test_a_plateau_is_where_the_running_mean_has_not_risen(patience: int, warmup: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1500, generator=generator).tolist()
    cosines = [0.6 * (1 - 0.99**step) + 0.02 * noise[step] for step in range(1500)]
    options = AlignmentOptions(align_stop_on_plateau=patience, align_warmup_steps=warmup)
    end = fed(AlignmentEnd(options, mock.Mock()), cosines)
    assert end.step == slow_plateau(cosines, patience, warmup) and (end.step is None) == (patience == 5000)
    assert end.say.call_count == int(end.step is not None)
    assert not end.due(2000) or end.step is None


def test_a_conflict_is_a_running_mean_below_0_so_many_measurements_in_a_row() -> None:
    options = AlignmentOptions(align_gradient_every=10, align_stop_on_conflict=3)
    values = [0.5, 0.2, -0.9, -0.8, -1.0, -0.9, 0.9, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.5]
    gradients = {10 * place + 9: value for place, value in enumerate(values)}
    end = AlignmentEnd(options, mock.Mock(), GradientCosine([], Processes("cpu")))
    assert [step for step in range(40) if end.due(step)] == [0, 10, 20, 30]
    fed(end, [0.5] * 140, gradients)
    mean, below, expected = values[0], 0, None
    for place, value in enumerate(values[1:], start=1):
        mean = 0.9 * mean + 0.1 * value
        below = below + 1 if mean < 0 else 0
        if below == 3:
            expected = 10 * place + 10
            break
    assert end.step == expected is not None
    # However the measurements are cut by a state in between.
    for cut in range(0, 130, 7):
        before, after = (AlignmentEnd(options, mock.Mock(), GradientCosine([], Processes("cpu"))) for _ in range(2))
        fed(before, [0.5] * cut, gradients)
        after.load(json.loads(json.dumps(before.state())))
        for step in range(cut, 140):
            if (measured := after.measures(step)) is not None:
                measured.value = torch.tensor(gradients[step])
            after.see(step, {"token": 0.5})
        assert after.state() == end.state()


def test_a_step_that_overflowed_is_no_measurement() -> None:
    end = AlignmentEnd(AlignmentOptions(align_gradient_every=1), mock.Mock(), GradientCosine([], Processes("cpu")))
    fed(end, [0.5] * 2, {0: 0.25, 1: float("nan")})
    assert end.agreement == 0.25


def test_the_gradient_cosine_is_that_of_two_backward_passes_over_the_whole_step() -> None:
    """Of two micro-batches with unlike shares, and a weight that alignment does not reach."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2))
    inputs = [torch.randn(5, 4, generator=generator) for _ in range(2)]
    shares = (0.25, 0.75)

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ((x @ first + x @ second) ** 2).mean(), (x @ first).sin().mean()

    slow = []
    for which in (0, 1):
        whole = sum(share * parts(x)[which] for share, x in zip(shares, inputs, strict=True))
        slow.append(torch.autograd.grad(whole, [first, second], allow_unused=True, materialize_grads=True))
    a, b = (torch.cat([one.flatten() for one in gradients]).double() for gradients in slow)
    cosine = GradientCosine([first, second], Processes("cpu"))
    for share, x in zip(shares, inputs, strict=True):
        diffusion, aligned = parts(x)
        cosine.add(aligned, share, None)
        ((diffusion + aligned) * share).backward()
    cosine.finish()
    assert cosine.value is not None
    assert cosine.value.item() == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-5)


@contextmanager
def ending(**changes: Any) -> Iterator[None]:
    """Within the context runs of a few steps see what takes thousands: every measurement a conflict, every look a plateau."""
    once = GradientCosine.finish

    def finish(self: GradientCosine) -> None:
        once(self)
        self.value = None if self.value is None else -self.value.abs()

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(GradientCosine, "finish", finish))
        for name, value in changes.items():
            patches.enter_context(mock.patch.object(alignment_end, name, value))
        yield


@pytest.mark.bits
def test_measuring_changes_no_bit_of_a_run(finished_run: Path, repa_setting: RepaSetting, tmp_path: Path) -> None:
    options = {"save_every_n_steps": 4, "validate_every_n_steps": 2, "align_gradient_every": 1, "log_every_n_steps": 3}
    assert repa_setting.train(tmp_path, **options) == 0
    assert_equal_states(finished_run / "step_000004", tmp_path / "step_000004")
    found = metric_rows(tmp_path, "align/gradient_cosine")
    # At step 0 lambda is 0, and there is no gradient of it.
    assert [row["step"] for row in found] == [2, 3, 4] and all(
        0 < abs(row["align/gradient_cosine"]) <= 1 for row in found
    )


@pytest.mark.bits
@pytest.mark.parametrize(
    ("options", "patches", "cut"),
    [
        ({"align_gradient_every": 1, "align_stop_on_conflict": 2}, {}, 2),
        ({"align_stop_on_plateau": 1, "align_max_grad_norm": 0.1}, {"PLATEAU_EVERY": 3, "LEAST_RISE": 3.0}, 4),
    ],
    ids=["conflict, cut before", "plateau, cut after"],
)
def test_a_run_that_ends_alignment_resumes_to_the_bit(
    options: dict[str, Any], patches: dict[str, Any], cut: int, repa_setting: RepaSetting, tmp_path: Path
) -> None:
    """With gradient accumulation, and reports at other steps."""
    given = {
        "save_every_n_steps": 1, "gradient_accumulation_steps": 2, "train_batch_size": 2, "max_train_steps": 5,
        "align_warmup_steps": 1, **options,
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with ending(**patches):
        assert repa_setting.train(whole, **given) == 0
        assert [row["lambda"] for row in metric_rows(whole)] == [0, 0.5, 0.5, 0, 0]
        copy_until(whole, resumed, cut)
        assert repa_setting.train(resumed, **given, log_every_n_steps=5) == 0
    assert_equal_states(whole / "step_000005", resumed / "step_000005")
    ends = [json.loads((run / "step_000005" / "state.json").read_text())["alignment_end"] for run in (whole, resumed)]
    assert ends[0] == ends[1] and ends[0]["step"] == 3


def test_heads_are_clipped_apart_from_the_adapters() -> None:
    from library.training.loop import _clip
    from library.training.optimizers import ParameterGroup

    def parameters(gradient: float) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
        for parameter in made:
            parameter.grad = torch.full((4,), gradient)
        return made

    adapters, heads = parameters(0.1), parameters(10.0)
    groups = [ParameterGroup("unet", adapters, 1.0), ParameterGroup("align_heads", heads, 1.0, max_grad_norm=2.0)]
    run: Any = mock.Mock(task=mock.Mock(groups=groups), max_grad_norm=1.0)
    norms = _clip(run, [*adapters, *heads])
    assert norms["grad_norm"].item() == pytest.approx(0.1 * 8**0.5)
    assert norms["grad_norm/align_heads"].item() == pytest.approx(10 * 8**0.5)
    assert adapters[0].grad is not None and adapters[0].grad[0].item() == pytest.approx(0.1), (
        "which the heads left alone"
    )
    assert torch.cat([p.grad for p in heads]).norm().item() == pytest.approx(2.0, rel=1e-4)  # type: ignore[misc]
    for parameter in heads:
        parameter.grad = None
    assert _clip(run, [*adapters, *heads])["grad_norm/align_heads"].item() == 0, "where lambda is 0"
