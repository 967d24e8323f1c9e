"""The published configurations of each family, by component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.models.sd15_configs import (
    SD15_HUB_IDS,
    SD15_PIPELINE,
    SD15_SCHEDULER,
    SD15_TEXT_ENCODER,
    SD15_UNET,
    SD15_VAE,
)
from library.models.sdxl_configs import (
    SDXL_HUB_IDS,
    SDXL_PIPELINE,
    SDXL_SCHEDULER,
    SDXL_TEXT_ENCODER,
    SDXL_TEXT_ENCODER_2,
    SDXL_UNET,
    SDXL_VAE,
)
from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, Family


@dataclass(frozen=True)
class Configs:
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: dict[str, dict[str, Any]]
    """By component."""
    scheduler: dict[str, Any]
    pipeline: dict[str, Any]
    """model_index.json of a whole folder, without the version that diffusers stamps on it."""
    hub_ids: frozenset[str]
    """Repositories that hold exactly these, under diffusers' layout."""


_CONFIGS = {
    SD15.key: Configs(
        SD15_UNET, SD15_VAE, {TEXT_ENCODER: SD15_TEXT_ENCODER}, SD15_SCHEDULER, SD15_PIPELINE, SD15_HUB_IDS
    ),
    SDXL.key: Configs(
        SDXL_UNET,
        SDXL_VAE,
        {TEXT_ENCODER: SDXL_TEXT_ENCODER, TEXT_ENCODER_2: SDXL_TEXT_ENCODER_2},
        SDXL_SCHEDULER,
        SDXL_PIPELINE,
        SDXL_HUB_IDS,
    ),
}


def configs_of(family: Family) -> Configs:
    """What the family's models were published with. Copy before changing anything."""
    return _CONFIGS[family.key]


def published_family(hub_id: str) -> Family | None:
    """The family of a hub id known to hold the published model, so that its configurations need no download."""
    return next((family for family in FAMILIES.values() if hub_id in configs_of(family).hub_ids), None)
