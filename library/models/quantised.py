"""Bases whose weights are small numbers with scales beside them: which layouts are read, and which are refused by name.

Read are weights of float8 or int8 with one scale, or one for each output, W = stored * scale: ComfyUI's scaled fp8
(`X.weight`, `X.scale_weight`, a `scaled_fp8` marker; later `X.weight_scale` and `X.comfy_quant`) and what others write alike.
Light: headers tell, and no torch is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.models.header import Entry, read_entries

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT = ".weight"
_SCALES = (".scale_weight", ".weight_scale")
# Scales of what a layer is given, which only arithmetic in float8 asks for; what says that a file is of this layout.
_BESIDE = re.compile(r"(\.scale_input|\.input_scale|\.comfy_quant|(^|\.)scaled_fp8)$")
_STORED = ("F8_E4M3", "F8_E5M2", "I8")
_PLAIN = ("F64", "F32", "F16", "BF16")
_FLOATING = (*_PLAIN, "F8_E4M3", "F8_E5M2")

# What only the files of other layouts have, and what those are called.
_OTHERS = {
    r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\..+)$": "bitsandbytes' 4 bits",
    r"\.(SCB|weight_format)$": "bitsandbytes' 8 bits",
    r"\.weight\._(data|scale|shift|packed)$|\._data$": "optimum-quanto's",
    r"\.(qweight|qzeros|g_idx|wscales|smooth(_factor)?)$": "GPTQ's, AWQ's or SVDQuant's",
    r"\.(weight_packed|weight_zero_point|zero_point|zero_points)$": "compressed-tensors'",
    r"\.(weight_scale_2|weight_scale_inv|weight_block_scale)$": "scales by block (NVFP4, MXFP8)",
}


def is_beside(name: str) -> bool:
    """Whether a tensor goes with a scaled weight and is none of the model: its scale, a scale of inputs, a marker."""
    return name.endswith(_SCALES) or _BESIDE.search(name) is not None


def scale_names(names: Collection[str]) -> dict[str, str]:
    """Name of a weight -> that of its scale, of those that have one."""
    return {
        weight: name
        for name in names
        for suffix in _SCALES
        if name.endswith(suffix) and (weight := name.removesuffix(suffix) + _WEIGHT) in names
    }


def unscaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors as the model has them: scaled weights multiplied out in float32, what goes with them left out."""
    scales = scale_names(tensors.keys())
    return {
        name: times_scale(value, tensors[scales[name]]) if name in scales else value
        for name, value in tensors.items()
        if not is_beside(name)
    }


def times_scale(stored: Tensor, scale: Tensor) -> Tensor:
    """The weight that `stored` [out, ...] and a scale of one value, or of one for each output, mean; float32."""
    return stored.float() * scale.float().reshape(-1, *(1 for _ in stored.shape[1:]))


def check_number_formats(files: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> None:
    """Raise UserError where weights of a base lie in safetensors files in a form that is not read, by its name.

    prefixes: what the names of the base's tensors begin with.
    """
    for path in files:
        entries = {name: entry for name, entry in read_entries(path).items() if name.startswith(prefixes)}
        for name, layout in _problems(entries):
            raise UserError(
                f"{path} is quantised in a form that is not read here: {layout} (first: {name}). Take the model in float16 or "
                "bfloat16, or save it so with the program that wrote it."
            )


def _problems(entries: dict[str, Entry]) -> Iterator[tuple[str, str]]:
    """(name of a tensor, what it is of)"""
    for mark, layout in _OTHERS.items():
        yield from ((name, layout) for name in entries if re.search(mark, name))
    scales = scale_names(entries.keys())
    for name, scale in scales.items():
        weight, by = entries[name], entries[scale]
        of_output = by.shape[:1] == weight.shape[:1] and math.prod(by.shape[1:]) == 1
        if by.dtype not in _PLAIN or not (of_output or math.prod(by.shape) == 1):
            yield scale, f"scales by block, {by.dtype} {list(by.shape)} for a weight {list(weight.shape)}"
        elif weight.dtype not in (*_STORED, *_PLAIN):
            yield name, f"weights packed as {weight.dtype} with a scale"
    for name, entry in entries.items():
        if name.endswith((_WEIGHT, ".bias")) and entry.dtype not in _FLOATING and name not in scales:
            yield name, f"{entry.dtype} without a scale that is known"
