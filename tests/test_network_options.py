"""Options of train_network.py: kohya's, one by one, and what a user reads where one of them cannot be."""

from __future__ import annotations

import csv
import dataclasses
import math
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options.kohya.differences import DIFFERENCES, differences_table, names_of
from library.options.kohya.network_args import NetworkArgs
from library.options.kohya.refused import ALIASES, REFUSED
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import fields_of, flatten
from library.options.toml_file import PROJECT_ROOT

TABLE = PROJECT_ROOT / "tests" / "data" / "kohya_options.tsv"
FIELDS = fields_of(TrainNetworkOptions)


def parsed(*argv: str) -> TrainNetworkOptions:
    return parse_network_options(list(argv), prog="train_network.py", description="x")


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


class KohyaOption(typing.NamedTuple):
    used: bool
    name: str
    kind: str
    default: str


def kohya_options() -> list[KohyaOption]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [KohyaOption(r["used"] == "*", r["option"][2:], r["type"], r["default"]) for r in rows]


OPTIONS = kohya_options()
OFFERED = [option for option in OPTIONS if option.name in FIELDS]


# --- the table of kohya's options ---


def test_the_table_is_whole() -> None:
    assert len(OPTIONS) == len({option.name for option in OPTIONS}) == 196
    assert sum(option.used for option in OPTIONS) == 85


def test_every_option_of_kohya_is_offered_or_refused() -> None:
    for option in OPTIONS:
        places = (option.name in FIELDS) + (option.name in REFUSED) + (option.name in ALIASES)
        assert places == 1, option.name


def test_every_often_used_option_is_offered() -> None:
    assert not [option.name for option in OPTIONS if option.used and option.name not in FIELDS]


def plain(kind: Any) -> set[Any]:
    """The types that a value of `kind` may have, None left out; choices as they are."""
    if typing.get_origin(kind) is typing.Annotated:
        return plain(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Literal, tuple):
        return {kind}
    parts = typing.get_args(kind)
    return set().union(*(plain(part) for part in parts if part is not type(None))) if parts else {kind}


@pytest.mark.parametrize("option", OFFERED, ids=lambda option: option.name)
def test_types_are_those_of_kohya(option: KohyaOption) -> None:
    kind, _, choices = option.kind.partition(" {")
    (found,) = plain(FIELDS[option.name])
    if choices:
        wanted = set(choices.rstrip("}").split(", ")) - {"None"}
        assert wanted <= {str(choice) for choice in typing.get_args(found)}
        return
    is_text = found in (str, Path) or typing.get_origin(found) is typing.Literal
    pairs = (tuple[int, int], tuple[float, float])
    fits = {
        "flag": found is bool,
        "str": is_text or found in pairs,
        "Path": found is Path,
        "int": found is int or found == typing.Literal[75, 150, 225],
        "float": found is float,
        "int_or_float": found is float,
        "str nargs=*": found in (tuple[str, ...], tuple[Path, ...]),
        "float nargs=*": found == tuple[float, ...],
    }
    assert fits[kind], f"{option.name}: {option.kind} there, {found} here"


def same_default(theirs: str, ours: Any) -> bool:
    if theirs == "None":
        return ours is None or ours == ()
    if theirs in ("off", "False"):
        return ours is False
    if isinstance(ours, bool) or ours is None:
        return False
    if isinstance(ours, int | float):
        return math.isclose(float(theirs), ours)
    return str(ours) == theirs.strip('"')


@pytest.mark.parametrize("option", OFFERED, ids=lambda option: option.name)
def test_defaults_are_those_of_kohya_or_in_the_table_of_differences(option: KohyaOption) -> None:
    ours = {field.name: getattr(group, field.name) for group in groups() for field in dataclasses.fields(group)}[
        option.name
    ]
    told = {name for difference in DIFFERENCES for name in names_of(difference)}
    assert same_default(option.default, ours) or option.name in told, f"{option.default} there, {ours!r} here"


def groups() -> list[Any]:
    options = TrainNetworkOptions()
    return [getattr(options, field.name) for field in dataclasses.fields(options)]


def test_differences_are_about_options_that_there_are() -> None:
    names = {option.name for option in OPTIONS}
    assert not [name for difference in DIFFERENCES for name in names_of(difference) if name not in names]


