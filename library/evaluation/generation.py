"""Measures the pictures of a LoRA's checkpoints: likeness, drift, adherence, diversity, distances to photos, denoising loss.

All checkpoints, and the base without an adapter, draw the same prompts with the same seeds. So two of them are compared picture by
picture, and what a seed does to both cancels. Each number has a standard error over seeds (over photos, of the losses); two
checkpoints count as different only where their difference is significant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from library.evaluation import picture_measures as measures
from library.evaluation.candidates import Candidate
from library.evaluation.denoising import QUARTERS, EncodedPhotos, denoising_losses, encode_photos, log_ratios
from library.evaluation.generated_pictures import (
    AppliedAdapter,
    apply_adapter,
    count_empty,
    draw_prompt_set,
    pixels_of,
    save_pictures,
)
from library.evaluation.generation_result import (
    BASE,
    Best,
    CheckpointPictures,
    GenerationResult,
    NearTraining,
    Strength,
    to_use,
)
from library.evaluation.measure_table import MEASURES
from library.evaluation.photos import Photo
from library.evaluation.picture_encoders import ClipPictures, DinoPictures, unit
from library.evaluation.prompt_sets import PromptSet, is_ours, words_of
from library.evaluation.references import References
from library.evaluation.standard_errors import Estimate, Statistic, difference, jackknife, mean_of, of_all
from library.evaluation.trained_photos import TrainedPhotos
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.infotext import model_hash
from library.inference.picture_infotext import model_name
from library.models.embedded import TINY_TEACHERS
from library.models.locate import locate_base
from library.progress import doing
from library.words import plural
from networks.adapters import Adapter


@dataclass(frozen=True)
class GenerationPlan:
    """What to draw and measure. subject: None where no prompt names it. photos: without any, some measures are left out."""

    base: str
    candidates: Sequence[Candidate]
    adapters: Mapping[str, Adapter]
    """By the candidates' names."""
    subject: PromptSet | None
    unrelated: PromptSet
    photos: Sequence[Photo]
    photo_prompts: Sequence[str]
    size: int
    dino_model: str
    clip_model: str | None
    weight: float = 1.0
    clip_skip: int = 1
    batch_size: int = 1
    loss_seed: int = 0
    trained: TrainedPhotos | None = None
    """The pictures that were trained on; None where they are not known."""
    strengths: Sequence[float] = ()
    """Weights at which the checkpoint to use is drawn too, ascending; none: it is not."""


def evaluate_generation(
    plan: GenerationPlan,
    pictures_folder: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    on_loaded: Callable[[], None] = lambda: None,
) -> GenerationResult:
    """Draw and measure everything in the plan. pictures_folder: every picture is saved there, in a folder for each checkpoint.
    on_loaded: called when all models are loaded and checked, before the first picture.

    Raises UserError where a model or an adapter cannot be read or does not fit, RunFailed where numbers overflow.
    """
    clip = None if plan.clip_model is None else ClipPictures(plan.clip_model, device)
    dino = DinoPictures(plan.dino_model, device)  # loaded before drawing, so that a wrong name is found at once
    model = load_model(locate_base(plan.base), dtype=dtype, device=device)
    model.folded.check(list(plan.adapters.values()))
    references = References.of(plan.photos, plan.trained, dino)
    on_loaded()
    save = _Saving(plan, pictures_folder)
    drawn = _draw_all(model, plan, save, say)
    with doing("measuring the pictures"):
        result = _Measurement(plan, references, drawn, dino, clip).result()
    if plan.strengths:
        chosen = to_use(result)
        swept = _draw_strengths(model, plan, chosen, drawn, save, say)
        with doing("measuring the pictures"):
            measured = _Measurement(plan, references, swept, dino, clip).result()
        result.strength = Strength(chosen, plan.strengths, measured)
    return result


