"""The models of a training: loaded with base_weights folded in, and with the adapters that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.device import named_dtype
from library.errors import UserError
from library.files import file_hash, read_json
from library.merging.merge import fold_into_modules
from library.merging.source import read_source
from library.models.at_rest import STORED
from library.models.base_family import family_of
from library.models.block_swap import swappable
from library.models.conditioning import TextConditioner, clip_skip
from library.models.configs import configs_of
from library.models.fingerprint import weight_fingerprint
from library.models.load import TextPart, load_text_encoders, load_unet, unet_config
from library.models.locate import BaseLocation
from library.models.lone_vae import LoneVae, locate_vae
from library.models.single_file import file_text_config
from library.models.text_fusion import fusion_facts, load_fusion
from library.options.kohya.network_args import BlockCurve
from library.options.run import RunOptions
from library.training.optimizers import ParameterGroup
from networks import AdapterError
from networks.adapters import Adapter
from networks.blocks import block_weights
from networks.families import SD15, TEXT_ENCODER, TEXT_ENCODER_2, UNET, Family
from networks.kinds.lora import LORA_DOWN
from networks.loading import require_trainable
from networks.names import Target
from networks.network import PARTS_GROUP, Network, add_network, weight_name
from networks.spec import NetworkSpec


def load_frozen_unet(options: RunOptions, base: BaseLocation, family: Family, device: torch.device) -> nn.Module:
    """The U-Net with base_weights folded in, rounded to the compute dtype once, or as the file has it if it is to stay so."""
    if options.model.format_at_rest(UNET) == STORED:
        return load_unet(base, families=(family,), dtype=None, device=device)
    dtype, folded = _dtypes(options)
    unet = load_unet(base, families=(family,), dtype=folded, device=device)
    _fold_base_weights({UNET: unet}, options, family)
    return nn.Module.to(unet, dtype)


def load_frozen_text(options: RunOptions, base: BaseLocation, family: Family, device: torch.device) -> list[TextPart]:
    """The text encoders in the compute dtype, likewise."""
    dtype, folded = _dtypes(options)
    parts = load_text_encoders(base, families=(family,), dtype=folded, device=device)
    _fold_base_weights({part.component: part.model for part in parts}, options, family)
    return [part._replace(model=part.model.to(dtype)) for part in parts]


class FrozenModels:
    """Where a run gets its frozen models: loaded for it. The trainer of a study keeps them (`library.search.trainer`)."""

    def unet(self, options: RunOptions, base: BaseLocation, family: Family, device: torch.device) -> nn.Module:
        return load_frozen_unet(options, base, family, device)

    def text(self, options: RunOptions, base: BaseLocation, family: Family, device: torch.device) -> list[TextPart]:
        if options.model.format_at_rest(TEXT_ENCODER) == STORED:
            return load_text_encoders(base, families=(family,), dtype=None, device=device)
        return load_frozen_text(options, base, family, device)


def text_conditioner(
    options: RunOptions, family: Family, parts: Sequence[TextPart], device: torch.device
) -> TextConditioner:
    """The text encoders as one function of prompts, with the fusion that the options name."""
    dtype = named_dtype(options.model.mixed_precision)
    return TextConditioner(
        family,
        parts,
        clip_skip=clip_skip(options.text, family),
        chunks=options.text.chunks,
        fusion=load_fusion(options.fusion, family, parts, dtype=dtype, device=device),
    )


def meta_models(
    options: RunOptions, location: BaseLocation | None, family: Family, *, text: bool = True
) -> dict[str, Any]:
    """U-Net and text encoders of a base on the meta device, frozen, in the compute dtype.

    location: None for the family's published base.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    dtype = named_dtype(options.model.mixed_precision)
    published = configs_of(family)
    models: dict[str, Any] = {}
    config = published.unet if location is None else unet_config(location, families=(family,))
    with torch.device("meta"):
        models[UNET] = nn.Module.to(UNet2DConditionModel.from_config(config), dtype)
        for component in family.text_encoders if text else ():
            kind = CLIPTextModelWithProjection if component == TEXT_ENCODER_2 else CLIPTextModel
            if location is None:
                values = published.text_encoders[component]
            elif location.is_file:
                values = file_text_config(location.path, family, component)
            else:
                values = read_json(location.path / component / "config.json")
            models[component] = kind(CLIPTextConfig.from_dict(values)).to(dtype)
    for model in models.values():
        model.requires_grad_(False)
    return models


def check_weights(options: RunOptions, base: BaseLocation, family: Family) -> list[str]:
    """See that network_weights and base_weights fit the base and the network; returns what the user should know of these files.

    Raises UserError; nothing heavy is loaded.
    """
    notes = []
    for path in options.network.base_weights:
        adapter = read_source(path).adapter
        _require_family("base_weights", path, adapter, family)
        notes += [f"base_weights {path}: {note}" for note in adapter.notes]
    start = start_weights(options)
    if start is not None:
        _require_family("network_weights", options.network.network_weights, start, family)
        notes += [f"network_weights {options.network.network_weights}: {note}" for note in start.notes]
        build_network(meta_models(options, base, family, text=options.trains_text_encoders), options, family, start)
    return notes


def check_swapped(options: RunOptions, base: BaseLocation, family: Family) -> None:
    """Raise UserError where the U-Net has not so many blocks as are to be swapped."""
    count = options.speed.blocks_to_swap
    if count is None:
        return
    there = len(swappable(meta_models(options, base, family, text=False)[UNET]))
    if count > there:
        raise UserError(
            f"blocks_to_swap {count} is more than there are: the U-Net has {there} residual and transformer blocks."
        )


