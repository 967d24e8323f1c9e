"""The options of generate.py as a list of pictures to draw. No torch: what is wrong is said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from library.errors import UserError
from library.inference.find_adapters import AdapterFolders, loras_of
from library.inference.prompt_file import PromptLine, read_prompt_file
from library.inference.prompt_networks import cut_out_networks
from library.inference.prompt_syntax import unbalanced_brackets
from library.inference.request import Hires, Request, request_of
from library.inference.upscaling import find_upscaler
from library.inference.xy_grid import Axis, Cell, changed, parse_axis, plan_cells
from library.options.checks import require
from library.options.generate import IMAGES, GenerateOptions, split_weight

OUTPUTS = Path("outputs")
# Stands for the base's own size as long as the base is not loaded.
_ANY_SIZE = 512
_SIZE_STEP = 8


@dataclass(frozen=True)
class Shot:
    """One picture: a request with a base, a seed and a place."""

    base: str
    request: Request
    seed: int
    file: Path
    cell: tuple[int, int] | None = None
    """column and row, on a sheet with axes"""


@dataclass
class ShotList:
    shots: list[Shot]
    axes: tuple[Axis, Axis | None] | None = None
    sizes: list[tuple[int | None, int | None]] = field(default_factory=list)
    """Of each shot: width and height as they were asked for. None: the base decides."""
    notes: list[str] = field(default_factory=list)
    """What a user should know before drawing."""

    @property
    def adapters(self) -> list[Path]:
        """The files of all adapters, in the order of their first use."""
        return list(dict.fromkeys(use.path for shot in self.shots for use in shot.request.loras))


def shot_list(options: GenerateOptions, native: int | None = None) -> ShotList:
    """native: the side in pixels that the base was trained at, once it is known.

    Raises UserError for all that can be found wrong without the base: names, prompts, adapters that are not there.
    """
    what, axes = options.what, _axes(options)
    found = ShotList([], axes)
    folders = AdapterFolders(_folders(options), [split_weight(text)[0] for text in options.base.lora])
    if what.prompt_file is None:
        lines = [PromptLine(what.prompt or "")]
    else:
        lines = read_prompt_file(what.prompt_file, found.notes)
    count = what.images or (IMAGES if what.prompt_file is None and axes is None else 1)
    for number, line in enumerate(lines):
        size = _size(options, line)
        request = _request(options, line, size, native or _ANY_SIZE)
        first = what.seed + number * count if line.seed is None else line.seed
        if axes is not None:
            found.shots += _cells(options, request, first, axes, folders, found.notes)
        else:
            request = _with_adapters(options, request, folders, found.notes)
            base = options.base.pretrained_model_name_or_path
            found.shots += [
                Shot(base, request, seed, _file(options, None if len(lines) * count == 1 else (number, seed)))
                for seed in range(first, first + count)
            ]
        found.sizes += [size] * (len(found.shots) - len(found.sizes))
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _file(options: GenerateOptions, place: tuple[int, int] | None) -> Path:
    """Of a picture of several, at (line, seed); a lone one is the output itself."""
    if place is None:
        return options.what.output
    number, seed = place
    words = [options.what.output.stem, *([f"{number:02d}"] if options.what.prompt_file is not None else []), str(seed)]
    return options.what.output.with_name(f"{'_'.join(words)}.png")


def _axes(options: GenerateOptions) -> tuple[Axis, Axis | None] | None:
    x, y = options.sheet.x_axis, options.sheet.y_axis
    if x is None and y is None:
        return None
    require(options.what.prompt_file is None, "x_axis", "and y_axis are for one prompt, not for a prompt_file.")
    require(
        options.what.images in (None, 1),
        "images",
        "must be 1 with axes. For several pictures take a seed axis: seed: 1-4.",
    )
    if x is None or y is None:
        return parse_axis(x or y or ""), None
    return parse_axis(x), parse_axis(y)


def _cells(
    options: GenerateOptions,
    request: Request,
    seed: int,
    axes: tuple[Axis, Axis | None],
    folders: AdapterFolders,
    notes: list[str],
) -> list[Shot]:
    cells = plan_cells(*axes, prompt=request.prompt, negative_prompt=request.negative_prompt)
    return [_cell_shot(options, request, seed, cell, folders, notes) for cell in cells]


def _cell_shot(
    options: GenerateOptions, request: Request, seed: int, cell: Cell, folders: AdapterFolders, notes: list[str]
) -> Shot:
    changes: Mapping[str, Any] = cell.changes
    own = _with_adapters(options, changed(request, changes), folders, notes, changes.get("adapter_weight"))
    if "adapter_weight" in changes and not own.loras:
        raise UserError("An axis of adapter weights needs an adapter: name one with --lora or in the prompt.")
    _check(own)
    name = f"{options.what.output.stem}_x{cell.column + 1}_y{cell.row + 1}.png"
    return Shot(
        changes.get("checkpoint", options.base.pretrained_model_name_or_path),
        own,
        changes.get("seed", seed),
        options.what.output.with_name(name),
        (cell.column, cell.row),
    )


def _request(options: GenerateOptions, line: PromptLine, size: tuple[int | None, int | None], native: int) -> Request:
    """A line's request but for its adapters."""
    passes = options.passes
    width, height = (side or native // _SIZE_STEP * _SIZE_STEP for side in size)
    hires = None
    if passes.hires_scale is not None:
        hires = Hires(passes.hires_scale, passes.hires_upscaler, passes.hires_steps, passes.hires_denoising_strength)
    request = replace(
        request_of(line, options.sampling, width=width, height=height, negative_prompt=options.what.negative_prompt),
        hires=hires,
        init_image=passes.init_image,
        denoising_strength=passes.denoising_strength,
        refiner_switch_at=None if options.base.refiner is None else options.base.refiner_switch_at,
    )
    _check(request)
    return request


def _check(request: Request) -> None:
    """Raises UserError for names and sizes that cannot be."""
    request.sampler_and_schedule  # noqa: B018
    if request.hires is not None:
        find_upscaler(request.hires.upscaler)
        request.final_size  # noqa: B018


def _with_adapters(
    options: GenerateOptions, request: Request, folders: AdapterFolders, notes: list[str], weight: float | None = None
) -> Request:
    """The request with those its prompt and --lora ask for. weight: of all of --lora, instead of their own."""
    given = {path: own if weight is None else weight for path, own in map(split_weight, options.base.lora)}
    for text, is_negative in ((request.prompt, False), (request.negative_prompt, True)):
        if note := unbalanced_brackets(cut_out_networks(text)[0], negative=is_negative):
            notes.append(note)
    if request.negative_prompt and not request.is_guided:
        notes.append("The negative prompt has no effect without guidance (cfg_scale 1).")
    if tags := cut_out_networks(request.negative_prompt)[1]:
        notes.append(f"{', '.join(map(str, tags))} of the negative prompt left out: adapters act on the whole picture.")
    return replace(request, loras=loras_of(request.prompt, folders, given, notes))


def _folders(options: GenerateOptions) -> Sequence[Path]:
    return options.base.lora_dir or ([OUTPUTS] if OUTPUTS.is_dir() else [])


def _size(options: GenerateOptions, line: PromptLine) -> tuple[int | None, int | None]:
    """What the line says, else the options, else the picture to begin with."""
    width, height = line.width or options.what.width, line.height or options.what.height
    if options.passes.init_image is not None:
        begin = picture_size(options.passes.init_image)
        width, height = (
            side or own // _SIZE_STEP * _SIZE_STEP for side, own in zip((width, height), begin, strict=True)
        )
    return width, height


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file, upright. Raises UserError."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"init_image {path} cannot be read: {error}.") from None
