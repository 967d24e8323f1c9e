"""SD1.5 -> SDXL: every rule in one table, each with its reason, its source, and how sure it is.

`python -m library.search.to_sdxl.rules` prints the table of docs/optimize.md. The functions are in size_rules.py (pictures,
batches, length) and network_rules.py (ranks, rates, text encoders).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from library.options.kohya.dataset import CaptionOptions, DatasetOptions
from library.options.network import TrainNetworkOptions
from library.options.parser import flatten
from library.options.search import SdxlOptions
from library.search.to_sdxl import network_rules as network
from library.search.to_sdxl import size_rules as sizes
from library.search.to_sdxl.trainings import Sd15Training, SdxlTraining

GUIDE = "the SD1.5 -> SDXL guide"
MUA = "Chen, Villar, Hayou 2026, arXiv 2602.06204 (its experiments include SD1.5)"
SPACEPXL = "spacepxl, demystifying-sd-finetuning (SD1.5, measured)"
KOHYA = "kohya's SDXL documentation"
MEMORISING = "Bonnaire et al. 2025, arXiv 2505.17638"
SDXL_PAPER = "Podell et al. 2023, arXiv 2307.01952"

FIRM = "firm"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        does: how the training on SDXL differs.
        doubt: what speaks against the rule, or FIRM. The functions warn of it where the rule has changed something.
    """

    name: str
    does: str
    apply: Callable[[Sd15Training, SdxlTraining, SdxlOptions], SdxlTraining]
    reason: str
    source: str
    doubt: str = FIRM


RULES: tuple[Rule, ...] = (
    Rule(
        "resolution",
        "both sides x2 (512 -> 1024), but at most the area of 1024 x 1024, or the old area where that is larger; sides that "
        "cannot be doubled are rounded down to the bucket step",
        sizes.resolution,
        "SDXL was trained at 1024",
        SDXL_PAPER,
    ),
    Rule(
        "buckets",
        "`min_bucket_reso` and `max_bucket_reso` grow with the resolution (384-768 -> 768-1536); `bucket_reso_steps` becomes "
        "64 where it is not a multiple of 32",
        sizes.buckets,
        "the same shapes at twice the size; SDXL's U-Net halves latents twice, so sides are multiples of 32 pixels",
        f"{GUIDE}; {KOHYA}",
    ),
    Rule(
        "small pictures",
        "no change; a warning where `bucket_no_upscale` is set and the median area of the pictures is below half of the new one",
        sizes.small_pictures,
        "pictures of 512 that are not enlarged are trained at 512 whatever the resolution is, and SDXL draws at 1024",
        "arithmetic; the guide asks for both at once",
    ),
    Rule(
        "batch",
        "half, and at most `--max_batch` (8 -> 4), with `gradient_accumulation_steps` raised by the same factor; the batch "
        "becomes the largest divisor of batch x accumulation that is small enough. Another dataset file with other batch sizes "
        "gets the accumulation that makes a step as many pictures as in the study (`lr_reference.effective_batch`). Datasets of "
        "different batch sizes may have no such divisor: then rates change with the root of the pictures per step",
        sizes.batch,
        "memory; a step over the same pictures has the same gradient, so the learning rate stays",
        f"{GUIDE}; root of the batch for Adam: {SPACEPXL}",
    ),
    Rule(
        "rank",
        "`network_dim` becomes the next one of 64, 96, 128 (128 for more); `--allow_small_dim` adds 16 and 32. Only for LoRA and "
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
        "the best learning rate depends on alpha and not on the rank",
        f"{MUA}; {SPACEPXL}",
    ),
    Rule(
        "learning rate",
        "kept where alpha is kept; else x sqrt(old alpha / new alpha), and x `--rate_factor`. Optimizers that find their rate "
        "keep theirs",
        network.rate,
        "with Adam-like optimizers the best rate is proportional to 1 / sqrt(width x alpha)",
        f"{GUIDE}; {MUA}; {SPACEPXL}",
        network.RATE_DOUBT,
    ),
    Rule(
        "text encoders",
        "the same rate for both, 0.5 to 0.8 of the U-Net's: the study's ratio, moved into that range. Not trained if the study "
        "did not train them, or with `--no_train_text_encoders`",
        network.text_encoders,
        "CLIP-L is the encoder of SD1.5, and its ratio is the best guess for the second encoder too",
        GUIDE,
        network.TEXT_DOUBT,
    ),
    Rule(
        "length",
        "`max_train_epochs` (or `max_train_steps`) x 1.2, rounded up, as a ceiling",
        sizes.length,
        "asked for by the guide; validation chooses the checkpoint to use, so a longer run costs nothing but time",
        GUIDE,
        sizes.LENGTH_DOUBT,
    ),
    Rule(
        "best checkpoint",
        "validates and saves an adapter every epoch, or so rarely that there are about 10; `validation_split` and "
        "`validation_seed` are the study's, so that the same pictures are held out. `python -m library.training.best_adapter` "
        "names the best",
        sizes.best_checkpoint,
        "wide models learn and memorise early, at a time that depends on the pictures",
        MEMORISING,
    ),
    Rule(
        "warm-up",
        "`lr_warmup_steps` and `lr_decay_steps` in steps become shares of the run",
        sizes.warm_up,
        "the run has another number of steps, and a schedule is a shape over the run",
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
        "left out, whatever the study had; written only with `--sdxl_clip_skip 2`",
        network.clip_skip,
        "SDXL always uses the second last layer of both encoders",
        SDXL_PAPER,
    ),
    Rule(
        "precision",
        "`mixed_precision bf16`; adapters are saved as fp16 unless the study saved them otherwise",
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
        "they fit the layers of SD1.5 only (25 blocks; SDXL has 23)",
        "the layouts of both U-Nets",
    ),
    Rule(
        "everything else",
        "kept: optimizer, schedule, weight decay, min-SNR, noise offset, dropout, captions, repeats, seed",
        lambda sd15, sdxl, wishes: sdxl,
        "both bases predict noise, on the same noise schedule",
        SDXL_PAPER,
    ),
)

