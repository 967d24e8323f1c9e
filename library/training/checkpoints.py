"""The adapters and states that a run saves, and the state that it resumes from."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from library.data.order import BatchOrder
from library.errors import UserError
from library.files import whole_file
from library.options.training import OutputOptions
from library.processes import Processes
from library.training.patience import Patience
from library.training.plan import Plan
from library.training.saving import saving_of
from library.training.state import Trained, changed_options, load_state, read_facts, save_state

Export = Callable[[int, str, bool], tuple[dict[str, Any], dict[str, str]]]
"""(step, name of the file, whether the run ends there) -> (tensors, metadata) of the adapter as the parameters are now."""

# Options that a resumed run may change without becoming another run.
HARMLESS = frozenset(
    """
    dataset_config config_file output_config ignore_unknown_keys dry_run verify
    device sdpa xformers gradient_checkpointing compile channels_last deterministic max_data_loader_n_workers
    persistent_data_loader_workers disable_mmap_load_safetensors
    cache_dir train_latents train_tokens val_latents val_tokens text_embeddings cache_batch_size vae_batch_size
    cache_latents cache_latents_to_disk cache_text_encoder_outputs_to_disk val_data max_validation_samples image_root
    output_dir output_name logging_dir log_every_n_steps log_with log_prefix log_tracker_name log_config
    resume allow_changed_options initial_step initial_epoch skip_until_initial_step
    save_every_n_steps save_every_n_epochs save_n_epoch_ratio save_last_n_states save_last_n_epochs save_last_n_steps
    save_last_n_epochs_state save_last_n_steps_state save_state save_state_on_train_end save_model_as save_precision
    validate_every_n_steps validate_every_n_epochs max_validation_steps early_stop
    sdxl sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first sample_sampler
    no_metadata training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags
    metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor
    metadata_is_negative_embedding
    """.split()  # noqa: SIM905
)

# Facts of a state that a resumed run must share, and what a user calls them.
WHAT = {
    "samples": "the training samples or their classes",
    "base_weights": "the weights of the base model",
    "caches": "what the caches were made with",
}


@dataclass
class Checkpoints:
    """Saves adapters and states of a run, when and where `saving` says."""

    output: OutputOptions
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    plan: Plan
    trained: Trained
    processes: Processes
    order: BatchOrder
    export: Export
    patience: Patience | None = None
    newest: Path | None = field(default=None)

    def __post_init__(self) -> None:
        self.saving = saving_of(self.output)

    def due(self, step: int, finished: bool) -> bool:
        """Whether something is to be saved after this many steps."""
        saving = self.saving
        return bool(saving.adapters(step, finished, self.plan) or saving.states(step, finished, False, self.plan))

    def save(self, step: int, *, finished: bool = False, asked: bool = False) -> None:
        """Save what is due once, by the main process: every process holds the same state.

        finished: the run ends with this step. asked: the user asked for a state, whether or not one is due.
        """
        if self.processes.is_main:
            for name in self.saving.adapters(step, finished, self.plan):
                self._save_adapter(name, step, finished)
        for name in self.saving.states(step, finished, asked, self.plan):
            folder = self.output.output_dir / name
            if self.processes.is_main:
                self._save_state(folder, step, finished)
            self.newest = folder
        if self.processes.is_main:
            self.saving.prune(step, finished, self.newest, self.plan)
        self.processes.wait()

    def describe(self, step: int) -> dict[str, Any]:
        facts = {
            "step": step,
            "samples_seen": self.order.samples_seen(step),
            "epoch": step / self.plan.steps_per_epoch,
            "last_step": self.plan.last_step,
            "output_name": self.output.output_name,
            "world_size": self.plan.world_size,
            **self.facts,
            "options": dict(self.options),
            "versions": versions(),
        }
        if self.patience is not None:
            facts["patience"] = {"best": self.patience.best, "waited": self.patience.waited}
        return facts

    def _save_state(self, folder: Path, step: int, finished: bool) -> None:
        start = time.perf_counter()
        save_state(folder, self.trained, {**self.describe(step), "finished": finished})
        self.processes.say(f"saved {folder} in {time.perf_counter() - start:.1f} s")

    def _save_adapter(self, name: str, step: int, finished: bool) -> None:
        """As trained, or the optimizer's own average; and where weights are averaged, that beside it."""
        path = self.output.output_dir / f"{name}.safetensors"
        with self.trained.optimizer_average():
            self._write(path, step, finished)
        if self.trained.average is not None:
            with self.trained.judged():
                self._write(path.with_name(f"{name}-ema.safetensors"), step, finished)

    def _write(self, path: Path, step: int, finished: bool) -> None:
        tensors, metadata = self.export(step, path.stem, finished)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        self.processes.say(f"saved {path}")

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
        if self.patience is not None:
            patience = facts.get("patience", {})
            self.patience.best, self.patience.waited = patience.get("best"), patience.get("waited", 0)
        return int(facts["step"])


def state_to_resume(
    output: OutputOptions, options: Mapping[str, Any], defaults: Mapping[str, Any], world_size: int
) -> tuple[Path | None, dict[str, Any]]:
    """The state to go on from, if any, and its facts; needs no model.

    options, defaults: name -> value. An option that is younger than the state had its default in it.

    Raises UserError where `--resume` names no state, or options that change the outcome differ from the state's.
    """
    states = saving_of(output).states_there()
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
    changes = changed_options({**defaults, **facts["options"]}, options, HARMLESS)
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


def is_early_end(facts: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a state is where --early_stop ended the run that `plan` describes."""
    return bool(facts.get("finished")) and facts.get("last_step") == plan.last_step
