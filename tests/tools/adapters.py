"""Adapters with weights as training leaves them, and the tiny model they are for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.models.load import load_unet
from networks.adapter_file import LoraModule, adapter_metadata, to_kohya
from networks.lora import LoraSpec, add_lora

SPEC = LoraSpec(rank=4, alpha=2.0, scope="all", targets="kohya", conv_rank=2, conv_alpha=1.0)
TEXT_LAYER = "text_model.encoder.layers.3.mlp.fc1"


def train_lora(unet: nn.Module, spec: LoraSpec = SPEC, size: float = 0.05) -> dict[str, Tensor]:
    """Put an adapter on `unet` and give it weights as training would; returns them by name."""
    generator = torch.Generator().manual_seed(1)
    params = add_lora(unet, spec, seed=0)
    for name, parameter in params.items():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach().clone() for name, parameter in params.items()}


def text_lora(prefix: str = "lora_te", layer: str = TEXT_LAYER) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    name = f"{prefix}_{layer.replace('.', '_')}"
    down, up = torch.randn(2, 64, generator=generator), torch.randn(256, 2, generator=generator)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": 0.05 * up, f"{name}.alpha": torch.tensor(1.0)}


def random_module(*shape: int, rank: int = 3, alpha: float = 2.0) -> LoraModule:
    generator = torch.Generator().manual_seed(sum(shape))
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    return LoraModule(down, up, alpha)


def run_tiny(unet: nn.Module) -> Tensor:
    """One forward pass of the tiny SD1.5's U-Net."""
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 64, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([321]), text).sample


def write_lora(base: Path, path: Path) -> dict[str, Tensor]:
    """Write a kohya file of an adapter for the U-Net of `base`; returns its weights under PEFT's names."""
    params = train_lora(load_unet(str(base)))
    tensors = to_kohya(params, SPEC)
    metadata = adapter_metadata(
        SPEC, tensors, output_name=path.stem, date="2026-01-02T03:04:05", resolution=(128, 128), base_model=str(base)
    )
    save_file(tensors, path, metadata=metadata)
    return params
