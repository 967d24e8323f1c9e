"""Pictures drawn while training, from the weights as they are; a picture that fails never ends a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from library.errors import UserError
from library.inference.drawing_model import DrawingModel, load_drawing_vae
from library.inference.infotext import save_png
from library.inference.lora_tags import cut_out_tags
from library.inference.picture_infotext import infotext_of
from library.inference.picture_request import PictureRequest
from library.inference.prompt_file import PromptLine, read_prompt_file
from library.inference.sampler_names import DEFAULT_SAMPLER, sampler_named
from library.inference.text_to_image import draw, native_size, on_process
from library.models.conditioning import TextConditioner, clip_skip
from library.models.lone_vae import locate_vae
from library.options.kohya.watching import SampleOptions
from library.options.run import RunOptions
from library.training.caches import Prepared
from library.training.loop import Run
from library.training.models import load_frozen_text, text_conditioner
from library.training.saving import sample_name
from library.training.task import LoraTask
from library.training.text import EncodedText
from library.words import plural
from networks.families import UNET

STEPS, SCALE, SEED = 30, 7.5, 42  # kohya's, but for the seed, without which nothing could be compared


@dataclass
class Sampler:
    """Draws the prompts of --sample_prompts when it is their turn; see `due`. resumed: the run goes on from a state."""

    options: RunOptions
    prepared: Prepared
    run: Run
    task: LoraTask
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

    def guess(self, step_seconds: float) -> float:
        """Seconds that drawing takes: two forward passes a step of the sampler, a third of a training step each."""
        assert self.options.samples.sample_prompts is not None
        try:
            lines = read_prompt_file(self.options.samples.sample_prompts)
        except UserError:  # said when they are drawn
            return 0.0
        return sum(line.sample_steps or STEPS for line in lines) * 2 / 3 * step_seconds / self.run.plan.samples_per_step

    def __call__(self, step: int, finished: bool) -> None:
        """Draw, by the main process."""
        processes, prompts = self.run.processes, self.options.samples.sample_prompts
        if processes.is_main:
            assert prompts is not None
            start = time.perf_counter()
            try:
                files = self._draw(read_prompt_file(prompts), step)
                processes.say(
                    f"drew {plural(len(files), 'sample')} in {time.perf_counter() - start:.1f} s: {files[0].parent}"
                )
            except Exception as error:  # whatever it is, the training is worth more
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                processes.say(f"warning: samples at step {step} could not be drawn: {reason}")
        processes.wait()

    @torch.no_grad()
    def _draw(self, lines: list[PromptLine], step: int) -> list[Path]:
        task = self.task
        files = []
        modes = {name: model.training for name, model in task.models.items()}
        try:
            for model in task.models.values():
                model.eval()
            task.network.set_multiplier(1.0)
            with self.run.trained.judged():
                drawing = self._model()
                for number, line in enumerate(lines):
                    request, _ = on_process(self._request(line, native_size(drawing)), drawing.parametrisation)
                    seed = SEED + number if line.seed is None else line.seed
                    picture = draw(drawing, request, [seed])[0]
                    path = self._path(step, number, seed)
                    save_png(picture, path, infotext_of(request, seed, self.options.output.output_name))
                    files.append(path)
                    if self.run.log is not None:
                        self.run.log.picture(f"samples/{number:02d}", picture, step)
        finally:
            for name, model in task.models.items():
                model.train(modes[name])
        return files

    def _model(self) -> DrawingModel:
        """The models of the run as they are, and an autoencoder, which lives as long as the drawing does."""
        task, vae = self.task, self.options.model.vae
        device = self.run.processes.device
        conditioner = self._conditioner()
        base = self.prepared.base if vae is None else locate_vae(vae)
        return DrawingModel(
            self.prepared.family,
            task.models[UNET],
            conditioner.parts,
            load_drawing_vae(base, self.prepared.family, dtype=task.compute_dtype, device=device),
            task.objective.parametrisation,
            task.compute_dtype,
            conditioner.fusion,
        )

    def _conditioner(self) -> TextConditioner:
        """The text encoders; loaded where they are not part of the run, because their outputs are cached."""
        if isinstance(self.task.text, EncodedText):
            return self.task.text.conditioner
        family, device = self.prepared.family, self.run.processes.device
        return text_conditioner(
            self.options, family, load_frozen_text(self.options, self.prepared.base, family, device), device
        )

    def _request(self, line: PromptLine, native: int) -> PictureRequest:
        """Prompts are read as A1111 does, who will draw with the result; tags of other adapters have no place here."""
        prompt, tags = cut_out_tags(line.prompt)
        if tags:
            self.run.processes.say(f"samples: {', '.join(map(str, tags))} left out, only what is trained is drawn with")
        return PictureRequest(
            prompt,
            line.negative_prompt,
            steps=STEPS if line.sample_steps is None else line.sample_steps,
            cfg_scale=SCALE if line.scale is None else line.scale,
            width=native if line.width is None else line.width,
            height=native if line.height is None else line.height,
            sampler=line.sample_sampler or self.options.samples.sample_sampler or DEFAULT_SAMPLER,
            clip_skip=clip_skip(self.options.text, self.prepared.family),
            flow_shift=line.flow_shift,
        )

    def _path(self, step: int, number: int, seed: int) -> Path:
        epoch, rest = divmod(step, self.run.plan.steps_per_epoch)
        place = f"e{epoch:06d}" if rest == 0 else f"{step:06d}"
        output = self.options.output
        return output.output_dir / "sample" / sample_name(output.output_name, place, number, seed)


def check_prompts(options: SampleOptions, say: Callable[[str], None]) -> None:
    """Read the prompts once before the run, so that a slip in them is found at once. Raises UserError."""
    if options.sample_prompts is None:
        return
    notes: list[str] = []
    lines = read_prompt_file(options.sample_prompts, notes)
    for note in notes:
        say(f"samples: {note}")
    for line in lines:
        try:
            sampler_named(line.sample_sampler or options.sample_sampler or DEFAULT_SAMPLER)
        except UserError as error:
            raise UserError(f"{options.sample_prompts}: {error}") from None
