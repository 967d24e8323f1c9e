"""Make a model of a U-Net that a trainer saved alone, as Lune's {"student": ...} in a .pt file, with the rest of a base.

    python tools/student_to_model.py lune.pt --base sd15 --output_dir lune --flow_shift 2

The folder draws with diffusers and generate.py; --save_single_file adds a file for ComfyUI. Without --flow_shift the U-Net predicts
what the base's files say. Pickles are read by their tensors alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import EXIT_OK, script
from library.options.checks import positive


@script
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="a .pt, .ckpt or .safetensors file with diffusers' names")
    parser.add_argument(
        "--base", default="tiny-shapes", help="where text encoders, autoencoder and configurations are from"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--save_single_file", action="store_true")
    parser.add_argument("--flow_shift", type=float, help="the U-Net is a rectified flow; the shift it was trained with")
    options = parser.parse_args(argv)
    positive("flow_shift", options.flow_shift)

    from library.merging.layouts import Merging
    from library.merging.rounding import Rounding
    from library.merging.student import with_student
    from library.merging.write import SINGLE_FILE, Output, check_output, write_merged
    from library.models.checkpoint import open_checkpoint
    from library.models.locate import locate_base
    from networks.prediction_names import FLOW_NAME

    output = Output(options.output_dir, options.output_dir / SINGLE_FILE if options.save_single_file else None, False)
    check_output(output, [options.student])
    base = with_student(open_checkpoint(locate_base(options.base)), options.student)
    if options.flow_shift is not None:
        base = replace(base, prediction=FLOW_NAME, flow_shift=options.flow_shift)
    report = write_merged(Merging(base, {}, None, Rounding(False, 0)), [], output)
    print(
        f"Wrote {output.path}: the U-Net of {options.student}, the rest of {options.base}; {len(report.checks)} checks passed."
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
