"""Features of held-out pictures at the taps of a U-Net: what a forward pass leaves before and after the AlignHead.

The prompt is always the empty one: a class prompt would give the label away. The noise belongs to (seed, picture,
timestep), so that every model sees the same inputs whatever the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.evaluation.feature_model import FeatureModel
from library.evaluation.held_out import StoredPictures
from library.evaluation.similarity import pool_tokens
from library.merging.merge import fold_into_modules
from library.merging.source import read_source
from library.models.load import load_scheduler_config, load_unet
from library.models.locate import locate_base
from library.training.alignment import PART
from library.training.randomness import sample_noise
from library.training.state import read_facts, read_tensors
from networks.align_head import AlignHeads
from networks.families import SD15, UNET
from networks.features import capture


@dataclass
class Tapped:
    """Of n pictures, on the CPU in float32: `maps` [n, C, h, w]; tokens of the head [n, N, D], None without one."""

    maps: Tensor
    tokens: Tensor | None

    @property
    def trunk(self) -> Tensor:
        """The map's mean over its places, [n, C]."""
        return self.maps.mean(dim=(2, 3))

    @property
    def head(self) -> Tensor | None:
        """Pooled tokens, [n, D]."""
        return None if self.tokens is None else pool_tokens(self.tokens)


@torch.no_grad()
def tapped(
    model: FeatureModel,
    samples: StoredPictures,
    empty_prompt: Tensor,
    *,
    tap: str,
    timestep: int,
    seed: int,
    batch_size: int,
) -> Tapped:
    """Features of all `samples` at one timestep. empty_prompt: [77, D] embedding of the empty prompt."""
    device = next(model.unet.parameters()).device
    head = dict(model.heads.items()).get(tap)
    text = empty_prompt.to(device, model.dtype)
    maps, tokens = [], []
    with capture(model.unet, [tap]) as features, _ended_after(model.unet, tap):
        for start in range(0, len(samples), batch_size):
            indices = range(start, min(start + batch_size, len(samples)))
            latents = samples.read_latents(indices)
            ids = [f"{samples.sample_ids[i]}@{timestep}" for i in indices]
            noise = sample_noise(seed, ids, tuple(latents.shape[1:]))
            timesteps = torch.full((len(indices),), timestep, device=device)
            noisy = model.parametrisation.add_noise(latents.to(device), noise.to(device), timesteps)
            with suppress(_Ended):
                model.unet(noisy.to(model.dtype), timesteps, text.expand(len(indices), -1, -1), return_dict=False)
            maps.append(features[tap].float().cpu())
            if head is not None:
                tokens.append(head(features[tap]).float().cpu())
    return Tapped(torch.cat(maps), torch.cat(tokens) if tokens else None)


def read_heads(state: Path, *, use_ema: bool = True) -> AlignHeads:
    """The AlignHeads of a state, of train_repa or train_network, without the model they belong to; none where it has none.

    use_ema: their moving average, where the state has one. Raises UserError where `state` is no whole state.
    """
    options = read_facts(state)["options"]
    if not (state / f"{PART}.safetensors").is_file():
        return AlignHeads({}, 0)
    saved = read_tensors(state / f"{PART}.safetensors")
    if use_ema and (state / "ema.safetensors").is_file():
        saved |= {name: value for name, value in read_tensors(state / "ema.safetensors").items() if name in saved}
    tensors = {name.removeprefix(f"{PART}."): value for name, value in saved.items()}
    first = {tap: tensors[f"{tap}.proj.0.weight"] for tap in options["taps"]}  # [D, channels, ...]
    width = next(iter(first.values())).shape[0]
    heads = AlignHeads(
        {tap: value.shape[1] for tap, value in first.items()},
        width,
        grid=options["token_grid"],
        kind=options["align_head"],
    )
    heads.load_state_dict(tensors)
    return heads


def load_folded_model(
    base_model: str,
    adapter: Path | None = None,
    *,
    heads: AlignHeads | None = None,
    weight: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FeatureModel:
    """An SD1.5 base, with the U-Net part of an adapter of any script folded in where one is given.

    heads: those trained with the adapter (`read_heads`); none without. Modules of text encoders are left out: the empty
    prompt comes from the caches, as the base's encoder made it.
    """
    base = locate_base(base_model, (UNET, "scheduler"))
    unet = load_unet(base)
    if adapter is not None:
        read = read_source(adapter).adapter
        modules = {target: module for target, module in read.modules.items() if target.component == UNET}
        if not modules:
            raise UserError(f"{adapter} has no modules of a U-Net, so the features are the base's.")
        with torch.no_grad():
            fold_into_modules({UNET: unet}, SD15, replace(read, modules=modules), weight)
    nn.Module.to(unet, device, dtype)  # diffusers' own warns of nothing
    parametrisation = parametrisation_of(load_scheduler_config(base), device)
    return FeatureModel(unet, (heads or AlignHeads({}, 0)).to(device), parametrisation, dtype)


class _Ended(Exception):
    """The tap was passed: nothing behind it is needed."""


@contextmanager
def _ended_after(unet: Any, tap: str) -> Iterator[None]:
    """Within the context a forward pass stops behind `tap`, which saves the decoder. Enter it after capture()."""
    last = unet.up_blocks[0] if tap == "dec_first" else unet.mid_block

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Ended

    hook = last.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()
