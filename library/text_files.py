"""Text files that people write and edit: UTF-8 with or without a byte order mark, or UTF-16 with one."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


class NotText(ValueError):
    """What bytes are instead of text, to follow "FILE is ", and on which line."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(f"{what} (line {line})")
        self.what, self.line = what, line


def decoded(data: bytes) -> str:
    """The text of a whole file, without its byte order mark. Line ends stay as they are.

    Raises NotText. UTF-16 without a mark is legal UTF-8, with a NUL beside each letter; text that people write has none.
    """
    mark, encoding = form_of(data)
    if not mark and data.count(0) > len(data) // 4:
        raise NotText("UTF-16 text without a byte order mark", data.count(b"\n", 0, data.index(0)) + 1)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, len(mark) + error.start) + 1
        raise NotText("not UTF-8 text" if encoding == "utf-8" else "not UTF-16 text", line) from None
    if "\0" in text:
        raise NotText("no text, for it has NUL bytes", text.count("\n", 0, text.index("\0")) + 1)
    return text


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError where it cannot be read or is no text."""
    try:
        return decoded(path.read_bytes())
    except NotText as error:
        raise UserError(f"{path} is {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror or error}.") from None


class Form(NamedTuple):
    """What a file's text is kept in: its byte order mark, which may be none, and its encoding."""

    mark: bytes = b""
    encoding: str = "utf-8"

    def encoded(self, text: str) -> bytes:
        return self.mark + text.encode(self.encoding)


def form_of(data: bytes) -> Form:
    """The form that `decoded` reads a file in, so that a changed text can be written in it again."""
    return next((Form(mark, name) for mark, name in _MARKS if data.startswith(mark)), Form())
