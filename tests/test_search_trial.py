"""Trials of a study as a trainer trains them, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.errors import Diverged, RunFailed, Stopped, UserError
from library.search.messages import Slot, from_line, read_outcome, to_line
from library.search.trainer import judge_by_loss
from library.search.trainer.child import ending_of
from library.search.trainer.judge_by_loss import LossJudge, Measured
from library.search.trainer.trial import horizon_note, slots_after
from tests.tools.network_runs import NetworkSetting
from tests.tools.runs import RepaSetting
from tests.tools.trials import Listener, job, network_options, repa_options, train_here


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_by_loss, "NOISES_OF_FEW", 1)


@pytest.fixture(scope="module")
def warm() -> Iterator[Any]:
    """Kept from trial to trial, as a trainer keeps it."""
    from library.search.trainer.kept_models import KeptModels

    warm = KeptModels()
    yield warm
    warm.close()


def base_weights(warm: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in warm._unet.value.models["unet"].state_dict().items()}


# --------------------------------------------------------------------------------------------------- train_network.py


def test_warm_trial_equals_a_cold_one_and_leaves_the_base_as_it_was(
    network_setting: NetworkSetting, warm: Any, tmp_path: Path
) -> None:
    from library.search.trainer.kept_models import KeptModels

    options = network_options(network_setting)
    first = train_here(job(tmp_path / "1", options), warm)
    assert first.ending == "done", first.message
    kept, caches, before = warm._unet.value, warm.caches.value, base_weights(warm)

    other = {"network_dim": 4, "network_args": ["conv_dim=2"], "learning_rate": 0.05, "optimizer_type": "Lion"}
    assert train_here(job(tmp_path / "2", {**options, **other}, 2), warm).ending == "done"
    assert warm.intact() and warm._unet.value is kept and warm.caches.value is caches
    after = base_weights(warm)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    again = train_here(job(tmp_path / "3", options, 3), warm)
    cold = KeptModels()
    fresh = train_here(job(tmp_path / "4", options, 4), cold)
    cold.close()
    assert first.value == again.value == fresh.value and first.components == again.components == fresh.components
    files = [load_file(str(one.file)) for one in (first, again, fresh)]
    assert all(torch.equal(files[0][name], file[name]) for file in files for name in files[0])


def test_trial_trains_what_the_script_trains_to_the_bit_and_measuring_changes_nothing(
    network_setting: NetworkSetting, warm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, slots = LossJudge.__call__, iter(range(10))

    def ever_better(self: LossJudge, slot: int) -> Measured:
        measure(self, slot)
        return Measured(-float(next(slots)))  # so that the last slot's adapter is kept

    monkeypatch.setattr(LossJudge, "__call__", ever_better)
    config = network_setting.dataset(
        "split",
        folder=network_setting.few,
        dataset="resolution = 64\nbatch_size = 1\nvalidation_split = 0.5\nvalidation_seed = 3",
    )
    changes = {"dataset_config": config, "max_train_epochs": 3, "network_dropout": 0.1}
    assert network_setting.train(tmp_path / "script", **changes, network_train_unet_only="") == 0
    options = network_options(network_setting, **changes, cache_text_encoder_outputs=None)
    outcome = train_here(job(tmp_path / "trial", options), warm)
    assert outcome.ending == "done", outcome.message
    script, trial = load_file(tmp_path / "script" / "mio.safetensors"), load_file(str(outcome.file))
    assert script.keys() == trial.keys() and all(torch.equal(script[name], trial[name]) for name in script)


def test_files_of_a_trial(network_setting: NetworkSetting, warm: Any, tmp_path: Path) -> None:
    listener = Listener()
    options = network_options(network_setting, save_every_n_epochs=1)
    outcome = train_here(job(tmp_path, options, 7), warm, listener)
    assert (outcome.ending, listener.steps) == ("done", 4)
    assert [(slot.slot, slot.step) for slot in listener.slots] == [(2, 1), (5, 2), (7, 3), (10, 4)]
    assert outcome.value == min(listener.values)
    assert outcome.best_slot == listener.slots[listener.values.index(min(listener.values))].slot
    assert outcome.file == str(tmp_path / "lora_trial_7.safetensors")
    assert read_outcome(tmp_path, 7) == outcome
    assert json.loads((tmp_path / "params.json").read_text())["network_dim"] == 2
    slot = json.loads((tmp_path / "realtime_evaluations" / "slot_05.json").read_text())
    assert slot["value"] == listener.values[1] and slot["components"].keys() == {"low", "mid", "high"}
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["objective/value"] for row in rows if "objective/value" in row] == listener.values
    assert list((tmp_path / "logs" / "tensorboard").glob("events*"))
    assert not list(tmp_path.glob("*-state")) and len(list(tmp_path.glob("*.safetensors"))) == 1


def test_trial_that_is_told_to_stop_keeps_its_best_slot(
    network_setting: NetworkSetting, warm: Any, tmp_path: Path
) -> None:
    listener = Listener(stop_after=5)
    outcome = train_here(job(tmp_path, network_options(network_setting)), warm, listener)
    assert outcome.ending == "stopped" and "slot 5" in outcome.message
    assert outcome.value == min(listener.values) and Path(str(outcome.file)).is_file()
    early = train_here(job(tmp_path, network_options(network_setting)), warm, Listener(stop_at_step=1))
    assert (early.ending, early.value, early.file) == ("stopped", None, None)
    assert not list(tmp_path.glob("*.safetensors"))  # what the attempt before left is gone


def test_rate_that_blows_up_is_divergence_and_the_next_trial_is_whole(
    network_setting: NetworkSetting, warm: Any, tmp_path: Path
) -> None:
    options = network_options(network_setting)
    outcome = train_here(job(tmp_path / "1", {**options, "learning_rate": 1e25}), warm)
    assert outcome.ending == "diverged" and outcome.message
    assert warm.intact()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rat": 1e-3}, "did you mean learning_rate"),
        ({"network_dim": "four"}, "network_dim"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"pretrained_model_name_or_path": "nowhere/at-all.safetensors"}, "nowhere/at-all.safetensors"),
        ({"dataset_config": "nowhere.toml"}, "nowhere.toml"),
    ],
)
def test_wrong_configuration_is_refused_with_its_sentence(
    network_setting: NetworkSetting, warm: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    outcome = train_here(job(tmp_path, {**network_options(network_setting), **changes}), warm)
    assert outcome.ending == "refused" and said in outcome.message


def test_trial_judged_by_pictures(
    network_setting: NetworkSetting, warm: Any, tmp_path: Path, tiny_dinov2: Path
) -> None:
    judging = {"steps": 1, "size": 64, "seeds": 1, "unrelated": ["a blue box"], "dino_model": str(tiny_dinov2)}
    listener, again = Listener(), Listener()
    options = network_options(network_setting)
    outcome = train_here(job(tmp_path / "1", options, objective="image", judging=judging), warm, listener)
    assert outcome.ending == "done", outcome.message
    assert [slot.slot for slot in listener.slots] == [5, 10]
    pictures = sorted((tmp_path / "1" / "realtime_evaluations" / "slot_10").iterdir())
    assert [path.name for path in pictures] == ["subject_00.png", "subject_01.png", "unrelated_00.png"]
    assert outcome.components.keys() == {"likeness", "likeness_gain", "drift"}
    train_here(job(tmp_path / "2", options, 2, objective="image", judging=judging), warm, again)
    assert again.values == listener.values
    refused = train_here(job(tmp_path / "3", options, 3, objective="image", judging={"stepz": 1}), warm)
    assert refused.ending == "refused" and "stepz" in refused.message


# ------------------------------------------------------------------------------------------------------ train_repa.py


def test_trial_of_train_repa(
    repa_setting: RepaSetting, warm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = repa_options(repa_setting)
    outcome = train_here(job(tmp_path / "1", options, script="train_repa"), warm)
    assert outcome.ending == "done", outcome.message
    assert outcome.value != 0 and any("lora_up" in name for name in load_file(str(outcome.file)))
    before = base_weights(warm)
    again = train_here(job(tmp_path / "2", {**options, "val_data": None}, 2, script="train_repa"), warm)
    assert again.ending == "done", again.message
    after = base_weights(warm)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_of_train_repa_at_zero_has_exactly_the_value_0(
    repa_setting: RepaSetting, warm: Any, tmp_path: Path
) -> None:
    # A warm-up so long that the first step has a rate of 0.
    listener = Listener(stop_at_step=2)
    options = repa_options(repa_setting, lr_warmup_steps=4, max_train_steps=5, lr_scheduler="constant_with_warmup")
    train_here(job(tmp_path, options, script="train_repa"), warm, listener)
    assert listener.values[0] == 0.0


# --------------------------------------------------------------------------------------------------------- small parts


def test_slots_are_tenths_however_short_the_training() -> None:
    for last in (1, 3, 10, 37, 100):
        slots = [slot for step in range(last + 1) for slot in slots_after(step, last)]
        assert slots == list(range(1, 11))
        assert all(step * 10 >= slot * last for step in range(last + 1) for slot in slots_after(step, last))


def test_average_that_hardly_moves_is_warned_of() -> None:
    assert horizon_note(0.0, 10) is None and horizon_note(0.9, 100) is None
    assert "goes 10% of the way" in str(horizon_note(0.9995, 200))


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (Stopped("Stopped at step 3 of 9 by SIGTERM. Run the same command again to continue."), "stopped"),
        (Diverged("step 3: loss nan"), "diverged"),
        (UserError("network_dim is wrong."), "refused"),
        (RunFailed("x could not be written: No space left on device."), "failed"),
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (RuntimeError("shapes do not match"), "failed"),
    ],
)
def test_how_an_error_ends_a_trial(error: BaseException, ending: str) -> None:
    found, message = ending_of(error)
    assert found == ending and message and "Run the same command" not in message


def test_line_without_json_is_no_message() -> None:
    assert from_line(to_line("slot", Slot(1, 2, 3, 0.5))) == {
        "kind": "slot", "trial": 1, "slot": 2, "step": 3, "value": 0.5, "components": {}, "images_per_second": 0.0,
    }  # fmt: skip
    assert from_line(b'{"kind": "sl') is None and from_line(b"[1]\n") is None
    with pytest.raises(ValueError):
        to_line("slot", Slot(1, 2, 3, float("nan")))
