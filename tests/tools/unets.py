"""U-Nets for tests of what sits inside them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

# unet/config.json of stable-diffusion-v1-5.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def small_unet(seed: int = 0, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The blocks of SD1.5 with the fewest channels, frozen, with weights of `seed`."""
    narrow = {"sample_size": 16, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 12, "norm_num_groups": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**SD15, **narrow, "attention_head_dim": 2})
    return unet.to(dtype).eval().requires_grad_(False)


def unet_inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass of `small_unet`: latents 16x16, timesteps, text [batch, 5, 12]."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 4, 16, 16, generator=generator).to(dtype),
        "timestep": torch.arange(batch) * 300 + 17,
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator).to(dtype),
    }
