"""Frozen Stable Diffusion components from a folder, the hub or a single file; all strict, in eval mode, without gradients.

Who calls says which families of models it can deal with: SD1.5 alone, unless `families` names more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.errors import UserError
from library.files import read_json
from library.models import single_file
from library.models.base_family import family_of, require_family
from library.models.base_schedule import folder_scheduler_config
from library.models.clip_tokenizer import PADS, folder_tokenizer, tokenizer_for
from library.models.configs import configs_of, published_family
from library.models.locate import BaseLocation, base_status, locate_base, weight_files
from library.models.lone_vae import LoneVae, check_lone_vae, locate_vae, lone_keys
from library.models.quantised import unscaled
from library.models.weights import assemble, read_tensors
from library.progress import doing
from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER_2, TOKENIZERS, UNET, VAE, Family
from networks.names import current_key
from networks.original_names import original_place

Base = BaseLocation | str
Device = torch.device | str
Families = Collection[Family]


class TextPart(NamedTuple):
    """A text encoder of a model, and the tokenizer that goes with it."""

    component: str
    tokenizer: CLIPTokenizer
    model: CLIPTextModel | CLIPTextModelWithProjection


def load_unet(
    base: Base, *, families: Families = (SD15,), dtype: torch.dtype | None = torch.float32, device: Device = "cpu"
) -> UNet2DConditionModel:
    """The U-Net, frozen. Raises UserError when it is of another family, or tensors and configuration do not fit.

    dtype: None leaves each tensor in the file's.
    """
    location = _located(base, UNET)
    family = family_of(location, families)
    config = _unet_config(location, family)
    tensors = component_tensors(location, family, UNET)
    where = f"The U-Net of {location.path}"
    return assemble(lambda: UNet2DConditionModel.from_config(config), tensors, where, dtype=dtype, device=device)


def load_vae(
    base: Base,
    *,
    families: Families = (SD15,),
    serves: Family | None = None,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> AutoencoderKL:
    """The autoencoder, frozen; its config holds scaling_factor.

    serves: the family of the base that it is used with, whose own it need not be: it may be of any family, or alone.
    """
    location = base if isinstance(base, BaseLocation) else locate_vae(base)
    if isinstance(location, LoneVae):
        config, tensors = _lone_vae(location, serves or next(iter(families)))
    else:
        family = family_of(location, families if serves is None else FAMILIES.values())
        if location.is_file:
            config = single_file.file_vae_config(location.path, family)
        else:
            config = _component_config(location, VAE, "AutoencoderKL")
        tensors = component_tensors(location, family, VAE)
    where, remedy = f"The VAE of {location.path}", "Fetch it again, or name another autoencoder with --vae."
    return assemble(
        lambda: AutoencoderKL.from_config(config), tensors, where, dtype=dtype, device=device, remedy=remedy
    )


def _lone_vae(vae: LoneVae, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a lone autoencoder that serves a family."""
    check_lone_vae(vae, family)
    with doing(f"reading {vae.path.name}"):
        stored = unscaled(read_tensors(vae.path))
    tensors = {
        key: single_file.as_in_diffusers(stored[name], original_place(family, VAE, key))
        for name, key in lone_keys(stored, family).items()
    }
    config = vae.config
    if config is None:
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        config = single_file.vae_config(single_file.Sizes(vae.path, family, VAE, shapes), family)
    return {**config, "scaling_factor": vae.scaling_factor(family)}, tensors


def load_text_encoders(
    base: Base,
    *,
    families: Families = (SD15, SDXL),
    dtype: torch.dtype | None = torch.float32,
    device: Device = "cpu",
) -> list[TextPart]:
    """Every text encoder of the model with its tokenizer, frozen, in the order in which the U-Net takes their states.

    The second one of SDXL is a CLIPTextModelWithProjection; its tokenizer pads with id 0.
    """
    location = _located(base)
    family = family_of(location, families)
    return [text_part(location, family, component, dtype, device) for component in family.text_encoders]


def load_scheduler_config(base: Base) -> dict[str, Any]:
    """The noise schedule the base was trained with, as diffusers' scheduler_config.json has it."""
    location = _located(base, "scheduler")
    if location.is_file:
        return single_file.file_scheduler_config(location.path, family_of(location))
    return folder_scheduler_config(location.path)


def unet_config(base: Base, *, families: Families = (SD15,)) -> dict[str, Any]:
    """The U-Net's configuration without its weights, for a build on the meta device.

    Of a hub id known to be a published model and not on this machine, the bundled one: nothing is fetched for it. Any
    other absent base is a UserError.
    """
    if isinstance(base, str) and (absent := base_status(base, (UNET,))):
        published = published_family(base)
        if published is None:
            raise UserError(absent)
        return dict(configs_of(require_family(published, families, base)).unet)
    location = _located(base, UNET)
    return _unet_config(location, family_of(location, families))


def _unet_config(location: BaseLocation, family: Family) -> dict[str, Any]:
    if location.is_file:
        return single_file.file_unet_config(location.path, family)
    return _component_config(location, UNET, "UNet2DConditionModel")


def text_part(
    location: BaseLocation, family: Family, component: str, dtype: torch.dtype | None, device: Device
) -> TextPart:
    """One text encoder with its tokenizer, frozen. Raises UserError when the two are of different vocabularies."""
    kind, config = _text_kind(component), text_config(location, family, component)
    if location.is_file:
        tokenizer = tokenizer_for(config.vocab_size, str(location.path), PADS[component])
    else:
        tokenizer = folder_tokenizer(location.path / TOKENIZERS[component])
    name = component.replace("_", " ")
    if len(tokenizer) != config.vocab_size:
        raise UserError(
            f"The tokenizer of {location.path} has {len(tokenizer)} entries, its {name} {config.vocab_size}. They do "
            "not belong together."
        )
    tensors = component_tensors(location, family, component)
    where = f"The {name} of {location.path}"
    return TextPart(component, tokenizer, assemble(lambda: kind(config), tensors, where, dtype=dtype, device=device))


def text_config(location: BaseLocation, family: Family, component: str) -> CLIPTextConfig:
    """The configuration of one text encoder."""
    if location.is_file:
        return CLIPTextConfig(**single_file.file_text_config(location.path, family, component))
    return CLIPTextConfig.from_dict(_component_config(location, component, _text_kind(component).__name__))


def _text_kind(component: str) -> type[CLIPTextModel] | type[CLIPTextModelWithProjection]:
    return CLIPTextModelWithProjection if component == TEXT_ENCODER_2 else CLIPTextModel


def component_tensors(location: BaseLocation, family: Family, component: str) -> dict[str, Tensor]:
    """A component's tensors under the names of today's models."""
    with doing(f"reading {component} of {location.path.name}"):
        if location.is_file:
            return single_file.file_tensors(location.path, family, component)
        stored = unscaled(read_tensors(weight_files(location.path, component)))
    named = ((current_key(component, name), value) for name, value in stored.items())
    return {key: value for key, value in named if key is not None}


def _located(base: Base, *components: str) -> BaseLocation:
    """`components`: what is needed of it; none named means all."""
    return base if isinstance(base, BaseLocation) else locate_base(base, components or None)


def _component_config(location: BaseLocation, component: str, class_name: str) -> dict[str, Any]:
    path = location.path / component / "config.json"
    config = read_json(path)
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), class_name)
    if found not in (class_name, f"{class_name}WithProjection"):  # the projection is left out on reading
        raise UserError(f"{path} describes a {found}. A {class_name} is needed here.")
    return config
