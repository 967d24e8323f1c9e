"""U-REPA training of SD1.5 and SDXL: adapters and AlignHeads in a frozen U-Net, supervised by cached DINOv2 tokens.

    python train_repa.py --dataset_config trackA.toml

Missing caches are built first. To resume, run the same command again.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from library.errors import EXIT_OK, script
from library.launch import start_cpu_processes
from library.options.repa import parse_repa_options
from library.training.inputs import begin_hashing, check_inputs


@script
def main(argv: list[str]) -> int:
    options = parse_repa_options(argv, prog="train_repa.py", description=__doc__)
    if options.config.dry_run:
        from library.doctor.run import report_before
        from library.training.forecast import print_plan

        print_plan(options)
        return report_before(options) if options.config.report else EXIT_OK
    check_inputs(options)
    if options.flow.show_timesteps:
        from library.training.show_timesteps import show_timesteps

        show_timesteps(options)
        return EXIT_OK
    start_cpu_processes(__file__, argv)
    begin_hashing(options)
    from library.training.session import run_training

    with ExitStack() as context:
        run_training(options, context)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
