"""Finds the checkpoints to evaluate: a file, a training state, or everything that a training saved in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import UserError
from library.files import read_json
from library.merging.source import PROVENANCE_KEY, Source, read_source
from library.models.tensor_files import TensorFile
from library.training.state import list_states

_NUMBER = re.compile(r"-(?:step)?(\d+)(?:-ema)?$")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate. path: an adapter file, or a state of train_repa.py. step: its optimizer steps, where known."""

    name: str
    path: Path
    step: int | None

    @property
    def is_state(self) -> bool:
        return self.path.is_dir()

    def read(self, *, use_ema: bool) -> Source:
        """Its adapter. Raises UserError where the file is damaged, or is a whole model."""
        source = read_source(self.path, use_ema=use_ema and self.is_state)
        if source.is_wrapped:
            raise UserError(
                f"{self.path} holds a whole model with adapters in it. Merge it with merge_lora.py and compare pictures of the "
                "result with generate.py; here adapters are compared with their base."
            )
        return source


def find_candidates(paths: Sequence[Path], *, use_ema: bool = False) -> list[Candidate]:
    """The checkpoints of all `paths`, in the order of training, with unique names.

    A folder stands for the states of train_repa.py in it and the adapters beside them; a state of train_network.py stands for the
    adapter that was saved with it. use_ema: the averaged weights instead. Raises UserError where there is no checkpoint.
    """
    found: list[Candidate] = []
    for path in paths:
        found += _in_folder(path, use_ema) if path.is_dir() else [_of_file(path)]
    unique = list({candidate.path.resolve(): candidate for candidate in found}.values())
    if all(candidate.step is not None for candidate in unique):
        unique.sort(key=lambda candidate: candidate.step or 0)
    return _with_unique_names(unique)


def _in_folder(folder: Path, use_ema: bool) -> list[Candidate]:
    if (folder / "state.json").is_file():
        return [_of_state(folder)]
    if (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} is a model, not an adapter. Name it as --base_model, and the adapters as --checkpoint."
        )
    states = [Candidate(path.name, path, step) for step, path in list_states(folder)]
    steps = {state.step for state in states}
    adapters = [
        _of_file(file)
        for file in sorted(folder.glob("*.safetensors"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        if file.stem.endswith("-ema") == use_ema and _is_adapter(file)
    ]
    # At its end train_repa.py writes its last state once more, as an adapter.
    adapters = [adapter for adapter in adapters if adapter.step is None or adapter.step not in steps]
    if not states and not adapters:
        averaged = " with averaged weights" if use_ema else ""
        raise UserError(
            f"There are no checkpoints{averaged} in {folder}: no adapter (*.safetensors) and no training state "
            "(step_NNNNNN). Name the output folder of a training, or one file."
        )
    return [*states, *adapters]


def _of_state(folder: Path) -> Candidate:
    step = read_json(folder / "state.json").get("step")
    if (folder / "lora.safetensors").is_file():
        return Candidate(folder.name, folder, step)
    adapter = folder.with_name(f"{folder.name.removesuffix('-state')}.safetensors")
    if not adapter.is_file():
        raise UserError(
            f"{folder} is a state of train_network.py, which holds no adapter file, and {adapter}, which is saved beside it, "
            "is missing. Name an adapter file."
        )
    return _of_file(adapter)


def _of_file(file: Path) -> Candidate:
    if not file.is_file():
        raise UserError(f"{file} does not exist. Name an adapter, a training state, or a folder of them.")
    steps = TensorFile(file).metadata.get("ss_steps", "") if file.suffix.lower() == ".safetensors" else ""
    in_name = _NUMBER.search(file.stem)
    number = int(steps) if steps.isdigit() else int(in_name[1]) if in_name else None
    return Candidate(file.stem, file, number)


def _is_adapter(file: Path) -> bool:
    """Whether a file in a folder is a checkpoint: not merged by merge_lora.py, and not still being written."""
    if file.name.startswith("."):
        return False
    try:
        return PROVENANCE_KEY not in TensorFile(file).metadata
    except UserError:
        return False


def _with_unique_names(candidates: list[Candidate]) -> list[Candidate]:
    """With the folder before the name, where two checkpoints have the same name."""
    names = [candidate.name for candidate in candidates]
    return [
        replace(candidate, name=f"{candidate.path.resolve().parent.name}/{candidate.name}")
        if names.count(candidate.name) > 1
        else candidate
        for candidate in candidates
    ]
