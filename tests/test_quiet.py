"""What libraries load for nothing stays out, and comes in where it is used."""

from __future__ import annotations

from tests.tools.warm import Run

CODE = """
import sys
from library.quiet import let_scikit_learn_in, quiet_libraries
from transformers import CLIPTextModel
assert not sys.modules["sklearn"], "transformers imported scikit-learn"
let_scikit_learn_in()
import sklearn
quiet_libraries()
assert sys.modules["sklearn"] is sklearn, "what is in use was hidden"
"""


def test_scikit_learn_is_imported_where_it_is_used_and_nowhere_else() -> None:
    """In a process that called quiet_libraries() before it imported anything."""
    Run("-c", [CODE]).end()
