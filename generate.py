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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, check_all, script
from library.files import read_json, require_file_name, require_writable
from library.inference.picture_infotext import strength_of
from library.inference.picture_plan import PicturePlan, PlannedPicture, plan_pictures
from library.models.embedded import TINY_BASES
from library.models.header import read_metadata, read_shapes
from library.models.locate import check_base, check_refiner
from library.models.lone_vae import check_vae_name
from library.options.generate import GenerateOptions, ReferenceOptions
from library.options.parser import parse
from library.words import plural
from networks.prediction_names import FLOW_NAME, type_in_file

if TYPE_CHECKING:
    from PIL import Image

    from library.inference.drawing_session import DrawingSession
    from library.inference.reference import ReferenceHeads
    from library.models.locate import BaseLocation


SEEDS_LISTED = 8


@script
def main(argv: list[str]) -> int:
    options = parse(GenerateOptions, argv, prog="generate.py", description=__doc__)
    plan = plan_pictures(options)
    print_plan(options, plan)
    check(options, plan)
    if options.dry_run:
        try_out(options, plan)
    else:
        run(options, plan)
    return EXIT_OK


def print_plan(options: GenerateOptions, plan: PicturePlan) -> None:
    for base in dict.fromkeys(picture.base for picture in plan.pictures):
        print(f"model      {base}")
    if options.models.vae is not None:
        print(f"vae        {options.models.vae}")
    if options.fusion.text_fusion is not None:
        print(f"fusion     {options.fusion.text_fusion}")
    for path in plan.adapters:
        uses = (use for picture in plan.pictures for use in picture.request.loras if use.path == path)
        print(f"lora       {path}, weight {', '.join(dict.fromkeys(strength_of(use.weights) for use in uses))}")
    if options.models.refiner is not None:
        print(f"refiner    {options.models.refiner}, from {options.models.refiner_switch_at:.0%} of the steps on")
    start = "" if options.passes.init_image is None else f", drawn over {options.passes.init_image}"
    print(f"pictures   {sizes_text(plan)}{start}, {seeds_text({picture.seed for picture in plan.pictures})}")
    requests = list(dict.fromkeys(picture.request for picture in plan.pictures))
    for sampler, schedule, steps, scale in dict.fromkeys(
        (*request.sampler_and_schedule, request.steps, request.cfg_scale) for request in requests
    ):
        print(f"sampler    {sampler} {schedule}, {plural(steps, 'step')}, cfg_scale {scale:g}")
    for hires, steps in dict.fromkeys((request.hires, request.hires_steps) for request in requests):
        if hires is not None:
            print(
                f"hires      {hires.scale:g} times by {hires.upscaler}, {plural(steps, 'step')}, denoising strength "
                f"{hires.denoising_strength:g}"
            )
    for reference in dict.fromkeys(request.reference for request in requests):
        if reference is not None:
            low, high = reference.window
            print(
                f"reference  {reference.photo} by the AlignHeads of {reference.state}, strength {reference.strength:g} where noise "
                f"is {low:g} to {high:g}"
            )
    for name, axis in zip(("columns", "rows"), plan.axes or (), strict=False):
        if axis is not None:
            print(f"{name:10} {', '.join(axis.headings)}")
    for note in plan.notes:
        print(f"note       {note}")
    print(f"output     {options.pictures.output}")


def sizes_text(plan: PicturePlan) -> str:
    """ "4 of 512 x 768 pixels", or where they differ "4: 3 of 512 x 768 pixels, 1 at the base's own size"."""
    counts = Counter(map(size_text, plan.sizes))
    texts = [f"{count} {size}" for size, count in counts.items()]
    return texts[0] if len(texts) == 1 else f"{len(plan.pictures)}: {', '.join(texts)}"


def size_text(size: tuple[int | None, int | None]) -> str:
    """ "of 512 x 768 pixels"; a side that the user did not give is the base's own."""
    if size == (None, None):
        return "at the base's own size"
    width, height = (side or "the base's own" for side in size)
    return f"of {width} x {height} pixels"


def seeds_text(seeds: set[int]) -> str:
    """ "seed 42", "seed 42 to 45" or "seeds 1, 43"."""
    first, last = min(seeds), max(seeds)
    if len(seeds) == 1:
        return f"seed {first}"
    if last - first + 1 == len(seeds):
        return f"seed {first} to {last}"
    listed = ", ".join(map(str, sorted(seeds)[:SEEDS_LISTED]))
    return f"seeds {listed}" if len(seeds) <= SEEDS_LISTED else f"{len(seeds)} seeds: {listed}, ..."


def check(options: GenerateOptions, plan: PicturePlan) -> None:
    """Raise UserError for what can be refused by names alone: models that are nowhere, a device that is not there."""
    checks: list[Callable[[], object]] = [
        partial(check_base, base) for base in dict.fromkeys(picture.base for picture in plan.pictures)
    ]
    if options.models.vae is not None:
        checks.append(partial(check_vae_name, options.models.vae))
    if options.models.refiner is not None:
        checks.append(partial(check_refiner, options.models.refiner))
    checks.append(partial(require_writable, options.pictures.output.parent))
    longest = max(
        (options.pictures.output, *(picture.file for picture in plan.pictures)), key=lambda file: len(file.name)
    )
    checks.append(partial(require_file_name, longest))
    if options.models.device is not None:
        from library.device import choose_device

        checks.append(partial(choose_device, options.models.device))
    check_all(*checks)


