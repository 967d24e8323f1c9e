"""Other libraries' remarks, which a user can do nothing about, stay off the terminal, and what they load for nothing out."""

from __future__ import annotations

import logging
import os
import sys


def quiet_libraries() -> None:
    """Let diffusers, transformers and bitsandbytes report errors only. Call before anything imports them.

    transformers says which image processors need torchvision, diffusers that a list of exceptions is empty, and
    bitsandbytes that a 4-bit CPU kernel is missing; nothing here uses these. A verbosity set by the user stays.

    Until `let_in`, scikit-learn and bitsandbytes are hidden: transformers would import the one, a second at each start, for
    assisted decoding of language models, and diffusers the other, a second with torch's compiler, for models quantised by it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("sklearn", "bitsandbytes"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what Python reads as: not there


def let_in(name: str) -> None:
    """Call before a package is used that may be hidden."""
    if sys.modules.get(name, sys) is None:
        del sys.modules[name]
