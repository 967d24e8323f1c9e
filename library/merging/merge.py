"""W' = W + sum of ratio * what each adapter adds, for every module of the adapters, and not one module less.

What an adapter adds to a weight is `networks.adapter_module.AdapterModule.delta`. The sum is taken in float32 and cast once. Each
part is worked out against the base's weight, so that the order of adapters does not matter, DoRA included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.merging.rounding import NEAREST, Arrival, Rounding
from library.merging.strength import Strength
from library.models.configs import configs_of
from networks.adapter_module import AdapterModule
from networks.adapters import Adapter
from networks.families import FAMILIES, SD15, Family
from networks.finite import all_finite
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, Target, kohya_name

Shapes = Mapping[str, Sequence[int]]
Part = tuple[AdapterModule, float]
Folds = dict[str, dict[str, list[Part]]]
"""Component -> key of the weight -> the adapters' modules for it with their ratios; ratio 0 is left out."""

_SD2_TEXT_WIDTH = 1024
_PIECE = (
    1 << 18
)  # values: what is worked on stays in a core's cache, which takes a third of the time that whole weights do
_ROWS = 16  # at least: products of a single row are summed in another order


@dataclass(frozen=True)
class Change:
    """What folding adapters in did to one weight."""

    component: str
    key: str
    relative: float
    """Frobenius norm of what was added, over that of the weight before; 1 where that was zero."""
    norm: float
    """Of what was added, before rounding."""
    arrived: float
    """Share of it that is in the weight as written: what rounding left of it."""

    @classmethod
    def of(cls, component: str, key: str, arrival: Arrival) -> Change:
        before, size = arrival.before**0.5, arrival.change**0.5
        return cls(component, key, size / (before or size or 1.0), size, arrival.share)


def place(adapters: Sequence[tuple[Adapter, Strength]], shapes: Mapping[str, Shapes], family: Family) -> Folds:
    """Find the weight of each adapted module in a base given as component -> key -> shape.

    Raises UserError unless every module of every adapter has a weight of its shape: how many have none, the first three,
    and a guess why.
    """
    folds: Folds = {component: {} for component in shapes}
    for adapter, strength in adapters:
        homeless = [target for target in adapter.modules if target.key not in shapes.get(target.component, {})]
        there = [target for target in adapter.modules if target not in set(homeless)]
        misfits = [t for t in there if not adapter.modules[t].fits(shapes[t.component][t.key])]
        if homeless or misfits:
            raise UserError(_objection(adapter, homeless, misfits, shapes, family))
        for target, module in adapter.modules.items():
            if (ratio := strength.of(target)) != 0:
                folds[target.component].setdefault(target.key, []).append((module, ratio))
    return folds


def in_rows(shape: Sequence[int], parts: Sequence[Part]) -> Iterator[tuple[slice, Sequence[Part]]]:
    """The rows of a weight in pieces of a few thousand, each with what acts on it.

    All at once where an adapter needs the whole weight. What is folded in piece by piece is `fold` of the whole to the bit.
    """
    step = max(_ROWS, _PIECE // max(1, math.prod(shape[1:])) // _ROWS * _ROWS)
    starts = list(range(0, shape[0], step))
    if len(starts) > 1 and shape[0] - starts[-1] < _ROWS:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], shape[0]], strict=True):
        rows = slice(start, stop)
        of_rows = [(module.of_rows(rows), ratio) for module, ratio in parts]
        own = [(module, ratio) for module, ratio in of_rows if module is not None]
        if len(own) < len(parts):
            yield slice(None), parts
            return
        yield rows, own


