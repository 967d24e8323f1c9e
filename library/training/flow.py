"""Whether a run trains a rectified flow, and along which path: of options and base together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from library.diffusion.bridge import Bridge, along_flow
from library.diffusion.densities import SigmaDensity
from library.diffusion.noise_levels import NoiseLevels
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.merging.source import read_source
from library.models.base_schedule import require_kind
from library.models.load import load_scheduler_config
from library.models.locate import BaseLocation
from library.options.checks import require
from library.options.flow import RECIPES, FlowOptions
from library.options.repa import RepaObjectiveOptions
from library.options.run import RunOptions
from networks.families import Family
from networks.prediction_names import FLOW_NAME, schedule_of

Mode = Literal["bridge", "native"]


def flow_mode(options: RunOptions, scheduler: Mapping[str, Any]) -> Mode | None:
    """How the run trains a flow, or None. Raises UserError where options and base contradict each other.

    scheduler: the base's scheduler_config.json.
    """
    flow, name, found = options.flow, options.model.pretrained_model_name_or_path, schedule_of(scheduler)
    if isinstance(found, str):
        raise UserError(f"The scheduler of {name} {found}")
    is_flow = found[1] is FLOW_NAME
    if flow.flow_mode == "native" or (is_flow and flow.flow_mode == "auto"):
        return "native"
    require(
        not is_flow,
        "flow_mode",
        f"bridge is for bases that predict noise or v, and {name} is a flow model. Leave it out, or say native.",
    )
    if flow.flow_model or flow.flow_mode == "bridge":
        return "bridge"
    if flow.given:
        raise UserError(
            f"{', '.join(flow.given)} {'has' if len(flow.given) == 1 else 'have'} no effect: {name} is no flow model by its "
            "files. Add --flow_model to train it as one through a bridge, or --flow_mode native if it is one."
        )
    return None


def check_flow(options: RunOptions, base: BaseLocation) -> list[str]:
    """What to say of a flow training. Raises UserError for options, and adapters to start from, that contradict it."""
    mode, network = flow_mode(options, load_scheduler_config(base)), options.network
    for name, paths in (("network_weights", [network.network_weights]), ("base_weights", network.base_weights)):
        for path in paths:
            if path is not None and options.flow.flow_mode == "auto":
                with_option = f"{name} {path}"
                require_kind(
                    with_option, read_source(path).adapter.metadata, base.name, mode == "native", "--flow_mode native"
                )
    if mode is None:
        return []
    _check_conflicts(options, mode)
    notes = [f"flow: {_kind(mode, base)}, {describe(options.flow)}"]
    if mode == "bridge":
        _check_reach(options, base)
    for name in ("noise_offset", "multires_noise_iterations"):
        if getattr(options.noise, name):
            notes.append(
                f"warning: {name} changes the noise that a flow ends in, and pictures are drawn from plain noise. A flow learns "
                "dark and light pictures without it."
            )
    return notes


def _check_conflicts(options: RunOptions, mode: Mode) -> None:
    objective = options.objective
    require(
        not options.noise.zero_terminal_snr,
        "zero_terminal_snr",
        "rescales a schedule of betas, and a flow ends in pure noise anyway. Leave it out.",
    )
    require(
        mode == "bridge" or not objective.v_parameterization,
        "v_parameterization",
        "says that the base predicts v, and it is trained as a native flow, whose velocity is another one. Leave one of them out.",
    )
    require(
        objective.objective == "auto",
        "objective",
        f"{objective.objective} compares something else than a flow does, which is noise - latents. Leave it out; "
        "--flow_loss_weight eps weights as the loss on noise.",
    )
    for name in ("v_pred_like_loss", "scale_v_pred_loss_like_noise_pred"):
        require(
            not getattr(objective, name),
            name,
            "weights a loss on noise or v, and a flow compares its velocities. Leave it out, or see --flow_loss_weight.",
        )
    require(
        not (isinstance(objective, RepaObjectiveOptions) and objective.raw_v_target),
        "raw_v_target",
        "takes the output for v, and a flow has another velocity. Leave it out.",
    )


def _check_reach(options: RunOptions, base: BaseLocation) -> None:
    known, asked = along_flow(parametrisation_of(load_scheduler_config(base))).high, options.flow.flow_sigma_max
    require(
        asked is None or asked <= known,
        "flow_sigma_max",
        f"{asked} reaches beyond {base.name}, which was trained up to sigma {known:.4f} and says nothing of more noise.",
    )


def trained_path(
    options: RunOptions,
    scheduler: Mapping[str, Any],
    family: Family,
    side: int,
    mode: Mode,
    parametrisation: Parametrisation | None = None,
) -> FlowPath:
    """The path of a run. side: that the base was trained at, in pixels. parametrisation: the base's, on the training device."""
    flow = options.flow
    if mode == "native":
        path: Parametrisation = parametrisation_of({**scheduler, "prediction_type": FLOW_NAME.scheduler})
    else:
        on_cpu = parametrisation_of(scheduler)
        known = on_cpu.levels
        assert isinstance(known, NoiseLevels)
        path = along_flow(parametrisation or on_cpu, known=known)
    assert isinstance(path, FlowPath)
    pixels = flow.flow_base_pixels or side**2
    base_area = pixels / family.vae_factor**2 if flow.flow_shift_by_resolution else None
    low, high = flow.sigma_range
    return replace(
        path,
        density=density_of(flow, base_area),
        low=low,
        high=path.high if flow.flow_sigma_max is None else high,
        shift=path.shift if flow.discrete_flow_shift is None else flow.discrete_flow_shift,
    )


