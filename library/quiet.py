"""Other libraries' remarks, which a user can do nothing about, stay off the terminal, and what they load for nothing out."""

from __future__ import annotations

import logging
import os
import sys


def quiet_libraries() -> None:
    """Let diffusers, transformers and bitsandbytes report errors only. Call before anything imports them.

    transformers says which image processors need torchvision, diffusers that a list of exceptions is empty, and
    bitsandbytes that a 4-bit CPU kernel is missing; nothing here uses these. A verbosity set by the user stays.

    scikit-learn is hidden until `let_scikit_learn_in`: transformers would import it, a second at each start, for assisted
    decoding of language models.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]  # what Python reads as: not there


def let_scikit_learn_in() -> None:
    """Call before it is used."""
    if sys.modules.get("sklearn", sys) is None:
        del sys.modules["sklearn"]
