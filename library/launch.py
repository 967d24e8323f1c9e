"""Makes `accelerate launch --cpu --num_processes N` mean N processes."""

from __future__ import annotations

import os
import subprocess
import sys

from library.errors import UserError

# Set by whatever has really started several processes: torchrun, and the MPI launchers accelerate knows.
JOINED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_cpu_processes(script: str, argv: list[str]) -> None:
    """Start the script anew under torchrun where accelerate was asked for several CPU processes; return where it was not.

    accelerate 1.15 starts one process for `--cpu --num_processes N` unless it is given an MPI host file, and says nothing
    (accelerate/utils/launch.py, prepare_simple_launcher_cmd_env). It does set MASTER_PORT then, but leaves N on its
    own command line only, where this finds it. Raises UserError naming torchrun where it does not.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not asked or any(name in os.environ for name in JOINED):
        return
    import psutil

    count = number_of_processes(psutil.Process(os.getppid()).cmdline())
    if count is None:
        raise UserError(
            "accelerate launch --cpu starts one process whatever number it is asked for. Start several with "
            f"torchrun --standalone --nproc_per_node N {script} --device cpu."
        )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        script,
        *argv,
    ]
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(sys.executable, command)
    sys.exit(subprocess.call(command))


def number_of_processes(launcher: list[str]) -> int | None:
    """The value of --num_processes on accelerate's command line, if it is there."""
    for position, word in enumerate(launcher):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            value = value or (launcher[position + 1] if position + 1 < len(launcher) else "")
            return int(value) if value.isdigit() else None
    return None
