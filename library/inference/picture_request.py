"""What to draw, as data. No torch: a request is checked and printed before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from library.errors import UserError
from library.inference.lora_tags import LoraWeights, cut_out_tags
from library.inference.prompt_file import PromptLine
from library.inference.prompt_syntax import Dialect, split_parts
from library.inference.sampler_names import (
    DEFAULT_SAMPLER,
    DEFAULT_SCHEDULES,
    is_kohyas,
    sampler_along_flow,
    sampler_named,
    schedule_named,
)
from library.inference.upscaling import target_size
from library.options.generate import SamplingOptions

Emphasis = Literal["original", "no norm"]


@dataclass(frozen=True)
class LoraUse:
    """An adapter and how strongly it acts in which step."""

    path: Path
    weights: LoraWeights


@dataclass(frozen=True)
class Hires:
    """A second pass over the enlarged picture (A1111's hires fix)."""

    scale: float
    upscaler: str = "Latent"
    steps: int | None = None
    """None: as many as the first pass has."""
    denoising_strength: float = 0.7


@dataclass(frozen=True)
class Reference:
    """A photo to steer towards, by the AlignHeads of a training state; see `TokenGuidance`."""

    photo: Path
    state: Path
    strength: float
    window: tuple[float, float]
    """Of noise, from 0 to 1 (`Parametrisation.time`): outside of it nothing is steered."""


@dataclass(frozen=True)
class PictureRequest:
    """All settings of a picture except its seed. Names: see sampler_names and upscaling; "DPM++ 2M Karras" is a sampler too."""

    prompt: str
    negative_prompt: str
    steps: int
    cfg_scale: float
    """At 1 and below there is no guidance, and the negative prompt has no effect; see `is_guided`."""
    width: int
    height: int
    sampler: str = DEFAULT_SAMPLER
    schedule: str | None = None
    """None: the sampler's own."""
    clip_skip: int = 1
    """Counted as in A1111: 1 is the last layer. SDXL's layer is fixed."""
    loras: tuple[LoraUse, ...] = ()
    """All adapters of the picture, those of the prompt's tags included."""
    hires: Hires | None = None
    init_image: Path | None = None
    """Begin with this picture instead of noise (img2img)."""
    denoising_strength: float = 0.75
    """How much the init_image may change: the share of the steps that are done."""
    reference: Reference | None = None
    refiner_switch_at: float | None = None
    """Share of the steps after which the refiner takes over, in the second pass where there is one. None: no refiner."""
    dialect: Dialect = "a1111"
    emphasis: Emphasis = "original"
    pad_cond_uncond: bool = False
    """Fill the shorter of prompt and negative prompt with empty chunks (A1111's option of that name)."""
    flow_shift: float | None = None
    """Draw along a rectified flow with this shift, on any base. None: as the base is, a flow base with its own shift."""
    latent_multiplier: float = 1.0
    """The finished latents times this are decoded: for models that were trained on wrongly scaled ones."""

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the finished picture."""
        return (
            (self.width, self.height) if self.hires is None else target_size(self.width, self.height, self.hires.scale)
        )

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt has an effect: at cfg_scale 1 only with an AND, or a weight of the whole prompt."""
        parts = split_parts(cut_out_tags(self.prompt)[0])
        return self.cfg_scale > 1 or [weight for _, weight in parts] != [1]

    @property
    def fills_conds(self) -> bool:
        """Whether prompts of unequal length are filled; without guidance there is one prompt."""
        return self.pad_cond_uncond and self.is_guided

    @property
    def sampler_and_schedule(self) -> tuple[str, str]:
        """Their names in SAMPLERS and SCHEDULES. Raises UserError for unknown ones."""
        name, named = sampler_named(self.sampler)
        if self.flow_shift is not None:
            given = named if self.schedule is None and not is_kohyas(self.sampler) else self.schedule
            return sampler_along_flow(name, None if given is None else schedule_named(given))
        if self.schedule is None:
            return name, named or DEFAULT_SCHEDULES[name]
        schedule = schedule_named(self.schedule)
        if named not in (None, schedule) and not is_kohyas(self.sampler):
            raise UserError(
                f"The sampler {self.sampler} names a schedule, and the schedule is {schedule}. Leave one out."
            )
        return name, schedule

    @property
    def hires_steps(self) -> int:
        return self.steps if self.hires is None or self.hires.steps is None else self.hires.steps


def request_of(
    line: PromptLine, sampling: SamplingOptions, *, width: int, height: int, negative_prompt: str = ""
) -> PictureRequest:
    """The request of a line; the options fill in what it leaves out. The caller chooses the size.

    The options' schedule does not apply to a line's sampler that names one itself: "DPM++ 2M Karras", and all of kohya's.
    Raises UserError for unknown names.
    """
    sampler, schedule = line.sample_sampler, sampling.schedule
    if sampler is None:
        sampler = sampling.sampler
    elif sampler_named(sampler)[1] is not None:
        schedule = None
    request = PictureRequest(
        line.prompt,
        line.negative_prompt or negative_prompt,
        steps=sampling.steps if line.sample_steps is None else line.sample_steps,
        cfg_scale=sampling.cfg_scale if line.scale is None else line.scale,
        width=width,
        height=height,
        sampler=sampler,
        schedule=schedule,
        clip_skip=sampling.clip_skip or 1,
        dialect=sampling.prompt_syntax,
        emphasis=sampling.emphasis,
        pad_cond_uncond=sampling.pad_cond_uncond,
        flow_shift=sampling.flow_shift if line.flow_shift is None else line.flow_shift,
        latent_multiplier=sampling.latent_multiplier,
    )
    request.sampler_and_schedule  # noqa: B018
    return request


def base_steps(steps: int, switch_at: float) -> int:
    """How many of `steps` the base draws: the refiner's first step is the first at or above this share of them."""
    return math.ceil(switch_at * steps - 1e-9)


def fitted_picture(path: Path, width: int, height: int, option: str) -> Image.Image:
    """As `open_picture`, of this size: scaled to cover it, and cropped to the centre."""
    return ImageOps.fit(open_picture(path, option), (width, height), Image.Resampling.LANCZOS)


def open_picture(path: Path, option: str) -> Image.Image:
    """A picture file as RGB, turned as its EXIF says. Raises UserError, which names the option, where it cannot be read."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{option} {path} does not exist.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{option} {path} cannot be read: {error}.") from None
