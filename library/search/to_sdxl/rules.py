"""SD1.5 -> SDXL: every rule in one table, each with its reason, its source, and how sure it is.

The table in docs/optimize.md is made of this (`python -m library.search.to_sdxl.rules`). The functions are in sdxl_sizes.py
(pictures, batches, length) and sdxl_network.py (ranks, rates, text encoders).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from library.options.kohya_dataset import CaptionOptions, DatasetOptions
from library.options.network import TrainNetworkOptions
from library.options.parser import flatten
from library.search.to_sdxl import network_rules as network
from library.search.to_sdxl import size_rules as sizes
from library.search.to_sdxl.trainings import Found, Recipe, SdxlOptions

GUIDE = "the SD1.5 -> SDXL guide"
MUA = "Chen, Villar, Hayou 2026, arXiv 2602.06204 (its experiments include SD1.5)"
SPACEPXL = "spacepxl, demystifying-sd-finetuning (SD1.5, measured)"
KOHYA = "kohya's SDXL documentation"
MEMORISING = "Bonnaire et al. 2025, arXiv 2505.17638"
SDXL_PAPER = "Podell et al. 2023, arXiv 2307.01952"

FIRM = "firm"


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        does: what becomes of the SD1.5 training.
        doubt: what speaks against it, or FIRM. The functions say it to the user where the rule has changed something.
    """

    name: str
    does: str
    apply: Callable[[Found, Recipe, SdxlOptions], Recipe]
    reason: str
    source: str
    doubt: str = FIRM


RULES: tuple[Rule, ...] = (
    Rule(
        "resolution",
        "both sides x2 (512 -> 1024), but never more than the area of 1024 x 1024, unless it was more: sides that cannot be "
        "doubled are rounded down to the bucket step",
        sizes.resolution,
        "SDXL was trained at 1024",
        SDXL_PAPER,
    ),
    Rule(
        "buckets",
        "`min_bucket_reso` and `max_bucket_reso` grow with the resolution (384-768 -> 768-1536); `bucket_reso_steps` becomes "
        "64 where it is no multiple of 32",
        sizes.buckets,
        "the same shapes at twice the size; SDXL's U-Net halves latents twice, so 32 pixels are its grain",
        f"{GUIDE}; {KOHYA}",
    ),
    Rule(
        "small pictures",
        "nothing; it warns where `bucket_no_upscale` meets pictures of a median area below half of the new one",
        sizes.small_pictures,
        "pictures of 512 that are not enlarged are trained at 512 whatever the resolution says, which is not what SDXL can do",
        "arithmetic; the guide asks for both at once",
    ),
    Rule(
        "batch",
        "half, and at most `--max_batch` (8 -> 4), with `gradient_accumulation_steps` raised by the same factor; the batch "
        "becomes the largest divisor of batch x accumulation that is small enough. Only datasets of different batch sizes "
        "may have no such divisor: rates then follow with the root of the change",
        sizes.batch,
        "memory; the mean of a loss over the same pictures is the same gradient, so the learning rate stays",
        f"{GUIDE}; root of the batch for Adam: {SPACEPXL}",
    ),
    Rule(
        "rank",
        "`network_dim` becomes the next one of 64, 96, 128 (128 for more); `--allow_small_dim` adds 16 and 32. Only of LoRA and "
        "DoRA: the rank of other kinds means something else",
        network.rank,
        "asked for by the guide. At constant alpha the best learning rate does not depend on the rank",
        f"{GUIDE}; {MUA}",
        network.RANK_DOUBT,
    ),
    Rule(
        "alpha",
        "`network_alpha` is kept as a number, never as a share of the rank; `--sdxl_alpha` changes it",
        network.alpha,
        "alpha, not the rank, decides which learning rate is best",
        f"{MUA}; {SPACEPXL}",
    ),
    Rule(
        "learning rate",
        "kept where alpha is; else x sqrt(old alpha / new alpha), and x `--rate_factor`. Optimizers that find their rate keep "
        "theirs",
        network.rate,
        "with Adam-like optimizers the best rate goes with 1 / sqrt(width x alpha)",
        f"{GUIDE}; {MUA}; {SPACEPXL}",
        network.RATE_DOUBT,
    ),
    Rule(
        "text encoders",
        "one rate for each of the two, 0.5 to 0.8 of the U-Net's: the study's ratio, moved into the band. Not trained if the "
        "study did not, or with `--no_train_text_encoders`",
        network.text_encoders,
        "CLIP-L is the encoder of SD1.5, and what was found for it is the best guess for its neighbour",
        GUIDE,
        network.TEXT_DOUBT,
    ),
    Rule(
        "length",
        "`max_train_epochs` (or `max_train_steps`) x 1.2, rounded up, as a ceiling",
        sizes.length,
        "asked for by the guide; the checkpoint to use is chosen by validation, so a longer run costs time and nothing else",
        GUIDE,
        sizes.LENGTH_DOUBT,
    ),
    Rule(
        "best checkpoint",
        "validation and a saved adapter every epoch, or every few such that there are about 10; `validation_split` and "
        "`validation_seed` are the study's, so that the same pictures are held out. `python -m library.training.best_adapter` "
        "names the best",
        sizes.best_checkpoint,
        "wide models learn and memorise early, and when depends on the pictures",
        MEMORISING,
    ),
    Rule(
        "warm-up",
        "`lr_warmup_steps` and `lr_decay_steps` in steps become shares of the run",
        sizes.warm_up,
        "runs have another number of steps, and schedules are meant as shapes",
        "definition",
    ),
    Rule(
        "captions",
        "`max_token_length` 225",
        network.captions,
        "long captions are encoded in pieces instead of being cut",
        GUIDE,
    ),
    Rule(
        "clip_skip",
        "left out, whatever the study had; written only if asked for (`--sdxl_clip_skip 2`)",
        network.clip_skip,
        "SDXL always sees the second last layer, of both encoders",
        SDXL_PAPER,
    ),
    Rule(
        "precision",
        "`mixed_precision bf16`, and adapters are saved as fp16 unless the study said otherwise",
        network.precision,
        "SDXL's VAE overflows fp16, and float32 does not fit small cards",
        "the VAE's configuration in diffusers (force_upcast)",
    ),
    Rule(
        "memory",
        "`gradient_checkpointing`, cached latents, and cached outputs of the text encoders where these are not trained and "
        "captions do not vary",
        network.memory,
        "six times the parameters and four times the pixels of SD1.5",
        KOHYA,
    ),
    Rule(
        "belongs to the base",
        "left out with a warning: another VAE, adapters to start from or to fold in, lists by block, velocity prediction",
        network.base_bound,
        "they fit SD1.5's layers and nothing else (25 blocks there, 23 here)",
        "the layouts of both U-Nets",
    ),
    Rule(
        "everything else",
        "carried over: optimizer, schedule, weight decay, min-SNR, noise offset, dropout, captions, repeats, seed",
        lambda found, recipe, wishes: recipe,
        "both predict noise, on the same schedule of noise",
        SDXL_PAPER,
    ),
)

