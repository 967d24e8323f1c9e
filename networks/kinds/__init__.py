"""The kinds of adapter, a row each: whatever differs from kind to kind is in its row here or in the module that the row names.

Options are checked by this table, so nothing here imports torch; `data` and `layer` are resolved where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


@dataclass(frozen=True)
class Kind:
    algo: str
    """Its key: `algo=` in --network_args."""
    title: str
    """As users call it."""
    data: str
    """Its AdapterModule, as "module:class": the tensors of a file, and what they make of a weight."""
    layer: str
    """Its AdaptedLayer, as "module:class": what is trained; "" for kinds that are read alone."""
    formula: str
    """What it adds to a weight W, for reports."""
    options: tuple[str, ...] = ()
    """Options of NetworkArgs and NetworkSpec that it heeds, of those that not every kind does."""
    readers: str = ""
    """Which programs read its files, and how; "" where all do. Their modelspec.usage_hint."""
    other_form: str = ""
    """Pattern of the keys of its files in forms that are not read, so that they are named; "" for none."""
    is_lycoris: bool = False
    """Whether programs know its files as LyCORIS'."""
    adds: bool = True
    """Whether it adds a matrix that does not depend on W (of DoRA: before the magnitude), so that there is a norm to bound."""
    note: str = ""
    """What a table of its ranks, alphas and norms leaves out."""

    @property
    def is_lora(self) -> bool:
        """Whether it is LoRA with or without something around it, so that what is known of ranks holds."""
        return self.data == KINDS["lora"].data


KINDS = {
    kind.algo: kind
    for kind in (
        Kind(
            "lora",
            "LoRA",
            data="networks.kinds.lora:LoraModule",
            layer="networks.kinds.lora:LoraLayer",
            formula="alpha / rank * up @ down",
            options=("dropout", "rank_dropout", *LORAPLUS),
        ),
        Kind(
            "dora",
            "DoRA",
            data="networks.kinds.lora:LoraModule",
            layer="networks.kinds.lora:DoraLayer",
            formula="m * V / norm of V - W with V = W + alpha / rank * up @ down",
            options=("dropout", "rank_dropout", *LORAPLUS),
            readers="DoRA with magnitudes of the inputs, as ComfyUI, A1111 (1.9 and later) and LyCORIS compute it, diffusers does "
            "not.",
            note="the norm leaves out what its magnitudes do, which only the base would tell.",
        ),
        Kind(
            "loha",
            "LoHa",
            data="networks.kinds.products:LohaModule",
            layer="networks.kinds.products:LohaLayer",
            formula="alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry",
            options=("rank_dropout",),
            readers="LoHa in LyCORIS' form: for ComfyUI, A1111 and LyCORIS, not for diffusers.",
            other_form=r"\.hada_",
            is_lycoris=True,
        ),
        Kind(
            "lokr",
            "LoKr",
            data="networks.kinds.products:LokrModule",
            layer="networks.kinds.products:LokrLayer",
            formula="alpha / rank * kron(w1, w2)",
            options=("rank_dropout", "factor", "decompose_both"),
            readers="LoKr in LyCORIS' form: for ComfyUI, A1111 and LyCORIS, not for diffusers.",
            other_form=r"\.lokr_",
            is_lycoris=True,
        ),
        Kind(
            "oft",
            "OFT",
            data="networks.kinds.oft:OftModule",
            layer="networks.kinds.oft:OftLayer",
            formula="(R^T - 1) W, R by blocks of output rows",
            options=("constraint",),
            readers="OFT in the form of LyCORIS' diag-oft: for ComfyUI, A1111 (1.7 and later) and LyCORIS, not for diffusers.",
            other_form=r"\.oft_",
            is_lycoris=True,
            adds=False,
            note="rank is the number of blocks, alpha a bound; what it adds only the base would tell.",
        ),
    )
}

READ_ONLY = {
    kind.algo: kind
    for kind in (
        Kind(
            "dora-loha",
            "LoHa with DoRA's magnitudes",
            data=KINDS["loha"].data,
            layer="",
            formula="m * V / norm of V - W with V = W + alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)",
            note=KINDS["dora"].note,
        ),
        Kind(
            "dora-lokr",
            "LoKr with DoRA's magnitudes",
            data=KINDS["lokr"].data,
            layer="",
            formula="m * V / norm of V - W with V = W + alpha / rank * kron(w1, w2)",
            note=KINDS["dora"].note,
        ),
        Kind(
            "full",
            "Full (diff)",
            data="networks.kinds.full:FullModule",
            layer="networks.kinds.full:FullLayer",
            formula="diff",
            readers="Whole differences (diff, diff_b) beside LoRA: for ComfyUI, A1111 and LyCORIS, not for diffusers.",
            note="of weights and biases, without a rank.",
        ),
        Kind(
            "glora",
            "GLoRA",
            data="networks.kinds.of_weights:GloraModule",
            layer="",
            formula="alpha / rank * (b1 @ b2 + W @ a1 @ a2)",
            adds=False,
            note="what it adds only the base would tell.",
        ),
        Kind(
            "ia3",
            "IA3",
            data="networks.kinds.of_weights:Ia3Module",
            layer="",
            formula="W times a factor for each output or input",
            adds=False,
            note="it has neither rank nor alpha; what it adds only the base would tell.",
        ),
    )
}
"""Kinds that are read, merged and drawn with, and that no algo= names: `full` is trained beside others, the rest not at all."""


def without_effect(options: Any) -> dict[str, list[str]]:
    """Fields of a dataclass with an `algo` that are not at their defaults and mean nothing to it -> the algos they belong to."""
    found = {}
    for field in fields(options):
        heeding = [kind.algo for kind in KINDS.values() if field.name in kind.options]
        if heeding and options.algo not in heeding and getattr(options, field.name) != field.default:
            found[field.name] = heeding
    return found
