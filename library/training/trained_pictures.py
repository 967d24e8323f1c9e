"""Which pictures a state was trained on, and how those of a run that goes on from it differ, by name.

pictures.jsonl of a state: a line [sample id, caption, cut, settings, content] for each picture that the run was given; all but the
first are digests in hex. content is "" where the cache does not know it, and UNREADABLE where the picture could not be read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from library.data.collect import TrainingData
from library.training.caches import Prepared
from library.training.facts import settings_of
from library.training.state import PICTURES
from library.words import plural

UNREADABLE = "unreadable"
NAMED = 5
"""Pictures of each kind of change that are named; of the others there is the number."""


class Mark(NamedTuple):
    """cut: with how often it is shown and how much it counts. settings: of its data set."""

    caption: str
    cut: str
    settings: str
    content: str = ""


Marks = Mapping[str, Mark]


def marks_of(data: TrainingData) -> dict[str, Mark]:
    """Of the training pictures as they were collected, by sample id; what is in the files is not looked at."""
    of_settings = functools.cache(_digest)  # few differ
    return {
        picture.image.sample_id: Mark(
            _digest(picture.image.caption),
            _digest(repr((picture.fitted, picture.repeats, picture.loss_weight))),
            of_settings(settings),
        )
        for picture, settings in zip(data.training, settings_of(data), strict=True)
    }


def marks_of_prepared(prepared: Prepared) -> dict[str, Mark]:
    """The same once the caches are complete: with what is in the files, and with those that could not be read."""
    stores = prepared.training.latents.stores
    marks = marks_of(prepared.data)
    for picture in prepared.data.training:
        name = picture.image.sample_id
        marks[name] = marks[name]._replace(content=stores[picture.fitted.bucket].content(name).hex())
    for caches in prepared.training.every:
        for name in caches.dropped:
            marks.setdefault(name, Mark("", "", "", UNREADABLE))
    return marks


def write_marks(marks: Marks) -> str:
    return "".join(json.dumps([name, *mark]) + "\n" for name, mark in marks.items())


def read_marks(state: Path) -> dict[str, Mark] | None:
    """None where the state does not say, as those of earlier versions."""
    try:
        lines = (state / PICTURES).read_text(encoding="utf-8").splitlines()
        return {name: Mark(*mark) for name, *mark in map(json.loads, lines)}
    except (OSError, ValueError, TypeError):
        return None


def all_were_read(state: Path) -> bool:
    """Whether the run was trained on every picture that it was given, as far as the state says."""
    marks = read_marks(state)
    return marks is not None and all(mark.content != UNREADABLE for mark in marks.values())


def changed_pictures(then: Marks | None, now: Marks) -> str:
    """ "2 pictures added (a.png, b.png), 1 picture with another caption (c.png)"; "" where nothing changed that both know."""
    if then is None:
        return ""
    both = [name for name in then if name in now and UNREADABLE not in (then[name].content, now[name].content)]
    kinds = {
        "added": [name for name in now if name not in then and now[name].content != UNREADABLE],
        "removed": [name for name in then if name not in now and then[name].content != UNREADABLE],
        "whose file changed": [name for name in both if _differ(then[name].content, now[name].content)],
        "with another caption": [name for name in both if then[name].caption != now[name].caption],
        "cut, repeated or weighted differently": [name for name in both if then[name].cut != now[name].cut],
        "with other settings of their data set": [name for name in both if then[name].settings != now[name].settings],
    }
    return ", ".join(
        f"{plural(len(names), 'picture')} {kind} ({_named(names)})" for kind, names in kinds.items() if names
    )


def _differ(then: str, now: str) -> bool:
    return bool(then and now) and then != now


def _named(names: Iterable[str]) -> str:
    # The ids of captioned pictures begin with their data set.
    plain = [name.partition(":")[2] or name for name in names]
    return ", ".join(plain[:NAMED]) + (", ..." if len(plain) > NAMED else "")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
