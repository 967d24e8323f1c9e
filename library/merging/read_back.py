"""Reads a merged model back and compares it with what it must be, tensor by tensor.

Nothing of the run that wrote it is trusted: what is expected is worked out again from the base and the adapters.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from library.merging.layouts import Merging
from library.merging.merge import fold
from library.models.checkpoint import LEFTOVERS, Checkpoint, StoredTensor
from library.models.tensor_files import Range
from library.models.threads import in_threads
from networks.families import UNET
from networks.finite import all_finite

# Of the U-Net, each of these must be there at least once (the conversion report's list).
_CRITICAL = (
    r"conv_in\.weight",
    r"down_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_q\.weight",
    r"mid_block\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_q\.weight",
    r"up_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_q\.weight",
    r"conv_out\.weight",
)
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Check:
    """One thing that was looked at in one written model."""

    name: str
    passed: bool
    found: str


def verify(
    merging: Merging, written: Checkpoint, names: Iterable[str], where: str, source: str = "the base"
) -> list[Check]:
    """Compare a written model with what it was made of.

    names: the tensors' names as they stand in the files. where: which of the outputs this is, source: what it was made of,
    for the wording.
    """
    findings = _compare_all(merging, written)
    checks = [
        _keys(merging.base, written, source),
        _leftovers(names),
        _critical(written),
        Check("untouched tensors", not findings.altered, _listed(findings.altered, _kept(findings, merging, source))),
    ]
    if any(merging.folds.values()):
        found = f"{findings.merged} as recomputed; largest difference before rounding {findings.largest:.2e}"
        checks.append(Check("merged layers", not findings.wrong, _listed(findings.wrong, found)))
    finite = _listed(findings.not_finite, "every value") + (
        f", as in {source}, which is damaged" if findings.damaged else ""
    )
    checks.append(Check("finite", not findings.not_finite, finite))
    return [Check(f"{where}: {check.name}", check.passed, check.found) for check in checks]


@dataclass
class _Findings:
    kept: int
    cast: int
    """Of the kept ones: those whose number format has changed."""
    merged: int
    largest: float
    """max |W'_file - W'_recomputed| over all merged layers, the recomputed one in float32."""
    altered: list[str]
    wrong: list[str]
    not_finite: list[str]
    damaged: bool = False
    """Whether those of `not_finite` are so in the base."""


def _compare_all(merging: Merging, written: Checkpoint) -> _Findings:
    findings = _Findings(0, 0, 0, 0.0, [], [], [])
    tensors = [
        (component, key, after)
        for component, named in merging.base.tensors.items()
        for key in named
        if (after := written.tensors.get(component, {}).get(key)) is not None  # the check of keys names the others
    ]
    compared = in_threads(lambda tensor: _compare(merging, *tensor), tensors)
    for (component, key, _), (equal, finite, difference) in zip(tensors, compared, strict=True):
        is_merged = key in merging.folds.get(component, {})
        if equal:
            findings.merged += is_merged
            findings.kept += not is_merged
            findings.cast += not is_merged and not merging.is_kept(component, key)
        else:
            (findings.wrong if is_merged else findings.altered).append(key)
        findings.largest = max(findings.largest, difference)
        findings.not_finite += [] if finite else [key]
        findings.damaged = findings.damaged or (not finite and equal and not is_merged)
    return findings


def _compare(merging: Merging, component: str, key: str, after: StoredTensor) -> tuple[bool, bool, float]:
    """(as it must be, finite, largest difference before rounding)"""
    if merging.is_kept(component, key):
        return *_same_values(merging.base.tensors[component][key], after), 0.0
    return _recomputed(merging, component, key, after)


def _recomputed(merging: Merging, component: str, key: str, after: StoredTensor) -> tuple[bool, bool, float]:
    """(equal to the bit, finite, largest difference before rounding) of a tensor that was merged or cast."""
    before, dtype = merging.base.tensors[component][key], merging.dtype_of(component, key)
    if after.shape != before.shape or after.dtype != dtype:
        return False, all_finite(after.read()), float("inf")
    rounded = merging.rounding.of(f"{component} {key}")
    equal, finite, difference = True, True, 0.0
    for rows, parts in merging.in_rows(component, key, lies_in_rows=after.lies_in_rows):
        weight, found = before.read_rows(rows), after.read_rows(rows)
        if parts:
            expected = fold(weight, parts)
            difference = max(difference, float((found.float() - expected).abs().max()))
            equal = equal and _same_bits(found, rounded(expected, dtype))
        else:  # integers too, or numbers too narrow for a sum
            equal = equal and _same_bits(found, weight.to(dtype))
        finite = finite and all_finite(found)
    return equal, finite, difference


def _same_values(before: StoredTensor, after: StoredTensor) -> tuple[bool, bool]:
    """(the same bytes, all finite)"""
    if before.dtype != after.dtype or before.shape != after.shape:
        return False, all_finite(after.read())
    if before.transposed != after.transposed:
        found = after.read()
        return _same_bits(before.read(), found), all_finite(found)
    equal = finite = True
    for expected, found in zip(_blocks(before.range, "before"), _blocks(after.range, "after"), strict=True):
        equal = equal and _same_bits(expected, found)
        finite = finite and all_finite(found.view(after.dtype))
    return equal, finite


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Of two tensors of one dtype and shape; several times as fast as torch.equal, which goes value by value."""
    these, those = (value.contiguous().flatten().view(torch.uint8) for value in (one, other))
    whole = len(these) // 8 * 8
    return torch.equal(these[:whole].view(torch.int64), those[:whole].view(torch.int64)) and torch.equal(
        these[whole:], those[whole:]
    )


