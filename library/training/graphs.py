"""--compile graphs: the forward and backward pass of a micro-batch as one CUDA graph, launched by one call of the host.

At batch 1 the host takes longer to launch the thousands of kernels of a U-Net than the device to run them. A CUDA graph keeps the
launches of a pass and repeats them on the same memory. Recorded are: noise and timesteps, all passes of the models, the losses, the
backward pass and its addition to the gradients. Reading batches, averaging gradients over processes, clipping, the optimizer and
metrics stay outside.

torch.cuda.make_graphed_callables is not used: it hands out gradients in memory that its next replay overwrites, which accumulation
would still read. Nor is torch.compile(mode="reduce-overhead"): it compiles the whole U-Net for minutes, anew for each bucket.

Which replay belongs to which batch is tested on the CPU; no graph has been recorded on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.data.batches import AnyBatch
from library.errors import UserError
from library.options.run import RunOptions
from library.processes import Processes
from library.words import wrapped

Parts = dict[str, Tensor]
Work = Callable[[], Parts]
"""Adds to the gradients of the parameters; gives loss parts."""

# Passes of a form before it is recorded, in which kernels are chosen and loaded; torch's own example has three.
WARM_UP = 3
# A recorded U-Net takes some tens of MB of launches beside the memory that all graphs share (a guess, not a measurement).
MOST_GRAPHS = 32

# Fields of a batch that no loss looks at, and its share of the step, which is handed over by itself.
_UNSEEN = frozenset({"indices", "captions", "flipped", "share"})


class GraphTask(Protocol):
    """What is recorded; `library.training.task.LoraTask`."""

    def coefficient(self, step: int) -> float:
        """The one number of a step that changes its losses; 0 leaves out what it weighs."""
        ...

    def losses(self, batch: Any, generator: torch.Generator, step: int, coefficient: Tensor | None = None) -> Parts:
        """coefficient: that of the step, on the device."""
        ...


class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    def warm_up(self, work: Work) -> Parts:
        """Do it where it is going to be recorded."""
        ...

    def record(self, work: Work, generator: torch.Generator) -> tuple[Graph, Parts]:
        """Of work that is not done: what does it, and where it leaves its loss parts. generator: what it draws from."""
        ...


class CudaRecorder:
    """All graphs on one stream and in one pool of memory: one runs at a time, and what it leaves is read before the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> Parts:
        """On the stream of the recording, where autograd then keeps what accumulates gradients."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            parts = work()
        here.wait_stream(self.stream)
        return parts

    def record(self, work: Work, generator: torch.Generator) -> tuple[Graph, Parts]:
        """A replay draws by the seeds that the generators have then: `generator` and torch's own, from which dropout draws."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                parts = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--compile graphs: a step of this run cannot be recorded ({reason}). Leave it out, or use --compile regional."
            ) from error
        return graph, parts


@dataclass(frozen=True)
class _Recorded:
    """A graph and the tensors that it reads and writes, always the same ones.

    gradients: by parameter, for those that its backward pass reaches; the others have none, as without graphs.
    """

    graph: Graph
    batch: Any
    share: Tensor
    coefficient: Tensor
    gradients: dict[nn.Parameter, Tensor]
    parts: Parts

    def replay(self, batch: AnyBatch, share: float, coefficient: float) -> Parts:
        torch._foreach_copy_(self.batch.tensors(), batch.tensors())
        self.share.fill_(share)
        self.coefficient.fill_(coefficient)
        accumulate_into(self.gradients)
        self.graph.replay()
        return self.parts


