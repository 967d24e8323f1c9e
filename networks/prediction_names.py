"""What files call noise schedules and the kinds of output that a network can have: the one table of each, without torch.

`library.diffusion` computes them: a kind of schedule that is a row here has a process there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple


class PredictionName(NamedTuple):
    scheduler: str
    """`prediction_type` of diffusers' scheduler_config.json; state.json says it too."""
    modelspec: str
    """`modelspec.prediction_type` (ModelSpec 1.0.1)."""
    mark: str | None = None
    """The empty tensor that marks a model in a single file, as ComfyUI reads it."""
    version_ending: str = ""
    """Of `ss_base_model_version` in kohya's files for SD1.5."""


EPSILON_NAME = PredictionName("epsilon", "epsilon")
VELOCITY_NAME = PredictionName("v_prediction", "v", mark="v_pred", version_ending="_v")
# diffusers' word in the schedulers that sample it. ModelSpec knows none; no client reads a mark of a flow model.
FLOW_NAME = PredictionName("flow_prediction", "flow")

PREDICTION_NAMES = (EPSILON_NAME, VELOCITY_NAME, FLOW_NAME)
BY_SCHEDULER = {name.scheduler: name for name in PREDICTION_NAMES}
_MODELSPEC_KEY = "modelspec.prediction_type"
_FLOW_MODE_KEY, FLOW_SHIFT_KEY = "ss_flow_mode", "ss_discrete_flow_shift"


class ScheduleName(NamedTuple):
    """A kind of noise schedule that this program trains on and draws with."""

    title: str
    classes: frozenset[str]
    """diffusers' schedulers that sample models of it: the `_class_name` of scheduler_config.json."""
    predictions: tuple[PredictionName, ...]
    """What a network trained on it says; the first one where its file does not tell."""
    beta_schedules: frozenset[str] = frozenset()
    """How its betas may go, where it has any."""


VARIANCE_PRESERVING_NAME = ScheduleName(
    "variance-preserving",
    frozenset(
        f"{name}Scheduler"
        for name in (
            *("DDPM", "DDIM", "DDIMInverse", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete"),
            *("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"),
            *("DPMSolverMultistepInverse", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "LCM", "TCD"),
            *("DDPMParallel", "DDIMParallel", "RePaint"),
        )
    ),
    (EPSILON_NAME, VELOCITY_NAME),
    frozenset(("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")),
)
RECTIFIED_FLOW_NAME = ScheduleName(
    "rectified flow", frozenset(f"FlowMatch{name}DiscreteScheduler" for name in ("Euler", "Heun")), (FLOW_NAME,)
)
SCHEDULE_NAMES = (VARIANCE_PRESERVING_NAME, RECTIFIED_FLOW_NAME)

# What other schedulers of diffusers are of, by their names.
_OTHER_SCHEDULES = (
    (r"^Flow|Flow|RFScheduler$|^Helios", "another form of flow matching"),
    (r"^EDM|^KarrasVe|^CosineDPM", "the noise levels of EDM"),
    (r"^ScoreSdeVe", "variance-exploding noise"),
    (r"^CMStochastic|^SCM", "a consistency model"),
)
# Settings of schedulers of both kinds that make the schedule another one.
_OTHER_SETTINGS = (
    ("use_dynamic_shifting", True, "flow matching with a shift that follows from the size of the picture"),
    ("timestep_type", "continuous", "the noise levels of EDM"),
)


def schedule_of(config: Mapping[str, Any]) -> tuple[ScheduleName, PredictionName] | str:
    """What a diffusers scheduler_config.json says, or why nothing here is trained on it: what follows its name in a sentence.

    A file without a class is of the first kind, which has betas. Schedulers that sample both kinds, as DPMSolverMultistep, say
    flow by use_flow_sigmas or by what the network predicts.
    """
    name = None if config.get("_class_name") is None else str(config["_class_name"])
    kind = next((kind for kind in SCHEDULE_NAMES if name is None or name in kind.classes), None)
    if kind and (config.get("use_flow_sigmas") or config.get("prediction_type") == FLOW_NAME.scheduler):
        kind = RECTIFIED_FLOW_NAME
    other = None if kind else next((what for mark, what in _OTHER_SCHEDULES if name and re.search(mark, name)), "")
    other = next((what for key, value, what in _OTHER_SETTINGS if config.get(key) == value), other)
    prediction_type = config.get("prediction_type") or (kind or VARIANCE_PRESERVING_NAME).predictions[0].scheduler
    *others, last = (name.scheduler for kind in SCHEDULE_NAMES for name in kind.predictions)
    trains = f"this program trains {', '.join(others)} and {last}"
    if kind is None or other is not None:
        what = f"({other})" if other else "(not known here)"
        titles = " or ".join(kind.title for kind in SCHEDULE_NAMES)
        return f"is {name} {what} with prediction_type {prediction_type!r}; {trains} on {titles} schedules."
    prediction = next((name for name in kind.predictions if name.scheduler == prediction_type), None)
    if prediction is None:
        return f"says prediction_type {prediction_type!r}; {trains}."
    if kind is RECTIFIED_FLOW_NAME:
        return _wrong_number(config) or (kind, prediction)
    if name is None and "beta_start" not in config and "trained_betas" not in config:
        return "says neither its _class_name nor its betas, so its noise schedule is not known. Complete the file."
    betas = config.get("beta_schedule")
    if betas is not None and not config.get("trained_betas") and str(betas) not in kind.beta_schedules:
        return f"says beta_schedule {betas!r}; known are {', '.join(sorted(kind.beta_schedules))}."
    return _wrong_number(config) or (kind, prediction)


def _wrong_number(config: Mapping[str, Any]) -> str | None:
    """What is to be said of a value that makes no schedule."""
    for name in ("beta_start", "beta_end"):
        if (value := config.get(name)) is not None and not _is_beta(value):
            return f"says {name} {value!r}, which is no number between 0 and 1."
    steps, betas = config.get("num_train_timesteps"), config.get("trained_betas")
    for name in ("shift", "flow_shift"):
        if (value := config.get(name)) is not None and not (type(value) in (int, float) and value > 0):
            return f"says {name} {value!r}, which is no number above 0."
    if steps is not None and not (type(steps) is int and steps > 0):
        return f"says num_train_timesteps {steps!r}, which is no whole number above 0."
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == (steps or 1000) and all(map(_is_beta, betas))
    ):
        return f"says trained_betas that are not {steps or 1000} numbers between 0 and 1, one for each timestep."
    return None


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def name_by_marks(tensors: Container[str]) -> PredictionName:
    """Of a model whose single file has these tensors; without any mark it predicts epsilon."""
    return next((name for name in PREDICTION_NAMES if name.mark is not None and name.mark in tensors), EPSILON_NAME)