# Options of the trial and not of the training: where it ran, which files it read and wrote.
_OF_THE_TRIAL = frozenset(
    """
    config_file dataset_config output_config ignore_unknown_keys dry_run report pretrained_model_name_or_path device output_dir
    output_name logging_dir log_prefix log_tracker_name log_every_n_steps resume allow_changed_options overwrite
    initial_step initial_epoch skip_until_initial_step save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs
    save_last_n_steps save_last_n_states save_state save_state_on_train_end save_last_n_epochs_state
    save_last_n_steps_state validate_every_n_epochs validate_every_n_steps max_validation_steps network_module
    """.split()  # noqa: SIM905
)


def apply_rules(sd15: Sd15Training, wishes: SdxlOptions) -> SdxlTraining:
    """The training on SDXL, by all rules in order. Raises OptionError for a wish that the training does not allow."""
    options = flatten(sd15.options)
    # The datasets have these themselves, with defaults filled in when they were read.
    of_datasets = {field.name for group in (DatasetOptions, CaptionOptions) for field in dataclasses.fields(group)}
    of_datasets |= {"train_batch_size", "validation_split"}
    left_out = _OF_THE_TRIAL | (of_datasets - {"missing_caption"})
    sdxl = SdxlTraining({name: value for name, value in options.items() if value is not None}, sd15.datasets)
    sdxl = sdxl.without(left_out)
    for rule in RULES:
        sdxl = rule.apply(sd15, sdxl, wishes)
    return sdxl


def written_options(sdxl: SdxlTraining) -> dict[str, object]:
    """The options that a configuration must give: those that are not the script's default, and those that a rule has set."""
    defaults = flatten(TrainNetworkOptions())
    return {
        name: value
        for name, value in sdxl.options.items()
        if value is not None and (name in sdxl.settled or value != defaults[name])
    }


def rules_table() -> str:
    """The table of docs/optimize.md, in Markdown."""
    rows = ["| rule | SD1.5 -> SDXL | why | source | how sure |", "|---|---|---|---|---|"]
    rows += [f"| {rule.name} | {rule.does} | {rule.reason} | {rule.source} | {rule.doubt} |" for rule in RULES]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(rules_table(), end="")