def try_out(options: GenerateOptions, plan: PicturePlan) -> None:
    """What the run would stop at, as far as the models are on this machine; which of them are not. Reads headers alone."""
    from library.models.base_family import check_headers
    from library.models.locate import base_status, locate_base, refiner_status
    from library.models.lone_vae import vae_status

    models = options.models
    bases = dict.fromkeys(picture.base for picture in plan.pictures)
    absent = {base: sentence for base in bases if (sentence := base_status(base))}
    vae = None if models.vae is None else vae_status(models.vae)
    refiner = None if models.refiner is None else refiner_status(models.refiner)
    fusion = None
    if options.fusion.text_fusion is not None:
        from library.models.text_fusion import fusion_status

        fusion = fusion_status(options.fusion)
    for sentence in filter(None, [*absent.values(), vae, refiner, fusion]):
        print(f"missing    {sentence}")
    there = [picture for picture in plan.pictures if picture.base not in absent]
    located = [locate_base(base) for base in bases if base not in (*absent, *TINY_BASES)]
    requests = [picture.request for picture in there]
    more = (
        plan.adapters
        or options.reference.align_state
        or models.vae
        or models.refiner
        or options.fusion.text_fusion
        or any(one.clip_skip > 1 or one.flow_shift for one in requests)
    )
    if more or not all(map(has_betas, located)):
        session = new_session(options)
        session.vae, session.refiner = (None if vae else models.vae), (None if refiner else models.refiner)
        if session.heads is not None:
            if sentence := session.heads.missing():
                print(f"missing    {sentence}")
            else:
                session.heads.check_teacher()
        session.check(there)
        check_all(*(partial(session.adapter, path) for path in plan.adapters))  # those of bases that are not there, too
    else:  # without torch
        check_all(*(partial(check_headers, location) for location in located))


def has_betas(base: BaseLocation) -> bool:
    """Whether a base has an ordinary noise schedule, so that no table need be asked about it."""
    if base.is_file:
        return type_in_file(read_shapes(base.path), read_metadata(base.path)) != FLOW_NAME.scheduler
    return "beta_schedule" in read_json(base.path / "scheduler" / "scheduler_config.json")


def new_session(options: GenerateOptions) -> DrawingSession:
    from library.device import choose_device, choose_dtype
    from library.inference.drawing_session import DrawingSession

    models = options.models
    device = choose_device(models.device)
    return DrawingSession(
        choose_dtype(models.dtype, device),
        device,
        vae=models.vae,
        refiner=models.refiner,
        prediction_type=models.prediction_type,
        zero_terminal_snr=models.zero_terminal_snr,
        fusion=options.fusion,
        heads=read_reference_heads(options.reference),
    )


def read_reference_heads(options: ReferenceOptions) -> ReferenceHeads | None:
    from library.evaluation.feature_model import reference_heads

    return None if options.align_state is None else reference_heads(options.align_state, options.dino_model)


def build(options: GenerateOptions, plan: PicturePlan) -> tuple[DrawingSession, PicturePlan]:
    """The session that draws, and the plan with the first base's own size filled in.

    Raises UserError where a model is missing, or the models and adapters do not fit each other.
    """
    session = new_session(options)
    sides = session.check(plan.pictures)
    if session.heads is not None:
        session.heads.check_teacher()
    first = plan.pictures[0].base
    for other, side in sides.items():
        if side != sides[first] and any(None in size for size in plan.sizes):
            print(
                f"note       {other} was trained at {side} pixels, but is drawn at the {sides[first]} of {first}: all cells "
                "have one size. Choose it with --width and --height."
            )
    plan = plan_pictures(options, sides[first])
    plan.pictures = [session.as_drawn(picture) for picture in plan.pictures]
    for base, shift in dict.fromkeys((picture.base, picture.request.flow_shift) for picture in plan.pictures):
        if shift is not None:
            print(f"flow       {base} ({session.kind(base)}), drawn along a rectified flow with shift {shift:g}")
    return session, plan


def run(options: GenerateOptions, plan: PicturePlan) -> list[Path]:
    """Draw and write all pictures and the sheet; returns the files, the sheet last."""
    from library.inference.infotext import save_png

    session, plan = build(options, plan)
    session.hash_ahead(planned.base for planned in plan.pictures)
    pictures: dict[PlannedPicture, Image.Image] = {}
    start = time.perf_counter()
    for batch, drawn in session.draw(plan.pictures, options.pictures.batch_size):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        for planned, picture in zip(batch, drawn, strict=True):
            save_png(picture, planned.file, session.infotext(planned))
            pictures[planned] = picture
            print(f"{planned.file}  {picture.width} x {picture.height}, {seconds / len(batch):.1f} s")
    files = [planned.file for planned in plan.pictures]
    if len(pictures) > 1 or plan.axes is not None:
        save_png(sheet_of(plan, pictures), options.pictures.output, session.infotext(plan.pictures[0]))
        files.append(options.pictures.output)
        print(f"{options.pictures.output}  the sheet of {plural(len(pictures), 'picture')}")
    return files


def sheet_of(plan: PicturePlan, pictures: dict[PlannedPicture, Image.Image]) -> Image.Image:
    """All pictures on one sheet: along the axes, or in a grid as square as possible."""
    from library.inference.grids import grid
    from library.inference.xy_grid import sheet

    if plan.axes is None:
        return grid(list(pictures.values()))
    return sheet(
        *plan.axes, {planned.cell: picture for planned, picture in pictures.items() if planned.cell is not None}
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
