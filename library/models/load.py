"""Frozen Stable Diffusion components from a folder, the hub or a single file; all strict, in eval mode, without gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.errors import UserError
from library.files import read_json
from library.models import single_file
from library.models.clip_tokenizer import tokenizer_for
from library.models.locate import BaseLocation, base_status, is_sd15_hub_id, locate_base, weight_files
from library.models.sd15_configs import SD15_UNET
from library.models.weights import assemble, read_tensors

Base = BaseLocation | str
Device = torch.device | str


def load_unet(base: Base, *, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> UNet2DConditionModel:
    """The U-Net, frozen. Raises UserError when its tensors and configuration do not belong together, or it is SDXL's."""
    location = _located(base, "unet")
    config = unet_config(location)
    if location.is_file:
        tensors = single_file.file_unet_tensors(location.path, config)
    else:
        tensors = read_tensors(weight_files(location.path, "unet"))
    where = f"The U-Net of {location.path}"
    return assemble(lambda: UNet2DConditionModel.from_config(config), tensors, where, dtype=dtype, device=device)


def load_vae(base: Base, *, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> AutoencoderKL:
    """The autoencoder, frozen; its config holds scaling_factor."""
    location = _located(base, "vae")
    if location.is_file:
        config = single_file.file_vae_config(location.path)
        tensors = single_file.file_vae_tensors(location.path, config)
    else:
        config = _component_config(location, "vae", "AutoencoderKL")
        tensors = _current_attention_names(read_tensors(weight_files(location.path, "vae")))
    where = f"The VAE of {location.path}"
    return assemble(lambda: AutoencoderKL.from_config(config), tensors, where, dtype=dtype, device=device)


def load_text_encoder(
    base: Base, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """CLIP's tokenizer and text encoder, frozen. Raises UserError when the two are of different vocabularies."""
    location = _located(base, "text_encoder", "tokenizer")
    if location.is_file:
        config = CLIPTextConfig(**single_file.file_text_config(location.path))
        tensors = single_file.file_text_tensors(location.path)
        tokenizer = tokenizer_for(config.vocab_size, str(location.path))
    else:
        config = CLIPTextConfig.from_dict(_component_config(location, "text_encoder", "CLIPTextModel"))
        tensors = read_tensors(weight_files(location.path, "text_encoder"))
        tokenizer = _folder_tokenizer(location.path / "tokenizer")
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"The tokenizer of {location.path} has {len(tokenizer)} entries, its text encoder {config.vocab_size}. They do "
            "not belong together."
        )
    where = f"The text encoder of {location.path}"
    tensors = _prefixed_text_names(tensors)
    return tokenizer, assemble(lambda: CLIPTextModel(config), tensors, where, dtype=dtype, device=device)


def load_scheduler_config(base: Base) -> dict[str, Any]:
    """The noise schedule the base was trained with, as diffusers' scheduler_config.json has it."""
    location = _located(base, "scheduler")
    if location.is_file:
        return single_file.file_scheduler_config(location.path)
    return read_json(location.path / "scheduler" / "scheduler_config.json")


def unet_config(base: Base) -> dict[str, Any]:
    """The U-Net's configuration without its weights, for a build on the meta device.

    Of a hub id known to be SD1.x and not on this machine, the bundled one: nothing is fetched for it. Any other absent
    base is a UserError.
    """
    if isinstance(base, str) and (absent := base_status(base, ("unet",))):
        if is_sd15_hub_id(base):
            return dict(SD15_UNET)
        raise UserError(absent)
    location = _located(base, "unet")
    if location.is_file:
        return single_file.file_unet_config(location.path)
    config = _component_config(location, "unet", "UNet2DConditionModel")
    if config.get("addition_embed_type") == "text_time":
        raise UserError(
            f"{location.path} looks like SDXL (it has size conditions). An SD1.5 base model is needed here."
        )
    return config


def _located(base: Base, *components: str) -> BaseLocation:
    return base if isinstance(base, BaseLocation) else locate_base(base, components)


def _component_config(location: BaseLocation, component: str, class_name: str) -> dict[str, Any]:
    path = location.path / component / "config.json"
    config = read_json(path)
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), class_name)
    if found != class_name:
        raise UserError(f"{path} describes a {found}. A {class_name} is needed here.")
    return config


def _current_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers 0.17 and before (SD1.5's own VAE on the hub still has them) to those of today."""
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def renamed(name: str) -> str:
        module, _, last = name.rpartition(".")
        parent, _, layer = module.rpartition(".")
        return f"{parent}.{today[layer]}.{last}" if ".attentions." in name and layer in today else name

    return {renamed(name): value for name, value in tensors.items()}


def _prefixed_text_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPTextModel's names in transformers < 5.6, also where 5.6 or a converter left `text_model.` out.

    Older files hold the index buffer position_ids as well, which is no longer part of the model.
    """
    return {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def _folder_tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder} holds no readable CLIP tokenizer: {reason}. vocab.json and merges.txt are needed."
        ) from error
