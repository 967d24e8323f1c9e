"""The adapters of a training in one piece: put into U-Net and text encoders, grouped, exported, loaded, held in bounds.

Which modules get one is what kohya's networks.lora decides: every Linear and 1x1 convolution of the U-Net's transformers, with
convolutions asked for those of residual blocks and resamplers too, and the Linear layers of the text encoders' attention and
MLP. What is trained there is in networks.kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from networks import AdapterError
from networks.adapted_layer import AdaptedLayer, Sizes
from networks.adapter_export import adapter_tensors
from networks.adapters import Adapter
from networks.families import FAMILIES, UNET, Family
from networks.injection import inject
from networks.kinds import READ_ONLY
from networks.kinds.full import FullLayer
from networks.loading import check_fits
from networks.names import Target, with_text_model
from networks.spec import NetworkSpec
from networks.targets import CONV_PARENTS, TRANSFORMER_PARENTS, kernel_of, layers_inside
from networks.trained_weights import generator_for

PARTS_GROUP = "unet parts"
_TEXT_PARENTS = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})


@dataclass(frozen=True)
class NetworkGroup:
    """Parameters that learn at one rate."""

    name: str
    """As kohya logs it: "unet", "unet block 4 plus"; "text_encoder". "unet parts" of what is trained whole."""
    component: str
    parameters: tuple[str, ...]
    factor: float
    """Of the component's learning rate."""


class Network:
    """The adapters inside models; see `add_network`."""

    def __init__(self, spec: NetworkSpec, layers: Mapping[Target, AdaptedLayer]) -> None:
        self.spec = spec
        self.layers = dict(layers)
        self._multiplier = 1.0
        self.parameters: dict[str, nn.Parameter] = {
            weight_name(target, name): parameter
            for target, layer in self.layers.items()
            for name, parameter in layer.weights.items()
        }

    @property
    def family(self) -> Family:
        return FAMILIES[self.spec.family]

    @property
    def adapters(self) -> dict[Target, AdaptedLayer]:
        """The layers of the network's own kind, without parts that are trained whole."""
        return {target: layer for target, layer in self.layers.items() if not isinstance(layer, FullLayer)}

    def groups(self, loraplus: Mapping[str, float] | None = None) -> list[NetworkGroup]:
        """Parameters by component and by factor of the learning rate.

        loraplus: component -> how many times faster its up matrices learn (LoRA+, arXiv 2402.12354); such parameters are
        groups of their own, named "... plus". With block_lr_weights each block of the U-Net is a group.
        """
        members: dict[tuple[str, str, float], list[str]] = {}
        for target, layer in self.adapters.items():
            factor = self.spec.learning_rate_factor(target)
            name = target.component + self.spec.block_title(target)
            ratio = (loraplus or {}).get(target.component, 1.0)
            for weight in layer.weights:
                is_plus = ratio != 1 and layer.is_up(weight)
                key = (
                    (target.component, f"{name} plus", factor * ratio) if is_plus else (target.component, name, factor)
                )
                members.setdefault(key, []).append(weight_name(target, weight))
        groups = [NetworkGroup(name, component, tuple(names), f) for (component, name, f), names in members.items()]
        parts = tuple(
            weight_name(target, name)
            for target, layer in self.layers.items()
            if isinstance(layer, FullLayer)
            for name in layer.weights
        )
        return [*groups, NetworkGroup(PARTS_GROUP, UNET, parts, 1.0)] if parts else groups

    def adapter(self) -> Adapter:
        """The weights as files and merging know them: not copies, and wherever the models are."""
        modules = {target: layer.to_module() for target, layer in self.layers.items()}
        return Adapter(modules, {"ss_base_model_version": FAMILIES[self.spec.family].base_version})

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies on the CPU under the names that kohya, A1111 and ComfyUI read; see `adapter_tensors`.

        In `dtype` as kohya saves them, alphas too; but for DoRA's norms, of which half precision would leave little.
        """
        tensors = adapter_tensors(self.adapter(), "kohya", dtype, keep_dora=True)
        return {key: value.to(dtype) if key.endswith(".alpha") else value for key, value in tensors.items()}

    def load(self, adapter: Adapter) -> None:
        """Start from the weights of an adapter; another alpha is made up for, so that it acts as in its own file.

        Raises AdapterError where kind, modules, ranks or shapes are others; nothing has been changed then.
        """
        check_fits(adapter, self.layers, self.spec)
        for target, layer in self.layers.items():
            layer.load_module(adapter.modules[target])

    @torch.no_grad()
    def clamp_norms(self, max_norm: float) -> dict[str, Tensor]:
        """Scale down adapters that add a matrix of a Frobenius norm above `max_norm`, each weight by as much as the others.

        Nothing is read back to the host. Returns 0-dim tensors: keys_scaled, the number of adapters scaled down, and
        mean_norm and max_norm after it. Raises AdapterError for kinds that add nothing. Source: kohya's
        apply_max_norm_regularization.
        """
        if not self.spec.kind.adds:
            raise AdapterError(f"{self.spec.kind.title} adds nothing to a weight whose norm could be bound.")
        layers = list(self.adapters.values())
        norms = layers[0].norms(layers)
        ratios = (max_norm / norms.clamp(min=max_norm / 2)).clamp(max=1.0)
        factors = [layer.factors() for layer in layers]
        roots = {count: (ratios ** (1 / count)).unbind() for count in {len(own) for own in factors}}
        scales = [roots[len(own)][place] for place, own in enumerate(factors) for _ in own]
        torch._foreach_mul_([factor for own in factors for factor in own], scales)
        after = norms * ratios
        scaled = ratios < 1 - 1e-5  # less is rounding
        return {"keys_scaled": scaled.sum(), "mean_norm": after.mean(), "max_norm": after.max()}

    def set_multiplier(self, value: float) -> None:
        """Let the adapters act `value` times as strongly as trained; 1 is as trained."""
        if value != self._multiplier:
            self._multiplier = value
            for layer in self.layers.values():
                layer.multiplier = value

    def cast_together(self, dtype: torch.dtype) -> None:
        """Cast all weights for the pass to come, which will have a backward pass; see `AdaptedLayer.cast_together`."""
        layers = list(self.adapters.values())
        layers[0].cast_together(layers, dtype)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the models compute as their bases do."""
        before = [(layer, layer.enabled) for layer in self.layers.values()]
        try:
            for layer, _ in before:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in before:
                layer.enabled = enabled


