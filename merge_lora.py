"""Fold a LoRA into its base model and write a diffusers folder.

    python merge_lora.py --model outputs/demo/demo.safetensors --output_dir outputs/demo/merged
    python merge_lora.py --model outputs/demo/step_000150 --use_ema --output_dir outputs/demo/averaged

Without --pretrained_model_name_or_path the base is the one the adapter was trained on, as its files name it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.errors import EXIT_OK, script
from library.options.checks import positive, require
from library.options.parser import parse

if TYPE_CHECKING:
    from library.merging.diffusers_folder import MergeReport
    from library.merging.source import Source
    from library.models.locate import BaseLocation

DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class MergeLoraOptions:
    model: Path
    """What to merge: a LoRA .safetensors file (kohya's, PEFT's or diffusers' format) or a training state's folder."""
    output_dir: Path
    """Diffusers folder to write."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, a hub id, one .safetensors file, or tiny-sd15. Default: the one the adapter names."""
    use_ema: bool = False
    """Merge the moving average of a training state's weights instead of the weights themselves."""
    ratio: float = 1.0
    """Strength of the adapter: 1 is as trained, 0 gives the base."""
    save_precision: Literal["float", "fp16", "bf16"] | None = None
    """Number format of the merged weights. Default: that of the base. Untouched components keep their own."""
    network_alpha: float | None = None
    """Alpha of a PEFT file that does not say it."""
    overwrite: bool = False
    """Replace an earlier merge in output_dir."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        require(-10 <= self.ratio <= 10, "ratio", f"must lie between -10 and 10, got {self.ratio}.")
        positive("network_alpha", self.network_alpha)
        require(self.model.exists(), "model", f"{self.model} does not exist.")


@script
def main(argv: list[str]) -> int:
    options = parse(MergeLoraOptions, argv, prog="merge_lora.py", description=__doc__)
    source, base_name = build(options)
    print_plan(options, source, base_name)
    if not options.dry_run:
        run(options, source, base_name)
    return EXIT_OK


def build(options: MergeLoraOptions) -> tuple[Source, str]:
    """The adapter, read and checked, and the name of its base."""
    from library.merging.source import base_model_of, read_source

    source = read_source(options.model, use_ema=options.use_ema, network_alpha=options.network_alpha)
    return source, base_model_of(source, options.pretrained_model_name_or_path)


def print_plan(options: MergeLoraOptions, source: Source, base_name: str) -> None:
    named_in = f" (named in {source.named_in})"
    if options.pretrained_model_name_or_path is not None:
        trained_on = source.base_model
        named_in = f" (the adapter was trained on {trained_on})" if trained_on not in (None, base_name) else ""
    print(f"adapter    {source.describe()}")
    if source.adapter.left_out:
        print(f"           left out: {len(source.adapter.left_out)} tensors of AlignHeads, which only training needs")
    print(f"base       {base_name}{named_in}")
    print(f"ratio      {options.ratio:g}")
    print(f"precision  {options.save_precision or 'as the base'}")
    print(f"output     {options.output_dir}{' (replacing what is there)' if options.output_dir.exists() else ''}")


def run(options: MergeLoraOptions, source: Source, base_name: str) -> None:
    import torch

    from library.merging.diffusers_folder import check_output, write_merged_folder
    from library.models.locate import locate_base

    # Before anything is fetched: what would be refused anyway.
    check_output(options.output_dir, [options.model], overwrite=options.overwrite)
    base: BaseLocation = locate_base(base_name)
    if base.note:
        print(base.note)
    check_output(options.output_dir, [base.path], overwrite=options.overwrite)
    report = write_merged_folder(
        base,
        source.adapter,
        options.output_dir,
        ratio=options.ratio,
        dtype=None if options.save_precision is None else getattr(torch, DTYPES[options.save_precision]),
        overwrite=options.overwrite,
    )
    print_report(report, options.output_dir)


def print_report(report: MergeReport, output: Path) -> None:
    from library.files import human_bytes

    print()
    print(f"{'component':<14}{'keys before':>12}{'after':>8}{'merged':>8}   largest relative change")
    for part in report.components:
        change = "copied as it is" if part.copied else "nothing to merge"
        if part.largest is not None:
            change = f"{part.largest.relative:.2e}  {part.largest.key}"
        print(f"{part.component:<14}{part.keys_before:>12}{part.keys_after:>8}{len(part.changes):>8}   {change}")
    if all(change.relative == 0 for part in report.components for change in part.changes):
        print("Nothing has changed: the adapter is zero (was it trained?) or the ratio is.")
    if report.absent:
        print(f"Without {', '.join(report.absent)}, which the base names but does not hold here.")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"Wrote {output} ({human_bytes(size)}).")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
