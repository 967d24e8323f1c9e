"""Rules from SD1.5 to SDXL about the network: ranks, rates, text encoders, precision. The table is in rules.py."""

from __future__ import annotations

import math

from library.data.captions import variations
from library.options.checks import require
from library.options.kohya.network_args import BlockCurve
from library.options.network import TrainNetworkOptions
from library.options.parser import flatten
from library.options.search import SDXL_CLIP_SKIP, SdxlOptions
from library.search.to_sdxl.size_rules import batch_ratio
from library.search.to_sdxl.trainings import Sd15Training, SdxlTraining

TEXT_BAND = (0.5, 0.8)
"""Rates of the text encoders as shares of the U-Net's."""

RANK_DOUBT = (
    "weak: SDXL has 6.3 times as many LoRA parameters per rank as SD1.5, and with fewer than 500 pictures capacity hardly "
    "matters; files are about 7 MB per rank in fp16. --allow_small_dim keeps 16 and 32"
)
RATE_DOUBT = (
    "a starting point: theory asks for 0.72 times the rate for SDXL's wider U-Net, and kohya's documentation for 4e-5 to "
    "1e-4. Try --rate_factor 0.7, or a small study on SDXL with --init-params best_params.json"
)
TEXT_DOUBT = (
    "weak: kohya's SDXL documentation recommends 0.1 to 0.5 of the U-Net's rate and often no training of them, and theory asks "
    "for 0.77 of CLIP-L's rate for the wider bigG; the rate hardly changes the best validation loss (spacepxl). Try "
    "--no_train_text_encoders, which also saves memory"
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
    "flow_mode",
    "teacher_latents",
    "flow_target",
    "flow_kd_cfg",
    "any_teacher",
    "text_fusion",
    "text_fusion_encoders",
    "timestep_bin_source",
    "timestep_bin_file",
    "timestep_bin_min_acc",
)


