"""U-REPA training of SD1.5: LoRA and AlignHeads in a frozen U-Net, supervised by cached DINOv2 tokens.

    accelerate launch train_repa.py --dataset_config trackA.toml

Missing caches are built first. To resume, run the same command again.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
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
    from library.training.checkpoints import remove_leftovers, state_to_resume
    from library.training.loop import train
    from library.training.plan import make_plan
    from library.training.preflight import preflight
    from library.training.repa_run import build_run

    processes = Processes(options.model.device)
    state, facts = state_to_resume(options.output, flatten(options), processes.world_size)
    caches = prepare(options, processes)
    plan = make_plan(len(caches.train.samples), options.training, options.optimizer, processes.world_size)
    if state is not None and facts["step"] >= plan.last_step:
        processes.say(f"{state} is the end of this run ({plan.last_step} steps). Nothing is left to do.")
        return EXIT_OK
    processes.say(
        f"{plan.samples} samples, {plan.steps_per_epoch} steps per epoch, {plan.last_step} steps, batch {plan.batch_size} x "
        f"{plan.accumulation} accumulated x {plan.world_size} processes on {processes.device}"
    )
    run_, task = build_run(options, processes, caches, plan, context)
    remove_leftovers(options.output.output_dir)
    step = run_.checkpoints.resume(state)
    if state is not None:
        processes.say(f"resuming from {state} at step {step}")
    open_log(run_, options, step, preflight(run_, task, processes.say))
    train(run_, step)
    if processes.is_main:
        finish(run_, options, task.objective.schedule.prediction_type)
    return EXIT_OK


def prepare(options: TrainRepaOptions, processes: Processes) -> Caches:
    """Caches of the run's pictures, complete."""
    from library.caching.prepare import Preparation, open_pictures

    with processes.main_first():
        pictures = open_pictures(options.data)
    workers = options.speed.max_data_loader_n_workers
    preparation = Preparation(
        options.model, options.data, options.cache, processes, workers=workers, tokens=options.alignment.alignment
    )
    return preparation.prepare(pictures, rebuild=False, say=processes.say)


def open_log(run: Run, options: TrainRepaOptions, step: int, references: dict[str, float]) -> None:
    """Metrics of the main process, headed by the resolved options and the reference values."""
    import toml

    from library.files import write_text
    from library.training.tracking import MetricLog

    if not run.processes.is_main:
        return
    folder = options.output.output_dir
    resolved = toml.dumps({name: value for name, value in flatten(options).items() if value is not None})
    write_text(folder / "options.toml", resolved)
    run.log = MetricLog(folder / "metrics.jsonl", options.output.log_dir, step)
    run.log.text("options", f"```\n{resolved}```")
    run.log.add(step, references)


def finish(run: Run, options: TrainRepaOptions, prediction_type: str) -> None:
    """Write the adapter files that other programs read, and say what there is."""
    from library.training.adapters import export_adapters

    files = export_adapters(run.trained, options, run.plan, prediction_type)
    if run.log is not None:
        run.log.close()
    folder = options.output.output_dir
    print(f"adapter      {files[0]}")
    for file in files[1:]:
        print(f"  averaged   {file}")
    print(f"states       {folder}")
    print(f"metrics      {folder / 'metrics.jsonl'}; tensorboard --logdir {options.output.log_dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
