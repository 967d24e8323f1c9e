"""What earlier runs left in the output folder: the state to go on from, and adapters that are not to be replaced by a slip.

An adapter file says which run made it under RUN_KEY in its metadata: the options that decide what is computed, a digest of
the pictures, and whether the run ended there. Nothing here imports torch: an option that was changed is answered at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from library.errors import UserError
from library.files import public_name
from library.options.parser import flatten
from library.options.toml_file import read_toml
from library.options.training import OutputOptions
from library.training.saving import saving_of
from networks.spec import RUN_KEY, is_kept

RESOLVED = "options.toml"
"""File of the resolved options of the last run in an output folder."""

# Options that a resumed run may change without becoming another run.
HARMLESS = frozenset(
    """
    dataset_config config_file output_config ignore_unknown_keys dry_run report verify show_timesteps
    device sdpa xformers gradient_checkpointing blocks_to_swap compile channels_last deterministic max_data_loader_n_workers
    persistent_data_loader_workers disable_mmap_load_safetensors
    captions text_fusion_encoders
    cache_dir train_latents train_tokens val_latents val_tokens text_embeddings cache_batch_size vae_batch_size
    cache_latents cache_latents_to_disk cache_text_encoder_outputs_to_disk val_data max_validation_samples image_root
    output_dir output_name logging_dir log_every_n_steps log_with log_prefix log_tracker_name log_config
    resume allow_changed_options overwrite initial_step initial_epoch skip_until_initial_step
    save_every_n_steps save_every_n_epochs save_n_epoch_ratio save_last_n_states save_last_n_epochs save_last_n_steps
    save_last_n_epochs_state save_last_n_steps_state save_state save_state_on_train_end save_model_as save_precision
    validate_every_n_steps validate_every_n_epochs max_validation_steps early_stop
    sdxl sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first sample_sampler
    no_metadata training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags
    metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor
    metadata_is_negative_embedding
    """.split()  # noqa: SIM905
)

# Where a run without a state begins. A state knows its step; an adapter is another one where it differs.
BEGINNING = frozenset({"initial_step", "initial_epoch"})


# Options whose values kohya's metadata repeat as they are, as ss_NAME.
REPEATED = """
    learning_rate unet_lr network_dim network_alpha network_dropout seed max_train_steps clip_skip
    gradient_accumulation_steps lr_scheduler mixed_precision noise_offset min_snr_gamma max_grad_norm
    loss_type prior_loss_weight scale_weight_norms caption_dropout_rate ip_noise_gamma zero_terminal_snr
    """.split()  # noqa: SIM905

_ADVICE = "Name another --output_name or --output_dir, or replace it with --overwrite."


class Outputs(Protocol):
    """Options of a training, a dataclass of groups: only where it writes is asked by name."""

    @property
    def output(self) -> OutputOptions: ...


@dataclass(frozen=True)
class Earlier:
    """An adapter file that lies where this run may write one.

    options: of the run that made it, as far as they are known, those that decide what is computed.
    samples: digest of its pictures, "" where it is not known. base_weights: hashes of the base's weights, likewise None. finished:
    whether its run ended there.
    """

    path: Path
    options: Mapping[str, Any]
    samples: str = ""
    base_weights: Mapping[str, Any] | None = None
    step: int = 0
    finished: bool = False
    made_here: bool = True
    """Whether a run of this project made it, as far as the file or the folder tells."""


def run_record(options: Outputs, samples: str, base_weights: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter file is to say of its run. Of paths only the last part: the file may be published."""
    defaults = flatten(type(options)())
    deciding = {name: _public(value) for name, value in flatten(options).items() if name not in HARMLESS - BEGINNING}
    known = {name: value for name, value in deciding.items() if value is not None or defaults[name] is not None}
    return {"options": known, "samples": samples, "base_weights": base_weights}


def check_earlier(options: Outputs) -> None:
    """Raise UserError where an adapter of another run lies under a name that this run may write, or states where none should."""
    output = options.output
    if output.resume == "none" and not output.overwrite and (states := saving_of(output).states_there()):
        raise UserError(
            f"{output.output_dir} already holds states (newest: {states[-1].name}) and --resume none asks for a new run. "
            "Name another --output_dir, or replace them with --overwrite."
        )
    if output.overwrite or (output.allow_changed_options and _goes_on(options)):
        return
    for earlier in adapters_there(options):
        if (why := _differences(earlier, options)) is not None:
            raise UserError(f"{earlier.path} belongs to {why}. {_ADVICE}")


def finished_adapter(options: Outputs, samples: str, base_weights: Mapping[str, Any]) -> Earlier | None:
    """The adapter that ended this very run, where it is there.

    samples, base_weights: as the run would have them now.
    Raises UserError where an adapter of this name was trained with these options on other pictures or another base.
    """
    output, last = options.output, None
    if output.overwrite or (output.allow_changed_options and _goes_on(options)):
        return None
    for earlier in adapters_there(options):
        if not earlier.samples:
            continue
        changes = ["pictures, captions or settings of its data sets"] if earlier.samples != samples else []
        changes += ["weights of the base model"] if not changes and earlier.base_weights != base_weights else []
        if changes:
            raise UserError(f"{earlier.path} belongs to a run with the same options and other {changes[0]}. {_ADVICE}")
        if _is_end(earlier):
            last = earlier
    return last