def weight_name(target: Target, weight: str) -> str:
    """Name of a weight in a state, by which its first values are drawn."""
    return f"{target.component}.{target.path}.{weight}"


def add_network(
    models: Mapping[str, nn.Module], spec: NetworkSpec, seed: int, drawn_by: Callable[[Target, str], str] = weight_name
) -> Network:
    """Freeze `models` and put an adapter on each target module of those that `spec` wants trained, in place.

    models: component ("unet", "text_encoder", "text_encoder_2") -> model. Parameters are float32 whatever the dtype of the
    base and named `unet.X.lora_A.default.weight`, for text encoders with `text_model.` in X whatever transformers calls it.
    First values depend on `seed` and the name that `drawn_by` gives a weight; the output is the base's to the bit.
    Raises AdapterError where nothing matches, adapters are on already, or `spec.sizes` names modules that the models do not have.
    """
    layers: dict[Target, AdaptedLayer] = {}
    sizes_of = {
        component: _sizes(component, model, spec)
        for component, model in models.items()
        if (spec.unet if component == UNET else spec.text_encoder)
    }
    _check_sizes(spec, models, sizes_of)
    for model in models.values():
        model.requires_grad_(False)
    for component, sizes in sizes_of.items():
        for path, layer in inject(models[component], sizes, spec).items():
            layers[target_of(component, path)] = layer
    if spec.parts and spec.unet:
        for path, layer in inject(models[UNET], _parts(models[UNET], spec), spec, READ_ONLY["full"]).items():
            layers[Target(UNET, path)] = layer
    for target, layer in layers.items():
        layer.reset(lambda name, target=target: generator_for(seed, drawn_by(target, name)))  # type: ignore[misc]
    return Network(spec, layers)


def target_of(component: str, path: str) -> Target:
    return Target(component, path if component == UNET else with_text_model(path))


def _sizes(component: str, model: nn.Module, spec: NetworkSpec) -> Sizes:
    if any(isinstance(module, (AdaptedLayer, BaseTunerLayer)) for module in model.modules()):
        raise AdapterError(f"The {component} has adapters already.")
    unet_parents = TRANSFORMER_PARENTS | (CONV_PARENTS if spec.has_convolutions else frozenset())
    found = {}
    for path, module in layers_inside(model, unet_parents if component == UNET else _TEXT_PARENTS).items():
        if (size := spec.size_of(target_of(component, path), kernel_of(module))) is not None:
            found[path] = size
    return found


def _parts(unet: nn.Module, spec: NetworkSpec) -> Sizes:
    """Weights, and biases after their weights, of what is trained whole. Raises AdapterError for a part that is not there."""
    found: dict[str, tuple[int, float]] = {}
    adapted = tuple(f"{path}." for path, module in unet.named_modules() if isinstance(module, AdaptedLayer))
    for part in spec.parts:
        module = getattr(unet, part, None)
        if module is None:
            raise AdapterError(f"{FAMILIES[spec.family].title} has no {part} to train (train_parts).")
        for path, layer in module.named_modules(prefix=part):
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not path.startswith(adapted):
                found |= {path: (1, 1.0)} | ({} if layer.bias is None else {f"{path}.bias": (1, 1.0)})
    return found


def _check_sizes(spec: NetworkSpec, models: Mapping[str, nn.Module], sizes_of: Mapping[str, Sizes]) -> None:
    known = {".".join(target_of(component, path)) for component, sizes in sizes_of.items() for path in sizes}
    if unknown := [name for name in spec.sizes or () if name not in known]:
        there = {".".join(target_of(c, path)) for c, model in models.items() for path, _ in model.named_modules()}
        if all(name in there for name in unknown):
            raise AdapterError(
                f"{len(unknown)} of {len(spec.sizes or ())} modules of the adapter are on layers that are not trained here (first: "
                f"{unknown[0]}). Fold the file into the base with --base_weights, and train a new adapter on that."
            )
        raise AdapterError(
            f"{len(unknown)} of {len(spec.sizes or ())} modules of the adapter have no place in this model (first: {unknown[0]}). "
            "It is for another family, or for text encoders that are not trained here."
        )
    if not any(sizes_of.values()):
        trained = " and ".join(sizes_of) or "models given"
        raise AdapterError(f"The network finds no module in the {trained}: is every rank 0, or every block weight?")
