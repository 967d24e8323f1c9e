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
from library.models.conditioning import TextConditioner
from library.models.load import load_scheduler_config, load_vae
from library.models.locate import locate_base
from library.options.kohya_samples import SampleOptions
from library.options.network import TrainNetworkOptions
from library.training.loop import Run
from library.training.network import NetworkTask
from library.training.network_models import load_frozen_text
from library.training.network_run import Prepared, clip_skip
from networks.original_names import SD15, SDXL, UNET

STEPS, SCALE, SEED = 30, 7.5, 42  # kohya's, but for the seed, without which nothing could be compared


@dataclass
class Sampler:
    """Draws the prompts of --sample_prompts when it is their turn; see `due`. resumed: the run goes on from a state."""

    options: TrainNetworkOptions
    prepared: Prepared
    run: Run
    task: NetworkTask
    first_step: int
    resumed: bool

    def due(self, step: int, finished: bool) -> bool:
        options = self.options.samples
        every = options.sample_every_n_steps
        if options.sample_every_n_epochs is not None:
            every = options.sample_every_n_epochs * self.run.plan.steps_per_epoch
        if step == self.first_step:
            return options.sample_at_first and not self.resumed
        return finished or (every is not None and step % every == 0)

    def __call__(self, step: int, finished: bool) -> None:
        """Draw, by the main process, if it is time."""
        if not self.due(step, finished):
            return
        processes, prompts = self.run.processes, self.options.samples.sample_prompts
        if processes.is_main:
            assert prompts is not None
            start = time.perf_counter()
            try:
                files = self._draw(read_prompt_file(prompts), step)
                processes.say(f"drew {len(files)} samples in {time.perf_counter() - start:.1f} s: {files[0].parent}")
            except Exception as error:  # whatever it is, the training is worth more
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                processes.say(f"warning: samples at step {step} could not be drawn: {reason}")
        processes.wait()

    @torch.no_grad()
    def _draw(self, lines: list[PromptLine], step: int) -> list[Path]:
        task, family, base = self.task, self.prepared.family, self.prepared.base
        files = []
        modes = {name: model.training for name, model in task.models.items()}
        conditioner = task.conditioner or self._conditioner()
        vae_options = self.options.model.vae
        vae = load_vae(
            base if vae_options is None else locate_base(vae_options, ("vae",)),
            families=(SD15, SDXL) if vae_options else (family,),
            dtype=task.compute_dtype,
            device=self.run.processes.device,
        )
        config = load_scheduler_config(base)
        try:
            for model in task.models.values():
                model.eval()
            task.network.set_multiplier(1.0)
            with self.run.trained.judged():
                for number, line in enumerate(lines):
                    sampler = make_sampler(config, line.sample_sampler or self.options.samples.sample_sampler)
                    pipeline = assemble_pipeline(family, task.models[UNET], conditioner.parts, vae, sampler)
                    drawing = _drawing(line, native_size(pipeline))
                    seed = SEED + number if line.seed is None else line.seed
                    picture = draw(pipeline, drawing, [seed], conditioner)[0]
                    path = self._path(step, number, seed)
                    save_picture(picture, path, parameters_text(drawing, seed, self.options.output.output_name, []))
                    files.append(path)
                    if self.run.log is not None:
                        self.run.log.picture(f"samples/{number:02d}", picture, step)
        finally:
            for name, model in task.models.items():
                model.train(modes[name])
        return files

    def _conditioner(self) -> TextConditioner:
        """The text encoders where they are not part of the run: their outputs are cached."""
        family, options = self.prepared.family, self.options
        parts = load_frozen_text(options, self.prepared.base, family, self.run.processes.device)
        return TextConditioner(family, parts, clip_skip=clip_skip(options, family), chunks=options.text.chunks)

    def _path(self, step: int, number: int, seed: int) -> Path:
        """NAME_e000002_00_20260102030405_42.png after an epoch, NAME_000500_... else."""
        epoch, rest = divmod(step, self.run.plan.steps_per_epoch)
        place = f"e{epoch:06d}" if rest == 0 else f"{step:06d}"
        moment = datetime.now().strftime("%Y%m%d%H%M%S")
        output = self.options.output
        return output.output_dir / "sample" / f"{output.output_name}_{place}_{number:02d}_{moment}_{seed}.png"


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
