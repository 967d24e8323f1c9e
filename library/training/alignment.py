"""What AlignHeads learn beside any diffusion training: the tokens of one teacher or several, and how these relate to each other.

loss = L_diff + lambda(step) * (token_weight * L_token + manifold_weight * L_manifold)        (U-REPA, arXiv 2503.18414)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from library.data.cached_samples import Batch
from library.diffusion import alignment_losses as losses
from library.diffusion.alignment_losses import Weights
from library.diffusion.alignment_schedules import align_coefficient, timestep_weights
from library.diffusion.parametrisation import Parametrisation
from library.errors import UserError
from library.models.encoders import grid_in_aspect
from library.options.alignment import AlignmentOptions
from library.options.kohya.optimizer import NetworkOptimizerOptions
from library.options.run import RunOptions
from library.processes import Processes
from library.training.alignment_end import AlignmentEnd, GradientCosine
from library.training.optimizers import ParameterGroup
from library.training.plan import Plan
from networks.align_head import AlignHeads
from networks.features import capture
from networks.taps import tap_channels

LATENTS = "latents"
"""In place of a teacher's name, where heads learn the relations of clean latents."""
LATENTS_HEAD_WIDTH = 256
"""Of what heads predict there, where no teacher says it (a guess; only similarities are compared)."""
PART = "align_heads"
"""Name of the heads' file in a state, of their group in the optimizer, and first word of their parameters."""

Value = TypeVar("Value", float, torch.Tensor)
AlignmentLosses = dict[str, torch.Tensor]
"""Scalars float32 by name, token and manifold, each the mean over the heads; of several teachers also align/TEACHER/token, ..."""


