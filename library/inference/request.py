"""What to draw, as data. No torch: a request is checked and printed before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.inference.prompt_file import PromptLine
from library.inference.prompt_networks import LoraWeights, cut_out_networks
from library.inference.prompt_syntax import Dialect, split_parts
from library.inference.sampler_names import DEFAULT_SAMPLER, DEFAULT_SCHEDULES, is_kohyas, sampler_named, schedule_named
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
class Request:
    """A picture but for its seed. Names are those of sampler_names and upscaling; "DPM++ 2M Karras" is a sampler too."""

    prompt: str
    negative_prompt: str
    steps: int
    cfg_scale: float
    """1 and below: no guidance, and the negative prompt does nothing; see `is_guided`."""
    width: int
    height: int
    sampler: str = DEFAULT_SAMPLER
    schedule: str | None = None
    """None: the sampler's own."""
    clip_skip: int = 1
    """As A1111 counts; SDXL's layer is fixed."""
    loras: tuple[LoraUse, ...] = ()
    """All that act: those of the prompt's tags are among them."""
    hires: Hires | None = None
    init_image: Path | None = None
    """Begin with this picture instead of noise (img2img)."""
    denoising_strength: float = 0.75
    """How much of the init_image is drawn over."""
    refiner_switch_at: float | None = None
    """Share of the steps after which the refiner goes on; of the second pass, where there is one. None: no refiner."""
    dialect: Dialect = "a1111"
    emphasis: Emphasis = "original"

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height that come out."""
        return (
            (self.width, self.height) if self.hires is None else target_size(self.width, self.height, self.hires.scale)
        )

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt has an effect: also at cfg_scale 1 where parts of an AND or a prompt's weight ask for it."""
        parts = split_parts(cut_out_networks(self.prompt)[0])
        return self.cfg_scale > 1 or [weight for _, weight in parts] != [1]

    @property
    def sampler_and_schedule(self) -> tuple[str, str]:
        """As they are called here. Raises UserError for unknown names."""
        name, said = sampler_named(self.sampler)
        if self.schedule is None:
            return name, said or DEFAULT_SCHEDULES[name]
        schedule = schedule_named(self.schedule)
        if said not in (None, schedule) and not is_kohyas(self.sampler):
            raise UserError(
                f"The sampler {self.sampler} names a schedule, and the schedule says {schedule}. Leave one out."
            )
        return name, schedule

    @property
    def hires_steps(self) -> int:
        return self.steps if self.hires is None or self.hires.steps is None else self.hires.steps


def request_of(
    line: PromptLine, sampling: SamplingOptions, *, width: int, height: int, negative_prompt: str = ""
) -> Request:
    """What a line asks for, and the options where it says nothing; the size is the caller's.

    `schedule` of the options is not for a line's own sampler that holds a schedule: "DPM++ 2M Karras", and all of kohya's.
    Raises UserError for names that are not known.
    """
    sampler, schedule = line.sample_sampler, sampling.schedule
    if sampler is None:
        sampler = sampling.sampler
    elif sampler_named(sampler)[1] is not None:
        schedule = None
    request = Request(
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
    )
    request.sampler_and_schedule  # noqa: B018
    return request


def base_steps(steps: int, switch_at: float) -> int:
    """Steps before the refiner's, of a pass of so many: the first one that is not below this share of them is the refiner's."""
    return math.ceil(switch_at * steps - 1e-9)
