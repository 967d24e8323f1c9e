"""Optimizers of torch, bitsandbytes, transformers and pytorch_optimizer, by kohya's names or their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.options.checks import OptionError, require
from library.options.training import OptimizerOptions
from library.training import named_classes

# kohya's names (sd-scripts, get_optimizer), and where the same algorithm lives. pytorch_optimizer's step like those of
# prodigyopt, schedulefree, lion-pytorch and dadaptation, which kohya uses (measured: 12 steps equal within rounding). Two
# differ: its DAdaptAdan, and DAdaptation, which is the preprint's algorithm in kohya and the published one here.
NAMES = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion": "pytorch_optimizer.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "AdaFactor": "transformers.optimization.Adafactor",
    "Prodigy": "pytorch_optimizer.Prodigy",
    "DAdaptation": "pytorch_optimizer.DAdaptAdam",
    "DAdaptAdam": "pytorch_optimizer.DAdaptAdam",
    "DAdaptAdaGrad": "pytorch_optimizer.DAdaptAdaGrad",
    "DAdaptAdan": "pytorch_optimizer.DAdaptAdan",
    "DAdaptLion": "pytorch_optimizer.DAdaptLion",
    "DAdaptSGD": "pytorch_optimizer.DAdaptSGD",
    "AdamWScheduleFree": "pytorch_optimizer.ScheduleFreeAdamW",
    "RAdamScheduleFree": "pytorch_optimizer.ScheduleFreeRAdam",
    "SGDScheduleFree": "pytorch_optimizer.ScheduleFreeSGD",
}
PATHS = {name.lower(): path for name, path in NAMES.items()}

# Of the package dadaptation alone; nobody has published these algorithms elsewhere.
ONLY_IN_DADAPTATION = {
    "dadaptadampreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadanip": "dadaptation.experimental.DAdaptAdanIP",
}

# What kohya, or the package kohya uses, has as a default and the class here has not.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sgdnesterov": {"momentum": 0.9, "nesterov": True},
    "sgdnesterov8bit": {"momentum": 0.9, "nesterov": True},
    "dadaptsgd": {"momentum": 0.0},
}

# Arguments as prodigyopt and dadaptation call them, and as pytorch_optimizer does.
SYNONYMS = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay; `name` is their tag in the metrics.

    weight_decay None leaves it to optimizer_args, or else to the optimizer. max_grad_norm None clips their gradients together with
    those of all such groups.
    """

    name: str
    parameters: Sequence[torch.nn.Parameter]
    learning_rate: float
    weight_decay: float | None = None
    max_grad_norm: float | None = None


