"""The terms of a study: what must stay the same for the values of its trials to be comparable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError
from library.options.search import ObjectiveName, Script
from library.search.space import Space, difference

# A trial sets these itself or does not use them: it saves no states, and its slots are its validations.
DECIDED_BY_TRIALS = frozenset(
    """
    output_dir output_name logging_dir log_prefix log_tracker_name seed resume allow_changed_options overwrite dry_run
    config_file output_config save_every_n_epochs save_n_epoch_ratio save_every_n_steps save_last_n_epochs save_last_n_steps
    save_last_n_epochs_state save_last_n_steps_state save_last_n_states save_state save_state_on_train_end
    sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first sample_sampler validate_every_n_epochs
    validate_every_n_steps max_validation_steps early_stop initial_step initial_epoch skip_until_initial_step
    """.split()  # noqa: SIM905
)
# Options that change where and how fast a trial runs, and not its value.
HARMLESS = DECIDED_BY_TRIALS | {
    *("device", "sdxl", "log_with", "log_every_n_steps", "cache_dir"),
    *("max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size", "xformers", "sdpa"),
}


@dataclass(frozen=True)
class Terms:
    """The terms of one study.

    Attributes:
        options: of the script, fixed for all trials.
        judging: settings of the objective.
        dataset: fingerprint of pictures and captions; "" where it is not known. The same holds for the next two, and an
            unknown fingerprint is not compared.
        settings: fingerprint of what dataset files say about the pictures. Where it is known, the file's path does not matter.
        base: hash of the base's weights.
    """

    script: Script
    objective: ObjectiveName
    space: Space
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42
    judging: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""
    settings: str = ""
    base: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The terms as they are stored with the study, without options that do not matter."""
        fixed = {name: value for name, value in {**self.space.options, **self.options}.items() if name not in HARMLESS}
        content = {
            "script": self.script,
            "objective": self.objective,
            "space": self.space.as_dict(),
            "space_hash": self.space.hash,
            "options": fixed,
            "judging": dict(self.judging),
            "seed": self.seed,
            "dataset": self.dataset,
            "settings": self.settings,
            "base": self.base,
        }
        # As JSON gives it back, so that a tuple does not look like a change.
        return json.loads(json.dumps(content, default=str))


def require_same_terms(study: str, stored: Mapping[str, Any], terms: Terms) -> None:
    """Raises UserError, with the difference, where the study was made with other terms. stored: `Terms.as_dict` of it."""
    advice = "Run it with the terms that it was made with, or choose another --study-name."
    new = terms.as_dict()
    for key, verb in (("script", "trains with"), ("objective", "is judged by")):
        if stored[key] != new[key]:
            raise UserError(f"The study {study} {verb} {stored[key]}, not {new[key]}. {advice}")
    knows_settings = bool(stored.get("settings") and terms.settings)
    ignored = HARMLESS | terms.space.overruled | ({"dataset_config"} if knows_settings else set())
    for key, words in (
        ("space", "searches another space"),
        ("options", "has other fixed options"),
        ("judging", "has other settings of its objective"),
    ):
        before, now = stored[key], new[key]
        if key == "options":
            before, now = ({k: v for k, v in values.items() if k not in ignored} for values in (before, now))
        if changes := difference(before, now):
            raise UserError(f"The study {study} {words}: {'; '.join(changes)}. {advice}")
    for key, words in (
        ("dataset", "with other pictures or captions than are there now"),
        (
            "settings",
            "with other settings of its datasets (such as resolution, batch, repeats, folders) than they have now",
        ),
        ("base", "on other weights of the base than its file has now"),
    ):
        if stored.get(key) and new[key] and stored[key] != new[key]:
            raise UserError(f"The study {study} was made {words}. {advice}")
    if stored["seed"] != new["seed"]:
        raise UserError(f"The study {study} trains with the seed {stored['seed']}, not {new['seed']}. {advice}")
