"""The options of generate.py as a list of pictures to draw. No torch: mistakes are found before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from library.errors import UserError
from library.inference.find_adapters import AdapterFolders, loras_of
from library.inference.lora_tags import cut_out_tags
from library.inference.picture_request import Hires, PictureRequest, Reference, open_picture, request_of
from library.inference.prompt_file import PromptLine, note_on_switches, read_prompt_file
from library.inference.prompt_syntax import unbalanced_brackets
from library.inference.upscaling import SIZE_STEP, find_upscaler
from library.inference.xy_grid import Axis, Cell, changed, parse_axis, plan_cells
from library.options.checks import require
from library.options.generate import GUIDANCE, IMAGES, GenerateOptions, split_weight

OUTPUTS = Path("outputs")
IN_PROMPT = (
    "switches are for prompt files. Beside --prompt, options do the same: --width, --height, --seed, --steps, --cfg_scale, "
    "--negative_prompt, --sampler."
)
# The side in pixels of a base whose native size is not known yet.
_ASSUMED_SIDE = 512


@dataclass(frozen=True)
class PlannedPicture:
    """A request with the base and the seed to draw it with, and the file to write."""

    base: str
    request: PictureRequest
    seed: int
    file: Path
    cell: tuple[int, int] | None = None
    """column and row, on a sheet with axes"""


@dataclass
class PicturePlan:
    pictures: list[PlannedPicture]
    axes: tuple[Axis, Axis | None] | None = None
    sizes: list[tuple[int | None, int | None]] = field(default_factory=list)
    """Width and height of each picture as the user gave them; None where the base decides."""
    notes: list[str] = field(default_factory=list)
    """Sentences that the user should read before drawing begins."""

    @property
    def adapters(self) -> list[Path]:
        """The files of all adapters, in the order of their first use."""
        return list(dict.fromkeys(use.path for picture in self.pictures for use in picture.request.loras))


def plan_pictures(options: GenerateOptions, native: int | None = None) -> PicturePlan:
    """The pictures that the options ask for. native: the side in pixels that the base was trained at, once it is known.

    Raises UserError for every mistake that can be found without the base: unknown names, bad prompts, missing adapters.
    """
    return _Planner(options, native or _ASSUMED_SIDE).plan()


class _Planner:
    def __init__(self, options: GenerateOptions, native: int) -> None:
        self.options, self.native = options, native
        self.output, self.base = options.pictures.output, options.models.pretrained_model_name_or_path
        folders = options.models.lora_dir or ([OUTPUTS] if OUTPUTS.is_dir() else [])
        self.folders = AdapterFolders(folders, [split_weight(text)[0] for text in options.models.lora])
        self.notes: list[str] = []

    def plan(self) -> PicturePlan:
        given, axes = self.options.pictures, _axes(self.options)
        if given.prompt is not None and (note := note_on_switches(given.prompt, IN_PROMPT)):
            self.notes.append(note)
        lines = (
            [PromptLine(given.prompt or "")]
            if given.prompt_file is None
            else read_prompt_file(given.prompt_file, self.notes)
        )
        count = given.images or (IMAGES if given.prompt_file is None and axes is None else 1)
        plan = PicturePlan([], axes)
        for number, line in enumerate(lines):
            size = self._size(line)
            request = self._request(line, size)
            first = given.seed + number * count if line.seed is None else line.seed
            if axes is not None:
                cells = plan_cells(*axes, prompt=request.prompt, negative_prompt=request.negative_prompt)
                pictures = [self._cell(request, first, cell) for cell in cells]
            else:
                request = self._with_adapters(request)
                seeds = range(first, first + count)
                files = [self._file(number, seed) for seed in seeds] if len(lines) * count > 1 else [self.output]
                pictures = [
                    PlannedPicture(self.base, request, seed, file) for seed, file in zip(seeds, files, strict=True)
                ]
            plan.pictures += pictures
            plan.sizes += [size] * len(pictures)
        plan.notes = list(dict.fromkeys(self.notes))
        return plan

    def _file(self, number: int, seed: int) -> Path:
        """The file of one picture of several. number: of its prompt."""
        prompt = [f"{number:02d}"] if self.options.pictures.prompt_file is not None else []
        return self.output.with_name(f"{'_'.join([self.output.stem, *prompt, str(seed)])}.png")

    def _cell(self, request: PictureRequest, seed: int, cell: Cell) -> PlannedPicture:
        """The picture at a cell of the axes."""
        changes = cell.changes
        request = self._with_adapters(changed(request, changes), changes.get("adapter_weight"))
        if "adapter_weight" in changes and not request.loras:
            raise UserError("An axis of adapter weights needs an adapter: name one with --lora or in the prompt.")
        _check(request)
        return PlannedPicture(
            changes.get("checkpoint", self.base),
            request,
            changes.get("seed", seed),
            self.output.with_name(f"{self.output.stem}_x{cell.column + 1}_y{cell.row + 1}.png"),
            (cell.column, cell.row),
        )

    def _request(self, line: PromptLine, size: tuple[int | None, int | None]) -> PictureRequest:
        """The request of a line, without its adapters."""
        options, passes = self.options, self.options.passes
        width, height = (side or self.native // SIZE_STEP * SIZE_STEP for side in size)
        hires = None
        if passes.hires_scale is not None:
            hires = Hires(
                passes.hires_scale, passes.hires_upscaler, passes.hires_steps, passes.hires_denoising_strength
            )
        given, reference = options.reference, None
        if given.align_reference is not None and given.align_state is not None:
            window, strength = given.align_guidance_window, given.align_guidance
            strength = GUIDANCE if strength is None else strength
            reference = Reference(given.align_reference, given.align_state, strength, window)
        request = replace(
            request_of(
                line, options.sampling, width=width, height=height, negative_prompt=options.pictures.negative_prompt
            ),
            hires=hires,
            init_image=passes.init_image,
            reference=reference,
            denoising_strength=passes.denoising_strength,
            refiner_switch_at=None if options.models.refiner is None else options.models.refiner_switch_at,
        )
        _check(request)
        return request

    def _with_adapters(self, request: PictureRequest, weight: float | None = None) -> PictureRequest:
        """The request with the adapters of its prompt and of --lora. weight: replaces the weight of every --lora."""
        given = {path: own if weight is None else weight for path, own in map(split_weight, self.options.models.lora)}
        for text, is_negative in ((request.prompt, False), (request.negative_prompt, True)):
            if note := unbalanced_brackets(cut_out_tags(text)[0], negative=is_negative):
                self.notes.append(note)
        if request.negative_prompt and not request.is_guided:
            self.notes.append("The negative prompt has no effect without guidance (cfg_scale 1).")
        if tags := cut_out_tags(request.negative_prompt)[1]:
            named = f"{', '.join(map(str, tags))} of the negative prompt {'is' if len(tags) == 1 else 'are'}"
            self.notes.append(f"{named} left out: adapters act on the whole picture.")
        return replace(request, loras=loras_of(request.prompt, self.folders, given, self.notes))

    def _size(self, line: PromptLine) -> tuple[int | None, int | None]:
        """Width and height from the line, else from the options, else from --init_image."""
        width, height = line.width or self.options.pictures.width, line.height or self.options.pictures.height
        if self.options.passes.init_image is not None:
            own_width, own_height = open_picture(self.options.passes.init_image, "init_image").size
            width, height = width or own_width // SIZE_STEP * SIZE_STEP, height or own_height // SIZE_STEP * SIZE_STEP
        return width, height


def _axes(options: GenerateOptions) -> tuple[Axis, Axis | None] | None:
    x, y = options.sheet.x_axis, options.sheet.y_axis
    if x is None and y is None:
        return None
    require(options.pictures.prompt_file is None, "x_axis", "and y_axis are for one prompt, not for a prompt_file.")
    require(
        options.pictures.images in (None, 1),
        "images",
        "must be 1 with axes. For several pictures use a seed axis, as in seed: 1-4.",
    )
    if x is None or y is None:
        return parse_axis(x or y or ""), None
    return parse_axis(x), parse_axis(y)


def _check(request: PictureRequest) -> None:
    """Raises UserError for unknown samplers, schedules and upscalers, and for sizes that cannot be drawn."""
    request.sampler_and_schedule  # noqa: B018
    if request.hires is not None:
        find_upscaler(request.hires.upscaler)
        request.final_size  # noqa: B018
