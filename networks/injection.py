"""Adapted layers put in the place of a model's: PEFT's, turned into those of a network, and OFT's own."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from networks import lora_layers, lycoris_layers
from networks.adapted_layer import AdaptedLayer
from networks.lora import ADAPTER
from networks.spec import NetworkSpec

Sizes = Mapping[str, tuple[int, float]]
"""Path in the model -> rank and alpha."""


def inject(model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
    """Put an adapter on the module at each path, in place. Weights are still to be made."""
    if not sizes:
        return {}
    if spec.algo == "oft":
        layers = {path: _replace(model, path, rank, spec) for path, (rank, _) in sizes.items()}
    else:
        layers = _peft_layers(model, sizes, spec)
    for path, layer in layers.items():
        model.get_submodule(path).train(
            layer.base_layer.training
        )  # new modules are in training mode, whatever the model is in
    return layers


def _peft_layers(model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
    config, to_adapted = _peft(sizes, spec)
    # On the meta device PEFT draws nothing from the global generator and casts nothing to the dtype of the base.
    with _without_collector():
        inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    return {path: to_adapted(model.get_submodule(path), spec, rank, alpha) for path, (rank, alpha) in sizes.items()}


@contextmanager
def _without_collector() -> Iterator[None]:
    """So many objects are made here that Python's collector goes through those of all libraries: measured, half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _peft(sizes: Sizes, spec: NetworkSpec) -> tuple[Any, Callable[..., AdaptedLayer]]:
    """PEFT's configuration, and what makes a network's layer of one of PEFT's."""
    (rank, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in zip(*sizes.values(), strict=True))
    common: dict[str, Any] = {
        "r": rank,
        "target_modules": "|".join(map(re.escape, sizes)),
        "rank_pattern": {re.escape(path): own for path, (own, _) in sizes.items() if own != rank},
        "alpha_pattern": {re.escape(path): own for path, (_, own) in sizes.items() if own != alpha},
    }
    if spec.algo == "loha":
        return LoHaConfig(alpha=alpha, **common), lycoris_layers.to_adapted
    if spec.algo == "lokr":
        common |= {"decompose_both": spec.decompose_both, "decompose_factor": spec.factor}
        return LoKrConfig(alpha=alpha, **common), lycoris_layers.to_adapted
    return LoraConfig(lora_alpha=alpha, **common), lora_layers.to_adapted


def _replace(model: nn.Module, path: str, rank: int, spec: NetworkSpec) -> AdaptedLayer:
    parent, _, name = path.rpartition(".")
    layer = lycoris_layers.OftLayer(model.get_submodule(path), rank, spec)  # type: ignore[arg-type]
    setattr(model.get_submodule(parent), name, layer)
    return layer
