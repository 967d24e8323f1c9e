"""What a run draws, loses and knows: the slow part, kept in its folder, and the numbers that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from library.device import choose_device
from library.evaluation import picture_measures
from library.evaluation.baselines import RidgeHead
from library.evaluation.denoising import QUARTERS, denoising_losses, encode_photos, log_ratios
from library.evaluation.feature_model import FeatureModel, load_feature_model, load_folded_model
from library.evaluation.generated_pictures import (
    AppliedAdapter,
    apply_adapter,
    draw_prompt_set,
    pixels_of,
    save_pictures,
)
from library.evaluation.picture_encoders import ClipPictures, DinoPictures, unit
from library.evaluation.probe_pictures import ProbePictures, open_probe_pictures
from library.evaluation.prompt_sets import PromptSet
from library.evaluation.representation import TIMESTEPS
from library.evaluation.representation_measures import RepresentationMeasures
from library.evaluation.similarity import pool_tokens
from library.evaluation.standard_errors import jackknife, mean_of, of_all
from library.evaluation.tap_features import features_at_tap
from library.files import read_json, write_json
from library.inference.drawing_model import DrawingModel, load_model
from library.merging.source import read_source
from library.models.locate import locate_base
from library.options.data import ClassCacheOptions, ClassPictureOptions
from library.training.metrics_file import METRICS, metric_rows
from library.training.state import list_states
from tools.alignment_study.commands import adapter_file, plan_of, validation_steps
from tools.alignment_study.reader import Reader, share_right
from tools.alignment_study.settings import CONCEPT, SCRATCH, Folders, Run, Settings
from tools.alignment_study.subjects import Subject

MEASURED = "measured.json"
LOSS_SEED, NOISE_SEED = 0, 0
NEIGHBOURS, MOST_PROBED = 10, 512
COSINE = "align/gradient_cosine"
BATCH = 8
BY_TIMESTEP = ("linear_probe", "knn_accuracy", "mutual_knn", "token_cosine", "token_cosine_centred")


def measure(
    run: Run | None, study: str, settings: Settings, folders: Folders, subject: Subject, model: DrawingModel
) -> None:
    """Draw, and measure losses and features, of a run or of the untouched base (None); kept in the run's folder.

    model: the study's base, loaded. Nothing is done where it was done before: `measured.json` is written last.
    """
    folder, plan = measured_folder(run, study, folders), plan_of(study, settings, folders)
    if (folder / MEASURED).exists():
        return
    applied = None if run is None else _applied(adapter_file(run, folders))
    for kind, task in (("new", subject.new), ("old", subject.old)):
        save_pictures(folder / "drawn", kind, task, draw_prompt_set(model, task, applied, BATCH), applied, plan.base)
    for step, state in milestones(run, folders):
        halfway = _applied(state)
        save_pictures(
            folder / "drawn",
            _at(step),
            subject.new,
            draw_prompt_set(model, subject.new, halfway, BATCH),
            halfway,
            plan.base,
        )
    apply_adapter(model, applied)
    pictures, names = [photo.picture for photo in subject.photos], [photo.name for photo in subject.photos]
    noised = encode_photos(model, pictures, subject.photo_prompts, names, plan.side)
    found: dict[str, Any] = {"losses": denoising_losses(model, noised, LOSS_SEED).tolist()}
    if study != CONCEPT:
        found["features"] = _features(run, study, settings, folders)
    if run is not None:
        found["validation"] = validation_curve(folder / METRICS)
    write_json(folder / MEASURED, found)


def milestones(run: Run | None, folders: Folders) -> list[tuple[int, Path]]:
    """(step, state) before the end of a run from nothing, from which pictures are drawn too; of other runs there are none.

    States that an interruption left between those that were asked for are none of them.
    """
    if run is None or run.study != SCRATCH:
        return []
    states = list_states(folders.run(run))
    every = 2 * validation_steps(states[-1][0])
    return [(step, state) for step, state in states[:-1] if step % every == 0]


def _applied(path: Path) -> AppliedAdapter:
    return AppliedAdapter(path, read_source(path, use_ema=path.is_dir()).adapter)


def _at(step: int) -> str:
    return f"step{step:06d}"


def measured_folder(run: Run | None, study: str, folders: Folders) -> Path:
    return folders.study(study) / "base" if run is None else folders.run(run)


def load_drawing_model(base: str) -> DrawingModel:
    return load_model(locate_base(base), dtype=torch.float32, device=choose_device(None))


def validation_curve(metrics: Path) -> list[dict[str, float]]:
    """The rows of a training's own validations: {"step", "val/loss", ...}."""
    return [row for row in metric_rows(metrics) if "val/loss" in row]