class Graphs:
    """Forward and backward pass of micro-batches, replayed where one of the same form has come WARM_UP times before.

    The form is what the host decides of a pass: shapes, which tensors a batch has, its multiplier, ... The first MOST_GRAPHS
    forms are recorded and stay; what comes beyond runs launch by launch, which is said once. Memory so stays bounded, and no
    form is recorded again and again, as it would be if the least recently used one had to go.

    backward: adds the gradients of loss parts, weighed by a share, to the parameters'.
    """

    def __init__(
        self,
        task: GraphTask,
        backward: Callable[[Parts, Any], None],
        parameters: list[nn.Parameter],
        recorder: Recorder,
        say: Callable[[str], None],
        most: int = MOST_GRAPHS,
    ) -> None:
        self.task, self.backward, self.parameters = task, backward, parameters
        self.recorder, self.say, self.most = recorder, say, most
        self.recorded: dict[Hashable, _Recorded] = {}
        self._reached: dict[Hashable, dict[nn.Parameter, None]] = {}
        self._passes: dict[Hashable, int] = {}
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._told = False

    def __call__(self, batch: AnyBatch, generator: torch.Generator, step: int, share: float) -> Parts:
        """Add to the gradients of the parameters; the loss parts, valid until the next call.

        generator: the same one in all calls, seeded for this one, as torch's own has to be.
        """
        coefficient = self.task.coefficient(step)
        form = (form_of(batch), coefficient > 0)
        if form not in self.recorded:
            passes = self._passes[form] = self._passes.get(form, 0) + 1
            full = len(self.recorded) >= self.most
            if full and passes > WARM_UP and not self._told:
                self._told = True
                self.say(
                    wrapped(
                        f"--compile graphs: batches come in more than {self.most} forms. Those recorded go on being replayed; "
                        "others run without a graph."
                    )
                )
            if full or passes <= WARM_UP:
                return self._warm_up(form, partial(self._work, batch, generator, step, share))
            self.recorded[form] = self._record(form, batch, generator, step)
        return self.recorded[form].replay(batch, share, coefficient)

    def _work(
        self, batch: AnyBatch, generator: torch.Generator, step: int, share: Any, coefficient: Tensor | None = None
    ) -> Parts:
        parts = self.task.losses(batch, generator, step, coefficient)
        self.backward(parts, share)
        return {name: value.detach() for name, value in parts.items()}

    def _warm_up(self, form: Hashable, work: Work) -> Parts:
        with _reached(self.parameters, self._reached.setdefault(form, {})):
            return self.recorder.warm_up(work)

    def _record(self, form: Hashable, batch: AnyBatch, generator: torch.Generator, step: int) -> _Recorded:
        own = batch.mapped(torch.Tensor.clone)
        share, coefficient = (torch.zeros((), device=generator.device) for _ in range(2))
        gradients = {}
        for parameter in self._reached[form]:
            if parameter not in self._buffers:
                self._buffers[parameter] = torch.zeros_like(parameter)
            gradients[parameter] = self._buffers[parameter]
        accumulate_into(gradients)
        graph, parts = self.recorder.record(partial(self._work, own, generator, step, share, coefficient), generator)
        return _Recorded(graph, own, share, coefficient, gradients, parts)


def form_of(batch: AnyBatch) -> Hashable:
    """All that the host decides of what is computed with a batch; with equal ones the same is, whatever the values."""

    def described(value: Any) -> Hashable:
        if isinstance(value, dict):
            return tuple((name, described(one)) for name, one in value.items())
        return (tuple(value.shape), value.dtype, value.stride()) if isinstance(value, Tensor) else value

    return tuple((one.name, described(getattr(batch, one.name))) for one in fields(batch) if one.name not in _UNSEEN)


@torch.no_grad()
def accumulate_into(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Let the gradients of parameters lie in these tensors, with what has been added up in this step so far, or zero."""
    fresh = []
    for parameter, buffer in gradients.items():
        if parameter.grad is None:
            fresh.append(buffer)
        elif parameter.grad is not buffer:  # of a micro-batch of this step that was not replayed
            buffer.copy_(parameter.grad)
        parameter.grad = buffer
    if fresh:
        torch._foreach_zero_(fresh)


@contextmanager
def _reached(parameters: list[nn.Parameter], reached: dict[nn.Parameter, None]) -> Iterator[None]:
    """Note which of the parameters a backward pass in the context gives gradients."""

    def note(parameter: Any) -> None:
        reached[parameter] = None

    hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters if parameter.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_graphs(options: RunOptions, processes: Processes) -> None:
    """Raise UserError where graphs are asked for and cannot be recorded."""
    if options.speed.compile != "graphs":
        return
    if processes.device.type != "cuda":
        raise UserError(
            f"--compile graphs records CUDA graphs, and this run computes on {processes.device}. Leave it out, or use "
            "--compile regional."
        )
    if processes.world_size > 1 and options.alignment.alignment and options.alignment.manifold_mode == "sample":
        raise UserError(
            "--compile graphs cannot record what several processes say to each other for --manifold_mode sample. Use "
            "--manifold_mode token, --compile regional, or one process."
        )
