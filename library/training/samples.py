"""Pictures drawn while training, from the weights as they are; a picture that fails never ends a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.inference.pictures import parameters_text, save_picture
from library.inference.prompt_file import PromptLine, read_prompt_file
from library.inference.text_to_image import Drawing, assemble_pipeline, draw, make_sampler, native_size
from library.models.load import TextPart, load_scheduler_config, load_text_encoders, load_vae
from library.models.locate import BaseLocation
from library.options.kohya_samples import SampleOptions
from library.processes import Processes
from library.training.state import Trained
from library.training.tracking import MetricLog
from networks.original_names import Family

STEPS, SCALE, SEED = 30, 7.5, 42  # kohya's, but for the seed, without which nothing could be compared


@dataclass
class Sampler:
    """Draws the prompts of a file when it is their turn; see `due`.

    parts: text encoders that are trained; None loads the base's when they are needed.
    """

    options: SampleOptions
    base: BaseLocation
    family: Family
    models: dict[str, Any]
    parts: list[TextPart] | None
    trained: Trained
    dtype: torch.dtype
    processes: Processes
    folder: Path
    name: str
    steps_per_epoch: int
    first_step: int
    log: MetricLog | None = None

    def due(self, step: int, finished: bool) -> bool:
        every = self.options.sample_every_n_steps
        if self.options.sample_every_n_epochs is not None:
            every = self.options.sample_every_n_epochs * self.steps_per_epoch
        if step == self.first_step:
            return self.options.sample_at_first and step == 0
        return finished or (every is not None and step % every == 0)

    def __call__(self, step: int, finished: bool) -> None:
        """Draw, by the main process, if it is time."""
        if self.options.sample_prompts is None or not self.due(step, finished):
            return
        if self.processes.is_main:
            start = time.perf_counter()
            try:
                files = self._draw(read_prompt_file(self.options.sample_prompts), step)
                self.processes.say(
                    f"drew {len(files)} samples in {time.perf_counter() - start:.1f} s: {files[0].parent}"
                )
            except Exception as error:  # whatever it is, the training is worth more
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.processes.say(f"warning: samples at step {step} could not be drawn: {reason}")
        self.processes.wait()

    @torch.no_grad()
    def _draw(self, lines: list[PromptLine], step: int) -> list[Path]:
        device, files = self.processes.device, []
        parts = self.parts or load_text_encoders(self.base, families=(self.family,), dtype=self.dtype, device=device)
        vae = load_vae(self.base, families=(self.family,), dtype=torch.float32, device=device)
        config = load_scheduler_config(self.base)
        modes = {name: model.training for name, model in self.models.items()}
        try:
            for model in self.models.values():
                model.eval()
            with self.trained.judged():
                for number, line in enumerate(lines):
                    sampler = make_sampler(config, line.sample_sampler or self.options.sample_sampler)
                    pipeline = assemble_pipeline(self.family, self.models["unet"], parts, vae, sampler)
                    drawing, seed = (
                        _drawing(line, native_size(pipeline)),
                        SEED + number if line.seed is None else line.seed,
                    )
                    picture = draw(pipeline, drawing, [seed])[0]
                    path = self._path(step, number, seed)
                    save_picture(picture, path, parameters_text(drawing, seed, self.name, []))
                    files.append(path)
                    if self.log is not None:
                        self.log.picture(f"samples/{number:02d}", picture, step)
        finally:
            for name, model in self.models.items():
                model.train(modes[name])
        return files

    def _path(self, step: int, number: int, seed: int) -> Path:
        """NAME_e000002_00_20260102030405_42.png after an epoch, NAME_000500_... else."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        place = f"e{epoch:06d}" if rest == 0 else f"{step:06d}"
        moment = datetime.now().strftime("%Y%m%d%H%M%S")
        return self.folder / "sample" / f"{self.name}_{place}_{number:02d}_{moment}_{seed}.png"


def check_prompts(options: SampleOptions, make: Callable[[str], Any]) -> None:
    """Read the prompts once before the run, so that a slip in them is found at once. Raises UserError."""
    if options.sample_prompts is None:
        return
    for line in read_prompt_file(options.sample_prompts):
        name = line.sample_sampler or options.sample_sampler
        if name is not None:
            try:
                make(name)
            except UserError as error:
                raise UserError(f"{options.sample_prompts}: {error}") from None


def _drawing(line: PromptLine, native: int) -> Drawing:
    return Drawing(
        line.prompt,
        line.negative_prompt,
        steps=STEPS if line.sample_steps is None else line.sample_steps,
        cfg_scale=SCALE if line.scale is None else line.scale,
        width=native if line.width is None else line.width,
        height=native if line.height is None else line.height,
    )
