"""Train Lyra: an autoencoder that fuses a base's CLIP with other text encoders, such as a T5, and decodes to CLIP's states again.

    python train_lyra.py --captions captions.txt --pretrained_model_name_or_path my_sd15 --encoders google-t5/t5-base
    python generate.py --prompt "a red square" --text_fusion outputs/lyra/lyra.safetensors

It learns from captions alone; what the encoders say of them is cached first. To resume, run the same command again.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from library.errors import EXIT_OK, script
from library.launch import start_cpu_processes
from library.options.lyra import parse_lyra_options
from library.training.lyra_inputs import check_lyra, print_plan


@script
def main(argv: list[str]) -> int:
    options = parse_lyra_options(argv, prog="train_lyra.py", description=__doc__)
    if options.config.dry_run:
        print_plan(options)
        return EXIT_OK
    check_lyra(options)
    start_cpu_processes(__file__, argv)
    from library.training.lyra_session import train_lyra

    with ExitStack() as context:
        train_lyra(options, context)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
