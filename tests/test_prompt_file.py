"""Files of prompts in kohya's three forms, and every slip in them as one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.inference.prompt_file import PromptLine, note_on_switches, parse_prompt_line, read_prompt_file
from tests.tools.dataset_files import refusal, text

CAT = PromptLine(
    "a cat", "blurry", width=512, height=768, seed=42, sample_steps=20, scale=6.5, sample_sampler="euler_a"
)


def test_the_three_forms_say_the_same(tmp_path: Path) -> None:
    line = "# comment\n\na cat --n blurry --w 512 --h 768 --d 42 --s 20 --l 6.5 --ss euler_a\na dog\n"
    shared = {"negative_prompt": "blurry", "width": 512, "height": 768, "scale": 6.5, "sample_sampler": "euler_a"}
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in shared.items())
    subsets = '[[prompt.subset]]\nprompt = "a cat"\nseed = 42\nsample_steps = 20\n[[prompt.subset]]\nprompt = "a dog"\nscale = 4'
    entries = [{"prompt": "a cat", "seed": 42, "sample_steps": 20, **shared}, {"prompt": "a dog", "guidance_scale": 3}]
    txt = read_prompt_file(text(tmp_path / "p.txt", line))
    toml = read_prompt_file(text(tmp_path / "p.toml", f"[prompt]\n{table}\n{subsets}"))
    found = read_prompt_file(text(tmp_path / "p.json", json.dumps(entries)))
    assert txt == [CAT, PromptLine("a dog")]
    assert toml[0] == found[0] == CAT and found[1] == PromptLine("a dog", scale=3)
    assert toml[1] == PromptLine("a dog", "blurry", 512, 768, scale=4, sample_sampler="euler_a"), "own keys win"


def test_a_single_prompt_needs_no_subset(tmp_path: Path) -> None:
    assert read_prompt_file(text(tmp_path / "p.toml", '[prompt]\nprompt = "a cat"')) == [PromptLine("a cat")]


def test_what_only_looks_like_a_switch_is_prompt() -> None:
    assert parse_prompt_line("a t-shirt -- red--blue, 2--3", "x", []).prompt == "a t-shirt -- red--blue, 2--3"
    assert parse_prompt_line("a cat --n bad hands, a--b --w 64", "x", []).negative_prompt == "bad hands, a--b"
    assert parse_prompt_line("a cat --fs 2.5", "x", []).flow_shift == 2.5
    assert parse_prompt_line("a cat --W 72", "x", []).width == 72, "switches in either case"
    assert parse_prompt_line("a cat --n --w 64", "x", []) == PromptLine("a cat", "", width=64), "no negative prompt"


def test_sizes_are_rounded_as_kohyas_are_and_that_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    path = text(tmp_path / "p.txt", "a dog --w 64\na cat --w 100 --h 97")
    assert read_prompt_file(path, notes) == [PromptLine("a dog", width=64), PromptLine("a cat", width=96, height=96)]
    assert notes == [
        f"{side} is rounded down to 96, a multiple of 8 ({path}, line 2)." for side in ("width 100", "height 97")
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "a\n\na cat --ar 16:9", "--ar is no switch of a prompt ({path}, line 3). Known are --w, --h, --d"),
        (
            "p.txt",
            "a cat --ar 16:9",
            "--ss, --fs (width, height, seed, steps, scale, negative prompt, sampler, flow shift).",
        ),
        ("p.txt", "a cat --width 512", "--width is no switch of a prompt (did you mean --w?) ({path}, line 1)."),
        ("p.txt", "a cat --cfg-scale 7", "--cfg-scale is no switch of a prompt (did you mean --l?) ({path}, line 1)."),
        ("p.txt", "a cat --no hats", "--no is no switch of a prompt (did you mean --n?)"),
        ("p.txt", "a cat --num_inference_step 9", "--num_inference_step is no switch of a prompt (did you mean --s?)"),
        ("p.txt", "a cat --hr, a dog", "--hr is no switch of a prompt ({path}, line 1). Known are"),
        ("p.txt", "a cat --s=20", "--s wants a number, got '=20' ({path}, line 1)."),
        (
            "p.txt",
            "a cat --shift 3",
            "--shift is no switch of a prompt (did you mean --fs?) ({path}, line 1).",
        ),
        ("p.txt", "a cat --flow-shift 3", "--flow-shift is no switch of a prompt (did you mean --fs?)"),
        ("p.json", '[{"prompt": "x", "flow_shift": 0}]', "flow_shift must be a finite number above 0, got 0"),
        ("p.txt", "a cat --fs -2", "flow_shift must be a finite number above 0, got -2.0 ({path}, line 1)."),
        ("p.toml", '[prompt]\nprompt = "x"\nsteps = 3', "steps is no key of a prompt (did you mean sample_steps?)"),
        (
            "p.json",
            '[{"prompt": "x", "hat": 3}]',
            "hat is no key of a prompt ({path}, prompt 1). Known are prompt, negative_prompt, width, height, seed, "
            "sample_steps, scale, sample_sampler, flow_shift.",
        ),
        ("p.txt", "a cat --w wide", "--w wants a number, got 'wide' ({path}, line 1)."),
        ("p.txt", "a cat --w", "--w wants a number, got '' ({path}, line 1)."),
        ("p.txt", "a cat --cn edges.png", "--cn is for ControlNet and has no effect here ({path}, line 1)."),
        ("p.txt", "a cat --s 0", "steps must lie between 1 and 1000, got 0 ({path}, line 1)."),
        ("p.txt", "a cat --w 4", "width must be at least 8, got 4 ({path}, line 1)."),
        ("p.txt", "a cat --d -1", "seed must lie between 0 and 2^63, got -1 ({path}, line 1)."),
        (
            "p.txt",
            "a cat --l nan",
            "scale must be a finite number, at least 1, which is no guidance, got nan ({path}, line 1).",
        ),
        ("p.txt", "a cat --l inf", "scale must be a finite number"),
        ("p.json", '[{"prompt": "x", "scale": NaN}]', "scale must be a finite number"),
        ("p.txt", "# nothing", "{path} has no prompts."),
        ("p.txt", b"caf\xe9", "{path} is not UTF-8 text (line 1)"),
        ("p.toml", "[prompt", "{path} is not valid TOML"),
        ("p.toml", 'prompt = "a cat"', "needs a table [prompt] with defaults and [[prompt.subset]]"),
        ("p.toml", '[prompt]\nprompt = "x"\n[other]\na = 1', "needs a table [prompt]"),
        ("p.json", "[1]", "must hold a list of objects"),
        (
            "p.json",
            '[{"prompt": "x", "widht": 3}]',
            "widht is no key of a prompt (did you mean width?) ({path}, prompt 1)",
        ),
        ("p.json", '[{"prompt": "x", "width": "3"}]', "width must be a number, got '3' ({path}, prompt 1)."),
        ("p.json", '[{"prompt": "x", "seed": true}]', "seed must be a number, got True"),
        ("p.json", '[{"width": 64}]', "prompt is missing ({path}, prompt 1)."),
    ],
)
def test_a_slip_is_one_sentence_with_file_and_line(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = text(tmp_path / name, content)
    assert words.format(path=path) in refusal(lambda: read_prompt_file(path))


def test_switches_where_none_are_read_are_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    path = text(tmp_path / "p.toml", '[prompt]\nprompt = "a cat --shift 3 --w 512"')
    assert read_prompt_file(path, notes) == [PromptLine("a cat --shift 3 --w 512")]
    assert notes == [
        "--shift and --w of the prompt are drawn as words, as A1111 does: in a .toml or .json file, each setting has a key "
        f"of its own ({path}, prompt 1)."
    ]
    assert note_on_switches("a well-known cat -- red--blue", "x") is None


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path) -> None:
    assert read_prompt_file(text(tmp_path / "p.txt", "﻿a cat")) == [PromptLine("a cat")]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    assert refusal(lambda: read_prompt_file(tmp_path / "p.txt")) == f"{tmp_path / 'p.txt'} does not exist."
