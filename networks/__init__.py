"""What is trained: adapters inside a frozen model, and heads beside it. Imports nothing of `library`."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter, head or adapter file cannot be what was asked for; the text is a sentence for the user."""
