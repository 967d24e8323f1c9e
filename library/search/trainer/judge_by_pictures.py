"""What a trial is judged by when pictures count: likeness to held-out photos against drift on prompts that ask for other things.

    value = drift_weight * drift - (likeness - the base's likeness)

The untouched base has exactly 0. Adherence to prompts is no part of the sum but a constraint beside it: in hands of people
.33 can outperform .36, so it only must not fall, by more than a margin and than its own noise. Drawing costs more than a slot of
training, so slots 5 and 10 are judged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from library.data.pixels import decode_rgb
from library.errors import Diverged, RunFailed, UserError
from library.evaluation.picture_encoders import ClipPictures, DinoPictures, unit
from library.evaluation.picture_measures import distances, likeness
from library.evaluation.prompts import MOST_CAPTIONS, UNRELATED, UNRELATED_SHAPES, plain_text
from library.inference.model import DrawingModel, load_drawing_vae
from library.inference.request import Request
from library.inference.text_to_image import draw, native_size
from library.models.locate import SHAPES_CLIP, TINY_BASES, locate_base
from library.options.network import TrainNetworkOptions
from library.options.parser import flatten
from library.search.constraints import ADHERENCE, PREFIX, clip_of
from library.search.messages import Job
from library.search.trainer.judge_by_loss import EVALUATION_SEED, MOST_PICTURES, Measured, by_hash, in_eval_mode
from library.search.trainer.kept_models import Warm
from library.training.network import NetworkTask
from library.training.network_run import Prepared, base_weights_facts, clip_skip
from networks.original_names import UNET

STANDARD_ERRORS = 2.0
"""Of the base's own adherence: falling by less is chance."""


@dataclass(frozen=True)
class Judging:
    """Settings of the objective: a job's `judging`. The same for all trials of a study."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: tuple[str, ...] = ()
    """Of the subject. Default: captions of held-out pictures, four at most."""
    unrelated: tuple[str, ...] = ()
    """Of anything else, for drift and adherence. Default: four of evaluate.py's."""
    seeds: int = 2
    """Pictures of each prompt."""
    steps: int = 20
    cfg_scale: float = 7.0
    size: int | None = None
    """Side in pixels. Default: what the base was trained at."""
    dino_model: str | None = None
    """Default: the option dino_model of the training."""
    clip_model: str | None = None
    """For adherence, which is left out without one. The embedded base that was trained has one of its own."""
    drift_weight: float = 0.5
    """A guess: half a point of likeness for a point of drift."""
    adherence_margin: float = 0.02
    """How far the mean CLIP cosine may fall below the base's; two standard errors of the base's where these are more."""


def read_judging(values: dict[str, Any]) -> Judging:
    """Raises UserError for unknown settings and values of the wrong type."""
    try:
        judging = TypeAdapter(Judging).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"The setting {name} of the objective image: {first['msg'][:1].lower()}{first['msg'][1:]}."
        ) from None
    for name in ("seeds", "steps"):
        if getattr(judging, name) < 1:
            raise UserError(
                f"The setting {name} of the objective image must be at least 1, got {getattr(judging, name)}."
            )
    return judging


@dataclass
class Eyes:
    """What looks at pictures. clip: None leaves adherence out."""

    dino: DinoPictures
    clip: ClipPictures | None
    vae: torch.nn.Module


@dataclass(frozen=True)
class Seen:
    """What was drawn, as it looks: rows of unit length, [prompts x seeds, D].

    told: CLIP's cosine of each unrelated picture to its prompt, [prompts x seeds].
    """

    subject: Tensor
    unrelated: Tensor
    told: Tensor | None


