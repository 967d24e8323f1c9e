"""Adapters as one adapter file: summed, cut to a rank, converted; written and read back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file

from library import project_version
from library.errors import RunFailed, UserError
from library.files import beside, file_hash, human_bytes, recover_folders, require_space, whole_file, write_json
from library.merging.algebra import DynamicRank, RankChange, concatenate, reduce_rank
from library.merging.merge import not_finite_as
from library.merging.merge_report import Ingredient
from library.merging.source import PROVENANCE_KEY
from library.words import plural
from networks import AdapterError
from networks.adapter_alphas import PEFT_CONFIG, PEFT_WEIGHTS
from networks.adapter_export import Form, adapter_tensors, form_metadata, peft_config
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from networks.finite import all_finite
from networks.kinds.full import FullModule
from networks.kinds.lora import LoraModule
from networks.names import Target


def check_peft_folder(folder: Path) -> None:
    """Raise UserError where a folder for an adapter in PEFT's form holds other files, of which its configuration would speak."""
    others = sorted(path.name for path in folder.glob("*") if path.name not in (PEFT_WEIGHTS, PEFT_CONFIG))
    if others:
        raise UserError(
            f"{folder} holds {plural(len(others), 'other file')} (first: {others[0]}). An adapter in PEFT's form wants a folder of "
            f"its own, for its {PEFT_CONFIG} would be taken for that of any adapter beside it. Name another --save_to."
        )


def write_combined(
    ingredients: Sequence[Ingredient],
    path: Path,
    *,
    form: Form = "kohya",
    rank: int | None = None,
    conv_rank: int | None = None,
    dynamic: DynamicRank | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write the sum of adapters as one file; returns what to say of it.

    One adapter at ratio 1 keeps its factors, so that this also converts. rank, conv_rank: None is exact (ranks add up), a
    number the nearest adapter of that rank, or with `dynamic` of no more. dtype: None keeps that of the adapters.
    Raises UserError where adapters cannot be added or written in that form, RunFailed where the file reads back otherwise.
    """
    modules = [module for ingredient in ingredients for module in _summands(ingredient.source.adapter).values()]
    adapter, changes = _combined(ingredients, rank, conv_rank, dynamic)
    if dtype is None:
        dtypes = {tensor.dtype for module in modules for tensor in module.tensors().values()}
        dtype = dtypes.pop() if len(dtypes) == 1 and adapter is ingredients[0].source.adapter else _holding(dtypes)
    adapter = replace(adapter, metadata={**adapter.metadata, PROVENANCE_KEY: _provenance(ingredients)})
    return "\n".join([write_adapter(adapter, path, form=form, dtype=dtype), *_kept(changes)])


def check_summable(adapter: Adapter) -> None:
    """Raise UserError for kinds of modules that make no LoRA file."""
    _summands(adapter)


def check_combined(ingredients: Sequence[Ingredient], form: Form, *, resized: bool) -> None:
    """Raise UserError where `write_combined` would, short of the decompositions that a new rank takes."""
    adapter, _ = _combined(ingredients, None, None, None)
    if resized:
        adapter = concatenate([(adapter, 1.0)])
    try:
        adapter_tensors(adapter, form)
        _ = peft_config(adapter) if form == "peft" else None
    except AdapterError as error:
        raise UserError(str(error)) from None


def write_adapter(adapter: Adapter, path: Path, *, form: Form = "kohya", dtype: torch.dtype) -> str:
    """Write an adapter file, which takes its place when it has been read back; returns what to say of it.

    Raises as `write_combined`.
    """
    recover_folders(path.parent)
    try:
        tensors = adapter_tensors(adapter, form, dtype)
        date = datetime.now().isoformat(timespec="seconds")
        metadata = form_metadata(adapter, form, tensors, output_name=path.stem, date=date)
        config = peft_config(adapter) if form == "peft" else None
    except AdapterError as error:
        raise UserError(str(error)) from None
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise UserError(f"{name} {not_finite_as(tensor.dtype)}")
    require_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()), "The LoRA")
    with whole_file(path) as temporary, _workshop(path) as folder:
        draft = folder / path.name
        save_file(tensors, draft, metadata=metadata)
        if config is not None:
            write_json(folder / PEFT_CONFIG, config)
        _verify(draft, adapter, dtype)
        os.replace(draft, temporary)
        if config is not None:
            path.unlink(
                missing_ok=True
            )  # its alpha is in the configuration: one never stands beside the other's weights
            write_json(path.with_name(PEFT_CONFIG), config)
    ranks = sorted({module.rank for module in adapter.modules.values() if module.rank > 0} or {0})
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    weight = human_bytes(path.stat().st_size)
    return f"Wrote {path}: {adapter.family.title}, {plural(len(adapter.modules), 'module')}, {size}, {weight}."


@contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A folder beside `path` in which a file has its own name, and PEFT's configuration beside it, as readers want."""
    folder = beside(path.with_suffix(""), "tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _holding(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A format for what is computed of values in these: one that holds all of them, and no float8, which holds two digits."""
    return reduce(torch.promote_types, (torch.float16 if found.itemsize == 1 else found for found in dtypes))


def _provenance(ingredients: Sequence[Ingredient]) -> str:
    adapters = [ingredient.record(file_hash(ingredient.source.file)) for ingredient in ingredients]
    return json.dumps({"version": project_version(), "adapters": adapters})


def _summands(adapter: Adapter) -> dict[Target, LoraModule | FullModule]:
    try:
        return adapter.summands("--lora_only")
    except AdapterError as error:
        raise UserError(str(error)) from None


def _combined(
    ingredients: Sequence[Ingredient], rank: int | None, conv_rank: int | None, dynamic: DynamicRank | None
) -> tuple[Adapter, list[RankChange]]:
    first = ingredients[0]
    if len(ingredients) == 1 and all(first.strength.of(target) == 1 for target in first.source.adapter.modules):
        adapter = first.source.adapter
    else:
        adapter = concatenate([(ingredient.source.adapter, ingredient.strength.of) for ingredient in ingredients])
    return (adapter, []) if rank is None else reduce_rank(adapter, rank, conv_rank, dynamic)


def _verify(path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Read the file as any other adapter, and compare what each module adds to a weight."""
    written = _summands(read_adapter(path))
    tolerance = max(1e-5, 3 * torch.finfo(dtype).eps)  # two factors, each rounded by up to eps / 2; and float32's own
    if written.keys() != adapter.modules.keys():
        raise RunFailed(
            f"{path.name} reads back with other modules than were written, so it was removed. Check the disk and try again."
        )
    for target, module in _summands(adapter).items():
        expected, found = module.product(), written[target].product()
        if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max())):
            raise RunFailed(
                f"{target.path} in {path.name} reads back differently from what was written, so it was removed. Check the disk "
                "and try again."
            )


def _kept(changes: list[RankChange]) -> list[str]:
    if not changes:
        return []
    kept = [change.retained for change in changes]
    worst = min(changes, key=lambda change: change.retained)
    return [
        f"Of each module's norm {min(kept):.1%} to {max(kept):.1%} is kept (mean {sum(kept) / len(kept):.1%}, least in "
        f"{worst.target.path})."
    ]
