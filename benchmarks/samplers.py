"""Seconds of a picture of one step by every sampler, at full size with random weights, by the engine of generate.py.

    python benchmarks/samplers.py --family sd15
    python benchmarks/samplers.py --family sdxl
    python benchmarks/samplers.py --base tiny-sd15 --size 64

The base is loaded once. Also the proof that every sampler draws finite pictures at full size, which is too slow for a test; the
exit code is 1 where one does not.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save
from full_size import random_base

from library.errors import script

PROMPT, NEGATIVE_PROMPT = "a photo of a cat on a chair", "blurry"
CFG_SCALE = 7.0


@script
def main(argv: list[str]) -> int:
    from library.inference.sampler_names import SAMPLER_NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15", help="of the full-size base")
    parser.add_argument("--base", default=None, help="a base to use instead, by name or path; nothing random is made")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "float"), default="bf16", help="what the base computes in")
    parser.add_argument("--folder", default=None, help="where the random base is kept, 2 GB or 7 GB; default: nowhere")
    parser.add_argument("--name", default=None, help="of the result; default by base, size and device")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or str(random_base(Path(arguments.folder or folder), arguments.family))
        settings, measured = measure(arguments, base)
    all_drew = measured["samplers_that_drew"] == len(SAMPLER_NAMES)
    what = arguments.family if arguments.base is None else Path(base).stem
    name = arguments.name or f"samplers_{what}_{arguments.size}_{'cpu' if settings['device'] == 'cpu' else 'gpu'}"
    save(name, settings, measured, {"samplers_that_drew": {"at_least": len(SAMPLER_NAMES), "met": all_drew}})
    return 0 if all_drew else 1


def measure(arguments: argparse.Namespace, base: str) -> tuple[dict[str, Any], dict[str, float]]:
    """One picture by each sampler, after one to warm up."""
    import torch

    from library.device import choose_device, choose_dtype
    from library.inference.drawing_session import DrawingSession
    from library.inference.sampler_names import SAMPLER_NAMES

    device = choose_device(None)
    session = DrawingSession(choose_dtype(arguments.dtype, device), device)
    start = time.perf_counter()
    family = session.model(base).family
    measured = {"load_seconds": time.perf_counter() - start}
    for what, sampler in [("first_picture", SAMPLER_NAMES[0]), *((name, name) for name in SAMPLER_NAMES)]:
        seconds = seconds_of(session, base, sampler, arguments)
        print(f"{what:14} {'failed' if seconds is None else f'{seconds:.2f} s'}", flush=True)
        if seconds is not None:
            measured[f"{what}_seconds"] = seconds
    measured["samplers_that_drew"] = sum(f"{name}_seconds" in measured for name in SAMPLER_NAMES)
    measured["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if device.type == "cuda":
        measured["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    settings = {
        "family": family.key,
        "base": arguments.base or "full size, random weights",
        "size": arguments.size,
        "steps": arguments.steps,
        "cfg_scale": CFG_SCALE,
        "dtype": arguments.dtype,
        "device": device.type,
    }
    return settings, measured


def seconds_of(session: Any, base: str, sampler: str, arguments: argparse.Namespace) -> float | None:
    """Of one picture; None where it is not finite, or not of the size that was asked for."""
    from library.errors import RunFailed
    from library.inference.picture_plan import PlannedPicture
    from library.inference.picture_request import PictureRequest

    size = arguments.size
    request = PictureRequest(PROMPT, NEGATIVE_PROMPT, arguments.steps, CFG_SCALE, size, size, sampler=sampler)
    start = time.perf_counter()
    try:
        ((_, (picture,)),) = session.draw([PlannedPicture(base, request, seed=1, file=Path("unwritten.png"))])
    except RunFailed as error:
        print(f"{sampler}: {error}")
        return None
    seconds = time.perf_counter() - start
    return seconds if picture.size == (size, size) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