def make_optimizer(groups: Sequence[ParameterGroup], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of a run, ready to train. AdamW is one fused kernel for all weights.

    Raises OptionError where there is no such optimizer or its arguments do not fit.
    """
    kind = find_optimizer(options.optimizer_name)
    arguments = _arguments(kind, options)
    entries = [_entry(group, kind, options, arguments) for group in groups]
    what = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    optimizer = named_classes.call("optimizer_args", what, lambda: kind(entries, **arguments))
    if more := named_classes.needs_more(optimizer.step):
        raise OptionError(
            "optimizer_type",
            f"{options.optimizer_name} wants a {more[0]} at each step, which this program does not give it.",
        )
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def check_optimizer(options: OptimizerOptions, device: torch.device) -> None:
    """Make the optimizer and take a step on a small weight, so that what cannot work is said before a model is loaded."""
    weight = torch.nn.Parameter(torch.zeros(8, 4, device=device))
    optimizer = make_optimizer([ParameterGroup("trial", [weight], options.learning_rate)], options)
    weight.grad = torch.ones_like(weight)
    named_classes.call("optimizer_type", f"a step of {options.optimizer_name}", optimizer.step)


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of kohya's name, of torch's, bitsandbytes' or pytorch_optimizer's, in any case; or of a dotted path.

    Raises OptionError, with the nearest name.
    """
    option = "optimizer_type"
    if replacement := ONLY_IN_DADAPTATION.get(name.lower()):
        raise OptionError(
            option, f"{name} is in the package dadaptation alone: pip install dadaptation, and name {replacement}."
        )
    path = PATHS.get(name.lower(), name)
    if "." in path:
        found = named_classes.find_dotted(option, path)
        is_optimizer = inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
        require(is_optimizer, option, f"{path} is not an optimizer class of torch's kind.")
        return found
    known = list(NAMES)
    for module_name in ("torch.optim", "bitsandbytes.optim", "pytorch_optimizer"):
        module = named_classes.find_module(option, module_name)
        classes = named_classes.classes_of(module, torch.optim.Optimizer)
        if name.lower() in classes:
            return classes[name.lower()]
        known += [kind.__name__ for kind in classes.values()]
    raise OptionError(
        option,
        f"{name} is unknown{named_classes.nearest(name, known)}. It can be a name of kohya's, a class of torch.optim, bitsandbytes "
        "or pytorch_optimizer, or a dotted path.",
    )


def optimizer_notes(options: OptimizerOptions, groups: Sequence[ParameterGroup]) -> list[str]:
    """What a user should hear of a legal choice that is rarely meant."""
    name, notes = options.optimizer_name, []
    rates = {group.learning_rate for group in groups}
    if _finds_rate(name):
        if min(rates) <= 0.1:
            notes.append(
                f"{name} finds the rate itself and multiplies it by the learning rate: {min(rates):g} slows it down, 1.0 is meant"
            )
        if len(rates) > 1:
            notes.append(f"{name} finds one rate for all groups, by the first group's learning rate")
    if options.optimizer_sets_rate:
        notes.append(
            f"{name} with relative steps sets its own rate: learning_rate, lr_scheduler and lr_warmup_steps have no effect. "
            "optimizer_args relative_step=False goes by them"
        )
    return notes


def optimizer_text(options: OptimizerOptions) -> str:
    """For metadata, as kohya's ss_optimizer: module.Class(argument=value,...)."""
    kind = find_optimizer(options.optimizer_name)
    given = DEFAULTS.get(options.optimizer_name.lower(), {}) | options.optimizer_arguments
    arguments = ",".join(f"{key}={value}" for key, value in given.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({arguments})" if arguments else "")


def _finds_rate(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return last.startswith(("dadapt", "prodigy"))


def _arguments(kind: type[torch.optim.Optimizer], options: OptimizerOptions) -> dict[str, Any]:
    """Arguments for all groups: the options' own, kohya's defaults, what the user gave."""
    given, name = options.optimizer_arguments, options.optimizer_name.lower()
    known = named_classes.argument_names(kind)
    given = {
        SYNONYMS[key] if key not in known and SYNONYMS.get(key) in known else key: value for key, value in given.items()
    }
    named_classes.check_arguments("optimizer_args", kind, options.optimizer_name, given)
    arguments: dict[str, Any] = dict(DEFAULTS.get(name, {}))
    if kind is torch.optim.AdamW:
        arguments = {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
        if not given.keys() & {"fused", "foreach", "differentiable"}:
            # On two cores, 384 weights of rank 16: 6 ms a step; one by one 18, foreach 22.
            arguments["fused"] = True
    if "lr" in known:
        arguments["lr"] = None if options.optimizer_sets_rate else options.learning_rate
    return arguments | given


def _entry(
    group: ParameterGroup, kind: type[torch.optim.Optimizer], options: OptimizerOptions, arguments: dict[str, Any]
) -> dict[str, Any]:
    entry: dict[str, Any] = {"params": list(group.parameters), "name": group.name}
    entry["lr"] = None if options.optimizer_sets_rate else group.learning_rate
    if group.weight_decay is None:
        return entry
    given = arguments.get("weight_decay", group.weight_decay)
    require(
        given == group.weight_decay,
        "optimizer_args",
        f"gives weight_decay {given}, and that of {group.name} is {group.weight_decay} by an option of its own. Use that option.",
    )
    if "weight_decay" in named_classes.argument_names(kind):
        return entry | {"weight_decay": group.weight_decay}
    require(group.weight_decay == 0, "weight_decay", f"has no effect: {options.optimizer_name} knows none.")
    return entry


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to train on differ from those to judge and keep, as in schedule-free optimizers."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if group["lr"] is not None:
            group["lr"] = rate


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """ "lr/NAME" of each group and, where the optimizer finds the rate, "d*lr/NAME". May read the device."""
    rates = {}
    for group in optimizer.param_groups:
        rate = group["lr"]
        if rate is None:
            state = next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), None)
            rate = 0.0 if state is None else optimizer._get_lr(group, state)  # type: ignore[attr-defined]
        rates[f"lr/{group['name']}"] = float(rate)
        if _finds_rate(type(optimizer).__name__) and "d" in group:
            rates[f"d*lr/{group['name']}"] = float(group["d"]) * float(rate)
    return rates
