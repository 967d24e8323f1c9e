"""Where and how the base's frozen weights lie in memory: --base_quantization, and how far it moves the base; --blocks_to_swap.

Adapters are put on afterwards: a fresh one is the quantised base to the bit. It is the unquantised base that they are used with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.device import named_dtype
from library.files import human_bytes
from library.models.at_rest import STORED
from library.models.block_swap import saved_bytes, swap_blocks
from library.models.frozen import encode
from library.options.run import RunOptions
from networks.families import UNET


def quantise(models: Mapping[str, nn.Module], options: RunOptions) -> list[str]:
    """Keep the weights of the models as --base_quantization says, in place; a sentence about each.

    models: by component, frozen and without adapters yet.
    """
    dtype = named_dtype(options.model.mixed_precision)
    formats = {component: options.model.format_at_rest(component) for component in models}
    return [
        f"{component.replace('_', ' ')} at rest in {name}: {_encoded(models[component], name, dtype, component == UNET)}"
        for component, name in formats.items()
        if name is not None
    ]


def _encoded(model: nn.Module, name: str, dtype: torch.dtype, is_unet: bool) -> str:
    """Encode the weights; what that has saved, and what it has changed."""
    planned = next(model.parameters()).is_meta
    changes = name != STORED and not planned
    before = _output(model) if changes and is_unet else None
    result = encode(model, name, dtype)
    if not result.layers:  # of `stored`
        return "not counted here, for the file is not read" if planned else "nothing saved, its weights are no shorter"
    said = f"{human_bytes(result.bytes)} for {result.layers} layers instead of {human_bytes(result.plain_bytes)}"
    if changes:
        said += f"; error of the weights {result.error:.2%}"
    if before is not None:
        error = torch.linalg.vector_norm(_output(model) - before) / torch.linalg.vector_norm(before)
        said += f", of the output for noise {error.item():.2%}"
    return said


@torch.no_grad()
def _output(unet: Any) -> Tensor:
    """Of unit noise as latents of 256 px and as text, in the middle of SD's schedule, float32."""
    config, generator = unet.config, torch.Generator().manual_seed(0)
    weight = next(unet.parameters())

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    added = None
    if config.addition_embed_type == "text_time":
        sizes = torch.tensor([[256, 256, 0, 0, 256, 256]]).to(weight)
        pooled = config.projection_class_embeddings_input_dim - sizes.numel() * config.addition_time_embed_dim
        added = {"text_embeds": noise(1, pooled), "time_ids": sizes}
    latents, text = noise(1, config.in_channels, 32, 32), noise(1, 77, config.cross_attention_dim)
    timestep = torch.full((1,), 500, device=weight.device)
    result: Tensor = unet(latents, timestep, text, added_cond_kwargs=added, return_dict=False)[0]
    return result.float()


def swap_of(unet: nn.Module, count: int) -> str:
    """Keep the weights of `count` blocks in the host's memory, where that is another than the device's; what to say of it."""
    if next(unet.parameters()).device.type == "cpu":
        return "note: --blocks_to_swap has no effect without a GPU: all weights are in the host's memory."
    saved = saved_bytes(unet, count)
    swap_blocks(unet, count)
    return f"{count} blocks of the U-Net are swapped: {human_bytes(saved)} less on the GPU"
