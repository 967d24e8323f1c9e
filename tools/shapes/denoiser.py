"""The U-Net of the tiny base: SD1.5's blocks, narrow, trained on cached latents and the frozen text encoder's output."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from library.data.demo_pictures import caption_of
from library.diffusion.objective import Objective
from library.diffusion.scheduler_config import parametrisation_of
from library.models.clip_tokenizer import tiny_tokenizer
from library.models.conditioning import TextConditioner
from library.models.encoders import VaeEncoder
from library.models.load import TextPart
from library.models.sd15_configs import SD15_SCHEDULER, SD15_UNET
from networks.families import SD15, TEXT_ENCODER
from tools.shapes.clip import HIDDEN
from tools.shapes.fit import Record, fit
from tools.shapes.pictures import Pictures, batches

CONFIG = {**SD15_UNET, "block_out_channels": [64, 64, 64, 96], "cross_attention_dim": HIDDEN, "sample_size": 16}
BATCH, RATE, SECOND_RATE = 32, 1.5e-3, 1e-3
EMPTY_PROMPTS = 0.1
MIN_SNR_GAMMA = 5.0


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(CONFIG)


def train_denoiser(
    pictures: Pictures,
    vae: AutoencoderKL,
    text_model: CLIPTextModel,
    steps: int,
    unet: UNet2DConditionModel | None = None,
    kept: Path | None = None,
) -> tuple[UNet2DConditionModel, Record]:
    """The base's own objective, noise, with min-SNR weights; one caption in ten is empty, for guidance.

    unet: one to go on with, at a lower rate. kept: see `fit`.
    """
    name, seed, rate = ("denoiser", 4, RATE) if unet is None else ("denoiser, second part", 7, SECOND_RATE)
    unet = new_unet() if unet is None else unet
    unet = unet.to(memory_format=torch.channels_last).train()
    objective = Objective(parametrisation_of(SD15_SCHEDULER), min_snr_gamma=MIN_SNR_GAMMA)
    latents = encode(vae, pictures.pixels)
    embeddings = _Embeddings(TextConditioner(SD15, [TextPart(TEXT_ENCODER, tiny_tokenizer(), text_model)]))

    def loss_at(step: int, indices: Tensor) -> Tensor:
        generator, choose = torch.Generator().manual_seed(seed * 10**6 + step), random.Random(f"denoiser {seed} {step}")
        chosen = latents[indices]
        prompts = [
            "" if choose.random() < EMPTY_PROMPTS else caption_of(pictures.known[index], choose)
            for index in indices.tolist()
        ]
        noise = torch.randn(chosen.shape, generator=generator)
        # One timestep in each of as many equal parts as the batch has samples: a quieter loss than independent draws.
        shares = (torch.arange(len(chosen)) + torch.rand(len(chosen), generator=generator)) / len(chosen)
        timesteps = (shares * objective.parametrisation.timesteps).long()
        noisy = objective.parametrisation.add_noise(chosen, noise, timesteps)
        output = unet(noisy.to(memory_format=torch.channels_last), timesteps, embeddings(prompts)).sample
        return objective.losses(output, chosen, noise, noisy, timesteps).mean()

    order = list(batches(len(pictures), BATCH, steps, seed))
    record = fit(name, {"unet": unet}, loss_at, order, rate, 0.998, kept)
    return unet.eval().to(memory_format=torch.contiguous_format), record


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> latents as the U-Net takes them, [N, 4, H/8, W/8] float32."""
    encoder = VaeEncoder(vae)
    means = torch.cat([encoder.moments(part)[0].float() for part in pixels.split(32)])
    return means * float(vae.config["scaling_factor"])


class _Embeddings:
    """The text encoder's output for prompts, each computed once."""

    def __init__(self, encoder: TextConditioner) -> None:
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str]) -> Tensor:
        """[B, 77, D] float32."""
        if new := sorted(set(prompts) - self._known.keys()):
            with torch.no_grad():
                self._known |= dict(zip(new, self._encoder(new).states.half(), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts]).float()
