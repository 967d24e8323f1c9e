"""Learning rates as pure functions of the step: there is no scheduler state to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from library.options.checks import OptionError, require
from library.options.training import OptimizerOptions
from library.training import named_classes
from library.training.optimizers import ParameterGroup
from library.training.plan import Plan

# The schedules that transformers has and diffusers has not.
OF_TRANSFORMERS = ("inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay")
# The classes whose arguments are no numbers.
_OF_OBJECTS = (LambdaLR, MultiplicativeLR, SequentialLR, ChainedScheduler)


def learning_rates_of(
    options: OptimizerOptions, plan: Plan, groups: Sequence[ParameterGroup]
) -> Callable[[int], list[float]]:
    """step -> learning rate of each group, for steps from 0 to below the plan's last.

    The schedules are those of diffusers and transformers (functions of the step), or any torch scheduler class by
    lr_scheduler_type, which is run through once beforehand. Either acts on groups that have the peaks of these, so a rate among
    its arguments (eta_min, max_lr, min_lr) is the rate of a group and not a share of anything, and a list has a value for
    each group, in their order. Raises OptionError where its arguments do not fit.
    """
    if options.lr_scheduler_type:
        return _replayed(options, plan, groups)
    peaks = [group.learning_rate for group in groups]
    if options.lr_scheduler == "adafactor":
        # Adafactor's relative steps: the optimizer sets its own rate.
        return lambda step: peaks
    function = _named_schedule(options.lr_scheduler)
    given = options.scheduler_arguments
    named_classes.check_arguments("lr_scheduler_args", function, f"the schedule {options.lr_scheduler}", given)
    arguments = _arguments(options, plan) | given
    option = "lr_scheduler_args" if given else "lr_scheduler"

    def share_of(group: ParameterGroup) -> Callable[[int], float]:
        optimizer = _dummy_optimizer([group], group.learning_rate)
        made = named_classes.call(option, options.lr_scheduler, lambda: function(optimizer, **arguments))
        return made.lr_lambdas[0]  # type: ignore[no-any-return]

    shares = [share_of(group) for group in groups]
    return lambda step: [peak * share(step) for peak, share in zip(peaks, shares, strict=True)]


def check_schedule(options: OptimizerOptions, plan: Plan) -> None:
    """See before a model is loaded that the schedule and its arguments fit the plan; a list may want as many groups as it has
    values, which only the model tells. Raises OptionError."""
    counts = {len(value) for value in options.scheduler_arguments.values() if isinstance(value, list | tuple)} - {0, 1}
    wrong: list[OptionError] = []
    for count in (1, *sorted(counts)):
        groups = [ParameterGroup(f"trial {number}", [], options.learning_rate) for number in range(count)]
        try:
            learning_rates_of(options, plan, groups)
            return
        except OptionError as error:
            wrong.append(error)
    raise wrong[0]


def decay_steps(options: OptimizerOptions, plan: Plan) -> int:
    """lr_decay_steps as a count: below 1 it is a share of all steps."""
    share = options.lr_decay_steps
    return int(share * plan.last_step) if share < 1 else int(share)


def _dummy_optimizer(groups: Sequence[ParameterGroup], rate: float) -> torch.optim.Optimizer:
    """What a scheduler acts on: groups with the peaks of these. `rate` is the optimizer's own, which some schedules read."""
    entries = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": group.learning_rate} for group in groups]
    return torch.optim.SGD(entries, lr=rate)


def _named_schedule(name: str) -> Callable[..., Any]:
    if name in OF_TRANSFORMERS:
        from transformers import optimization as transformers_schedules

        return transformers_schedules.TYPE_TO_SCHEDULER_FUNCTION[transformers_schedules.SchedulerType(name)]
    from diffusers import optimization as diffusers_schedules

    return diffusers_schedules.TYPE_TO_SCHEDULER_FUNCTION[diffusers_schedules.SchedulerType(name)]


