"""A CSV manifest of class pictures: its rows as samples, and what their ids and paths may be."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import UserError
from library.text_files import NotText, decoded

COLUMNS = ("sample_id", "path", "class_id")
MAX_ID_BYTES = 480  # LMDB keys end at 511, and the stores append "_mid" and "#shape"

CLASS_ID = re.compile(r"\s*[0-9]{1,9}\s*")
# Empty, absolute, upward. Either separator and drive letters, whatever the system that reads it.
_OUTSIDE = re.compile(r"\A(?:\Z|[/\\]|[A-Za-z]:)|(?:\A|[/\\])\.\.(?:[/\\]|\Z)|\0")


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture: its key in every cache, its file path or ZIP member name, and its class number."""

    sample_id: str
    path: str
    class_id: int


def parse_manifest(data: bytes, where: str) -> tuple[list[Sample], list[str]]:
    """The rows of a CSV as samples, with their paths as written, and the place of each: `line 2`."""
    try:
        text = decoded(data)
    except NotText as error:
        raise UserError(f"{where} is {error}. Save it as CSV UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        table = [(f"line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}, is not CSV ({error}). Check its quotes.") from None
    header = [name.strip() for name in table[0][1]] if table else []
    if missing := [name for name in COLUMNS if name not in header]:
        near = [(found, name) for name in missing for found in difflib.get_close_matches(name, header, n=1)]
        hints = "".join(f" Is {found!r} meant to be {name!r}?" for found, name in near)
        raise UserError(
            f"{where} has no column {' or '.join(missing)}; its first line is {','.join(header)!r}.{hints} "
            f"The first line must name {', '.join(COLUMNS)}."
        )
    if len(table) == 1:
        raise UserError(f"{where} has a header but no rows. Write one row per image.")
    id_at, path_at, class_at = (header.index(name) for name in COLUMNS)
    ragged = [f"{place}: {len(row)}" for place, row in table if len(row) != len(header)]
    refuse(where, ragged, f"the number of columns is not {len(header)}", "Put quotes around a path with a comma.")
    places, rows = [place for place, _ in table[1:]], [row for _, row in table[1:]]
    unnumbered = [f"{place}: {row[class_at]!r}" for place, row in table[1:] if not CLASS_ID.fullmatch(row[class_at])]
    refuse(where, unnumbered, "class_id is not a whole number from 0", "Number the classes, the first one 0.")
    samples = [Sample(row[id_at], row[path_at], int(row[class_at])) for row in rows]
    check_ids(where, samples, places)
    return samples, places


def check_ids(where: str, samples: list[Sample], places: list[str]) -> None:
    first: dict[str, str] = {}
    unusable, repeated = [], []
    for place, sample in zip(places, samples, strict=True):
        key = sample.sample_id.encode("utf-8", "replace")
        if not sample.sample_id.strip() or len(key) > MAX_ID_BYTES or key.decode() != sample.sample_id:
            unusable.append(f"{place}: {sample.sample_id[:24]!r}, {len(key)} bytes")
        elif first.setdefault(sample.sample_id, place) is not place:
            repeated.append(f"{sample.sample_id!r} in {first[sample.sample_id]} and {place}")
    refuse(where, unusable, f"sample_id is not 1 to {MAX_ID_BYTES} bytes of UTF-8", "It is a cache key: rename it.")
    refuse(where, repeated, "sample_id is there twice", "Give every image a name of its own.")


def check_paths(where: str, samples: list[Sample], places: list[str], remedy: str) -> None:
    """Refuse paths that are empty or could name anything outside of the folder or archive they start in."""
    found = [f"{place}: {s.path!r}" for place, s in zip(places, samples, strict=True) if _OUTSIDE.search(s.path)]
    refuse(where, found, "path is empty, absolute or leaves the folder it starts in", remedy)


def refuse(where: str, found: Sequence[str], problem: str, remedy: str) -> None:
    if found:
        raise UserError(f"{where}: {problem} ({examples(found)}). {remedy}")


def examples(found: Sequence[object]) -> str:
    return "; ".join([*(str(one) for one in found[:3]), f"{len(found)} in all"])
