"""Draw pictures from prompts, with any number of LoRAs.

    python generate.py --prompt "a red square" --lora outputs/demo/demo.safetensors:0.8 --images 1
    python generate.py --prompt "a (red:1.3) square <lora:demo:0.8>" --sampler "DPM++ 2M SDE" --steps 30 --cfg_scale 6
    python generate.py --prompt "a cat" --hires_scale 2 --hires_denoising_strength 0.5
    python generate.py --prompt "a cat <lora:demo:1>" --x_axis "adapter weight: 0, 0.5, 1" --y_axis "sampler: Euler, UniPC"
    python generate.py --prompt_file prompts.txt

Pictures carry the parameters text that A1111 reads. Picture number i has the seed --seed + i and depends on its own seed alone.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, script
from library.inference.pictures import strength_of
from library.inference.shots import Shot, ShotList, shot_list
from library.models.locate import check_base
from library.options.generate import GenerateOptions
from library.options.parser import parse

if TYPE_CHECKING:
    from PIL import Image

    from library.inference.studio import Studio


SEEDS_LISTED = 8


@script
def main(argv: list[str]) -> int:
    options = parse(GenerateOptions, argv, prog="generate.py", description=__doc__)
    wanted = shot_list(options)
    print_plan(options, wanted)
    if options.dry_run:
        print_missing(options, wanted)
        return EXIT_OK
    for base in dict.fromkeys(shot.base for shot in wanted.shots):
        check_base(base)
    run(options, wanted)
    return EXIT_OK


def print_plan(options: GenerateOptions, wanted: ShotList) -> None:
    shots = wanted.shots
    for base in dict.fromkeys(shot.base for shot in shots):
        print(f"model      {base}")
    if options.base.vae is not None:
        print(f"vae        {options.base.vae}")
    for path in wanted.adapters:
        uses = (use for shot in shots for use in shot.request.loras if use.path == path)
        print(f"lora       {path}, weight {', '.join(dict.fromkeys(strength_of(use.weights) for use in uses))}")
    if options.base.refiner is not None:
        print(f"refiner    {options.base.refiner}, from {options.base.refiner_switch_at:.0%} of the steps on")
    begun = "" if options.passes.init_image is None else f", begun with {options.passes.init_image}"
    print(f"pictures   {said_sizes(wanted)}{begun}, {said_seeds({shot.seed for shot in shots})}")
    for sampler, schedule, steps, scale in dict.fromkeys(
        (*shot.request.sampler_and_schedule, shot.request.steps, shot.request.cfg_scale) for shot in shots
    ):
        print(f"sampler    {sampler} {schedule}, {steps} steps, cfg_scale {scale:g}")
    for hires, steps in dict.fromkeys((shot.request.hires, shot.request.hires_steps) for shot in shots):
        if hires is not None:
            print(
                f"hires      {hires.scale:g} times by {hires.upscaler}, {steps} steps, denoising strength "
                f"{hires.denoising_strength:g}"
            )
    for name, axis in zip(("columns", "rows"), wanted.axes or (), strict=False):
        if axis is not None:
            print(f"{name:10} {', '.join(axis.headings)}")
    for note in wanted.notes:
        print(f"note       {note}")
    print(f"output     {options.what.output}")


def said_sizes(wanted: ShotList) -> str:
    """ "4 of 512 x 768", or where they differ "4: 3 of 512 x 768, 1 of native x native"; sides that are not asked for are the
    first base's."""
    counts = Counter(f"{width or 'native'} x {height or 'native'}" for width, height in wanted.sizes)
    told = [f"{count} of {size}" for size, count in counts.items()]
    return told[0] if len(told) == 1 else f"{len(wanted.shots)}: {', '.join(told)}"


def said_seeds(seeds: set[int]) -> str:
    """ "seed 42", "seed 42 to 45" or "seeds 1, 43"."""
    first, last = min(seeds), max(seeds)
    if len(seeds) == 1:
        return f"seed {first}"
    if last - first + 1 == len(seeds):
        return f"seed {first} to {last}"
    listed = ", ".join(map(str, sorted(seeds)[:SEEDS_LISTED]))
    return f"seeds {listed}" if len(seeds) <= SEEDS_LISTED else f"{len(seeds)} seeds: {listed}, ..."


def print_missing(options: GenerateOptions, wanted: ShotList) -> None:
    """Which models are not on this machine."""
    from library.models.locate import base_status, refiner_status

    missing = [base_status(base) for base in dict.fromkeys(shot.base for shot in wanted.shots)]
    if options.base.vae is not None:
        missing.append(base_status(options.base.vae, ("vae",)))
    if options.base.refiner is not None:
        missing.append(refiner_status(options.base.refiner))
    for sentence in filter(None, missing):
        print(f"missing    {sentence}")


def build(options: GenerateOptions, planned: ShotList) -> tuple[Studio, ShotList]:
    """What draws, and the pictures to draw with the size that the first base gives them.

    Raises UserError where one of the models is not there, or they and the adapters do not go together.
    """
    from library.device import choose_device, choose_dtype
    from library.inference.studio import Studio

    base = options.base
    device = choose_device(base.device)
    studio = Studio(
        choose_dtype(base.dtype, device),
        device,
        vae=base.vae,
        refiner=base.refiner,
        prediction_type=base.prediction_type,
        zero_terminal_snr=base.zero_terminal_snr,
    )
    sides = studio.check(planned.shots)
    first = planned.shots[0].base
    for other, side in sides.items():
        if side != sides[first] and any(None in size for size in planned.sizes):
            print(
                f"note       {other} was trained at {side} pixels, and is drawn at the {sides[first]} of {first}: all cells have "
                "one size. Choose it with --width and --height."
            )
    return studio, shot_list(options, sides[first])


def run(options: GenerateOptions, planned: ShotList) -> list[Path]:
    """Draw and write everything; returns the files, the sheet last."""
    from library.inference.infotext import save_png

    studio, wanted = build(options, planned)
    studio.hash_ahead(shot.base for shot in wanted.shots)
    pictures: dict[Shot, Image.Image] = {}
    start = time.perf_counter()
    for batch, drawn in studio.draw(wanted.shots, options.what.batch_size):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        for shot, picture in zip(batch, drawn, strict=True):
            save_png(picture, shot.file, studio.info(shot))
            pictures[shot] = picture
            print(f"{shot.file}  {picture.width} x {picture.height}, {seconds / len(batch):.1f} s")
    files = [shot.file for shot in wanted.shots]
    if len(pictures) > 1 or wanted.axes is not None:
        save_png(sheet_of(wanted, pictures), options.what.output, studio.info(wanted.shots[0]))
        files.append(options.what.output)
        print(f"{options.what.output}  all {len(pictures)}")
    return files


def sheet_of(wanted: ShotList, pictures: dict[Shot, Image.Image]) -> Image.Image:
    """All pictures on one sheet: along the axes, or as square as it gets."""
    from library.inference.grids import grid
    from library.inference.xy_grid import sheet

    if wanted.axes is None:
        return grid(list(pictures.values()))
    return sheet(*wanted.axes, {shot.cell: picture for shot, picture in pictures.items() if shot.cell is not None})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