def adapters_there(options: Outputs) -> list[Earlier]:
    """The adapter files that lie under names that this run may write, and what they say of the runs that made them."""
    read = [_read(path, options) for path in saving_of(options.output).adapters_there()]
    return [earlier for earlier in read if earlier is not None]


def _is_end(earlier: Earlier) -> bool:
    return earlier.finished and not earlier.path.stem.endswith("-ema")


def _goes_on(options: Outputs) -> bool:
    """Whether the run will go on from a state."""
    resume = options.output.resume
    return resume not in ("auto", "none") or (resume == "auto" and bool(saving_of(options.output).states_there()))


def _read(path: Path, options: Outputs) -> Earlier | None:
    """None where the file is no adapter: something that was not written to its end."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError:
        return None
    except OSError as error:
        raise UserError(f"{path} lies where the adapter is to be, and cannot be read: {error}.") from None
    try:
        record, step = json.loads(metadata[RUN_KEY]), int(metadata["ss_steps"])
        return Earlier(path, record["options"], record["samples"], record["base_weights"], step, record["finished"])
    except (KeyError, TypeError, ValueError):
        pass
    said = {name: _parsed(text) for name in REPEATED if (text := metadata.get(f"ss_{name}", "None")) != "None"}
    now = {name: value for name, value in flatten(options).items() if name in said and value is not None}
    other = {name: said[name] for name in now if said[name] != now[name]}
    # A file without a record, as --no_metadata wants: the folder knows the options of its last run. What was converted, resized
    # or merged at this place, or comes from elsewhere, says more or nothing.
    resolved = options.output.output_dir / RESOLVED
    if "sshs_model_hash" in metadata and all(map(is_kept, metadata)) and resolved.is_file():
        values = read_toml(resolved)
        if values.get("output_name") == options.output.output_name and values.get("no_metadata"):
            return Earlier(path, dict.fromkeys(flatten(options)) | values)
    return Earlier(path, {**flatten(options), **other}, made_here=False)


def _differences(earlier: Earlier, options: Outputs) -> str | None:
    """ "a run with other options: seed was 1, is 2", or None where it is a run with these options."""
    then = {**flatten(type(options)()), **earlier.options}
    if changes := changed_options(then, flatten(options), HARMLESS - BEGINNING):
        return f"a run with other options: {'; '.join(changes)}"
    return None if earlier.made_here else "another run, and does not say with which options"


def _parsed(text: str) -> Any:
    """A number or truth value as str() wrote it, or the text."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def state_to_resume(options: Outputs, world_size: int) -> tuple[Path | None, dict[str, Any]]:
    """The state to go on from, if any, and its facts; needs no model. An option that is younger than the state had its default.

    Raises UserError where `--resume` names no state, or options that change the outcome differ from the state's.
    """
    from library.training.state import read_facts

    output = options.output
    states = saving_of(output).states_there()
    if output.resume == "none" or (output.resume == "auto" and not states):
        return None, {}
    folder = states[-1] if output.resume == "auto" else Path(output.resume)
    facts = read_facts(folder)
    changes = changed_options({**flatten(type(options)()), **facts["options"]}, flatten(options), HARMLESS)
    if facts["world_size"] != world_size:
        changes.append(f"number of processes was {facts['world_size']}, is {world_size}")
    if changes and not output.allow_changed_options:
        # A run that was finished is, whatever states lie about.
        if output.resume == "auto" and (output.overwrite or any(map(_is_end, adapters_there(options)))):
            return None, {}
        raise UserError(
            f"{folder} belongs to a run with other options: {'; '.join(changes)}. Restore them, start anew in another "
            "--output_dir or with --overwrite, or continue all the same with --allow_changed_options."
        )
    return folder, facts


def changed_options(then: Mapping[str, Any], now: Mapping[str, Any], harmless: frozenset[str]) -> list[str]:
    """ "train_batch_size was 128, is 64" for each option that changes what a run computes."""
    return [
        f"{name} was {json.dumps(then.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted(then.keys() | now.keys())
        if name not in harmless and not _same(then.get(name), now.get(name))
    ]


def _same(then: Any, now: Any) -> bool:
    """Equal, or the public name of what is given now, or another way to the same file or folder; a value is a list of one."""
    if then == now:
        return True
    if isinstance(then, list) or isinstance(now, list):
        before, after = (value if isinstance(value, list) else [value] for value in (then, now))
        return len(before) == len(after) and all(map(_same, before, after))
    if not (isinstance(then, str) and isinstance(now, str) and then and now):
        return False
    if then == Path(now).name:
        return True
    try:
        return os.path.samefile(then, now)
    except (OSError, ValueError):
        return False


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(one) for one in value]
    try:
        return public_name(value) if isinstance(value, str) else value
    except OSError:  # no path: too long for one
        return value
