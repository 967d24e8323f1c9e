r"""Look at a data set before it is trained on: pictures, crops and captions as the training takes them, with what to mend.

    python doctor.py --dataset_config my.toml --pretrained_model_name_or_path sd_xl_base_1.0.safetensors
    python doctor.py data/mio --trigger mio
    python doctor.py --train_data data/imagenet/train --class_names dataset_configs/imagenet_classes.json --deep \
        --dino_model facebook/dinov2-large

It writes one page, outputs/doctor.html, and its findings as .json. The exit code is 1 where something spoils the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from library.doctor.run import look
from library.errors import UserError, script
from library.options.doctor import parse_doctor_options


@script
def main(argv: list[str]) -> int:
    options, doctor = parse_doctor_options(with_option(argv), prog="doctor.py", description=__doc__)
    return look(options, doctor)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
