"""Training on latents that a teacher drew: whether a store serves the run, and what a frozen base teaches a native flow.

Source of the bridged teacher: the velocity field that the base has by an exact change of variables (`library.diffusion.bridge`),
learnt on noised latents of its own, with its guidance if asked (Salimans and Ho 2022; Meng et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.data.teacher_latents import open_teacher_latents
from library.diffusion.bridge import Bridge
from library.diffusion.scheduler_config import parametrisation_of
from library.diffusion.variance_preserving import VariancePreserving
from library.inference.samplers import SAMPLERS
from library.models.conditioning import Conditioning
from library.models.load import load_scheduler_config
from library.models.locate import BaseLocation
from library.options.checks import require
from library.options.run import RunOptions
from library.options.teacher import DistillationOptions
from library.training.flow import Mode, flow_mode
from library.training.models import base_weights_facts, scaling_factor
from library.training.text import CachedText, EncodedText, Text
from networks.families import FAMILIES, UNET, Family

Predict = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]
"""(what the network is shown, timesteps, text, sizes) -> its output."""

_OTHER_NOISE = ("noise_offset", "multires_noise_iterations", "ip_noise_gamma")


@dataclass(frozen=True)
class BridgedTeacher:
    """The frozen base behind its bridge. nothing: of the empty prompt, [1, T, D]; None: without guidance."""

    bridge: Bridge
    guidance: float = 1.0
    nothing: Conditioning | None = None

    def velocity(self, predict: Predict, x: Tensor, sigmas: Tensor, text: Conditioning, sizes: Tensor) -> Tensor:
        """noise - latents as the base guesses them at points x [B, C, h, w] of the flow, float32. sigmas: [B]."""
        seen, timesteps = self.bridge.seen(x, sigmas)
        output = predict(seen, timesteps, text, sizes).float()
        if self.nothing is not None:
            away = predict(seen, timesteps, _expanded(self.nothing, text), sizes).float()
            output = away + self.guidance * (output - away)
        return self.bridge.velocity(output, x, sigmas)


def _expanded(nothing: Conditioning, like: Conditioning) -> Conditioning:
    pooled = None
    if nothing.pooled is not None and like.pooled is not None:
        pooled = nothing.pooled.to(like.pooled).expand_as(like.pooled)
    return Conditioning(nothing.states.to(like.states).expand_as(like.states), pooled)


def bridged_teacher(
    options: RunOptions, scheduler: Mapping[str, Any], device: torch.device, nothing: Callable[[], Conditioning]
) -> BridgedTeacher | None:
    """The teacher of flow_target kd; None for other runs. nothing: encodes the empty prompt, where the teacher is guided."""
    teacher = options.teacher
    if teacher is None or teacher.flow_target != "kd":
        return None
    on_cpu, own = parametrisation_of(scheduler), parametrisation_of(scheduler, device)
    assert isinstance(own, VariancePreserving) and isinstance(on_cpu, VariancePreserving)
    guided = teacher.flow_kd_cfg != 1
    return BridgedTeacher(Bridge.of(own, on_cpu.levels), teacher.flow_kd_cfg, nothing() if guided else None)


@torch.no_grad()
def without_prompt(text: Text, family: Family) -> Conditioning:
    """What drawing guides away from, [1, T, D]."""
    if isinstance(text, CachedText):
        found = text.prompts.read([text.prompts.empty_row])
    else:
        assert isinstance(text, EncodedText)
        found = text.conditioner([""])
    if not family.zeros_for_no_prompt:
        return found
    return Conditioning(
        torch.zeros_like(found.states), None if found.pooled is None else torch.zeros_like(found.pooled)
    )


def distillation_facts(options: RunOptions) -> dict[str, str]:
    """What an adapter's file says of it; nothing of other trainings."""
    teacher = options.teacher
    return (
        {} if teacher is None else {"ss_flow_target": teacher.flow_target, "ss_flow_kd_cfg": str(teacher.flow_kd_cfg)}
    )


def check_teacher(options: RunOptions, base: BaseLocation, family: Family) -> list[str]:
    """What to say of the latents that the run is to learn from. Raises UserError where they are not for this base and target."""
    teacher = options.teacher
    if teacher is None:
        return []
    assert teacher.teacher_latents is not None
    latents = open_teacher_latents(teacher.teacher_latents)
    latents.close()
    made, path, count = latents.producer, teacher.teacher_latents, len(latents.drawn)
    require(
        made["family"] == family.key,
        "teacher_latents",
        f"{path} were drawn by {FAMILIES[made['family']].title}, and {base.name} is {family.title}.",
    )
    scale = scaling_factor(options, base, family)
    require(
        made["scaling_factor"] == scale,
        "teacher_latents",
        f"{path} are scaled with {made['scaling_factor']}, and latents of {base.name} with {scale}.",
    )
    own = base_weights_facts(options, base, (UNET, *family.text_encoders))
    require(
        teacher.any_teacher or made["weights"] == own,
        "teacher_latents",
        f"{path} were drawn by {made['model']}, whose weights are not those of {base.name}, which is trained."
        + ("" if teacher.flow_target == "kd" else " --any_teacher takes them all the same."),
    )
    _check_target(teacher, flow_mode(options, load_scheduler_config(base)), base, options)
    if teacher.flow_target == "reflow":
        require(
            SAMPLERS[made["sampler"]].noise == "none",
            "flow_target",
            f"reflow needs latents that follow from their first noise, and {path} were drawn with {made['sampler']}, which adds "
            "noise on the way. Draw them with another teacher_sampler.",
        )
    how = f"{made['sampler']} {made['schedule']}, {made['steps']} steps, cfg {made['cfg_scale']:g}"
    return [f"teacher: {count:,} latents of {made['model']} ({how}), flow_target {teacher.flow_target}"]


def _check_target(teacher: DistillationOptions, mode: Mode | None, base: BaseLocation, options: RunOptions) -> None:
    target = teacher.flow_target
    require(
        mode is not None or target == "cfm",
        "flow_target",
        f"{target} is of a rectified flow, and this run trains none. Add --flow_mod{'e native' if target == 'kd' else 'el'}.",
    )
    if target == "kd":
        is_flow = not isinstance(parametrisation_of(load_scheduler_config(base)), VariancePreserving)
        require(
            not is_flow,
            "flow_target",
            f"kd has the base behind its bridge for a teacher, and {base.name} is a flow model already. Use cfm or reflow.",
        )
        require(
            mode == "native",
            "flow_target",
            "kd teaches a native student what the base says through its bridge, and this run trains the bridge itself. Say "
            "--flow_mode native.",
        )
    if target == "reflow":
        for name in _OTHER_NOISE:
            require(
                not getattr(options.noise, name),
                "flow_target",
                f"reflow keeps each latent with the noise that it was drawn from, and {name} changes that. Leave it out.",
            )
