"""What is trained: the network's shape, what it starts from, and what it may be aligned to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.alignment import AlignmentOptions
from library.options.checks import not_negative, positive, require
from library.options.given import OptionalAmount
from library.options.kohya.network_args import NetworkArgs, parse_network_args
from networks.kinds import KINDS

# kohya's networks.lora takes this where --network_dim is not given.
DEFAULT_DIM = 4

_LORA = "networks.lora"
*_OTHERS, _LAST = (algo for algo in KINDS if algo != "lora")
_INSTEAD = {
    **{f"networks.{algo}": f"Use networks.lora with --network_args algo={algo}" for algo in (*_OTHERS, _LAST)},
    "lycoris.kohya": f"Use networks.lora with --network_args algo={', '.join(_OTHERS)} or {_LAST}, or conv_dim=N for LoCon",
    "networks.dylora": "Use networks.lora, and merge_lora.py --lora_only --new_rank for smaller ranks afterwards",
    "networks.lora_fa": "Use networks.lora; frozen down matrices save next to nothing beside a frozen base",
}


@dataclass(frozen=True)
class NetworkOptions:
    """The adapters: kind, size, where they sit, what they start from."""

    network_module: str = _LORA
    """Kind of network: networks.lora, the only one. Other kinds of adapter than LoRA are algo=... of network_args."""
    network_dim: int | None = None
    """LoRA rank: inner dimension of each adapter. Size and capacity grow linearly. Default: 4, or with dim_from_weights theirs."""
    network_alpha: float = 1.0
    """LoRA alpha. Adapters act with the scale network_alpha / network_dim; 0 stands for network_dim."""
    network_dropout: float | None = None
    """Share of each adapter's inner values that is dropped while training."""
    network_args: tuple[str, ...] = ()
    """More of the network as KEY=VALUE words: conv_dim=4 conv_alpha=1 algo=dora rank_dropout=0.1 block_dims=..."""
    network_train_unet_only: bool = False
    """Adapters on the U-Net alone; the text encoders stay as they are."""
    network_train_text_encoder_only: bool = False
    """Adapters on the text encoders alone; the U-Net stays as it is."""
    network_weights: Path | None = None
    """Adapter file to start from instead of fresh weights."""
    dim_from_weights: bool = False
    """Take ranks and alphas from network_weights, module by module."""
    base_weights: tuple[Path, ...] = ()
    """Adapter files that are folded into the base before training."""
    base_weights_multiplier: tuple[float, ...] = ()
    """Strength of each of them; 1 where none is given."""
    train_parts: tuple[
        Literal["time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"], ...
    ] = ()
    """Parts of the U-Net whose Linear layers and convolutions are trained whole, where they have no adapter, for students that LoRA
    alone does not make a flow of; add_embedding is SDXL's. merge_lora.py folds them into a full model."""
    scale_weight_norms: OptionalAmount = None
    """Greatest norm of an adapter's product; larger ones are scaled down after each step. 1 is usual."""

    def __post_init__(self) -> None:
        module = self.network_module
        instead = _INSTEAD.get(module, "There is networks.lora, for SD1.5 and SDXL")
        require(module == _LORA, "network_module", f"{module} is not here. {instead}.")
        positive("network_dim", self.network_dim)
        not_negative("network_alpha", self.network_alpha)
        positive("scale_weight_norms", self.scale_weight_norms)
        require(
            self.network_dropout is None or 0 <= self.network_dropout < 1,
            "network_dropout",
            f"must be at least 0 and below 1, got {self.network_dropout}.",
        )
        require(
            not (self.network_train_unet_only and self.network_train_text_encoder_only),
            "network_train_unet_only",
            "and network_train_text_encoder_only exclude each other: nothing would be trained.",
        )
        self._check_files()
        hint = " Use constraint." if "constraint" in self.args.kind.options else ""
        require(
            self.scale_weight_norms is None or self.args.kind.adds,
            "scale_weight_norms",
            f"has no effect with algo={self.args.algo}, which adds nothing to a weight.{hint}",
        )

    def _check_files(self) -> None:
        for name, paths in (("network_weights", [self.network_weights]), ("base_weights", self.base_weights)):
            for path in paths:
                require(path is None or path.exists(), name, f"{path} does not exist.")
        require(
            not self.dim_from_weights or self.network_weights is not None,
            "dim_from_weights",
            "needs network_weights, the file whose ranks are taken.",
        )
        require(
            not self.dim_from_weights or self.network_dim == type(self).network_dim,
            "network_dim",
            "and dim_from_weights exclude each other: the ranks come from one of them.",
        )
        multipliers, weights = len(self.base_weights_multiplier), len(self.base_weights)
        require(
            multipliers <= weights,
            "base_weights_multiplier",
            f"has {multipliers} numbers, and base_weights names {weights} files.",
        )

    @property
    def args(self) -> NetworkArgs:
        """network_args, typed."""
        return parse_network_args(self.network_args)

    @property
    def scope(self) -> Literal["mid", "down_mid", "all"]:
        """Blocks of the U-Net with adapters."""
        return "all"

    @property
    def targets(self) -> Literal["attention", "kohya"]:
        """Layers in their transformers: those of attention, or every Linear and 1x1 convolution."""
        return "kohya"

    @property
    def drawn_by_module(self) -> bool:
        """Whether first values of down matrices follow from the module's name, not from the weight's."""
        return False

    @property
    def rank(self) -> int:
        """network_dim or its default; with dim_from_weights the file's ranks count instead."""
        return DEFAULT_DIM if self.network_dim is None else self.network_dim

    @property
    def alpha(self) -> float:
        return self.network_alpha or float(self.rank)

    @property
    def base_weights_with_multipliers(self) -> list[tuple[Path, float]]:
        given = self.base_weights_multiplier
        return list(zip(self.base_weights, given + (1.0,) * (len(self.base_weights) - len(given)), strict=True))


@dataclass(frozen=True)
class NetworkAlignmentOptions(AlignmentOptions):
    """Alignment as in train_repa.py, off unless asked for."""

    alignment: bool = False
    """Train with AlignHeads, supervised by cached tokens of dino_model on a grid of each bucket's aspect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alignment:
            for field in dataclasses.fields(self):
                require(getattr(self, field.name) == field.default, field.name, "has no effect without --alignment.")