@dataclass
class Alignment:
    """AlignHeads and what they are trained by.

    heads: of each tap and teacher. features: the mapping that hooks on the U-Net fill, tap -> [B, C, h, w]; see `attach`.
    gather: joins the pooled rows of all processes for the Gram matrix between samples; None compares within a batch.
    """

    heads: AlignHeads
    features: Mapping[str, torch.Tensor]
    options: AlignmentOptions
    gather: losses.Gather | None = None
    last_step: int | None = None
    """Of the run, where lambda falls until then."""
    end: AlignmentEnd | None = None
    """What may end alignment before the run ends."""

    @classmethod
    def attach(
        cls,
        unet: Any,
        options: RunOptions,
        widths: Mapping[str, int],
        adapters: list[nn.Parameter],
        plan: Plan,
        processes: Processes,
        context: ExitStack,
    ) -> Alignment:
        """With the features of `unet`, caught as long as `context` is open. To be called before anything is compiled.

        widths: of what heads predict, by teacher (`head_widths`). adapters: what is trained beside the heads.
        """
        o = options.alignment
        heads = make_heads(unet.config, o, widths, options.training.seed)
        heads = heads.to(processes.device, torch.bfloat16 if options.model.full_bf16 else torch.float32)
        features = context.enter_context(capture(unet, heads.captured))
        end = None
        if o.align_stop_on_plateau is not None or o.gradient_every is not None:
            end = AlignmentEnd(o, processes.say, GradientCosine(adapters, processes))
        gather = None
        if o.manifold_mode == "sample" and processes.world_size > 1:
            gather = partial(processes.gather_rows, most=plan.batch_size)  # no batch is larger
        return cls(heads, features, o, gather, plan.last_step, end)

    @property
    def weights(self) -> dict[str, float]:
        """Of each loss beside the others. One of weight 0 is computed for the log; without a teacher there are no tokens."""
        weights = {"token": self.options.token_weight, "manifold": self.options.manifold_weight}
        return weights if self.options.needs_teacher else {"manifold": weights["manifold"]}

    @property
    def warm_step(self) -> int:
        """A step at which lambda has risen."""
        return self.options.align_warmup_steps

    def coefficient(self, step: int) -> float:
        """lambda(step)."""
        o = self.options
        if self.end is not None and self.end.step is not None and step >= self.end.step:
            return 0.0
        return align_coefficient(
            step, o.align_coeff, o.align_schedule, o.align_warmup_steps, o.align_cutoff_step, self.last_step
        )

    def at_noise(
        self, weights: Weights | None, timesteps: torch.Tensor, parametrisation: Parametrisation, sharing: int
    ) -> Weights | None:
        """Weights of pictures times what counts of each by its noise. sharing: processes, where there are no weights yet."""
        o = self.options
        if o.align_timesteps == "all":
            return weights
        own = timestep_weights(parametrisation.snr(timesteps), o.align_timesteps, o.align_window)
        if weights is None:
            return Weights(own, torch.ones_like(own), sharing=sharing)
        return replace(weights, pictures=weights.pictures * own)

    def targets(self, batch: Batch, latents: torch.Tensor) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        """What the heads of each teacher learn, [B, N, D] float32, on rows and columns of N tokens: its tokens, or clean latents
        pooled.

        latents: [B, C, h, w], scaled. Raises UserError where they are fewer than the tokens.
        """
        if self.options.needs_teacher:
            assert batch.token_grid is not None
            tokens, grid = {name: batch.target_tokens(name) for name in self.heads.teachers}, batch.token_grid
        else:
            height, width = latents.shape[-2:]
            grid = grid_in_aspect(self.options.token_grid, width, height)
            if grid[0] > height or grid[1] > width:
                raise UserError(
                    f"token_grid {self.options.token_grid} is finer than latents of {height} x {width}, which are pooled to it. "
                    "Lower token_grid."
                )
            pooled = F.adaptive_avg_pool2d(latents, grid).flatten(2).transpose(1, 2)
            tokens = dict.fromkeys(self.heads.teachers, pooled)
        share = self.options.teacher_norm
        return {name: losses.spatially_normalised(one, share) for name, one in tokens.items()}, grid

    def losses(
        self,
        targets: Mapping[str, torch.Tensor],
        generator: torch.Generator,
        *,
        grid: tuple[int, int] | None = None,
        weights: Weights | None = None,
        with_gradient: bool,
    ) -> AlignmentLosses:
        """Of the features that the U-Net's last pass left, against `targets` by teacher, each [B, N, D] float32.

        grid: rows and columns of the N tokens; None is the heads' own square. with_gradient False leaves the losses out
        of the graph: where lambda is 0 the step is, to the bit, the step of a run without heads.
        """
        found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.weights}
        for teacher, target in targets.items():
            of_taps: dict[str, list[torch.Tensor]] = {name: [] for name in self.weights}
            for tap in self.heads:
                with torch.set_grad_enabled(with_gradient):
                    predicted = self.heads.tokens(tap, self.features, grid, teacher)
                for name, values in of_taps.items():
                    with torch.set_grad_enabled(with_gradient and self.weights[name] > 0):
                        values.append(self.loss(name, predicted, target, generator, weights))
            for name, values in of_taps.items():
                found[name][teacher] = self._over_taps(values)
        means = {name: self.over_teachers(list(values.values())) for name, values in found.items()}
        if len(targets) == 1:
            return means
        return means | {
            _part(teacher, name): value.detach() for name in found for teacher, value in found[name].items()
        }

    @property
    def parts(self) -> list[str]:
        """The names of what `losses` gives."""
        teachers = self.heads.teachers if len(self.heads.teachers) > 1 else ()
        return [*self.weights, *(_part(teacher, name) for name in self.weights for teacher in teachers)]

    def _over_taps(self, values: list[torch.Tensor]) -> torch.Tensor:
        """The mean of a teacher's heads, by their weights where they have any."""
        weights = self.options.tap_weights
        if not weights:
            return torch.stack(values).mean()
        weighed = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)])
        return weighed.sum() / sum(weights)

    def over_teachers(self, values: Sequence[Value]) -> Value:
        """The mean of what each teacher has, likewise."""
        if len(values) == 1:
            return values[0]
        weights = self.options.teacher_weights or (1.0,) * len(values)
        first, *others = (weight * value for weight, value in zip(weights, values, strict=True))
        return cast(Value, sum(others, start=first) / sum(weights))

    def loss(
        self,
        name: str,
        predicted: torch.Tensor,
        target: torch.Tensor,
        generator: torch.Generator,
        weights: Weights | None = None,
    ) -> torch.Tensor:
        """One of `weights`, of one head."""
        if name == "token":
            return losses.token_loss(predicted, target, weights)
        return self.manifold(predicted, target, generator, weights)

    @torch.no_grad()
    def token_loss(self, targets: Mapping[str, torch.Tensor], grid: tuple[int, int] | None) -> torch.Tensor:
        """The mean over the heads, every token counting alike."""
        found = []
        for teacher, target in targets.items():
            predicted = (self.heads.tokens(tap, self.features, grid, teacher) for tap in self.heads)
            found.append(self._over_taps([losses.token_loss(tokens, target) for tokens in predicted]))
        return self.over_teachers(found)

    def manifold(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        generator: torch.Generator,
        weights: Weights | None = None,
    ) -> torch.Tensor:
        o = self.options
        margin, cost = o.manifold_margin, o.manifold_loss
        if o.manifold_mode == "sample":
            loss = losses.sample_manifold_loss(predicted, target, margin, self.gather, weights, cost)
        elif o.manifold_mode == "token":
            loss = losses.token_manifold_loss(predicted, target, margin, weights, cost)
        else:
            count = predicted.shape[0] * predicted.shape[1]
            chosen = torch.randperm(count, generator=generator, device=predicted.device)[: o.manifold_random_tokens]
            loss = losses.random_manifold_loss(predicted, target, chosen, margin, weights, cost)
        loss = losses.clip_loss(loss, o.manifold_clip)
        if weights is None or self.gather is None or o.manifold_mode != "sample":
            return loss
        return loss * weights.turn_share

    def total(self, aligned: Mapping[str, Any]) -> Any:
        """The losses, each by its weight: what lambda multiplies."""
        first, *others = (weight * aligned[name] for name, weight in self.weights.items())
        return sum(others, start=first)


