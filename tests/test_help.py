"""--help of the scripts: short where there are many options, whole by group, by name and on demand."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

import train_network
from library.errors import EXIT_BAD_INPUT, UserError
from library.options.generate import GenerateOptions
from library.options.help import groups_of
from library.options.lyra import TrainLyraOptions
from library.options.merging import MergeLoraOptions
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import fields_of, parse
from library.options.repa import TrainRepaOptions


def help_of(options_type: type, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(options_type, list(words), prog="x.py", description="What it does.\n\n    x.py --a \\\n        --b\n")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("options_type", [TrainNetworkOptions, TrainRepaOptions, TrainLyraOptions, GenerateOptions])
def test_the_help_of_many_options_is_what_people_use_most_and_the_groups(
    options_type: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(options_type, capsys, "--help")
    assert text.startswith("usage: x.py") and "\n    x.py --a \\\n        --b\n" in text and "no_no" not in text
    often = options_type.most_used  # type: ignore[attr-defined]
    assert len(often) == len(set(often)) == 20 and set(often) <= fields_of(options_type).keys()
    assert all(f"  --{name}" in text for name in often) and len(text.splitlines()) < 110
    for group in groups_of(options_type):
        assert re.search(rf"^  {group.name} +\w+", text, re.MULTILINE) and group.purpose and len(group.purpose) < 100
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("words", [["--help_all"], ["--help-all"], ["--seed", "3", "--help_all"]])
def test_all_options_are_shown_on_demand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(TrainNetworkOptions, capsys, *words)
    assert all(re.search(rf"--(no_)?{name}\b", text) for name in fields_of(TrainNetworkOptions)) and "no_no" not in text


def test_a_group_or_an_option_is_shown_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(TrainNetworkOptions, capsys, "--help", "noise")
    assert text.startswith("noise: ") and "--ip_noise_gamma" in text and "--seed" not in text
    text = help_of(TrainNetworkOptions, capsys, "--help=lr_warmup_steps")
    assert "--lr_warmup_steps STEPS, SHARE or N%" in text and "--help optimizer" in text and "--seed" not in text
    assert "--no_sdpa" in help_of(TrainNetworkOptions, capsys, "-h", "sdpa")
    with pytest.raises(
        UserError, match=r"--help nois: there is no group .* \(did you mean noise\?\)\. Groups: model, text"
    ):
        parse_network_options(["--help", "nois"], prog="x", description="")


def test_few_options_are_all_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(MergeLoraOptions, capsys, "-h")
    assert all(f"--{name}" in text for name in fields_of(MergeLoraOptions))


def test_every_option_and_group_says_what_it_is_for() -> None:
    for options_type in (TrainNetworkOptions, TrainRepaOptions, TrainLyraOptions, GenerateOptions):
        for group in groups_of(options_type):
            assert group.purpose.endswith("."), group.name
            assert all(len(option.about) > 15 for option in group.options)


def test_the_example_of_train_network_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_network.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("    python train_network.py"))
    assert lines[start].endswith(" \\") and lines[start + 1].startswith("        --") and max(map(len, lines)) < 125
    assert train_network.main(["--help", "zebra"]) == EXIT_BAD_INPUT


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "script",
    [
        "train_network",
        "train_lyra",
        "doctor",
        "caption",
        "generate",
        "evaluate",
        "optimize",
        "extract_lora",
        "merge_lora",
    ],
)
def test_no_line_of_help_is_wider_than_the_terminal(
    script: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        import_module(script).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    commands = [number for number, line in enumerate(lines) if line.startswith("    ") and line.endswith(" \\")]
    assert all(lines[number + 1].startswith("        --") for number in commands)


def test_help_knows_the_names_that_are_refused_and_those_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    def help_about(*words: str) -> str:
        with pytest.raises((SystemExit, UserError)) as caught:
            parse_network_options(list(words), prog="x", description="")
        return capsys.readouterr().out or str(caught.value)

    assert "Use --max_train_epochs." in help_about("--help", "epochs")
    assert "Stable Diffusion 2 is not" in help_about("--help=v2")
    assert "--network_args TEXT ..." in help_about("--help", "rank_dropout")
    assert "--optimizer_type" in help_about("--help=use_8bit_adam")
