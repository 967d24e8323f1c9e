"""A prompt means here what it means in A1111 and reForge.

tests/data/prompt_vectors.json: what the two made of 31 prompts at 20 steps, token counts by CLIP's vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.inference.lora_tags import cut_out_tags, lora_weights
from library.inference.prompt_syntax import (
    Dialect,
    Prompt,
    parse_negative,
    parse_prompt,
    schedule_texts,
    split_parts,
    unbalanced_brackets,
    weighted_spans,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "prompt_vectors.json").read_text(encoding="utf-8"))
STEPS = VECTORS["steps"]
CASES = [
    pytest.param(name, case, id=f"{name}-{i}") for name in ("a1111", "reforge") for i, case in enumerate(VECTORS[name])
]
ANY_PROMPT = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [*"()[]:|\\<>=@,. x\n0159-", "a", "BREAK", "AND", " AND ", "1.5", ":0.4]", ":x2)", "<lora:a:1>"]
        )
    ).map("".join),
)


def spans(text: str, dialect: Dialect = "a1111") -> list[tuple[str, float]]:
    return [(span.text, round(span.weight, 6)) for span in weighted_spans(text, dialect)]


def meaning(prompt: Prompt) -> list[Any]:
    return [
        (
            part.text,
            part.weight,
            [
                (s.until_step, s.text, [(span.text, pytest.approx(span.weight)) for span in s.spans])
                for s in part.schedule
            ],
        )
        for part in prompt.parts
    ]


@pytest.mark.parametrize("dialect, case", CASES)
def test_prompts_mean_what_they_mean_there(dialect: Dialect, case: dict[str, Any]) -> None:
    prompt = parse_prompt(case["prompt"], STEPS, dialect=dialect)
    assert prompt.text == case["text"]
    expected = [
        (
            part["text"],
            part["weight"],
            [(s["until_step"], s["text"], [tuple(span) for span in s["attention"]]) for s in part["schedule"]],
        )
        for part in case["parts"]
    ]
    assert meaning(prompt) == expected


@pytest.mark.parametrize("case", VECTORS["a1111"], ids=range(len(VECTORS["a1111"])))
def test_networks_weigh_at_every_step_what_loractl_makes_of_them(case: dict[str, Any]) -> None:
    tags = parse_prompt(case["prompt"], STEPS).tags
    expected = case["nets"].get("lora", [])
    assert [(list(tag.positional), tag.named) for tag in tags] == [
        (net["positional"], net["named"]) for net in expected
    ]
    for tag, net in zip(tags, expected, strict=True):
        weights = lora_weights(tag)
        for target, per_step in net["weights_per_step"].items():
            found = [getattr(weights, target).at(step, STEPS) for step in range(STEPS)]
            assert found == pytest.approx(per_step, abs=1e-6)


def test_stepwise_weights_with_a_second_pass() -> None:
    """The example of loractl's description, with the numbers it gives for 20 steps."""
    _, (tag,) = cut_out_tags("<lora:network:0@0.4,0.7@0.8:hr=0.7@0,0@0.5>")
    weights = lora_weights(tag)
    first = [weights.unet.at(step, 20) for step in range(20)]
    assert first[7] == 0 and first[8] == pytest.approx(0.0778, abs=1e-4)
    assert first[12] == pytest.approx(0.467, abs=1e-3) and first[15:] == [0.7] * 5
    assert weights.te == weights.unet and weights.hrte == weights.hrunet
    assert weights.hrunet.at(0, 20) == 0.7 and weights.hrunet.at(10, 20) == 0
    assert [weights.te.at(step, 1) for step in (0, 1)] == [0, 0.7]


def test_passes_and_targets_can_be_weighed_apart() -> None:
    _, (tag,) = cut_out_tags("<lora:x:0.5:0.25:hr=1:hrte=0;1@1>")
    weights = lora_weights(tag)
    assert [getattr(weights, name).at(0, 20) for name in ("te", "unet", "hrunet")] == [0.5, 0.25, 1]
    assert weights.te.is_constant and not weights.hrte.is_constant


