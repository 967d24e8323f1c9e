"""Options that say one thing in two ways: the one nearer to the user beats the other, wherever that was written.

Near is the command line, then a file, then the file that it extends. Within one of them both count as their group says. A recipe
says what its settings say, one way: it replaces those that were given farther away, and what is given nearer counts beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from library.options.alignment import AlignmentOptions
from library.options.flow import FlowOptions
from library.options.recipes import WithRecipes

# LIST:KEY is the word KEY=... of a list, no_NAME a flag that is turned off.
RIVALS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "max_train_steps max_train_epochs",
        "initial_step initial_epoch",
        "save_every_n_epochs save_n_epoch_ratio",
        "sample_every_n_steps sample_every_n_epochs",
        "dataset_config train_data_dir",
        "dataset_config reg_data_dir",
        "dataset_config in_json",
        "network_dim dim_from_weights",
        "network_train_unet_only network_train_text_encoder_only",
        "network_train_unet_only text_encoder_lr",
        "network_train_text_encoder_only unet_lr",
        "conv_dim network_args:conv_dim",
        "conv_alpha network_args:conv_alpha",
        "lr_scheduler lr_scheduler_type",
        "weight_decay optimizer_args:weight_decay",
        "adam_beta1 optimizer_args:betas",
        "adam_beta2 optimizer_args:betas",
        "adam_epsilon optimizer_args:eps",
        "raw_v_target objective",
        "raw_v_target v_parameterization",
        "xformers sdpa",
        "base_quantization fp8_base",
        "base_quantization fp8_base_unet",
        "cache_latents_to_disk no_cache_latents",
        "training_comment no_metadata",
    )
)

WITH_RECIPES: tuple[type[WithRecipes], ...] = (FlowOptions, AlignmentOptions)

# What has no meaning without what it belongs to goes with it.
_BELONGS = {"lr_scheduler_type": ("lr_scheduler_args",), "in_json": ("dataset_repeats",)}


def beaten(nearer: Mapping[str, Any], farther: Mapping[str, Any]) -> dict[str, str]:
    """What of the options `farther` is replaced -> the option of `nearer` that replaces it, in the spelling of RIVALS.

    A value that asks for nothing replaces nothing.
    """
    given, there = _asked(nearer), _asked(farther)
    found: dict[str, str] = {}
    for group in RIVALS:
        for winner in sorted(group & given):
            found |= {loser: winner for loser in group & there - given if loser not in found}
    for kind in WITH_RECIPES:
        settings = kind.of_recipe({kind.recipe_option: nearer.get(kind.recipe_option)})
        found |= dict.fromkeys(settings.keys() & farther.keys() - nearer.keys(), kind.recipe_option)
    for loser, winner in list(found.items()):
        found |= {name: winner for name in _BELONGS.get(loser, ()) if name in there - given}
    return found


def without(values: Mapping[str, Any], losers: Iterable[str]) -> dict[str, Any]:
    """The values without what was replaced."""
    kept = dict(values)
    for loser in losers:
        name, _, key = option_of(loser, values), *loser.partition(":")[1:]
        if not key:
            kept.pop(name, None)
        elif name in kept:
            kept[name] = type(kept[name])(word for word in kept[name] if _key(word) != key)
    return kept


def option_of(name: str, options: Iterable[str]) -> str:
    """The option that a name in the spelling of RIVALS is of."""
    option = name.partition(":")[0]
    return option if option in options else option.removeprefix("no_")


def _asked(values: Mapping[str, Any]) -> set[str]:
    """Names of what the values ask for."""
    names: set[str] = set()
    for option, value in values.items():
        if value is False:
            names.add(f"no_{option}")
        elif value not in (None, "", (), []) and (value != 0 or isinstance(value, float)):
            keys = value if isinstance(value, list | tuple) else ()
            names |= {option, *(f"{option}:{_key(word)}" for word in keys)}
    return names


def _key(word: Any) -> str:
    return str(word).partition("=")[0].strip()
