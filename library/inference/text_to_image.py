"""Pictures from prompts: A1111's prompt language, samplers and passes over a base with adapters folded in.

A picture depends on its request and its own seed alone, not on the other pictures of its batch: noise is drawn on the CPU from the
seed (`sampler_noise`), and pictures are decoded one by one, which also saves memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.diffusion.bridge import along_flow
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.errors import RunFailed
from library.inference.denoiser import GuidedDenoiser, HandOver
from library.inference.drawing_model import DrawingModel
from library.inference.lora_tags import StepWeights
from library.inference.picture_request import Hires, LoraUse, PictureRequest, base_steps, fitted_picture
from library.inference.prompt_encoding import EncodedPart, PromptEncoder, empty_conditioning
from library.inference.prompt_syntax import Prompt, parse_negative, parse_prompt, weighted_spans
from library.inference.sampler_noise import BrownianNoise, NoiseSource, StepNoise, initial_noise
from library.inference.sampler_run import run_sampler
from library.inference.samplers import SAMPLERS, Sampler, no_noise
from library.inference.sigmas import last_steps, noise_levels, part_of
from library.inference.token_guidance import TokenGuidance
from library.inference.upscaling import LatentUpscaler, find_upscaler
from library.models.conditioning import Conditioning
from networks.adapters import Adapter

Adapters = Mapping[Path, Adapter]
"""The adapters of a request, by their files."""


@dataclass(frozen=True)
class _Pass:
    """One run over noise levels: the first pass, or the second one of the hires fix."""

    sigmas: Tensor
    width: int
    height: int
    is_second: bool = False

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def native_size(model: DrawingModel) -> int:
    """Side in pixels that the base was trained at."""
    return model.unet.config.sample_size * model.factor


@torch.no_grad()
def draw(
    model: DrawingModel,
    request: PictureRequest,
    seeds: Sequence[int],
    *,
    adapters: Adapters | None = None,
    refiner: DrawingModel | None = None,
    guidance: TokenGuidance | None = None,
) -> list[Image.Image]:
    """One RGB picture per seed, drawn together. adapters: those of request.loras, by their paths. guidance: by request.reference.

    Raises RunFailed where the model's numbers overflow, UserError where the request does not fit the base.
    """
    return TextToImage(model, request, seeds, adapters or {}, refiner, guidance).draw()


@dataclass
class TextToImage:
    """Draws the pictures of one request; see `draw`."""

    model: DrawingModel
    request: PictureRequest
    seeds: Sequence[int]
    adapters: Adapters
    refiner: DrawingModel | None
    guidance: TokenGuidance | None = None

    def __post_init__(self) -> None:
        self.request, self.process = on_process(self.request, self.model.parametrisation)
        name, self.schedule = self.request.sampler_and_schedule
        self.sampler: Sampler = SAMPLERS[name]
        self.levels = self.process.levels

    def draw(self) -> list[Image.Image]:
        return self._decode(self.latents() * self.request.latent_multiplier)

    def latents(self) -> Tensor:
        """Of the finished pictures, [B, 4, h, w] float32, scaled."""
        request = self.request
        sigmas = noise_levels(
            self.schedule,
            request.steps,
            self.levels,
            self.model.family,
            discard_next_to_last=self.sampler.discard_next_to_last,
        )
        initial = None
        if request.init_image is not None:
            picture = fitted_picture(request.init_image, request.width, request.height, "init_image")
            initial = self._encode([picture]).expand(len(self.seeds), -1, -1, -1)
            sigmas = part_of(sigmas, request.denoising_strength)
        latents = self._run(_Pass(sigmas, request.width, request.height), initial)
        if request.hires is not None:
            latents = self._run(self._second_pass(request.hires), self._enlarged(latents, request.hires))
        return latents

    def _second_pass(self, hires: Hires) -> _Pass:
        sigmas = last_steps(
            self.schedule,
            self.request.hires_steps,
            hires.denoising_strength,
            self.levels,
            self.model.family,
            discard_next_to_last=self.sampler.discard_next_to_last,
        )
        return _Pass(sigmas, *self.request.final_size, is_second=True)

    def _enlarged(self, latents: Tensor, hires: Hires) -> Tensor:
        upscaler, size = find_upscaler(hires.upscaler), self.request.final_size
        if isinstance(upscaler, LatentUpscaler):
            return upscaler(latents, *size)
        return self._encode([upscaler(picture, *size) for picture in self._decode(latents)])

    def _run(self, pass_: _Pass, initial: Tensor | None) -> Tensor:
        """Clean latents [B, 4, h, w] float32. initial: latents to start from, noised to the pass's first level."""
        device, factor = self.model.device, self.model.factor
        channels = self.model.unet.config.in_channels
        shape = (channels, pass_.height // factor, pass_.width // factor)
        first, last = float(pass_.sigmas[0]), float(pass_.sigmas[-1])
        noise = torch.cat([initial_noise(seed, shape, pass_.is_second) for seed in self.seeds]).to(device)
        x = noise * first if initial is None else initial.float() * self.process.signal(first) + noise * first
        denoiser = self._denoiser(pass_)
        x = run_sampler(self.sampler, denoiser, x, pass_.sigmas, self._noise(pass_, shape), self.process)
        return x / self.process.inverse_scale(last)  # DDIM's levels end above 0

    def _noise(self, pass_: _Pass, shape: Sequence[int]) -> NoiseSource:
        if self.sampler.noise == "none":
            return no_noise
        kind = BrownianNoise if self.sampler.noise == "brownian" else StepNoise
        return kind(self.seeds, shape, self.model.device, second_pass=pass_.is_second)

    # Prompts and adapters

    def _denoiser(self, pass_: _Pass) -> GuidedDenoiser | HandOver:
        own = self._guided(self.model, pass_, self.request.loras)
        switch_at = self.request.refiner_switch_at
        if self.refiner is None or switch_at is None or pass_.is_second != (self.request.hires is not None):
            return own
        return HandOver(own, self._guided(self.refiner, pass_, ()), base_steps(pass_.steps, switch_at))

    def _guided(self, model: DrawingModel, pass_: _Pass, loras: Sequence[LoraUse]) -> GuidedDenoiser:
        positive, negative = self._encode_prompts(model, pass_, loras)
        weights = [use.weights.hrunet if pass_.is_second else use.weights.unet for use in loras]

        def fold(step: int) -> None:
            model.folded.set_unet(self._strengths(loras, weights, step, pass_.steps))

        return GuidedDenoiser(
            model.unet,
            self.process if model is self.model else model.parametrisation,
            positive,
            negative,
            cfg_scale=self.request.cfg_scale,
            size_ids=model.size_ids(pass_.width, pass_.height),
            negative_size_ids=model.negative_size_ids(pass_.width, pass_.height),
            calls_per_step=self.sampler.calls_per_step,
            extra_calls=self.sampler.extra_calls,
            dtype=model.dtype,
            on_step=fold,
            guidance=self.guidance if model is self.model else None,  # a refiner's features are others
        )

    def _encode_prompts(
        self, model: DrawingModel, pass_: _Pass, loras: Sequence[LoraUse]
    ) -> tuple[list[EncodedPart], EncodedPart]:
        """The positive parts, of one length, and the negative prompt; a text per step where text encoders' adapters change."""
        request, encoder = self.request, model.encoder(self.request.clip_skip, self.request.emphasis)
        after, steps = (request.steps, request.hires_steps) if pass_.is_second else (None, request.steps)
        positive = parse_prompt(request.prompt, steps, dialect=request.dialect, hires_after=after)
        negative = parse_negative(request.negative_prompt, steps, dialect=request.dialect, hires_after=after)
        weights = [use.weights.hrte if pass_.is_second else use.weights.te for use in loras]
        by_step = [self._strengths(loras, weights, step, pass_.steps) for step in range(1, pass_.steps + 1)]
        filling = None
        if request.fills_conds:
            model.folded.set_text(())  # A1111 encodes its filling when it loads a base, before any adapter
            filling = encoder.encode_texts([weighted_spans("")]).states
        known: dict[tuple[float, ...], list[EncodedPart]] = {}
        for strengths in by_step:
            key = tuple(ratio for _, ratio in strengths)
            if key not in known:
                model.folded.set_text(strengths)
                known[key] = encode_together(encoder, positive, negative, filling)
        if len(known) == 1:
            *parts, encoded_negative = next(iter(known.values()))
            return parts, encoded_negative
        rows = [known[tuple(ratio for _, ratio in strengths)] for strengths in by_step]
        *parts, encoded_negative = [_step_by_step(column) for column in zip(*rows, strict=True)]
        return parts, encoded_negative

    def _strengths(
        self, loras: Sequence[LoraUse], weights: Sequence[StepWeights], step: int, steps: int
    ) -> list[tuple[Adapter, float]]:
        """The adapters' weights at a step, counted from 1."""
        return [
            (self.adapters[use.path], weight.at(step - 1, steps)) for use, weight in zip(loras, weights, strict=True)
        ]

    # Pictures and latents

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.model.vae
        scale = float(vae.config.scaling_factor)
        dtype = next(vae.parameters()).dtype
        pictures = []
        for latent in latents.split(1):
            pixels = vae.decode((latent / scale).to(dtype)).sample[0].float()
            if not torch.isfinite(pixels).all():
                raise RunFailed(
                    f"The picture has values that are not finite: {self.model.dtype} is too narrow. Use --dtype bf16 or float."
                )
            bytes_ = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # [3, height, width]
            pictures.append(Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy()))
        return pictures

    def _encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Latents [B, 4, h, w] float32: the mode of the encoder's distribution, so that equal pictures give equal latents."""
        vae = self.model.vae
        dtype, scale = next(vae.parameters()).dtype, float(vae.config.scaling_factor)
        found = []
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
            distribution = vae.encode(pixels.to(self.model.device, dtype)).latent_dist
            found.append(distribution.mode().float() * scale)
        return torch.cat(found)