@pytest.mark.parametrize(
    "tag, message",
    [
        ("<lora:x:strong>", "wants a weight or weight@position,weight@position, got 'strong'"),
        ("<lora:x:1@>", None),
        ("<lora:x:1,nan@2>", "got '1,nan@2'"),
        ("<lora:x:dyn=8>", "has 'dyn=', which has no effect here. Known are te, unet"),
        ("<lora:x:1:1:8>", "has '8'"),
        ("<lora::1>", "names no file. Write <lora:name:weight>"),
    ],
)
def test_tags_that_ask_for_nothing_known_are_named(tag: str, message: str | None) -> None:
    (found,) = cut_out_tags(tag)[1]
    if message is None:
        assert lora_weights(found).te.at(3, 20) == 1
    else:
        with pytest.raises(UserError) as error:
            lora_weights(found)
        assert message in str(error.value) and str(found) in str(error.value)


def test_tags_are_cut_out_of_brackets_too() -> None:
    text, tags = cut_out_tags("(a <lora:x:1>:1.2) <hypernet:y> < lora:z>")
    assert text == "(a :1.2)  < lora:z>"
    assert [tag.kind for tag in tags] == ["lora", "hypernet"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[x:y:0]", [(10, "y")]),
        ("[x:y:-3]", [(10, "y")]),
        ("[x:y:1e3]", [(10, "x")]),
        ("[x:y:1e999]", [(10, "x")]),
        ("[a:b:c:5]", [(10, "[a:b:c:5]")]),
        (r"[a\:b:4]", [(4, ""), (10, r"a\:b")]),
        (r"\[a:b:4\]", [(10, r"\[a:b:4\]")]),
        ("a|b [c:4]", [(10, "a|b [c:4]")]),
    ],
)
def test_schedules(text: str, expected: list[tuple[int, str]]) -> None:
    assert schedule_texts(text, 10) == expected


def test_alternatives_turn_with_the_steps_and_nest() -> None:
    assert schedule_texts("[fe|]male", 3) == [(1, "female"), (2, "male"), (3, "female")]
    assert schedule_texts("[a|[b:c:2]|d]", 5) == [(1, "a"), (2, "b"), (3, "d"), (4, "a"), (5, "c")]


def test_the_second_pass_counts_on() -> None:
    assert schedule_texts("[a:b:15]", 10) == [(10, "a")]
    assert schedule_texts("[a:b:15]", 20, hires_after=10) == [(5, "a"), (20, "b")]
    assert schedule_texts("[a:b:1.5]", 20, hires_after=10) == [(10, "a"), (20, "b")]
    assert schedule_texts("[a:b:0.5]", 20, hires_after=10) == [(20, "b")]


