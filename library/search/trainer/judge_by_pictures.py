"""The objective image: likeness of drawn pictures to held-out photos, against drift on prompts that ask for other things.

    value = drift_weight * drift - (likeness - the base's likeness)

The untouched base has exactly 0. Adherence to prompts (CLIP) is not part of the sum but a constraint: people may prefer pictures
with .33 to those with .36, so it only must not fall by more than a margin and than its own noise. Drawing costs more than a slot
of training, so only slots 5 and 10 are judged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from library.errors import Diverged, RunFailed, UserError
from library.evaluation.picture_encoders import ClipPictures, DinoPictures, unit
from library.evaluation.picture_measures import distances, likeness
from library.evaluation.prompt_sets import MOST_CAPTIONS, UNRELATED, UNRELATED_SHAPES, plain_text
from library.inference.drawing_model import DrawingModel, load_drawing_vae
from library.inference.picture_request import PictureRequest
from library.inference.text_to_image import draw, native_size
from library.models.conditioning import clip_skip
from library.models.embedded import SHAPES_CLIP, TINY_BASES
from library.models.lone_vae import locate_vae
from library.options.parser import flatten
from library.options.run import RunOptions
from library.search.constraints import ADHERENCE, PREFIX, clip_of
from library.search.held_out_pictures import EVALUATION_SEED
from library.search.judging import Judging, read_judging
from library.search.messages import Job
from library.search.trainer.judge_by_loss import MOST_PICTURES, Measured, by_hash, in_eval_mode
from library.search.trainer.kept_models import KeptModels
from library.search.trial_files import slot_folder
from library.training.caches import Prepared
from library.training.models import base_weights_facts, text_conditioner
from library.training.task import LoraTask
from library.training.text import EncodedText
from networks.families import UNET

STANDARD_ERRORS = 2.0
"""A fall of the adherence by less than this many standard errors of the base's may be chance."""


@dataclass
class PictureModels:
    """Models that embed pictures, and the VAE that draws them. clip: None leaves adherence out."""

    dino: DinoPictures
    clip: ClipPictures | None
    vae: torch.nn.Module


@dataclass(frozen=True)
class Embedded:
    """DINOv2 embeddings of drawn pictures, rows of unit length [prompts x seeds, D].

    adherence: CLIP's cosine of each unrelated picture to its prompt, [prompts x seeds].
    """

    subject: Tensor
    unrelated: Tensor
    adherence: Tensor | None


class ImageJudge:
    """Draws the same prompts with the same seeds at each slot that it judges. See the module."""

    slots = frozenset({5, 10})

    def __init__(
        self,
        judging: Judging,
        models: PictureModels,
        task: LoraTask,
        drawing: Callable[[], DrawingModel],
        photos: Sequence[Image.Image],
        folder: Path,
        known: dict[str, Embedded],
        clip_skip: int = 1,
    ) -> None:
        """
        folder: of the trial. known: the base's pictures, from an earlier trial with the same settings, or stored there by this one.
        """
        self.judging, self.models, self.task, self.drawing = judging, models, task, drawing
        self.folder, self.clip_skip = folder, clip_skip
        self.photos = unit(models.dino(photos))
        if "base" not in known:
            with task.network.disabled():
                known["base"] = self._embedded(None)
        self.base = known["base"]

    def __call__(self, slot: int) -> Measured:
        """Raises Diverged where a picture is not finite."""
        drawn = self._embedded(slot_folder(self.folder, slot))
        # Minus the base's distance to itself, which rounding may leave beside 0.
        own_distances = distances(self.base.unrelated, self.base.unrelated)
        drift = (distances(drawn.unrelated, self.base.unrelated) - own_distances).mean().item()
        own, base = likeness(drawn.subject, self.photos), likeness(self.base.subject, self.photos)
        gain = (own - base).mean().item()
        components = {"likeness": own.mean().item(), "likeness_gain": gain, "drift": drift}
        spread = (own - base).std().item() / math.sqrt(len(own)) if len(own) > 1 else math.nan
        details = {"likeness_gain_standard_error": spread if math.isfinite(spread) else None}
        if drawn.adherence is not None and self.base.adherence is not None:
            change = (drawn.adherence - self.base.adherence).mean().item()
            allowed = allowed_fall(self.base.adherence, self.judging)
            components[ADHERENCE], components[PREFIX + ADHERENCE] = change, -change - allowed
            details["adherence_may_fall"] = allowed
        value = self.judging.drift_weight * drift - gain
        if not all(map(math.isfinite, (value, *components.values()))):
            raise Diverged("The embedding of a picture that this trial drew is not finite.")
        return Measured(value, components, details)

    def _embedded(self, folder: Path | None) -> Embedded:
        judging, seeds = self.judging, range(self.judging.seeds)
        try:
            subject = self._draw(judging.prompts, seeds)
            unrelated = self._draw(judging.unrelated, seeds)
        except RunFailed as error:
            raise Diverged(f"This trial draws no pictures: {error}") from None
        if folder is not None:
            save(folder, "subject", subject)
            save(folder, "unrelated", unrelated)
        adherence = None
        if self.models.clip is not None:
            words = self.models.clip.prompts([prompt for prompt in judging.unrelated for _ in seeds])
            adherence = (self.models.clip.pictures(unrelated) * words).sum(dim=1)
        return Embedded(unit(self.models.dino(subject)), unit(self.models.dino(unrelated)), adherence)

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """The pictures prompt by prompt, all seeds of one before the next, with the weights as they are."""
        task = self.task
        with in_eval_mode(task.models.values()):
            task.network.set_multiplier(1.0)
            drawing = self.drawing()
            side = self.judging.size or native_size(drawing)
            pictures = []
            for prompt in prompts:
                request = PictureRequest(
                    prompt,
                    "",
                    steps=self.judging.steps,
                    cfg_scale=self.judging.cfg_scale,
                    width=side,
                    height=side,
                    clip_skip=self.clip_skip,
                )
                pictures += draw(drawing, request, [EVALUATION_SEED + seed for seed in seeds])
        return pictures


