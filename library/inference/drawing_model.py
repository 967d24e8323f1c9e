"""A base model for drawing: loaded once, with adapters folded into its weights and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.scheduler_config import parametrisation_of
from library.inference.picture_request import Emphasis
from library.inference.prompt_encoding import PromptEncoder
from library.merging.merge import fold, place
from library.merging.strength import Strength
from library.models.base_family import family_of
from library.models.conditioning import Fusion
from library.models.encoders import pixels_of_latent
from library.models.load import TextPart, load_scheduler_config, load_text_encoders, load_unet, load_vae
from library.models.locate import BaseLocation
from networks.adapters import Adapter
from networks.families import UNET, Family


@dataclass
class DrawingModel:
    """The parts of a base on one device, in eval mode."""

    family: Family
    unet: Any
    """UNet2DConditionModel, perhaps compiled or with the adapter layers of a training"""
    parts: list[TextPart]
    vae: Any
    """AutoencoderKL"""
    parametrisation: Parametrisation
    dtype: torch.dtype
    """Of the U-Net's inputs."""
    fusion: Fusion | None = None
    """What to take in place of the text encoders' states."""
    folded: FoldedAdapters = field(init=False)

    def __post_init__(self) -> None:
        models = {UNET: self.unet, **{part.component: part.model for part in self.parts}}
        self.folded = FoldedAdapters(models, self.family)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return pixels_of_latent(self.vae)

    def encoder(self, clip_skip: int, emphasis: Emphasis) -> PromptEncoder:
        """Raises UserError for a layer that does not exist. SDXL's layer is fixed, whatever clip_skip says."""
        skip = 1 if self.family.text_layer is not None else clip_skip
        return PromptEncoder(self.family, self.parts, clip_skip=skip, emphasis=emphasis, fusion=self.fusion)

    def size_ids(self, width: int, height: int) -> list[float] | None:
        """The size condition of a family that has one (SDXL): an uncropped picture of this size."""
        return [height, width, 0, 0, height, width] if self.family.has_size_conditions else None

    def negative_size_ids(self, width: int, height: int) -> list[float] | None:
        """The size condition of the negative prompt."""
        return self.size_ids(width, height)


def load_model(
    base: BaseLocation,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    vae: BaseLocation | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
) -> DrawingModel:
    """Load a base. vae: another autoencoder. prediction_type, zero_terminal_snr: for bases whose files do not say.

    Raises UserError where a part cannot be loaded.
    """
    family = family_of(base)
    given = {} if prediction_type is None else {"prediction_type": prediction_type}
    parametrisation = parametrisation_of(load_scheduler_config(base) | given)
    if zero_terminal_snr:
        parametrisation = parametrisation.with_zero_terminal_snr()
    return DrawingModel(
        family,
        load_unet(base, families=(family,), dtype=dtype, device=device),
        load_text_encoders(base, families=(family,), dtype=dtype, device=device),
        load_drawing_vae(base if vae is None else vae, family, dtype=dtype, device=device),
        parametrisation,
        dtype,
    )


def load_drawing_vae(
    base: BaseLocation, family: Family, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The autoencoder of a base, or of another model of either family, or one alone; float32 where float16 would overflow.

    SDXL's says so itself (force_upcast). Raises UserError where it cannot be loaded.
    """
    vae = load_vae(base, serves=family, dtype=dtype, device=device)
    if dtype == torch.float16 and vae.config.get("force_upcast", family.vae_overflows):
        return load_vae(base, serves=family, dtype=torch.float32, device=device)
    return vae


class FoldedAdapters:
    """Adapters folded into models' weights, exchanged in place: W = W0 + sum of ratio * update, rounded once from float32.

    Every change starts from W0, so that rounding errors do not add up. keeps_originals: whether W0 of the adapted weights is kept
    on the device; without it, adapters can be folded in only once.
    """

    def __init__(self, models: Mapping[str, nn.Module], family: Family) -> None:
        self.models, self.family = models, family
        self.keeps_originals = True
        self._originals: dict[str, dict[str, Tensor]] = {}
        self._now: dict[str, tuple[tuple[Adapter, float], ...]] = {}

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise UserError, with the likely reason, for an adapter that does not fit these models."""
        shapes = {
            component: {key: tuple(value.shape) for key, value in model.state_dict().items()}
            for component, model in self.models.items()
        }
        for adapter in adapters:
            place([(adapter, Strength())], shapes, self.family)

    @torch.no_grad()
    def set_unet(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._set(UNET, adapters)

    @torch.no_grad()
    def set_text(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        for component in self.models:
            if component != UNET:
                self._set(component, adapters)

    def _set(self, component: str, adapters: Sequence[tuple[Adapter, float]]) -> None:
        wanted = tuple((adapter, ratio) for adapter, ratio in adapters if ratio != 0)
        before = self._now.get(component, ())
        if [(id(adapter), ratio) for adapter, ratio in wanted] == [(id(adapter), ratio) for adapter, ratio in before]:
            return
        if before and not self.keeps_originals:
            raise ValueError(f"the {component} has adapters that cannot be taken out again")
        own = [(_only(adapter, component), Strength(ratio)) for adapter, ratio in wanted]
        weights = self.models[component].state_dict()  # holds the parameters themselves
        shapes = {component: {key: tuple(value.shape) for key, value in weights.items()}}
        folds = place([(adapter, strength) for adapter, strength in own if adapter.modules], shapes, self.family)
        originals = self._originals.setdefault(component, {})
        for key in originals.keys() - folds[component].keys():
            weights[key].copy_(originals[key])
        for key, parts in folds[component].items():
            weight = weights[key]
            if self.keeps_originals and key not in originals:
                originals[key] = weight.clone()
            weight.copy_(fold(originals.get(key, weight), parts))
        self._now[component] = wanted


def _only(adapter: Adapter, component: str) -> Adapter:
    return replace(adapter, modules={t: module for t, module in adapter.modules.items() if t.component == component})
