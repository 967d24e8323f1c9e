"""What is in an adapter: sizes, strength by block, the file's own words; as a table and as data. Needs no base model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from library.merging.strength import BASE, BLOCKS, block_of
from library.words import plural
from networks.adapter_module import AdapterModule
from networks.adapters import Adapter
from networks.names import COMPONENTS, UNET, Target

WIDTH = 100
"""Columns of the table."""
LARGEST = 5
"""Modules that the table names."""

# Entries of kohya's and ModelSpec's metadata that a reader asks for first, in this order; any others are counted.
_KNOWN = (
    *("modelspec.title", "modelspec.author", "modelspec.description", "modelspec.trigger_phrase", "modelspec.license"),
    *("modelspec.architecture", "modelspec.resolution", "modelspec.date", "modelspec.merged_from"),
    *("modelspec.prediction_type", "modelspec.usage_hint", "modelspec.tags"),
    *("ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_new_sd_model_hash", "ss_vae_name"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_dropout"),
    *("ss_steps", "ss_max_train_steps", "ss_epoch", "ss_num_epochs", "ss_num_train_images", "ss_num_reg_images"),
    *("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_lr_scheduler", "ss_optimizer", "ss_seed"),
    *("ss_total_batch_size", "ss_resolution", "ss_clip_skip", "ss_mixed_precision", "ss_noise_offset"),
    *("ss_min_snr_gamma", "ss_zero_terminal_snr", "ss_training_comment", "ss_tag_frequency", "ss_dataset_dirs"),
    *("sshs_model_hash", "repa_base_model"),
)


@dataclass(frozen=True)
class ModuleFacts:
    target: Target
    block: str
    """IN00 to IN11, MID, OUT00 to OUT11; BASE for text encoders and what lies outside the lists of blocks."""
    kind: str
    """As AdapterModule.label says."""
    rank: int
    alpha: float
    scale: float | None
    """alpha / rank; None for kinds of which these are something else."""
    dtype: str
    norm: float | None
    """Frobenius norm of what it adds, of DoRA before its magnitude; None where that depends on the weight."""


@dataclass(frozen=True)
class Inspection:
    family: str
    modules: tuple[ModuleFacts, ...]
    notes: tuple[str, ...]
    """What the numbers leave out, by kind; and what the file leaves out or open."""
    left_out: tuple[str, ...]
    metadata: dict[str, str]

    def by_block(self) -> dict[tuple[str, str], list[ModuleFacts]]:
        """(component, block) -> its modules, from the input to the output."""
        order = [(component, block) for component in COMPONENTS for block in BLOCKS]
        groups = {place: [m for m in self.modules if (m.target.component, m.block) == place] for place in order}
        return {place: modules for place, modules in groups.items() if modules}

    def largest(self, count: int = LARGEST) -> list[ModuleFacts]:
        return sorted((m for m in self.modules if m.norm is not None), key=lambda module: -(module.norm or 0))[:count]

    def as_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "modules": [
                {
                    "component": module.target.component,
                    "path": module.target.path,
                    "block": module.block,
                    "kind": module.kind,
                    "rank": module.rank,
                    "alpha": module.alpha,
                    "scale": module.scale,
                    "dtype": module.dtype,
                    "norm": module.norm,
                }
                for module in self.modules
            ],
            "blocks": [
                {"component": component, "block": block, "modules": len(modules), "norm": norm_of(modules)}
                for (component, block), modules in self.by_block().items()
            ],
            "norm": norm_of(self.modules),
            "left_out": list(self.left_out),
            "metadata": self.metadata,
        }


def inspect(adapter: Adapter) -> Inspection:
    """The facts about every module of an adapter, and what its file says. Norms come from the factors."""
    modules = [
        ModuleFacts(
            target,
            block_of(target),
            module.label,
            module.rank,
            module.alpha,
            module.scale,
            _dtype(module),
            module.norm(),
        )
        for target, module in adapter.modules.items()
    ]
    kinds = {module.kind for module in adapter.modules.values()}
    notes = [*sorted(f"{kind.title}: {kind.note}" for kind in kinds if kind.note), *adapter.notes]
    known = adapter.known_family
    family = "SD1.5 or SDXL, which its file does not tell" if known is None else known.title
    return Inspection(family, tuple(modules), tuple(notes), adapter.left_out, dict(adapter.metadata))


def describe(adapter: Adapter, path: Path) -> str:
    """`inspect` as plain text of at most `WIDTH` columns."""
    found = inspect(adapter)
    lines = [
        str(path),
        f"{found.family}, {plural(len(found.modules), 'module')}: {_counted(module.kind for module in found.modules)}",
        "",
        *_blocks(found),
        "",
        "norm: Frobenius norm of what it adds (LoRA: alpha / rank * up @ down), over all modules of the row",
        *_warnings(found),
        "",
        *_largest(found),
        *_metadata(found.metadata),
    ]
    return "\n".join(lines)


def norm_of(modules: Iterable[ModuleFacts]) -> float | None:
    """Frobenius norm over several modules; None where it is unknown of one."""
    norms = [module.norm for module in modules]
    return None if None in norms else math.hypot(*(norm or 0 for norm in norms))


def _dtype(module: AdapterModule) -> str:
    first = next(iter(vars(module).values()))  # a tensor, or the factors of one
    tensor: Tensor = first[0] if isinstance(first, tuple) else first
    return str(tensor.dtype).removeprefix("torch.")


def _blocks(found: Inspection) -> list[str]:
    head = ("component", "block", "modules", "kind", "rank", "alpha", "scale", "dtype", "norm")
    rows: list[tuple[str, ...]] = [head]
    for (component, block), modules in found.by_block().items():
        shown = block if block != BASE or component == UNET else "all"
        rows.append((component, shown, *_cells(modules)))
    rows.append(("all", "", *_cells(found.modules)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [name in ("modules", "norm") for name in head]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        for row in rows
    ]


def _cells(modules: Sequence[ModuleFacts]) -> tuple[str, ...]:
    return (
        str(len(modules)),
        "+".join(sorted({module.kind for module in modules}, reverse=True)),
        _span(module.rank for module in modules),
        _span(module.alpha for module in modules),
        _span(module.scale for module in modules if module.scale is not None),
        "+".join(sorted({module.dtype for module in modules})),
        _number(norm_of(modules)),
    )


def _warnings(found: Inspection) -> list[str]:
    lines = [line for note in found.notes for line in textwrap.wrap(note, WIDTH)]
    if found.modules and all(module.norm == 0 for module in found.modules):
        lines.append("Every module is zero: the adapter does nothing.")
    if found.left_out:
        lines.append(_cut(f"Keys that are no part of the adapter: {len(found.left_out)} (first: {found.left_out[0]})."))
    return lines


def _largest(found: Inspection) -> list[str]:
    lines = [_cut(f"  {_number(m.norm):>9}  {m.target.component} {m.target.path}") for m in found.largest()]
    return ["largest modules", *lines, ""] if lines else []


def _metadata(metadata: Mapping[str, str]) -> list[str]:
    if not metadata:
        return ["no metadata"]
    known = [key for key in _KNOWN if key in metadata]
    width = max(map(len, known), default=0)
    lines = ["metadata", *(_cut(f"  {key:<{width}}  {' '.join(metadata[key].split())}") for key in known)]
    if others := len(metadata) - len(known):
        lines.append(f"  and {plural(others, 'other entry', 'other entries')}")
    return lines


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def _number(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.3g}"


def _counted(kinds: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _span(values: Iterable[float]) -> str:
    """ "8" or "4-16", and "-" for none at all"""
    numbers = list(values)
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"
