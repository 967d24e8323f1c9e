"""Training state on disk: a folder that is whole or absent, tensors in safetensors and the rest in JSON.

    step_000150/
        lora.safetensors, align_heads.safetensors    trained weights, one file per part
        ema.safetensors                              their moving average, all parts
        optimizer.safetensors                        moments, as {name of the moment}.{name of the weight}
        timestep_bins.safetensors                    losses by noise level, where timesteps are drawn by them
        state.json                                   step, samples seen, options, versions, hashes, optimizer's scalars and strides
        pictures.jsonl                               what was trained on, a line for each picture; see pictures_trained.py

The weights in their files are those to use. A schedule-free optimizer trains on others, which are among its moments.

Random state is not there because there is none: randomness comes from (seed, rank, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from library.diffusion.timestep_bins import TimestepBins
from library.errors import UserError
from library.files import read_json, whole_folder, write_json, write_text
from library.training import optimizer_state
from library.training.ema import ExponentialAverage, restored
from library.training.loss_scaling import LossScaler
from library.training.optimizers import has_modes
from library.training.saving import list_states as list_states

FORMAT_VERSION = 1
PICTURES = "pictures.jsonl"

# A weight as a schedule-free optimizer trains on it, among its moments.
TRAINING_WEIGHT = "training_weight"


@dataclass
class Trained:
    """Everything that a step changes. parts: file stem ("lora") -> name -> parameter; names are unique over parts."""

    parts: dict[str, dict[str, torch.nn.Parameter]]
    optimizer: torch.optim.Optimizer
    average: ExponentialAverage | None
    metadata: dict[str, str]
    scaler: LossScaler | None = None
    bins: TimestepBins | None = None
    initial_groups: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.initial_groups = optimizer_state.group_values(self.optimizer)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for part in self.parts.values() for name, parameter in part.items()}

    @contextmanager
    def optimizer_average(self) -> Iterator[dict[str, torch.Tensor]]:
        """Within the context the parameters hold what a schedule-free optimizer trains towards; it gets those trained on.

        With any other optimizer the parameters stay as they are, and it gets nothing.
        """
        if not has_modes(self.optimizer):
            yield {}
            return
        # Switching modes and back rounds; restoring does not.
        with restored(self.parameters) as training_weights:
            self.optimizer.eval()  # type: ignore[attr-defined]
            try:
                yield training_weights
            finally:
                self.optimizer.train()  # type: ignore[attr-defined]

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Within the context the parameters hold the weights to validate, sample and save: the average, if the run has one."""
        with self.optimizer_average(), nullcontext() if self.average is None else self.average.swapped_in():
            yield


def save_state(folder: Path, trained: Trained, facts: Mapping[str, Any], pictures: str = "") -> None:
    """Write a state and read it back before it takes its name. An older state of the same step is replaced.

    pictures: text of pictures.jsonl.
    """
    moments, memory = optimizer_state.pack(trained.optimizer, trained.parameters, trained.initial_groups)
    scaler = {} if trained.scaler is None else {"loss_scaler": trained.scaler.state()}
    with trained.optimizer_average() as training_weights:
        moments |= {f"{TRAINING_WEIGHT}.{name}": weight for name, weight in training_weights.items()}
        files: dict[str, Mapping[str, torch.Tensor]] = {**trained.parts, "optimizer": moments}
        if trained.average is not None:
            files["ema"] = trained.average.shadows
        if trained.bins is not None:
            files["timestep_bins"] = trained.bins.tensors()
        host = {stem: _on_host(tensors) for stem, tensors in files.items()}
    with whole_folder(folder, overwrite=True) as temporary:
        for stem, tensors in host.items():
            save_file(tensors, temporary / f"{stem}.safetensors", metadata=trained.metadata)
            _verify(temporary / f"{stem}.safetensors", tensors)
        if pictures:
            write_text(temporary / PICTURES, pictures)
        write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **facts, **memory, **scaler})


def _on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies for a file, which holds each tensor for itself: some optimizers share one between weights."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _verify(path: Path, expected: dict[str, torch.Tensor]) -> None:
    again = load_file(path)
    if again.keys() != expected.keys() or not all(torch.equal(again[n], expected[n]) for n in expected):
        raise OSError(f"{path.name} reads back differently from what was written")


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
    path = folder / "optimizer.safetensors"
    moments = read_tensors(path)
    for name, parameter in trained.parameters.items():
        if has_modes(trained.optimizer) and f"{TRAINING_WEIGHT}.{name}" in moments:
            parameter.copy_(moments.pop(f"{TRAINING_WEIGHT}.{name}"))
    optimizer_state.unpack(trained.optimizer, trained.parameters, moments, facts, path)
    if trained.scaler is not None and "loss_scaler" in facts:
        trained.scaler.load(facts["loss_scaler"])
    if trained.bins is not None:
        load_bins(folder, trained.bins)
    return facts


def load_bins(folder: Path, bins: TimestepBins) -> None:
    """As a state left them; where its run had none, they stay what they are."""
    path = folder / "timestep_bins.safetensors"
    if path.is_file():
        _fill(bins.tensors(), read_tensors(path), path)


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
