"""A1111's prompt language, from text to weighted spans per step. No torch; it accepts every text.

In A1111's order: `<lora:...>` tags are cut out (`lora_tags`), the text is split at AND, each part's schedule (`[from:to:when]`,
`[a|b]`) gives a text per step, and its brackets give weighted spans. Behaviour: A1111's wiki, "Features", and its results for the
prompts of tests/data/prompt_vectors.json. reForge adds `(text:x2.5)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from library.inference.lora_tags import PromptTag, cut_out_tags

Dialect = Literal["a1111", "reforge"]

BREAK = "BREAK"
_BREAK_WEIGHT = -1.0
_ROUND, _SQUARE = 1.1, 1 / 1.1
# Thousands of nested brackets overflow; weights are limited to float32's range.
_LARGEST = 3.4e38
# The largest count of reForge's `:x`: even one token then fills ten chunks, and more must be a typing error.
_MOST_COPIES = 750
_REFORGE_EQUAL = 1e-4


@dataclass(frozen=True)
class Span:
    """A text and its weight."""

    text: str
    weight: float

    @property
    def closes_chunk(self) -> bool:
        """Whether it is a BREAK outside brackets. Inside, it is the word BREAK with a negative weight, as in A1111."""
        return self.text == BREAK and self.weight == _BREAK_WEIGHT


@dataclass(frozen=True)
class ScheduledText:
    """The prompt's text in steps up to `until_step`, counted from 1."""

    until_step: int
    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Part:
    """One side of an AND; a prompt without AND has one."""

    text: str
    weight: float
    schedule: tuple[ScheduledText, ...]

    def at_step(self, step: int) -> ScheduledText:
        """The text at a step, counted from 1; after the last step, the last one."""
        return next((text for text in self.schedule if step <= text.until_step), self.schedule[-1])


@dataclass(frozen=True)
class Prompt:
    text: str
    """without the tags"""
    tags: tuple[PromptTag, ...]
    parts: tuple[Part, ...]


def parse_prompt(text: str, steps: int, *, dialect: Dialect = "a1111", hires_after: int | None = None) -> Prompt:
    """A positive prompt. steps: of the pass. hires_after: steps of the first pass, where this is the second (hires fix)."""
    stripped, tags = cut_out_tags(text)
    parts = tuple(
        Part(part, weight, _schedule(part, steps, dialect, hires_after)) for part, weight in split_parts(stripped)
    )
    return Prompt(stripped, tags, parts)


def parse_negative(text: str, steps: int, *, dialect: Dialect = "a1111", hires_after: int | None = None) -> Prompt:
    """A negative prompt: one part, in which AND and a trailing `:number` are text, as in A1111. Tags are cut out."""
    stripped, tags = cut_out_tags(text)
    return Prompt(stripped, tags, (Part(stripped, 1.0, _schedule(stripped, steps, dialect, hires_after)),))


def unbalanced_brackets(text: str, *, negative: bool = False) -> str | None:
    """A note on unpaired brackets, which A1111 takes literally or extends to the end of the text; None without any.

    As in `weighted_spans`, each kind of bracket is paired by itself, and within one side of an AND.
    """
    sides: list[tuple[str, float | None]] = (
        [(text, None)] if negative else [_cut_weight(side) for side in _AND.split(text)]
    )
    which = "the negative prompt" if negative else "the prompt" if len(sides) == 1 else "one side of an AND"
    for side, weight in sides:
        opened = {"(": 0, "[": 0}
        for token in _BRACKET.findall(side):
            if token in opened:
                opened[token] += 1
            elif token in _OPENING and opened[_OPENING[token]] == 0:
                return f"A {token!r} of {which} closes no bracket and is taken literally. Write \\{token} to avoid this note."
            elif token in _OPENING:
                opened[_OPENING[token]] -= 1
        if left := [f"{count} {bracket!r}" for bracket, count in opened.items() if count]:
            verbs = ("stays", "weighs") if sum(opened.values()) == 1 else ("stay", "weigh")
            note = f"{' and '.join(left)} of {which} {verbs[0]} open and {verbs[1]} everything up to the end."
            if weight is None:
                return note
            return f"{note} The {weight:g} is not the weight of a bracket, but the guidance weight of all of {which}."
    return None


_OPENING = {")": "(", "]": "["}
_BRACKET = re.compile(r"\\.|[()\[\]]", re.DOTALL)


# AND

_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*\Z")


def split_parts(text: str) -> list[tuple[str, float]]:
    """The sides of every AND with their weights. A text without AND has a weight too: that of `a (b:1.2` is 1.2."""
    return [_part(side) for side in _AND.split(text)]


