"""Trials of a study as tests need them: few steps on tiny bases, in this process or in a trainer's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import Stopped
from library.options.search import ObjectiveName, Script
from library.search.messages import Job, Outcome, Slot
from library.search.run.study_data import network_data

if TYPE_CHECKING:
    from library.search.trainer.kept_models import KeptModels
    from tests.tools.network_runs import NetworkSetting
    from tests.tools.runs import RepaSetting


class Listener:
    """Takes the place of the wire to the parent, and answers slots. stop_after: says stop to that slot."""

    def __init__(self, stop_after: int | None = None, stop_at_step: int | None = None) -> None:
        self.stop_after, self.stop_at_step = stop_after, stop_at_step
        self.slots: list[Slot] = []
        self.steps: int | None = None

    def begin(self, trial: int) -> None: ...

    def begun(self, steps: int) -> None:
        self.steps = steps

    def finishing(self) -> None: ...

    def slot(self, slot: Slot, *, last: bool) -> bool:
        self.slots.append(slot)
        return last or slot.slot != self.stop_after

    def alive(self, step: int, images_per_second: float) -> None:
        if step == self.stop_at_step:
            raise Stopped("stopped here")

    @property
    def values(self) -> list[float]:
        return [slot.value for slot in self.slots]


def network_options(setting: NetworkSetting, **changes: Any) -> dict[str, Any]:
    """Of four steps over three pictures of 64 px, of which two are held out."""
    own = {
        "dataset_config": setting.dataset("few", folder=setting.few, dataset="resolution = 64\nbatch_size = 1"),
        "max_train_epochs": 4,
        "network_train_unet_only": True,
        "cache_text_encoder_outputs": True,
    }
    options = _as_written({**setting.options, **own, **changes})
    return {**options, **network_data(options).split}


def repa_options(setting: RepaSetting, **changes: Any) -> dict[str, Any]:
    return _as_written({**setting.options, "ema_decay": 0.0, **changes})


def _as_written(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that are None, which take an option away; paths as text."""
    return {name: str(one) if isinstance(one, Path) else one for name, one in options.items() if one is not None}


def job(
    folder: Path,
    options: dict[str, Any],
    trial: int = 1,
    *,
    script: Script = "train_network",
    objective: ObjectiveName = "loss",
    seed: int = 42,
    **more: Any,
) -> Job:
    return Job(trial, str(folder), script, objective, options, seed, **more)


def train_here(
    job: Job, warm: KeptModels, listener: Listener | None = None, *, after: Callable[[], None] = lambda: None
) -> Outcome:
    """The trial, in this process."""
    from library.search.trainer.child import work

    outcome = work(job, warm, listener or Listener())  # type: ignore[arg-type]
    after()
    return outcome
