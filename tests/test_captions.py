"""The caption pipeline: kohya's order of steps, and the same caption wherever and whenever it is made."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import cacheable_captions, is_static, make_caption, sample_random, variations


@dataclass(frozen=True)
class Options:
    """kohya's names and defaults."""

    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    enable_wildcard: bool = False
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0


PLAIN = Options()


def made(text: str, options: Options, sample_id: int | str = 0, **place: int) -> str:
    return make_caption(text, options, **{"seed": 0, "epoch": 0, "step": 0, **place}, sample_id=sample_id)


def every(text: str, options: Options, showings: int = 200) -> Counter[str]:
    """How often each caption comes in many showings."""
    return Counter(made(text, options, number) for number in range(showings))


tag = st.text("abcd ", min_size=1, max_size=6).map(str.strip).filter(bool)
tags = st.lists(tag, min_size=1, max_size=8)
places = st.fixed_dictionaries({"seed": st.integers(0, 9), "epoch": st.integers(0, 9), "repeat": st.integers(0, 3)})


@given(text=st.text("ab,|{};\\ é", max_size=20).map(str.strip), place=places)
def test_a_caption_without_options_is_what_lies_on_disk(text: str, place: dict[str, int]) -> None:
    assert made(text, PLAIN, **place) == text


@given(words=tags, place=places, keep=st.integers(0, 9))
def test_shuffling_keeps_every_tag_and_the_kept_ones_in_front(words: list[str], place: dict, keep: int) -> None:
    options = replace(PLAIN, shuffle_caption=True, keep_tokens=keep)
    shuffled = made(",".join(words), options, "x", **place).split(", ")
    assert Counter(shuffled) == Counter(words) and shuffled[:keep] == words[:keep]
    assert ", ".join(shuffled) == made(",".join(words), options, "x", **place)


@given(front=tags, middle=tags, back=st.lists(tag, max_size=3), place=places)
def test_what_stands_outside_the_keep_separators_stays(
    front: list[str], middle: list[str], back: list[str], place: dict
) -> None:
    options = replace(PLAIN, shuffle_caption=True, keep_tokens=5, keep_tokens_separator="|||")
    text = f"{','.join(front)}|||{', '.join(middle)} ||| {','.join(back)}"
    found = made(text, options, **place).split(", ")
    assert found[: len(front)] == front and found[len(found) - len(back) :] == back
    assert Counter(found[len(front) : len(found) - len(back)]) == Counter(middle)
    dropped = replace(options, caption_tag_dropout_rate=1.0)
    assert made(text, dropped, **place) == ", ".join(front + back)


def test_the_keep_separator_is_no_text_even_where_nothing_is_shuffled() -> None:
    options = replace(PLAIN, keep_tokens_separator="|||")
    assert made("mio, 1girl ||| smile, hat, ||| best", options) == "mio, 1girl, smile, hat, best"
    assert made("mio,1girl", options) == "mio,1girl"


def test_captions_depend_on_the_showing_only() -> None:
    options = replace(PLAIN, shuffle_caption=True, caption_tag_dropout_rate=0.3)
    text = "a, b, c, d, e, f, g, h, i, j"
    usual = made(text, options, "x")
    assert made(text, options, "x", step=7) == usual
    others = [
        made(text, options, "y"),
        made(text, options, "x", seed=1),
        made(text, options, "x", epoch=1),
        made(text, options, "x", repeat=1),
    ]
    assert len({usual, *others}) == 5
    # Fixed for good: a run resumed with a later version must go on with the same captions.
    assert usual == "f, c, g, i, j, a, d, h, e"


def test_one_option_does_not_change_what_another_draws() -> None:
    text, shuffled = "a, b, c, d, e, f", replace(PLAIN, shuffle_caption=True)
    both = replace(shuffled, caption_dropout_rate=0.5, caption_tag_dropout_rate=0.5, enable_wildcard=True)
    for sample_id in range(30):
        rest = made(text, both, sample_id)
        order = made(text, shuffled, sample_id).split(", ")
        assert rest == "" or [word for word in order if word in rest] == rest.split(", ")


def test_streams_do_not_run_into_each_other() -> None:
    places = itertools.product([0, 1], [0, 1], ["0", "0/1", "1"], [0, 1, 11], ["crop", "flip"])
    assert len({sample_random(*place).random() for place in places}) == 72
    # A number out of an array of numpy's is a number.
    assert sample_random(0, 1, 2, 3, "").random() == sample_random(0, 1, 2, np.arange(4)[3], "").random()


def test_prefix_and_suffix_are_joined_by_blanks() -> None:
    options = replace(PLAIN, caption_prefix="photo of", caption_suffix=", best")
    assert made("a cat", options) == "photo of a cat , best"
    assert made("", replace(PLAIN, caption_prefix="photo")) == "photo"


def test_without_wildcards_the_first_line_counts() -> None:
    assert made("\n a {b|c} \r\nd", PLAIN) == "a {b|c}"
    assert made("", PLAIN) == made(" \n ", PLAIN) == ""


def test_with_wildcards_every_line_is_chosen_with_prefix_and_suffix() -> None:
    options = replace(PLAIN, enable_wildcard=True, caption_prefix="p", caption_suffix="s")
    counts = every("one\n\ntwo\nthree", options, 600)
    assert set(counts) == {"p one s", "p two s", "p three s"} and min(counts.values()) > 150


def test_wildcards_are_chosen_one_by_one() -> None:
    options = replace(PLAIN, enable_wildcard=True)
    counts = every("{a|b|} {c|d}", options, 600)
    assert set(counts) == {"a c", "b c", " c", "a d", "b d", " d"} and min(counts.values()) > 60
    assert every("x{y}z", options) == {"xyz": 200}
    assert every("{{a|b}} {} }} {{", options) == {"{a|b} {} } {": 200}
    assert set(every("{{{a|b}}}", options)) == {"{a}", "{b}"}
    # They come before tags are split.
    assert set(every("{a,b|c}", replace(options, shuffle_caption=True))) == {"a, b", "b, a", "c"}


