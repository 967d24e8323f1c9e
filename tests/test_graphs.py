"""--compile graphs on the CPU: which replay belongs to which batch, and that a step by replay is the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from library.data.batches import AnyBatch
from library.training import graphs
from library.training.graphs import CudaRecorder, Graphs, form_of
from library.training.loop import backward
from tests.tools.network_runs import NetworkSetting, adapter, losses
from tests.tools.runs import RepaSetting, assert_equal_states, metric_rows


class Replays:
    """A recorder without a device: a replay does the work again, and leaves its loss parts where recording left them."""

    def __init__(self, device: object = None) -> None:
        self.warmed, self.replayed, self.recorded = 0, [], 0

    def warm_up(self, work: graphs.Work) -> graphs.Parts:
        self.warmed += 1
        return work()

    def record(self, work: graphs.Work, generator: torch.Generator) -> tuple[graphs.Graph, graphs.Parts]:
        """A device computes nothing while it records: no gradients, no random numbers."""
        states = generator.get_state(), torch.get_rng_state()
        with mock.patch.object(torch.Tensor, "backward", lambda loss: None):
            parts = {name: value.detach().clone() for name, value in work().items()}
        generator.set_state(states[0])
        torch.set_rng_state(states[1])
        for value in parts.values():
            value.fill_(torch.nan)
        number, self.recorded = self.recorded, self.recorded + 1

        def replay() -> None:
            self.replayed.append(number)
            for name, value in work().items():
                parts[name].copy_(value)

        return mock.Mock(replay=replay), parts


@contextmanager
def replaying(warm_up: int = 1, most: int = graphs.MOST_GRAPHS) -> Iterator[Replays]:
    """Within the context --compile graphs works on the CPU."""
    recorder = Replays()
    with ExitStack() as patches:
        for where, name, value in (
            ("library.training.graphs", "check_graphs", lambda *_: None),
            ("library.training.run", "CudaRecorder", lambda device: recorder),
            ("library.training.graphs", "WARM_UP", warm_up),
        ):
            patches.enter_context(mock.patch(f"{where}.{name}", value))
        yield recorder


# -------------------------------------------------------------------------------------------- whole runs


@pytest.mark.bits
def test_a_lora_run_by_replays_is_the_plain_run_to_the_bit(network_setting: NetworkSetting, tmp_path: Path) -> None:
    """Text encoders that learn, dropout, two micro-batches a step of which the last of an epoch has one, an average."""
    options: dict[str, object] = {
        **network_setting.quick, "network_train_unet_only": None, "cache_text_encoder_outputs": None,
        "network_dropout": 0.1, "ema_decay": 0.5, "max_train_steps": 5, "save_state": "",
    }  # fmt: skip
    assert network_setting.train(tmp_path / "plain", **options) == 0
    with replaying() as recorder:
        assert network_setting.train(tmp_path / "graphs", compile="graphs", **options) == 0
    assert recorder.recorded == 1 and recorder.warmed == 1 and len(recorder.replayed) > 4
    assert losses(tmp_path / "plain") == losses(tmp_path / "graphs")
    for name in ("mio.safetensors", "mio-ema.safetensors"):
        left, right = adapter(tmp_path / "plain" / name), adapter(tmp_path / "graphs" / name)
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.bits
def test_a_repa_run_by_replays_is_the_plain_run_to_the_bit(repa_setting: RepaSetting, tmp_path: Path) -> None:
    """lambda rises over the first steps, from 0, where the heads have no gradients and the optimizer leaves them alone. The last
    step is measured, and not replayed."""
    options: dict[str, Any] = {
        "max_train_steps": 6, "align_warmup_steps": 4, "manifold_mode": "random", "save_every_n_steps": 6,
        "validate_every_n_steps": 2, "align_gradient_every": 6, "align_film": "", "align_timesteps": "v",
    }  # fmt: skip
    assert repa_setting.train(tmp_path / "plain", **options) == 0
    places, once = [], Graphs.__call__

    def noted(self: Graphs, *words: Any) -> graphs.Parts:
        places.append([parameter.data_ptr() for parameter in self.parameters])
        return once(self, *words)

    with replaying() as recorder, mock.patch.object(Graphs, "__call__", noted):
        assert repa_setting.train(tmp_path / "graphs", compile="graphs", **options) == 0
    assert recorder.recorded == 1 and recorder.warmed == 2 and len(recorder.replayed) == 3, "lambda 0, and above"
    assert all(place == places[0] for place in places), (
        "a graph goes on reading where a weight was when it was recorded"
    )
    for name in ("train/loss", "lambda", "train/token"):
        plain, replayed = ([row[name] for row in metric_rows(tmp_path / run, name)] for run in ("plain", "graphs"))
        assert plain == replayed and len(set(plain)) > 3, name
    assert_equal_states(tmp_path / "plain" / "step_000006", tmp_path / "graphs" / "step_000006")


# -------------------------------------------------------------------------------------------- which replay is whose


@dataclass
class Pictures(AnyBatch):
    latents: torch.Tensor
    multiplier: float = 1.0
    mask: torch.Tensor | None = None
    captions: list[str] = field(default_factory=list)


@dataclass
class Lines:
    """Two weights; the second counts from step 10 on."""

    first: torch.nn.Parameter = field(default_factory=lambda: torch.nn.Parameter(torch.tensor(2.0)))
    second: torch.nn.Parameter = field(default_factory=lambda: torch.nn.Parameter(torch.tensor(3.0)))

    def coefficient(self, step: int) -> float:
        return max(0.0, step - 9.0)

    def losses(
        self, batch: Pictures, generator: torch.Generator, step: int, coefficient: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        noise = torch.rand((), generator=generator)
        loss = self.first * batch.latents.mean() * batch.multiplier + 0.0 * noise
        if self.coefficient(step) > 0:
            loss = loss + (self.coefficient(step) if coefficient is None else coefficient) * self.second
        return {"loss": loss, "noise": noise}


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def run(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """A pass of `value` with the randomness of its number; the loss parts as numbers."""
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    recorder, generator, said = Replays(), torch.Generator(), []
    made = Graphs(
        lines,
        lambda parts, share: backward(parts, share, None),
        [lines.first, lines.second],
        recorder,
        said.append,
        most=2,
    )

    def once(value: float, side: int = 2, *, step: int = 0, share: float = 1.0, **more: Any) -> dict[str, float]:
        generator.manual_seed(int(value * 100))
        batch = Pictures(np.array([int(value)]), torch.full((1, side), value), captions=[f"picture {value}"], **more)
        return {name: part.item() for name, part in made(batch, generator, step, share).items()}

    once.recorder, once.said, once.graphs = recorder, said, made  # type: ignore[attr-defined]
    return once


def test_batches_of_one_form_share_a_graph_and_others_have_their_own(run: Any) -> None:
    for side in (2, 3, 2, 3, 2):
        run(1.0, side)
    assert run.recorder.replayed == [0, 1, 0]


@pytest.mark.parametrize("change", [{"multiplier": 0.5}, {"mask": torch.ones(1)}, {"step": 10}])
def test_what_the_host_decides_is_part_of_a_form(run: Any, change: dict[str, Any]) -> None:
    run(1.0), run(1.0)
    run(1.0, **change)
    assert run.recorder.replayed == [0] and run.recorder.warmed == 2
    assert run(1.0, **change)["loss"] == {"multiplier": 1.0, "mask": 2.0, "step": 5.0}[next(iter(change))]
    assert run.recorder.replayed == [0, 1]


def test_captions_places_and_shares_are_no_part_of_it() -> None:
    one, other = (
        Pictures(np.array([n]), torch.full((1, 2), float(n)), captions=[str(n)], share=n / 2) for n in range(2)
    )
    assert form_of(one) == form_of(other)


def test_a_replay_takes_values_share_coefficient_and_randomness_of_its_own_step(run: Any, lines: Lines) -> None:
    run(1.0, step=10), run(1.0, step=11)
    for value, step, share in ((4.0, 12, 0.5), (5.0, 13, 0.25)):
        lines.first.grad = lines.second.grad = None
        parts = run(value, step=step, share=share)
        assert parts["loss"] == 2 * value + (step - 9) * 3
        assert parts["noise"] == torch.rand((), generator=torch.Generator().manual_seed(int(value * 100))).item()
        assert lines.first.grad.item() == value * share and lines.second.grad.item() == (step - 9) * share  # type: ignore[attr-defined]
    assert run.recorder.replayed == [0, 0, 0]


def test_gradients_add_up_over_micro_batches_whether_or_not_they_are_replayed(run: Any, lines: Lines) -> None:
    run(1.0), run(1.0)
    lines.first.grad = None
    run(2.0, 3), run(3.0), run(4.0, 3), run(5.0)  # not replayed, replayed, recorded and replayed, replayed
    assert lines.first.grad.item() == 14.0 and run.recorder.replayed == [0, 0, 1, 0]  # type: ignore[attr-defined]


def test_a_weight_that_a_pass_does_not_reach_has_no_gradient(run: Any, lines: Lines) -> None:
    for step in (10, 10, 0, 0):
        lines.first.grad = lines.second.grad = None
        run(1.0, step=step)
        assert (lines.second.grad is not None) == (step == 10)
    assert run.recorder.replayed == [0, 1]


def test_forms_beyond_the_most_run_without_a_graph_and_that_is_said_once(run: Any, lines: Lines) -> None:
    for _ in range(3):
        for side in (2, 3, 4, 5):
            lines.first.grad = None
            assert run(1.5, side)["loss"] == 3.0
            assert lines.first.grad is not None and lines.first.grad.item() == 1.5
    assert run.recorder.recorded == 2 and run.recorder.replayed == [0, 1, 0, 1]
    (said,) = run.said
    assert "batches come in more than 2 forms" in said and "others run without a graph" in said


# -------------------------------------------------------------------------------------------- the device, and refusals


def test_graphs_are_recorded_on_one_stream_and_pool_and_know_the_generator() -> None:
    """What is said to torch, in its order; torch itself is not there."""
    said = mock.MagicMock()
    names = ("Stream", "graph_pool_handle", "CUDAGraph", "graph", "current_stream", "stream")
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch(f"torch.cuda.{name}", getattr(said, name)))
        recorder, generator = CudaRecorder(torch.device("cuda")), torch.Generator()
        assert recorder.warm_up(lambda: {"warm": said.warm()}).keys() == {"warm"}
        graph, _ = recorder.record(lambda: {"work": said.work()}, generator)
        recorder.record(lambda: {}, generator)
    calls = [call[0] for call in said.mock_calls]
    assert calls.count("Stream") == calls.count("graph_pool_handle") == 1
    order = [calls.index(name) for name in ("Stream().wait_stream", "stream", "warm", "current_stream().wait_stream")]
    assert order == sorted(order)
    registered, work = calls.index("CUDAGraph().register_generator_state"), calls.index("work")
    assert registered < calls.index("graph().__enter__") < work < calls.index("graph().__exit__")
    assert {call.kwargs["stream"] for call in said.graph.call_args_list} == {recorder.stream}
    assert {call.kwargs["pool"] for call in said.graph.call_args_list} == {recorder.pool}
    assert graph is said.CUDAGraph()


def test_a_step_that_cannot_be_recorded_says_so() -> None:
    def work() -> graphs.Parts:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    names = ("Stream", "graph_pool_handle", "CUDAGraph", "graph", "current_stream")
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch(f"torch.cuda.{name}"))
        torch.cuda.graph.return_value.__exit__.return_value = False  # type: ignore[attr-defined]
        with pytest.raises(
            graphs.UserError, match=r"cannot be recorded \(operation not permitted .*capturing\)\. Leave"
        ):
            CudaRecorder(torch.device("cuda")).record(work, torch.Generator())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({}, "--compile graphs records CUDA graphs, and this run computes on cpu"),
        ({"gradient_checkpointing": ""}, "compile graphs cannot be used with gradient_checkpointing"),
        ({"multires_noise_iterations": 6}, "multires_noise_iterations draws noise of other sizes each time"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_slow(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict, sentence: str
) -> None:
    assert network_setting.train(tmp_path / "out", compile="graphs", **network_setting.quick, **more) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_several_processes_that_compare_their_samples_are_refused() -> None:
    from library.options.repa import parse_repa_options

    processes: Any = mock.Mock(device=torch.device("cuda"), world_size=2)
    for mode, refused in (("sample", True), ("token", False)):
        argv = ["--train_data", "x", "--compile", "graphs", "--manifold_mode", mode]
        options = parse_repa_options(argv, prog="train_repa.py", description="")
        if refused:
            with pytest.raises(graphs.UserError, match="--manifold_mode sample"):
                graphs.check_graphs(options, processes)
        else:
            graphs.check_graphs(options, processes)
