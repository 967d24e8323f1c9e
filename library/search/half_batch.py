"""What to train instead where a trial did not fit into memory: half the batch, twice the accumulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.files import read_json, write_json, write_text
from library.options.toml_file import find_config, read_toml
from library.search.messages import Script

BATCH, ACCUMULATION = "train_batch_size", "gradient_accumulation_steps"
_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")


def with_half_batch(options: Mapping[str, Any], script: Script, folder: Path) -> dict[str, Any] | None:
    """`options` with each batch halved and the accumulation doubled; None where the batch is one sample already.

    The product stays, but for an odd batch, which is rounded up. Where a dataset TOML says how large batches are, it has the
    last word, so a copy of it with half of that is written into `folder`.
    """
    halved = dict(options)
    largest = int(options.get(BATCH) or _default_batch(script))
    halved[BATCH] = math.ceil(largest / 2)
    halved[ACCUMULATION] = 2 * int(options.get(ACCUMULATION) or 1)
    config = options.get("dataset_config")
    if config is not None and script == "train_network":
        copy, batches = _half_dataset(Path(str(config)), folder)
        if copy is not None:
            halved["dataset_config"] = str(copy)
        largest = max(batches, default=largest)
    return halved if largest > 1 else None


def halving_in_words(options: Mapping[str, Any], script: Script) -> str:
    """What `with_half_batch` does, and where it changes the pictures of a step."""
    batch, steps = int(options.get(BATCH) or _default_batch(script)), int(options.get(ACCUMULATION) or 1)
    words = "half the batch and twice the accumulation"
    if batch % 2 == 0:
        return words
    half = math.ceil(batch / 2)
    return f"{words}: of an odd batch, {half} x {2 * steps} pictures a step instead of {batch} x {steps}"


def _default_batch(script: Script) -> int:
    from library.search.space_file import option_default

    return int(option_default(script, BATCH))


def _half_dataset(file: Path, folder: Path) -> tuple[Path | None, list[int]]:
    """The copy, if the file has batch sizes, and what they were."""
    file = find_config(str(file)) if not file.is_file() else file
    is_json = file.suffix == ".json"
    content = read_json(file) if is_json else read_toml(file)
    datasets = [one for one in content.get("datasets", []) if isinstance(one, dict)]
    batches = []
    for level in [content.get("general", {}), *datasets]:
        if isinstance(level.get("batch_size"), int):
            batches.append(level["batch_size"])
            level["batch_size"] = math.ceil(level["batch_size"] / 2)
    if not batches:
        return None, []
    for subset in [subset for one in datasets for subset in one.get("subsets", [])]:
        for name in _PATHS:
            # Relative to the working folder, which stays, or else to the file's own, which the copy leaves.
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
