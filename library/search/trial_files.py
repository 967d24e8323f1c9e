"""Where a study's trials leave their files: trial_0007/ and, of trainings of the best with new seeds, confirm_0001/."""

from __future__ import annotations

from pathlib import Path

PARAMS_FILE, DETAILS_FILE = "params.json", "trial.json"
"""The options that differ from trial to trial; all options, with what Optuna suggested."""
EVALUATIONS, LOGS, TRAINER_LOG = "realtime_evaluations", "logs", "trainer.log"


def trial_folder(study_folder: Path, number: int, *, confirms: bool = False) -> Path:
    """Folder of trial `number`, from 1. confirms: it trains one of the best again, with a new seed."""
    return study_folder / f"{'confirm' if confirms else 'trial'}_{number:04d}"


def adapter_name(number: int) -> str:
    return f"lora_trial_{number}"


def adapter_file(folder: Path, number: int) -> Path:
    """The adapter of trial `number` in its folder; it need not be there."""
    return folder / f"{adapter_name(number)}.safetensors"


def slot_folder(folder: Path, slot: int) -> Path:
    """Pictures that a trial drew at a slot. folder: of the trial."""
    return folder / EVALUATIONS / f"slot_{slot:02d}"
