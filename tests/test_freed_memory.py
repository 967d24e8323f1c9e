"""Freed memory is used again instead of being cleared by the kernel anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from library.options.toml_file import PROJECT_ROOT

FAULTS = """
import resource, sys
from library.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def fill():
    memory = bytearray(b"1") * (64 << 20)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_second_computation_takes_the_pages_of_the_first() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.check_output(command, cwd=PROJECT_ROOT, env=environment, text=True))

    assert faults("keep") * 10 < faults("leave")