def added(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """What the adapters add to `weight`, float32, of its shape and on its device."""
    total = torch.zeros((), device=weight.device)
    for module, ratio in parts:
        total = total + ratio * module.delta(weight)
    return total.expand(weight.shape)


def fold(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """The merged weight, float32."""
    return weight.float() + added(weight, parts)


def fold_and_cast(
    component: str,
    key: str,
    weight: Tensor,
    parts: Sequence[Part],
    dtype: torch.dtype,
    rounding: Rounding = NEAREST,
) -> tuple[Tensor, Change]:
    """`fold`, rounded to `dtype`, and what it changed. Raises UserError where a value does not fit the format."""
    arrival = Arrival()
    cast = fold_piece(key, weight, parts, dtype, rounding.of(f"{component} {key}"), arrival)
    return cast, Change.of(component, key, arrival)


def fold_piece(
    key: str,
    weight: Tensor,
    parts: Sequence[Part],
    dtype: torch.dtype,
    rounded: Callable[[Tensor, torch.dtype], Tensor],
    arrival: Arrival,
) -> Tensor:
    """The same of a weight or some rows of it; what it changes is added to `arrival`."""
    before, change = weight.float(), added(weight, parts)
    cast = cast_finite(key, rounded(before + change, dtype), before)
    arrival.add(before, change, cast)
    return cast


def cast_finite(key: str, cast: Tensor, before: Tensor) -> Tensor:
    """`cast`, all of it finite. Raises UserError where it is not; what the base itself has of these is its own."""
    if all_finite(cast):
        return cast
    if not all_finite(before):
        raise UserError(f"{key} of the base has values that are not finite: the base is damaged.")
    raise UserError(f"{key} {not_finite_as(cast.dtype)}")


def not_finite_as(dtype: torch.dtype) -> str:
    """ "has values that are not finite as float16. Try --save_precision float." """
    is_narrow = torch.finfo(dtype).max < torch.finfo(torch.float32).max
    remedy = "Try --save_precision float." if is_narrow else "The adapter or its ratio is too large."
    return f"has values that are not finite as {str(dtype).removeprefix('torch.')}. {remedy}"


@torch.no_grad()
def fold_into_modules(models: Mapping[str, nn.Module], family: Family, adapter: Adapter, ratio: float) -> list[Change]:
    """Fold an adapter into loaded models (component -> model), in place; their weights keep their dtype and device.

    As strict as `place`. Fold into float32 models and cast them afterwards, so that several adapters are rounded once.
    """
    states = {component: model.state_dict() for component, model in models.items()}
    shapes = {component: {k: tuple(v.shape) for k, v in state.items()} for component, state in states.items()}
    changes = []
    for component, named in place([(adapter, Strength(ratio))], shapes, family).items():
        for key, parts in named.items():
            weight = states[component][key]  # state_dict() holds the parameters themselves
            merged, change = fold_and_cast(component, key, weight, parts, weight.dtype)
            weight.copy_(merged)
            changes.append(change)
    return changes


def _objection(
    adapter: Adapter, homeless: list[Target], misfits: list[Target], shapes: Mapping[str, Shapes], family: Family
) -> str:
    names = sorted(_name(target, adapter) for target in homeless or misfits)
    why = _guess(adapter, homeless, misfits, shapes, family)
    return (
        f"{len(homeless) + len(misfits)} of {len(adapter.modules)} LoRA modules have no place in this checkpoint "
        f"(first: {', '.join(names[:3])}). {why}"
    )


def _name(target: Target, adapter: Adapter) -> str:
    """Kohya's name, or the path of a module that its family does not have."""
    try:
        return kohya_name(target, adapter.family)
    except KeyError:
        return f"{target.component}.{target.path}"


def _guess(
    adapter: Adapter, homeless: list[Target], misfits: list[Target], shapes: Mapping[str, Shapes], family: Family
) -> str:
    """Why an adapter may not fit."""
    shapes_there = (m.shape for target, m in adapter.modules.items() if target.path.endswith(".attn2.to_k"))
    text_widths = {shape[1] for shape in shapes_there if len(shape) > 1}
    by_width = next((f for f in FAMILIES.values() if configs_of(f).unet["cross_attention_dim"] in text_widths), None)
    looks = by_width or adapter.family
    # An adapter that says nothing of its family passes for SD1.5.
    if looks is not family and (homeless or by_width or looks is not SD15):
        return f"It looks like an {looks.title} LoRA on an {family.title} model."
    if _SD2_TEXT_WIDTH in text_widths:
        return f"It looks like an SD2 LoRA on an {family.title} model."
    if homeless and all(target.component in (TEXT_ENCODER, TEXT_ENCODER_2) for target in homeless):
        return "They are of a text encoder that this base does not have."
    if misfits and not homeless:
        target = min(misfits)
        found = list(adapter.modules[target].shape)
        wanted = list(shapes[target.component][target.key])
        name = _name(target, adapter)
        return f"{name} is for a weight {found}, the base has {wanted}: it was trained on a model of another size."
    if not any(target.component == UNET for target in adapter.modules):
        return "It adapts text encoders of another kind of model."
    return "It was made for another kind of model, or for layers this base does not have."
