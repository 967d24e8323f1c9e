"""A LoRA from the difference of two checkpoints, and an account of what of the difference it cannot hold.

Source: the truncated SVD of each weight's change, as in kohya's extract_lora_from_models; here exact (eigenvectors of the
change's Gram matrix), without clamping its values.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.merging.algebra import from_svd
from library.models.checkpoint import Checkpoint
from library.words import plural
from networks.adapters import Adapter
from networks.kinds.lora import LoraModule
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, Target
from networks.prediction_names import FLOW_NAME, flow_entries

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""Component -> key -> shape."""

MIN_DIFF = 0.01  # kohya's default

_BLOCK = r"(?:(?:down|up)_blocks\.\d+|mid_block)"
_TRANSFORMER = re.compile(_BLOCK + r"\.attentions\.\d+\..+")
_CONVOLUTIONS = re.compile(_BLOCK + r"\.(?:resnets|downsamplers|upsamplers)\.\d+\..+")
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn|mlp)\..+")


@dataclass(frozen=True)
class Extracted:
    """One module of the LoRA."""

    target: Target
    rank: int
    change: float
    """Frobenius norm of tuned - base."""
    kept: float
    """That of the LoRA's product; the rest has sqrt(change^2 - kept^2)."""

    @property
    def share(self) -> float:
        return self.kept / self.change


@dataclass(frozen=True)
class Left:
    """Changes of one kind that are not in the LoRA."""

    kind: str
    tensors: int
    """Those that differ."""
    change: float
    """Frobenius norm over all of them."""


@dataclass(frozen=True)
class ExtractReport:
    modules: tuple[Extracted, ...]
    unchanged: int
    """Layers that could have an adapter and are alike in both models."""
    too_close: dict[str, float]
    """Text encoder that was passed over -> the largest difference of a value in it, which is within min_diff."""
    left: tuple[Left, ...]
    """The largest first."""
    unmatched: tuple[str, ...]
    """Tensors that only one model has, or that have another shape there, outside of what a LoRA adapts."""

    @property
    def change(self) -> float:
        """Frobenius norm of what both models' adaptable layers differ by."""
        return math.hypot(*(module.change for module in self.modules))

    @property
    def share(self) -> float:
        """Of `change`: how much is in the LoRA."""
        return math.hypot(*(module.kept for module in self.modules)) / self.change

    def as_text(self) -> str:
        """For the screen: what is in the LoRA by component, the layers it holds least of, what it cannot hold."""
        lines = [f"{'component':<16}{'modules':>8}{'rank':>6}{'change':>10}{'kept':>8}   least kept"]
        for component in dict.fromkeys(module.target.component for module in self.modules):
            own = [module for module in self.modules if module.target.component == component]
            change, kept = (math.hypot(*values) for values in ([m.change for m in own], [m.kept for m in own]))
            least = min(own, key=lambda module: module.share)
            lines.append(
                f"{component:<16}{len(own):>8}{max(m.rank for m in own):>6}{change:>10.3g}{kept / change:>8.1%}"
                f"   {least.share:.1%} {least.target.path}"
            )
        lines.append(
            f"In all {self.share:.1%} of the change of these layers (Frobenius norm {self.change:.3g}) is in the LoRA."
        )
        if self.unchanged:
            lines.append(f"{plural(self.unchanged, 'layer is', 'layers are')} alike in both models and got no adapter.")
        for component, largest in self.too_close.items():
            lines.append(f"Passed over: {component}, whose values differ by at most {largest:.2g}, within --min_diff.")
        if self.left:
            lines += ["", "Not in the LoRA:", f"{'change':>10}{'tensors':>9}"]
            lines += [f"{left.change:>10.3g}{left.tensors:>9}  {left.kind}" for left in self.left]
        if self.unmatched:
            count = len(self.unmatched)
            lines.append(
                f"Not compared: {plural(count, 'tensor')} that the models do not share (first: {self.unmatched[0]})."
            )
        return "\n".join(lines)


