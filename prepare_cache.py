"""Encode pictures once: latents, DINOv2 tokens and prompt embeddings into LMDB stores.

    python prepare_cache.py --dataset_config trackA.toml
    python prepare_cache.py --teacher_latents data/drawn --teacher_prompts prompts.txt    # latents that the base draws itself

Interrupted and run again it continues; finished it says so. `accelerate launch` with several processes shares the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from library.errors import EXIT_OK, check_all, script
from library.files import require_writable
from library.launch import start_cpu_processes
from library.options.checks import require
from library.options.parser import parse
from library.options.repa import REPA, PrepareCacheOptions
from library.training.inputs import input_checks


@script
def main(argv: list[str]) -> int:
    options = parse(
        PrepareCacheOptions,
        argv,
        prog="prepare_cache.py",
        description=__doc__,
        default_config="demo.toml",
        dialect=REPA,
    )
    require(not options.config.report, "report", "is train_repa.py's: its --dry_run looks at the pictures.")
    if options.drawing.teacher_latents is not None:
        check_all(*teacher_checks(options, options.drawing.teacher_latents))
        start_cpu_processes(__file__, argv)
        return draw(options)
    check_all(*input_checks(options), lambda: require_writable(options.cache.cache_dir))
    start_cpu_processes(__file__, argv)
    return run(options)


def teacher_checks(options: PrepareCacheOptions, store: Path) -> list[Callable[[], object]]:
    """Whether base, prompts and sampler are there, without torch."""
    from library.inference.prompt_file import read_prompt_file
    from library.inference.sampler_names import sampler_named
    from library.models.locate import check_base

    o = options.drawing
    assert o.teacher_prompts is not None
    return [
        partial(check_base, options.model.pretrained_model_name_or_path),
        partial(read_prompt_file, o.teacher_prompts),
        partial(sampler_named, o.teacher_sampler),
        partial(require_writable, store),
        partial(require_writable, options.cache.cache_dir),
    ]


def draw(options: PrepareCacheOptions) -> int:
    from library.models.locate import locate_base
    from library.processes import Processes
    from library.training.teacher_latents import prepare_teacher_latents

    processes = Processes(options.model.device)
    with processes.main_first():
        base = locate_base(options.model.pretrained_model_name_or_path)
    prepare_teacher_latents(options, base, processes, processes.say)
    return EXIT_OK


def run(options: PrepareCacheOptions) -> int:
    from library.caching.verify import verify
    from library.models.base_family import family_of
    from library.models.locate import locate_base
    from library.processes import Processes
    from library.training.caches import class_preparation, prepare_caches
    from library.training.inputs import check_vae_fits
    from library.training.pictures import collect_pictures, print_data

    start = time.perf_counter()
    processes = Processes(options.model.device)
    with processes.main_first():
        base = locate_base(
            options.model.pretrained_model_name_or_path, ("vae",) if options.class_pictures is not None else None
        )
        data = collect_pictures(options, base)
    family = family_of(base)
    check_vae_fits(options, family)
    if processes.is_main:
        print_data(data)
    if data.classes is None:
        if options.config.dry_run:
            return EXIT_OK
        prepare_caches(options, processes, base, family, data).close()
        processes.say(f"All caches are complete ({time.perf_counter() - start:.1f} s).")
        return EXIT_OK
    preparation = class_preparation(options, processes, family)
    if options.config.dry_run:
        for pictures in data.classes.sets:
            for name, state in preparation.survey(pictures).items():
                processes.say(
                    f"{pictures.name} {name}: {state.present} present, {len(state.work)} to make in {state.path}"
                )
        return EXIT_OK
    caches = preparation.prepare(data.classes, rebuild=True, say=processes.say)
    processes.say(f"All caches are complete ({time.perf_counter() - start:.1f} s).")
    if options.verify and processes.is_main:
        verify(preparation, data.classes, caches, say=processes.say)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
