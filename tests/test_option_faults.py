"""What a user reads of several faults at once, of values with blanks, of options that stand in another place, on any terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import generate
import merge_lora
import train_network
import train_repa
from library.errors import EXIT_BAD_INPUT, UserError
from library.options.arguments import parse_arguments
from library.options.dialect import PLAIN
from library.options.evaluate import EvaluateOptions
from library.options.generate import GenerateOptions
from library.options.kohya.network_args import parse_network_args
from library.options.merging import MergeLoraOptions
from library.options.parser import flatten, parse
from library.options.repa import parse_repa_options
from library.options.search import DIALECT, OptimizeOptions
from library.options.toml_file import PROJECT_ROOT
from tests.test_network_options import config, parsed


def faults(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return str(caught.value).split("\n")


def test_all_layers_of_faults_are_said_at_once(tmp_path: Path) -> None:
    text = """network_dims = 4
v2 = true
conv_dim = 32
seed = "x"
save_precision = "half"
min_snr_gamma = -1
vae_batch_size = -1
huber_c = 0.5
train_data_dir = "nowhere"
noise_offset_random_strength = true
"""
    words = [
        "--lerning_rate",
        "3",
        "--network_dim",
        "y",
        "--clip_skip",
        "13",
        "--wandb_api_key",
        "k",
        "--text_encoder_lr",
        "1",
        "2",
        "3",
    ]
    assert faults("--config_file", config(tmp_path, text), *words) == [
        "Unknown option: --lerning_rate (did you mean learning_rate?).",
        "Not offered here: --wandb_api_key: Nothing is sent to other machines. TensorBoard and metrics.jsonl have every row.",
        "Unknown key: network_dims (did you mean network_dim?) in my.toml, line 1. Not offered here: v2 (my.toml, line 2): "
        "SD1.5 and SDXL are trained here, and told apart by themselves; Stable Diffusion 2 is not. conv_dim (my.toml, line 3): "
        'no option but a part of network_args. Write network_args = ["conv_dim=32"].',
        "seed is 'x' in my.toml, line 4: input should be a valid integer.",
        "save_precision is 'half' in my.toml, line 5: input should be 'float', 'fp16' or 'bf16'.",
        "network_dim is 'y': expected INT.",
        "clip_skip must lie between 1 and 12, the layers of CLIP-L, got 13.",
        "train_data_dir nowhere does not exist (my.toml, line 9).",
        "vae_batch_size must be positive, got -1 (my.toml, line 7).",
        "noise_offset_random_strength has no effect without noise_offset (my.toml, line 10).",
        "min_snr_gamma must be positive, got -1.0 (my.toml, line 6).",
        "huber_c has no effect with loss_type l2. Use huber (my.toml, line 8).",
        "text_encoder_lr has 3 values; SD1.5 has one text encoder and SDXL two.",
    ]


def test_what_follows_from_a_fault_is_not_said_beside_it(tmp_path: Path) -> None:
    assert faults("--learning_rate", "-1") == ["learning_rate must be positive, got -1.0."]
    file = config(tmp_path, "save_every_n_epochs = 'two'\nsave_last_n_epochs = 2\n")
    assert faults("--config_file", file) == [
        "save_every_n_epochs is 'two' in my.toml, line 1: input should be a valid integer."
    ]
    both = faults("--network_train_unet_only", "--network_train_text_encoder_only")
    assert both == [
        "network_train_unet_only and network_train_text_encoder_only exclude each other: nothing would be trained."
    ]


def test_faults_beside_a_file_that_cannot_be_read_are_said_too(tmp_path: Path) -> None:
    found = faults("--config_file", "nowhere.toml", "--lern", "3", "--v2")
    assert found[:2] == ["Unknown option: --lern.", f"Not offered here: --v2: {found[1].split('--v2: ')[1]}"]
    assert found[2].startswith("No configuration file nowhere.toml")


def test_each_fault_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_network.main(["--seed", "-1", "--network_dim", "-1"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == (
        "error: network_dim must be positive, got -1.\nerror: seed must be a whole number from 0 to 2^63 - 1, got -1.\n"
    )
    assert train_repa.main(["--train_data", "x", "--seed", "-1", "--conv_dim", "-1"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 2
    assert generate.main(["--prompt", "x", "--seed", "-1", "--steps", "0"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 2
    assert merge_lora.main(["--models", "nowhere", "--new_rank", "-1"]) == EXIT_BAD_INPUT
    assert "models nowhere does not exist.\nerror: new_rank must be positive, got -1." in capsys.readouterr().err


# --- empty values and blanks ---


@pytest.mark.parametrize(
    ("options_type", "words", "option", "expected"),
    [
        (MergeLoraOptions, ["--output_dir", " /x "], "output_dir", "/x"),
        (MergeLoraOptions, ["--output_dir="], "output_dir", None),
        (MergeLoraOptions, ["--models", "", " "], "models", []),
        (MergeLoraOptions, ["--network_alpha", ""], "network_alpha", None),
        (MergeLoraOptions, ["--pretrained_model_name_or_path", " a "], "pretrained_model_name_or_path", "a"),
        (GenerateOptions, ["--prompt", "x", "--output", " /x.png"], "output", "/x.png"),
        (GenerateOptions, ["--prompt", "x", "--output="], "output", "outputs/generated.png"),
        (GenerateOptions, ["--prompt", " x ", "--init_image", ""], "prompt", " x "),
        (OptimizeOptions, ["--output-dir", "  "], "output_dir", None),
        (OptimizeOptions, ["--storage", ""], "storage", None),
        (OptimizeOptions, ["--base-model", " b"], "base_model", "b"),
        (EvaluateOptions, ["--output_dir", " /x\\t", "--checkpoint", " . "], "output_dir", "/x"),
    ],
)  # fmt: skip
def test_blanks_and_empty_values_mean_the_same_in_every_script(
    options_type: type, words: list[str], option: str, expected: Any
) -> None:
    words = [word.replace("\\t", "\t") for word in words]
    options = parse(
        options_type, words, prog="x", description="", dialect=DIALECT if options_type is OptimizeOptions else PLAIN
    )
    assert flatten(options)[option] == expected


def test_what_a_script_cannot_do_without_must_not_be_empty(tmp_path: Path) -> None:
    for words in (["--train_data", ""], ["--train_data= "]):
        with pytest.raises(UserError, match=r"^train_data is empty\.$"):
            parse_repa_options(words, prog="x", description="")
    assert faults("--pretrained_model_name_or_path=") == ["pretrained_model_name_or_path is empty."]
    file = config(tmp_path, "pretrained_model_name_or_path = ' '")
    assert faults("--config_file", file) == ["pretrained_model_name_or_path is empty (my.toml, line 1)."]


def test_blanks_in_files_and_an_empty_value_that_takes_back_a_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, "output_dir = ' /x '\nvae = ' v.safetensors'\nlogging_dir = '  '\ncaption_prefix = ' a '\n")
    options = parsed("--config_file", file)
    assert (options.output.output_dir, options.output.logging_dir) == (Path("/x"), None)
    assert (options.model.vae, options.captions.caption_prefix) == ("v.safetensors", " a ")
    assert parsed("--config_file", file, "--vae=", "--output_dir", "").model.vae is None
    said = capsys.readouterr().err
    assert (
        said == "note: --vae is empty and counts as not given.\nnote: --output_dir is empty and counts as not given.\n"
    )
    assert parsed("--seed", "3", "--seed", "").training.seed == parsed().training.seed, "the last one counts"


# --- what stands in another place ---


def test_network_arguments_that_stand_alone_say_where_they_belong(tmp_path: Path) -> None:
    file = config(
        tmp_path, "[network]\nconv_dim = 16\nconv_alpha = 8\nblock_dims = [4, 4]\nalgo = 'loha'\nfactor = 0\n"
    )
    (said,) = faults("--config_file", file)
    assert said == (
        "conv_dim (my.toml, line 2), conv_alpha (my.toml, line 3), block_dims (my.toml, line 4), algo (my.toml, line 5): no option "
        'but a part of network_args. Write network_args = ["conv_dim=16", "conv_alpha=8", "block_dims=4,4", "algo=loha"].'
    )
    parsed("--config_file", config(tmp_path, "conv_dim = 0\nconv_alpha = ''\nrank_dropout = false"))
    (said,) = faults("--conv_dim", "16", "--conv-alpha=8", "--seed", "3")
    assert (
        said
        == "--conv_dim, --conv_alpha: no option but a part of network_args. Write --network_args conv_dim=16 conv_alpha=8."
    )


def test_the_word_for_the_family_is_accepted(tmp_path: Path) -> None:
    assert parsed("--config_file", config(tmp_path, "sdxl = true")).model.sdxl is True
    assert (
        parsed("--sdxl").model.sdxl is True and parsed("--no_sdxl").model.sdxl is False and parsed().model.sdxl is None
    )


def test_a_wrong_word_for_the_family_is_said(capsys: pytest.CaptureFixture[str], no_forecast: None) -> None:
    assert train_network.main(["--sdxl", "--dry_run"]) == 0
    assert "note: sdxl is true, and tiny-shapes is SD1.5. It is trained as what it is." in capsys.readouterr().out
    assert train_network.main(["--no_sdxl", "--dry_run"]) == 0
    assert "sdxl is" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("weight_decay=0.5,", "has a comma at the end of 'weight_decay=0.5,', which makes a list of it. Leave it out."),
        ("weight_decay=0.5 betas=0.9,0.99", "--x weight_decay=0.5 betas=0.9,0.99, or in a file x = "
         '["weight_decay=0.5", "betas=0.9,0.99"].'),
        ("weight_decay=0.5, betas=0.9,0.99", "has 2 pairs in one word"),
        ("a=1,b=2;c=3", "has 3 pairs in one word, 'a=1,b=2;c=3'. Give each a word of its own: --x a=1 b=2 c=3,"),
        ("d_coef = 2  decouple = True", "has 2 pairs in one word"),
    ],
)  # fmt: skip
def test_several_pairs_in_one_word_and_commas_are_explained(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments("x", [word])
    assert said in str(caught.value)


def test_network_args_are_told_apart_likewise_and_other_values_stay() -> None:
    with pytest.raises(UserError, match=r"--network_args conv_dim=4 conv_alpha=1, or in a file"):
        parse_network_args(["conv_dim=4 conv_alpha=1"])
    assert parse_network_args(["down_lr_weight=0,,1"]).down_lr_weight == (0.0, 0.0, 1.0)
    kept = parse_arguments("x", ["betas=0.9,0.99", "name=a=b", "step_rules=1:500,0.1", "text=a b", "pair=(0.5,)"])
    assert kept == {"betas": (0.9, 0.99), "name": "a=b", "step_rules": "1:500,0.1", "text": "a b", "pair": (0.5,)}


# --- any terminal ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--save_precision up --seed x", "Invalid choice 'up' for argument '--save_precision'. Expected one of"),
        ("--text_encoder_lr a", "--text_encoder_lr"),
        ("--network_dim", "Missing value for argument '--network_dim'."),
        ("--output_dir ünïcode --network_dim -1", "network_dim must be positive"),
    ],
)
def test_a_terminal_without_utf8_shows_sentences_too(words: str, said: str) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "train_network.py", *words.split()],
        cwd=PROJECT_ROOT,
        capture_output=True,
        env={**os.environ, **plain},
    )
    text = done.stderr.decode("ascii")
    assert done.returncode == EXIT_BAD_INPUT and text.startswith("error: ") and said in text
    assert not set("|+") & set(text) and "---" not in text and "Traceback" not in text


def test_optimizer_arguments_that_stand_alone_do_so_too(tmp_path: Path) -> None:
    (said,) = faults("--config_file", config(tmp_path, "betas = [0.9, 0.99]\ndecouple = true\n"))
    assert said.endswith('Write optimizer_args = ["betas=0.9,0.99", "decouple=True"].')
    with pytest.raises(
        UserError, match=r"--algo: no option but a part of network_args. Write --network_args algo=lokr"
    ):
        parse_repa_options(["--train_data", "x", "--algo", "lokr"], prog="x", description="")


def test_a_stray_word_is_the_only_fault_that_is_told(tmp_path: Path) -> None:
    (said,) = faults("stray", "--pretrained_model_name_or_path", "x.safetensors", "--train_data_dir", "demo")
    assert said == "Unrecognized options: stray."


def test_a_mistyped_option_is_not_missed_in_a_second_sentence() -> None:
    words = ["--pretrained_model_name_or_path", "x.safetensors", "--train_data_dirr", "demo"]
    assert faults(*words) == ["Unknown option: --train_data_dirr (did you mean train_data_dir?)."]


@pytest.mark.parametrize("name", ["no_seed", "no-clip_skip", "no_output_dir"])
def test_only_flags_have_an_opposite(name: str) -> None:
    with pytest.raises(UserError, match=f"Unknown option: --{name.replace('-', '_')}"):
        parsed(f"--{name}")