def type_in_file(tensors: Container[str], metadata: Mapping[str, str]) -> str:
    """The `prediction_type` of a single file's model: by its mark, else by its ModelSpec, else epsilon.

    A word that no prediction is called by comes back as it is, for `schedule_of` to refuse.
    """
    marked = name_by_marks(tensors)
    said = metadata.get(_MODELSPEC_KEY, "").strip().lower()
    if marked is EPSILON_NAME and _is_flow(metadata):
        return FLOW_NAME.scheduler
    if marked is not EPSILON_NAME or not said:
        return marked.scheduler
    return next((name.scheduler for name in PREDICTION_NAMES if said in (name.modelspec, name.scheduler)), said)


def name_by_metadata(metadata: Mapping[str, str]) -> PredictionName:
    """Of an adapter's file, by its version before its ModelSpec; where neither tells, epsilon."""
    version, said = metadata.get("ss_base_model_version", ""), metadata.get(_MODELSPEC_KEY)
    if _is_flow(metadata):
        return FLOW_NAME
    for name in PREDICTION_NAMES:
        if name.version_ending and version.endswith(name.version_ending):
            return name
    return next((name for name in PREDICTION_NAMES if name.modelspec == said), EPSILON_NAME)


def _is_flow(metadata: Mapping[str, str]) -> bool:
    """Of a native training; a bridge leaves an ordinary epsilon or v adapter, whatever else its file says."""
    return metadata.get(_FLOW_MODE_KEY) == "native"


def shift_in_file(metadata: Mapping[str, str]) -> float | None:
    """The shift that a flow model's file says it was trained with."""
    try:
        shift = float(metadata.get(FLOW_SHIFT_KEY, "nan"))
    except ValueError:
        return None
    return shift if 0 < shift < math.inf else None


def flow_usage(shift: str) -> str:
    """How ComfyUI draws with a flow model, which it cannot tell from any other."""
    return (
        "Rectified flow. In ComfyUI, put the node ModelSamplingSD3 between the loaders and KSampler, "
        f"with shift {shift} or above. Other programs need flow support."
    )


def flow_entries(shift: float | None) -> dict[str, str]:
    """What the file of a native flow model, or of an adapter of one, says beside its prediction type."""
    known = 1.0 if shift is None else shift
    return {_FLOW_MODE_KEY: "native", FLOW_SHIFT_KEY: f"{known:g}", "modelspec.usage_hint": flow_usage(f"{known:g}")}


def flow_scheduler(shift: float | None) -> dict[str, Any]:
    """A scheduler_config.json for diffusers' SD pipelines, which FlowMatchEulerDiscreteScheduler does not fit."""
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "prediction_type": FLOW_NAME.scheduler,
        "use_flow_sigmas": True,
        "flow_shift": 1.0 if shift is None else shift,
    }
