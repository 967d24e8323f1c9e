"""Images a second through the cache pipeline, beside the rate of decoding alone and of encoding alone, in one run.

python benchmarks/cache_build.py [--pictures data/demo/train.csv] [--base tiny-shapes] [--dino tiny-shapes-dinov2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save

from library.caching.class_caches import Preparation
from library.caching.decoding import Job, picture_batches
from library.caching.geometry import SquareCrop
from library.data.class_pictures import open_pictures
from library.options.parser import parse
from library.options.repa import PrepareCacheOptions
from library.processes import Processes
from library.training.caches import class_preparation
from networks.families import SD15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", default="demo")
    parser.add_argument("--class_names", default=None)
    parser.add_argument("--base", default="tiny-shapes")
    parser.add_argument("--dino", default="tiny-shapes-dinov2")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--dino_resolution", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "no")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, Path(folder))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("pictures", "class_names")}
    save("cache_build", settings, measured, {})


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    argv = f"""--pretrained_model_name_or_path {arguments.base} --dino_model {arguments.dino} --train_data {arguments.pictures}
        --resolution {arguments.resolution} --dino_resolution {arguments.dino_resolution} --cache_dir {folder}
        --mixed_precision {arguments.precision} --max_data_loader_n_workers {arguments.workers}"""
    if arguments.class_names:
        argv += f" --class_names {arguments.class_names}"
    options = parse(PrepareCacheOptions, argv.split(), prog="cache_build", description="")
    pictures = open_pictures(options.classes)
    processes = Processes()
    preparation = class_preparation(options, processes, SD15)
    jobs = [Job(sample, {"latents": None, "tokens": None}) for sample in pictures.train.samples]
    batch = options.cache.cache_batch_size

    start = time.perf_counter()
    decoded = [
        part.pixels
        for part in picture_batches(
            pictures.train.source, jobs, SquareCrop(arguments.resolution), batch, arguments.workers
        )
    ]
    decoding = len(jobs) / (time.perf_counter() - start)

    encoding = len(jobs) / _encode_all(preparation, decoded, processes.device)

    said: list[Any] = []
    pictures.val = None
    start = time.perf_counter()
    preparation.prepare(pictures, rebuild=True, say=said.append)
    building = len(jobs) / (time.perf_counter() - start)
    return {
        "images": len(jobs),
        "images_per_second": building,
        "decode_only_per_second": decoding,
        "encode_only_per_second": encoding,
        # On a machine with cores to spare for decoding this approaches 1; where both share the cores it cannot.
        "share_of_the_slower": building / min(decoding, encoding),
    }


def _encode_all(preparation: Preparation, batches: list[torch.Tensor], device: torch.device) -> float:
    encoders = [preparation.encoder(kind) for kind in ("latents", "tokens")]
    with torch.no_grad():
        for encoder in encoders:
            encoder.encode(batches[0].to(device))
        start = time.perf_counter()
        for pixels in batches:
            for encoder in encoders:
                encoder.encode(pixels.to(device)).cpu()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
