"""LoRA training for SD1.5 and SDXL, with kohya's options, TOML files and adapter files.

    accelerate launch train_network.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --dataset_config my.toml \
        --output_dir outputs/mine --output_name mine --network_dim 32 --max_train_epochs 10

Missing caches are built first. To resume, run the same command again (with --save_state, or after an interruption).
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import EXIT_OK, UserError, script
from library.launch import start_cpu_processes
from library.options.network import TrainNetworkOptions, parse_network_options, write_config
from library.options.parser import flatten

if TYPE_CHECKING:
    from library.data.network_data import NetworkData
    from library.models.locate import BaseLocation
    from library.processes import Processes
    from library.training.network_run import Prepared
    from library.training.plan import Plan
    from networks.original_names import Family


@script
def main(argv: list[str]) -> int:
    options = parse_network_options(argv, prog="train_network.py", description=__doc__)
    if options.config.output_config:
        print(f"Wrote {write_config(options)}.")
        return EXIT_OK
    if options.config.dry_run:
        from library.training.network_forecast import print_plan

        print_plan(options)
        return EXIT_OK
    start_cpu_processes(__file__, argv)
    with ExitStack() as context:
        return run(options, context)


def run(options: TrainNetworkOptions, context: ExitStack) -> int:
    from library.processes import Processes
    from library.training.checkpoints import state_to_resume
    from library.training.loop import train
    from library.training.network_checkpoints import HARMLESS_HERE, is_early_end, network_states
    from library.training.network_preflight import preflight
    from library.training.network_run import build_run, make_order, make_plan
    from library.training.output import open_log, own_output
    from library.training.samples import Sampler
    from library.training.speed import with_usable_attention
    from library.training.start import check_network_start

    # What is wrong with the options or the machine is said before hours of caching.
    processes = Processes(options.model.device)
    options = replace(options, speed=with_usable_attention(options.speed, processes.say))
    base, family = check_network_start(options, processes)
    output = options.output
    states = network_states(output.output_dir, output.output_name)
    state, facts = state_to_resume(output, flatten(options), processes.world_size, states, HARMLESS_HERE)
    data = collect_data(options, base, processes)
    order = make_order(data, options, processes.rank, processes.world_size)
    plan = make_plan(data, order, options)
    first = begin(options, plan)
    ended = state is not None and (facts["step"] >= plan.last_step or is_early_end(facts, plan))
    if ended and (output.output_dir / f"{output.output_name}.safetensors").exists():
        processes.say(f"{state} is the end of this run (step {facts['step']}). Nothing is left to do.")
        return EXIT_OK
    prepared = prepare(options, processes, base, family, data)
    context.callback(prepared.close)
    data = prepared.data
    order = make_order(data, options, processes.rank, processes.world_size)  # unreadable pictures have gone
    plan = make_plan(data, order, options)
    processes.say(
        f"{order.samples_per_epoch} samples an epoch, {plan.steps_per_epoch} steps per epoch, {plan.last_step} steps, up to batch "
        f"{plan.batch_size} x {plan.accumulation} accumulated x {plan.world_size} processes on {processes.device}"
    )
    board = log_folder(options, facts)
    run_, task = build_run(options, processes, prepared, order, plan, board, context)
    if processes.is_main:
        context.enter_context(own_output(output.output_dir))
    step = first if state is None else run_.checkpoints.resume(state)
    if ended:
        run_.checkpoints.save(step, finished=True)  # the adapter was lost after the last state
        return EXIT_OK
    if step:
        processes.say(f"resuming from {state} at step {step}" if state else f"beginning with step {step}")
    references = preflight(run_, task, processes.say)
    if processes.is_main:
        run_.log = open_log(output.output_dir, board, flatten(options), step, references)
    if options.samples.sample_prompts is not None:
        run_.look = Sampler(options, prepared, run_, task, step, resumed=state is not None)
    train(run_, step)
    if processes.is_main and run_.log is not None:
        run_.log.close()
        print(f"adapter      {output.output_dir / output.output_name}.safetensors")
        print(f"metrics      {output.output_dir / 'metrics.jsonl'}; tensorboard --logdir {output.log_dir}")
    return EXIT_OK


def collect_data(options: TrainNetworkOptions, base: BaseLocation, processes: Processes) -> NetworkData:
    """The pictures, in buckets, with a table of them and of what was left out."""
    from library.training.network_plan import collect_pictures, print_data

    with processes.main_first():
        data = collect_pictures(options, base)
    if processes.is_main:
        print_data(data)
    return data


def prepare(
    options: TrainNetworkOptions, processes: Processes, base: BaseLocation, family: Family, data: NetworkData
) -> Prepared:
    """Caches of the run, complete."""
    from library.training.network_prepare import prepare_caches

    return prepare_caches(options, processes, base, family, data)


def begin(options: TrainNetworkOptions, plan: Plan) -> int:
    """The step that a run without a state begins with. Raises UserError where none is left then."""
    training = options.training
    step = training.initial_step or 0
    if training.initial_epoch is not None:
        step = (training.initial_epoch - 1) * plan.steps_per_epoch
    if step >= plan.last_step:
        name, value = ("initial_step", step) if training.initial_step else ("initial_epoch", training.initial_epoch)
        raise UserError(f"{name} {value} leaves nothing to train: the run has {plan.last_step} steps.")
    return step


def log_folder(options: TrainNetworkOptions, facts: dict[str, Any]) -> Path:
    """{logging_dir}/{prefix}{time}/network_train, as kohya has it; a resumed run goes on in its own."""
    if "log_folder" in facts:
        return Path(facts["log_folder"])
    logging = options.logging
    inner = logging.log_tracker_name or "network_train"
    return options.output.log_dir / f"{logging.log_prefix or ''}{datetime.now():%Y%m%d%H%M%S}" / inner


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