# Of the trial, not of the training: where it ran, what it read and what it left.
_OF_THE_TRIAL = frozenset(
    """
    config_file dataset_config output_config ignore_unknown_keys dry_run pretrained_model_name_or_path device output_dir
    output_name logging_dir log_prefix log_tracker_name log_every_n_steps resume allow_changed_options initial_step
    initial_epoch skip_until_initial_step save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs
    save_last_n_steps save_last_n_states save_state save_state_on_train_end save_last_n_epochs_state
    save_last_n_steps_state validate_every_n_epochs validate_every_n_steps max_validation_steps network_module
    """.split()  # noqa: SIM905
)


def carry(found: Found, wishes: SdxlOptions) -> Recipe:
    """The training on SDXL, by every rule in order. Raises OptionError where a wish cannot be granted."""
    options = flatten(found.options)
    # Datasets say these themselves; what they do not say was settled when they were read.
    of_datasets = {one.name for group in (DatasetOptions, CaptionOptions) for one in dataclasses.fields(group)}
    of_datasets |= {"train_batch_size", "validation_split"}
    left_out = _OF_THE_TRIAL | (of_datasets - {"missing_caption"})
    recipe = Recipe({name: value for name, value in options.items() if value is not None}, found.datasets)
    recipe = recipe.without(left_out)
    for rule in RULES:
        recipe = rule.apply(found, recipe, wishes)
    return recipe


def written_options(recipe: Recipe) -> dict[str, object]:
    """What a configuration has to say: all that is not the script's default, and all that a rule has settled."""
    defaults = flatten(TrainNetworkOptions())
    return {
        name: value
        for name, value in recipe.options.items()
        if value is not None and (name in recipe.settled or value != defaults[name])
    }


def rules_table() -> str:
    """The table of docs/optimize.md, in Markdown."""
    rows = ["| rule | SD1.5 -> SDXL | why | source | how sure |", "|---|---|---|---|---|"]
    rows += [f"| {rule.name} | {rule.does} | {rule.reason} | {rule.source} | {rule.doubt} |" for rule in RULES]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(rules_table(), end="")
