"""How a trial that did not fit into memory is trained again: half the batch, twice the gradient accumulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.files import read_json, write_json, write_text
from library.options.scripts import option_default
from library.options.search import Script
from library.options.toml_file import find_config, read_toml

BATCH, ACCUMULATION = "train_batch_size", "gradient_accumulation_steps"
_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")


def with_half_batch(options: Mapping[str, Any], script: Script, folder: Path) -> dict[str, Any] | None:
    """`options` with the batch halved and the accumulation doubled; None where the batch is one sample already.

    Pictures per step stay the same, except that half of an odd batch is rounded up. A batch size in a dataset TOML overrides
    the option, so then a copy of that file with halved batch sizes is written into `folder` and named in the options.
    """
    halved = dict(options)
    largest = _batch(options, script)
    halved[BATCH] = math.ceil(largest / 2)
    halved[ACCUMULATION] = 2 * _accumulation(options)
    config = options.get("dataset_config")
    if config is not None and script == "train_network":
        copy, batches = _half_dataset(Path(str(config)), folder)
        if copy is not None:
            halved["dataset_config"] = str(copy)
        largest = max(batches, default=largest)
    return halved if largest > 1 else None


def halving_in_words(options: Mapping[str, Any], script: Script) -> str:
    """What `with_half_batch` does, with the numbers where it changes how many pictures a step has."""
    batch, steps = _batch(options, script), _accumulation(options)
    words = "half the batch and twice the accumulation"
    if batch % 2 == 0:
        return words
    return f"{words}; the batch is odd, so a step has {math.ceil(batch / 2)} x {2 * steps} pictures instead of {batch} x {steps}"


def _batch(options: Mapping[str, Any], script: Script) -> int:
    return int(options.get(BATCH) or option_default(script, BATCH))


def _accumulation(options: Mapping[str, Any]) -> int:
    return int(options.get(ACCUMULATION) or 1)


def _half_dataset(file: Path, folder: Path) -> tuple[Path | None, list[int]]:
    """A copy of the dataset file with halved batch sizes, and what these were; None where the file gives none."""
    file = find_config(str(file)) if not file.is_file() else file
    is_json = file.suffix == ".json"
    content = read_json(file) if is_json else read_toml(file)
    datasets = [dataset for dataset in content.get("datasets", []) if isinstance(dataset, dict)]
    batches = []
    for level in [content.get("general", {}), *datasets]:
        if isinstance(level.get("batch_size"), int):
            batches.append(level["batch_size"])
            level["batch_size"] = math.ceil(level["batch_size"] / 2)
    if not batches:
        return None, []
    for subset in [subset for dataset in datasets for subset in dataset.get("subsets", [])]:
        for name in _PATHS:
            # Paths relative to the working folder still hold; those relative to the file would be lost with the copy.
            path = subset.get(name)
            if isinstance(path, str) and not Path(path).exists() and (file.parent / path).exists():
                subset[name] = str((file.parent / path).resolve())
    copy = folder / f"half_batch{file.suffix}"
    if is_json:
        write_json(copy, content)
    else:
        import toml

        write_text(copy, toml.dumps(content))
    return copy, batches
