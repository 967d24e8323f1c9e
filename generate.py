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
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, script
from library.inference.shots import Shot, ShotList, shot_list
from library.options.generate import GenerateOptions, split_weight
from library.options.parser import parse

if TYPE_CHECKING:
    from PIL import Image

    from library.inference.studio import Studio


@script
def main(argv: list[str]) -> int:
    options = parse(GenerateOptions, argv, prog="generate.py", description=__doc__)
    wanted = shot_list(options)
    print_plan(options, wanted)
    if options.dry_run:
        print_missing(wanted)
        return EXIT_OK
    run(options, wanted.shots[0].base)
    return EXIT_OK


def print_plan(options: GenerateOptions, wanted: ShotList) -> None:
    what, shots = options.what, wanted.shots
    for base in dict.fromkeys(shot.base for shot in shots):
        print(f"model      {base}")
    for path in wanted.adapters:
        weight = dict(map(split_weight, options.base.lora)).get(path)
        print(f"lora       {path}{', weight as the prompt says' if weight is None else f', weight {weight:g}'}")
    if options.base.refiner is not None:
        print(f"refiner    {options.base.refiner}, from {options.base.refiner_switch_at:.0%} of the steps on")
    seeds = sorted({shot.seed for shot in shots})
    size = f"{what.width or 'native'} x {what.height or 'native'}"
    if options.passes.init_image is not None:
        size = f"{shots[0].request.width} x {shots[0].request.height}, begun with {options.passes.init_image}"
    to_last = f" to {seeds[-1]}" if len(seeds) > 1 else ""
    print(f"pictures   {len(shots)} of {size}, seed {seeds[0]}{to_last}")
    for sampler, schedule, steps, scale in dict.fromkeys(
        (*shot.request.sampler_and_schedule, shot.request.steps, shot.request.cfg_scale) for shot in shots
    ):
        print(f"sampler    {sampler} {schedule}, {steps} steps, cfg_scale {scale:g}")
    if (hires := shots[0].request.hires) is not None:
        print(
            f"hires      {hires.scale:g} times by {hires.upscaler}, {shots[0].request.hires_steps} steps, denoising strength "
            f"{hires.denoising_strength:g}"
        )
    for name, axis in zip(("columns", "rows"), wanted.axes or (), strict=False):
        if axis is not None:
            print(f"{name:10} {', '.join(axis.headings)}")
    for note in wanted.notes:
        print(f"note       {note}")
    print(f"output     {what.output}")


def print_missing(wanted: ShotList) -> None:
    """Which bases are not on this machine."""
    from library.models.locate import base_status

    for base in dict.fromkeys(shot.base for shot in wanted.shots):
        if missing := base_status(base):
            print(f"missing    {missing}")


def build(options: GenerateOptions, first: str) -> tuple[Studio, ShotList]:
    """The `first` base, loaded, and the pictures to draw, whose size it may decide."""
    from library.device import choose_device, choose_dtype
    from library.inference.studio import Studio
    from library.inference.text_to_image import native_size

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
    return studio, shot_list(options, native_size(studio.model(first)))


def run(options: GenerateOptions, first: str) -> list[Path]:
    """Draw and write everything; returns the files, the grid last."""
    from library.inference.infotext import save_png

    studio, wanted = build(options, first)
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
    if len(pictures) > 1:
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
