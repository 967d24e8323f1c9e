"""How checkpoints of a LoRA draw: likeness, drift, adherence, diversity, distances to the photos, denoising loss.

Every checkpoint, and the base without an adapter, draws the same prompts with the same seeds, so that two of them are
compared picture by picture and what a seed does to both cancels. Each number comes with its spread over seeds (of the
losses: over photos), and two checkpoints are called different only beyond the spread of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from library.evaluation import picture_measures as measures
from library.evaluation.checkpoints import Candidate
from library.evaluation.denoising import QUARTERS, NoisedPhotos, denoising_losses, encode_photos, log_ratios
from library.evaluation.drawn import Worn, count_flat, draw_task, pixels_of, save_pictures, wear
from library.evaluation.estimates import Estimate, Statistic, difference, jackknife, mean_of, of_all
from library.evaluation.photos import Photo
from library.evaluation.picture_encoders import ClipPictures, DinoPictures, unit
from library.evaluation.prompts import Task, is_ours, words_of
from library.inference.infotext import model_hash
from library.inference.model import DrawingModel, load_model
from library.inference.pictures import model_name
from library.models.embedded import TINY_TEACHERS
from library.models.locate import locate_base
from networks.adapters import Adapter

BASE = "base"
"""What the base without an adapter is called among the checkpoints."""


@dataclass(frozen=True)
class Measure:
    title: str
    meaning: str
    better: int
    """1: more is better, -1: less is, 0: neither."""
    from_base: bool = False
    """Whether it is a distance to the base, which is 0 for the base itself and never below: no seed can bring that out."""


MEASURES = {
    "likeness": Measure(
        "Likeness", "Cosine of a picture's DINOv2 embedding to those of the held-out photos, mean over all pairs.", 1
    ),
    "drift": Measure(
        "Drift",
        "1 - DINOv2 cosine of pictures of unrelated prompts with the adapter and without, of the same seed.",
        -1,
        from_base=True,
    ),
    "drift_pixels": Measure(
        "Drift in pixels",
        "Root mean square difference of the same pairs of pictures, as a share of white.",
        -1,
        from_base=True,
    ),
    "adherence": Measure("Adherence", "CLIP cosine of pictures of unrelated prompts to their prompts.", 1),
    "adherence_subject": Measure(
        "Adherence, subject",
        "CLIP cosine of the subject's pictures to their prompts. CLIP does not know a new word.",
        1,
    ),
    "diversity": Measure(
        "Diversity",
        "1 - DINOv2 cosine between seeds of one prompt of the subject, as a share of what the base has.",
        0,
    ),
    "kid": Measure("KID", "Unbiased kernel distance of the subject's pictures to the photos, on DINOv2.", -1),
    "cmmd": Measure("CMMD", "Unbiased CLIP distance (MMD x 1000) of the subject's pictures to the photos.", -1),
    "loss": Measure(
        "Denoising loss", "Log of the loss on the held-out photos over the base's, paired: -0.1 is 10 % less.", -1
    ),
    **{
        f"loss_q{quarter}": Measure(
            f"Loss, quarter {quarter}", f"The same on quarter {quarter} of the timesteps; 1 is the least noise.", -1
        )
        for quarter in range(1, QUARTERS + 1)
    },
}


@dataclass(frozen=True)
class Wanted:
    """subject: None where nothing says what the subject is called. photos: none leaves out what needs them."""

    base: str
    candidates: Sequence[Candidate]
    adapters: Mapping[str, Adapter]
    """By the candidates' names."""
    subject: Task | None
    unrelated: Task
    photos: Sequence[Photo]
    photo_prompts: Sequence[str]
    size: int
    dino_model: str
    clip_model: str | None
    weight: float = 1.0
    clip_skip: int = 1
    batch_size: int = 1
    loss_seed: int = 0


@dataclass
class Pictures:
    """What one checkpoint drew, and its losses [photos, timesteps]."""

    subject: list[Image.Image]
    unrelated: list[Image.Image]
    losses: Tensor | None