def _draw_strengths(
    model: DrawingModel,
    plan: GenerationPlan,
    name: str,
    drawn: Mapping[str, CheckpointPictures],
    save: _Saving,
    say: Callable[[str], None],
) -> dict[str, CheckpointPictures]:
    """The base and a checkpoint at each weight, with the same prompts and seeds; at its own weight it is drawn already."""
    candidate = next(one for one in plan.candidates if one.name == name)
    swept = {BASE: replace(drawn[BASE], losses=None)}
    new = [weight for weight in plan.strengths if weight != plan.weight]
    with doing("drawing pictures", len(new) * len([*drawn[BASE].subject, *drawn[BASE].unrelated])) as activity:
        for weight in plan.strengths:
            if weight == plan.weight:
                swept[f"{weight:g}"] = replace(drawn[name], losses=None)
                continue
            say(f"{name} at weight {weight:g}")
            applied = AppliedAdapter(candidate.path, plan.adapters[name], weight)
            swept[f"{weight:g}"] = one = _draw_one(model, plan, applied, None, activity.advance)
            save(f"{name}@{weight:g}", one, applied)
    return swept


def _draw_all(
    model: DrawingModel, plan: GenerationPlan, save: _Saving, say: Callable[[str], None]
) -> dict[str, CheckpointPictures]:
    encoded = None
    if plan.photos:
        pictures, ids = [photo.picture for photo in plan.photos], [photo.name for photo in plan.photos]
        encoded = encode_photos(model, pictures, plan.photo_prompts, ids, plan.size)
    models: list[tuple[str, AppliedAdapter | None]] = [(BASE, None)]
    for candidate in plan.candidates:
        applied = AppliedAdapter(candidate.path, plan.adapters[candidate.name], plan.weight)
        models.append((candidate.name, applied))
    drawn = {}
    each = sum(len(prompts.places) for prompts in (plan.subject, plan.unrelated) if prompts is not None)
    with doing("drawing pictures", len(models) * each) as activity:
        for number, (name, adapter) in enumerate(models, start=1):
            say(f"{number}/{len(models)} {name}")
            drawn[name] = _draw_one(model, plan, adapter, encoded, activity.advance)
            save(name, drawn[name], adapter)
    return drawn


@dataclass
class _Saving:
    """Saves the pictures of checkpoints, in a folder for each; without a folder, nowhere."""

    plan: GenerationPlan
    folder: Path | None

    @cached_property
    def _base(self) -> tuple[str, str | None]:
        return model_name(self.plan.base), model_hash(Path(self.plan.base).expanduser())

    def __call__(self, name: str, drawn: CheckpointPictures, adapter: AppliedAdapter | None) -> None:
        if self.folder is None:
            return
        for kind, prompts, made in _by_kind(self.plan, drawn):
            save_pictures(self.folder / name.replace("/", "_"), kind, prompts, made, adapter, *self._base)


def _draw_one(
    model: DrawingModel,
    plan: GenerationPlan,
    adapter: AppliedAdapter | None,
    encoded: EncodedPhotos | None,
    count: Callable[[int], None],
) -> CheckpointPictures:
    subject = [] if plan.subject is None else draw_prompt_set(model, plan.subject, adapter, plan.batch_size, count)
    unrelated = draw_prompt_set(model, plan.unrelated, adapter, plan.batch_size, count)
    apply_adapter(model, adapter)
    losses = None if encoded is None else denoising_losses(model, encoded, plan.loss_seed, plan.clip_skip)
    return CheckpointPictures(subject, unrelated, losses)


def _by_kind(plan: GenerationPlan, drawn: CheckpointPictures) -> list[tuple[str, PromptSet, list[Image.Image]]]:
    of_subject = [] if plan.subject is None else [("subject", plan.subject, drawn.subject)]
    return [*of_subject, ("unrelated", plan.unrelated, drawn.unrelated)]


