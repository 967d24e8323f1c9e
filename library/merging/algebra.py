"""Sums of adapters and adapters of a lower rank, from their factors alone: no base model, no full matrix.

Sources: LoRA (arXiv 2106.09685, section 4.1); the best approximation of a rank is the truncated SVD (Eckart and Young,
1936). How ranks are chosen by singular values follows kohya's resize_lora (sv_ratio, sv_fro, sv_cumulative).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from library.errors import UserError
from library.options.checks import require
from networks.adapter_file import BASE_MODEL_KEY
from networks.adapters import Adapter
from networks.families import Family
from networks.kinds.full import FullModule
from networks.kinds.lora import LoraModule
from networks.names import Target
from networks.prediction_names import FLOW_SHIFT_KEY

Ratio: TypeAlias = float | Callable[[Target], float]
"""Strength of an adapter: 1 is as trained. A function gives each module its own."""

# What metadata says of the base; of a sum, everything else describes neither input.
_BASE_ENTRIES = (
    *("ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", BASE_MODEL_KEY),
    *("modelspec.architecture", "modelspec.prediction_type", "modelspec.resolution", "ss_flow_mode", FLOW_SHIFT_KEY),
)


class DynamicRank(NamedTuple):
    """How many singular values a module keeps: the fewest that satisfy the condition, within the rank asked for."""

    method: Literal["sv_ratio", "sv_fro", "sv_cumulative"]
    """sv_ratio: those of at least 1/value of the largest. sv_fro: `value` of the Frobenius norm.
    sv_cumulative: `value` of the sum of singular values."""
    value: float


@dataclass(frozen=True)
class RankChange:
    """What cutting the rank did to one module."""

    target: Target
    before: int
    after: int
    retained: float
    """Frobenius norm of what was kept, over that of the whole; 1 for a module that is zero."""


def concatenate(adapters: Sequence[tuple[Adapter, Ratio]]) -> Adapter:
    """The sum of adapters, exactly: per module ratio * alpha / rank * up @ down added up over all that have it.

    Ranks add up; alpha is the rank, so that the scale is 1; weights are float32. A module with ratio 0 is left out. Whole
    differences are added up as they are, and where one meets a LoRA, the sum is one.
    Metadata keeps what all inputs say alike of their base. Raises UserError for DoRA, for adapters of different families or
    sizes, and where nothing remains.
    """
    family = _one_family([adapter for adapter, _ in adapters])
    parts: dict[Target, list[LoraModule | FullModule]] = {}
    for adapter, ratio in adapters:
        for target, module in _plain(adapter).items():
            strength = ratio(target) if callable(ratio) else ratio
            if strength != 0:
                parts.setdefault(target, []).append(_at_scale_one(module, strength))
    if not parts:
        raise UserError("Nothing remains of the sum: every ratio is 0, or there is no module to add.")
    for target, modules in parts.items():
        for module in modules:
            if not module.fits(modules[0].shape):
                raise UserError(
                    f"{target.component} {target.path} is for a weight {list(modules[0].shape)} in one adapter and "
                    f"{list(module.shape)} in another: they were trained on models of different sizes."
                )
    summed = {target: _sum(found) for target, found in parts.items()}
    return Adapter(summed, _shared([adapter.metadata for adapter, _ in adapters]), told=family)


def reduce_rank(
    adapter: Adapter, rank: int, conv_rank: int | None = None, dynamic: DynamicRank | None = None
) -> tuple[Adapter, list[RankChange]]:
    """The nearest adapter (in the Frobenius norm) of at most `rank`, and of at most `conv_rank` on 3x3 convolutions.

    conv_rank: None means `rank`. No module's rank grows. Alpha is the new rank, so that the scale is 1; weights are float32,
    the singular values shared evenly between up and down. Whole differences and metadata stay as they are.
    Raises UserError for DoRA, and OptionError for ranks and conditions that cannot be.
    """
    _check_ranks(rank, conv_rank, dynamic)
    modules: dict[Target, LoraModule | FullModule] = {}
    changes = []
    for target, module in _plain(adapter).items():
        if isinstance(module, FullModule):
            modules[target] = module
            continue
        limit = rank if module.kernel == 1 or conv_rank is None else conv_rank
        u, s, vh = factor_svd(module)
        kept = min(limit, module.rank, len(s))
        if dynamic is not None:
            kept = min(kept, _rank_for(s, dynamic))
        modules[target] = from_svd(u[:, :kept], s[:kept], vh[:kept], module.shape)
        whole = float(s.norm())
        changes.append(RankChange(target, module.rank, kept, float(s[:kept].norm()) / whole if whole else 1.0))
    return replace(adapter, modules=modules), changes


def factor_svd(module: LoraModule) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k], Vh [k, in * kh * kw] of alpha / rank * up @ down, float64, k the most rank that it can have.

    QR of both factors leaves a core of rank x rank, whose SVD is that of the product.
    """
    up, down = module.matrices()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(module.alpha / module.rank * r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def from_svd(u: Tensor, s: Tensor, vh: Tensor, shape: Sequence[int]) -> LoraModule:
    """A module of scale 1 for a weight of `shape`, float32, on the CPU. u [out, r], s [r], vh [r, in * kh * kw]."""
    root = s.sqrt()
    rank = len(s)
    up = (u * root).reshape(shape[0], rank, *(1 for _ in shape[2:]))
    down = (root[:, None] * vh).reshape(rank, *shape[1:])
    down, up = (part.to("cpu", torch.float32).contiguous() for part in (down, up))
    return LoraModule(down, up, alpha=float(rank))


def _at_scale_one(module: LoraModule | FullModule, ratio: float) -> LoraModule | FullModule:
    if isinstance(module, FullModule):
        return FullModule(ratio * module.product())
    module = module.without_mid()
    scale = ratio * module.alpha / module.rank
    # Half on either side: a small scale in up alone would leave half precision's normal range (below 6e-5) when saved.
    root = abs(scale) ** 0.5
    up = module.up.float() * (root if scale > 0 else -root)
    return replace(module, down=module.down.float() * root, up=up, alpha=float(module.rank))


def _sum(modules: Sequence[LoraModule | FullModule]) -> LoraModule | FullModule:
    """Of modules of scale 1 for one weight."""
    lora = [module for module in modules if isinstance(module, LoraModule)]
    whole = [module for module in modules if isinstance(module, FullModule)]
    if not whole:
        return _stack(lora)
    shape = whole[0].shape
    return FullModule(torch.stack([module.product().reshape(shape) for module in modules]).sum(dim=0))


def _stack(modules: Sequence[LoraModule]) -> LoraModule:
    """The sum of modules of scale 1, in the layout of the first: a matrix and a 1x1 convolution may meet."""
    inner, outer = modules[0].down.shape[1:], modules[0].up.shape[2:]
    down = torch.cat([module.down.reshape(module.rank, *inner) for module in modules])
    up = torch.cat([module.up.reshape(-1, module.rank, *outer) for module in modules], dim=1)
    return LoraModule(down, up, alpha=float(down.shape[0]))


def _rank_for(s: Tensor, dynamic: DynamicRank) -> int:
    if s[0] == 0:
        return 1
    if dynamic.method == "sv_ratio":
        return int((s >= s[0] / dynamic.value).sum())
    sizes = s**2 if dynamic.method == "sv_fro" else s
    wanted = dynamic.value**2 if dynamic.method == "sv_fro" else dynamic.value
    shares = sizes.cumsum(0) / sizes.sum()
    return min(int((shares < wanted).sum()) + 1, len(s))


def _check_ranks(rank: int, conv_rank: int | None, dynamic: DynamicRank | None) -> None:
    require(rank >= 1, "new_rank", f"must be at least 1, got {rank}.")
    require(conv_rank is None or conv_rank >= 1, "new_conv_rank", f"must be at least 1, got {conv_rank}.")
    if dynamic is None:
        return
    if dynamic.method == "sv_ratio":
        require(dynamic.value >= 1, "dynamic_param", f"of sv_ratio must be at least 1, got {dynamic.value}.")
    else:
        holds = 0 < dynamic.value <= 1
        require(holds, "dynamic_param", f"of {dynamic.method} must be above 0 and at most 1, got {dynamic.value}.")


def _plain(adapter: Adapter) -> dict[Target, LoraModule | FullModule]:
    """The modules, all of them LoRA or whole differences. Raises UserError for other kinds."""
    plain = {t: module for t, module in adapter.modules.items() if isinstance(module, (LoraModule, FullModule))}
    others = [t for t, module in adapter.modules.items() if t not in plain or module.kind.algo == "dora"]
    if others:
        kinds = sorted({adapter.modules[target].kind.title for target in others})
        raise UserError(
            f"{len(others)} of {len(adapter.modules)} modules are {' or '.join(kinds)} (first: {others[0].component} "
            f"{others[0].path}), which can be neither added up nor cut to a rank. Merge into a base instead."
        )
    return plain


def _one_family(adapters: Sequence[Adapter]) -> Family:
    families = {adapter.family.key: adapter.family for adapter in adapters}
    if len(families) > 1:
        titles = " and ".join(family.title for family in families.values())
        raise UserError(f"Adapters of {titles} cannot be added: their modules are of different models.")
    return next(iter(families.values()))


def _shared(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    first, *others = metadata
    return {
        key: first[key]
        for key in _BASE_ENTRIES
        if key in first and all(other.get(key) == first[key] for other in others)
    }