_buffers = threading.local()


def _blocks(stored: Range, buffer: str) -> Iterator[Tensor]:
    """A tensor's bytes in pieces, each valid until the next: fresh memory for each costs more than the comparison."""
    whole: Tensor | None = getattr(_buffers, buffer, None)
    if whole is None:
        whole = torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
        setattr(_buffers, buffer, whole)
    for start in range(stored.start, stored.end, _BLOCK_BYTES):
        piece = whole[: min(_BLOCK_BYTES, stored.end - start)]
        stored.file.read_into(piece.numpy().data, start)
        yield piece


def _kept(findings: _Findings, merging: Merging, source: str) -> str:
    rounded = f", {findings.cast} of them rounded to {merging.describe_dtype()}" if findings.cast else ""
    return f"{findings.kept} equal to {source}'s{rounded}"


def _keys(base: Checkpoint, written: Checkpoint, source: str) -> Check:
    expected = {(part, key): stored.shape for part, named in base.tensors.items() for key, stored in named.items()}
    found = {(part, key): stored.shape for part, named in written.tensors.items() for key, stored in named.items()}
    wrong = [key for (part, key), shape in expected.items() if found.get((part, key)) != shape]
    wrong += [key for part, key in found.keys() - expected.keys()]
    return Check("keys and shapes", not wrong, _listed(wrong, f"{len(expected)} as in {source}"))


def _leftovers(names: Iterable[str]) -> Check:
    left = [name for name in names if any(mark in name for mark in LEFTOVERS)]
    return Check("leftovers of training", bool(not left), _listed(left, f"no {', '.join(LEFTOVERS)}"))


def _critical(written: Checkpoint) -> Check:
    keys = written.tensors[UNET]
    missing = [pattern for pattern in _CRITICAL if not any(re.fullmatch(pattern, key) for key in keys)]
    return Check("critical layers", not missing, _listed(missing, "conv_in, attention down, mid and up, conv_out"))


def _listed(wrong: list[str], otherwise: str) -> str:
    return f"{len(wrong)} are not (first: {', '.join(wrong[:3])})" if wrong else otherwise
