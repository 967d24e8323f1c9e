"""How well a checkpoint of U-REPA training predicts the teacher's representation, compared with the base, chance and constants.

Everything is measured on held-out pictures, at several timesteps, with the empty prompt, and once per noise seed. Trunk (the
U-Net's map at the tap) and head (the tokens that an AlignHead predicts from it) are measured separately: a head can learn the
teacher's tokens while the trunk, which generates, stays as it was. So the same kind of head is fitted to the trunks of the
checkpoint and of the frozen base: their difference is the effect of training on the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.diffusion.alignment_losses import spatially_normalised
from library.diffusion.dense_maps import DenseMaps, dense_maps
from library.errors import UserError
from library.evaluation import baselines
from library.evaluation.feature_model import FeatureModel, load_feature_model
from library.evaluation.probe_pictures import ProbePictures, pictures_of_state
from library.evaluation.representation_measures import RepresentationMeasures, meaning, of_each_token
from library.evaluation.sight import Sight, spread_over, what_is_seen
from library.evaluation.similarity import pool_tokens, sample_similarity_mae
from library.evaluation.standard_errors import Spread, transposed
from library.evaluation.tap_features import TapFeatures, features_at_tap
from library.models.fingerprint import weight_fingerprint
from library.models.locate import locate_base
from library.progress import doing
from library.training.saving import StepSaving
from library.training.state import read_facts
from networks import AdapterError
from networks.families import UNET
from networks.features import tap_block

TIMESTEPS = (1, 50, 100, 261, 400, 500, 750)
"""261 is DIFT's (arXiv 2306.03881); segmentation is best near 100 (CleanDIFT, arXiv 2412.03439); the others cover the range."""
BEST_GRID_PICTURES = 64
RANDOM_TRUNK_SEED = 0