@dataclass
class GenerationResult:
    """drawn, estimates: by checkpoint, BASE first. against_base: of each measure that is not from_base, the paired difference."""

    candidates: Sequence[Candidate]
    drawn: dict[str, Pictures]
    estimates: dict[str, dict[str, Estimate]]
    against_base: dict[str, dict[str, Estimate]]
    best: dict[str, Best]
    anchors: dict[str, float]
    notes: list[str]

    @property
    def names(self) -> list[str]:
        """Of the checkpoints, without the base."""
        return [candidate.name for candidate in self.candidates]

    @property
    def measured(self) -> list[str]:
        return list(self.estimates[BASE])

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures; what is not known is null."""
        steps: dict[str, int | None] = {BASE: 0, **{one.name: one.step for one in self.candidates}}
        rows = []
        for name, step in steps.items():
            row: dict[str, Any] = {"name": name, "step": step}
            row["metrics"] = {measure: one.to_json() for measure, one in self.estimates[name].items()}
            if name != BASE:
                row["against_base"] = {
                    measure: {**one.to_json(), "told_apart": one.is_told_from_zero}
                    for measure, one in self.against_base[name].items()
                }
            rows.append(row)
        return {
            "meanings": {name: MEASURES[name].meaning for name in self.measured},
            "checkpoints": rows,
            "best": {name: {"checkpoint": one.name, "not_told_apart": one.alike} for name, one in self.best.items()},
            "anchors": self.anchors,
            "left_out": self.notes,
        }


@dataclass(frozen=True)
class Best:
    """Of the checkpoints by one measure. alike: those whose difference to it lies within its spread."""

    name: str
    alike: list[str]


def evaluate_generation(
    wanted: Wanted,
    pictures_folder: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    on_loaded: Callable[[], None] = lambda: None,
) -> GenerationResult:
    """Draw and measure everything that is wanted. pictures_folder: where every picture is saved, a folder for each checkpoint.
    on_loaded: called once all models are there and fit, before the first picture.

    Raises UserError where a model or an adapter cannot be read or does not fit, RunFailed where numbers overflow.
    """
    clip = None if wanted.clip_model is None else ClipPictures(wanted.clip_model, device)
    dino = DinoPictures(wanted.dino_model, device)  # before anything is drawn, so that a wrong name is found at once
    model = load_model(locate_base(wanted.base), dtype=dtype, device=device)
    model.folded.check(list(wanted.adapters.values()))
    on_loaded()
    drawn = _draw_all(model, wanted, pictures_folder, say)
    del model
    say("measuring")
    return _Measured(wanted, drawn, dino, clip).result()


def _draw_all(
    model: DrawingModel, wanted: Wanted, folder: Path | None, say: Callable[[str], None]
) -> dict[str, Pictures]:
    noised = None
    if wanted.photos:
        pictures, ids = [photo.picture for photo in wanted.photos], [photo.name for photo in wanted.photos]
        noised = encode_photos(model, pictures, wanted.photo_prompts, ids, wanted.size)
    everyone: list[tuple[str, Worn | None]] = [(BASE, None)]
    everyone += [(one.name, Worn(one.path, wanted.adapters[one.name], wanted.weight)) for one in wanted.candidates]
    drawn = {}
    named = model_name(wanted.base), None if folder is None else model_hash(Path(wanted.base).expanduser())
    for number, (name, worn) in enumerate(everyone, start=1):
        say(f"{number}/{len(everyone)} {name}")
        drawn[name] = _draw_one(model, wanted, worn, noised)
        if folder is not None:
            for kind, task, made in _kinds(wanted, drawn[name]):
                save_pictures(folder / name.replace("/", "_"), kind, task, made, worn, *named)
    return drawn


def _draw_one(model: DrawingModel, wanted: Wanted, worn: Worn | None, noised: NoisedPhotos | None) -> Pictures:
    subject = [] if wanted.subject is None else draw_task(model, wanted.subject, worn, wanted.batch_size)
    unrelated = draw_task(model, wanted.unrelated, worn, wanted.batch_size)
    wear(model, worn)
    losses = None if noised is None else denoising_losses(model, noised, wanted.loss_seed, wanted.clip_skip)
    return Pictures(subject, unrelated, losses)


def _kinds(wanted: Wanted, drawn: Pictures) -> list[tuple[str, Task, list[Image.Image]]]:
    of_subject = [] if wanted.subject is None else [("subject", wanted.subject, drawn.subject)]
    return [*of_subject, ("unrelated", wanted.unrelated, drawn.unrelated)]


@dataclass
class _Measured:
    """Builds the statistics of every measure, by checkpoint, and what follows from them."""

    wanted: Wanted
    drawn: Mapping[str, Pictures]
    dino: DinoPictures
    clip: ClipPictures | None
    statistics: dict[str, dict[str, Statistic]] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def result(self) -> GenerationResult:
        if self.wanted.dino_model in TINY_TEACHERS and not is_ours(self.wanted.base):
            self.notes.append(
                f"Likeness, drift and diversity are judged by {self.wanted.dino_model}, which knows generated shapes alone. Name "
                "a DINOv2 that knows photographs with --dino_model, such as facebook/dinov2-large."
            )
        self._unrelated()
        if self.wanted.subject is None:
            self.notes.append(
                "Likeness, diversity and distances to the photos are left out: nothing says what the subject is called. Name "
                "it with --prompt."
            )
        else:
            self._subject(self.wanted.subject)
        self._losses()
        self._flat()
        names, order = list(self.drawn), [name for name in MEASURES if name in self.statistics]
        estimates = {name: {m: self._estimate(m, self.statistics[m][name]) for m in order} for name in names}
        paired = [name for name in order if not MEASURES[name].from_base]
        against = {name: {m: self._gap(m, name, BASE) for m in paired} for name in names if name != BASE}
        best = {m: self._best(m, estimates) for m in order if MEASURES[m].better}
        return GenerationResult(
            self.wanted.candidates, dict(self.drawn), estimates, against, best, self.anchors, self.notes
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
        return Best(best, [name for name in others if not self._gap(measure, name, best).is_told_from_zero])

    def _unrelated(self) -> None:
        task = self.wanted.unrelated
        groups = torch.tensor(task.groups)
        embedded = {name: unit(self.dino(one.unrelated)) for name, one in self.drawn.items()}
        pixels = {name: pixels_of(one.unrelated) for name, one in self.drawn.items()}
        self._add("drift", groups, lambda name: mean_of(measures.distances(embedded[name], embedded[BASE])))
        self._add("drift_pixels", groups, lambda name: mean_of(measures.pixel_distances(pixels[name], pixels[BASE])))
        another = of_all(measures.diversity(embedded[BASE], groups), len(groups))
        if math.isfinite(another):
            self.anchors["drift"] = another
        self._adherence("adherence", task, {name: one.unrelated for name, one in self.drawn.items()})

    def _adherence(self, measure: str, task: Task, pictures: Mapping[str, Sequence[Image.Image]]) -> None:
        if self.clip is None:
            note = "Adherence and CMMD are left out: there is no CLIP. Name one with --clip_model (a transformers CLIPModel)."
            self.notes += [note] if note not in self.notes else []
            return
        clip = self.clip
        prompts = clip.prompts([words_of(request) for request in task.requests])[task.groups]
        self._add(
            measure,
            torch.tensor(task.groups),
            lambda name: mean_of((clip.pictures(pictures[name]) * prompts).double().sum(dim=1)),
        )

    def _subject(self, task: Task) -> None:
        groups, wanted = torch.tensor(task.groups), self.wanted
        own = {name: self.dino(one.subject) for name, one in self.drawn.items()}
        diversity = {name: measures.diversity(unit(rows), groups) for name, rows in own.items()}
        if len(task.seeds) > 1:
            self._add("diversity", groups, lambda name: measures.ratio(diversity[name], diversity[BASE]))
            if len(task.seeds) == 2:
                self.notes.append(
                    "Of diversity the spread is not known: it wants three pictures of each prompt. Raise --num_samples."
                )
        else:
            self.notes.append("Diversity is left out: there is one picture of each prompt. Raise --num_samples.")
        self._adherence("adherence_subject", task, {name: one.subject for name, one in self.drawn.items()})
        if not wanted.photos:
            self.notes.append(
                "Likeness, KID, CMMD and the denoising loss are left out: there are no held-out photos. Name a folder with "
                "--reference_dir."
            )
            return
        pictures = [photo.picture for photo in wanted.photos]
        photos = self.dino(pictures)
        self._add("likeness", groups, lambda name: mean_of(measures.likeness(unit(own[name]), unit(photos))))
        self.anchors["likeness"] = measures.likeness_among(unit(photos))
        if min(len(groups), len(photos)) < measures.FEWEST_FOR_SETS:
            named = "KID is left out: it wants" if self.clip is None else "KID and CMMD are left out: they want"
            self.notes.append(
                f"{named} {measures.FEWEST_FOR_SETS} pictures and as many photos, and there are {len(groups)} and {len(photos)}. "
                "With fewer, there is more noise than difference."
            )
            return
        self._add("kid", groups, lambda name: measures.kernel_distance(own[name], photos))
        if self.clip is not None:
            clip, theirs = self.clip, self.clip.pictures(pictures)
            self._add(
                "cmmd", groups, lambda name: measures.clip_distance(clip.pictures(self.drawn[name].subject), theirs)
            )

    def _losses(self) -> None:
        if self.drawn[BASE].losses is None:
            return
        ratios = {name: log_ratios(one.losses, self.drawn[BASE].losses) for name, one in self.drawn.items()}  # type: ignore[arg-type]
        alone = torch.zeros(len(self.wanted.photos), dtype=torch.int64)
        self._add("loss", alone, lambda name: mean_of(ratios[name].mean(dim=1)))
        for quarter in range(QUARTERS):
            self._add(f"loss_q{quarter + 1}", alone, lambda name, q=quarter: mean_of(ratios[name][:, q]))  # type: ignore[misc]

    def _flat(self) -> None:
        for name, one in self.drawn.items():
            if flat := count_flat([*one.subject, *one.unrelated]):
                total = len(one.subject) + len(one.unrelated)
                self.notes.append(
                    f"{flat} of {total} pictures of {name} have nothing on them: black, or of one colour."
                )
