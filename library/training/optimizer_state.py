"""What an optimizer remembers, as tensors by name and JSON values, and put back to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from library.errors import RunFailed, UserError

# Entries of a parameter group that are no memory: the weights, and the rate, which follows from the step.
NOT_REMEMBERED = ("params", "lr")


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each parameter group holds, copied. Taken before the first step, it tells later what the steps changed."""
    return [
        {key: deepcopy(value) for key, value in group.items() if key not in NOT_REMEMBERED}
        for group in optimizer.param_groups
    ]


def pack(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], initial: list[dict[str, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, as {moment}.{weight}, and the facts for state.json: scalars by weight, changed values of groups, and strides.

    Some optimizers remember things per group (Prodigy's d, the weight sums of schedule-free ones). Saved is what differs
    from `initial`; the rest are options, and a resumed run has its own. A file keeps no layout, and kernels for another one
    round otherwise, so the strides of a tensor are said where they are not the usual ones (`_usual_strides`).
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, moments in optimizer.state.items():
        if id(parameter) not in names:
            raise RunFailed(
                f"{type(optimizer).__name__} keeps memory that belongs to no trained weight, which cannot be saved. Use another "
                "optimizer_type."
            )
        for key, value in moments.items():
            place = f"{key}.{names[id(parameter)]}"
            if isinstance(value, torch.Tensor):
                tensors[place] = value
            else:
                scalars[place] = _encode(value, place, tensors)
    groups = []
    for index, (before, now) in enumerate(zip(initial, group_values(optimizer), strict=True)):
        changed = {key: value for key, value in now.items() if key not in before or not _same(before[key], value)}
        groups.append({key: _encode(value, f"group {index}.{key}", tensors) for key, value in changed.items()})
    # Strides as a copy has them: of a tensor with gaps or overlaps, those of a dense one.
    strides = {place: list(torch.empty_like(tensor, device="meta").stride()) for place, tensor in tensors.items()}
    unusual = {place: s for place, s in strides.items() if s != _usual_strides(place, tensors[place], parameters)}
    facts = {
        "optimizer": _path(optimizer),
        "optimizer_scalars": scalars,
        "optimizer_groups": groups,
        "optimizer_strides": unusual,
    }
    return tensors, facts


@torch.no_grad()
def unpack(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    facts: Mapping[str, Any],
    path: Path,
) -> None:
    """Put back what `pack` gave. path: the file the tensors came from, for the errors.

    Raises UserError where it is of another optimizer or of weights that are not trained here.
    """
    made_by = facts.get("optimizer", _path(optimizer))
    if made_by != _path(optimizer):
        raise UserError(
            f"{path} is the memory of {made_by}, and this run uses {_path(optimizer)}. Restore optimizer_type, or start anew in "
            "another --output_dir."
        )
    order = [p for group in optimizer.param_groups for p in group["params"]]
    device = order[0].device
    # Copied out of the file's memory map: tensors lie there on odd addresses, and kernels for those round otherwise.
    strides = facts.get("optimizer_strides", {})
    for place, tensor in tensors.items():
        laid_out = strides.get(place) or _usual_strides(place, tensor, parameters)
        tensors[place] = torch.empty_strided(tensor.shape, laid_out, dtype=tensor.dtype).copy_(tensor)
    scalars = {key: _decode(value, tensors, device) for key, value in facts.get("optimizer_scalars", {}).items()}
    groups = [
        {key: _decode(value, tensors, device) for key, value in group.items()}
        for group in facts.get("optimizer_groups", [])
    ]
    entries: dict[str, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *scalars.items()]:
        moment, _, name = key.partition(".")
        entries.setdefault(name, {})[moment] = value
    unknown = entries.keys() - parameters.keys()
    if unknown:
        raise UserError(
            f"{path} has moments of {len(unknown)} weights that are not trained here (first: {sorted(unknown)[0]})."
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = {i: dict(entries[names[id(p)]]) for i, p in enumerate(order) if names[id(p)] in entries}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter in order:
        for key, value in entries.get(names[id(parameter)], {}).items():
            _put_back(optimizer, parameter, key, value)
    for group, values in zip(optimizer.param_groups, groups, strict=False):
        group.update(values)


def _put_back(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, key: str, saved: Any) -> None:
    """Undo what loading does to a value: it casts every tensor to the weight's dtype."""
    loaded = optimizer.state[parameter]
    if not isinstance(saved, torch.Tensor):
        if isinstance(saved, (list, tuple, dict)):
            loaded[key] = saved
        return
    value = saved.to(device=loaded[key].device)
    if value.shape == parameter.shape and getattr(optimizer, "is_paged", False):
        value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
    loaded[key] = value


def _usual_strides(place: str, tensor: torch.Tensor, parameters: Mapping[str, torch.nn.Parameter]) -> list[int]:
    """Of its weight (channels-last, say) where the tensor at `place` is of that shape, else those of a contiguous tensor."""
    parameter = parameters.get(place.partition(".")[2])
    if parameter is not None and parameter.shape == tensor.shape:
        return list(torch.empty_like(parameter, device="meta").stride())
    return list(torch.empty(tensor.shape, device="meta").stride())


def _path(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, with its tensors put into `tensors` under names that begin with `place`."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {"tensor": place, "on_cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]}
    if type(value) is dict:
        return {"dict": [[key, _encode(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    raise RunFailed(
        f"The optimizer keeps {place}, a {type(value).__name__}, which cannot be saved. Use another optimizer_type."
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """What `_encode` made `value` of; takes its tensors out of `tensors` and puts them where they were."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors.pop(value["tensor"])
        return tensor if value["on_cpu"] else tensor.to(device)
    if "dict" in value:
        return {key: _decode(item, tensors, device) for key, item in value["dict"]}
    kind, items = next(iter(value.items()))
    return {"list": list, "tuple": tuple}[kind](_decode(item, tensors, device) for item in items)