def adaptable(shapes: Shapes, *, convolutions: bool) -> dict[Target, tuple[int, ...]]:
    """The modules that kohya's networks adapt, and the shapes of their weights, from names alone.

    Every Linear and 1x1 convolution inside the U-Net's transformers, every Linear of the text encoders' attention and
    MLP; with `convolutions` also all of residual blocks, down- and upsamplers.
    """
    found = {}
    for component, named in shapes.items():
        for key, shape in named.items():
            path, _, leaf = key.rpartition(".")
            if leaf == "weight" and len(shape) >= 2 and _is_adaptable(component, path, shape, convolutions):
                found[Target(component, path)] = tuple(shape)
    return found


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int,
    conv_rank: int | None = None,
    min_diff: float = MIN_DIFF,
    components: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Adapter, ExtractReport]:
    """The LoRA of `rank` (`conv_rank` on 3x3 convolutions) that brings `base` nearest to `tuned`, weight by weight.

    conv_rank: None leaves residual blocks and resamplers out. A text encoder is taken where a value differs by more than
    min_diff. components: None means U-Net and text encoders. progress: called with (which module it is at, of how many).
    Weights are float32, the scale is 1; layers that are alike get no adapter. One layer at a time is in memory.
    Raises UserError for models that do not fit together, that are equal, or that hold values which are not finite.
    """
    base_shapes, tuned_shapes = base.shapes, tuned.shapes
    every = comparable(base, tuned, convolutions=conv_rank is not None)
    wanted = (UNET, *base.family.text_encoders) if components is None else components
    too_close = _too_close(base, tuned, every, [part for part in wanted if part != UNET], min_diff)
    targets = {
        target: shape
        for target, shape in every.items()
        if target.component in wanted and target.component not in too_close
    }
    modules: dict[Target, LoraModule] = {}
    report, unchanged = [], 0
    for number, (target, shape) in enumerate(targets.items(), 1):
        if progress is not None:
            progress(number, len(targets))
        change = _change(base, tuned, target.component, f"{target.path}.weight", device)
        norm = _norm(change)
        if norm == 0:
            unchanged += 1
            continue
        is_wide = len(shape) == 4 and shape[2] > 1
        limit = rank if not is_wide or conv_rank is None else conv_rank
        modules[target], kept = nearest_of_rank(change, limit)
        report.append(Extracted(target, modules[target].rank, norm, kept))
    if not modules:
        raise UserError(
            f"{tuned.location.name} and {base.location.name} are alike in every layer that a LoRA can adapt"
            + (f" (text encoders within min_diff {min_diff:g})." if too_close else ".")
        )
    left, unmatched = _left(base, tuned, base_shapes, tuned_shapes, targets, device)
    return Adapter(modules, _metadata(tuned)), ExtractReport(tuple(report), unchanged, too_close, left, unmatched)


def nearest_of_rank(change: Tensor, rank: int) -> tuple[LoraModule, float]:
    """The module whose product is nearest to `change` [out, in, ...], of at most `rank`; and its Frobenius norm.

    The first singular vectors are the eigenvectors of the Gram matrix of the shorter side. In float64 this is exact for
    singular values above 1e-8 of the largest. [5120, 1280] takes 0.6 s on one core, a float32 SVD 0.9 s; a randomised SVD
    of rank 32 takes 0.1 s, but keeps 2 % less of a change that is mostly noise.
    """
    matrix = change.flatten(1).double()
    is_tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if is_tall else matrix  # [short side, long side]
    rank = min(rank, short.shape[0])
    _, vectors = torch.linalg.eigh(short @ short.T)  # ascending
    basis = vectors[:, -rank:].flip(1)  # [short side, rank]
    projected = basis.T @ short  # [rank, long side], rows orthogonal
    sizes = projected.norm(dim=1)
    directions = projected / sizes.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    u, vh = (directions.T, basis.T) if is_tall else (basis, directions)
    return from_svd(u, sizes, vh, change.shape), float(sizes.norm())


def _is_adaptable(component: str, path: str, shape: Sequence[int], convolutions: bool) -> bool:
    if component == UNET:
        if _TRANSFORMER.fullmatch(path):
            return all(side == 1 for side in shape[2:])
        return convolutions and _CONVOLUTIONS.fullmatch(path) is not None
    return component in (TEXT_ENCODER, TEXT_ENCODER_2) and _TEXT_LAYER.fullmatch(path) is not None


def comparable(base: Checkpoint, tuned: Checkpoint, *, convolutions: bool) -> dict[Target, tuple[int, ...]]:
    """The layers that a LoRA can adapt, with their shapes, by headers alone. Raises UserError for models of different sizes."""
    if base.family is not tuned.family:
        raise UserError(
            f"{tuned.location.name} is {tuned.family.title}, {base.location.name} is {base.family.title}: a LoRA is the "
            "difference of two models of one kind."
        )
    every = adaptable(base.shapes, convolutions=convolutions)
    _require_same_shapes(every, tuned.shapes, tuned)
    return every