def density_of(flow: FlowOptions, base_area: float | None = None) -> SigmaDensity:
    if flow.kind in ("uniform", "mode", "bins"):
        kind: Any = "mode" if flow.kind == "mode" else "uniform"
        return SigmaDensity(kind, mode_scale=flow.mode_scale, shift=flow.shift, base_area=base_area)
    mean, std = (flow.logit_mean, flow.logit_std) if flow.kind == "logit_normal" else (0.0, flow.sigmoid_scale)
    return SigmaDensity("logit_normal", mean, std, shift=flow.shift, base_area=base_area)


def _kind(mode: Mode, base: BaseLocation) -> str:
    if mode == "native":
        return f"{base.name} as a native flow model"
    return f"{base.name} through a bridge, so that its adapters are ordinary ones"


def describe(flow: FlowOptions) -> str:
    """The density and the weight in words."""
    recipe = "" if flow.flow_recipe is None else f" (recipe {flow.flow_recipe}: {RECIPES[flow.flow_recipe].source})"
    shift = "by resolution" if flow.flow_shift_by_resolution else f"{flow.shift:g}"
    return f"sigmas {flow.kind}, shift {shift}, loss weight {flow.loss_weight}{recipe}"


def flow_facts(flow: FlowOptions, path: Parametrisation) -> dict[str, str]:
    """What an adapter's file says of its flow, under kohya's names where it has them; nothing of other trainings."""
    if not isinstance(path, FlowPath):
        return {}
    facts = {
        "ss_flow_model": True,
        "ss_flow_mode": "bridge" if isinstance(path, Bridge) else "native",
        "ss_timestep_sampling": flow.kind,
        "ss_discrete_flow_shift": flow.shift,
        "ss_sigmoid_scale": flow.sigmoid_scale,
        "ss_weighting_scheme": flow.weighting_scheme,
        "ss_logit_mean": flow.logit_mean,
        "ss_logit_std": flow.logit_std,
        "ss_mode_scale": flow.mode_scale,
        "ss_flow_shift_by_resolution": flow.flow_shift_by_resolution,
        "ss_flow_loss_weight": flow.loss_weight,
        "ss_flow_sigma_range": json.dumps([path.low, path.high]),
    }
    return {name: str(value) for name, value in facts.items()}
