"""When alignment ends before its run does: where the token cosine no longer rises, or where the two losses pull apart.

Alignment can help early and harm late (HASTE, arXiv 2505.16792). What is decided here is decided by the metrics of all steps in
order, at steps that are counted from the beginning of the run: whenever the device is read, in a resumed run and in all processes
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from library.options.alignment import AlignmentOptions
from library.processes import Processes
from library.training.loss_scaling import LossScaler
from library.words import plural

PLATEAU_EVERY = 50
"""Steps between looks for a plateau; each look reads the device."""
COSINE_DECAY, LEAST_RISE = 0.99, 0.001
"""Of the token cosine's running mean, and by how much it has to rise over its best to count as rising (guesses)."""
AGREEMENT_DECAY = 0.9
"""Of the gradient cosine's running mean, a measurement being noisy (a guess)."""


class GradientCosine:
    """Cosine between the gradients of the alignment losses and of all else, over a whole step: all its micro-batches and processes.

    parameters: the adapters'. It costs a second backward pass in the steps that are measured, and changes no gradient.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], processes: Processes) -> None:
        self.parameters, self.processes = parameters, processes
        self.value: torch.Tensor | None = None
        """Of the step that was measured last, on the device."""
        self._aligned: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, share: float, scaler: LossScaler | None) -> None:
        """loss: of the alignment in a micro-batch, as it is part of the whole loss, whose graph stays for the backward pass."""
        if not loss.requires_grad:  # lambda is 0
            return
        loss = loss * share
        loss = loss if scaler is None else scaler.scale(loss)
        gradients = torch.autograd.grad(
            loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if not self._aligned:
            self._aligned = [gradient.float() for gradient in gradients]
        else:
            torch._foreach_add_(self._aligned, list(gradients))

    def finish(self) -> None:
        """When the gradients of the whole loss are added up and averaged over processes, and not yet clipped."""
        if not self._aligned:
            return
        self.processes.average(self._aligned)
        aligned = torch.cat([gradient.flatten() for gradient in self._aligned])
        whole = torch.cat(
            [
                torch.zeros_like(part).flatten() if parameter.grad is None else parameter.grad.float().flatten()
                for part, parameter in zip(self._aligned, self.parameters, strict=True)
            ]
        )
        self.value = torch.nn.functional.cosine_similarity(whole - aligned, aligned, dim=0, eps=1e-20)
        self._aligned = []


@dataclass
class AlignmentEnd:
    """The step from which alignment has ended, and the running means that decide it.

    cosine: what measures the gradients, where anything does.
    """

    options: AlignmentOptions
    say: Callable[..., None]
    cosine: GradientCosine | None = None
    step: int | None = None
    """From which lambda is 0; None while alignment goes on."""
    tokens: float | None = None
    """Running mean of the token cosine."""
    best: float = -1.0
    best_at: int = 0
    agreement: float | None = None
    """Running mean of the gradient cosine."""
    apart: int = 0
    """Measurements in a row after which it was below 0."""

    def due(self, step: int) -> bool:
        """Whether the metrics of all steps before `step` have to be seen before it begins."""
        o = self.options
        looks = o.align_stop_on_plateau is not None and step % PLATEAU_EVERY == 0
        return self.step is None and (looks or (o.gradient_every is not None and step % o.gradient_every == 0))

    def measures(self, step: int) -> GradientCosine | None:
        """What is to measure the gradients of this step, if anything."""
        every = self.options.gradient_every
        return self.cosine if every is not None and self.step is None and (step + 1) % every == 0 else None

    def see(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The metrics of one step, means over all processes; every step comes here once and in order. Metrics of its own."""
        if self.step is not None:
            return {}
        found = self._see_tokens(step, values) | self._see_gradients(step)
        o, after = self.options, step + 1
        if o.align_stop_on_plateau is not None and after % PLATEAU_EVERY == 0:
            waited = after - max(self.best_at, o.align_warmup_steps)
            if waited >= o.align_stop_on_plateau:
                self._end(
                    after,
                    f"the token cosine's running mean, {self.tokens:.4f}, has not risen for {plural(waited, 'step')}",
                )
        if o.align_stop_on_conflict is not None and self.apart >= o.align_stop_on_conflict:
            count = plural(self.apart, "measurement")
            self._end(
                after, f"its gradient has pointed away from the diffusion loss's in {count} (mean {self.agreement:.3f})"
            )
        return found

    def _see_tokens(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        if self.options.align_stop_on_plateau is None:
            return {}
        cosine = 1.0 - values["token"]
        self.tokens = _running(self.tokens, cosine, COSINE_DECAY)
        if self.tokens > self.best + LEAST_RISE:
            self.best, self.best_at = self.tokens, step + 1
        return {"align/token_cosine": self.tokens}

    def _see_gradients(self, step: int) -> dict[str, float]:
        measured = self.measures(step)
        if measured is None or measured.value is None:
            return {}
        value, measured.value = measured.value.item(), None
        if value != value:  # float16 overflowed, and the step was left out
            return {}
        self.agreement = _running(self.agreement, value, AGREEMENT_DECAY)
        self.apart = self.apart + 1 if self.agreement < 0 else 0
        return {"align/gradient_cosine": value, "align/gradient_cosine_mean": self.agreement}

    def _end(self, step: int, why: str) -> None:
        self.step = step
        self.say(f"alignment ends at step {step}: {why}")

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("step", "tokens", "best", "best_at", "agreement", "apart")}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _running(mean: float | None, value: float, decay: float) -> float:
    return value if mean is None else decay * mean + (1 - decay) * value