def test_the_document_shows_the_table_of_differences() -> None:
    text = (PROJECT_ROOT / "docs" / "train_network.md").read_text(encoding="utf-8")
    section = text.split("## Differences from kohya\n")[1].split("\n## ")[0]
    assert differences_table().strip() in section, "run python -m library.options.kohya.differences"


def test_refused_options_have_kohyas_kind_and_default() -> None:
    for option in OPTIONS:
        if option.name in REFUSED:
            rule = REFUSED[option.name]
            assert rule.is_flag == (option.kind == "flag"), option.name
            assert rule.is_flag or str(rule.default) == option.default, option.name
            assert rule.reason.endswith(".") and len(rule.reason) > 20


# --- command lines ---

# Command lines that between them give every option of kohya's that is offered. DIR/x.y and DIR/folder are there.
LINES = (
    """--config_file DIR/x.toml --dataset_config set.toml --pretrained_model_name_or_path base --vae other --no_half_vae
    --mixed_precision bf16 --full_bf16 --fp8_base --fp8_base_unet --disable_mmap_load_safetensors --clip_skip 2
    --max_token_length 225 --resolution 512,768 --resize_interpolation lanczos --enable_bucket --min_bucket_reso 320
    --max_bucket_reso 960 --bucket_reso_steps 32 --bucket_no_upscale --flip_aug --alpha_mask --train_batch_size 4
    --cache_latents --cache_latents_to_disk --vae_batch_size 4 --cache_text_encoder_outputs --network_train_unet_only
    --cache_text_encoder_outputs_to_disk --max_data_loader_n_workers 2 --persistent_data_loader_workers""",
    """--train_data_dir DIR/folder --reg_data_dir DIR/folder --in_json DIR/x.json --conditioning_data_dir DIR/folder
    --dataset_repeats 3 --masked_loss --color_aug --random_crop --face_crop_aug_range 1.0,2.5 --prior_loss_weight 0.5""",
    """--shuffle_caption --caption_separator ; --caption_extension .txt --keep_tokens 2 --keep_tokens_separator |||
    --secondary_separator ;;; --enable_wildcard --caption_prefix a --caption_suffix b --caption_dropout_rate 0.1
    --caption_dropout_every_n_epochs 3 --caption_tag_dropout_rate 0.2 --token_warmup_min 2 --token_warmup_step 100""",
    """--network_module networks.lora --network_dim 8 --network_alpha 4 --network_dropout 0.1 --network_args conv_dim=4
    --network_weights DIR/x.toml --base_weights DIR/x.toml DIR/x.txt --base_weights_multiplier 0.5 --scale_weight_norms 1
    --network_train_text_encoder_only""",
    "--network_weights DIR/x.toml --dim_from_weights --initial_step 100 --skip_until_initial_step",
    """--min_timestep 100 --max_timestep 900 --noise_offset 0.05 --noise_offset_random_strength --adaptive_noise_scale 0.1
    --multires_noise_iterations 6 --multires_noise_discount 0.4 --ip_noise_gamma 0.1 --ip_noise_gamma_random_strength
    --loss_type huber --huber_schedule exponential --huber_c 0.2 --huber_scale 2 --min_snr_gamma 5 --v_pred_like_loss 0.5
    --debiased_estimation_loss""",
    "--v_parameterization --zero_terminal_snr --scale_v_pred_loss_like_noise_pred",
    """--optimizer_type AdamW8bit --optimizer_args weight_decay=0.01 betas=0.9,0.99 --learning_rate 1e-3 --unet_lr 2e-4
    --text_encoder_lr 1e-4 5e-5 --max_grad_norm 0 --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3
    --lr_warmup_steps 100""",
    "--lr_scheduler warmup_stable_decay --lr_decay_steps 20% --lr_warmup_steps 0.1 --lr_scheduler_min_lr_ratio 0.1",
    "--lr_scheduler polynomial --lr_scheduler_power 2",
    "--lr_scheduler inverse_sqrt --lr_scheduler_timescale 100",
    "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=100",
    """--max_train_steps 2000 --gradient_accumulation_steps 2 --seed 7 --gradient_checkpointing --xformers --sdpa
    --validation_split 0.1 --validation_seed 3 --validate_every_n_steps 50 --validate_every_n_epochs 2
    --max_validation_steps 4 --sample_prompts DIR/x.txt --sample_every_n_steps 100 --sample_every_n_epochs 1
    --sample_at_first --sample_sampler euler_a --training_comment mio""",
    """--max_train_epochs 12 --initial_epoch 2 --output_dir out --output_name mio --save_model_as safetensors
    --save_precision fp16 --save_every_n_epochs 2 --save_every_n_steps 100 --save_last_n_epochs 2 --save_last_n_steps 300
    --save_last_n_epochs_state 1 --save_last_n_steps_state 200 --save_state --save_state_on_train_end""",
    "--save_n_epoch_ratio 3 --resume DIR/folder --config_file DIR/new --output_config",
    """--logging_dir logs --log_with tensorboard --log_prefix mio --log_tracker_name lora --log_config --no_metadata
    --metadata_title a --metadata_author b --metadata_description c --metadata_license d --metadata_tags e
    --metadata_usage_hint f --metadata_thumbnail data:image/png;base64,AA --metadata_merged_from g
    --metadata_trigger_phrase h --metadata_preprocessor i --metadata_is_negative_embedding j""",
)


