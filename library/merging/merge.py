"""W' = W + ratio * alpha / rank * up @ down, for every module of an adapter, and not one module less.

Source: LoRA (arXiv 2106.09685, section 4.1); the same product for Linear layers, 1x1 and 3x3 convolutions, as in
sd-scripts, A1111 and ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.adapter_file import Adapter, LoraModule
from networks.names import KOHYA_PREFIXES, TEXT_ENCODER, UNET, kohya_table, weight_paths

Shapes = Mapping[str, Sequence[int]]

# Modules of SDXL in original (SGM) names, and its second text encoder.
_SDXL_MARKS = ("lora_te2_", "lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
_SDXL_TEXT_WIDTH, _SD2_TEXT_WIDTH = 2048, 1024


@dataclass(frozen=True)
class Change:
    """What folding an adapter in did to one weight."""

    key: str
    relative: float
    """Frobenius norm of what was added, over that of the weight before."""


def place(adapter: Adapter, shapes: Mapping[str, Shapes]) -> dict[str, dict[str, LoraModule]]:
    """Component -> key of the weight -> its adapter, for a base given as component -> key -> shape.

    Raises UserError unless every module of the adapter has a weight of its shape: how many have none, the first three,
    and a guess why.
    """
    targets = {
        name: (component, f"{path}.weight")
        for component, named in shapes.items()
        for name, path in kohya_table(weight_paths(named), KOHYA_PREFIXES[component]).items()
    }
    placed: dict[str, dict[str, LoraModule]] = {component: {} for component in shapes}
    homeless = [name for name in adapter.modules if name not in targets]
    misfits = []
    for name in adapter.modules.keys() & targets.keys():
        component, key = targets[name]
        if _fits(adapter.modules[name], shapes[component][key]):
            placed[component][key] = adapter.modules[name]
        else:
            misfits.append(name)
    if homeless or misfits:
        first = sorted(homeless or misfits)[0]
        wanted = list(shapes[targets[first][0]][targets[first][1]]) if first in targets else []
        why = _guess(adapter, homeless, misfits, first, wanted)
        raise UserError(
            f"{len(homeless) + len(misfits)} of {len(adapter.modules)} LoRA modules have no place in this checkpoint "
            f"(first: {', '.join(sorted(homeless or misfits)[:3])}). {why}"
        )
    return placed


def fold(weight: Tensor, module: LoraModule, ratio: float) -> Tensor:
    """The merged weight, float32, of the shape and on the device of `weight`."""
    up, down = (part.to(weight.device, torch.float32).flatten(1) for part in (module.up, module.down))
    return weight.float() + ratio * (module.alpha / module.rank) * (up @ down).reshape(weight.shape)


def merge_adapter(
    weights: MutableMapping[str, Tensor],
    modules: Mapping[str, LoraModule],
    ratio: float,
    dtype: torch.dtype | None = None,
) -> list[Change]:
    """Replace the weights that `modules` (see `place`) names by merged ones, and cast every weight to `dtype`.

    A weight is computed in float32 and cast once, to `dtype` or else to what it was. Integers stay as they are.
    Raises UserError where a value does not fit the target format.
    """
    changes = []
    for key, module in modules.items():
        before, after = weights[key], fold(weights[key], module, ratio)
        norm = before.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
        changes.append(Change(key, float((after - before.float()).norm() / norm)))
        weights[key] = after.to(before.dtype if dtype is None else dtype)
    for key, weight in weights.items():
        if weight.is_floating_point():
            weights[key] = cast = weight if dtype is None else weight.to(dtype)
            if not torch.isfinite(cast).all():
                raise UserError(f"{key} has values that are not finite as {cast.dtype}. Try --save_precision float.")
    return changes


@torch.no_grad()
def fold_into_modules(unet: nn.Module, text_encoder: nn.Module | None, adapter: Adapter, ratio: float) -> list[Change]:
    """Fold an adapter into loaded models, in place; their weights keep their dtype and device.

    As strict as `place`. Fold into float32 models and cast them afterwards, so that several adapters are rounded once.
    """
    models = {UNET: unet} | ({} if text_encoder is None else {TEXT_ENCODER: text_encoder})
    states = {component: model.state_dict() for component, model in models.items()}
    placed = place(adapter, {component: {k: v.shape for k, v in state.items()} for component, state in states.items()})
    changes = []
    for component, modules in placed.items():
        merged = {key: states[component][key] for key in modules}
        changes += merge_adapter(merged, modules, ratio)
        for key, weight in merged.items():
            states[component][key].copy_(weight)  # state_dict() holds the parameters themselves
    return changes


def _fits(module: LoraModule, shape: Sequence[int]) -> bool:
    """Whether up @ down has as many rows and columns as the weight; 1x1 convolutions may come as matrices."""
    return (
        len(shape) >= 2 and module.up.shape[0] == shape[0] and module.down[0].numel() == torch.Size(shape[1:]).numel()
    )


def _guess(adapter: Adapter, homeless: list[str], misfits: list[str], first: str, wanted: list[int]) -> str:
    """Why an adapter may not fit a Stable Diffusion 1.x."""
    text_widths = {module.down.shape[1] for name, module in adapter.modules.items() if name.endswith("_attn2_to_k")}
    if any(name.startswith(_SDXL_MARKS) for name in homeless) or _SDXL_TEXT_WIDTH in text_widths:
        return "It looks like an SDXL LoRA on an SD1.5 model."
    if homeless and all(name.startswith("lora_te_") for name in homeless):
        return "They are of a text encoder that this base does not have."
    if _SD2_TEXT_WIDTH in text_widths:
        return "It looks like an SD2 LoRA on an SD1.5 model."
    if misfits and not homeless:
        module = adapter.modules[first]
        found = [module.up.shape[0], *module.down.shape[1:]]
        return f"{first} is for a weight {found}, the base has {wanted}: it was trained on a model of another size."
    return "It was made for another kind of model, or for layers this base does not have."
