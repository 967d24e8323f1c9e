r"""LoRA training for SD1.5 and SDXL, with kohya's options, TOML files and adapter files.

    python train_network.py --dataset_config my.toml --output_dir outputs/mine --output_name mine \
        --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --network_dim 32 --max_train_epochs 10

Missing caches are built first. To resume, run the same command again (with --save_state, or after an interruption).
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from library.errors import EXIT_OK, script
from library.launch import start_cpu_processes
from library.options.network import parse_network_options, write_config
from library.training.inputs import begin_hashing, check_inputs


@script
def main(argv: list[str]) -> int:
    options = parse_network_options(argv, prog="train_network.py", description=__doc__)
    if options.config.output_config:
        print(f"Wrote {write_config(options)}.")
        return EXIT_OK
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
