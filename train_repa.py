"""U-REPA training of SD1.5: LoRA and AlignHeads in a frozen U-Net, supervised by cached DINOv2 tokens.

    accelerate launch train_repa.py --dataset_config trackA.toml

Missing caches are built first. To resume, run the same command again.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, script
from library.launch import start_cpu_processes
from library.options.parser import flatten, parse
from library.options.repa import TrainRepaOptions

if TYPE_CHECKING:
    from library.caching.prepare import Caches
    from library.processes import Processes
    from library.training.loop import Run


@script
def main(argv: list[str]) -> int:
    options = parse(TrainRepaOptions, argv, prog="train_repa.py", description=__doc__, default_config="demo.toml")
    if options.config.dry_run:
        from library.training.forecast import print_plan

        print_plan(options)
        return EXIT_OK
    start_cpu_processes(__file__, argv)
    with ExitStack() as context:
        return run(options, context)


def run(options: TrainRepaOptions, context: ExitStack) -> int:
    from library.processes import Processes
    from library.training.adapters import export_adapters
    from library.training.checkpoints import state_to_resume
    from library.training.loop import train
    from library.training.output import open_log, own_output
    from library.training.plan import make_plan
    from library.training.preflight import preflight
    from library.training.repa_run import build_run
    from library.training.speed import check_attention, prepare_environment
    from library.training.start import check_repa_start

    # What is wrong with the options or the machine is said before hours of caching.
    prepare_environment(options.speed)
    check_attention(options.speed)
    processes = Processes(options.model.device)
    check_repa_start(options, processes)
    state, facts = state_to_resume(options.output, flatten(options), processes.world_size)
    caches = prepare(options, processes)
    plan = make_plan(len(caches.train.samples), options.training, options.optimizer, processes.world_size)
    if state is not None and facts["step"] >= plan.last_step:
        if processes.is_main:
            export_adapters(state, options, plan, missing_only=True)
        processes.say(f"{state} is the end of this run ({plan.last_step} steps). Nothing is left to do.")
        return EXIT_OK
    processes.say(
        f"{plan.samples} samples, {plan.steps_per_epoch} steps per epoch, {plan.last_step} steps, batch {plan.batch_size} x "
        f"{plan.accumulation} accumulated x {plan.world_size} processes on {processes.device}"
    )
    run_, task = build_run(options, processes, caches, plan, context)
    if processes.is_main:
        context.enter_context(own_output(options.output.output_dir))
    step = run_.checkpoints.resume(state)
    if state is not None:
        processes.say(f"resuming from {state} at step {step}")
    references = preflight(run_, task, processes.say)
    if processes.is_main:
        run_.log = open_log(options.output.output_dir, options.output.log_dir, flatten(options), step, references)
    train(run_, step)
    if processes.is_main:
        assert run_.checkpoints.newest is not None
        finish(run_, options, export_adapters(run_.checkpoints.newest, options, plan))
    return EXIT_OK


def prepare(options: TrainRepaOptions, processes: Processes) -> Caches:
    """Caches of the run's pictures, complete."""
    from library.caching.picture_sets import open_pictures
    from library.caching.prepare import Preparation

    with processes.main_first():
        pictures = open_pictures(options.data)
    workers = options.speed.max_data_loader_n_workers
    preparation = Preparation(
        options.model, options.data, options.cache, processes, workers=workers, tokens=options.alignment.alignment
    )
    return preparation.prepare(pictures, rebuild=False, say=processes.say)


def finish(run: Run, options: TrainRepaOptions, adapters: list[Path]) -> None:
    """Say what there is."""
    if run.log is not None:
        run.log.close()
    folder = options.output.output_dir
    print(f"adapter      {adapters[0]}")
    for file in adapters[1:]:
        print(f"  averaged   {file}")
    print(f"states       {folder}")
    print(f"metrics      {folder / 'metrics.jsonl'}; tensorboard --logdir {options.output.log_dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