def on_process(request: PictureRequest, process: Parametrisation) -> tuple[PictureRequest, Parametrisation]:
    """The request as this base draws it, and along what: a flow base's own shift counts where the request has none."""
    if request.flow_shift is not None:
        return request, along_flow(process, request.flow_shift)
    return (replace(request, flow_shift=process.shift) if isinstance(process, FlowPath) else request), process


def encode_together(
    encoder: PromptEncoder, positive: Prompt, negative: Prompt, filling: Tensor | None = None
) -> list[EncodedPart]:
    """The parts of the positive prompt, then the negative prompt.

    As in A1111, shorter parts of an AND repeat their last position, and the negative prompt has a length of its own; filling
    [1, 77, D], the empty prompt, fills the shorter of the two sides. An empty negative prompt is zeros where the family was
    trained so.
    """
    parts = list(encoder.encode(positive))
    parts = [part.filled(max(other.length for other in parts)) for part in parts]
    if encoder.family.zeros_for_no_prompt and not negative.text.strip():
        parts.append(EncodedPart(1.0, (1,), (empty_conditioning(parts[0].texts[0]),)))
    else:
        parts += encoder.encode(negative)
    if filling is None:
        return parts
    return [part.filled(max(other.length for other in parts), filling) for part in parts]


def _step_by_step(parts: Sequence[EncodedPart]) -> EncodedPart:
    """parts: one part as encoded at each step. Returns the part with a text for every step."""
    texts: list[Conditioning] = [part.at_step(step) for step, part in enumerate(parts, 1)]
    return EncodedPart(parts[0].weight, tuple(range(1, len(texts) + 1)), tuple(texts))
