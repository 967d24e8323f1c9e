r"""Look at a data set before it is trained on: pictures, crops and captions as the training takes them, with what to mend.

    python doctor.py --dataset_config my.toml --pretrained_model_name_or_path sd_xl_base_1.0.safetensors
    python doctor.py data/mio --trigger mio
    python doctor.py --train_data data/imagenet/train --class_names dataset_configs/imagenet_classes.json --deep \
        --dino_model facebook/dinov2-large

It writes one page, outputs/doctor.html, and the findings as .json beside it. The exit code is 1 where something spoils the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from library.errors import EXIT_FAILED, EXIT_OK, UserError, script
from library.options.doctor import DoctorOptions, parse_doctor_options
from library.options.run import RunOptions


@script
def main(argv: list[str]) -> int:
    options, doctor = parse_doctor_options(with_option(argv), prog="doctor.py", description=__doc__)
    return run(options, doctor)


def with_option(argv: list[str]) -> list[str]:
    """A first word without dashes is a folder of pictures or of class folders, a manifest, or a dataset file."""
    from library.data.dataset_config import has_class_folders

    if not argv or argv[0].startswith("-"):
        return argv
    path = Path(argv[0])
    if path.is_dir():
        option = "--train_data" if has_class_folders(path) else "--train_data_dir"
    elif path.suffix.lower() in (".csv", ".zip"):
        option = "--train_data"
    elif path.suffix.lower() in (".toml", ".json") or path.exists():
        option = "--dataset_config"
    else:
        raise UserError(f"{path} does not exist. Give a folder of pictures, or --dataset_config and a TOML file.")
    return [option, *argv]


def run(options: RunOptions, doctor: DoctorOptions) -> int:
    """Examine, write and say; the exit code says whether a training would be spoiled."""
    from library.files import require_writable

    require_writable(doctor.page.parent)
    from library.doctor.examine import examine
    from library.doctor.findings import spoiled
    from library.doctor.page import lines, verdict, write_report

    examination = examine(options, doctor)
    beside = write_report(examination, doctor.page)
    for line in lines(examination.findings):
        print(line)
    for note in examination.notes:
        print(f"note: {note}")
    print(verdict(examination))
    print(f"page      {doctor.page}\nfindings  {beside}")
    return EXIT_FAILED if spoiled(examination.findings) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
