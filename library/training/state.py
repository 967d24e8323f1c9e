"""Training state on disk: a folder that is whole or absent, tensors in safetensors and the rest in JSON.

    step_000150/
        lora.safetensors, align_heads.safetensors    trained weights, one file per part
        ema.safetensors                              their moving average, all parts
        optimizer.safetensors                        moments, as {name of the moment}.{name of the weight}
        state.json                                   step, samples seen, options, versions, hashes

Random state is not there because there is none: randomness comes from (seed, rank, step).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import read_json, whole_folder, write_json
from library.training.ema import ExponentialAverage

FORMAT_VERSION = 1


@dataclass
class Trained:
    """Everything that a step changes. parts: file stem ("lora") -> name -> parameter; names are unique over parts."""

    parts: dict[str, dict[str, torch.nn.Parameter]]
    optimizer: torch.optim.Optimizer
    average: ExponentialAverage | None
    metadata: dict[str, str]

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for part in self.parts.values() for name, parameter in part.items()}


def state_name(step: int) -> str:
    return f"step_{step:06d}"


def list_states(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole state, oldest first."""
    found = []
    for path in folder.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / "state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save_state(folder: Path, trained: Trained, facts: Mapping[str, Any]) -> None:
    """Write a state and read it back before it takes its name. An older state of the same step is replaced."""
    tensors: dict[str, Mapping[str, torch.Tensor]] = dict(trained.parts)
    if trained.average is not None:
        tensors["ema"] = trained.average.shadows
    moments, scalars = _optimizer_tensors(trained)
    tensors["optimizer"] = moments
    with whole_folder(folder, overwrite=True) as temporary:
        for stem, named in tensors.items():
            host = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(host, temporary / f"{stem}.safetensors", metadata=trained.metadata)
            _verify(temporary / f"{stem}.safetensors", host)
        write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **facts, "optimizer_scalars": scalars})


def _verify(path: Path, expected: dict[str, torch.Tensor]) -> None:
    again = load_file(path)
    if again.keys() != expected.keys() or not all(torch.equal(again[n], expected[n]) for n in expected):
        raise OSError(f"{path.name} reads back differently from what was written")


def _optimizer_tensors(trained: Trained) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    names = {id(parameter): name for name, parameter in trained.parameters.items()}
    tensors, scalars = {}, {}
    for parameter, moments in trained.optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}.{names[id(parameter)]}"] = value
            else:
                scalars[f"{key}.{names[id(parameter)]}"] = value
    return tensors, scalars


def read_facts(folder: Path) -> dict[str, Any]:
    """state.json of a state. Raises UserError where `folder` is no whole state of a known format."""
    if not (folder / "state.json").is_file():
        hint = ""
        if states := list_states(folder):
            hint = f" Its newest state is {states[-1][1]}."
        raise UserError(f"{folder} is no training state: there is no state.json in it.{hint}")
    facts = read_json(folder / "state.json")
    if facts.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} is a state of format {facts.get('format_version')}; this program reads {FORMAT_VERSION}."
        )
    return facts


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError where it is absent or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete {path.parent} to continue from the state before it."
        ) from None


@torch.no_grad()
def load_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Put a state into the parameters, the average and the optimizer; return its facts.

    Raises UserError where a file is damaged or its tensors are not those of this run.
    """
    facts = read_facts(folder)
    for part, parameters in trained.parts.items():
        _fill(parameters, read_tensors(folder / f"{part}.safetensors"), folder / f"{part}.safetensors")
    if trained.average is not None:
        _fill(trained.average.shadows, read_tensors(folder / "ema.safetensors"), folder / "ema.safetensors")
    moments = read_tensors(folder / "optimizer.safetensors")
    entries: dict[str, dict[str, Any]] = {}
    for key, value in [*moments.items(), *facts.get("optimizer_scalars", {}).items()]:
        moment, _, name = key.partition(".")
        entries.setdefault(name, {})[moment] = value
    unknown = entries.keys() - trained.parameters.keys()
    if unknown:
        raise UserError(f"{folder / 'optimizer.safetensors'} has moments of {len(unknown)} weights that are not trained here "
                        f"(first: {sorted(unknown)[0]}).")  # fmt: skip
    order = [p for group in trained.optimizer.param_groups for p in group["params"]]
    names = {id(parameter): name for name, parameter in trained.parameters.items()}
    state = {i: entries[names[id(p)]] for i, p in enumerate(order) if names[id(p)] in entries}
    groups = trained.optimizer.state_dict()["param_groups"]
    trained.optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in trained.optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # Fused kernels want moments laid out as their weights (channels-last), which a file does not keep.
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return facts


def _fill(targets: Mapping[str, torch.Tensor], values: dict[str, torch.Tensor], path: Path) -> None:
    absent, extra = targets.keys() - values.keys(), values.keys() - targets.keys()
    if absent or extra:
        first = sorted(absent or extra)[0]
        raise UserError(
            f"{path} does not fit this run: {len(absent)} weights are missing and {len(extra)} unknown (first: {first}). "
            "Was it trained with other adapters or heads?"
        )
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise UserError(f"{path}: {name} is {tuple(values[name].shape)} there and {tuple(target.shape)} here.")
        target.copy_(values[name])


def prune_states(folder: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` states; None keeps all."""
    if keep is not None:
        for _, path in list_states(folder)[:-keep]:
            shutil.rmtree(path)


def changed_options(then: Mapping[str, Any], now: Mapping[str, Any], harmless: frozenset[str]) -> list[str]:
    """ "train_batch_size was 128, is 64" for each option that changes what a run computes."""
    return [
        f"{name} was {json.dumps(then.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if name not in harmless and then.get(name) != now.get(name)
    ]