def rank(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    kind = sd15.options.network.args.kind
    if wishes.sdxl_dim is not None:
        return sdxl.with_options(network_dim=wishes.sdxl_dim)
    if not kind.is_lora:
        return sdxl.with_options(network_dim=sd15.dim).warn(
            f"network_dim {sd15.dim} was kept: the ranks of SDXL are known for LoRA, and this is {kind.algo}."
        )
    dim = snapped(sd15.dim, wishes.dims)
    sdxl = sdxl.with_options(network_dim=dim)
    return sdxl if dim == sd15.dim else sdxl.warn(f"network_dim {sd15.dim} -> {dim} is {RANK_DOUBT}.")


def snapped(dim: int, dims: tuple[int, ...]) -> int:
    """The smallest of `dims`, which ascend, that is at least `dim`; else the largest."""
    return next((allowed for allowed in dims if allowed >= dim), dims[-1])


def alpha(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    # Written as a number: 0 would mean the rank, which has changed.
    return sdxl.with_options(network_alpha=sd15.alpha if wishes.sdxl_alpha is None else wishes.sdxl_alpha)


def rate(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    optimizer, factor = sd15.options.optimizer, rate_factor(sd15, sdxl, wishes)
    if sd15.options.trains_unet:
        # Both, because a study on SDXL multiplies learning_rate.
        peak = _rounded(optimizer.unet_rate * factor)
        sdxl = sdxl.with_options(learning_rate=peak, unet_lr=peak)
    else:
        sdxl = sdxl.with_options(learning_rate=_rounded(optimizer.learning_rate * factor))
    if sd15.finds_rate:
        return sdxl
    if "sgd" in optimizer.optimizer_name.lower() and factor != wishes.rate_factor:
        sdxl = sdxl.warn(
            f"{optimizer.optimizer_name}: the root rules for learning rates hold for Adam-like optimizers only."
        )
    return sdxl.warn(f"learning_rate {sdxl.options['learning_rate']:g} is {RATE_DOUBT}.")


def rate_factor(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> float:
    """Learning rates after / before. The rules for alpha, batches and accumulation must have been applied."""
    if sd15.finds_rate:
        return wishes.rate_factor
    by_alpha = math.sqrt(sd15.alpha / sdxl.options["network_alpha"])
    by_batch = math.sqrt(batch_ratio(sd15, sdxl.datasets, sdxl.options["gradient_accumulation_steps"]))
    return by_alpha * by_batch * wishes.rate_factor


def text_encoders(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    options = sd15.options
    if not (options.trains_text_encoders and wishes.train_text_encoders):
        require(options.trains_unet, "train_text_encoders", "cannot be switched off: the study trained nothing else.")
        return sdxl.without(["text_encoder_lr"]).with_options(network_train_unet_only=True)
    (found_rate,) = options.optimizer.text_encoder_rates(1)
    if sd15.finds_rate:
        return sdxl.with_options(text_encoder_lr=[sdxl.options["learning_rate"]] * 2)
    if not options.trains_unet:
        kept = _rounded(found_rate * rate_factor(sd15, sdxl, wishes))
        return sdxl.with_options(text_encoder_lr=[kept, kept]).warn(
            "The study trained the text encoders alone, for which there is no rule: their rate was kept."
        )
    each = _rounded(sdxl.options["unet_lr"] * text_ratio(sd15))
    return sdxl.with_options(text_encoder_lr=[each, each]).warn(f"text_encoder_lr {each:g} is {TEXT_DOUBT}.")


def text_ratio(sd15: Sd15Training) -> float:
    """The text encoders' rate / the U-Net's: the study's ratio, moved into TEXT_BAND. The study must have trained both."""
    low, high = TEXT_BAND
    (rate,) = sd15.options.optimizer.text_encoder_rates(1)
    return min(max(rate / sd15.options.optimizer.unet_rate, low), high)


def captions(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    return sdxl.with_options(max_token_length=225)


def clip_skip(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    if wishes.sdxl_clip_skip is not None:
        return sdxl.with_options(clip_skip=SDXL_CLIP_SKIP)
    asked = sd15.options.text.clip_skip
    sdxl = sdxl.without(["clip_skip"])
    if asked in (None, SDXL_CLIP_SKIP):
        return sdxl
    return sdxl.warn(f"clip_skip {asked} was left out: SDXL always uses the second last layer ({SDXL_CLIP_SKIP}).")


def precision(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    saved = sd15.options.output.save_precision or "fp16"
    return sdxl.with_options(mixed_precision="bf16", save_precision=saved)


def memory(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    sdxl = sdxl.with_options(gradient_checkpointing=True, cache_latents=True)
    sdxl = sdxl.without(["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
    if not sdxl.options.get("network_train_unet_only"):
        return sdxl
    # A caption that is sometimes dropped has two forms, and both are cached.
    few = {"caption_dropout_rate", "caption_dropout_every_n_epochs"}
    subsets = [subset for dataset in sdxl.datasets for subset in dataset.subsets]
    varying = {name for subset in subsets for name in variations(subset)} - few
    if not varying:
        return sdxl.with_options(cache_text_encoder_outputs=True)
    return sdxl.warn(
        f"Outputs of the text encoders are not cached, because captions change each time ({', '.join(sorted(varying))})."
    )


def base_bound(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    defaults = flatten(TrainNetworkOptions())
    given = [name for name in _BASE_BOUND if sdxl.options.get(name, defaults[name]) != defaults[name]]
    words, dropped = _without_lists(sd15)
    sdxl = sdxl.without(_BASE_BOUND)
    if dropped:
        sdxl = sdxl.with_options(network_args=words) if words else sdxl.without(["network_args"])
    if not given and not dropped:
        return sdxl
    return sdxl.warn(f"Left out, because made for the SD1.5 base: {', '.join([*given, *dropped])}.")


def _without_lists(sd15: Sd15Training) -> tuple[list[str], list[str]]:
    """network_args without lists of numbers by block, and the names of those that were removed."""
    network = sd15.options.network
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
    """Without the rounding error of floats: 0.8 x 3e-4 is 0.00024000000000000003."""
    return float(f"{value:.9g}")