class ImageJudge:
    """Draws the same prompts with the same seeds at each slot that it is asked at. See the module."""

    slots = frozenset({5, 10})

    def __init__(
        self,
        judging: Judging,
        eyes: Eyes,
        task: NetworkTask,
        drawing: Callable[[], DrawingModel],
        photos: Sequence[Image.Image],
        folder: Path,
        known: dict[str, Seen],
        clip_skip: int = 1,
    ) -> None:
        """known: what the base draws, of an earlier trial with the same settings; it is put there."""
        self.judging, self.eyes, self.task, self.drawing = judging, eyes, task, drawing
        self.folder, self.clip_skip = folder, clip_skip
        self.photos = unit(eyes.dino(photos))
        if "base" not in known:
            with task.network.disabled():
                known["base"] = self._look(None)
        self.base = known["base"]

    def __call__(self, slot: int) -> Measured:
        """Raises Diverged where a picture is not finite."""
        seen = self._look(self.folder / f"slot_{slot:02d}")
        # Against the base's distance to itself, which rounding leaves beside 0.
        own_distances = distances(self.base.unrelated, self.base.unrelated)
        drift = (distances(seen.unrelated, self.base.unrelated) - own_distances).mean().item()
        own, base = likeness(seen.subject, self.photos), likeness(self.base.subject, self.photos)
        gain = (own - base).mean().item()
        components = {"likeness": own.mean().item(), "likeness_gain": gain, "drift": drift}
        spread = (own - base).std().item() / math.sqrt(len(own)) if len(own) > 1 else math.nan
        details = {"likeness_gain_standard_error": spread if math.isfinite(spread) else None}
        if seen.told is not None and self.base.told is not None:
            change = (seen.told - self.base.told).mean().item()
            allowed = allowed_fall(self.base.told, self.judging)
            components[ADHERENCE], components[PREFIX + ADHERENCE] = change, -change - allowed
            details["adherence_may_fall"] = allowed
        value = self.judging.drift_weight * drift - gain
        if not all(map(math.isfinite, (value, *components.values()))):
            raise Diverged("A picture of this trial cannot be looked at: its embedding is not finite.")
        return Measured(value, components, details)

    def _look(self, folder: Path | None) -> Seen:
        judging, seeds = self.judging, range(self.judging.seeds)
        try:
            subject = self._draw(judging.prompts, seeds)
            unrelated = self._draw(judging.unrelated, seeds)
        except RunFailed as error:
            raise Diverged(f"This trial draws nothing that can be seen: {error}") from None
        if folder is not None:
            save(folder, "subject", subject)
            save(folder, "unrelated", unrelated)
        told = None
        if self.eyes.clip is not None:
            words = self.eyes.clip.prompts([prompt for prompt in judging.unrelated for _ in seeds])
            told = (self.eyes.clip.pictures(unrelated) * words).sum(dim=1)
        return Seen(unit(self.eyes.dino(subject)), unit(self.eyes.dino(unrelated)), told)

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Prompt by prompt, its seeds beside each other, with the weights as they are."""
        task = self.task
        with in_eval_mode(task.models.values()):
            task.network.set_multiplier(1.0)
            drawing = self.drawing()
            side = self.judging.size or native_size(drawing)
            pictures = []
            for prompt in prompts:
                request = Request(
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


def allowed_fall(told: Tensor, judging: Judging) -> float:
    """How far the mean of [prompts x seeds] cosines may fall: the margin, or two standard errors of the base's mean over its seeds.

    The prompts are the same for all, so the spread of one prompt's seeds is all of the noise; of one seed it is not known.
    """
    if judging.seeds < 2:
        return judging.adherence_margin
    variances = told.double().view(-1, judging.seeds).var(dim=1)
    return max(judging.adherence_margin, STANDARD_ERRORS * math.sqrt(variances.mean().item() / len(told)))


def save(folder: Path, name: str, pictures: Sequence[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{name}_{number:02d}.png")


def network_image_judge(
    job: Job, options: TrainNetworkOptions, prepared: Prepared, task: NetworkTask, warm: Warm
) -> ImageJudge:
    """Raises UserError for settings that cannot be, and models that are not there."""
    name = options.model.pretrained_model_name_or_path
    held_out = by_hash(prepared.data.validation, lambda one: one.image.sample_id, MOST_PICTURES)
    judging = settled(read_judging(job.judging), name, [one.image.caption for one in held_out])
    dino = judging.dino_model or options.model.dino_model
    clip = clip_of(judging.clip_model, name)
    device, vae = task.processes.device, options.model.vae
    vae_base = prepared.base if vae is None else locate_base(vae, ("vae",))

    def load() -> Eyes:
        clip_pictures = None if clip is None else ClipPictures(_clip_folder(clip), device)
        autoencoder = load_drawing_vae(vae_base, prepared.family, dtype=task.compute_dtype, device=device)
        return Eyes(DinoPictures(dino, device), clip_pictures, autoencoder)

    key = [dino, clip, str(vae_base.path), str(task.compute_dtype), str(device)]
    eyes = warm.judging.get(key, load)

    def drawing() -> DrawingModel:
        schedule = task.objective.schedule
        if task.objective.kind == "raw_v":  # the network's output is taken for velocities
            schedule = replace(schedule, prediction_type="v_prediction")
        parts = (
            task.conditioner.parts
            if task.conditioner is not None
            else warm.text(options, prepared.base, prepared.family, device)
        )
        return DrawingModel(prepared.family, task.models[UNET], parts, eyes.vae, schedule, task.compute_dtype)

    photos = [decode_rgb(one.image.path, name=str(one.image.path)) for one in held_out]
    memory = options.cache.cache_dir / "weight_hashes.json"
    components = (UNET, *prepared.family.text_encoders)
    facts: list[Any] = [base_weights_facts(options, prepared.base, components, memory), flatten(options.model)]
    facts += [repr(judging), key]
    facts += [flatten(options.speed), clip_skip(options, prepared.family), task.objective.kind]
    known = warm.base_scores.setdefault(f"image {hashlib.sha256(repr(facts).encode()).hexdigest()}", {})
    folder = Path(job.folder) / "realtime_evaluations"
    skip = clip_skip(options, prepared.family)
    return ImageJudge(judging, eyes, task, drawing, photos, folder, known, skip)


def settled(judging: Judging, base: str, captions: Sequence[str]) -> Judging:
    """With prompts in place of those that nobody gave. Raises UserError where no held-out picture has a caption."""
    unrelated = UNRELATED_SHAPES if base in TINY_BASES or Path(base).name in TINY_BASES else UNRELATED
    prompts = judging.prompts or tuple(dict.fromkeys(plain_text(one) for one in captions if one))[:MOST_CAPTIONS]
    if not prompts:
        raise UserError("The objective image draws with captions, and no held-out picture has one. Give it prompts.")
    return replace(judging, prompts=prompts, unrelated=judging.unrelated or unrelated[:MOST_CAPTIONS])


def _clip_folder(name: str) -> str:
    if name != SHAPES_CLIP:
        return name
    from library.models.locate import locate_clip

    return str(locate_clip(name).path)
