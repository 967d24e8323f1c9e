"""What doctor.py has to say of a data set: findings, each with the pictures it is about and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["spoils", "mend", "know"]
"""spoils: a training on it would be in vain. mend: worth an hour of work. know: to be meant so, or changed."""

IN_WORDS: dict[Severity, str] = {"spoils": "Spoils the training", "mend": "To mend", "know": "To know"}


@dataclass(frozen=True)
class Finding:
    kind: str
    """A word for programs, such as `duplicates`; docs/doctor.md has them all."""
    severity: Severity
    title: str
    """What was found, as a sentence."""
    advice: str
    """What to do."""
    pictures: tuple[str, ...] = ()
    """Paths, as the data set names them."""
    details: tuple[str, ...] = ()
    """Something about each of the pictures, in their order, or nothing."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def spoiled(findings: Sequence[Finding]) -> bool:
    return any(finding.severity == "spoils" for finding in findings)


def sorted_findings(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest first, otherwise in the order in which they were found."""
    order = list(IN_WORDS)
    return sorted(findings, key=lambda finding: order.index(finding.severity))
