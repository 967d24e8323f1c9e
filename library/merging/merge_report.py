"""What a merge took, did and found: for the screen, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.files import human_bytes
from library.merging.merge import Change
from library.merging.read_back import Check
from library.merging.source import Source
from library.merging.strength import Strength
from library.models.header import read_shapes
from library.words import plural

_LARGEST = 10  # changes that the report lists
_ENOUGH = 0.9  # share of a change that has to arrive


@dataclass(frozen=True)
class Ingredient:
    """An adapter that is folded in."""

    source: Source
    strength: Strength

    @property
    def keys(self) -> dict[str, int]:
        """How many tensors of its file are what."""
        frozen, dropped = len(self.source.adapter.frozen), len(self.source.adapter.left_out)
        merged = len(read_shapes(self.source.file)) - frozen - dropped
        return {"frozen": frozen, "merged": merged, "dropped": dropped}

    def record(self, sha256: str) -> dict[str, str]:
        """For the metadata of what is made of it."""
        return {"file": self.source.file.name, "sha256": sha256, "strength": self.strength.describe()}


@dataclass(frozen=True)
class Component:
    """What became of one model of the pipeline."""

    name: str
    keys_before: int
    """In the base's files, or the wrapped checkpoint's."""
    keys_after: int
    """In the folder that was written, or else in the single file."""
    changed: int
    """Weights that something was folded into."""


@dataclass(frozen=True)
class MergeReport:
    version: str
    date: str
    family: str
    base: str
    precision: str
    is_stochastic: bool
    """Whether merged weights were rounded at random."""
    ingredients: tuple[Ingredient, ...]
    components: tuple[Component, ...]
    changes: tuple[Change, ...]
    checks: tuple[Check, ...]
    hashes: dict[str, str]
    """Path of an input -> SHA-256 of its bytes."""
    left_behind: tuple[str, ...]
    """Tensors of the base that are no part of the merged model (EMA copies, buffers)."""
    absent: tuple[str, ...]
    """Parts that the base's index names and its folder does not have (safety_checker, where it was not fetched)."""
    outputs: dict[str, int]
    """File -> bytes."""
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def largest(self) -> list[Change]:
        """The changes that are largest against the weight they were made to."""
        return sorted(self.changes, key=lambda change: -change.relative)[:_LARGEST]

    @property
    def arrived(self) -> float:
        """Share of all changes that is in what was written, weighed by their squares as the norms of vectors are."""
        whole = sum(change.norm**2 for change in self.changes)
        return sum(change.arrived * change.norm**2 for change in self.changes) / whole if whole else 1.0

    @property
    def lost(self) -> list[Change]:
        """The changes of which too little arrived, the least first."""
        return sorted(
            (change for change in self.changes if change.arrived < _ENOUGH), key=lambda change: change.arrived
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "date": self.date,
            "passed": self.passed,
            "family": self.family,
            "base": self.base,
            "precision": self.precision,
            "adapters": [
                {
                    "file": str(ingredient.source.file),
                    "ratio": ingredient.strength.ratio,
                    "unet_ratio": ingredient.strength.unet,
                    "text_encoder_ratio": ingredient.strength.text_encoder,
                    "block_ratios": dict(ingredient.strength.blocks),
                    "modules": len(ingredient.source.adapter.modules),
                    "keys": ingredient.keys,
                }
                for ingredient in self.ingredients
            ],
            "components": [vars(component) for component in self.components],
            "largest_changes": [vars(change) for change in self.largest],
            "arrived": self.arrived,
            "changes": [vars(change) for change in self.changes],
            "checks": [vars(check) for check in self.checks],
            "sha256": self.hashes,
            "left_behind": len(self.left_behind),
            "absent": list(self.absent),
            "outputs": self.outputs,
            "seconds": round(self.seconds, 2),
        }

    def as_markdown(self) -> str:
        lines = ["# Merge report", "", f"{self.date}, version {self.version}, {self.family}, {self.seconds:.1f} s", ""]
        lines += [f"**{'All checks passed.' if self.passed else f'{len(self.failed)} CHECKS FAILED.'}**", ""]
        lines += ["## What was merged", "", f"Base: `{self.base}`, precision: {self.precision}", ""]
        lines += _table(
            ("adapter", "ratio", "modules", "keys", "frozen", "merged", "dropped"),
            [
                (
                    f"`{ingredient.source.file}`",
                    ingredient.strength.describe(),
                    len(ingredient.source.adapter.modules),
                    sum(ingredient.keys.values()),
                    *ingredient.keys.values(),
                )
                for ingredient in self.ingredients
            ],
        )
        lines += [f"W' = W + sum of ratio * delta, in float32, rounded once. {self._deltas()}", ""]
        lines += ["## Keys", ""]
        lines += _table(
            ("component", "before", "after", "weights changed"),
            [(c.name, c.keys_before, c.keys_after, c.changed) for c in self.components],
        )
        if self.left_behind:
            lines += [f"{self._left_behind()} (first: `{self.left_behind[0]}`).", ""]
        if self.absent:
            lines += [f"Without {', '.join(self.absent)}, which the base names but does not hold here.", ""]
        lines += ["## Checks", "", "Read back from the files that were written.", ""]
        lines += _table(
            ("check", "", "found"), [(c.name, "ok" if c.passed else "**FAILED**", c.found) for c in self.checks]
        )
        lines += ["## Largest changes", "", "Norm of what was added, over that of the weight before.", ""]
        lines += _changes(self.largest)
        lines += ["## What arrived", "", *(f"{line}." for line in self._arrival()), ""]
        lines += _changes(self.lost)
        lines += ["## Files", ""]
        lines += _table(("file", "size"), [(f"`{name}`", human_bytes(size)) for name, size in self.outputs.items()])
        lines += _table(("input", "SHA-256"), [(f"`{path}`", f"`{digest}`") for path, digest in self.hashes.items()])
        return "\n".join(lines)

    def _left_behind(self) -> str:
        count = plural(len(self.left_behind), "tensor of the base that is", "tensors of the base that are")
        return f"Left behind: {count} no part of the models"

    def _deltas(self) -> str:
        """How each kind of module that was merged makes its delta, and what the files' readers should know."""
        kinds = {
            module.kind for ingredient in self.ingredients for module in ingredient.source.adapter.modules.values()
        }
        said = "; ".join(sorted(f"{kind.title}: delta = {kind.formula}" for kind in kinds))
        notes = [f" {i.source.file.name}: {note}." for i in self.ingredients for note in i.source.adapter.notes]
        return f"{said}.{''.join(notes)}"

    def _arrival(self) -> list[str]:
        """What rounding left of the changes, and a warning where that is too little."""
        if not self.changes:
            return []
        least = min(self.changes, key=lambda change: change.arrived)
        said = [f"{self.arrived:.1%} of the change arrived after rounding (least {least.arrived:.1%}: {least.key})"]
        if self.lost:
            keeps = "" if self.is_stochastic else ", --rounding stochastic keeps it on average"
            said.append(
                f"warning: less than {_ENOUGH:.0%} of the change arrived in {plural(len(self.lost), 'weight')}, for it is "
                f"smaller than the steps of the number format: --save_precision float keeps it{keeps}"
            )
        return said

    def as_text(self) -> str:
        """For the screen: the table of keys, the checks, and a word on what changed."""
        lines = [f"{'component':<16}{'keys before':>12}{'after':>8}{'changed':>9}   largest relative change"]
        for part in self.components:
            own = [change for change in self.changes if change.component == part.name]
            most = max(own, key=lambda change: change.relative, default=None)
            said = "as in the base" if most is None else f"{most.relative:.2e}  {most.key}"
            lines.append(f"{part.name:<16}{part.keys_before:>12}{part.keys_after:>8}{part.changed:>9}   {said}")
        for ingredient in self.ingredients:
            keys = ingredient.keys
            lines.append(
                f"{ingredient.source.file.name}: {sum(keys.values())} keys = {keys['frozen']} frozen + {keys['merged']} merged + "
                f"{keys['dropped']} dropped"
            )
        lines += [f"{line}." for line in self._arrival()]
        if all(change.relative == 0 for change in self.changes):
            lines.append("Nothing has changed: the adapter is zero (was it trained?) or the ratio is.")
        if self.left_behind:
            lines.append(f"{self._left_behind()}.")
        if self.absent:
            lines.append(f"Without {', '.join(self.absent)}, which the base names but does not hold here.")
        lines += [f"{'ok' if check.passed else 'FAILED':<7}{check.name}: {check.found}" for check in self.checks]
        return "\n".join(lines)

    def write(self, markdown: Path, data: Path) -> None:
        markdown.write_text(self.as_markdown(), encoding="utf-8")
        data.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _changes(changes: list[Change]) -> list[str]:
    return _table(
        ("component", "weight", "change", "arrived"),
        [(c.component, f"`{c.key}`", f"{c.relative:.2e}", f"{c.arrived:.1%}") for c in changes],
    )


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (head, *rows)]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:], ""]


def _cell(value: object) -> str:
    """A file's name may hold what ends a cell."""
    return str(value).replace("|", r"\|")
