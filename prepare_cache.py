"""Encode pictures once: latents, DINOv2 tokens and prompt embeddings into LMDB stores.

    python prepare_cache.py --dataset_config trackA.toml

Interrupted and run again it continues; finished it says so. `accelerate launch` with several processes shares the work.
"""

from __future__ import annotations

import sys
import time

from library.errors import EXIT_OK, script
from library.launch import start_cpu_processes
from library.options.parser import parse
from library.options.repa import PrepareCacheOptions, TrainRepaOptions


@script
def main(argv: list[str]) -> int:
    options = parse(
        PrepareCacheOptions,
        argv,
        prog="prepare_cache.py",
        description=__doc__,
        default_config="demo.toml",
        also_known=[TrainRepaOptions],
    )
    start_cpu_processes(__file__, argv)
    return run(options)


def run(options: PrepareCacheOptions) -> int:
    from library.caching.prepare import Preparation
    from library.caching.verify import verify
    from library.data.class_pictures import open_pictures
    from library.processes import Processes

    start = time.perf_counter()
    processes = Processes(options.model.device)
    with processes.main_first():
        pictures = open_pictures(options.data)
    for one in pictures.sets:
        processes.say(f"{one.name}: {one.source.describe()}, {len(one.samples)} used")
    preparation = Preparation(
        options.model,
        options.data,
        options.cache,
        processes,
        workers=options.max_data_loader_n_workers,
        tokens=options.alignment,
    )
    if options.config.dry_run:
        for one in pictures.sets:
            for kind, state in preparation.survey(one).items():
                processes.say(f"{one.name} {kind}: {state.present} present, {len(state.work)} to make in {state.path}")
        return EXIT_OK
    caches = preparation.prepare(pictures, rebuild=True, say=processes.say)
    processes.say(f"All caches are complete ({time.perf_counter() - start:.1f} s).")
    if options.verify and processes.is_main:
        verify(preparation, pictures, caches, say=processes.say)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