def _features(run: Run | None, study: str, settings: Settings, folders: Folders) -> list[dict[str, float]]:
    """At each timestep, what probes and a newly fitted head read off the trunk, on held-out pictures."""
    device, plan = choose_device(None), plan_of(study, settings, folders)
    if run is None:
        model = load_folded_model(plan.base, device=device)
    else:
        model = load_feature_model(list_states(folders.run(run))[-1][1], device=device)
    own = folders.pictures(study)
    classes = ClassPictureOptions(str(own / "train.csv"), str(own / "val.csv"), class_names=own / "class_names.json")
    caches = ClassCacheOptions(cache_dir=folders.caches(study))
    pictures = open_probe_pictures(classes, caches, side=plan.side, fit=MOST_PROBED, test=MOST_PROBED)
    measures = RepresentationMeasures(len(pictures.test), NEIGHBOURS, (), probes=True)
    if run is None:
        for sentence in measures.left_out():
            print(f"note       {sentence}", flush=True)
    return [
        {"timestep": timestep, **_features_at(model, pictures, measures, settings.tap, timestep)}
        for timestep in TIMESTEPS
    ]


def _features_at(
    model: FeatureModel, pictures: ProbePictures, measures: RepresentationMeasures, tap: str, timestep: int
) -> dict[str, float]:
    fit_set, test_set = pictures.fit, pictures.test
    fit, test = (
        features_at_tap(
            model, one.samples, pictures.empty_prompt, tap=tap, timestep=timestep, seed=NOISE_SEED, batch_size=16
        )
        for one in (fit_set, test_set)
    )
    teacher = test_set.teacher()
    head = RidgeHead.fit(fit.maps, fit_set.teacher(), fit_set.ids)
    found = measures.of_probes(fit.trunk, fit_set.labels, test.trunk, test_set.labels, fit_set.ids)
    # In this order: of what both know, the trunk's is kept.
    found |= measures.of_tokens(head(test.maps), teacher) | measures.of_features(test.trunk, pool_tokens(teacher))
    return {name: found[name] for name in BY_TIMESTEP if name in found}


@dataclass
class Judges:
    """reader: of drawn shapes alone. clip: None where the one that comes with the project would judge photos."""

    dino: DinoPictures
    clip: ClipPictures | None
    reader: Reader | None


