"""The function that samplers call: clean latents, predicted from noisy ones by the U-Net and guided by prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.parametrisation import Parametrisation
from library.inference.prompt_encoding import EncodedPart, same_length
from library.inference.token_guidance import TokenGuidance
from library.models.conditioning import Conditioning


class GuidedDenoiser:
    """denoise(x, sigma) of `library.inference.samplers`, x [B, 4, h, w] float32, for pictures of one prompt.

    Guidance by the parts of a prompt is A1111's: negative + cfg_scale * sum of weight * (part - negative). At cfg_scale 1 and
    below, a single part of weight 1 is predicted without guidance. size_ids: SDXL's six numbers (`DrawingModel.size_ids`);
    negative_size_ids: those of the negative prompt where they differ (SDXL's refiner). calls_per_step and extra_calls: the
    sampler's, so that prompts change at the sampler's steps. A1111 counts calls: with DPM++ 2S a, its [a:b:10] changes after five
    steps. dtype: of the U-Net's inputs; default its weights'. on_step: called with the number of each step before its first call.
    guidance: by a photo, through the positive parts.
    """

    def __init__(
        self,
        unet: nn.Module,
        parametrisation: Parametrisation,
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
        guidance: TokenGuidance | None = None,
    ) -> None:
        self.unet, self.parametrisation = unet, parametrisation
        self.positive, self.negative = list(positive), negative
        self.size_ids, self.negative_size_ids = size_ids, negative_size_ids or size_ids
        self.calls_per_step, self.extra_calls, self.on_step = calls_per_step, extra_calls, on_step
        self.guidance = guidance
        self.dtype = dtype or next(unet.parameters()).dtype
        self.guided = cfg_scale > 1 or [part.weight for part in self.positive] != [1]
        self.weights = [part.weight * (cfg_scale if cfg_scale > 1 else 1.0) for part in self.positive]
        self.calls = self._announced = 0

    @property
    def step(self) -> int:
        """The step of the next call, counted from 1."""
        return max(self.calls - self.extra_calls, 0) // self.calls_per_step + 1

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        prompts = [part.at_step(self.step) for part in self.positive]
        if self.guided:
            prompts.append(self.negative.at_step(self.step))
        if self.on_step is not None and self.step != self._announced:
            self.on_step(self.step)
        self._announced = self.step
        self.calls += 1
        output = self._run_unet(x, sigma, prompts).float()
        if self.guided:
            *parts, negative = output.chunk(len(prompts))
            output = negative + sum(
                weight * (part - negative) for weight, part in zip(self.weights, parts, strict=True)
            )
        clean = self.parametrisation.clean(output, x, sigma)
        if self.guidance is None or not self.guidance.acts_at(sigma, self.parametrisation):
            return clean
        shown = prompts[: len(self.positive)]
        return clean + self.guidance.step(
            self.unet, lambda near: self._run_unet(near, sigma, shown), x, sigma, self.parametrisation
        )

    def _run_unet(self, x: Tensor, sigma: float, prompts: Sequence[Conditioning]) -> Tensor:
        """The U-Net's output [prompts * B, 4, h, w], all prompts in one batch: the positive parts, perhaps the negative one."""
        count, dtype = len(x), self.dtype
        inputs = (x * (1 / self.parametrisation.inverse_scale(sigma))).to(dtype).repeat(len(prompts), 1, 1, 1)
        timestep = self.parametrisation.levels.timestep(sigma)
        timesteps = torch.full((len(inputs),), timestep, dtype=torch.float32, device=x.device)
        texts = same_length([prompt.states for prompt in prompts])
        states = torch.cat([text.expand(count, -1, -1) for text in texts]).to(x.device, dtype)
        more: dict[str, Any] = {}
        if self.size_ids is not None and self.negative_size_ids is not None:
            pooled = torch.cat([prompt.pooled.expand(count, -1) for prompt in prompts if prompt.pooled is not None])
            rows = [list(self.size_ids)] * len(self.positive) + [list(self.negative_size_ids)] * self.guided
            sizes = torch.tensor(rows[: len(prompts)], device=x.device, dtype=dtype).repeat_interleave(count, dim=0)
            more["added_cond_kwargs"] = {"text_embeds": pooled.to(x.device, dtype), "time_ids": sizes}
        return self.unet(inputs, timesteps, encoder_hidden_states=states, **more).sample


class HandOver:
    """One denoiser for the first `steps` steps, another one after them: a base and its refiner (arXiv 2211.01324)."""

    def __init__(self, first: GuidedDenoiser, second: GuidedDenoiser, steps: int) -> None:
        self.first, self.second, self.steps = first, second, steps

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        if self.first.step <= self.steps:
            return self.first(x, sigma)
        # The second one's prompts continue at the same step.
        self.second.calls = max(self.second.calls, self.first.calls)
        return self.second(x, sigma)