def _part(side: str) -> tuple[str, float]:
    text, weight = _cut_weight(side)
    return (text.rstrip(), 1.0) if weight is None else (text, weight)


def _cut_weight(side: str) -> tuple[str, float | None]:
    """The text without the weight at its end, and the weight."""
    found = _PART_WEIGHT.search(side)
    weight = _number(found[1]) if found else None
    return (side, None) if found is None or weight is None else (side[: found.start()], weight)


# Schedules


@dataclass(frozen=True)
class _Switch:
    """[before:after:when]; when: a step."""

    before: _Nodes
    after: _Nodes
    when: int


@dataclass(frozen=True)
class _Alternation:
    options: tuple[_Nodes, ...]


_Node = str | _Switch | _Alternation
_Nodes = tuple[_Node, ...]

_SCHEDULE_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]|\\", re.ASCII)
_WHEN = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", re.ASCII)


class _Frame:
    """An open bracket: its pieces so far, and the separators between them."""

    def __init__(self, bracket: str) -> None:
        self.bracket = bracket
        self.pieces: list[list[_Node]] = [[]]
        self.separators: list[str] = []

    def flat(self) -> Iterator[_Node]:
        """As text, the bracket included."""
        yield self.bracket
        for index, piece in enumerate(self.pieces):
            if index:
                yield self.separators[index - 1]
            yield from piece


@dataclass(frozen=True)
class _Clock:
    """Converts `when` to a step."""

    steps: int
    hires_after: int | None

    def step(self, when: str) -> int:
        hires = self.hires_after
        if "." in when:
            step = (float(when) - (0.0 if hires is None else 1.0)) * self.steps
        else:
            step = float(when) - (hires or 0)
        return int(min(max(step, -1.0), self.steps))


def schedule_texts(text: str, steps: int, hires_after: int | None = None) -> list[tuple[int, str]]:
    """(last step, text) in order. `when` is a fraction of the steps where it has a decimal point, else a step.

    In the second pass of the hires fix, the steps of the first pass are subtracted from a step, and 1 from a fraction. A text
    with a `|` or a backslash outside of brackets has no schedule and stays as it is.
    """
    nodes = _parse_schedule(text, _Clock(steps, hires_after))
    if nodes is None:
        return [(steps, text)]
    return [(step, _text_at(nodes, step)) for step in _changes(nodes, steps)]


def _schedule(text: str, steps: int, dialect: Dialect, hires_after: int | None) -> tuple[ScheduledText, ...]:
    return tuple(
        ScheduledText(until, now, weighted_spans(now, dialect))
        for until, now in schedule_texts(text, steps, hires_after)
    )


def _parse_schedule(text: str, clock: _Clock) -> _Nodes | None:
    """None where the text has no schedule. One pass with a stack of open brackets: linear in the text, without recursion.

    A bracket that closes wrongly turns all brackets around it into text, because their contents would be incomplete.
    """
    root: list[_Node] = []
    frames: list[_Frame] = []

    def give_up() -> None:
        for frame in frames:
            root.extend(frame.flat())
        frames.clear()

    for token in _SCHEDULE_TOKEN.findall(text):
        if token in ("[", "("):
            frames.append(_Frame(token))
        elif token in ("]", ")"):
            closed = _close(frames[-1], token, clock) if frames else None
            if closed is None:
                give_up()
                root.append(token)
            else:
                frames.pop()
                (frames[-1].pieces[-1] if frames else root).extend(closed)
        elif token in (":", "|") and frames:
            frames[-1].separators.append(token)
            frames[-1].pieces.append([])
        else:
            (frames[-1].pieces[-1] if frames else root).append(token)
    give_up()
    return None if any(node in ("|", "\\") for node in root) else tuple(root)


def _close(frame: _Frame, bracket: str, clock: _Clock) -> list[_Node] | None:
    """The nodes that a closed bracket stands for; None where it closes wrongly."""
    kinds, pieces = set(frame.separators), [tuple(piece) for piece in frame.pieces]
    if any("\\" in piece for piece in pieces):
        return None
    if frame.bracket == "(":
        return [*frame.flat(), ")"] if bracket == ")" and kinds <= {":"} and len(pieces) <= 2 else None
    if bracket != "]" or len(kinds) > 1:
        return None
    if not kinds:
        return [*frame.flat(), "]"]
    if kinds == {"|"}:
        return [_Alternation(tuple(pieces))]
    last = [node for node in pieces[-1] if isinstance(node, str)]
    when = _WHEN.fullmatch("".join(last)) if len(last) == len(pieces[-1]) else None
    if when is None or len(pieces) > 3:
        return None
    return [_Switch(pieces[0] if len(pieces) == 3 else (), pieces[-2], clock.step(when[1]))]