def test_whole_captions_are_dropped_at_their_rate() -> None:
    counts = every("a", replace(PLAIN, caption_dropout_rate=0.25, caption_prefix="p"), 2000)
    assert set(counts) == {"", "p a"} and abs(counts[""] - 500) < 80
    assert every("a", replace(PLAIN, caption_dropout_rate=1.0)) == {"": 200}


def test_every_third_epoch_goes_without_captions() -> None:
    options = replace(PLAIN, caption_dropout_every_n_epochs=3)
    assert [made("a", options, epoch=epoch) for epoch in range(7)] == ["a", "a", "", "a", "a", "", "a"]


def test_tags_are_dropped_at_their_rate_but_not_the_kept_ones() -> None:
    options = replace(PLAIN, caption_tag_dropout_rate=0.3, keep_tokens=1)
    found = Counter(word for number in range(1000) for word in made("k, a, b", options, number).split(", "))
    assert found["k"] == 1000 and abs(found["a"] - 700) < 60 and abs(found["b"] - 700) < 60


def test_empty_tags_vanish_when_tags_are_split() -> None:
    options = replace(PLAIN, shuffle_caption=True, keep_tokens=2)
    assert made(" a,, b , ", options) == "a, b"
    assert made("a; b;c", replace(options, keep_tokens=3, caption_separator=";")) == "a; b; c"


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        (",", "a,b , c", "a, b, c"),
        (", ", "a, b, c", "a, b, c"),
        (";", "a;b, with a comma;c", "a; b, with a comma; c"),
        (" | ", "a | b | c", "a | b | c"),
        ("|", "a|b", "a| b"),
        (" ", "a b  c", "a b c"),
        ("\u3001", "a\u3001b", "a\u3001 b"),
    ],
)
def test_tags_are_joined_with_the_separator_they_were_split_at(separator: str, text: str, expected: str) -> None:
    kept = replace(PLAIN, shuffle_caption=True, keep_tokens=9, caption_separator=separator)
    assert made(text, kept) == expected
    # The same tags, whatever their order and however they are changed.
    for options in (
        replace(kept, keep_tokens=0),
        replace(PLAIN, caption_tag_dropout_rate=1e-9, caption_separator=separator),
    ):
        join = expected[1 : expected.index("b")]
        assert sorted(made(text, options).split(join)) == sorted(expected.split(join))


def test_tags_joined_by_the_secondary_separator_stay_together() -> None:
    options = replace(PLAIN, shuffle_caption=True, secondary_separator=";;;")
    assert set(every("a;;;b;;;c, d", options)) == {"a,b,c, d", "d, a,b,c"}
    assert made("a;;;b", replace(options, shuffle_caption=False)) == "a,b"


@given(count=st.integers(1, 12), least=st.integers(1, 6), length=st.integers(1, 50), step=st.integers(0, 60))
def test_tags_are_warmed_up_linearly(count: int, least: int, length: int, step: int) -> None:
    words = [f"t{number}" for number in range(count)]
    options = replace(PLAIN, token_warmup_step=length, token_warmup_min=least)
    shown = made(",".join(words), options, step=step).split(", ")
    expected = count if step >= length else math.floor(step * (count - least) / length) + least
    assert shown == words[:expected]


def test_warm_up_as_a_share_of_the_run_needs_its_length() -> None:
    options = replace(PLAIN, token_warmup_step=0.5, keep_tokens=1)
    shown = [made("k,a,b,c,d", options, step=step, last_step=16).count(",") for step in range(9)]
    assert shown == [1, 1, 1, 2, 2, 2, 3, 3, 4]
    with pytest.raises(ValueError, match=r"token_warmup_step 0\.5 is a share of the run"):
        made("a, b, c", options)


def test_what_varies_is_named() -> None:
    still = replace(
        PLAIN,
        caption_prefix="p",
        keep_tokens=2,
        keep_tokens_separator="|||",
        secondary_separator=";",
        token_warmup_min=3,
    )
    assert is_static(still) and variations(still) == []
    for option, value in (
        ("enable_wildcard", True),
        ("caption_dropout_rate", 0.1),
        ("caption_dropout_every_n_epochs", 2),
        ("shuffle_caption", True),
        ("caption_tag_dropout_rate", 0.1),
        ("token_warmup_step", 0.5),
    ):
        options = replace(still, **{option: value})  # type: ignore[arg-type]
        assert variations(options) == [option] and not is_static(options)


def test_wildcards_vary_only_captions_that_have_some() -> None:
    options = replace(PLAIN, enable_wildcard=True)
    assert is_static(options, "a, {b}, {{c|d}}") and cacheable_captions("{b}", options) == ["b"]
    assert not is_static(options, "a\nb") and not is_static(options, "{a|b}")
    assert not is_static(replace(options, caption_prefix="{a|b}"), "c")


def test_the_captions_to_cache_are_those_that_are_made() -> None:
    options = replace(PLAIN, caption_prefix="p", keep_tokens_separator="|||", secondary_separator=";")
    assert cacheable_captions("a ||| b;c", options) == ["p a, b,c"] == [made("a ||| b;c", options)]
    dropping = replace(options, caption_dropout_rate=0.5)
    assert cacheable_captions("a", dropping) == ["p a", ""] and set(every("a", dropping)) == {"p a", ""}
    assert cacheable_captions("", replace(PLAIN, caption_dropout_rate=0.5)) == [""]
    assert cacheable_captions("a", replace(dropping, shuffle_caption=True)) is None
