"""Bases of the real size with random weights, and pictures to train on: for what no download is needed to measure."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from common import RESULTS  # noqa: F401  # puts the project on the path

if TYPE_CHECKING:
    from torch import nn

    from networks.families import Family
    from networks.spec import NetworkSpec

PICTURES = 8
# Random numbers that all weights are made of: 32 MB in float16. Drawing each anew would take a minute for SDXL.
BLOCK = 1 << 24


def random_base(folder: Path, family_key: str) -> Path:
    """The random checkpoint of a family in `folder`, 2 GB or 7 GB; made where it is not there yet."""
    path = folder / f"random_{family_key}.safetensors"
    if not path.exists():
        unfinished = random_checkpoint(path.with_suffix(".tmp"), family_key)
        os.replace(unfinished, path)
    return path


def random_checkpoint(path: Path, family_key: str) -> Path:
    """An original single file, float16, of the family's names and shapes; one tensor in memory at a time."""
    import torch

    from library.models.tensor_files import NewTensor, write_tensor_file
    from networks.families import FAMILIES
    from networks.original_names import Form, original_place

    family = FAMILIES[family_key]
    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).half()
    tensors: dict[str, NewTensor] = {}
    for component, model in empty_models(family).items():
        for key, value in model.state_dict().items():
            place = original_place(family, component, key)
            shape = tuple(value.shape)
            if place.form is Form.CONVOLUTION:
                shape = (*shape, 1, 1)
            elif place.form is Form.STACKED:
                shape = (3 * shape[0], *shape[1:])
            elif place.form is Form.TRANSPOSED:
                shape = shape[::-1]
            is_norm = len(shape) == 1 and key.endswith("weight")

            def make(
                shape: tuple[int, ...] = shape, is_norm: bool = is_norm, number: int = len(tensors)
            ) -> list[torch.Tensor]:
                count = prod(shape)
                start = 7919 * number % max(BLOCK - count, 1)  # 7919 is a prime: each tensor begins elsewhere
                values = block.repeat(count // BLOCK + 1)[start : start + count].reshape(shape)
                return [values + 1.0 if is_norm else values]

            tensors[place.key] = NewTensor(place.key, torch.float16, shape, make=make)
    write_tensor_file(path, list(tensors.values()), {"format": "pt"})
    return path


def make_pictures(folder: Path, side: int) -> None:
    """PICTURES smooth random pictures with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        small = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of thing {number}", encoding="utf-8")


def lora_training(base: Path | str, pictures: Path, output: Path, cache: Path, **options: object) -> list[str]:
    """train_network.py and its options for a LoRA on the U-Net with all that does not change cached, a log line each step.

    options: batch, resolution, rank, steps, precision.
    """
    given = {
        "pretrained_model_name_or_path": base, "train_data_dir": pictures, "output_dir": output, "cache_dir": cache,
        "resolution": options["resolution"], "train_batch_size": options["batch"], "network_dim": options["rank"],
        "network_alpha": options["rank"], "max_train_steps": options["steps"], "mixed_precision": options["precision"],
        "log_every_n_steps": 1, "max_data_loader_n_workers": 2,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["train_network.py", *words, "--network_train_unet_only", "--cache_text_encoder_outputs"]


def random_lora(path: Path, spec: NetworkSpec) -> None:
    """A kohya file of the network's modules on full-size models, float16."""
    import torch
    from safetensors.torch import save_file

    from networks.adapter_export import adapter_tensors
    from networks.adapters import Adapter
    from networks.families import FAMILIES, VAE
    from networks.kinds.lora import LoraModule
    from networks.network import add_network

    family = FAMILIES[spec.family]
    models = {component: model for component, model in empty_models(family).items() if component != VAE}
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for target, layer in add_network(models, spec, seed=0).layers.items():
        down, up = (0.02 * torch.randn(factor.shape, generator=generator) for factor in layer.factors())
        modules[target] = LoraModule(down, up, layer.adapter_alpha)
    tensors = adapter_tensors(Adapter(modules), "kohya", torch.float16)
    save_file(tensors, path, metadata={"ss_base_model_version": family.base_version})


def empty_models(family: Family) -> dict[str, nn.Module]:
    """Component -> model on the meta device."""
    from accelerate import init_empty_weights
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from library.models.configs import configs_of
    from networks.families import TEXT_ENCODER_2, UNET, VAE

    configs = configs_of(family)
    with init_empty_weights():
        models = {UNET: UNet2DConditionModel.from_config(configs.unet), VAE: AutoencoderKL.from_config(configs.vae)}
        for component, config in configs.text_encoders.items():
            kind = CLIPTextModelWithProjection if component == TEXT_ENCODER_2 else CLIPTextModel
            models[component] = kind(CLIPTextConfig(**config))
    return models
