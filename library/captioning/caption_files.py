"""The caption file of each picture of a folder, read and written in the form it has: mark, encoding, line ends."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.data.caption_files import CaptionFolders, names_in, some
from library.data.image_headers import endings, unread_pictures
from library.data.picture_files import image_names
from library.errors import UserError
from library.files import whole_file
from library.text_files import Form, NotText, decoded, form_of

_ENDED = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|$)")


@dataclass(frozen=True)
class CaptionFile:
    picture: Path
    path: Path
    """Where its caption is, or would be."""
    text: str | None
    """The whole file; None where there is none."""
    form: Form

    @property
    def is_empty(self) -> bool:
        return self.text is None or not self.text.strip()

    def line_by_line(self, change: Callable[[str], str]) -> str:
        """The text with every line that says something changed, and line ends, blanks around lines and empty lines as they were."""
        return "".join(_changed(part, change) for part in _ENDED.findall(self.text or ""))

    def replaced(self, caption: str) -> str:
        """The text with one caption in place of all that it says; it ends as it did."""
        end = re.search(r"(?:\r\n|\r|\n)?\Z", self.text or "")
        return caption + (end[0] if end else "")

    def write(self, text: str) -> None:
        """Put the text in place, whole or not at all. Raises RunFailed."""
        with whole_file(self.path) as temporary:
            temporary.write_bytes(self.form.encoded(text))


def caption_files(folder: Path, extension: str) -> list[CaptionFile]:
    """One for each picture in the folder, or in its images/, or else in each of its folders.

    Raises UserError: no pictures, or captions that cannot be read or are no text, all of them named.
    """
    found, broken = [], []
    for inner in _picture_folders(folder):
        captions = CaptionFolders(inner)
        beside = inner.parent / "captions" if inner.absolute().name.lower() == "images" else inner
        home = beside if beside.is_dir() else inner
        for name in image_names(inner):
            stem = os.path.splitext(name)[0]
            path = captions.find(stem, extension)
            try:
                data = b"" if path is None else path.read_bytes()
                text = None if path is None else decoded(data)
                found.append(CaptionFile(inner / name, path or home / f"{stem}{extension}", text, form_of(data)))
            except OSError as error:
                broken.append(f"{path}: {error.strerror or error}")
            except NotText as error:
                broken.append(f"{path} is {error}")
    if broken:
        raise UserError(f"Captions that cannot be read: {some(broken)}. Save them as UTF-8, or take them away.")
    shared = [str(one.path) for one in found if sum(other.path == one.path for other in found) > 1] if found else []
    if shared:
        raise UserError(
            f"Pictures that share a caption file: {some(sorted(set(shared)))}. Give them names of their own."
        )
    return found


def _picture_folders(folder: Path) -> list[Path]:
    inside = [folder, folder / "images"]
    below = [folder / name for name in names_in(folder) if (folder / name).is_dir() and not name.startswith(".")]
    first = next(([one] for one in inside if image_names(one)), None)
    found = first or [
        place for one in below if (place := next((p for p in (one, one / "images") if image_names(p)), None))
    ]
    if not found:
        unread = unread_pictures(names_in(folder), endings())
        kinds = ", ".join(ending[1:] for ending in endings())
        raise UserError(f"{folder} has no pictures. Read are {kinds}.{f' Not read are {unread}.' if unread else ''}")
    return found


def _changed(part: str, change: Callable[[str], str]) -> str:
    line = part.strip()
    if not line:
        return part
    start = part.index(line)
    return part[:start] + change(line) + part[start + len(line) :]
