"""LoHa, LoKr and OFT out of a file's tensors, checked. Format: LyCORIS, kohya sd-scripts' networks.oft."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from networks import AdapterError
from networks.adapters import AdapterModule
from networks.lycoris_modules import Factor, LohaModule, LokrModule, OftModule

LYCORIS_PARTS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("oft_blocks", "rescale"),
)
"""What follows a module's name in a file."""


def lycoris_module(name: str, tensors: Mapping[str, Tensor]) -> AdapterModule:
    """The adapter that `tensors` (part -> tensor, with alpha or without) are; without alpha LoHa and LoKr have scale 1.

    name: of the module, for messages. Raises AdapterError for parts that are missing, too many, or of impossible shapes.
    """
    left = dict(tensors)
    alpha = left.pop("alpha", None)
    module = _module(name, left, None if alpha is None else float(alpha))
    if left:
        raise AdapterError(f"{name} has {' and '.join(left)} beside {module.kind}, which do not go together.")
    return module


def _module(name: str, left: dict[str, Tensor], alpha: float | None) -> AdapterModule:
    """Takes what it uses out of `left`."""
    if "hada_w1_a" in left:
        w1, w2 = (_factor(name, left, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        loha = LohaModule(w1, w2, 0.0 if alpha is None else alpha)
        other = LohaModule(w2, w1, 0.0)
        if loha.shape != other.shape:
            raise AdapterError(
                f"{name} has w1 {list(loha.shape)} and w2 {list(other.shape)}, which do not fit together."
            )
        return loha if alpha is not None else LohaModule(w1, w2, float(loha.rank))
    if any(part.startswith("lokr_") for part in left):
        w1, w2 = _factor(name, left, "lokr_w1", None), _factor(name, left, "lokr_w2", "lokr_t2")
        _check(name, tensors={"lokr_w1": w1[0]}, holds=w1[0].ndim == 2)
        lokr = LokrModule(w1, w2, 0.0)
        return LokrModule(w1, w2, float(lokr.rank) if alpha is None or lokr.is_whole else alpha)
    if "oft_blocks" not in left:
        raise AdapterError(f"{name} has {' and '.join(left)}, and not what belongs to it: it is incomplete.")
    blocks = left.pop("oft_blocks")
    if blocks.ndim == 4:
        raise AdapterError(f"{name} is BOFT, which is not supported.")
    _check(name, tensors={"oft_blocks": blocks}, holds=blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2])
    oft = OftModule(blocks, alpha or 0.0, left.pop("rescale", None))
    if oft.rescale is not None:
        _check(name, tensors={"rescale": oft.rescale}, holds=oft.rescale.numel() == oft.shape[0])
    return oft


def _factor(name: str, left: dict[str, Tensor], part: str, core: str | None) -> Factor:
    if part in left:
        whole = left.pop(part)
        _check(name, tensors={part: whole}, holds=whole.ndim in (2, 4) and whole.numel() > 0)
        return (whole,)
    if missing := [half for half in (f"{part}_a", f"{part}_b") if half not in left]:
        raise AdapterError(f"{name} has no {' and no '.join(missing)}: it is incomplete.")
    a, b = left.pop(f"{part}_a"), left.pop(f"{part}_b")
    if core is None or core not in left:
        fits = a.ndim == 2 and b.ndim in (2, 4) and a.shape[1] == b.shape[0] > 0
        _check(name, tensors={f"{part}_a": a, f"{part}_b": b}, holds=fits)
        return a, b
    t = left.pop(core)
    fits = a.ndim == b.ndim == 2 and t.ndim == 4 and a.shape[0] == t.shape[0] > 0 and b.shape[0] == t.shape[1] > 0
    _check(name, tensors={f"{part}_a": a, f"{part}_b": b, core: t}, holds=fits)
    return a, b, t


def _check(name: str, *, tensors: Mapping[str, Tensor], holds: bool) -> None:
    if not holds:
        shapes = " and ".join(f"{part} {list(value.shape)}" for part, value in tensors.items())
        raise AdapterError(f"{name} has {shapes}, which do not fit together.")
