"""The configurations of Stable Diffusion XL (base 1.0), as data; see `sd15_configs`.

Facts of the config.json files of stable-diffusion-xl-base-1.0, without what only says a class's default.
"""

from __future__ import annotations

from typing import Any

from library.models.sd15_configs import SD15_TEXT_ENCODER, SD15_UNET, SD15_VAE
from networks.families import SDXL

SDXL_HUB_IDS = frozenset({SDXL.hub_id})

SDXL_UNET: dict[str, Any] = {
    **SD15_UNET,
    "sample_size": SDXL.native_side // SDXL.vae_factor,
    "in_channels": SDXL.latent_channels,
    "out_channels": SDXL.latent_channels,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],  # the first level has none; diffusers wants a number there
    "cross_attention_dim": 2048,  # both text encoders' hidden sizes
    "attention_head_dim": [5, 10, 20],  # numbers of heads, each 64 wide; the name is diffusers' old mistake
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # the pooled prompt's 1280 and 256 for each of six sizes
}

SDXL_VAE: dict[str, Any] = {
    **SD15_VAE,
    "sample_size": SDXL.native_side,
    "latent_channels": SDXL.latent_channels,
    "scaling_factor": SDXL.scaling_factor,
    "force_upcast": SDXL.vae_overflows,
}

SDXL_TEXT_ENCODER: dict[str, Any] = dict(SD15_TEXT_ENCODER)  # the same CLIP ViT-L/14

SDXL_TEXT_ENCODER_2: dict[str, Any] = {
    **SD15_TEXT_ENCODER,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "pad_token_id": 0,  # OpenCLIP pads with zeros, which read "!"
}

SDXL_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

SDXL_PIPELINE: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": SDXL.zeros_for_no_prompt,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
