"""--network_args: what the network is like beyond its rank, as KEY=VALUE words with kohya's keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from library.options.arguments import pair_of
from library.options.checks import require
from networks.kinds import KINDS, LORAPLUS, Kind, without_effect

CurveShape = Literal["sine", "cosine", "linear", "reverse_linear", "zeros"]


@dataclass(frozen=True)
class BlockCurve:
    """Learning-rate weights of a row of blocks by kohya's preset of this name, `base` added to each."""

    shape: CurveShape
    base: float = 0.0

    def weights(self, count: int) -> tuple[float, ...]:
        """One weight per block, in the order of the data's way through the U-Net."""
        shapes: dict[CurveShape, Callable[[float], float]] = {
            "sine": lambda x: math.sin(x * math.pi / 2),
            "cosine": lambda x: math.sin((1 - x) * math.pi / 2),
            "linear": lambda x: x,
            "reverse_linear": lambda x: 1 - x,
            "zeros": lambda x: 0.0,
        }
        return tuple(shapes[self.shape](i / max(count - 1, 1)) + self.base for i in range(count))


BlockWeights = BlockCurve | tuple[float, ...]


@dataclass(frozen=True)
class NetworkArgs:
    """Lengths of block lists (SD1.5: 25 = 12 + 1 + 12, SDXL: 23 = 1 + 9 + 3 + 9 + 1) are checked once the base is known."""

    algo: str = "lora"
    """What each adapter is, a key of networks.kinds.KINDS."""
    conv_dim: int | None = None
    """Rank of adapters on 3x3 convolutions. Default: none there."""
    conv_alpha: float | None = None
    """Alpha of these adapters. Default: 1, kohya's."""
    rank_dropout: float | None = None
    """Share of the ranks of an adapter that are dropped for each sample."""
    module_dropout: float | None = None
    """Probability that an adapter is left out of a step."""
    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv 2402.12354): the up matrix learns this many times faster; 16 is the paper's value."""
    loraplus_unet_lr_ratio: float | None = None
    """The same for the U-Net alone. Default: loraplus_lr_ratio."""
    loraplus_text_encoder_lr_ratio: float | None = None
    """The same for the text encoders alone. Default: loraplus_lr_ratio."""
    down_lr_weight: BlockWeights | None = None
    """Factors of the learning rate of the down blocks: numbers, or sine, cosine, linear, reverse_linear, zeros, sine+0.5."""
    mid_lr_weight: BlockWeights | None = None
    """Factors of the learning rate of the mid block or blocks."""
    up_lr_weight: BlockWeights | None = None
    """Factors of the learning rate of the up blocks."""
    block_lr_zero_threshold: float = 0.0
    """Blocks whose factor is not above this get no adapters."""
    block_dims: tuple[int, ...] | None = None
    """Rank for each block of the U-Net; 0 is no adapters there. Default: network_dim."""
    block_alphas: tuple[float, ...] | None = None
    """Alpha for each block. Default: network_alpha."""
    conv_block_dims: tuple[int, ...] | None = None
    """Rank on 3x3 convolutions for each block. Default: conv_dim."""
    conv_block_alphas: tuple[float, ...] | None = None
    """Alpha on 3x3 convolutions for each block. Default: conv_alpha."""
    factor: int = -1
    """LoKr: size of the smaller Kronecker factor; -1 is the most square one."""
    decompose_both: bool = False
    """LoKr: reduce both Kronecker factors to the rank, not the larger one alone."""
    constraint: float | None = None
    """OFT: bound on how far a block may turn, relative to its size (COFT, arXiv 2306.07280). Default: none."""

    def __post_init__(self) -> None:
        for name in ("conv_dim", "conv_alpha", "constraint", *LORAPLUS):
            value = getattr(self, name)
            _require(value is None or value > 0, name, f"must be positive, got {value}.")
        for name in ("rank_dropout", "module_dropout"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, name, f"must be at least 0 and below 1, got {value}.")
        for name in (*_LR_WEIGHTS, "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
            values = getattr(self, name)
            if isinstance(values, tuple):
                _require(all(value >= 0 for value in values), name, "must not have negative numbers.")
        _require(self.factor == -1 or self.factor >= 2, "factor", f"must be -1 or at least 2, got {self.factor}.")
        self._check_company()

    def _check_company(self) -> None:
        """Nothing may be given that has no effect beside the rest."""
        conv = self.conv_dim is not None or self.conv_block_dims is not None
        _require(self.conv_alpha is None or conv, "conv_alpha", "has no effect without conv_dim or conv_block_dims.")
        _require(
            self.conv_block_alphas is None or self.conv_block_dims is not None,
            "conv_block_alphas",
            "has no effect without conv_block_dims.",
        )
        for alphas, dims in (("block_alphas", "block_dims"), ("conv_block_alphas", "conv_block_dims")):
            if getattr(self, alphas) is not None and getattr(self, dims) is not None:
                counts = len(getattr(self, alphas)), len(getattr(self, dims))
                _require(counts[0] == counts[1], alphas, f"has {counts[0]} numbers, and {dims} has {counts[1]}.")
        _require(
            self.block_lr_zero_threshold == 0.0 or self.has_block_learning_rates,
            "block_lr_zero_threshold",
            "has no effect without down_lr_weight, mid_lr_weight or up_lr_weight.",
        )
        for name, algos in without_effect(self).items():
            _require(False, name, f"has no effect with algo={self.algo}; it belongs to {' and '.join(algos)}.")

    @property
    def kind(self) -> Kind:
        return KINDS[self.algo]

    @property
    def has_block_learning_rates(self) -> bool:
        return any(getattr(self, name) is not None for name in _LR_WEIGHTS)


_LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def _require(holds: bool, name: str, message: str) -> None:
    require(holds, "network_args", f"{name} {message}")


KEYS = frozenset(field.name for field in fields(NetworkArgs))


def parse_network_args(words: Sequence[str]) -> NetworkArgs:
    """`words` such as conv_dim=4 and algo=dora, typed and checked.

    Raises OptionError (option network_args): a word without =, an unknown key with the nearest one, a key given twice,
    a value of the wrong kind, keys that cannot go together.
    """
    values: dict[str, Any] = {}
    for word in words:
        require("=" in word, "network_args", f"wants KEY=VALUE, got {word!r}.")
        name, text = pair_of("network_args", word)
        close = difflib.get_close_matches(name, list(_READ), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"There are {', '.join(_READ)}."
        require(name in _READ, "network_args", f"has the unknown key {name}; {hint}")
        require(name not in values, "network_args", f"has {name} twice.")
        try:
            values[name] = _READ[name](text)
        except ValueError as error:
            require(False, "network_args", f"{name}={text}: {error}.")
    return NetworkArgs(**values)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("expected a number") from None
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _optional_number(text: str) -> float | None:
    return None if text == "None" else _number(text)


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("expected True or False")
    return text.lower() in ("true", "1")


def _algorithm(text: str) -> str:
    if text in ("locon", "lycoris"):
        raise ValueError("LoCon is algo=lora with conv_dim")
    if text.lower() not in KINDS:
        raise ValueError(f"expected {', '.join(KINDS)}")
    return text.lower()


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    # kohya takes an empty place in a list for 0.
    return tuple(_number(part) if part.strip() else 0.0 for part in text.split(","))


def _block_weights(text: str) -> BlockWeights:
    shape, plus, base = (part.strip() for part in text.partition("+"))
    for known in get_args(CurveShape):
        if shape == known:
            return BlockCurve(known, _number(base) if plus else 0.0)
    if any(character.isalpha() for character in text.replace("e", "")):
        raise ValueError(f"expected numbers or one of {', '.join(get_args(CurveShape))}, with +BASE if wanted")
    return _numbers(text)


_READ: Mapping[str, Callable[[str], Any]] = {
    "algo": _algorithm,
    "conv_dim": _whole,
    "conv_alpha": _number,
    "rank_dropout": _optional_number,
    "module_dropout": _optional_number,
    **dict.fromkeys(LORAPLUS, _number),
    **dict.fromkeys(_LR_WEIGHTS, _block_weights),
    "block_lr_zero_threshold": _number,
    "block_dims": _whole_numbers,
    "block_alphas": _numbers,
    "conv_block_dims": _whole_numbers,
    "conv_block_alphas": _numbers,
    "factor": _whole,
    "decompose_both": _switch,
    "constraint": _number,
}