def allowed_fall(adherence: Tensor, judging: Judging) -> float:
    """How far the mean may fall below the base's cosines [prompts x seeds]: the margin, or two standard errors over seeds if more.

    All trials have the same prompts, so the noise is the spread between seeds of one prompt; with one seed it is unknown.
    """
    if judging.seeds < 2:
        return judging.adherence_margin
    variances = adherence.double().view(-1, judging.seeds).var(dim=1)
    return max(judging.adherence_margin, STANDARD_ERRORS * math.sqrt(variances.mean().item() / len(adherence)))


def save(folder: Path, name: str, pictures: Sequence[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{name}_{number:02d}.png")


def network_image_judge(
    job: Job, options: RunOptions, prepared: Prepared, task: LoraTask, warm: KeptModels
) -> ImageJudge:
    """The judge of a trial. Raises UserError for settings that are wrong, and models that are not there."""
    name = options.model.pretrained_model_name_or_path
    held_out = by_hash(prepared.data.validation, lambda picture: picture.image.sample_id, MOST_PICTURES)
    judging = settled(read_judging(job.judging), name, [picture.image.caption for picture in held_out])
    dino = judging.dino_model or options.model.dino_model[0]
    clip = clip_of(judging.clip_model, name)
    device, vae = task.processes.device, options.model.vae
    vae_base = prepared.base if vae is None else locate_vae(vae)

    def load() -> PictureModels:
        clip_pictures = None if clip is None else ClipPictures(_clip_folder(clip), device)
        autoencoder = load_drawing_vae(vae_base, prepared.family, dtype=task.compute_dtype, device=device)
        return PictureModels(DinoPictures(dino, device), clip_pictures, autoencoder)

    key = [dino, clip, str(vae_base.path), str(task.compute_dtype), str(device)]
    models = warm.judging.get(key, load)

    def drawing() -> DrawingModel:
        if isinstance(task.text, EncodedText):
            text = task.text.conditioner
        else:
            parts = warm.text(options, prepared.base, prepared.family, device)
            text = text_conditioner(options, prepared.family, parts, device)
        parametrisation = task.objective.parametrisation
        return DrawingModel(
            prepared.family,
            task.models[UNET],
            text.parts,
            models.vae,
            parametrisation,
            task.compute_dtype,
            text.fusion,
        )

    photos = [prepared.data.decoded(picture) for picture in held_out]
    components = (UNET, *prepared.family.text_encoders)
    facts: list[Any] = [base_weights_facts(options, prepared.base, components), flatten(options.model)]
    facts += [repr(judging), key]
    facts += [
        flatten(options.speed),
        clip_skip(options.text, prepared.family),
        task.objective.parametrisation.output.name,
    ]
    known = warm.base_scores.setdefault(f"image {hashlib.sha256(repr(facts).encode()).hexdigest()}", {})
    folder = Path(job.folder)
    skip = clip_skip(options.text, prepared.family)
    return ImageJudge(judging, models, task, drawing, photos, folder, known, skip)


def settled(judging: Judging, base: str, captions: Sequence[str]) -> Judging:
    """The settings, with default prompts where none are given. Raises UserError where no held-out picture has a caption."""
    unrelated = UNRELATED_SHAPES if base in TINY_BASES or Path(base).name in TINY_BASES else UNRELATED
    prompts = (
        judging.prompts or tuple(dict.fromkeys(plain_text(caption) for caption in captions if caption))[:MOST_CAPTIONS]
    )
    if not prompts:
        raise UserError(
            "The objective image draws the captions of held-out pictures, and none of them has one. Give it prompts with "
            "--objective_args."
        )
    return replace(judging, prompts=prompts, unrelated=judging.unrelated or unrelated[:MOST_CAPTIONS])


def _clip_folder(name: str) -> str:
    if name != SHAPES_CLIP:
        return name
    from library.models.locate import locate_clip

    return str(locate_clip(name).path)
