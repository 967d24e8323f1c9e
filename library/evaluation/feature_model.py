"""Representations of pictures from a trained state: for probes, retrieval and dense tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.models.load import load_scheduler_config, load_unet
from library.models.locate import locate_base
from library.training.randomness import seed_of
from library.training.saving import StepSaving
from library.training.state import read_facts, read_tensors
from networks.align_head import AlignHeads
from networks.families import UNET
from networks.features import capture, tap_channels
from networks.network import Network, add_network
from networks.spec import NetworkSpec

What = Literal["tokens", "pooled", "map"]


@dataclass
class FeatureModel:
    """The U-Net, adapters and heads of a state, ready to run on clean latents."""

    unet: Any
    heads: AlignHeads
    parametrisation: Parametrisation
    dtype: torch.dtype
    network: Network | None = None
    """The adapters in the U-Net, where they can be switched off."""

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
        with capture(self.unet, [tap]) as features:
            self.unet(noisy.to(self.dtype), timesteps, text.to(device, self.dtype), return_dict=False)
        if what == "map":
            return features[tap].float()
        tokens = self.heads[tap](features[tap])
        return tokens if what == "tokens" else tokens.mean(dim=1)


def load_feature_model(
    state: Path | str, *, use_ema: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> FeatureModel:
    """Rebuild the model that a train_repa state belongs to, with its averaged weights where it has them.

    Raises UserError where `state` is no whole state.
    """
    state = Path(state)
    facts = read_facts(state)
    options = facts["options"]
    base = locate_base(facts["base_model"], (UNET, "scheduler"))
    unet = load_unet(base, dtype=dtype, device=device)
    spec = replace(NetworkSpec.from_json(facts["network"]), text_encoder=False)
    network = add_network({UNET: unet}, spec, seed=0)
    taps = options["taps"] if options["alignment"] else []
    heads = AlignHeads(
        {tap: shape.channels for tap, shape in tap_channels(unet.config, taps).items()},
        facts["teacher_width"],
        grid=options["token_grid"],
        kind=options["align_head"],
    ).to(device)
    if use_ema and (state / "ema.safetensors").is_file():
        saved = read_tensors(state / "ema.safetensors")
    else:
        saved = read_tensors(state / f"{StepSaving.part(UNET)}.safetensors")
        if taps:
            saved |= read_tensors(state / "align_heads.safetensors")
    targets = {**network.parameters, **{f"align_heads.{name}": p for name, p in heads.named_parameters()}}
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(saved[name])
    unet.requires_grad_(False).eval()
    return FeatureModel(unet, heads, parametrisation_of(load_scheduler_config(base), device), dtype, network)


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
