"""The one way a script says no: a sentence on stderr and an exit code, never a traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import wraps

from library.progress import doing
from library.quiet import quiet_libraries

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a resumable state was saved, run the same command again
EXIT_DIVERGED = 76
EXIT_OUT_OF_MEMORY = 77


class UserError(Exception):
    """What was wrong, what was found, where, and what to do, in one sentence or two."""

    exit_code = EXIT_BAD_INPUT


class RunFailed(UserError):
    """The input was fine and the work still could not be finished (full disk, failed verification)."""

    exit_code = EXIT_FAILED


class Diverged(UserError):
    """A loss stopped being a finite number."""

    exit_code = EXIT_DIVERGED


class Stopped(UserError):
    """Somebody asked for an early end; what is needed to go on was saved."""

    exit_code = EXIT_STOPPED


def check_all(*checks: Callable[[], object]) -> None:
    """Run every check, and raise one UserError of all that they object to, a line each."""
    found: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            found |= dict.fromkeys(str(error).split("\n"))
    if found:
        raise UserError("\n".join(found))


def script(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """Make `main(argv)` return an exit code whatever happens that a user can cause.

    A UserError becomes its sentence and its code. Any other exception is a defect of this project and keeps
    its traceback, except Ctrl-C and a full GPU, which have sentences of their own.
    """

    @wraps(main)
    def run(argv: list[str]) -> int:
        quiet_libraries()
        _readable_output()
        try:
            with doing(os.path.basename(main.__code__.co_filename)):
                return main(argv) or EXIT_OK
        except UserError as error:
            start = "" if error.exit_code == EXIT_STOPPED else "error: "
            print("\n".join(f"{start}{line}" for line in str(error).split("\n")), file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("Interrupted. Nothing half-written was left; run the same command again to go on.", file=sys.stderr)
            return EXIT_STOPPED
        except BrokenPipeError:
            # Whoever read the output (head, less) has enough of it; Python would complain once more on the way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        except Exception as error:
            # torch is not imported on the way to a configuration error, so its class is known by name only.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            print(
                "error: the device is out of memory. When training, lower --train_batch_size and raise "
                "--gradient_accumulation_steps by the same factor, or turn on --gradient_checkpointing; when drawing, lower "
                f"--batch_size or the size. ({str(error).splitlines()[0]})",
                file=sys.stderr,
            )
            return EXIT_OUT_OF_MEMORY

    return run


def _readable_output() -> None:
    """Escape what the terminal's encoding has not, rather than end with a UnicodeEncodeError, as stderr does anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