def _arguments(options: OptimizerOptions, plan: Plan) -> dict[str, Any]:
    """What kohya gives the schedule of that name."""
    name, warmup, total = options.lr_scheduler, plan.warmup_steps, plan.last_step
    if name in ("constant", "piecewise_constant"):
        return {}
    arguments: dict[str, Any] = {"num_warmup_steps": warmup}
    if name == "constant_with_warmup":
        return arguments
    if name == "inverse_sqrt":
        return arguments | {"timescale": options.lr_scheduler_timescale}
    # These two count half waves; diffusers' restarts are whole cycles.
    half_waves = {"num_cycles": options.lr_scheduler_num_cycles / 2}
    if name == "warmup_stable_decay":
        decay = decay_steps(options, plan)
        require(
            warmup + decay <= total,
            "lr_decay_steps",
            f"{decay} and {warmup} steps of warm-up are more than the run's {total}.",
        )
        ratio = options.lr_scheduler_min_lr_ratio or 0.0
        stable = {"num_stable_steps": total - warmup - decay, "num_decay_steps": decay, "min_lr_ratio": ratio}
        return arguments | stable | half_waves
    arguments["num_training_steps"] = total
    if name == "cosine_with_min_lr":
        given = options.scheduler_arguments.keys() & {"min_lr", "min_lr_rate"}
        return arguments | half_waves | ({} if given else {"min_lr_rate": options.lr_scheduler_min_lr_ratio})
    if name == "cosine_with_restarts":
        return arguments | {"num_cycles": options.lr_scheduler_num_cycles}
    if name == "polynomial":
        return arguments | {"power": options.lr_scheduler_power}
    return arguments


def _replayed(options: OptimizerOptions, plan: Plan, groups: Sequence[ParameterGroup]) -> Callable[[int], list[float]]:
    """The rates of a scheduler class, from running it through every step of the plan on a dummy."""
    kind = _scheduler_class(options.lr_scheduler_type)
    arguments = options.scheduler_arguments
    named_classes.check_arguments("lr_scheduler_args", kind, kind.__name__, arguments)
    cycles = "cycle_momentum" in named_classes.argument_names(kind) and arguments.get("cycle_momentum", True)
    require(
        not cycles,
        "lr_scheduler_args",
        f"lacks cycle_momentum=False: {kind.__name__} would change the momentum too, and a schedule here sets rates alone.",
    )

    def rates() -> list[list[float]]:
        optimizer = _dummy_optimizer(groups, options.learning_rate)
        scheduler = kind(optimizer, **arguments)
        found = [_rates_in(optimizer)]
        for _ in range(1, plan.last_step):
            optimizer.step()
            scheduler.step()
            found.append(_rates_in(optimizer))
        return found

    names = ", ".join(group.name for group in groups)
    where = f" and its {len(groups)} groups of weights ({names})" if len(groups) > 1 else ""
    found = named_classes.call("lr_scheduler_args", f"{kind.__name__}{where}", rates)
    flat = [rate for step in found for rate in step]
    least = -1e-9 * max(flat)  # rounding: torch's LinearLR ends a little below 0
    wrong = next((rate for rate in flat if not (math.isfinite(rate) and rate >= least)), None if any(flat) else 0.0)
    at_all = "" if wrong else " at every step"
    require(wrong is None, "lr_scheduler_type", f"{kind.__name__} sets the rate {wrong}{at_all}.")
    return found.__getitem__


def _rates_in(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _scheduler_class(name: str) -> type[LRScheduler]:
    option = "lr_scheduler_type"
    if "." in name:
        found = named_classes.find_dotted(option, name)
    else:
        classes = named_classes.classes_of(torch.optim.lr_scheduler, LRScheduler)
        known = [kind.__name__ for kind in classes.values()]
        require(
            name.lower() in classes, option, f"{name} is no scheduler of torch{named_classes.nearest(name, known)}."
        )
        found = classes[name.lower()]
    require(
        isinstance(found, type) and issubclass(found, LRScheduler), option, f"{name} is not a torch scheduler class."
    )
    require(
        found not in _OF_OBJECTS,
        option,
        f"{name} is made of functions or of other schedulers, which no argument can give. Name a class of your own that makes "
        "them: package.module.Class, called with the optimizer and lr_scheduler_args.",
    )
    require(
        not issubclass(found, ReduceLROnPlateau) and named_classes.needs_more(found.step) == ["self"],
        option,
        f"{name} follows a metric, and a rate here follows from the step alone, which a resumed run knows exactly. Use "
        "lr_scheduler cosine, or another schedule of the step.",
    )
    return found