def by_option(line: str) -> dict[str, list[str]]:
    """Option -> its words after it."""
    found: dict[str, list[str]] = {}
    for word in line.split():
        if word.startswith("--"):
            found[word[2:]] = []
        else:
            found[next(reversed(found))].append(word)
    return found


def test_the_lines_give_every_offered_option() -> None:
    assert {name for line in LINES for name in by_option(line)} >= {option.name for option in OFFERED}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_every_offered_option_arrives(line: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("x.json", "x.txt", "x.toml"):
        (tmp_path / name).write_text("", encoding="utf-8")
    line = line.replace("DIR", str(tmp_path))
    options = flatten(parsed(*line.split()))
    for name, words in by_option(line).items():
        assert arrived(options[name], words), f"{name}: {words} became {options[name]!r}"


def arrived(found: Any, words: list[str]) -> bool:
    if isinstance(found, bool):
        return found and not words
    items = found if isinstance(found, list) else [found]
    wanted = words[0].split(",") if isinstance(items[0], int | float) and len(words) == 1 else words
    return [str(item) if isinstance(item, str) else item for item in items] == [
        word if isinstance(item, str) else 0.2 if word == "20%" else float(word)
        for word, item in zip(wanted, items, strict=True)
    ]


def test_lists_take_all_words_up_to_the_next_option() -> None:
    options = parsed("--text_encoder_lr", "1e-4", "5e-5", "--network_args", "conv_dim=4", "algo=dora", "--seed", "7")
    assert options.optimizer.text_encoder_lr == (1e-4, 5e-5) and options.training.seed == 7
    assert options.network.args == NetworkArgs(algo="dora", conv_dim=4)
    assert parsed("--network_args").network.args == NetworkArgs()


def test_hyphens_equals_signs_and_repeats_are_read_as_argparse_does() -> None:
    one = parsed("--network-dim=8", "--seed", "1", "--seed", "2", "--no-sdpa")
    assert one == parsed("--network_dim", "8", "--no_sdpa", "--seed=2")


@pytest.mark.parametrize(("word", "value"), [("0.1", 0.1), ("100", 100.0), ("10%", 0.1), ("0", 0.0), ("2.5%", 0.025)])
def test_warm_up_is_steps_a_share_or_a_percentage(tmp_path: Path, word: str, value: float) -> None:
    assert parsed("--lr_warmup_steps", word, "--lr_scheduler", "cosine").optimizer.lr_warmup_steps == value
    file = config(tmp_path, f"lr_scheduler = 'cosine'\nlr_warmup_steps = {word if '%' not in word else repr(word)}\n")
    assert parsed("--config_file", file).optimizer.lr_warmup_steps == value


def test_epochs_decide_the_length_where_both_are_given() -> None:
    assert parsed().training.max_train_steps == 1600
    training = parsed("--max_train_epochs", "12", "--max_train_steps", "99").training
    assert (training.max_train_epochs, training.max_train_steps) == (12, None)


def test_other_names_stand_for_what_is_here(tmp_path: Path) -> None:
    assert parsed("--use_8bit_adam").optimizer.optimizer_type == "AdamW8bit"
    assert parsed("--use_lion_optimizer", "--optimizer_type", "Lion").optimizer.optimizer_type == "Lion"
    assert parsed("--caption_extention=.txt").captions.caption_extension == ".txt"
    assert parsed("--torch_compile").speed.compile == "regional"
    file = config(
        tmp_path, "use_8bit_adam = true\noptimizer_type = ''\ncaption_extention = 'cap'\ntorch_compile = false"
    )
    options = parsed("--config_file", file)
    assert options.optimizer.optimizer_type == "AdamW8bit" and options.speed.compile == "none"
    assert options.captions.caption_extension == "cap"


def test_two_names_that_say_different_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--use_8bit_adam means --optimizer_type AdamW8bit, and --optimizer_type Lion"):
        parsed("--use_8bit_adam", "--optimizer_type", "Lion")
    file = config(tmp_path, "use_8bit_adam = true\noptimizer_type = 'Lion'")
    with pytest.raises(UserError, match=r"use_8bit_adam \(my.toml, line 1\) means .* is 'Lion' \(my.toml, line 2\)"):
        parsed("--config_file", file)


# The command of a guide for people who move from SD1.5 to SDXL, and the one it starts from.
GUIDE_SDXL = r"""
  --dataset_config /mnt/c/AI_LLM_projects/3d-animation-lora-pipeline/configs/training/sdxl/luca_human_dataset_sdxl.toml \
  --pretrained_model_name_or_path /mnt/c/AI_LLM_projects/ai_warehouse/models/stable-diffusion/sdxl/sd_xl_base_1.0.safetensors \
  --output_dir /mnt/data/ai_data/models/lora/luca/sdxl_v1 \
  --output_name luca_sdxl_v1 \
  --network_module networks.lora \
  --network_dim 64 \
  --network_alpha 32 \
  --learning_rate 0.0003 \
  --text_encoder_lr 0.0002 \
  --unet_lr 0.0003 \
  --max_train_epochs 12 \
  --save_every_n_epochs 2 \
  --save_model_as safetensors \
  --save_precision fp16 \
  --mixed_precision fp16 \
  --gradient_checkpointing \
  --gradient_accumulation_steps 2 \
  --optimizer_type AdamW8bit \
  --lr_scheduler cosine_with_restarts \
  --lr_scheduler_num_cycles 3 \
  --lr_warmup_steps 100 \
  --logging_dir /mnt/data/ai_data/models/lora/luca/sdxl_v1/logs \
  --log_with tensorboard \
  --seed 42 \
  --clip_skip 2 \
  --cache_latents \
  --cache_latents_to_disk \
  --max_data_loader_n_workers 8 \
  --persistent_data_loader_workers \
  --xformers \
  --max_token_length 225 \
  --bucket_reso_steps 64 \
  --bucket_no_upscale
"""
GUIDE_SD15 = GUIDE_SDXL.replace("sdxl/sd_xl_base_1.0", "checkpoints/v1-5-pruned").replace("sdxl", "sd15")


def in_a_shell(text: str) -> list[str]:
    return shlex.split(text.replace("\\\n", " "))


@pytest.mark.parametrize("line", [GUIDE_SDXL, GUIDE_SD15], ids=["sdxl", "sd15"])
def test_the_commands_of_the_guide_are_understood(line: str) -> None:
    options = parsed(*in_a_shell(line))
    assert (options.network.rank, options.network.alpha) == (64, 32.0)
    o = options.optimizer
    assert (o.unet_rate, o.text_encoder_rates(2), o.lr_warmup_steps) == (3e-4, (2e-4, 2e-4), 100)
    assert (o.optimizer_type, o.lr_scheduler_num_cycles) == ("AdamW8bit", 3)
    assert (options.model.mixed_precision, options.model.vae_precision) == ("fp16", "no")
    assert options.text.chunks == 3 and options.speed.xformers
    assert options.output.output_name.startswith("luca_") and options.trains_text_encoders


def test_tips_for_other_programs_are_answered() -> None:
    with pytest.raises(UserError, match=r"--batch_size: Use --train_batch_size.*--lowvram: .*--gradient_checkpointing"):
        parsed("--batch_size", "2", "--gradient_accumulation_steps", "4", "--lowvram", "--medvram")
