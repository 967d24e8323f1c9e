"""A U-Net with adapters and AlignHeads, from a training state or an adapter file, and the features that it extracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.inference.reference import ReferenceHeads
from library.merging.merge import fold_into_modules
from library.merging.source import read_source
from library.models.load import load_scheduler_config, load_unet
from library.models.locate import locate_base
from library.options.model import teacher_name
from library.training.alignment import LATENTS, PART
from library.training.randomness import seed_of
from library.training.saving import StepSaving
from library.training.state import read_facts, read_tensors
from networks.align_head import AlignHeads, head_key, head_name
from networks.families import SD15, UNET
from networks.features import capture
from networks.network import Network, add_network
from networks.spec import NetworkSpec

What = Literal["tokens", "pooled", "map"]
EMA = "ema.safetensors"


@dataclass
class FeatureModel:
    """The U-Net, adapters and heads of a state, ready to run on clean latents."""

    unet: Any
    heads: AlignHeads
    parametrisation: Parametrisation
    dtype: torch.dtype
    network: Network | None = None
    """The adapters in the U-Net, where they can be switched off."""
    teacher_norm: float = 0.0
    """With which the heads' targets were normalised; see `spatially_normalised`."""

    @torch.no_grad()
    def extract(
        self, latents: torch.Tensor, text: torch.Tensor, *, timestep: int, what: What, tap: str, seed: int
    ) -> torch.Tensor:
        """See `extract_features`."""
        if not 0 <= timestep < self.parametrisation.timesteps:
            raise UserError(f"timestep must lie in 0..{self.parametrisation.timesteps - 1}, got {timestep}.")
        if what != "map" and tap not in self.heads:
            trained = ", ".join(self.heads) or "none"
            raise UserError(
                f"This state has no AlignHead at {tap} (heads: {trained}). Ask for what='map', or another tap."
            )
        device = latents.device
        generator = torch.Generator(device).manual_seed(seed_of(seed, "features"))
        noise = torch.randn(latents.shape, generator=generator, device=device)
        timesteps = torch.full((latents.shape[0],), timestep, device=device)
        noisy = self.parametrisation.add_noise(latents.float(), noise, timesteps)
        with capture(self.unet, [tap] if what == "map" else self.heads.captured) as features:
            self.unet(noisy.to(self.dtype), timesteps, text.to(device, self.dtype), return_dict=False)
        if what == "map":
            return features[tap].float()
        tokens = self.heads.tokens(tap, features)
        return tokens if what == "tokens" else tokens.mean(dim=1)


