"""The U-Net as a sampler asks it: noisy latents and their level to clean latents, guided by prompts that change with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.parametrisation import Parametrisation
from library.inference.prompt_encoding import EncodedPart, PromptEncoder, same_length
from library.models.conditioning import Conditioning


class GuidedDenoiser:
    """denoise(x, sigma) of `library.inference.samplers`, x [B, 4, h, w] float32, for pictures of one prompt.

    Guidance by the parts of a prompt is A1111's: negative + cfg_scale * sum of weight * (part - negative). At cfg_scale 1 and
    below, one part of weight 1 is drawn without. size_ids: the numbers of `DrawingModel.size_ids`; negative_size_ids: of the
    negative prompt, where they are others (SDXL's refiner). calls_per_step and extra_calls: the sampler's, so that a
    prompt changes at the sampler's steps. A1111 counts calls: with DPM++ 2S a, its [a:b:10] changes after five steps.
    dtype: of what the U-Net is given; default its weights'. on_step: told of each step before its first call, for what changes
    with them.
    """

    def __init__(
        self,
        unet: nn.Module,
        parametrisation: Parametrisation,
        encoder: PromptEncoder,
        positive: Sequence[EncodedPart],
        negative: EncodedPart,
        *,
        cfg_scale: float,
        size_ids: Sequence[float] | None = None,
        negative_size_ids: Sequence[float] | None = None,
        calls_per_step: int = 1,
        extra_calls: int = 0,
        dtype: torch.dtype | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.unet, self.parametrisation, self.encoder = unet, parametrisation, encoder
        self.positive, self.negative = list(positive), negative
        self.size_ids, self.negative_size_ids = size_ids, negative_size_ids or size_ids
        self.calls_per_step, self.extra_calls, self.on_step = calls_per_step, extra_calls, on_step
        self.dtype = dtype or next(unet.parameters()).dtype
        self.guided = cfg_scale > 1 or [part.weight for part in self.positive] != [1]
        self.weights = [part.weight * (cfg_scale if cfg_scale > 1 else 1.0) for part in self.positive]
        self.calls = self._told_of = 0

    @property
    def step(self) -> int:
        """That of the next call, counted from 1."""
        return max(self.calls - self.extra_calls, 0) // self.calls_per_step + 1

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        told = [part.at_step(self.step) for part in self.positive]
        if self.guided:
            told = same_length([*told, self.negative.at_step(self.step)], self.encoder)
        if self.on_step is not None and self.step != self._told_of:
            self.on_step(self.step)
        self._told_of = self.step
        self.calls += 1
        output = self._predicted(x, sigma, told).float()
        if self.guided:
            *parts, base = output.chunk(len(told))
            output = base + sum(weight * (part - base) for weight, part in zip(self.weights, parts, strict=True))
        return self.parametrisation.clean(output, x, sigma)

    def _predicted(self, x: Tensor, sigma: float, told: Sequence[Conditioning]) -> Tensor:
        """The U-Net's own words [parts * B, 4, h, w], all parts in one batch."""
        count, dtype = len(x), self.dtype
        inputs = (x * (1 / self.parametrisation.inverse_alpha(sigma))).to(dtype).repeat(len(told), 1, 1, 1)
        timestep = self.parametrisation.levels.timestep(sigma)
        timesteps = torch.full((len(inputs),), timestep, dtype=torch.float32, device=x.device)
        states = torch.cat([one.states.expand(count, -1, -1) for one in told]).to(x.device, dtype)
        more: dict[str, Any] = {}
        if self.size_ids is not None and self.negative_size_ids is not None:
            pooled = torch.cat([one.pooled.expand(count, -1) for one in told if one.pooled is not None])
            rows = [list(self.size_ids)] * len(self.positive) + [list(self.negative_size_ids)] * self.guided
            sizes = torch.tensor(rows, device=x.device, dtype=dtype).repeat_interleave(count, dim=0)
            more["added_cond_kwargs"] = {"text_embeds": pooled.to(x.device, dtype), "time_ids": sizes}
        return self.unet(inputs, timesteps, encoder_hidden_states=states, **more).sample


class HandOver:
    """One denoiser for the first `steps` steps, another after them: a base and its refiner (arXiv 2211.01324)."""

    def __init__(self, first: GuidedDenoiser, second: GuidedDenoiser, steps: int) -> None:
        self.first, self.second, self.steps = first, second, steps

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        if self.first.step <= self.steps:
            return self.first(x, sigma)
        # Prompts go on where they were.
        self.second.calls = max(self.second.calls, self.first.calls)
        return self.second(x, sigma)
