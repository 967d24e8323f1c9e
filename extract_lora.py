"""Take the difference of two models of one kind as a LoRA file.

    python extract_lora.py --model_org sd15.safetensors --model_tuned mine.safetensors --save_to mine_lora.safetensors --dim 32

Models are diffusers folders, original single files or hub ids, in any mixture.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, check_all, script
from library.options.checks import not_negative, positive, require
from library.options.parser import parse
from library.precision import Precision
from library.progress import doing

if TYPE_CHECKING:
    from library.merging.extract import ExtractReport
    from library.models.checkpoint import Checkpoint

PROVENANCE_KEY = "repa_extract"


@dataclass(frozen=True)
class ExtractLoraOptions:
    model_org: str
    """The model before training: a folder, a hub id, one .safetensors file, or tiny-shapes."""
    model_tuned: str
    """The model after it, of the same family."""
    save_to: Path
    """LoRA file to write, in kohya's format."""
    dim: int = 4
    """Rank of the adapters on Linear layers and 1x1 convolutions. More holds more of the difference."""
    conv_dim: int | None = None
    """Rank on 3x3 convolutions. Default: residual blocks and resamplers are left out."""
    min_diff: float = 0.01
    """A text encoder is taken only where one of its values differs by more than this."""
    device: str | None = None
    """Where to compute, as torch names it. Default: the GPU if there is one, else the CPU."""
    save_precision: Precision = "float"
    """Number format of the file."""
    overwrite: bool = False
    """Replace an earlier file."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        positive("dim", self.dim)
        positive("conv_dim", self.conv_dim)
        not_negative("min_diff", self.min_diff)
        require(self.save_to.suffix == ".safetensors", "save_to", f"must be a .safetensors file, got {self.save_to}.")

    @property
    def output(self) -> Path:
        return self.save_to.expanduser()


@script
def main(argv: list[str]) -> int:
    options = parse(ExtractLoraOptions, argv, prog="extract_lora.py", description=__doc__)
    base, tuned = build(options)
    print_plan(options, base, tuned)
    check(options, base, tuned)
    if not options.dry_run:
        run(options, base, tuned)
    return EXIT_OK


def build(options: ExtractLoraOptions) -> tuple[Checkpoint, Checkpoint]:
    """Both models, looked into but not read."""
    from library.models.locate import check_base, locate_base

    check_all(*(partial(check_base, name) for name in (options.model_org, options.model_tuned)))
    from library.merging.write import Output, check_output
    from library.models.checkpoint import open_checkpoint

    locations = [locate_base(name) for name in (options.model_org, options.model_tuned)]
    for location in locations:
        if location.note:
            print(location.note)
    output = Output(None, options.output, options.overwrite)
    check_output(output, [location.path for location in locations])
    base, tuned = (open_checkpoint(location) for location in locations)
    return base, tuned


def print_plan(options: ExtractLoraOptions, base: Checkpoint, tuned: Checkpoint) -> None:
    convolutions = "left out" if options.conv_dim is None else f"rank {options.conv_dim}"
    print(f"base       {options.model_org} ({base.family.title})")
    print(f"tuned      {options.model_tuned} ({tuned.family.title})")
    print(f"rank       {options.dim}, residual blocks and 3x3 convolutions {convolutions}")
    print(f"text       encoders where a value differs by more than {options.min_diff:g}")
    print(f"precision  {options.save_precision}")
    print(f"output     {options.output}{' (replacing what is there)' if options.output.exists() else ''}")


def check(options: ExtractLoraOptions, base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise UserError for a device that is not there, and for models that cannot be compared."""
    import torch

    from library.device import choose_device
    from library.merging.extract import comparable

    choose_device(options.device, needs=torch.float64)
    comparable(base, tuned, convolutions=options.conv_dim is not None)


def run(options: ExtractLoraOptions, base: Checkpoint, tuned: Checkpoint) -> None:
    import torch

    from library.device import choose_device, named_dtype
    from library.hashes import Hashes
    from library.merging.extract import extract
    from library.merging.lora_file import write_adapter

    device = choose_device(options.device, needs=torch.float64)
    hashes = Hashes([*base.files(), *tuned.files()])
    hashes.start()
    with doing("extracting layer") as activity:

        def show(number: int, total: int) -> None:
            activity.done, activity.total = number, total

        adapter, report = extract(
            base,
            tuned,
            rank=options.dim,
            conv_rank=options.conv_dim,
            min_diff=options.min_diff,
            device=device,
            progress=show,
        )
    metadata = provenance(options, base, tuned, report, hashes.all())
    adapter = replace(adapter, metadata={**adapter.metadata, **metadata})
    said = write_adapter(adapter, options.output, dtype=named_dtype(options.save_precision))
    print(f"\n{report.as_text()}\n\n{said}")


def provenance(
    options: ExtractLoraOptions, base: Checkpoint, tuned: Checkpoint, report: ExtractReport, hashes: dict[str, str]
) -> dict[str, str]:
    """What the file says of where it comes from."""
    from library import project_version
    from library.files import public_name

    models = {
        role: {"name": public_name(name), "sha256": {path.name: hashes[str(path)] for path in model.files()}}
        for role, name, model in (("base", options.model_org, base), ("tuned", options.model_tuned, tuned))
    }
    record = {"version": project_version(), **models, "min_diff": options.min_diff, "kept": round(report.share, 4)}
    return {"ss_sd_model_name": public_name(options.model_org), PROVENANCE_KEY: json.dumps(record)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
