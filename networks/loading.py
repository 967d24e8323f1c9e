"""Whether an adapter can be what a network starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import AdapterError
from networks.adapted_layer import AdaptedLayer
from networks.adapters import Adapter
from networks.families import FAMILIES, UNET
from networks.kinds.full import FullLayer, FullModule
from networks.names import Target
from networks.spec import PARTS, NetworkSpec


def require_trainable(adapter: Adapter) -> None:
    """Raises AdapterError where modules are of kinds that are merged and drawn with alone."""
    others = [target for target, module in adapter.modules.items() if not module.kind.layer]
    kinds = ", ".join(sorted({adapter.modules[target].kind.title for target in others}))
    _refuse(
        others,
        len(adapter.modules),
        f"modules are {kinds}, which cannot be trained",
        "Fold the file into the base with --base_weights, and train a new adapter on that.",
    )


def check_fits(adapter: Adapter, layers: Mapping[Target, AdaptedLayer], spec: NetworkSpec) -> None:
    """Raises AdapterError where an adapter is not of the modules, kind, ranks and shapes of these layers."""
    extra = [target for target in adapter.modules if target not in layers]
    _refuse(
        extra, len(adapter.modules), "modules of the adapter are not trained here", _guess_extra(extra, adapter, spec)
    )
    missing = [target for target in layers if target not in adapter.modules]
    _refuse(missing, len(layers), "modules to train are not in the adapter", _guess_missing(missing, layers, adapter))
    pairs: list[tuple[Target, Any, AdaptedLayer]] = [(t, adapter.modules[t], layer) for t, layer in layers.items()]
    others = [(t, module.kind, kind) for t, module, layer in pairs if module.kind != (kind := layer.to_module().kind)]
    found, wanted = (
        ", ".join(sorted({kind.title for kind in kinds}))
        for kinds in ([k for _, k, _ in others], [k for *_, k in others])
    )
    _refuse(
        [t for t, *_ in others], len(pairs), f"modules are {found}, not {wanted}", "Give its algo in --network_args."
    )
    misfits = [t for t, module, layer in pairs if not module.fits(layer.weight_shape)]
    _refuse(misfits, len(pairs), "modules are of other shapes than the model's", "It is for another base model.")
    ranks = [(t, module.rank, own) for t, module, layer in pairs if module.rank != (own := layer.to_module().rank)]
    found = ", ".join(str(rank) for rank in sorted({rank for _, rank, _ in ranks}))
    here = ", ".join(str(rank) for rank in sorted({rank for _, _, rank in ranks}))
    _refuse(
        [t for t, _, _ in ranks],
        len(pairs),
        f"modules of the adapter are of rank {found} where {here} is to be trained",
        "--dim_from_weights takes over its ranks and alphas.",
    )


def _guess_extra(extra: list[Target], adapter: Adapter, spec: NetworkSpec) -> str:
    if (known := adapter.known_family) is not None and known.key != spec.family:
        return f"It is for {known.title}, and the base model is {FAMILIES[spec.family].title}."
    if extra and all(isinstance(adapter.modules[target], FullModule) for target in extra):
        return (
            f"They are whole differences, which --train_parts trains of {', '.join(PARTS)} alone. Fold the file into the base with "
            "--base_weights, and train a new adapter on that."
        )
    if extra and all(target.component != UNET for target in extra):
        return "They are of text encoders: train these as well, or leave the adapter's U-Net alone in a file."
    if any(".resnets." in target.path or "samplers." in target.path for target in extra):
        return "It has convolutions: add conv_dim to --network_args, or --dim_from_weights."
    return "--dim_from_weights trains just the modules of the adapter."


def _guess_missing(missing: list[Target], layers: Mapping[Target, AdaptedLayer], adapter: Adapter) -> str:
    if missing and all(isinstance(layers[target], FullLayer) for target in missing):
        return "It was trained without these --train_parts: leave them out."
    if missing and not {target.component for target in missing} & {target.component for target in adapter.modules}:
        alone = "--network_train_unet_only" if missing[0].component != UNET else "--network_train_text_encoder_only"
        return f"It has nothing for the {missing[0].component}: add {alone}, or --dim_from_weights."
    return "--dim_from_weights trains just the modules of the adapter."


def _refuse(targets: list[Target], count: int, what: str, guess: str) -> None:
    if targets:
        names = ", ".join(".".join(target) for target in targets[:3])
        raise AdapterError(f"{len(targets)} of {count} {what} (first: {names}). {guess}")
