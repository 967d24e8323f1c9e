"""Command lines and files as people paste them: flags with values, printed dashes, commas, other programs' keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.parser import flatten
from tests.test_network_options import config, parsed
from tests.test_option_faults import faults


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--shuffle_caption maybe", "--shuffle_caption takes no value, got maybe. --shuffle_caption turns it on,"),
        ("--output_name my lora", "--output_name takes one value, got 2: my lora."),
        ("--output_name my lora", '--output_name "my lora"'),
        ("--seed=1 2", "--seed takes one value, got 2: 1 2."),
        ("--network_dim 8 ^ --seed 1", "Unrecognized options: ^. A line goes on after ^ in Windows' cmd"),
        ("--shuffle_caption \\", "Unrecognized options: \\. A line goes on"),
        ("-–network_dim 8", "type two minus signs, --network_dim"),
        ("—seed=2", "type two minus signs, --seed=2"),
        ("-seed 2", "Options begin with two minus signs: --seed."),
        ("--text_encoder_lr 5e-5,1e-5", "Write --text_encoder_lr 5e-5 1e-5."),
        ("--num_cpu_threads_per_process=8", "is an option of accelerate launch. It stands before the script's name"),
        ("--epoch 3", "max_train_epochs says how many epochs there are"),
        ("--rank 3", "Use --network_dim."),
    ],
)
def test_a_pasted_command_line_is_refused_with_what_to_write(words: str, said: str) -> None:
    (fault,) = faults(*words.split(" "))
    assert said in fault


def test_a_flag_with_true_or_false_behind_it_is_that_flag() -> None:
    given = flatten(parsed("--shuffle_caption", "True", "--cache_latents=false", "--v2", "False", "--clip_skip", "2"))
    assert (given["shuffle_caption"], given["cache_latents"], given["clip_skip"]) == (True, False, 2)
    assert not flatten(parsed("--shuffle_caption", "--shuffle_caption=0"))["shuffle_caption"]
    assert len(faults("--v2", "True")) == len(faults("--v2=true")) == 1


def test_a_value_that_begins_with_a_printed_dash_is_a_value() -> None:
    assert flatten(parsed("--training_comment", "—mio—"))["training_comment"] == "—mio—"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resolution = 512,512", 'line 1: text stands in quotes. Write resolution = "512,512".'),
        ("seed = 1\nshuffle_caption = True # yes", "line 2: TOML spells it true. Write shuffle_caption = true."),
        ("vae =\nseed = 1", 'line 1: TOML has no empty value. Leave the line out, or write vae = "".'),
        ("vae = None", 'Leave the line out, or write vae = "".'),
        ("seed: 4", "a key and its value have = between them, and nothing behind them. Write seed = 4."),
        ("seed = 4,", "Write seed = 4."),
        ("output_dir = D:\\lora\\out", "Write output_dir = 'D:\\lora\\out'."),
    ],
)
def test_a_line_that_is_no_toml_is_said_as_toml(tmp_path: Path, text: str, said: str) -> None:
    (fault,) = faults("--config_file", config(tmp_path, text))
    assert said in fault


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('learning_rate = "1e-4"', "Write it without quotes: learning_rate = 1e-4."),
        ('max_token_length = "225"', "Write it without quotes: max_token_length = 225."),
        ('shuffle_caption = "True"', "Write it without quotes: shuffle_caption = true."),
        ("zzz = 1", "Unknown key: zzz in my.toml, line 1. Delete or correct them, or add --ignore_unknown_keys."),
        ("[network_args.args]\nnetwork_dim = 8", "args (a table within a table, which holds no options;"),
        ("wandb_run_name = 'last'", "Leave it out."),
        ("noise_offset_type = 'Multires'\nepoch = 3", "kohya's own script does not read it"),
    ],
)
def test_a_file_of_another_habit_is_refused_with_what_to_write(tmp_path: Path, text: str, said: str) -> None:
    (fault,) = faults("--config_file", config(tmp_path, text))
    assert said in fault


def test_what_the_gui_writes_and_asks_for_nothing_is_taken(tmp_path: Path) -> None:
    text = """ae = ""
blocks_to_swap = 0
noise_offset_type = "Original"
stop_text_encoder_training = 0
sample_prompts = ""
sample_sampler = "euler_a"
lr_scheduler_args = []
"""
    assert flatten(parsed("--config_file", config(tmp_path, text)))["sample_prompts"] is None


def test_a_json_file_of_the_gui_is_named_as_such(tmp_path: Path) -> None:
    file = tmp_path / "preset.json"
    file.write_text('{"LoRA_type": "Standard"}')
    (fault,) = faults("--config_file", str(file))
    assert "is a JSON file, as kohya's GUI saves it; options are read from TOML" in fault
