"""Writes a merged model, reads it back, reports; it takes its place only when every check has passed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from library import project_version
from library.errors import RunFailed, UserError
from library.files import (
    public_name,
    recover_folders,
    require_file_name,
    require_space,
    require_writable,
    whole_file,
    whole_folder,
)
from library.hashes import Hashes
from library.merging.diffusers_folder import copied_bytes, weights_file, write_rest
from library.merging.layouts import Merging, component_tensors, single_file_tensors
from library.merging.merge_report import Component, Ingredient, MergeReport
from library.merging.read_back import Check, verify
from library.merging.source import PROVENANCE_KEY
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.locate import BaseLocation
from library.models.tensor_files import NewTensor, TensorFile, file_bytes, write_tensor_file
from library.progress import doing
from networks.families import Family
from networks.original_names import original_place
from networks.prediction_names import FLOW_NAME, PredictionName, flow_entries

SINGLE_FILE = "model.safetensors"
REPORT = "merge_report"
_UNKNOWN_HASH = "0" * 64


@dataclass(frozen=True)
class Output:
    """What to write: a diffusers folder, a single file in it, or a single file alone."""

    folder: Path | None
    single_file: Path | None
    """Where the single file will lie; inside `folder` where there is one."""
    overwrite: bool = False

    @property
    def path(self) -> Path:
        path = self.folder or self.single_file
        assert path is not None
        return path


def check_output(output: Output, sources: Sequence[Path]) -> None:
    """Raise UserError where writing would replace what is not an earlier merge, or what is to be read."""
    path = output.path
    require_writable(path.parent)
    for written in (path,) if output.folder is not None else (path, path.with_name(f"{path.stem}_{REPORT}.json")):
        require_file_name(written)
    for source in sources:
        if path.exists() and source.resolve().is_relative_to(path.resolve()):
            what = "is" if source.resolve() == path.resolve() else f"holds {source}, which is"
            raise UserError(f"{path} {what} to be read. Name another output.")
    if not path.exists() or (output.folder is not None and is_empty_folder(path)):
        return
    if not output.overwrite:
        raise UserError(f"{path} exists already. Name another output, or replace it with --overwrite.")
    if output.folder is not None and not (path / f"{REPORT}.json").is_file():
        raise UserError(
            f"{path} is no earlier merge (it has no {REPORT}.json), so --overwrite does not replace it. Name another "
            "--output_dir."
        )
    if output.folder is None and path.is_dir():
        raise UserError(f"{path} is a folder, so --overwrite does not replace it with a file. Name another output.")


def followed(path: Path) -> Path:
    """Where `path` leads: from ~, and from a link, which would be replaced, not followed, by a rename."""
    path = path.expanduser()
    return path.resolve() if path.is_symlink() else path


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def check_space(merging: Merging, ingredients: Sequence[Ingredient], output: Output) -> None:
    """Raise UserError where `write_merged` would find the disk too small."""
    require_space(output.path.parent, _Plan(merging, ingredients, output, Hashes([])).bytes(), "The merged model")


def write_merged(
    merging: Merging,
    ingredients: Sequence[Ingredient],
    output: Output,
) -> MergeReport:
    """Write, verify, report, and put in place: whole or not at all.

    Raises UserError where a value does not fit the number format or the disk is too small, RunFailed where a check fails.
    """
    started = time.perf_counter()
    base = merging.base
    recover_folders(output.path.parent)
    hashes = Hashes([*base.files(), *(ingredient.source.file for ingredient in ingredients)])
    plan = _Plan(merging, ingredients, output, hashes)
    require_space(output.path.parent, plan.bytes(), "The merged model")
    hashes.start()
    with _in_place(output) as target:
        with doing("merging"):
            absent = plan.write(target)
        with doing("verifying"):
            checks = plan.verify(target)
        report = plan.report(target, checks, absent, time.perf_counter() - started)
        if not report.passed:
            raise RunFailed(
                f"{len(report.failed)} checks of the merged model failed, so nothing was written to {output.path}: "
                + "; ".join(f"{check.name}: {check.found}" for check in report.failed)
            )
        if output.folder is not None:
            report.write(target / f"{REPORT}.md", target / f"{REPORT}.json")
    if output.folder is None:
        beside = output.path.with_suffix("")
        with whole_file(f"{beside}_{REPORT}.md") as markdown, whole_file(f"{beside}_{REPORT}.json") as data:
            report.write(markdown, data)
    return report


@contextmanager
def _in_place(output: Output) -> Iterator[Path]:
    if output.folder is not None:
        with whole_folder(output.folder, overwrite=output.overwrite or is_empty_folder(output.folder)) as folder:
            yield folder
    else:
        with whole_file(output.path) as file:
            yield file


class _Plan:
    """The files of one merge, as (path inside the output, tensors)."""

    def __init__(self, merging: Merging, ingredients: Sequence[Ingredient], output: Output, hashes: Hashes) -> None:
        self._merging = merging
        self._ingredients = tuple(ingredients)
        self._output = output
        self._hashes = hashes
        self._date = datetime.now().isoformat(timespec="seconds")
        self._base = merging.base
        self._components: dict[str, list[NewTensor]] = {}
        if output.folder is not None:
            self._components = {name: component_tensors(merging, name) for name in self._base.tensors}

    def bytes(self) -> int:
        tensors = [tensor for component in self._components.values() for tensor in component]
        total = sum(tensor.nbytes for tensor in tensors)
        if self._output.folder is not None:
            total += copied_bytes(self._base.location)
        if self._output.single_file is not None:
            total += file_bytes(single_file_tensors(self._merging), self._metadata({}))
        return total

    def write(self, target: Path) -> list[str]:
        """Write every file; returns the parts that the base names and does not have."""
        absent: list[str] = []
        if self._output.folder is not None:
            for name, tensors in self._components.items():
                path = target / weights_file(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensor_file(path, tensors, {"format": "pt"})
            absent = write_rest(self._base, target)
        if self._output.single_file is not None:
            write_tensor_file(
                self._single_file(target),
                single_file_tensors(self._for_single_file(target)),
                self._metadata({}),
                final=lambda: self._metadata(self._hashes.all()),
            )
        return absent

    def _single_file(self, target: Path) -> Path:
        return target / SINGLE_FILE if self._output.folder is not None else target

    def _for_single_file(self, target: Path) -> Merging:
        """Where a folder has been written, the single file is its bytes in another order."""
        if self._output.folder is None:
            return self._merging
        return Merging(_read_back(target), {})

    def verify(self, target: Path) -> list[Check]:
        checks: list[Check] = []
        if self._output.folder is not None:
            written = _read_back(target)
            names = [
                name for component in self._components for name in TensorFile(target / weights_file(component)).tensors
            ]
            checks += verify(self._merging, written, names, "folder")
        if self._output.single_file is not None:
            path = self._single_file(target)
            written = _read_back(path)
            source = "the base" if self._output.folder is None else "the folder"
            checks += verify(self._for_single_file(target), written, TensorFile(path).tensors, "single file", source)
        return checks

    def report(self, target: Path, checks: Sequence[Check], absent: Sequence[str], seconds: float) -> MergeReport:
        folds = self._merging.folds
        files = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
        return MergeReport(
            version=project_version(),
            date=self._date,
            family=self._base.family.title,
            base=self._base.location.name,
            precision=self._merging.describe(),
            is_stochastic=self._merging.rounding.stochastic,
            ingredients=self._ingredients,
            components=tuple(
                Component(name, self._base.stored_names[name], self._written(name), len(folds.get(name, {})))
                for name in self._base.tensors
            ),
            changes=tuple(self._merging.changes.values()),
            checks=tuple(checks),
            hashes=self._hashes.all(),
            left_behind=self._base.others,
            absent=tuple(absent),
            outputs={
                (self._output.path.name if path == target else path.relative_to(target).as_posix()): path.stat().st_size
                for path in files
            },
            seconds=seconds,
        )

    def _written(self, component: str) -> int:
        """How many tensors of a component are written: of the folder, or of the single file, which stacks some, alone."""
        keys = self._base.tensors[component]
        if self._output.folder is not None:
            return len(keys)
        return len({original_place(self._base.family, component, key).key for key in keys})

    def _name_in_base(self, path: Path) -> str:
        """U-Net and VAE lie in files of one name, so theirs say the folder too."""
        folder = self._base.location.path
        return path.relative_to(folder).as_posix() if path != folder and path.is_relative_to(folder) else path.name

    def _metadata(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Of the single file. Its length does not depend on whether the hashes are known yet."""
        record = {
            "version": project_version(),
            "base": {
                "name": public_name(self._base.location.name),
                "sha256": {
                    self._name_in_base(path): hashes.get(str(path), _UNKNOWN_HASH) for path in self._base.files()
                },
            },
            **({"rounding": rounding} if (rounding := self._merging.rounding.describe().lstrip(", ")) else {}),
            "adapters": [
                ingredient.record(hashes.get(str(ingredient.source.file), _UNKNOWN_HASH))
                for ingredient in self._ingredients
            ],
        }
        names = [ingredient.source.file.stem for ingredient in self._ingredients]
        return {
            "format": "pt",
            **_modelspec(self._base.family, self._output.path.stem, self._date, self._base.prediction),
            **(flow_entries(self._base.flow_shift) if self._base.prediction is FLOW_NAME else {}),
            "modelspec.merged_from": ", ".join([public_name(self._base.location.name), *names]),
            PROVENANCE_KEY: json.dumps(record),
        }


def _read_back(path: Path) -> Checkpoint:
    try:
        return open_checkpoint(BaseLocation(path.name, path))
    except UserError as error:
        raise RunFailed(f"What was written cannot be read again, so it was removed: {error}") from error


def _modelspec(family: Family, title: str, date: str, prediction: PredictionName) -> dict[str, str]:
    """ModelSpec 1.0.1 of a checkpoint, as sd-scripts and Stability-AI write it."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": family.implementation,
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.resolution": family.resolution,
        "modelspec.prediction_type": prediction.modelspec,
    }
