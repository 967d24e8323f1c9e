"""Adapters with weights as training leaves them, and the tiny model they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.models.configs import configs_of
from library.models.load import load_unet
from networks.adapter_export import Form, adapter_metadata, adapter_tensors, form_metadata, peft_config
from networks.adapters import Adapter
from networks.families import FAMILIES, TEXT_ENCODER_2, UNET, VAE
from networks.kinds.lora import LoraModule
from networks.names import Target, with_text_model
from networks.network import Network, add_network
from networks.spec import NetworkSpec
from networks.targets import CONV_PARENTS, TRANSFORMER_PARENTS, layers_inside
from tests.tools.networks import train

SPEC = NetworkSpec(rank=4, alpha=2.0, conv_rank=2, conv_alpha=1.0)
TEXT_LAYER = "text_model.encoder.layers.3.mlp.fc1"


def train_lora(unet: nn.Module, spec: NetworkSpec = SPEC, size: float = 0.05) -> Network:
    """Put adapters on `unet` and give them weights as training would."""
    network = add_network({UNET: unet}, spec, seed=0)
    train(network, size)
    return network


def earlier_weights(adapter: Adapter, prefix: str = "") -> dict[str, Tensor]:
    """LoRA weights of the U-Net under the names that states had before those of text encoders were among them."""
    return {
        f"{prefix}{target.path}.lora_{part}.default.weight": value
        for target, module in adapter.lora_modules("this test").items()
        for part, value in (("A", module.down), ("B", module.up))
    }


def earlier_spec(spec: NetworkSpec) -> dict[str, str]:
    """What the metadata of such a state said."""
    fields = ("rank", "alpha", "dropout", "scope", "conv_rank", "conv_alpha", "targets")
    return {"lora_spec": json.dumps({name: getattr(spec, name) for name in fields})}


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


def cp_module(
    out: int, inner: int, *, rank: int = 3, alpha: float = 1.5, kernel: tuple[int, int] = (3, 3)
) -> LoraModule:
    """Of a convolution, decomposed as LyCORIS does."""
    generator = torch.Generator().manual_seed(9)
    sizes = ((rank, inner, 1, 1), (out, rank, 1, 1), (rank, rank, *kernel))
    down, up, mid = (torch.randn(size, generator=generator) for size in sizes)
    return LoraModule(down, up, alpha, mid)


@cache
def model_without_weights(family: str, component: str) -> nn.Module:
    """A published model of FAMILIES[family] on the meta device."""
    configs = configs_of(FAMILIES[family])
    with torch.device("meta"):
        if component in (UNET, VAE):
            config, kind = (configs.unet, UNet2DConditionModel) if component == UNET else (configs.vae, AutoencoderKL)
            return kind(**{key: value for key, value in config.items() if not key.startswith("_")})
        kind = CLIPTextModelWithProjection if component == TEXT_ENCODER_2 else CLIPTextModel
        return kind(CLIPTextConfig(**configs.text_encoders[component]))


def kohya_targets(component: str, model: nn.Module, *, conv: bool) -> dict[Target, nn.Module]:
    """Every module that kohya's scripts train, with those of the residual blocks and resamplers or without."""
    if component == UNET:
        found = layers_inside(model, TRANSFORMER_PARENTS | CONV_PARENTS if conv else TRANSFORMER_PARENTS)
        return {Target(UNET, path): module for path, module in found.items()}
    return {
        Target(component, with_text_model(path)): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in path
    }


def whole_adapter(
    components: Mapping[str, nn.Module],
    *,
    conv: bool = True,
    alpha: float = 2.0,
    conv_alpha: float = 1.0,
    metadata: dict[str, str] | None = None,
) -> Adapter:
    """Random weights on every module that kohya's scripts train: rank 4, of 3x3 convolutions 2."""
    generator = torch.Generator().manual_seed(4)
    modules = {}
    for component, model in components.items():
        for target, layer in kohya_targets(component, model, conv=conv).items():
            out, *inner = layer.weight.shape
            rank, own_alpha = (2, conv_alpha) if inner[1:] == [3, 3] else (4, alpha)
            down = torch.randn(rank, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
            up = 0.2 * torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator)
            modules[target] = LoraModule(down, up, own_alpha)
    return Adapter(modules, metadata or {})


def assert_same_adapter(found: Adapter, expected: Adapter) -> None:
    assert sorted(found.modules) == sorted(expected.modules)
    for target, module in expected.lora_modules("this check").items():
        read = found.lora_modules("this check")[target]
        assert torch.equal(read.down, module.down), target
        assert torch.equal(read.up, module.up), target
        assert read.alpha == module.alpha, target
        assert read.mid is None and module.mid is None


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "a.safetensors", metadata=metadata)
    return folder / "a.safetensors"


def one_module(rank: int = 2, prefix: str = "unet.") -> dict[str, Tensor]:
    name = f"{prefix}conv_in"
    return {f"{name}.lora_A.weight": torch.ones(rank, 4), f"{name}.lora_B.weight": torch.ones(8, rank)}


def kohya_module(name: str = "lora_unet_conv_in", **others: Tensor) -> dict[str, Tensor]:
    """down [2, 4], up [8, 2], alpha 1, with changes; the underscore of "lora_up_weight" is a dot."""
    parts = {"lora_down_weight": torch.ones(2, 4), "lora_up_weight": torch.ones(8, 2), "alpha": torch.ones(1), **others}
    return {f"{name}.{part.replace('_weight', '.weight')}": value for part, value in parts.items()}


def write_adapter(adapter: Adapter, form: Form, folder: Path) -> Path:
    """A file in that form, with what has to lie beside it."""
    tensors = adapter_tensors(adapter, form)
    path = write_tensors(
        folder, tensors, form_metadata(adapter, form, tensors, output_name="a", date="2026-01-02T03:04:05")
    )
    if form == "peft":
        path = path.rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(peft_config(adapter)))
    return path


def with_many_alphas(adapter: Adapter) -> Adapter:
    """The adapter with alphas of three sizes in each kind of layer."""
    lora = adapter.lora_modules("this test")
    modules = {t: replace(m, alpha=m.alpha + number % 3) for number, (t, m) in enumerate(lora.items())}
    return replace(adapter, modules=modules)


def run_tiny(unet: nn.Module) -> Tensor:
    """One forward pass of the tiny SD1.5's U-Net."""
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 64, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([321]), text).sample


def write_lora(base: Path, path: Path) -> Network:
    """Write a kohya file of adapters for the U-Net of `base`; returns them."""
    network = train_lora(load_unet(str(base)))
    tensors = network.tensors()
    metadata = adapter_metadata(
        SPEC, tensors, output_name=path.stem, date="2026-01-02T03:04:05", resolution=(128, 128), base_model=str(base)
    )
    save_file(tensors, path, metadata=metadata)
    return network
