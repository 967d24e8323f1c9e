"""Images a second through the cache pipeline, beside the rate of decoding alone and of encoding alone, in one run.

python benchmarks/cache_build.py [--pictures data/demo/train.csv] [--base tiny-shapes] [--dino tiny-shapes-dinov2]
python benchmarks/cache_build.py --decode_bound [--count 1000]

The second is what a fast GPU sees: JPEGs of 1024 and 3000 pixels into latents of captioned pictures with an encoder that costs
nothing, beside processes on the same cores that decode and cut the same files and do nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save
from PIL import Image

from library.caching.by_bucket import BucketedPicture, BucketKind, FlippingEncoder, fill_stores, plan_stores
from library.caching.class_caches import Preparation
from library.caching.decoding import Job, picture_batches
from library.caching.geometry import SquareCrop
from library.caching.producers import Wanted
from library.data.buckets import Buckets, Size, resize_and_crop
from library.data.class_pictures import open_pictures
from library.data.image_headers import read_header
from library.data.pixels import decode_rgb
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
    parser.add_argument("--decode_bound", action="store_true")
    parser.add_argument("--count", type=int, default=1000, help="JPEGs of 1024 pixels; of 3000 a tenth of it")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.decode_bound:
            settings = {name: getattr(arguments, name) for name in ("count", "repeats", "workers")}
            save("cache_decode", settings, *decode_bound(arguments, Path(folder)))
            return
        measured = measure(arguments, Path(folder))
    of_the_other = ("pictures", "class_names", "decode_bound", "count", "repeats")
    settings = {name: value for name, value in vars(arguments).items() if name not in of_the_other}
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


# ------------------------------------------------------------------------------------------------ decoding alone


class Nothing:
    """An encoder that costs nothing."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        count, _, height, width = pixels.shape
        return torch.zeros(count, 8, height // 8, width // 8, dtype=torch.float16)


def decode_bound(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Pictures a second, and CPU seconds a thousand pictures, of the pipeline and of decoding alone, in turn."""
    measured: dict[str, object] = {}
    sets = {
        1024: jpegs(folder, arguments.count, (1024, 1024)),
        3000: jpegs(folder, arguments.count // 10, (3000, 2000)),
    }
    for side, resolution in ((1024, 1024), (1024, 512), (3000, 1024)):
        rounds = []
        for _ in range(arguments.repeats):
            pictures, name = bucketed(sets[side], resolution), f"{side}_to_{resolution}"
            rounds.append(
                timed(lambda: decode_alone(pictures, arguments.workers))  # noqa: B023  # called at once
                + timed(lambda: through_pipeline(pictures, arguments.workers, folder / name))  # noqa: B023
            )
        alone, alone_cpu, whole, whole_cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
        count = len(sets[side])
        measured |= {
            f"{name}_decode_only_per_second": count / alone,
            f"{name}_pipeline_per_second": count / whole,
            f"{name}_share": statistics.median(one[0] / one[2] for one in rounds),
            f"{name}_decode_only_cpu_seconds_per_1000": 1000 * alone_cpu / count,
            f"{name}_pipeline_cpu_seconds_per_1000": 1000 * whole_cpu / count,
        }
    share = measured["1024_to_1024_share"]
    return measured, {"1024_to_1024_share": {"at_least": 0.9, "met": share >= 0.9}}  # type: ignore[operator]


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of those that it started and that have ended."""
    before, start = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


def jpegs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Files of some two bits a pixel, as photographs have at quality 90."""
    place = folder / "x".join(map(str, size))
    place.mkdir()
    paths = [place / f"{number:04d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        rng = np.random.default_rng(number % 16)  # so many different ones will do
        if number >= 16:
            path.write_bytes(paths[number % 16].read_bytes())
            continue
        coarse = rng.integers(0, 256, (size[1] // 64, size[0] // 64, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)
        image = image + rng.normal(0, 6, (size[1], size[0], 1))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def bucketed(paths: list[Path], resolution: int) -> list[BucketedPicture]:
    buckets = Buckets((resolution, resolution))
    return [BucketedPicture(path.name, path, buckets.fit(*read_header(path).size), None, False) for path in paths]


def decode_alone(pictures: list[BucketedPicture], workers: int) -> None:
    """Each process its share of the pictures, from the file to the pixels of the bucket, which nobody gets."""

    def work(share: list[BucketedPicture]) -> None:
        for picture in share:
            image = decode_rgb(picture.path, name=str(picture.path))
            resize_and_crop(image, picture.fitted, None)

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=work, args=(pictures[rank::workers],)) for rank in range(workers)]
    for process in started:
        process.start()
    for process in started:
        process.join()


def through_pipeline(pictures: list[BucketedPicture], workers: int, cache_dir: Path) -> None:
    shutil.rmtree(cache_dir, ignore_errors=True)
    producer = {"value": "nothing"}

    def wanted(bucket: Size) -> Wanted:
        return Wanted("moments", "float16", (8, bucket[1] // 8, bucket[0] // 8), producer)

    kind = BucketKind("latents", "moments", cache_dir, producer, "VAE", wanted)
    encoder = FlippingEncoder(Nothing)
    processes = Processes("cpu")
    fill_stores(
        plan_stores(pictures, kind),
        kind,
        encoder,
        batch_size=8,
        workers=workers,
        processes=processes,
        say=lambda *_: None,
    ).close()


if __name__ == "__main__":
    main()
