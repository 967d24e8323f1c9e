"""What a network is made of: which modules of which models get an adapter, of which kind, rank and alpha."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from networks import AdapterError
from networks.blocks import block_of
from networks.families import FAMILIES, SD15, UNET, Family
from networks.kinds import KINDS, Kind, without_effect
from networks.names import Target

RUN_KEY = "repa_run"
"""Metadata of an adapter file by which the run that trained it knows it again; see library/training/earlier.py."""

# What readers need to load an adapter file.
_NEEDED = frozenset(
    ("ss_v2", "ss_base_model_version", *(f"ss_network_{name}" for name in ("module", "dim", "alpha", "args")))
)

# Options of --network_args that are called otherwise here.
_ARGUMENTS = {"conv_rank": "conv_dim"}
_NOT_ARGUMENTS = ("family", "rank", "alpha", "unet", "text_encoder", "dropout", "sizes", "parts")
_BLOCKS = {"mid": ("mid_block.",), "down_mid": ("down_blocks.", "mid_block.")}
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
PARTS = ("time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
"""Parts of a U-Net whose weights can be trained whole, where no adapter is on them."""
_PER_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "block_lr_weights")


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that names and shapes of a network's weights follow from. Raises AdapterError for what cannot be."""

    family: str = SD15.key
    """Key of the base's family in FAMILIES."""
    algo: str = "lora"
    """What each adapter is, a key of networks.kinds.KINDS."""
    rank: int = 4
    """Inner dimension on Linear layers and 1x1 convolutions; of OFT the number of blocks."""
    alpha: float = 1.0
    """These adapters act with the scale alpha / rank; OFT has none."""
    conv_rank: int | None = None
    """Rank on 3x3 convolutions. None, and no conv_block_dims: residual blocks and resamplers get no adapters at all."""
    conv_alpha: float | None = None
    """Alpha on 3x3 convolutions. None means 1.0, kohya's default."""
    scope: Literal["mid", "down_mid", "all"] = "all"
    """Blocks of the U-Net with adapters."""
    targets: Literal["attention", "kohya"] = "kohya"
    """In its transformers: to_q, to_k, to_v and to_out.0, or every Linear and 1x1 convolution."""
    unet: bool = True
    text_encoder: bool = True
    """All text encoders that the network is given."""
    parts: tuple[str, ...] = ()
    """Of PARTS: those whose weights and biases are trained whole, but for layers with an adapter."""
    dropout: float = 0.0
    """Share of what the down matrix gives that is dropped while training."""
    rank_dropout: float = 0.0
    """Share of the ranks that is dropped for each sample; of LoHa and LoKr share of the outputs, for the batch."""
    module_dropout: float = 0.0
    """Probability that an adapter is left out of a step."""
    block_dims: tuple[int, ...] | None = None
    """Rank for each block of the U-Net (see networks.blocks); 0 is no adapters there."""
    block_alphas: tuple[float, ...] | None = None
    """Alpha for each block; 0 is no adapters there."""
    conv_block_dims: tuple[int, ...] | None = None
    """The same for 3x3 convolutions."""
    conv_block_alphas: tuple[float, ...] | None = None
    """The same for 3x3 convolutions."""
    block_lr_weights: tuple[float, ...] | None = None
    """Factor of the learning rate for each block of the U-Net."""
    block_lr_zero_threshold: float = 0.0
    """Blocks whose factor is not above this get no adapters."""
    factor: int = -1
    """LoKr: size of the smaller Kronecker factor; -1 is the most square one."""
    decompose_both: bool = False
    """LoKr: reduce both Kronecker factors to the rank, not the larger one alone."""
    constraint: float | None = None
    """OFT: bound on the norm of a layer's rotation, times its number of outputs."""
    sizes: Mapping[str, tuple[int, float]] | None = None
    """Component and path of a module -> its rank and alpha. Given, it alone says which modules have an adapter."""

    def __post_init__(self) -> None:
        _require(self.family in FAMILIES, f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}.")
        _require(self.algo in KINDS, f"algo must be one of {', '.join(KINDS)}, got {self.algo!r}.")
        for name, choices in (("scope", ("mid", "down_mid", "all")), ("targets", ("attention", "kohya"))):
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        for name in ("rank", "alpha", "conv_rank", "conv_alpha", "constraint"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"{name} must be positive, got {value}.")
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be at least 0 and below 1, got {value}.")
        unknown = [part for part in self.parts if part not in PARTS]
        _require(not unknown, f"parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}.")
        for name in without_effect(self):
            raise AdapterError(f"Network {name} has no effect with algo={self.algo}.")
        _require(self.unet or self.text_encoder, "is of neither the U-Net nor the text encoders.")
        for name in _PER_BLOCK:
            values = getattr(self, name)
            if values is None:
                continue
            count, (down, mid, up) = self._family.block_count, self._family.sections
            _require(
                len(values) == count,
                f"{name} needs {count} numbers for {self._family.title} ({down} down, {mid} mid, {up} up"
                f"{', one before and one after' if count > down + mid + up else ''}), got {len(values)}.",
            )
            _require(all(0 <= value < math.inf for value in values), f"{name} must not have negative numbers.")

    @property
    def kind(self) -> Kind:
        return KINDS[self.algo]

    @property
    def _family(self) -> Family:
        return FAMILIES[self.family]

    @property
    def _conv_alpha(self) -> float:
        return 1.0 if self.conv_alpha is None else self.conv_alpha

    @property
    def has_convolutions(self) -> bool:
        """Whether residual blocks and resamplers are adapted."""
        return self.sizes is not None or self.conv_rank is not None or self.conv_block_dims is not None

    def size_of(self, target: Target, kernel: int) -> tuple[int, float] | None:
        """Rank and alpha of the adapter on a module with this kernel size (1 for a Linear); None where it gets none."""
        if self.sizes is not None:
            return self.sizes.get(f"{target.component}.{target.path}")
        if target.component == UNET and not self._reaches(target.path):
            return None
        rank, alpha, ranks, alphas = (
            (self.rank, self.alpha, self.block_dims, self.block_alphas)
            if kernel == 1
            else (self.conv_rank or 0, self._conv_alpha, self.conv_block_dims, self.conv_block_alphas)
        )
        if target.component == UNET and any(getattr(self, name) is not None for name in _PER_BLOCK):
            block = block_of(self._family, target.path)
            rank = rank if ranks is None else ranks[block]
            alpha = alpha if alphas is None else alphas[block]
            if self.block_lr_weights is not None and self.block_lr_weights[block] <= self.block_lr_zero_threshold:
                return None
        return (rank, alpha) if rank > 0 and alpha > 0 else None

    def _reaches(self, path: str) -> bool:
        """Whether a module of the U-Net lies in the blocks, and is of the layers, that get adapters."""
        is_target = self.targets == "kohya" or ".attentions." not in path or path.endswith(_ATTENTION)
        return is_target and (self.scope == "all" or path.startswith(_BLOCKS[self.scope]))

    def learning_rate_factor(self, target: Target) -> float:
        """By how much the learning rate of a module's adapter differs from that of its model."""
        if target.component != UNET or self.block_lr_weights is None:
            return 1.0
        return self.block_lr_weights[block_of(self._family, target.path)]

    def block_title(self, target: Target) -> str:
        """ " block 4" of the U-Net where blocks learn at rates of their own, else nothing."""
        if target.component != UNET or self.block_lr_weights is None:
            return ""
        return f" block {block_of(self._family, target.path)}"

    def arguments(self) -> dict[str, str]:
        """What differs from the defaults, under the keys of --network_args, lists with commas."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _NOT_ARGUMENTS and value != field.default:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                found[_ARGUMENTS.get(field.name, field.name)] = text
        return found

    def to_json(self) -> str:
        values = asdict(self)
        return json.dumps(values if self.parts else {name: value for name, value in values.items() if name != "parts"})

    @classmethod
    def from_json(cls, text: str) -> NetworkSpec:
        try:
            values: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise AdapterError(f"Network specification is not valid JSON: {error}.") from None
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise AdapterError(
                f"Network specification has unknown entries: {', '.join(unknown)}. It is of a newer version."
            )
        for name in _PER_BLOCK:
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        values["parts"] = tuple(values.get("parts", ()))
        if values.get("sizes") is not None:
            values["sizes"] = {name: (int(rank), float(alpha)) for name, (rank, alpha) in values["sizes"].items()}
        return cls(**values)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AdapterError(f"Network {message}")


def is_kept(key: str) -> bool:
    """Whether a file's metadata have an entry even with --no_metadata."""
    return key in _NEEDED or key.startswith(("modelspec.", "sshs_"))