@dataclass(frozen=True)
class RepresentationSettings:
    tap: str | None = None
    """The trunk's tap that is measured. Default: that of the checkpoint's first head, else mid."""
    timesteps: tuple[int, ...] = TIMESTEPS
    seeds: tuple[int, ...] = (0, 1, 2)
    """Noise seeds; every number is the mean over them, with its standard deviation."""
    fit_samples: int = 512
    """At most so many training pictures, to fit probes and heads on."""
    test_samples: int = 512
    """At most so many held-out pictures."""
    neighbours: int = 10
    """k of mutual_knn, cknna and knn_accuracy."""
    recall_at: tuple[int, ...] = (1, 5, 10)
    batch_size: int = 16
    pictures: int = 6
    """How many held-out pictures are shown as dense maps."""
    picture_timestep: int = 261
    """The timestep of dense maps and of earlier states; the nearest of `timesteps` is used."""
    baselines: bool = True
    """False: only the checkpoint's rows, and no dense maps."""

    def __post_init__(self) -> None:
        for name in ("timesteps", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(f"{name} must name each once, and at least one; got {list(values)}.")
        for name, least in (("fit_samples", 10), ("test_samples", 4), ("neighbours", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    @property
    def pictured_at(self) -> int:
        return min(self.timesteps, key=lambda timestep: abs(timestep - self.picture_timestep))


@dataclass(frozen=True)
class Row:
    """The measures of one model at one timestep. kind: tokens in the teacher's space, or features in their own. timestep: None of
    constants."""

    name: str
    kind: Literal["tokens", "features"]
    timestep: int | None
    measures: dict[str, Spread]


@dataclass
class RepresentationResult:
    checkpoint: str
    tap: str
    settings: RepresentationSettings
    fitted: int
    held_out: int
    classes: int
    chance: dict[str, float]
    """The value of uninformative features, of measures where that is not 0."""
    rows: list[Row]
    notes: list[str]
    pictures: list[DenseMaps] = field(default_factory=list)
    pictured: str = ""
    """Which tokens the dense maps show, and at which timestep."""
    seen: list[Sight] = field(default_factory=list)
    """What the checkpoint's head reads off its own trunk and off the base's, at several timesteps."""
    earlier: list[RepresentationResult] = field(default_factory=list)
    """Results of earlier states of the training, in order, at one timestep and without baselines."""

    def row(self, name: str, timestep: int | None = None) -> Row:
        """The row of that name and timestep. Raises KeyError where there is none."""
        for row in self.rows:
            if row.name == name and row.timestep == timestep:
                return row
        raise KeyError((name, timestep))

    def names(self) -> list[str]:
        """The names of the rows, each once, in order."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def to_json(self) -> dict[str, Any]:
        """Everything except the pictures, as plain numbers and words; nan becomes null."""
        measured = dict.fromkeys(name for row in self.rows for name in row.measures)
        return {
            "checkpoint": self.checkpoint,
            "tap": self.tap,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()},
            "pictures": {"fitted": self.fitted, "held_out": self.held_out, "classes": self.classes},
            "chance": self.chance,
            "meanings": {name: meaning(name) for name in measured},
            "rows": _rows_json(self.rows),
            "earlier": [{"checkpoint": result.checkpoint, "rows": _rows_json(result.rows)} for result in self.earlier],
            "notes": self.notes,
        }


def _rows_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "timestep": row.timestep,
            "measures": {name: spread.to_json() for name, spread in row.measures.items()},
        }
        for row in rows
    ]


def evaluate_states(
    states: Sequence[Path],
    settings: RepresentationSettings,
    *,
    use_ema: bool = True,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> RepresentationResult:
    """Measure the last state of a training completely, and those before it at one timestep.

    Raises UserError as `evaluate_representation` does.
    """
    reduced = replace(settings, timesteps=(settings.pictured_at,), baselines=False)
    found = []
    for number, state in enumerate(states, start=1):
        say(f"representation of {state}")
        chosen = settings if number == len(states) else reduced
        found.append(evaluate_representation(state, chosen, name=state.name, use_ema=use_ema, device=device, say=say))
    result = found.pop()
    result.earlier = found
    return result


def check_states(states: Sequence[Path], settings: RepresentationSettings) -> None:
    """Raise UserError where a state, its base or its caches would stop `evaluate_states`, without loading a model."""
    for state in states:
        _check_state(state)
        pictures_of_state(state, fit=settings.fit_samples, test=settings.test_samples)


def evaluate_representation(
    checkpoint: Path | FeatureModel,
    settings: RepresentationSettings | None = None,
    *,
    pictures: ProbePictures | None = None,
    base: FeatureModel | None = None,
    name: str | None = None,
    use_ema: bool = True,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> RepresentationResult:
    """Measure a state of train_repa.py (a folder step_NNNNNN), or any loaded model, on held-out pictures.

    pictures: default, those that the state was trained and validated on. base: the model without its adapter, where
    `checkpoint` is a model with one folded in (`load_folded_model`); a state's adapters are switched off instead. name: of the
    checkpoint in the result. use_ema, device: of a state that is loaded here.
    Raises UserError where the state, its caches or held-out pictures are missing or do not fit.
    """
    settings = settings or RepresentationSettings()
    if isinstance(checkpoint, Path):
        _check_state(checkpoint)
        pictures = pictures or pictures_of_state(checkpoint, fit=settings.fit_samples, test=settings.test_samples)
        model = load_feature_model(checkpoint, use_ema=use_ema, device=device)
    elif pictures is None:
        raise UserError("A loaded model names no pictures to be measured on. Give pictures.")
    else:
        model = checkpoint
    tap = settings.tap or next(iter(model.heads), "mid")
    _check(settings, model, pictures)
    result = _Evaluation(model, base, pictures, replace(settings, tap=tap), say).run()
    result.checkpoint = name or (str(checkpoint) if isinstance(checkpoint, Path) else "checkpoint")
    return result


def _check_state(state: Path) -> None:
    facts = read_facts(state)
    if not (state / f"{StepSaving.part(UNET)}.safetensors").is_file():
        raise UserError(
            f"{state} was not made by train_repa.py. Give the adapter file of that training, and pictures with cached tokens."
        )
    location = locate_base(facts["base_model"], (UNET, "scheduler"))
    now = weight_fingerprint(location, UNET, Path(facts["options"]["cache_dir"]))
    if facts.get("base_weights", {}).get(UNET, now) != now:
        raise UserError(
            f"The U-Net of {facts['base_model']} is not the one that {state} was trained on: its weights differ. Train anew, "
            "or restore the base."
        )


def _check(settings: RepresentationSettings, model: FeatureModel, pictures: ProbePictures) -> None:
    if settings.tap is not None:
        try:
            tap_block(model.unet, settings.tap)
        except AdapterError as error:
            raise UserError(str(error)) from None
    last = model.parametrisation.timesteps - 1
    if wrong := [t for t in settings.timesteps if not 0 <= t <= last]:
        raise UserError(f"timesteps must lie in 0..{last}, got {', '.join(map(str, wrong))}.")
    for what, there, least in (("training", pictures.fit, 5), ("held-out", pictures.test, 4)):
        if len(there) < least:
            raise UserError(f"Representations need at least {least} {what} pictures; got {len(there)}.")


@dataclass
class _Trunk:
    """A U-Net whose map is measured. context: entered before it runs."""

    name: str
    model: FeatureModel
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class _Evaluation:
    def __init__(
        self,
        model: FeatureModel,
        base: FeatureModel | None,
        pictures: ProbePictures,
        settings: RepresentationSettings,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.base, self.pictures, self.settings, self.say = model, base, pictures, settings, say
        self.tap = settings.tap or "mid"
        self.fit_teacher, self.test_teacher = pictures.fit.teacher(), pictures.test.teacher()
        self.head_target = spatially_normalised(self.test_teacher, model.teacher_norm)
        classes = len(pictures.fit.labels.unique())
        self.measures = RepresentationMeasures(len(pictures.test), settings.neighbours, settings.recall_at, classes > 1)
        self.result = RepresentationResult(
            checkpoint="",
            tap=self.tap,
            settings=settings,
            fitted=len(pictures.fit),
            held_out=len(pictures.test),
            classes=classes,
            chance=self.measures.chance(pictures.fit.labels, pictures.test.labels),
            rows=[],
            notes=[*pictures.notes, *self.measures.left_out()],
        )

    def run(self) -> RepresentationResult:
        if self.tap not in self.model.heads:
            self.result.notes.append(
                f"The checkpoint has no AlignHead at {self.tap}, so that there are no rows for its head."
            )
        side = 0
        for trunk in self._trunks():
            with trunk.context():
                for timestep in self.settings.timesteps:
                    with doing(f"measuring the {trunk.name}'s representation at timestep {timestep}"):
                        side = self._measure(trunk, timestep)
        if self.settings.baselines:
            self._add_baselines(side)
            if self.tap in self.model.heads:
                self.result.seen = what_is_seen(self.model, self.base, self.pictures, self.head_target, self.tap)
        return self.result

    def _trunks(self) -> Iterator[_Trunk]:
        yield _Trunk("checkpoint", self.model)
        if not self.settings.baselines:
            return
        headless = replace(self.model, heads=type(self.model.heads)({}, {}))
        if self.model.network is not None:
            yield _Trunk("base", headless, self.model.network.disabled)
        elif self.base is not None:
            yield _Trunk("base", self.base)
        else:
            self.result.notes.append(
                "There are no rows for the base: the checkpoint has no adapter that could be switched off."
            )
        yield _Trunk("random", replace(headless, unet=baselines.random_trunk(self.model.unet, RANDOM_TRUNK_SEED)))

    def _measure(self, trunk: _Trunk, timestep: int) -> int:
        """Add the rows of one trunk at one timestep: its features, and the tokens by a fitted head and by its own head, if any.

        Returns the side of its map.
        """
        side = 0
        by_row: dict[tuple[str, Literal["tokens", "features"]], list[dict[str, float]]] = {}
        for seed in self.settings.seeds:
            fit, test = (self._features(trunk, part, timestep, seed) for part in ("fit", "test"))
            head = baselines.RidgeHead.fit(fit.maps, self.fit_teacher, self.pictures.fit.ids)
            fitted = head(test.maps)
            features = self.measures.of_features(test.trunk, pool_tokens(self.test_teacher))
            by_row.setdefault((f"{trunk.name} trunk", "features"), []).append(
                features | self._probes(fit.trunk, test.trunk)
            )
            by_row.setdefault((f"{trunk.name} trunk + fitted head", "tokens"), []).append(
                self.measures.of_tokens(fitted, self.test_teacher)
            )
            if fit.head is not None and test.tokens is not None and test.head is not None:
                by_row.setdefault((f"{trunk.name} head", "tokens"), []).append(
                    self.measures.of_tokens(test.tokens, self.head_target) | self._probes(fit.head, test.head)
                )
            side = test.maps.shape[-1]
            pictured = self.settings.baselines and timestep == self.settings.pictured_at
            if trunk.name == "checkpoint" and pictured and seed == self.settings.seeds[0]:
                self._draw(test, fitted)
        self.result.rows += [Row(name, kind, timestep, transposed(found)) for (name, kind), found in by_row.items()]
        self.say(f"{trunk.name}: timestep {timestep} measured with {len(self.settings.seeds)} noise seeds")
        return side

    def _features(self, trunk: _Trunk, part: str, timestep: int, seed: int) -> TapFeatures:
        pictures = self.pictures.fit if part == "fit" else self.pictures.test
        return features_at_tap(
            trunk.model,
            pictures.samples,
            self.pictures.empty_prompt,
            tap=self.tap,
            timestep=timestep,
            seed=seed,
            batch_size=self.settings.batch_size,
        )

    def _probes(self, fit: Tensor, test: Tensor) -> dict[str, float]:
        sides = self.pictures.fit, self.pictures.test
        return self.measures.of_probes(fit, sides[0].labels, test, sides[1].labels, sides[0].ids)

    def _add_baselines(self, side: int) -> None:
        """Add the rows that depend on no timestep and no noise: constant predictors, and the teacher itself.

        side: of the trunk's map.
        """
        count, target = len(self.pictures.test), self.test_teacher
        constants = {
            "mean token": baselines.mean_token(self.fit_teacher, count),
            "per-position mean": baselines.position_mean(self.fit_teacher, count),
        }
        for name, predicted in constants.items():
            mae = sample_similarity_mae(pool_tokens(predicted), pool_tokens(target))
            self._add(name, of_each_token(predicted, target) | {"sample_mae": mae})
        self._add("grid ceiling, pooled", self.measures.of_tokens(baselines.pooled_to_grid(target, side), target))
        few = target[:BEST_GRID_PICTURES]
        self._add("grid ceiling, best", of_each_token(baselines.best_on_grid(few, side), few))
        pooled = [pool_tokens(tokens) for tokens in (self.fit_teacher, target)]
        self._add("teacher", self.measures.of_tokens(target, target) | self._probes(*pooled))

    def _add(self, name: str, values: dict[str, float]) -> None:
        self.result.rows.append(Row(name, "tokens", None, transposed([values])))

    def _draw(self, test: TapFeatures, fitted: Tensor) -> None:
        """Draw dense maps of a few held-out pictures, spread over the set."""
        own = test.tokens is not None
        predicted = test.tokens if test.tokens is not None else fitted
        places = spread_over(len(fitted), self.settings.pictures)
        if not places:
            return
        sides = self.pictures.test
        self.result.pictures = dense_maps(
            [sides.ids[i] for i in places],
            [sides.photo(i) for i in places],
            (self.head_target if own else self.test_teacher)[places],
            predicted[places],
            test.maps[places],
        )
        whose = "the checkpoint's head" if own else "a head fitted on the checkpoint's trunk"
        self.result.pictured = (
            f"tokens of {whose} at timestep {self.settings.pictured_at}, noise seed {self.settings.seeds[0]}"
        )