def load_feature_model(
    state: Path | str, *, use_ema: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> FeatureModel:
    """The model of a train_repa state, with its averaged weights where it has them; its adapters can be switched off.

    Raises UserError where `state` is incomplete.
    """
    state = Path(state)
    facts = read_facts(state)
    base = locate_base(facts["base_model"], (UNET, "scheduler"))
    unet = load_unet(base, dtype=dtype, device=device)
    spec = replace(NetworkSpec.from_json(facts["network"]), text_encoder=False)
    network = add_network({UNET: unet}, spec, seed=0)
    saved = read_tensors(state / f"{StepSaving.part(UNET)}.safetensors")
    if use_ema and (state / EMA).is_file():
        saved |= read_tensors(state / EMA)
    with torch.no_grad():
        for name, parameter in network.parameters.items():
            parameter.copy_(saved[name])
    unet.requires_grad_(False).eval()
    heads = read_heads(state, use_ema=use_ema).to(device)
    parametrisation = parametrisation_of(load_scheduler_config(base), device)
    norm = facts["options"].get("teacher_norm", 0.0)
    return FeatureModel(unet, heads, parametrisation, dtype, network, norm)


def read_heads(state: Path, *, use_ema: bool = True) -> AlignHeads:
    """The AlignHeads of a state of train_repa or train_network, without the model; empty where the state has none.

    use_ema: their moving average, where the state has one. Raises UserError where `state` is incomplete.
    """
    options = read_facts(state)["options"]
    if not (state / f"{PART}.safetensors").is_file():
        return AlignHeads({}, {})
    saved = read_tensors(state / f"{PART}.safetensors")
    if use_ema and (state / EMA).is_file():
        saved |= {name: value for name, value in read_tensors(state / EMA).items() if name in saved}
    tensors = {name.removeprefix(f"{PART}."): value for name, value in saved.items()}
    taps = options["taps"]

    def first_weight(tap: str, teacher: str | None) -> torch.Tensor:  # [D, channels, ...]
        return tensors[f"{head_key(head_name(tap, teacher))}.proj.0.weight"]

    heads = AlignHeads(
        {tap: first_weight(tap, None).shape[1] for tap in taps},
        {
            name: first_weight(taps[0], name if number else None).shape[0]
            for number, name in enumerate(teachers_of(options))
        },
        grid=options["token_grid"],
        kind=options["align_head"],
        time_width=next((value.shape[1] for name, value in tensors.items() if name.endswith("film.weight")), None),
    )
    heads.load_state_dict(tensors)
    return heads


def teachers_of(options: Mapping[str, Any]) -> dict[str, str]:
    """What the teachers of a run are called -> hub id, folder or file. options: as a state has them, where a lone one is a text."""
    if options.get("manifold_target") == LATENTS:
        return {LATENTS: ""}
    given = options["dino_model"]
    models = [given] if isinstance(given, str) else given
    return {teacher_name(one): one for one in models}


def reference_heads(state: Path, teacher: str | None = None) -> ReferenceHeads:
    """The heads of a state, and how its (first) teacher was shown pictures, to steer drawing with. teacher: where it is now.

    Raises UserError where `state` is incomplete or its heads learned no tokens of a teacher.
    """
    facts = read_facts(state)
    options = facts["options"]
    if options.get("token_weight", 1.0) == 0:
        raise UserError(
            f"The AlignHeads of {state} learned how tokens relate to each other, not the teacher's tokens (token_weight 0): they "
            "cannot compare a picture with a photo. Name a state of a run with a token_weight above 0."
        )
    given = options["dino_resolution"]
    asked = [given] if isinstance(given, int) else given
    stores = [producer for name, producer in facts["caches"].items() if name.startswith("tokens ")]
    return ReferenceHeads(
        state,
        read_heads(state),
        base_model=facts["base_model"],
        family=facts["family"],
        teacher=teacher or next(iter(teachers_of(options).values())),
        teacher_weights=next((producer["weights"] for producer in stores if "weights" in producer), None),
        cache_dir=Path(options["cache_dir"]),
        layer=options.get("teacher_layer"),
        resolution=next((one["dino_resolution"] for one in stores if "dino_resolution" in one), asked[0]),
        grid=options["token_grid"],
        norm=options.get("teacher_norm", 0.0),
    )


def load_folded_model(
    base_model: str,
    adapter: Path | None = None,
    *,
    heads: AlignHeads | None = None,
    weight: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FeatureModel:
    """An SD1.5 base, with the U-Net part of an adapter file folded in where one is given.

    heads: those trained with the adapter (`read_heads`). Modules of text encoders are left out: the embedding of the empty prompt
    comes from the caches, where the base's own text encoder made it.
    """
    base = locate_base(base_model, (UNET, "scheduler"))
    unet = load_unet(base)
    if adapter is not None:
        read = read_source(adapter).adapter
        modules = {target: module for target, module in read.modules.items() if target.component == UNET}
        if not modules:
            raise UserError(f"{adapter} has no modules of a U-Net: its features would be the base's.")
        with torch.no_grad():
            fold_into_modules({UNET: unet}, SD15, replace(read, modules=modules), weight)
    nn.Module.to(unet, device, dtype)  # diffusers' own warns of nothing
    parametrisation = parametrisation_of(load_scheduler_config(base), device)
    return FeatureModel(unet, (heads or AlignHeads({}, {})).to(device), parametrisation, dtype)


def extract_features(
    state: Path | str | FeatureModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    *,
    timestep: int = 261,
    what: What = "tokens",
    tap: str = "mid",
    seed: int = 0,
) -> torch.Tensor:
    """Features of clean `latents` [B, 4, h, w] (scaled, as cached) noised to `timestep`, under prompts `text` [B, 77, D].

    what "tokens": the AlignHead's unit vectors [B, N, D]; "pooled": their mean [B, D]; "map": the U-Net's own feature
    map at `tap`, [B, C, h', w'], for dense tasks. All float32. Use the empty prompt for classification: a class prompt
    gives the label away. The default timestep is DIFT's (Tang et al. 2023). state: a folder, or load_feature_model's.
    """
    model = state if isinstance(state, FeatureModel) else load_feature_model(state, device=latents.device)
    return model.extract(latents, text, timestep=timestep, what=what, tap=tap, seed=seed)
