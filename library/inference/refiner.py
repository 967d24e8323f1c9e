"""Refiners: models that draw the last steps. Any base of the same family, or SDXL's own refiner (arXiv 2307.01952, 2.5).

SDXL's refiner uses the second text encoder alone, and is conditioned on an aesthetic score instead of a target size.
"""

from __future__ import annotations

import torch
from diffusers.models import UNet2DConditionModel
from torch import nn

from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.files import read_json
from library.inference.drawing_model import DrawingModel, load_model
from library.models.base_family import family_of
from library.models.header import read_shapes
from library.models.load import component_tensors, load_scheduler_config, text_part
from library.models.locate import REFINER_COMPONENTS, BaseLocation, locate_base
from library.models.weights import assemble
from networks.families import SDXL, TEXT_ENCODER_2, UNET, Family

_FILE_MARK = "conditioner.embedders.0.model."  # where the base has its first text encoder
# Aesthetic scores of positive and negative prompts, as in diffusers and A1111.
_POSITIVE_SCORE, _NEGATIVE_SCORE = 6.0, 2.5


class SdxlRefiner(DrawingModel):
    """SDXL's refiner. The base's autoencoder decodes its latents."""

    def size_ids(self, width: int, height: int) -> list[float]:
        return [height, width, 0, 0, _POSITIVE_SCORE]

    def negative_size_ids(self, width: int, height: int) -> list[float]:
        return [height, width, 0, 0, _NEGATIVE_SCORE]


def load_refiner(name: str, base: DrawingModel, *, dtype: torch.dtype, device: torch.device | str) -> DrawingModel:
    """Raises UserError where it cannot be loaded, or is of another family than `base`."""
    location = locate_refiner(name, base.family)
    if _is_sdxl_refiner(location):
        return _load_sdxl_refiner(location, base.vae, dtype=dtype, device=device)
    return load_model(location, dtype=dtype, device=device)


def locate_refiner(name: str, family: Family) -> BaseLocation:
    """Find or download it, without loading. Raises UserError where it is not of the base's family."""
    location = _locate(name)
    found = SDXL if _is_sdxl_refiner(location) else family_of(location)
    if found != family:
        raise UserError(
            f"refiner {name} is for {found.title}, and the base is {family.title}: their latents are not compatible."
        )
    return location


def _locate(name: str) -> BaseLocation:
    """A base, or else SDXL's refiner, which has no first text encoder and would be incomplete as a base."""
    try:
        return locate_base(name)
    except UserError as as_base:
        try:
            return locate_base(name, REFINER_COMPONENTS)
        except UserError:
            raise as_base from None


def _is_sdxl_refiner(location: BaseLocation) -> bool:
    """Whether a folder's U-Net takes sizes, and text as wide as the second encoder's alone.

    Raises UserError for the refiner as a single file.
    """
    if location.is_file:
        if any(name.startswith(_FILE_MARK) for name in read_shapes(location.path)):
            raise UserError(
                f"{location.path} is SDXL's refiner as a single file, which is not read here. Name its diffusers folder, or "
                "stabilityai/stable-diffusion-xl-refiner-1.0."
            )
        return False
    unet, text = (location.path / part / "config.json" for part in (UNET, TEXT_ENCODER_2))
    if not (unet.is_file() and text.is_file()):
        return False
    values = read_json(unet)
    sizes = values.get("addition_embed_type") == "text_time"
    return sizes and values.get("cross_attention_dim") == read_json(text).get("hidden_size")


def _load_sdxl_refiner(
    location: BaseLocation, vae: nn.Module, *, dtype: torch.dtype, device: torch.device | str
) -> SdxlRefiner:
    config = read_json(location.path / UNET / "config.json")
    unet = assemble(
        lambda: UNet2DConditionModel.from_config(config),
        component_tensors(location, SDXL, UNET),
        f"The U-Net of {location.path}",
        dtype=dtype,
        device=device,
    )
    part = text_part(location, SDXL, TEXT_ENCODER_2, dtype, device)
    return SdxlRefiner(SDXL, unet, [part], vae, parametrisation_of(load_scheduler_config(location)), dtype)