def _require_same_shapes(targets: Mapping[Target, Sequence[int]], shapes: Shapes, tuned: Checkpoint) -> None:
    wrong = [
        target
        for target, shape in targets.items()
        if tuple(shapes.get(target.component, {}).get(f"{target.path}.weight", ())) != tuple(shape)
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(targets)} layers are absent or of another shape in {tuned.location.name} (first: "
            f"{wrong[0].component} {wrong[0].path}): the models are of different sizes."
        )


def _too_close(
    base: Checkpoint, tuned: Checkpoint, targets: Mapping[Target, object], encoders: Sequence[str], min_diff: float
) -> dict[str, float]:
    """The text encoders in which no value differs by more than min_diff, and the largest difference there is."""
    found = {}
    for component in encoders:
        largest = 0.0
        for target in targets:
            if target.component == component and largest <= min_diff:
                change = _change(base, tuned, component, f"{target.path}.weight", "cpu")
                largest = max(largest, float(change.abs().max()))
        if largest <= min_diff:
            found[component] = largest
    return found


def _change(base: Checkpoint, tuned: Checkpoint, component: str, key: str, device: torch.device | str) -> Tensor:
    """tuned - base of one tensor, float32."""
    change = tuned.read(component, key).to(device).float() - base.read(component, key).to(device).float()
    if not math.isfinite(_norm(change)):
        raise UserError(f"{component} {key} has values that are not finite in one of the models.")
    return change


def _metadata(tuned: Checkpoint) -> dict[str, str]:
    """What modules alone do not tell: of an SDXL LoRA on one text encoder, of a model that predicts velocity or a flow."""
    flow = flow_entries(tuned.flow_shift) if tuned.prediction is FLOW_NAME else {}
    return {
        "modelspec.architecture": f"{tuned.family.architecture}/lora",
        "modelspec.prediction_type": tuned.prediction.modelspec,
        **flow,
    }


def _norm(change: Tensor) -> float:
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))


def _left(
    base: Checkpoint,
    tuned: Checkpoint,
    base_shapes: Shapes,
    tuned_shapes: Shapes,
    targets: Mapping[Target, object],
    device: torch.device | str,
) -> tuple[tuple[Left, ...], tuple[str, ...]]:
    """What else differs, by kind, and the tensors that cannot be compared."""
    squares: dict[str, list[float]] = defaultdict(list)
    unmatched = [
        f"{component} {key}"
        for component, key in _keys(tuned_shapes)
        if tuple(base_shapes.get(component, {}).get(key, ())) != tuple(tuned_shapes[component][key])
    ]
    unmatched += [f"{part} {key}" for part, key in _keys(base_shapes) if key not in tuned_shapes.get(part, {})]
    for component, key in _keys(base_shapes):
        path, _, leaf = key.rpartition(".")
        is_taken = leaf == "weight" and Target(component, path) in targets
        if is_taken or tuple(tuned_shapes.get(component, {}).get(key, ())) != tuple(base_shapes[component][key]):
            continue
        if norm := _norm(_change(base, tuned, component, key, device)):
            squares[_kind(component, key, base_shapes[component][key])].append(norm)
    left = [Left(kind, len(norms), math.hypot(*norms)) for kind, norms in squares.items()]
    return tuple(sorted(left, key=lambda part: -part.change)), tuple(unmatched)


def _keys(shapes: Shapes) -> Iterator[tuple[str, str]]:
    return ((component, key) for component, named in shapes.items() for key in named)


def _kind(component: str, key: str, shape: Sequence[int]) -> str:
    """What a tensor without an adapter is, in words."""
    path = key.rpartition(".")[0]
    if component == VAE:
        return "VAE"
    owner = "U-Net" if component == UNET else component
    if len(shape) < 2:
        return f"{owner}: biases" if key.endswith("bias") else f"{owner}: norms"
    if component == UNET and _CONVOLUTIONS.fullmatch(path):
        return "U-Net: residual blocks and resamplers (--conv_dim adapts them)"
    if _TRANSFORMER.fullmatch(path) or _TEXT_LAYER.fullmatch(path):
        return f"{owner}: layers passed over"
    return f"{owner}: {'embeddings' if '.embeddings.' in key else path.split('.')[0]}"