def test_a_step_finds_its_text() -> None:
    (part,) = parse_prompt("[a:b:5]", 20).parts
    assert [part.at_step(step).text for step in (1, 5, 6, 20, 21)] == ["a", "a", "b", "b", "b"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(a)", [("a", 1.1)]),
        ("((a:1.5) b)", [("a", 1.65), (" b", 1.1)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-0.5)", [("a", -0.5)]),
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1.0)]),
        (r"a\b", [("ab", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("([a)]", [("a", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("a:1.2)", [("a:1.2)", 1.0)]),
        ("a BREAK b", [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]),
        ("(a BREAK b:1.2)", [("a", 1.2), ("BREAK", -1.2), ("b", 1.2)]),
        ("(a)(b)", [("ab", 1.1)]),
    ],
)
def test_attention(text: str, expected: list[tuple[str, float]]) -> None:
    assert spans(text) == expected


def test_a_break_in_brackets_is_a_word() -> None:
    assert [span.closes_chunk for span in weighted_spans("a BREAK b")] == [False, True, False]
    assert not any(span.closes_chunk for span in weighted_spans("(a BREAK b:1.2)"))


def test_copies_are_reforges() -> None:
    assert spans("(a :x2.5)", "reforge") == [("a ", 1.0), ("a ", 1.5)]
    assert spans("(a :x3)", "reforge") == [("a a a ", 1.0)]
    assert spans("((a:1.2) b:x2)", "reforge") == [("a", 1.2), (" b", 1.0), ("a", 1.2), (" b", 1.0)]
    assert spans("(a:x99999999)", "reforge") == [("a:x99999999", 1.1)]


def test_weights_nearly_equal_are_equal_in_reforge() -> None:
    assert spans("(a:1.00001)b", "reforge") == [("ab", 1.00001)]
    assert len(spans("(a:1.00001)b")) == 2


def test_parts_have_weights() -> None:
    assert split_parts("a :1.5 AND b:-0.3  AND c AND(d)") == [("a", 1.5), (" b", -0.3), (" c", 1.0), ("(d)", 1.0)]
    assert split_parts("bAND c") == [("bAND c", 1.0)]


def test_and_is_a_word_of_the_negative_prompt() -> None:
    (part,) = parse_negative("a AND b:1.5 <lora:x:1>", 20).parts
    assert (part.text, part.weight) == ("a AND b:1.5 ", 1.0)


def test_brackets_that_do_not_pair_are_noted() -> None:
    assert unbalanced_brackets(r"(a) [b:0.3] \(") is None
    open_end = "stays open and weighs everything up to the end."
    assert unbalanced_brackets("(a") == unbalanced_brackets("((a)") == f"1 '(' of the prompt {open_end}"
    assert unbalanced_brackets("(a [[", negative=True) == (
        "1 '(' and 2 '[' of the negative prompt stay open and weigh everything up to the end."
    )
    assert "A ')' of the prompt closes no bracket" in (unbalanced_brackets("a)") or "")
    assert "A ']' of the prompt closes no bracket" in (unbalanced_brackets("(a]") or "")
    assert unbalanced_brackets("(a [b) c]") is None, "each kind pairs by itself"
    assert [span.weight for span in weighted_spans("(a [b) c]")] == pytest.approx([1.1, 1, 1 / 1.1])


def test_a_number_behind_an_open_bracket_is_noted_as_what_it_is() -> None:
    (part,) = parse_prompt("a (b:1.2", 20).parts
    assert part.weight == 1.2 and [span.weight for span in part.at_step(1).spans] == [1.0, 1.1]
    note = "1 '(' of the prompt stays open and weighs everything up to the end. The 1.2 is not the weight of a bracket, but "
    assert unbalanced_brackets("a (b:1.2") == f"{note}the guidance weight of all of the prompt."
    assert "The 1.2 is" not in (unbalanced_brackets("a (b:1.2", negative=True) or "")
    assert "1 '(' of one side of an AND stays open" in (unbalanced_brackets("(a AND b)") or ""), "which split first"


@settings(max_examples=150)
@given(ANY_PROMPT, st.integers(1, 30), st.sampled_from(["a1111", "reforge"]), st.one_of(st.none(), st.integers(1, 30)))
def test_any_text_is_a_prompt(text: str, steps: int, dialect: Dialect, hires_after: int | None) -> None:
    for prompt in (
        parse_prompt(text, steps, dialect=dialect, hires_after=hires_after),
        parse_negative(text, steps, dialect=dialect, hires_after=hires_after),
    ):
        for part in prompt.parts:
            assert math.isfinite(part.weight)
            ends = [scheduled.until_step for scheduled in part.schedule]
            assert ends == sorted(set(ends)) and ends[-1] == steps
            assert all(math.isfinite(span.weight) for scheduled in part.schedule for span in scheduled.spans)
    unbalanced_brackets(text)


@pytest.mark.parametrize("opening, closing", ["()", "[]", ("(", ":9)"), ("[", ":3]"), ("[a|", "]")])
def test_depth_costs_neither_stack_nor_time(opening: str, closing: str) -> None:
    for text in (opening * 1200 + "a" + closing * 1200, opening * 1200 + "a", "a" + closing * 1200):
        prompt = parse_prompt(text, 3)
        assert all(math.isfinite(s.weight) for part in prompt.parts for text in part.schedule for s in text.spans)
