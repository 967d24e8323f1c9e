"""Rules from SD1.5 to SDXL about the network: ranks, rates, text encoders, numbers. The table is in rules.py."""

from __future__ import annotations

import math

from library.data.captions import variations
from library.options.checks import require
from library.options.network import TrainNetworkOptions
from library.options.network_args import BlockCurve
from library.options.parser import flatten
from library.search.to_sdxl.size_rules import batch_ratio
from library.search.to_sdxl.trainings import SDXL_CLIP_SKIP, Found, Recipe, SdxlOptions

TEXT_BAND = (0.5, 0.8)
"""Rates of the text encoders as shares of the U-Net's."""

RANK_DOUBT = (
    "weak: SDXL has 6.3 times as many LoRA parameters per rank as SD1.5, and capacity hardly binds below 500 pictures; files "
    "are about 7 MB per rank in fp16. --allow_small_dim keeps 16 and 32"
)
RATE_DOUBT = (
    "a prior, no law: SDXL's U-Net is wider, which asks for 0.72 times the rate, and kohya's documentation for 4e-5 to 1e-4. "
    "Try --rate_factor 0.7, or a small study on SDXL with --init-params best_params.json"
)
TEXT_DOUBT = (
    "weak: kohya's SDXL documentation gives 0.1 to 0.5 of the U-Net's rate and often trains none, and the width of bigG asks "
    "for 0.77 of CLIP-L's; the rate hardly moves the best validation loss (spacepxl). Try --no_train_text_encoders, which "
    "also saves memory"
)

_BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_BLOCK_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_BASE_BOUND = (
    "vae",
    "network_weights",
    "dim_from_weights",
    "base_weights",
    "base_weights_multiplier",
    "v_parameterization",
    "scale_v_pred_loss_like_noise_pred",
    "zero_terminal_snr",
)


