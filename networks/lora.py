"""LoRA inside a frozen model: PEFT injects and runs it, this module says where, how large, and from which weights.

Source: LoRA (arXiv 2106.09685); which modules are adapted and how they start follows kohya's networks.lora.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from networks import AdapterError
from networks.trained_weights import Conv2d, Linear, draw_uniform, generator_for

Scope = Literal["mid", "down_mid", "all"]
Targets = Literal["attention", "kohya"]

ADAPTER = "default"  # PEFT's name for the only adapter of a model
_BLOCKS: dict[str, tuple[str, ...]] = {
    "mid": ("mid_block.",),
    "down_mid": ("down_blocks.", "mid_block."),
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
}
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
# Classes are compared by name, as kohya does: the ones of diffusers are the originals, forks keep the names.
TRANSFORMER_PARENTS = frozenset({"Transformer2DModel"})
CONV_PARENTS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})


@dataclass(frozen=True)
class LoraSpec:
    """Which modules get an adapter, and of which size. Raises AdapterError for values that cannot be."""

    rank: int = 8
    """Inner dimension of adapters on Linear layers and 1x1 convolutions."""
    alpha: float = 8.0
    """These adapters act with the scale alpha / rank."""
    dropout: float = 0.0
    """Share of each adapter's inputs that is dropped while training."""
    scope: Scope = "mid"
    """Blocks of the U-Net."""
    conv_rank: int | None = None
    """Inner dimension of adapters on 3x3 convolutions. None: residual blocks and resamplers get no adapters at all."""
    conv_alpha: float | None = None
    """Adapters on 3x3 convolutions act with the scale conv_alpha / conv_rank. None means 1.0, kohya's default."""
    targets: Targets = "attention"
    """attention: to_q, to_k, to_v, to_out.0; kohya: every Linear and 1x1 convolution of the transformers."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "conv_rank", "conv_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise AdapterError(f"LoRA {name} must be positive, got {value}.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}.")
        for name, choices in (("scope", get_args(Scope)), ("targets", get_args(Targets))):
            if getattr(self, name) not in choices:
                raise AdapterError(f"LoRA {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LoraSpec:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise AdapterError(f"LoRA specification is not valid JSON: {error}.") from None
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise AdapterError(
                f"LoRA specification has unknown entries: {', '.join(unknown)}. It is of a newer version."
            )
        return cls(**values)


def rank_and_alpha(spec: LoraSpec, *, kernel: int) -> tuple[int, float]:
    """Rank and alpha of an adapter on a layer with this kernel size (1 for a Linear)."""
    if kernel == 1 or spec.conv_rank is None:
        return spec.rank, spec.alpha
    return spec.conv_rank, 1.0 if spec.conv_alpha is None else spec.conv_alpha


def target_modules(model: nn.Module, spec: LoraSpec) -> dict[str, nn.Module]:
    """Path -> Linear or Conv2d of `model` that an adapter of this specification sits on, in the model's order."""
    parents = TRANSFORMER_PARENTS | (CONV_PARENTS if spec.conv_rank is not None else frozenset())
    return {
        path: module
        for path, module in layers_inside(model, parents, lambda parent: parent.startswith(_BLOCKS[spec.scope])).items()
        if spec.targets == "kohya" or ".attentions." not in path or path.endswith(_ATTENTION)
    }


def layers_inside(
    model: nn.Module, parents: Set[str], wanted: Callable[[str], bool] = lambda parent: True
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path -> Linear or Conv2d inside modules whose classes have these names, in the model's order.

    Inside transformers only 1x1 convolutions count. wanted: of a parent's path, whether to look into it.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for parent_path, parent in model.named_modules():
        kind = type(parent).__name__
        if kind not in parents or not wanted(parent_path):
            continue
        for path, child in parent.named_modules(prefix=parent_path):
            if isinstance(child, (nn.Linear, nn.Conv2d)) and (kind not in TRANSFORMER_PARENTS or kernel_of(child) == 1):
                found[path] = child
    return found


def add_lora(unet: nn.Module, spec: LoraSpec, seed: int) -> dict[str, nn.Parameter]:
    """Freeze `unet` and put an adapter on each of its target modules, in place.

    Returns the adapter's parameters, float32 whatever the dtype of the base, under their names in the model
    (`X.lora_A.default.weight` [rank, in, ...], `X.lora_B.default.weight` [out, rank, ...]). A is uniform within
    +-1/sqrt(fan_in) and depends on `seed` and the name alone; B is zero, so that the output is the base's to the bit.
    Adapters compute in the dtype of their input. Raises AdapterError when nothing matches or adapters are on already.
    """
    if any(_adapted(unet)):
        raise AdapterError("The model has LoRA adapters already; remove_lora takes them off.")
    targets = target_modules(unet, spec)
    if not targets:
        raise AdapterError(f"LoRA of scope {spec.scope} on {spec.targets} finds no module in a {type(unet).__name__}.")
    sizes = {path: rank_and_alpha(spec, kernel=kernel_of(module)) for path, module in targets.items()}
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        lora_dropout=spec.dropout,
        target_modules="|".join(map(re.escape, targets)),
        rank_pattern={re.escape(path): rank for path, (rank, _) in sizes.items() if rank != spec.rank},
        alpha_pattern={re.escape(path): alpha for path, (_, alpha) in sizes.items() if alpha != spec.alpha},
    )
    # On the meta device PEFT draws nothing from the global generator and casts nothing to the dtype of the base.
    inject_adapter_in_model(config, unet, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for path, layer in _adapted(unet):
        layer.cast_input_dtype_enabled = (
            False  # PEFT would cast the input to float32 instead of the weights to its dtype
        )
        _materialise(layer, path, seed)
        layer.train(layer.get_base_layer().training)  # new modules are in training mode, whatever the model is in
    return {name: parameter for name, parameter in unet.named_parameters() if ".lora_" in name}


def remove_lora(unet: nn.Module) -> None:
    """Put the base layers back in place; nothing of the adapters stays."""
    for path, layer in list(_adapted(unet)):
        parent_path, _, name = path.rpartition(".")
        setattr(unet.get_submodule(parent_path), name, layer.get_base_layer())
    if hasattr(unet, "peft_config"):
        del unet.peft_config


@contextmanager
def lora_disabled(unet: nn.Module) -> Iterator[None]:
    """Within the context `unet` computes as its base does; which parameters are trained stays as it is."""
    layers = [layer for _, layer in _adapted(unet)]
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        _enable(layers, False, trained)
        yield
    finally:
        _enable(layers, True, trained)


def _enable(layers: list[Any], enabled: bool, trained: list[tuple[nn.Parameter, bool]]) -> None:
    for layer in layers:
        layer.enable_adapters(enabled)  # touches requires_grad as well
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def _materialise(layer: Any, path: str, seed: int) -> None:
    """Turn PEFT's empty A and B into float32 weights on the base layer's device."""
    device = layer.get_base_layer().weight.device
    for part in (layer.lora_A, layer.lora_B):
        # The same module with another forward; a new class keeps the names in the state dict.
        part[ADAPTER].__class__ = Conv2d if isinstance(part[ADAPTER], nn.Conv2d) else Linear
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    down.weight = nn.Parameter(draw_uniform(down.weight.shape, generator_for(seed, path)).to(device))
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))


def kernel_of(module: nn.Module) -> int:
    return module.kernel_size[0] if isinstance(module, nn.Conv2d) else 1