@dataclass
class _Measurement:
    """Computes the statistics of every measure by checkpoint, and the result from them."""

    plan: GenerationPlan
    references: References
    drawn: Mapping[str, CheckpointPictures]
    dino: DinoPictures
    clip: ClipPictures | None
    statistics: dict[str, dict[str, Statistic]] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    near_training: Sequence[NearTraining] = ()

    def result(self) -> GenerationResult:
        if self.plan.dino_model in TINY_TEACHERS and not is_ours(self.plan.base):
            self.notes.append(
                f"Likeness, drift and diversity are judged by {self.plan.dino_model}, which was trained on generated shapes only. "
                "Name a DINOv2 trained on photographs with --dino_model, such as facebook/dinov2-large."
            )
        self._measure_unrelated()
        if self.plan.subject is None:
            self.notes.append(
                "Likeness, identity, copies, diversity and distances to the photos are left out: no prompt names the subject. "
                "Give one with --prompt."
            )
        else:
            self._measure_subject(self.plan.subject)
        self._measure_losses()
        self._note_empty_pictures()
        names, order = list(self.drawn), [name for name in MEASURES if name in self.statistics]
        estimates = {name: {m: self._estimate(m, self.statistics[m][name]) for m in order} for name in names}
        paired = [name for name in order if not MEASURES[name].from_base]
        against = {name: {m: self._gap(m, name, BASE) for m in paired} for name in names if name != BASE}
        known = {candidate.name: candidate.step for candidate in self.plan.candidates}
        own = {name: known.get(name) for name in names if name != BASE}
        *earlier, newest = own
        last = {name: {m: self._gap(m, name, newest) for m in order} for name in earlier}
        best = {m: self._best(m, estimates) for m in order if MEASURES[m].better}
        notes = [*self.references.notes, *self.notes]
        return GenerationResult(
            own, dict(self.drawn), estimates, against, last, best, self.anchors, notes, near_training=self.near_training
        )

    def _add(self, measure: str, groups: Tensor, statistic: Callable[[str], Statistic]) -> None:
        self.groups[measure] = groups
        self.statistics[measure] = {name: statistic(name) for name in self.drawn}

    def _estimate(self, measure: str, statistic: Statistic) -> Estimate:
        return jackknife(statistic, self.groups[measure])

    def _gap(self, measure: str, name: str, other: str) -> Estimate:
        of = self.statistics[measure]
        return self._estimate(measure, difference(of[name], of[other]))

    def _best(self, measure: str, estimates: Mapping[str, Mapping[str, Estimate]]) -> Best:
        names = [name for name in self.drawn if name != BASE]
        best = max(names, key=lambda name: MEASURES[measure].better * estimates[name][measure].value)
        others = [name for name in names if name != best]
        return Best(best, [name for name in others if not self._gap(measure, name, best).is_significant])

    def _measure_unrelated(self) -> None:
        prompts = self.plan.unrelated
        groups = torch.tensor(prompts.groups)
        embedded = {name: unit(self.dino(drawn.unrelated)) for name, drawn in self.drawn.items()}
        pixels = {name: pixels_of(drawn.unrelated) for name, drawn in self.drawn.items()}
        self._add("drift", groups, lambda name: mean_of(measures.distances(embedded[name], embedded[BASE])))
        self._add("drift_pixels", groups, lambda name: mean_of(measures.pixel_distances(pixels[name], pixels[BASE])))
        another_seed = of_all(measures.diversity(embedded[BASE], groups), len(groups))
        if math.isfinite(another_seed):
            self.anchors["drift"] = another_seed
        self._measure_adherence("adherence", prompts, {name: drawn.unrelated for name, drawn in self.drawn.items()})

    def _measure_adherence(
        self, measure: str, prompts: PromptSet, pictures: Mapping[str, Sequence[Image.Image]]
    ) -> None:
        if self.clip is None:
            note = "Adherence and CMMD are left out: there is no CLIP. Name one with --clip_model (a transformers CLIPModel)."
            self.notes += [note] if note not in self.notes else []
            return
        clip = self.clip
        texts = clip.prompts([words_of(request) for request in prompts.requests])[prompts.groups]
        self._add(
            measure,
            torch.tensor(prompts.groups),
            lambda name: mean_of((clip.pictures(pictures[name]) * texts).double().sum(dim=1)),
        )

    def _measure_subject(self, prompts: PromptSet) -> None:
        groups, plan = torch.tensor(prompts.groups), self.plan
        own = {name: self.dino(drawn.subject) for name, drawn in self.drawn.items()}
        diversity = {name: measures.diversity(unit(rows), groups) for name, rows in own.items()}
        if len(prompts.seeds) > 1:
            self._add("diversity", groups, lambda name: measures.ratio(diversity[name], diversity[BASE]))
            if len(prompts.seeds) == 2:
                self.notes.append(
                    "Diversity has no standard error: that needs three pictures of each prompt. Raise --num_samples."
                )
        else:
            self.notes.append("Diversity is left out: each prompt has a single picture. Raise --num_samples.")
        self._measure_identity(prompts, own)
        self._measure_copies(own)
        self._measure_adherence(
            "adherence_subject", prompts, {name: drawn.subject for name, drawn in self.drawn.items()}
        )
        if not plan.photos:
            self.notes.append(
                "Likeness, KID, CMMD and the denoising loss are left out: there are no held-out photos of the subject. Name a "
                "folder with --reference_dir."
            )
            return
        pictures, photos = [photo.picture for photo in plan.photos], self.references.photos
        self._add("likeness", groups, lambda name: mean_of(measures.likeness(unit(own[name]), unit(photos))))
        self.anchors["likeness"] = measures.likeness_among(unit(photos))
        if min(len(groups), len(photos)) < measures.FEWEST_FOR_SETS:
            left_out = "KID is left out: it needs" if self.clip is None else "KID and CMMD are left out: they need"
            self.notes.append(
                f"{left_out} {measures.FEWEST_FOR_SETS} pictures and as many photos; there are {len(groups)} and {len(photos)}. "
                "With fewer, the noise exceeds the difference."
            )
            return
        self._add("kid", groups, lambda name: measures.kernel_distance(own[name], photos))
        if self.clip is not None:
            clip, embedded_photos = self.clip, self.clip.pictures(pictures)
            self._add(
                "cmmd",
                groups,
                lambda name: measures.clip_distance(clip.pictures(self.drawn[name].subject), embedded_photos),
            )

    def _measure_identity(self, prompts: PromptSet, own: Mapping[str, Tensor]) -> None:
        """own: name -> embeddings of the subject's pictures."""
        if not len(photos := self.references.gallery):
            return
        base = unit(own[BASE])
        found = self.references.identity_of([words_of(prompts.requests[at]) for at in prompts.groups])
        if found is None:
            self.notes.append(
                "Identity is left out: held-out photos are of several subjects or classes, and no caption of theirs says of "
                "which a prompt of the subject is."
            )
            return
        is_own, left_out = found
        searched = torch.cat([unit(photos), base])
        self._add(
            "identity",
            torch.tensor(prompts.groups),
            lambda name: mean_of(measures.finds_own(unit(own[name]), searched, is_own, left_out)),
        )
        self.anchors["identity"] = float((is_own.sum(dim=1) / (~left_out).sum(dim=1)).mean())

    def _measure_copies(self, own: Mapping[str, Tensor]) -> None:
        references = self.references
        if not len(references.trained):
            self.notes.append(
                "Copies of training pictures are not looked for: these pictures are not known. Name their folder with "
                "--train_data_dir."
            )
            return
        groups = torch.tensor(self.plan.subject.groups)  # type: ignore[union-attr]
        nearest = {name: measures.nearest_photo(unit(rows), unit(references.trained)) for name, rows in own.items()}
        self._add("nearness", groups, lambda name: mean_of(nearest[name][0]))
        level = references.copying_level
        if level is None:
            self.notes.append(
                f"Copies are not counted: it takes {measures.FEWEST_REAL} different photos and training pictures to know how near "
                "these are to each other."
            )
        else:
            self._add("copies", groups, lambda name: mean_of((nearest[name][0] > level[0]).double()))
            self.anchors |= {"nearness": references.nearness, "copies": level[1]}
        self.near_training = references.worst(
            {name: found for name, found in nearest.items() if name != BASE}, math.inf if level is None else level[0]
        )

    def _measure_losses(self) -> None:
        if self.drawn[BASE].losses is None:
            return
        ratios = {name: log_ratios(drawn.losses, self.drawn[BASE].losses) for name, drawn in self.drawn.items()}  # type: ignore[arg-type]
        one_group = torch.zeros(len(self.plan.photos), dtype=torch.int64)
        self._add("loss", one_group, lambda name: mean_of(ratios[name].mean(dim=1)))
        for quarter in range(QUARTERS):
            self._add(f"loss_q{quarter + 1}", one_group, lambda name, q=quarter: mean_of(ratios[name][:, q]))  # type: ignore[misc]

    def _note_empty_pictures(self) -> None:
        for name, pictures in self.drawn.items():
            if empty := count_empty(drawn := [*pictures.subject, *pictures.unrelated]):
                self.notes.append(
                    f"{empty} of {plural(len(drawn), 'picture')} of {name} {'is' if empty == 1 else 'are'} "
                    "empty: black, or of one colour."
                )
