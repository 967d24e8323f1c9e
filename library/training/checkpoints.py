"""Which states a run keeps, and from which it goes on."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.training import OutputOptions
from library.processes import Processes
from library.training.plan import Plan
from library.training.state import (
    Trained,
    changed_options,
    list_states,
    load_state,
    prune_states,
    read_facts,
    save_state,
    state_name,
)

# Options that a resumed run may change without becoming another run.
HARMLESS = frozenset(
    """
    dataset_config dry_run device sdpa xformers gradient_checkpointing compile channels_last deterministic
    max_data_loader_n_workers cache_dir train_latents train_tokens val_latents val_tokens text_embeddings cache_batch_size
    val_data max_validation_samples image_root output_dir output_name logging_dir log_every_n_steps validate_every_n_steps
    save_every_n_steps save_last_n_states resume allow_changed_options
    """.split()  # noqa: SIM905
)


# Facts of a state that a resumed run must share, and what a user calls them.
WHAT = {
    "samples": "the training samples or their classes",
    "base_weights": "the weights of the base model's U-Net",
    "caches": "what the caches were made with",
}


@dataclass
class Checkpoints:
    """Saves states of a run under its output folder and finds the one to resume from."""

    output: OutputOptions
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    plan: Plan
    trained: Trained
    processes: Processes
    newest: Path | None = field(default=None)

    def due(self, step: int, finished: bool) -> bool:
        """Whether something is to be saved after this many steps."""
        every = self.output.save_every_n_steps
        return finished or (every is not None and step % every == 0)

    def save(self, step: int, *, finished: bool = False, asked: bool = False) -> None:
        """Save once, by the main process: every process holds the same state.

        finished: the run ends with this step. asked: somebody wants a state, whether or not one is due.
        """
        if self.processes.is_main:
            start = time.perf_counter()
            folder = self.output.output_dir / state_name(step)
            save_state(folder, self.trained, self.describe(step))
            prune_states(self.output.output_dir, self.output.save_last_n_states)
            self.processes.say(f"saved {folder} in {time.perf_counter() - start:.1f} s")
        self.newest = self.output.output_dir / state_name(step)
        self.processes.wait()

    def describe(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "samples_seen": step * self.plan.samples_per_step,
            "epoch": step / self.plan.steps_per_epoch,
            "world_size": self.plan.world_size,
            **self.facts,
            "options": dict(self.options),
            "versions": versions(),
        }

    def resume(self, state: Path | None) -> int:
        """Load a state found by `state_to_resume`; return the step to go on from.

        Raises UserError where samples, base weights or caches are not those the state was trained on.
        """
        if state is None:
            return 0
        then = read_facts(state)
        changes = [f"{WHAT[name]} changed" for name in WHAT if name in then and then[name] != self.facts.get(name)]
        if changes and not self.output.allow_changed_options:
            raise UserError(
                f"{state} cannot be continued exactly: {'; '.join(changes)} since it was saved. Restore what was there, start anew "
                "in another --output_dir, or continue all the same with --allow_changed_options."
            )
        other = [f"{name} {then['versions'].get(name)} then, {now} now" for name, now in versions().items()
                 if then["versions"].get(name) != now]  # fmt: skip
        if other:
            self.processes.say(f"warning: other versions may compute other bits: {'; '.join(other)}")
        facts = load_state(state, self.trained)
        self.newest = state
        return int(facts["step"])


def state_to_resume(
    output: OutputOptions,
    options: Mapping[str, Any],
    world_size: int,
    states: Sequence[tuple[int, Path]] | None = None,
    harmless: frozenset[str] = HARMLESS,
) -> tuple[Path | None, dict[str, Any]]:
    """The state to go on from, if any, and its facts; needs no model.

    states: (step, folder) of those there are, oldest first; default: `list_states` of the output folder. harmless: options
    that may differ from the state's.
    Raises UserError where `--resume` names no state, or options that change the outcome differ from the state's.
    """
    states = list_states(output.output_dir) if states is None else states
    if output.resume == "none":
        if states:
            raise UserError(
                f"{output.output_dir} already holds states (newest: {states[-1][1].name}) and --resume none asks for a new run. "
                "Name another --output_dir, or remove them."
            )
        return None, {}
    if output.resume == "auto":
        if not states:
            return None, {}
        folder = states[-1][1]
    else:
        folder = Path(output.resume)
    facts = read_facts(folder)
    changes = changed_options(facts["options"], options, harmless)
    if facts["world_size"] != world_size:
        changes.append(f"number of processes was {facts['world_size']}, is {world_size}")
    if changes and not output.allow_changed_options:
        raise UserError(
            f"{folder} belongs to a run with other options: {'; '.join(changes)}. Restore them, start anew in another "
            "--output_dir, or continue all the same with --allow_changed_options."
        )
    return folder, facts


def versions() -> dict[str, str]:
    """Library versions that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
