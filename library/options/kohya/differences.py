"""Where train_network.py does something else than kohya's script would, and why: the one place where that is written.

The table in docs/train_network.md is made of this (`python -m library.options.kohya.differences`), and tests hold every
default that differs against it.
"""

from __future__ import annotations

from typing import NamedTuple


class Difference(NamedTuple):
    option: str
    """kohya's option, or several, separated by commas."""
    kohya: str
    here: str
    why: str


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "pretrained_model_name_or_path",
        "none: stops",
        "`tiny-shapes`, which comes with the project",
        "the command runs before anything is downloaded",
    ),
    Difference(
        "train_data_dir, dataset_config",
        "none: stops",
        "with a tiny base, generated pictures (`--train_data_dir demo`); with any other, it stops",
        "likewise, and nobody trains a real base on them by mistake",
    ),
    Difference(
        "train_data_dir, reg_data_dir, in_json",
        "ignored with a warning beside dataset_config",
        "refused beside it",
        "nothing is accepted and ignored",
    ),
    Difference("output_dir", "none: fails at the first save", "`outputs/network`", "the command runs as it is"),
    Difference(
        "output_name",
        "none: `epoch-000001`, `at-step00000100`, `last`",
        "`last`: `last-000001`, `last-step00000100`, `last`",
        "files of one run sort together",
    ),
    Difference(
        "network_module", "none: stops", "`networks.lora`", "it is the only one; other kinds are `network_args algo=`"
    ),
    Difference(
        "network_args",
        "unknown keys are ignored",
        "refused with the nearest one, as are keys without effect beside the others",
        "`convdim=4` trains no convolutions and says nothing",
    ),
    Difference(
        "learning_rate",
        "2e-6",
        "1e-4",
        "2e-6 is a fine-tuning rate, at which an adapter learns next to nothing",
    ),
    Difference(
        "text_encoder_lr",
        "ignored beside network_train_unet_only",
        "refused beside it, unless it is 0",
        "nothing is accepted and ignored",
    ),
    Difference(
        "caption_extension",
        "`.caption`",
        "`.caption`, else `.txt`, whichever lies beside each picture; found by another Unicode form or case of the ending, too",
        "most data sets carry `.txt`, and train on empty captions without a word",
    ),
    Difference(
        "caption_separator",
        "tags are split at it, and joined with `, ` after shuffling or dropout",
        "they are joined with it, too",
        "`a; b` is not to become `a, b` where a tag holds a comma",
    ),
    Difference(
        "alpha_mask",
        "off: the colours under transparent pixels are trained, which nobody sees",
        "off: transparent pictures are laid on white; on: as in kohya's, the colours count and the alpha is their mask, "
        "also where a picture is enlarged, which turns them black there",
        "a cut-out saved on black is not to be trained as a picture with a black background",
    ),
    Difference(
        "resolution",
        "none: stops without a dataset_config",
        "the base's own, 512 for SD1.5 and 1024 for SDXL",
        "a family has one size it was trained at",
    ),
    Difference(
        "min_bucket_reso",
        "256",
        "256, or half the resolution where that is less",
        "a resolution of 256 or below is legal",
    ),
    Difference(
        "max_bucket_reso",
        "1024",
        "twice the resolution: 1024 at 512, 2048 at 1024",
        "at 1024, a limit of 1024 shrinks every picture that is not square: 832x1024 instead of 832x1216",
    ),
    Difference(
        "cache_latents",
        "off",
        "on, unless color_aug, random_crop or face_crop_aug_range need fresh pixels; `--no_cache_latents` turns it off",
        "encoding each picture once is faster and changes nothing",
    ),
    Difference(
        "cache_latents_to_disk, cache_text_encoder_outputs_to_disk",
        "off: in memory; on: beside the pictures, recognised by name",
        "always in `cache_dir`, recognised by content",
        "an edited picture or caption is encoded anew; a stale cache would be trained on",
    ),
    Difference(
        "skip_cache_check, cache_info", "take what is there for good", "refused", "a stale cache would be trained on"
    ),
    Difference(
        "seed",
        "none: another one each time, unsaid",
        "42",
        "a run that cannot be repeated cannot be compared",
    ),
    Difference(
        "resume",
        "none: starts anew, overwriting",
        "`auto`: the newest state in output_dir, if any; `none` insists on a new run",
        "to go on, run the same command again",
    ),
    Difference(
        "output_dir, output_name",
        "files and states of the same name are overwritten, whatever run they are of",
        "an adapter of a run with other options or pictures is not, but with `--overwrite`; a finished run is not trained again",
        "a slip of an option costs a finished adapter",
    ),
    Difference(
        "output_name",
        "any; one that cannot be written is found at the first save",
        "refused at once where the longest name of a file is too long, or where Windows has a device of that name",
        "hours of training are lost otherwise",
    ),
    Difference(
        "save_last_n_epochs, save_last_n_steps, save_last_n_epochs_state, save_last_n_steps_state",
        "whatever bears the name is removed",
        "only what this run wrote is removed, before an interruption too",
        "files of another run may have such a name",
    ),
    Difference(
        "skip_until_initial_step, initial_step, initial_epoch",
        "off: a resumed run counts from 0 and repeats file names; data are read and dropped on request",
        "the true step, place in the data and learning rate, always, without reading",
        "order and noise follow from seed and step",
    ),
    Difference(
        "sample_sampler",
        "`ddim`",
        "DPM++ 2M Karras; prompts without a size are drawn at the base's own, not at 512",
        "30 steps of DDIM at 512 px show an SDXL adapter at its worst",
    ),
    Difference(
        "sample_prompts",
        "without sample_every_n_*, no pictures",
        "pictures at the end",
        "an option that does nothing is a mistake",
    ),
    Difference(
        "sample_prompts",
        "prompts are cut after 225 tokens; the shorter of prompt and negative prompt is filled with empty chunks",
        "prompts of any length; unequal ones are not filled, as in A1111 and ComfyUI ([generate](generate.md))",
        "filling draws another picture than the adapter will give there",
    ),
    Difference(
        "sdpa",
        "off: attention step by step",
        "on; `--no_sdpa` turns it off",
        "the same result, faster and in less memory",
    ),
    Difference(
        "xformers",
        "stops where it is not installed",
        "where it is not installed or there is no CUDA, sdpa is used, and that is said",
        "both compute the same attention",
    ),
    Difference(
        "mixed_precision, no_half_vae",
        "fp16 computes the VAE in fp16, where SDXL's gives NaN, unless no_half_vae",
        "with fp16 the VAE computes in float32 in any case",
        "latents are cached once; its speed hardly counts",
    ),
    Difference(
        "fp8_base, fp8_base_unet",
        "stop without mixed precision",
        "are base_quantization fp8; float32 computes with float8 weights too",
        "one option says how frozen weights are kept",
    ),
    Difference(
        "clip_skip",
        "on SDXL ignored with a warning",
        "on SDXL 2, which SDXL is, or refused",
        "nothing is accepted and ignored",
    ),
    Difference(
        "v_parameterization",
        "off: noise is predicted, whatever the base was made for",
        "off: as the base's scheduler configuration says; a single file says nothing",
        "a velocity base trained as a noise base is spoilt",
    ),
    Difference(
        "zero_terminal_snr",
        "SNR weights follow the old schedule",
        "they follow the new one",
        "the weight of a step belongs to the noise it has",
    ),
    Difference("huber_scale", "ignored by huber_schedule snr", "counts in every schedule", "it is said to"),
    Difference(
        "validation_split",
        "parts overlap; timesteps and pictures differ between validations",
        "a stable hash, of few pictures one at least and of twenty two; fixed noise and timesteps",
        "two validations differ by the weights alone",
    ),
    Difference(
        "max_data_loader_n_workers, persistent_data_loader_workers",
        "processes, started anew each epoch unless persistent",
        "threads that live as long as the run",
        "no picture is seen twice or missed when an epoch begins",
    ),
    Difference(
        "logging_dir",
        "none: no log",
        "`logs` in output_dir",
        "metrics that were not kept cannot be looked at",
    ),
    Difference("log_with", "tensorboard, wandb, all", "tensorboard", "nothing is sent to other machines"),
    Difference("log_config", "off", "always", "a log without its options explains nothing"),
    Difference(
        "save_model_as", "safetensors, ckpt, pt", "safetensors", "the others are pickles, which run code when loaded"
    ),
    Difference(
        "torch_compile",
        "compiles the whole U-Net, for each bucket anew",
        "is `--compile regional`: the repeated blocks, in seconds",
        "buckets come in many shapes",
    ),
    Difference(
        "config_file",
        "unknown keys are ignored, types unchecked",
        "refused, all of them listed with the nearest name and line (`--ignore_unknown_keys` goes on); checked",
        "a typing error would train something else",
    ),
    Difference(
        "max_train_epochs, clip_skip, save_every_n_epochs, save_every_n_steps, save_last_n_epochs, save_last_n_steps, "
        "validate_every_n_epochs, validate_every_n_steps, max_token_length, lr_scheduler_timescale",
        "at 0 or false the script stops, shows the U-Net CLIP's first layer (clip_skip) or keeps the newest file alone "
        "(save_last_n_*)",
        "0 and false are off",
        "nobody means that; every option at 0, false and the empty value is in [kohya_values.tsv](kohya_values.tsv)",
    ),
    Difference(
        "token_warmup_min, dataset_repeats, huber_c, huber_scale, lr_scheduler_num_cycles, lr_scheduler_power, "
        "max_validation_steps, initial_epoch",
        "0 and false are taken: as nothing, or as a number that computes nonsense",
        "refused at 0 and false (the two lr_scheduler_* where the schedule reads them)",
        "what is meant cannot be told",
    ),
    Difference(
        "train_data_dir, reg_data_dir, logging_dir, output_name, caption_extension",
        "an empty value is the working folder, the root folder, a file without a stem, or no captions",
        "an empty value is not given, for these and for all options; pretrained_model_name_or_path must not be empty",
        "a variable of a shell script that was not set trains something else",
    ),
    Difference(
        "lr_scheduler_args",
        "min_lr and lr_end are shares of learning_rate in every group",
        "they are the rates that each group comes to",
        "with unet_lr 1 and learning_rate 1e-4, min_lr 1e-5 is a tenth of 1",
    ),
    Difference(
        "output_config",
        "writes what differs from the defaults",
        "writes every option that has a value",
        "a file that says all of it means the same after an update",
    ),
)


def differences_table() -> str:
    """The table of docs/train_network.md, in Markdown."""
    rows = ["| option | kohya | here | why |", "|---|---|---|---|"]
    for difference in DIFFERENCES:
        options = ", ".join(f"`{name}`" for name in names_of(difference))
        rows.append(f"| {options} | {difference.kohya} | {difference.here} | {difference.why} |")
    return "\n".join(rows) + "\n"


def names_of(difference: Difference) -> list[str]:
    return difference.option.split(", ")


if __name__ == "__main__":
    print(differences_table(), end="")