def _part(teacher: str, name: str) -> str:
    return f"align/{teacher}/{name}"


def head_widths(options: AlignmentOptions, teachers: Mapping[str, int]) -> Mapping[str, int]:
    """Of what heads predict, by teacher: as wide as its tokens, where there is one; empty without heads.

    teachers: widths of their tokens.
    """
    if not options.alignment:
        return {}
    return teachers if options.needs_teacher else {LATENTS: LATENTS_HEAD_WIDTH}


def make_heads(unet_config: Mapping[str, Any], o: AlignmentOptions, widths: Mapping[str, int], seed: int) -> AlignHeads:
    """One for each tap and teacher, of as many channels as the U-Net has there."""
    channels = {tap: shape.channels for tap, shape in tap_channels(unet_config, o.taps).items()}
    # diffusers' own rule for the width of the embedding.
    time_width = unet_config.get("time_embedding_dim") or unet_config["block_out_channels"][0] * 4
    return AlignHeads(
        channels,
        widths,
        grid=o.token_grid,
        kind=o.align_head,
        seed=seed,
        time_width=time_width if o.align_film else None,
    )


def head_parameters(heads: AlignHeads) -> dict[str, nn.Parameter]:
    """By the names that they have in a state."""
    return {f"{PART}.{name}": parameter for name, parameter in heads.named_parameters()}


def head_group(heads: AlignHeads, options: NetworkOptimizerOptions) -> ParameterGroup:
    """The heads learn at a rate and with a decay of their own."""
    rate = options.learning_rate if options.align_learning_rate is None else options.align_learning_rate
    return ParameterGroup(PART, list(heads.parameters()), rate, options.align_weight_decay, options.align_max_grad_norm)
