"""Options that say one thing in two ways: the command line beats a file, and a file the one it extends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options.network import TrainNetworkOptions
from library.options.parser import fields_of, flatten
from library.options.repa import TrainRepaOptions, parse_repa_options
from library.options.rivals import RIVALS, beaten, without
from tests.test_network_options import config, parsed


def repa(*argv: str) -> dict[str, Any]:
    return flatten(parse_repa_options(list(argv), prog="x", description=""))


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("max_train_epochs = 10", "--max_train_steps 2", {"max_train_steps": 2, "max_train_epochs": None}),
        ("max_train_steps = 10", "--max_train_epochs 2", {"max_train_steps": None, "max_train_epochs": 2}),
        ("max_train_epochs = 10", "--max_train_steps 2 --max_train_epochs 3", {"max_train_epochs": 3}),
        ("max_train_steps = 9", "--max_train_epochs 0", {"max_train_steps": 9, "max_train_epochs": None}),
        ("save_every_n_epochs = 1", "--save_n_epoch_ratio 4", {"save_every_n_epochs": None, "save_n_epoch_ratio": 4}),
        ("save_n_epoch_ratio = 4", "--save_every_n_epochs 1", {"save_every_n_epochs": 1, "save_n_epoch_ratio": None}),
        ("sample_every_n_epochs = 1\nsample_prompts = 'P'", "--sample_every_n_steps 5",
         {"sample_every_n_epochs": None, "sample_every_n_steps": 5}),
        ("initial_step = 5", "--initial_epoch 2", {"initial_step": None, "initial_epoch": 2}),
        ("train_data_dir = 'D'\nin_json = 'J'\ndataset_repeats = 3", "--dataset_config set.toml",
         {"train_data_dir": None, "in_json": None, "dataset_repeats": 1, "dataset_config": "set.toml"}),
        ("dataset_config = 'set.toml'", "--train_data_dir D", {"dataset_config": None}),
        ("network_dim = 8", "--dim_from_weights --network_weights P", {"network_dim": None}),
        ("dim_from_weights = true\nnetwork_weights = 'P'", "--network_dim 8", {"network_dim": 8, "dim_from_weights": False}),
        ("network_train_unet_only = true", "--network_train_text_encoder_only", {"network_train_unet_only": False}),
        ("text_encoder_lr = 1e-5", "--network_train_unet_only", {"text_encoder_lr": []}),
        ("network_train_unet_only = true", "--text_encoder_lr 1e-5", {"network_train_unet_only": False}),
        ("unet_lr = 1e-5", "--network_train_text_encoder_only", {"unet_lr": None}),
        ("lr_scheduler_type = 'StepLR'\nlr_scheduler_args = ['step_size=3']", "--lr_scheduler cosine",
         {"lr_scheduler_type": "", "lr_scheduler_args": [], "lr_scheduler": "cosine"}),
        ("optimizer_args = ['weight_decay=0.1', 'amsgrad=True']", "--weight_decay 0.2",
         {"weight_decay": 0.2, "optimizer_args": ["amsgrad=True"]}),
        ("weight_decay = 0.1", "--optimizer_args weight_decay=0.2", {"weight_decay": None}),
        ("optimizer_args = ['betas=0.8,0.9']", "--adam_beta1 0.7", {"adam_beta1": 0.7, "optimizer_args": []}),
        ("xformers = true", "--sdpa", {"xformers": False}),
        ("cache_latents_to_disk = true", "--no_cache_latents", {"cache_latents_to_disk": False, "cache_latents": False}),
        ("cache_latents = false", "--cache_latents_to_disk", {"cache_latents_to_disk": True, "cache_latents": None}),
    ],
)  # fmt: skip
def test_the_command_line_beats_the_file(file: str, words: str, expected: dict[str, Any], tmp_path: Path) -> None:
    for name in ("P.txt", "J.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "D").mkdir()

    def placed(text: str) -> str:
        for word, path in (("'P'", "P.txt"), (" P", "P.txt"), ("'J'", "J.json"), ("'D'", "D"), (" D", "D")):
            quote = "'" if word[0] == "'" else ""
            text = text.replace(word, f"{quote or ' '}{tmp_path / path}{quote}")
        return text

    options = flatten(parsed("--config_file", config(tmp_path, placed(file)), *placed(words).split()))
    assert {name: options[name] for name in expected} == expected


def test_what_is_replaced_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parsed(
        "--config_file", config(tmp_path, "seed = 1\nmax_train_epochs = 10"), "--max_train_steps", "2", "--seed", "3"
    )
    assert capsys.readouterr().err == "note: --max_train_steps replaces max_train_epochs of my.toml, line 2.\n"


def test_both_in_one_place_count_as_they_always_did(tmp_path: Path) -> None:
    text = "max_train_epochs = 12\nmax_train_steps = 99\n"
    assert parsed("--config_file", config(tmp_path, text)).training.max_train_epochs == 12
    with pytest.raises(UserError, match="save_n_epoch_ratio and save_every_n_epochs are both given"):
        parsed("--save_n_epoch_ratio", "2", "--save_every_n_epochs", "2")


def test_train_repa_goes_by_the_same_rule(tmp_path: Path) -> None:
    file = config(tmp_path, "train_data = 'x'\nmax_train_steps = 500\nconv_dim = 4\n")
    assert repa("--dataset_config", file)["max_train_epochs"] is None
    options = repa("--dataset_config", file, "--max_train_epochs", "3", "--network_args", "conv_dim=2")
    assert (options["max_train_epochs"], options["max_train_steps"], options["conv_dim"]) == (3, None, None)
    file = config(tmp_path, "train_data_dir = 'demo'\n")
    assert repa("--dataset_config", file)["train_data_dir"] == "demo", (
        "the file that is read is no rival of what is in it"
    )


def test_ranks_come_from_weights_where_train_repa_has_a_rank_of_its_own(tmp_path: Path) -> None:
    (weights := tmp_path / "a.safetensors").write_bytes(b"")
    words = ["--train_data", "demo", "--dim_from_weights", "--network_weights", str(weights)]
    (tmp_path / "my.toml").write_text("network_dim = 4\n")
    for config_file in ([], ["--dataset_config", str(tmp_path / "my.toml")]):
        options = repa(*words, *config_file)
        assert options["dim_from_weights"] and options["network_dim"] == repa("--train_data", "demo")["network_dim"]
    with pytest.raises(UserError, match="network_dim and dim_from_weights exclude each other"):
        repa(*words, "--network_dim", "4")


def test_a_file_beats_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        "train_data = 'x'\nmax_train_steps = 500\noptimizer_args = ['weight_decay=0.1']\n"
    )
    file = config(tmp_path, "extends = 'base.toml'\nmax_train_epochs = 2\nweight_decay = 0.3\n")
    options = repa("--dataset_config", file)
    assert (options["max_train_epochs"], options["max_train_steps"]) == (2, None)
    assert (options["weight_decay"], options["optimizer_args"]) == (0.3, [])


def test_rivals_are_options_that_there_are() -> None:
    known = fields_of(TrainNetworkOptions) | fields_of(TrainRepaOptions)
    for group in RIVALS:
        for name in group:
            assert name.partition(":")[0] in known or name.removeprefix("no_") in known, name


def test_what_asks_for_nothing_replaces_nothing() -> None:
    for nothing in (None, "", [], (), 0):
        assert beaten({"max_train_steps": nothing}, {"max_train_epochs": 3}) == {}
    assert beaten({"max_train_steps": 2}, {"max_train_epochs": 0}) == {}
    assert without({"a": 1, "optimizer_args": ("eps=1", "b=2")}, ["a", "optimizer_args:eps"]) == {
        "optimizer_args": ("b=2",)
    }
