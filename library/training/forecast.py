"""--dry_run: the resolved plan of a run, what it will need, and what is missing; nothing is built or downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn

from library.caching.picture_sets import open_pictures
from library.caching.prepare import SD_LATENT_CHANNELS
from library.data.demo_pictures import DEFAULT_TRAINING_IMAGES
from library.data.store import StoreMeta, disk_bytes, shard_folders
from library.errors import UserError
from library.files import free_bytes, human_bytes
from library.models.encoders import VAE_FACTOR
from library.models.frozen import save_no_inputs
from library.models.load import unet_config
from library.models.locate import base_status, dino_status
from library.options.data import DEMO_DATA
from library.options.repa import TrainRepaOptions
from library.training.plan import Plan, make_plan
from library.training.repa_run import COMPUTE_DTYPES, add_trained_parts

# Widths of DINOv2 ViT-S, B, L and g (Oquab et al. 2023, table 17), for a teacher that is not on this machine yet.
TEACHER_WIDTHS = {
    "small": 384,
    "vits": 384,
    "base": 768,
    "vitb": 768,
    "large": 1024,
    "vitl": 1024,
    "giant": 1536,
    "vitg": 1536,
}
# Contexts, kernels' workspaces and fragmentation; a guess, not a measurement.
WORKSPACE_BYTES = 2 << 30


def print_plan(options: TrainRepaOptions) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    missing: list[str] = []
    samples = _count_samples(options, missing)
    plan = make_plan(samples, options.training, options.optimizer, int(os.environ.get("WORLD_SIZE", "1")))
    missing += [
        sentence
        for sentence in (
            base_status(options.model.pretrained_model_name_or_path),
            dino_status(options.model.dino_model) if options.alignment.alignment else None,
        )
        if sentence is not None
    ]
    print(f"samples          {samples}")
    print(f"batch            {plan.batch_size} x {plan.accumulation} accumulated x {plan.world_size} processes")
    print(f"steps per epoch  {plan.steps_per_epoch}")
    print(f"steps            {plan.last_step} ({plan.epochs:g} epochs), warm-up {plan.warmup_steps}")
    _print_model(options, plan)
    _print_disk(options, samples)
    for sentence in missing:
        print(f"missing          {sentence}")
    if not missing:
        print("missing          nothing")


def _count_samples(options: TrainRepaOptions, missing: list[str]) -> int:
    data = options.data
    if data.train_data == DEMO_DATA:
        return min(DEFAULT_TRAINING_IMAGES, data.max_train_samples or DEFAULT_TRAINING_IMAGES)
    try:
        return len(open_pictures(data).train.samples)
    except UserError as error:
        if data.max_train_samples is None:
            raise
        missing.append(f"{error} Planning with max_train_samples, {data.max_train_samples}.")
        return data.max_train_samples


def _print_model(options: TrainRepaOptions, plan: Plan) -> None:
    dtype = COMPUTE_DTYPES[options.model.mixed_precision]
    try:
        config = unet_config(options.model.pretrained_model_name_or_path)
    except UserError:
        print("trained          unknown until the base model is there")
        return
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = nn.Module.to(UNet2DConditionModel.from_config(config), dtype)
    unet.requires_grad_(False)
    frozen = sum(p.numel() for p in unet.parameters())
    width = teacher_width(options.model.dino_model) if options.alignment.alignment else 0
    parts, heads = add_trained_parts(unet, options, width, torch.device("meta"))
    trained = {part: sum(p.numel() for p in named.values()) for part, named in parts.items()}
    described = " + ".join(f"{count:,} {part}" for part, count in trained.items())
    print(f"trained          {described} = {sum(trained.values()):,} parameters beside {frozen:,} frozen ones")
    # Weights, gradients, two moments and the average, float32.
    copies = 5 if options.optimizer.ema_decay else 4
    fixed = frozen * dtype.itemsize + sum(trained.values()) * 4 * copies
    per_sample = activation_bytes(unet, heads, options, dtype)
    total = fixed + per_sample * plan.batch_size + WORKSPACE_BYTES
    print(
        f"device memory    about {human_bytes(total)}: {human_bytes(fixed)} weights and optimizer, "
        f"{human_bytes(per_sample)} activations per sample, {human_bytes(WORKSPACE_BYTES)} workspace (forecast)"
    )


def teacher_width(dino_model: str) -> int:
    """Width of a teacher's tokens, guessed by its name where it is not on this machine yet."""
    if dino_status(dino_model) is None:
        from library.models.dinov2 import dinov2_width

        return dinov2_width(dino_model)
    name = dino_model.lower()
    return next((width for word, width in TEACHER_WIDTHS.items() if re.search(word, name)), 1024)


class _FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel, which keeps its inputs and output and no attention matrix."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def activation_bytes(unet: Any, heads: nn.Module, options: TrainRepaOptions, dtype: torch.dtype) -> int:
    """Bytes that the backward pass of one sample keeps, counted by a forward pass on the meta device."""
    side = options.data.resolution // VAE_FACTOR
    inputs = torch.empty(1, SD_LATENT_CHANNELS, side, side, dtype=dtype, device="meta")
    text = torch.empty(1, 77, unet.config["cross_attention_dim"], dtype=dtype, device="meta")

    from networks.features import capture

    unet.train()
    save_no_inputs(unet)
    if options.speed.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    def forward() -> None:
        with capture(unet, list(heads)) as features:  # type: ignore[call-overload]
            unet(inputs, torch.zeros(1, device="meta"), text, return_dict=False)
            for tap, head in heads.items():  # type: ignore[operator]
                head(features[tap])

    return kept_bytes([unet, heads], forward)


def kept_bytes(models: Iterable[nn.Module], forward: Callable[[], object]) -> int:
    """Bytes that `forward` leaves for the backward pass beside the models' own weights; everything on the meta device."""
    weights = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        return _FusedAttention.apply(query, key, value)

    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def _print_disk(options: TrainRepaOptions, samples: int) -> None:
    side = options.data.resolution // VAE_FACTOR
    stores = {"train_latents": StoreMeta("latents", "float16", (SD_LATENT_CHANNELS, side, side))}
    if options.alignment.alignment:
        shape = (options.cache.token_grid**2, teacher_width(options.model.dino_model))
        stores["train_tokens"] = StoreMeta("tokens", options.cache.token_dtype, shape)
    for name, meta in stores.items():
        path = options.cache.store_path(name)
        there = f", {human_bytes(disk_bytes(path))} there already" if shard_folders(path) else ", to be built"
        print(
            f"disk             {human_bytes(meta.entry_bytes * samples)} for {name} in {path}{there} "
            f"({human_bytes(free_bytes(path))} free)"
        )