def _changes(nodes: _Nodes, steps: int) -> list[int]:
    found = {steps}
    todo: list[_Node] = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, _Switch):
            if node.when >= 1:
                found.add(node.when)
            todo += [*node.before, *node.after]
        elif isinstance(node, _Alternation):
            found.update(range(1, steps + 1))
            todo += [inner for option in node.options for inner in option]
    return sorted(found)


def _text_at(nodes: _Nodes, step: int) -> str:
    words: list[str] = []
    todo = list(reversed(nodes))
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            words.append(node)
        elif isinstance(node, _Switch):
            todo += reversed(node.before if step <= node.when else node.after)
        else:
            todo += reversed(node.options[(step - 1) % len(node.options)])
    return "".join(words)


# Attention

_ATTENTION_TOKEN = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\]?)
    | (?P<open>[(\[])
    | :\s*(?P<copies>x)?(?P<weight>[+-]?[.\d]+)\s*\)
    | (?P<close>[)\]])
    | [^\\()\[\]:]+
    | :
    """,
    re.VERBOSE,
)
_BREAKS = re.compile(r"\s*\bBREAK\b\s*")


@lru_cache(maxsize=256)
def weighted_spans(text: str, dialect: Dialect = "a1111") -> tuple[Span, ...]:
    """Spans of a text by its brackets: (x) times 1.1, [x] divided by 1.1, (x:w) times w. Adjacent spans of equal weight are merged.

    Nested brackets multiply; an open one extends to the end; a closing one without an opening is text. A backslash escapes a
    bracket or a backslash, and is dropped before other characters. Dialect reforge knows (x:x2.5): x twice,
    the last copy at 1.5 times its weight.
    """
    spans: list[Span] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in _ATTENTION_TOKEN.finditer(text):
        if token["escaped"] is not None:
            spans.append(Span(token["escaped"], 1.0))
        elif token["open"]:
            opened[token["open"]].append(len(spans))
        elif token["weight"] and opened["("] and _closes_weighted(spans, opened["("], token, dialect):
            pass
        elif token["close"] == ")" and opened["("]:
            _multiply(spans, opened["("].pop(), _ROUND)
        elif token["close"] == "]" and opened["["]:
            _multiply(spans, opened["["].pop(), _SQUARE)
        elif token["weight"] and opened["("]:
            # Not a weight in this dialect, but the bracket closes.
            spans.append(Span(token[0][:-1], 1.0))
            _multiply(spans, opened["("].pop(), _ROUND)
        else:
            spans.extend(_at_breaks(token[0]))
    for bracket, factor in (("(", _ROUND), ("[", _SQUARE)):
        for start in opened[bracket]:
            _multiply(spans, start, factor)
    return tuple(_merged(spans or [Span("", 1.0)], 0.0 if dialect == "a1111" else _REFORGE_EQUAL))


def _closes_weighted(spans: list[Span], opened: list[int], token: re.Match[str], dialect: Dialect) -> bool:
    """Close the innermost bracket with its weight. Returns False, without closing, where the number is no weight."""
    weight = _number(token["weight"])
    if weight is None or (token["copies"] and (dialect != "reforge" or not 0 <= weight <= _MOST_COPIES)):
        return False
    start = opened.pop()
    if token["copies"]:
        inside, copies = spans[start:], max(int(weight), 1)
        spans.extend(inside * (copies - 1))
        start, weight = start + len(inside) * (copies - 1), weight - (copies - 1)
    _multiply(spans, start, weight)
    return True


def _multiply(spans: list[Span], start: int, factor: float) -> None:
    for index in range(start, len(spans)):
        weight = spans[index].weight * factor
        spans[index] = replace(spans[index], weight=min(max(weight, -_LARGEST), _LARGEST))


def _at_breaks(text: str) -> Iterator[Span]:
    for index, piece in enumerate(_BREAKS.split(text)):
        if index:
            yield Span(BREAK, _BREAK_WEIGHT)
        yield Span(piece, 1.0)


def _merged(spans: Sequence[Span], tolerance: float) -> Iterator[Span]:
    current = spans[0]
    for span in spans[1:]:
        if abs(span.weight - current.weight) <= tolerance:
            current = Span(current.text + span.text, current.weight)
        else:
            yield current
            current = span
    yield current


def _number(text: str) -> float | None:
    """None for text that is no number (1.2.3), or a number beyond float32's range."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None
