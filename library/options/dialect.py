"""How a script reads options that another program named: some have other names here, some are refused with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.options.command_line import switch
from library.options.toml_file import Located, as_toml

_NOTHING = (None, "", False, 0)
"""Values that ask for nothing."""


@dataclass(frozen=True)
class Refused:
    """An option that is known and not offered. `default` and `harmless` are the values at which it asks for nothing."""

    reason: str
    default: Any = False
    harmless: tuple[Any, ...] = ()

    @property
    def is_flag(self) -> bool:
        return self.default is False

    def asks_for_something(self, value: Any) -> bool:
        return str(value) not in {str(item) for item in (*_NOTHING, self.default, *self.harmless)}


@dataclass(frozen=True)
class Alias:
    """Another name of `option`. With `value` it is a flag that means just this value."""

    option: str
    value: str | None = None


@dataclass(frozen=True)
class Dialect:
    """The default is this project's own way: TOML files under --dataset_config, each key once, values as typed."""

    config_option: str = "dataset_config"
    """Option that names the TOML file of options."""
    output_option: str | None = None
    """Flag that asks for this file to be written, so that it is not read."""
    ignore_option: str | None = None
    """Flag that lets unknown keys of this file pass with a warning."""
    later_section_wins: bool = False
    """A key may stand in several sections; the last one counts."""
    datasets_beside: bool = False
    """A file with [[datasets]] may hold options beside them; its [general] is theirs then."""
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    refused: Mapping[str, Refused] = field(default_factory=dict)
    words_of: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Options that take words KEY=VALUE, with those keys that are no options themselves: people write them as such."""

    def words(self, argv: list[str]) -> tuple[list[str], list[str]]:
        """The command line with aliases replaced and refused options left out, and what is wrong with it: a sentence for each
        refused option that asks for something, and where two names say different things."""
        kept: list[str] = []
        refused: list[str] = []
        misplaced: dict[str, str] = {}
        replaced: dict[str, tuple[str, str]] = {}
        renamed: dict[str, str] = {}
        plain: set[str] = set()
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            name, equals, value = _name_of(word), "=" in word, word.partition("=")[2]
            if name in self.refused:
                rule = self.refused[name]
                if (
                    not equals
                    and rest
                    and not rest[0].startswith("--")
                    and (not rule.is_flag or switch(rest[0]) is not None)
                ):
                    value = rest.pop(0)
                if switch(value) is not False if rule.is_flag else rule.asks_for_something(value):
                    refused.append(f"--{name}: {rule.reason}")
            elif self._list_of(name) is not None:
                values = [value] if equals else []
                while not equals and rest and not rest[0].startswith("--"):
                    values.append(rest.pop(0))
                misplaced[name] = ",".join(values)
            elif name in self.aliases and self.aliases[name].value is not None:
                alias = self.aliases[name]
                assert alias.value is not None
                replaced[alias.option] = (name, alias.value)
                kept += [f"--{alias.option}", alias.value]
            elif name in self.aliases:
                option = self.aliases[name].option
                renamed[option] = name
                kept.append(f"--{option}{'=' + value if equals else ''}")
            else:
                plain.add(name)
                kept.append(word)
        wrong = [refusal(refused)] if refused else []
        for option, pairs in self._by_list(misplaced).items():
            names = ", ".join(f"--{name}" for name in pairs)
            wrong.append(f"{names}: no option but a part of {option}. Write --{option} {' '.join(pairs.values())}.")
        wrong += [
            f"--{name} is --{option} by another name, and both are given. Keep one of them."
            for option, name in renamed.items()
            if option in plain
        ]
        for option, (name, meant) in replaced.items():
            said = values_in(kept, option)
            if any(value != meant for value in said):
                other = next(value for value in said if value != meant)
                wrong.append(
                    f"--{name} means --{option} {meant}, and --{option} {other} is given too. Keep one of them."
                )
        return kept, wrong

    def values(self, values: dict[str, Located]) -> tuple[dict[str, Located], list[str]]:
        """A file's values in the same way."""
        kept: dict[str, Located] = {}
        refused: list[str] = []
        wrong: list[str] = []
        misplaced = {
            name: located.value
            for name, located in values.items()
            if self._list_of(name) and located.value not in _NOTHING
        }
        for option, pairs in self._by_list(misplaced).items():
            names = ", ".join(f"{name} ({values[name].place})" for name in pairs)
            wrong.append(
                f"{names}: no option but a part of {option}. Write {option} = {as_toml(list(pairs.values()))}."
            )
        for name, located in values.items():
            if self._list_of(name) is not None:
                continue
            if name in self.refused:
                rule = self.refused[name]
                if rule.asks_for_something(located.value):
                    refused.append(f"{name} ({located.place}): {rule.reason}")
                continue
            alias = self.aliases.get(name)
            if alias is None:
                kept.setdefault(name, located)
                continue
            if located.value in (False, "", None):
                continue
            meant = located if alias.value is None else dataclasses.replace(located, value=alias.value)
            other = values.get(alias.option)
            if other is not None and other.value not in ("", meant.value):
                wrong.append(
                    f"{name} ({located.place}) means {alias.option} {meant.value}, and {alias.option} is {other.value!r} "
                    f"({other.place}). Keep one of them."
                )
            kept[alias.option] = meant
        return kept, [*([refusal(refused)] if refused else []), *wrong]

    def _list_of(self, name: str) -> str | None:
        return next((option for option, keys in self.words_of.items() if name in keys), None)

    def _by_list(self, misplaced: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """List option -> key -> its word, of keys that were written as options."""
        found: dict[str, dict[str, str]] = {}
        for name, value in misplaced.items():
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            found.setdefault(str(self._list_of(name)), {})[name] = f"{name}={text}"
        return found


PLAIN = Dialect()


def refusal(sentences: list[str]) -> str:
    return f"Not offered here: {' '.join(sentences)}"


def values_in(argv: list[str], name: str) -> list[str]:
    """Every value of `--name` in argv, in any spelling; "" where it is the last word."""
    found = []
    for position, word in enumerate(argv):
        if _name_of(word) in (name, f"no_{name}"):
            _, equals, tail = word.partition("=")
            found.append(tail if equals else argv[position + 1] if position + 1 < len(argv) else "")
    return found


def _name_of(word: str) -> str:
    """ "learning_rate" of --learning-rate=1; the empty string of a word that is no option."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else ""
