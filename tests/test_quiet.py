"""What libraries load for nothing stays out, and comes in where it is used."""

from __future__ import annotations

import signal
import subprocess
import sys

from library.options.toml_file import PROJECT_ROOT
from tests.tools.warm import Run

CODE = """
import sys
from library.quiet import let_in, quiet_libraries
quiet_libraries()
import diffusers.models
from transformers import CLIPTextModel
for name in ("sklearn", "bitsandbytes"):
    assert not sys.modules[name], f"{name} was imported"
    let_in(name)
import bitsandbytes, sklearn
quiet_libraries()
assert sys.modules["sklearn"] is sklearn and sys.modules["bitsandbytes"] is bitsandbytes, "what is in use was hidden"
"""


def test_what_others_load_for_nothing_is_imported_where_it_is_used_and_nowhere_else() -> None:
    """In a process that called quiet_libraries() before it imported anything."""
    Run("-c", [CODE]).end()


def test_ctrl_c_while_a_script_still_imports_shows_no_traceback() -> None:
    code = "import library, os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    assert done.returncode != 0 and done.stderr == "Interrupted.\n"
    code = "import library\nraise ValueError('a defect')"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert "Traceback" in done.stderr and "a defect" in done.stderr
