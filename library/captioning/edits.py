"""Changes to captions without a model, written as words: add:TAG, replace:OLD=NEW, shuffle, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from library.data.captions import sample_random
from library.options.checks import require

Tags = list[str]

OPERATIONS = "add:TAG, first:TAG, remove:TAG, replace:OLD=NEW, deduplicate, shuffle or shuffle:N"


class Edits:
    """Operations on a line of a caption, in their order. A line that none of them changes stays as it is, to the letter.
    What a sentence names already is not added to it.

    words: as `--edit` takes them. Raises OptionError for what is none of `OPERATIONS`.
    """

    def __init__(self, words: Sequence[str], separator: str, seed: int) -> None:
        self._separator, self._seed = separator, seed
        self._operations = [self._operation(word) for word in words]

    def __call__(self, line: str, name: str) -> str:
        """name: of the caption, so that the same seed shuffles it the same way whatever else is there."""
        random = sample_random(self._seed, 0, name, 0, "edit")
        for operation in self._operations:
            line = operation(line, random)
        return line

    def _operation(self, word: str) -> Callable[[str, Random], str]:
        name, colon, value = word.partition(":")
        name, tags = name.strip(), self.tags(value)
        if name == "replace":
            old, equals, new = value.partition("=")
            require(bool(equals) and bool(old.strip()), "edit", f"replace takes OLD=NEW, got {word!r}.")
            whole = re.compile(rf"(?<!\w){re.escape(old.strip())}(?!\w)")
            return lambda line, random: whole.sub(lambda match: new.strip(), line).strip()
        if name in ("add", "first", "remove"):
            require(bool(tags), "edit", f"{name} takes a tag, got {word!r}.")
        folded = {tag.casefold() for tag in tags}
        if name == "add":
            return self._of_tags(lambda there, random: there + _absent(_unsaid(tags, there), there))
        if name == "first":
            return self._of_tags(
                lambda there, random: _unsaid(tags, there) + [tag for tag in there if tag.casefold() not in folded]
            )
        if name == "remove":
            return self._of_tags(lambda there, random: [tag for tag in there if tag.casefold() not in folded])
        if name == "deduplicate" and not colon:
            return self._of_tags(lambda there, random: _absent(there, []))
        require(
            name == "shuffle" and (not colon or value.strip().isdecimal()), "edit", f"takes {OPERATIONS}, got {word!r}."
        )
        kept = int(value) if colon else 0
        return self._of_tags(lambda there, random: there[:kept] + random.sample(there[kept:], len(there[kept:])))

    def _of_tags(self, change: Callable[[Tags, Random], Tags]) -> Callable[[str, Random], str]:
        def changed(line: str, random: Random) -> str:
            before = self.tags(line)
            after = change(before, random)
            return line if after == before else self.joined(after)

        return changed

    def tags(self, text: str) -> Tags:
        return split_tags(text, self._separator)

    def joined(self, tags: Sequence[str]) -> str:
        return join_tags(tags, self._separator)


def split_tags(text: str, separator: str) -> Tags:
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def join_tags(tags: Sequence[str], separator: str) -> str:
    """With a blank behind each separator, unless it ends with one."""
    return (separator if separator[-1].isspace() else f"{separator} ").join(tags)


def _unsaid(tags: Sequence[str], there: Sequence[str]) -> Tags:
    """Those of `tags` that a sentence, a line without separators, does not name; all of them for a list."""
    if len(there) != 1:
        return list(tags)
    return [tag for tag in tags if tag == there[0] or not re.search(rf"(?<!\w){re.escape(tag)}(?!\w)", there[0])]


def _absent(tags: Sequence[str], there: Sequence[str]) -> Tags:
    """Those of `tags` that are not there yet, each once; capital letters do not count."""
    seen, found = {tag.casefold() for tag in there}, []
    for tag in tags:
        if tag.casefold() not in seen:
            seen.add(tag.casefold())
            found.append(tag)
    return found
