"""X/Y grids: what an axis may say, the order of the cells, what each changes, and the sheet."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.errors import UserError
from library.inference.picture_request import Hires, PictureRequest
from library.inference.xy_grid import MOST_VALUES, Cell, changed, parse_axis, plan_cells, sheet

REQUEST = PictureRequest("a cat", "blurry", steps=20, cfg_scale=7.0, width=512, height=512)


@pytest.mark.parametrize(
    ("text", "field", "values"),
    [
        ("sampler: Euler, euler A, DPM++ 2M", "sampler", ("Euler", "Euler a", "DPM++ 2M")),
        ("sampler: DPM++ 2M Karras, k_euler", "sampler", ("DPM++ 2M Karras", "Euler Normal")),
        ("Schedule type: karras, ays 32", "schedule", ("Karras", "Align Your Steps 32")),
        ("cfg: 3-9:2", "cfg_scale", (3.0, 5.0, 7.0, 9.0)),
        ("CFG Scale: 3-9 (+2)", "cfg_scale", (3.0, 5.0, 7.0, 9.0)),
        ("cfg: 3-9 [4]", "cfg_scale", (3.0, 5.0, 7.0, 9.0)),
        ("cfg: 3 - 9[3], 10, 1.5e1", "cfg_scale", (3.0, 6.0, 9.0, 10.0, 15.0)),
        ("cfg: 1-2 [4]", "cfg_scale", (1.0, 1.3333333333, 1.6666666667, 2.0)),
        ("weight: 0, 0.5, 1", "adapter_weight", (0.0, 0.5, 1.0)),
        ("weight: 0-1:0.1", "adapter_weight", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("lora weight: -1-1", "adapter_weight", (-1.0, 0.0, 1.0)),
        ("weight: -.5--1.5:.5", "adapter_weight", (-0.5, -1.0, -1.5)),
        ("weight: 0-1:0.4", "adapter_weight", (0.0, 0.4, 0.8)),
        ("steps: 10, 20-40:10", "steps", (10, 20, 30, 40)),
        ("steps: 10-5 (-3)", "steps", (10, 7)),
        ("steps: 5-3", "steps", (5, 4, 3)),
        ("steps: 1-10 [5]", "steps", (1, 3, 5, 7, 10)),
        ("steps: 7-9 [1]", "steps", (7,)),
        ("seed: 1-4, 9223372036854775807", "seed", (1, 2, 3, 4, 2**63 - 1)),
        ("denoising strength: 0.3-0.7 [3]", "denoising_strength", (0.3, 0.5, 0.7)),
        ("clip_skip: 1, 2", "clip_skip", (1, 2)),
        (
            "checkpoint: out/a.safetensors | D:\\b, c | org/name",
            "checkpoint",
            ("out/a.safetensors", "D:\\b, c", "org/name"),
        ),
        ('checkpoint: "a, b", c', "checkpoint", ("a, b", "c")),
        (
            'prompt: cat, "dog, asleep", "a ""big"" fox", [a|b]',
            "prompt",
            ("cat", "dog, asleep", 'a "big" fox', "[a|b]"),
        ),
        ("Prompt S/R: <lora:a:0.5>, <lora:a:1>,", "prompt", ("<lora:a:0.5>", "<lora:a:1>")),
        ("prompt: a\nb", "prompt", ("a", "b")),
    ],
)
def test_axes_are_written_as_in_a1111(text: str, field: str, values: tuple[Any, ...]) -> None:
    axis = parse_axis(text)
    assert (axis.field, axis.values) == (field, values)
    assert [type(value) for value in axis.values] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cfg", "An axis is written as name: values, for example cfg: 3-9:2. Got 'cfg'."),
        (": 1", "Nothing is no axis of a grid. Known are sampler, schedule, steps, cfg, seed, weight"),
        ("sampeler: Euler", "sampeler is no axis of a grid (did you mean sampler?)."),
        ("cfg: ", "The axis cfg has no values. Write cfg: 3-9:2."),
        ("checkpoint: ,", "The axis checkpoint has no values. Write checkpoint: a.safetensors | b.safetensors."),
        ("sampler: UniPCC", "The axis sampler: UniPCC is no sampler (did you mean UniPC?). Known are"),
        ("schedule: Karas", "The axis schedule: Karas is no schedule (did you mean Karras?)."),
        ("steps: 1.5", "The axis steps wants whole numbers from 1 to 1000, got '1.5'."),
        ("steps: 0, 1", "The axis steps wants whole numbers from 1 to 1000, got '0'."),
        ("steps: 1-2:0.5", "The axis steps wants whole numbers from 1 to 1000, got '1.5'."),
        ("seed: -1", "The axis seed wants whole numbers from 0 to 2^63, got '-1'."),
        ("seed: random", "got 'random'."),
        ("cfg: 0.5", "The axis cfg wants numbers from 1 on, got '0.5'."),
        ("cfg: nan", "The axis cfg wants numbers from 1 on, got 'nan'."),
        ("cfg: 3..9", "got '3..9'."),
        ("cfg: 3-9 [0]", "The axis cfg"),
        ("denoising: 0", "The axis denoising wants numbers above 0, up to 1, got '0'."),
        ("weight: strong", "The axis weight wants numbers, got 'strong'."),
        ("cfg: 3-9 (-2)", "The axis cfg cannot get from 3 to 9 in steps of -2."),
        ("cfg: 3-9:0", "The axis cfg cannot get from 3 to 9 in steps of 0."),
        ("cfg: 3, 1-4", "The axis cfg has 3 twice."),
        ("steps: 1-3 [5]", "The axis steps has 1 twice."),
        ("sampler: Euler, euler", "The axis sampler has Euler twice."),
        ("seed: 0-99999999999", "The axis seed has 100000000000 values; at most 100 are allowed."),
        ("weight: 0-1 [999999999]", "The axis weight has 999999999 values; at most 100 are allowed."),
        (f"seed: {', '.join(map(str, range(101)))}", "The axis seed has 101 values; at most 100 are allowed."),
        ('prompt: "cat, dog', 'The axis prompt has unpaired quotes: "cat, dog.'),
        ('prompt: "cat" and, dog', "The axis prompt has unpaired quotes"),
    ],
)
def test_what_an_axis_cannot_be_is_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_axis(text)
    assert words in str(error.value)


@given(st.text('cfg:seed,.-+0123456789[]() "|\n', max_size=30) | st.text())
def test_no_text_ends_in_anything_but_an_axis_or_a_sentence(text: str) -> None:
    for name in ("cfg:", "seed:", "prompt:", ""):
        with suppress(UserError):
            assert 1 <= len(parse_axis(name + text).values) <= MOST_VALUES


def test_headings_say_what_the_value_does_not() -> None:
    assert parse_axis("cfg: 3, 4.5").headings == ("CFG scale: 3", "CFG scale: 4.5")
    assert parse_axis("seed: 9223372036854775807").headings == ("Seed: 9223372036854775807",)
    assert parse_axis("sampler: euler a").headings == ("Euler a",)
    assert parse_axis("prompt: cat, dog").headings == ("cat", "dog")


def test_checkpoints_are_called_by_name_where_names_differ(tmp_path: Path) -> None:
    for name in ("a/mio", "b/mio", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    assert parse_axis(f"checkpoint: {tmp_path}/a/mio | {tmp_path}/b/other").headings == ("mio", "other")
    paths = (f"{tmp_path}/a/mio", f"{tmp_path}/b/mio")
    assert parse_axis(f"checkpoint: {' | '.join(paths)}").headings == paths
    assert parse_axis("checkpoint: org/one, org/two").headings == ("org/one", "org/two")


def _plan(x: str, y: str | None = None, prompt: str = "a cat", negative: str = "blurry") -> list[Cell]:
    return plan_cells(parse_axis(x), parse_axis(y) if y else None, prompt=prompt, negative_prompt=negative)


def test_every_cell_is_planned_once_with_its_own_values() -> None:
    cells = _plan("cfg: 3, 5, 7", "steps: 10, 20")
    assert {(cell.column, cell.row) for cell in cells} == {(c, r) for c in range(3) for r in range(2)} and len(
        cells
    ) == 6
    for cell in cells:
        assert cell.changes == {"cfg_scale": (3.0, 5.0, 7.0)[cell.column], "steps": (10, 20)[cell.row]}
    assert [cell.changes for cell in _plan("seed: 1, 2")] == [{"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize("dear", ["checkpoint: a, b, c", "weight: 0, 0.5, 1", "prompt: a, the, one"])
@pytest.mark.parametrize("cheap", ["seed: 1, 2", "cfg: 3, 5", "sampler: Euler, LMS"])
def test_dear_changes_happen_least_often(dear: str, cheap: str) -> None:
    field = parse_axis(dear).field
    for x, y in ((dear, cheap), (cheap, dear)):
        order = [cell.changes.get(field) for cell in _plan(x, y, prompt="a <lora:x:1>")]
        assert sum(one != other for one, other in zip(order, order[1:], strict=False)) == 2, (x, y)


def test_seeds_of_one_setting_stand_together_for_a_batch() -> None:
    for x, y in (("seed: 1, 2", "cfg: 3, 5"), ("cfg: 3, 5", "seed: 1, 2")):
        assert [cell.changes["cfg_scale"] for cell in _plan(x, y)] == [3, 3, 5, 5]
    dearest = [cell.changes["checkpoint"] for cell in _plan("weight: 0, 1", "checkpoint: a, b")]
    assert dearest == ["a", "a", "b", "b"], "a checkpoint is dearer than adapters"


def test_a_prompt_axis_searches_and_replaces_in_both_prompts() -> None:
    cells = _plan("prompt: cat, dog", prompt="a cat, cat ears", negative="no cat")
    assert cells[0].changes == {}, "the first value is what is there"
    assert cells[1].changes == {"prompt": "a dog, dog ears", "negative_prompt": "no dog"}
    cells = _plan("prompt: cat, dog", "prompt: red, blue", prompt="a red cat")
    assert [cell.changes.get("prompt") for cell in cells] == [None, "a red dog", "a blue cat", "a blue dog"]
    assert _plan("prompt: blurry, dark")[1].changes == {"negative_prompt": "dark"}
    with pytest.raises(UserError, match="The axis prompt searches for 'fox', which is in neither prompt"):
        _plan("cfg: 1", "prompt: fox, cat")


def test_a_weight_is_that_of_every_adapter_and_its_tags() -> None:
    prompt = "a cat <lora:mio:0.8> <lyco:s-t.y(le):0@0.4,0.7@0.8:hr=0.7@0> <lora:plain> <hypernet:h:1>"
    zero, half = _plan("weight: 0, 0.5", prompt=prompt)
    assert half.changes["prompt"] == "a cat <lora:mio:0.5> <lyco:s-t.y(le):0.5> <lora:plain:0.5> <hypernet:h:1>"
    assert zero.changes["adapter_weight"] == 0 and half.changes["adapter_weight"] == 0.5
    assert _plan("weight: 0.5")[0].changes == {"adapter_weight": 0.5}, "no tag, so the prompt stays"
    both = _plan("weight: 0.5, 1", "prompt: mio, rin", prompt="<lora:mio:0.8>")
    assert {cell.changes["prompt"] for cell in both} == {
        f"<lora:{n}:{w}>" for n in ("mio", "rin") for w in ("0.5", "1")
    }


def test_two_axes_of_one_setting_are_refused() -> None:
    with pytest.raises(UserError, match="Both axes are cfg"):
        _plan("cfg: 3, 5", "cfg scale: 7")


def test_a_request_takes_the_changes_that_are_its_own() -> None:
    for x, y in (("sampler: LMS", "cfg: 3"), ("steps: 5", "schedule: Karras"), ("clip skip: 2", "prompt: cat, dog")):
        cell = _plan(x, y)[-1]
        request = changed(REQUEST, cell.changes)
        assert all(getattr(request, name) == value for name, value in cell.changes.items()) and cell.changes
        assert request.final_size == (512, 512) and request.sampler_and_schedule
    assert changed(REQUEST, {"checkpoint": "x", "adapter_weight": 0.5, "seed": 3}) == REQUEST, "the caller's"
    assert REQUEST.cfg_scale == 7


def test_denoising_is_that_of_the_pass_there_is() -> None:
    changes = _plan("denoising: 0.25")[0].changes
    hires = changed(replace(REQUEST, hires=Hires(2.0)), changes)
    assert hires.hires == Hires(2.0, denoising_strength=0.25) and hires.denoising_strength == REQUEST.denoising_strength
    assert changed(replace(REQUEST, init_image=Path("a.png")), changes).denoising_strength == 0.25
    with pytest.raises(UserError, match="The axis denoising needs the hires fix or a picture to begin with"):
        changed(REQUEST, changes)


def test_the_sheet_has_each_picture_where_its_values_cross() -> None:
    x, y = parse_axis("cfg: 3, 5, 7"), parse_axis("sampler: Euler, LMS")
    cells = plan_cells(x, y, prompt="a")
    colours = {(cell.column, cell.row): (40 * cell.column, 90 * cell.row, 200) for cell in cells}
    pictures = {place: Image.new("RGB", (64, 64), colour) for place, colour in colours.items() if place != (1, 1)}
    found = np.asarray(sheet(x, y, pictures, title="a"))
    corners = {place: np.argwhere((found == colours[place]).all(-1)).min(0) for place in pictures}
    for (column, row), (top, left) in corners.items():
        assert (top, left) == (corners[0, row][0], corners[column, 0][1])
    assert corners[2, 0][1] > corners[1, 0][1] > corners[0, 0][1] and corners[0, 1][0] > corners[0, 0][0]
    assert (found[corners[0, 1][0], corners[1, 0][1] + 20] == 240).any(), "the missing one's place"
    assert sheet(x, None, {(0, 0): Image.new("RGB", (64, 64))}).height < found.shape[0]