class Numbers:
    """The numbers of all runs of a study, from what `measure` kept."""

    def __init__(self, study: str, subject: Subject, judges: Judges, folders: Folders) -> None:
        self.study, self.subject, self.judges, self.folders = study, subject, judges, folders
        self.photo_kinds = subject.kinds
        pictures = [photo.picture for photo in subject.photos]
        self.photos = {"dino": unit(judges.dino(pictures))}
        if judges.clip is not None:
            self.photos["clip"] = judges.clip.pictures(pictures)
        self.real, self.unit = None, 1.0
        if judges.reader is not None:
            real = _features_of(judges.reader, pictures)
            self.unit = float(real.square().mean().sqrt())
            self.real = real / self.unit
        self.base = self._seen(None)

    def of(self, run: Run | None) -> dict[str, float]:
        """By the names of `compare.MEASURES`."""
        seen = self.base if run is None else self._seen(run)
        subject, new = self.subject, unit(self.judges.dino(seen.new))
        asked = [subject.asked_new[group] for group in subject.new.groups]
        own, other = self._likeness(new, asked, "dino")
        found = self._judged(seen.new) | {
            "likeness": float(own.mean()),
            "diversity": of_all(picture_measures.diversity(new, torch.tensor(subject.new.groups)), len(asked)),
        }
        if self.judges.clip is not None:
            clip = self.judges.clip.pictures(seen.new)
            found["likeness_clip"] = float(self._likeness(clip, asked, "clip")[0].mean())
        if other is not None:
            found["likeness_margin"] = float((own - other).mean())
        if self.judges.reader is not None and subject.asked_old is not None:
            asked_old = [subject.asked_old[group] for group in subject.old.groups]
            found["right_old"] = share_right(self.judges.reader, seen.old, asked_old)
        if run is not None:
            found |= self._drift(seen) | self._losses(seen)
        return found | {
            name: fmean(row[name] for row in seen.features)
            for name in BY_TIMESTEP
            if seen.features and name in seen.features[0]
        }

    def course(self, run: Run) -> dict[str, dict[str, float]]:
        """Step -> what the classifier says of the pictures of that state, the last one's with them."""
        folder = measured_folder(run, self.study, self.folders) / "drawn"
        found = {
            str(step): self._judged(_saved(folder, _at(step), self.subject.new))
            for step, _ in milestones(run, self.folders)
        }
        last, _ = list_states(self.folders.run(run))[-1]
        return {**found, str(last): self._judged(self._seen(run).new)}

    def gradients(self, run: Run) -> dict[str, float]:
        """Step -> cosine between the gradients of both losses, where the training measured it."""
        rows = metric_rows(self.folders.run(run) / METRICS)
        return {f"{row['step']}": row[COSINE] for row in rows if COSINE in row}

    def _judged(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """What the classifier says of pictures of all that `new` asks for; {} where there is none."""
        reader, asked = self.judges.reader, [self.subject.asked_new[group] for group in self.subject.new.groups]
        if reader is None or self.real is None:
            return {}
        found = {"right": share_right(reader, pictures, asked)}
        if min(len(pictures), len(self.real)) >= picture_measures.FEWEST_FOR_SETS:
            distance = picture_measures.kernel_distance(_features_of(reader, pictures) / self.unit, self.real)
            found["kid"] = of_all(distance, len(pictures))
        return found

    def _drift(self, seen: Seen) -> dict[str, float]:
        if not seen.old:
            return {}
        old, before = (unit(self.judges.dino(one.old)) for one in (seen, self.base))
        pixels = picture_measures.pixel_distances(pixels_of(seen.old), pixels_of(self.base.old))
        distances = picture_measures.distances(old, before)
        return {"drift": float(distances.mean()), "drift_pixels": float(pixels.mean())}

    def _losses(self, seen: Seen) -> dict[str, float]:
        ratios = log_ratios(seen.losses, self.base.losses).mean(dim=0)
        return {
            "loss": float(ratios.mean()),
            **{f"loss_q{quarter + 1}": float(ratios[quarter]) for quarter in range(QUARTERS)},
        }

    def gain(self, run: Run) -> dict[str, Any]:
        """Likeness beyond the base's, picture by picture of the same prompt and seed, with its spread over the seeds of drawing."""
        asked = [self.subject.asked_new[group] for group in self.subject.new.groups]
        ours, base = (
            self._likeness(unit(self.judges.dino(one.new)), asked, "dino")[0] for one in (self._seen(run), self.base)
        )
        return jackknife(mean_of(ours - base), torch.tensor(self.subject.new.groups)).to_json()

    def photos_among_themselves(self) -> float | None:
        """Mean likeness of the held-out pictures to others of their kind: what pictures as good as these would get. None where no
        kind has two."""
        photos = self.photos["dino"]
        kinds = sorted(kind for kind, count in Counter(self.photo_kinds).items() if count > 1)
        return fmean(picture_measures.likeness_among(photos[self._of_kind(kind)]) for kind in kinds) if kinds else None

    def _likeness(self, pictures: Tensor, asked: Sequence[str], judge: str) -> tuple[Tensor, Tensor | None]:
        """Of each picture, the mean cosine to photos of the kind that was asked for, and to those of the others: [n] each."""
        photos = self.photos[judge]
        own = torch.empty(len(asked), dtype=torch.float64)
        other = torch.empty(len(asked), dtype=torch.float64)
        for kind in set(asked):
            rows = torch.tensor([one == kind for one in asked])
            mine = self._of_kind(kind)
            own[rows] = picture_measures.likeness(pictures[rows], photos[mine])
            if not mine.all():
                other[rows] = picture_measures.likeness(pictures[rows], photos[~mine])
        return own, other if len(set(self.photo_kinds)) > 1 else None

    def _of_kind(self, kind: str) -> Tensor:
        return torch.tensor([one == kind for one in self.photo_kinds])

    def _seen(self, run: Run | None) -> Seen:
        folder = measured_folder(run, self.study, self.folders)
        kept = read_json(folder / MEASURED)
        new, old = (
            _saved(folder / "drawn", kind, task)
            for kind, task in (("new", self.subject.new), ("old", self.subject.old))
        )
        return Seen(new, old, torch.tensor(kept["losses"], dtype=torch.float64), kept.get("features", []))


@torch.no_grad()
def _features_of(reader: Reader, pictures: Sequence[Image.Image]) -> Tensor:
    return reader.features(pixels_of(pictures))


@dataclass
class Seen:
    """new, old: pictures in the order of the tasks' places. losses [photos, timesteps]. features: by timestep."""

    new: list[Image.Image]
    old: list[Image.Image]
    losses: Tensor
    features: list[Mapping[str, float]]


def _saved(folder: Path, kind: str, task: PromptSet) -> list[Image.Image]:
    return [Image.open(folder / f"{kind}_{number:02d}_{seed}.png").convert("RGB") for number, seed in task.places]
