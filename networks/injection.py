"""Adapted layers put in the place of a model's: PEFT's, turned into those of a network, and a network's own."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pkgutil import resolve_name
from typing import Any, cast

from peft import inject_adapter_in_model
from torch import nn

from networks.adapted_layer import AdaptedLayer, Sizes
from networks.kinds import Kind
from networks.spec import NetworkSpec
from networks.targets import ADAPTER


def inject(model: nn.Module, sizes: Sizes, spec: NetworkSpec, kind: Kind | None = None) -> dict[str, AdaptedLayer]:
    """Put an adapter on the module at each path, in place. Weights are still to be made. kind: default, that of `spec`."""
    if not sizes:
        return {}
    layers: dict[str, AdaptedLayer] = resolve_name((kind or spec.kind).layer).put_into(model, sizes, spec)
    for layer in layers.values():
        # New modules are in training mode, whatever the model is in.
        cast(nn.Module, layer).train(layer.base_layer.training)
    return layers


class PeftLayer(AdaptedLayer):
    """A layer that PEFT puts in and gives weights, turned in place into one that computes otherwise."""

    @classmethod
    def configuration(cls, spec: NetworkSpec, alpha: float, **common: Any) -> Any:
        """PEFT's, for this alpha and what is common to all kinds."""
        raise NotImplementedError

    @classmethod
    def put_into(cls, model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
        (rank, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in zip(*sizes.values(), strict=True))
        config = cls.configuration(
            spec,
            alpha,
            r=rank,
            target_modules="|".join(map(re.escape, sizes)),
            rank_pattern={re.escape(path): own for path, (own, _) in sizes.items() if own != rank},
            alpha_pattern={re.escape(path): own for path, (_, own) in sizes.items() if own != alpha},
        )
        # On the meta device PEFT draws nothing from the global generator and casts nothing to the dtype of the base.
        with _without_collector():
            inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        layers = {}
        for path, (own_rank, own_alpha) in sizes.items():
            layer: Any = model.get_submodule(path)
            layer.__class__ = _mixed(cls, type(layer))  # type: ignore[arg-type]  # classes are hashable
            layer.set_up(own_rank, own_alpha, spec)
            layers[path] = layer
        return layers


@cache
def _mixed(layer: type[PeftLayer], pefts: type) -> type:
    """LoraLayer and PEFT's Linear -> LoraLinear, likewise Conv2d."""
    return type(f"{layer.__name__.removesuffix('Layer')}{pefts.__name__}", (layer, pefts), {})


class OwnLayer(nn.Module, AdaptedLayer):
    """A layer around the model's, without PEFT."""

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, spec: NetworkSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.set_up(rank, alpha, spec)

    @classmethod
    def put_into(cls, model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
        layers: dict[str, AdaptedLayer] = {}
        for path, (rank, alpha) in sizes.items():
            parent, _, name = path.rpartition(".")
            layers[path] = cls(model.get_submodule(path), rank, alpha, spec)
            setattr(model.get_submodule(parent), name, layers[path])
        return layers


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
