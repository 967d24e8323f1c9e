"""How an option says that its value cannot be."""

from __future__ import annotations

import math

from library.errors import UserError


class OptionError(UserError):
    """`option` is the name as a user writes it; the parser adds the file and line the value came from."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option} {message}")
        self.option = option


def require(holds: bool, option: str, message: str) -> None:
    """Raise OptionError(option, message) unless `holds`. The message goes on where the option's name ends."""
    if not holds:
        raise OptionError(option, message)


def positive(option: str, value: float | None) -> None:
    require(value is None or value > 0, option, f"must be positive, got {value}.")


def not_negative(option: str, value: float | None) -> None:
    require(value is None or value >= 0, option, f"must not be negative, got {value}.")


def finite(option: str, value: float | None) -> None:
    require(value is None or math.isfinite(value), option, f"must be a finite number, got {value}.")


def share(option: str, value: float | None) -> None:
    require(value is None or 0 <= value <= 1, option, f"must lie between 0 and 1, got {value}.")