def start_weights(options: RunOptions) -> Adapter | None:
    """Raises UserError where network_weights cannot be trained on."""
    path = options.network.network_weights
    if path is None:
        return None
    adapter = read_source(path).adapter
    try:
        require_trainable(adapter)
    except AdapterError as error:
        raise UserError(f"network_weights {path}: {error}") from None
    return adapter


def build_network(
    models: Mapping[str, nn.Module], options: RunOptions, family: Family, start: Adapter | None
) -> Network:
    """The adapters, in the models. Raises UserError where they do not fit, or the weights to start from do not."""
    try:
        drawn_by = _by_module if options.network.drawn_by_module else weight_name
        network = add_network(models, network_spec(options, family, start), options.training.seed, drawn_by)
        if start is not None:
            network.load(start)
    except AdapterError as error:
        raise UserError(str(error)) from None
    if options.model.full_bf16:
        for parameter in network.parameters.values():
            parameter.data = parameter.data.to(torch.bfloat16)
    return network


def _by_module(target: Target, weight: str) -> str:
    return target.path if weight == LORA_DOWN else weight_name(target, weight)


def network_spec(options: RunOptions, family: Family, start: Adapter | None) -> NetworkSpec:
    """Which modules are trained, and how. start: --network_weights, whose sizes dim_from_weights takes."""
    network, args = options.network, options.network.args
    weights = None
    if args.has_block_learning_rates:
        sections = zip((args.down_lr_weight, args.mid_lr_weight, args.up_lr_weight), family.sections, strict=True)
        values = [one.weights(count) if isinstance(one, BlockCurve) else one for one, count in sections]
        weights = block_weights(family, *values)
    sizes = None
    if network.dim_from_weights and start is not None:
        sizes = {
            f"{target.component}.{target.path}": (m.rank, m.alpha) for target, m in start.modules.items() if m.rank > 0
        }
    shared = {field.name for field in fields(NetworkSpec)} & {field.name for field in fields(args)}
    return NetworkSpec(
        family=family.key,
        rank=network.rank,
        alpha=network.alpha,
        conv_rank=args.conv_dim,
        scope=network.scope,
        targets=network.targets,
        unet=options.trains_unet,
        text_encoder=options.trains_text_encoders,
        parts=network.train_parts,
        dropout=network.network_dropout or 0.0,
        block_lr_weights=weights,
        sizes=sizes,
        **{name: value for name in shared if (value := getattr(args, name)) is not None},
    )


def parameter_groups(network: Network, options: RunOptions, family: Family) -> list[ParameterGroup]:
    """Parameters by learning rate; a part of the network whose rate is 0 is not trained and is left out."""
    args, optimizer = options.network.args, options.optimizer
    plus = {
        component: ratio
        for component in (UNET, *family.text_encoders)
        if (
            ratio := (args.loraplus_unet_lr_ratio if component == UNET else args.loraplus_text_encoder_lr_ratio)
            or args.loraplus_lr_ratio
        )
    }
    rates = {UNET: optimizer.unet_rate}
    rates |= dict(zip(family.text_encoders, optimizer.text_encoder_rates(len(family.text_encoders)), strict=True))
    groups = []
    for group in network.groups(plus):
        rate = rates[group.component] * group.factor
        if group.name == PARTS_GROUP and optimizer.train_parts_lr is not None:
            rate = optimizer.train_parts_lr
        if rate > 0:
            parameters = [network.parameters[name] for name in group.parameters]
            groups.append(ParameterGroup(group.name, parameters, rate, optimizer.weight_decay))
    return groups


def _dtypes(options: RunOptions) -> tuple[torch.dtype, torch.dtype]:
    """To compute in, and to fold adapters in."""
    dtype = named_dtype(options.model.mixed_precision)
    return dtype, torch.float32 if options.network.base_weights else dtype


def _fold_base_weights(models: Mapping[str, nn.Module], options: RunOptions, family: Family) -> None:
    for path, multiplier in options.network.base_weights_with_multipliers:
        adapter = read_source(path).adapter
        modules = {target: module for target, module in adapter.modules.items() if target.component in models}
        if modules:
            fold_into_modules(models, family, replace(adapter, modules=modules), multiplier)


def _require_family(option: str, path: Path | None, adapter: Adapter, family: Family) -> None:
    known = adapter.known_family
    if known not in (None, family):
        raise UserError(f"{option} {path} is for {known.title}, and the base model is {family.title}.")


def scaling_factor(options: RunOptions, base: BaseLocation, family: Family) -> float:
    """What latents are multiplied with, from the VAE's configuration, which leaves out what AutoencoderKL takes anyway.

    A lone VAE whose configuration does not say has its base's family's.
    """
    base = base if options.model.vae is None else locate_vae(options.model.vae)
    if isinstance(base, LoneVae):
        return base.scaling_factor(family)
    if base.is_file:
        return family_of(base).scaling_factor
    return float(read_json(base.path / "vae" / "config.json").get("scaling_factor", SD15.scaling_factor))


def base_weights_facts(options: RunOptions, base: BaseLocation, components: Sequence[str]) -> dict[str, Any]:
    """Hashes of the frozen weights: those of the base, and of the adapters folded into it with their strengths."""
    facts: dict[str, Any] = {
        component: weight_fingerprint(base, component, options.cache.cache_dir) for component in components
    }
    facts |= fusion_facts(options.fusion)
    folded = options.network.base_weights_with_multipliers
    if folded:
        facts["folded_in"] = [[file_hash(read_source(path).file), multiplier] for path, multiplier in folded]
    return facts