def rank(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    algorithm = found.options.network.args.algo
    if wishes.sdxl_dim is not None:
        return recipe.with_options(network_dim=wishes.sdxl_dim)
    if algorithm not in ("lora", "dora"):
        return recipe.with_options(network_dim=found.dim).warn(
            f"network_dim {found.dim} was kept: the ranks of SDXL are known for LoRA, and this is {algorithm}."
        )
    dim = snapped(found.dim, wishes.dims)
    recipe = recipe.with_options(network_dim=dim)
    return recipe if dim == found.dim else recipe.warn(f"network_dim {found.dim} -> {dim} is {RANK_DOUBT}.")


def snapped(dim: int, dims: tuple[int, ...]) -> int:
    """The next one of `dims`, which ascend, and the last one for more."""
    return next((one for one in dims if one >= dim), dims[-1])


def alpha(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    # In the file as a number: 0 would mean the rank, which has changed.
    return recipe.with_options(network_alpha=found.alpha if wishes.sdxl_alpha is None else wishes.sdxl_alpha)


def rate(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    optimizer, factor = found.options.optimizer, rate_factor(found, recipe, wishes)
    if found.options.trains_unet:
        # Both: learning_rate is what a study on SDXL multiplies.
        peak = _rounded(optimizer.unet_rate * factor)
        recipe = recipe.with_options(learning_rate=peak, unet_lr=peak)
    else:
        recipe = recipe.with_options(learning_rate=_rounded(optimizer.learning_rate * factor))
    if found.finds_rate:
        return recipe
    if "sgd" in optimizer.optimizer_name.lower() and factor != wishes.rate_factor:
        recipe = recipe.warn(f"{optimizer.optimizer_name}: learning rates follow roots with Adam-like optimizers only.")
    return recipe.warn(f"learning_rate {recipe.options['learning_rate']:g} is {RATE_DOUBT}.")


def rate_factor(found: Found, recipe: Recipe, wishes: SdxlOptions) -> float:
    """Learning rates after / before. To be asked when alpha, batches and accumulation are settled."""
    if found.finds_rate:
        return wishes.rate_factor
    by_alpha = math.sqrt(found.alpha / recipe.options["network_alpha"])
    by_batch = math.sqrt(batch_ratio(found, recipe.datasets, recipe.options["gradient_accumulation_steps"]))
    return by_alpha * by_batch * wishes.rate_factor


def text_encoders(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    options = found.options
    if not (options.trains_text_encoders and wishes.train_text_encoders):
        require(options.trains_unet, "train_text_encoders", "cannot be switched off: the study trained nothing else.")
        return recipe.without(["text_encoder_lr"]).with_options(network_train_unet_only=True)
    (found_rate,) = options.optimizer.text_encoder_rates(1)
    if found.finds_rate:
        return recipe.with_options(text_encoder_lr=[recipe.options["learning_rate"]] * 2)
    if not options.trains_unet:
        kept = _rounded(found_rate * rate_factor(found, recipe, wishes))
        return recipe.with_options(text_encoder_lr=[kept, kept]).warn(
            "The study trained the text encoders alone, for which there is no rule: their rate was carried over."
        )
    each = _rounded(recipe.options["unet_lr"] * text_ratio(found))
    return recipe.with_options(text_encoder_lr=[each, each]).warn(f"text_encoder_lr {each:g} is {TEXT_DOUBT}.")


def text_ratio(found: Found) -> float:
    """Share of the U-Net's rate that each text encoder gets: the study's, moved into the band. Both have to be trained."""
    low, high = TEXT_BAND
    (rate,) = found.options.optimizer.text_encoder_rates(1)
    return min(max(rate / found.options.optimizer.unet_rate, low), high)


def captions(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    return recipe.with_options(max_token_length=225)


def clip_skip(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    if wishes.sdxl_clip_skip is not None:
        return recipe.with_options(clip_skip=SDXL_CLIP_SKIP)
    asked = found.options.text.clip_skip
    recipe = recipe.without(["clip_skip"])
    if asked in (None, SDXL_CLIP_SKIP):
        return recipe
    return recipe.warn(f"clip_skip {asked} was left out: SDXL always sees layer {SDXL_CLIP_SKIP}.")


def precision(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    saved = found.options.output.save_precision or "fp16"
    return recipe.with_options(mixed_precision="bf16", save_precision=saved)


def memory(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    recipe = recipe.with_options(gradient_checkpointing=True, cache_latents=True)
    recipe = recipe.without(["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
    if not recipe.options.get("network_train_unet_only"):
        return recipe
    # A caption that is sometimes dropped has two forms, and both are kept.
    few = {"caption_dropout_rate", "caption_dropout_every_n_epochs"}
    varying = {name for one in recipe.datasets for subset in one.subsets for name in variations(subset)} - few
    if not varying:
        return recipe.with_options(cache_text_encoder_outputs=True)
    return recipe.warn(
        f"Outputs of the text encoders are not cached: {', '.join(sorted(varying))} changes captions each time."
    )


def base_bound(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    defaults = flatten(TrainNetworkOptions())
    given = [name for name in _BASE_BOUND if recipe.options.get(name, defaults[name]) != defaults[name]]
    words, dropped = _without_lists(found)
    recipe = recipe.without(_BASE_BOUND)
    if dropped:
        recipe = recipe.with_options(network_args=words) if words else recipe.without(["network_args"])
    if not given and not dropped:
        return recipe
    return recipe.warn(f"Left out, since made for the SD1.5 base: {', '.join([*given, *dropped])}.")


def _without_lists(found: Found) -> tuple[list[str], list[str]]:
    """network_args without lists of numbers by block, and the names of what is gone."""
    network = found.options.network
    args = network.args
    gone = [name for name in _BY_BLOCK if getattr(args, name) is not None]
    gone += [name for name in _BLOCK_RATES if isinstance(getattr(args, name), tuple)]
    if args.conv_dim is None and "conv_block_dims" in gone and args.conv_alpha is not None:
        gone.append("conv_alpha")
    rates = [name for name in _BLOCK_RATES if isinstance(getattr(args, name), BlockCurve)]
    if not rates and args.block_lr_zero_threshold:
        gone.append("block_lr_zero_threshold")
    return [word for word in network.network_args if word.partition("=")[0].strip() not in gone], gone


def _rounded(value: float) -> float:
    """Without the dust of floats: 0.8 x 3e-4 is 0.00024000000000000003."""
    return float(f"{value:.9g}")
