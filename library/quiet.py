"""Other libraries' remarks, which a user can do nothing about, stay off the terminal."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Let diffusers, transformers and bitsandbytes report errors only. Call before anything imports them.

    transformers says which image processors need torchvision, diffusers that a list of exceptions is empty, and
    bitsandbytes that a 4-bit CPU kernel is missing; nothing here uses these. A verbosity set by the user stays.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
