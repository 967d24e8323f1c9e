"""train_network.py stopped and resumed: the bits of the uninterrupted run, from states of every kind."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.options.network import parse_network_options
from library.training.plan import Plan
from library.training.session import first_step
from library.training.stop import SAVE, STOP
from tests.tools.network_runs import EXACT, NetworkSetting, adapter, asked, losses, names
from tests.tools.runs import assert_equal_states


def assert_same_end(a: Path, b: Path) -> None:
    """States, adapters and every loss on the way, to the bit."""
    assert_equal_states(a / "mio-state", b / "mio-state")
    facts = [json.loads((path / "mio-state" / "state.json").read_text()) for path in (a, b)]
    for name in ("step", "samples_seen", "samples", "network", "loss_scaler", "finished"):
        assert facts[0].get(name) == facts[1].get(name), name
    for file in ("mio.safetensors", "mio-ema.safetensors"):
        if not (a / file).exists():
            assert file == "mio-ema.safetensors" and not (b / file).exists()
            continue
        left, right = adapter(a / file), adapter(b / file)
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert losses(a) == losses(b)


@pytest.mark.bits
def test_stopped_twice_in_either_epoch_and_resumed_is_the_uninterrupted_run(
    finished_network: Path, network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, looks in ((1, 1), (3, 2)):
        with asked(looks, STOP, tmp_path):
            assert network_setting.train(tmp_path, **EXACT) == 75
        assert f"Stopped at step {step} of 4 by the file" in capsys.readouterr().err
        assert (tmp_path / f"mio-step{step:08d}-state").is_dir() and not (tmp_path / "stop").exists()
    assert network_setting.train(tmp_path, **EXACT) == 0
    assert "resuming from" in capsys.readouterr().out
    assert_same_end(finished_network, tmp_path)
    logs = list((tmp_path / "logs").iterdir())
    assert len(logs) == 1 and len(list((logs[0] / "network_train").iterdir())) == 3, "one folder, a file for each start"


@pytest.mark.bits
def test_killed_in_the_middle_and_started_again_is_the_uninterrupted_run(
    finished_network: Path, network_setting: NetworkSetting, tmp_path: Path
) -> None:
    """SIGKILL as soon as the first of the two epochs is on disk; the second is under way."""
    output = tmp_path / "out"
    run = network_setting.start(output, **EXACT)
    run.until(lambda: f"saved {output / 'mio-000001-state'}" in run.said)
    run.send(signal.SIGKILL)
    run.end(-signal.SIGKILL)
    assert (output / "mio-000001-state").is_dir() and not (output / "mio.safetensors").exists()
    assert network_setting.train(output, **EXACT, max_data_loader_n_workers=3) == 0
    assert_same_end(finished_network, output)
    assert [path.name for path in output.glob(".*")] == [".lock"]


@pytest.mark.bits
def test_a_run_on_a_quantised_base_resumes_to_the_bit_and_on_no_other(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**network_setting.quick, "save_state": "", "base_quantization": "nf4", "blocks_to_swap": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert network_setting.train(whole, **given) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"unet at rest in nf4: .* error of the weights \d\.\d\d%, of the output for noise \d+\.\d\d%", said
    ), said
    assert "blocks_to_swap has no effect without a GPU" in said
    with asked(1, STOP, parts):
        assert network_setting.train(parts, **given) == 75
    assert network_setting.train(parts, **{**given, "base_quantization": "int8"}) == 2
    assert "base_quantization" in capsys.readouterr().err
    assert network_setting.train(parts, **given) == 0
    assert_same_end(whole, parts)
    with safe_open(whole / "mio.safetensors", "pt") as file:
        assert file.metadata()["ss_base_quantization"] == "nf4"


@pytest.mark.bits
def test_an_adapter_lost_after_the_last_state_is_written_by_the_same_command(
    finished_network: Path, network_setting: NetworkSetting, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished_network, output)
    for name in ("mio.safetensors", "mio-ema.safetensors"):
        (output / name).unlink()
    assert network_setting.train(output, **EXACT) == 0
    assert_same_end(finished_network, output)


def test_the_same_command_after_the_end_has_nothing_to_do(
    finished_network: Path, network_setting: NetworkSetting, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished_network / "mio.safetensors").stat().st_mtime_ns
    assert network_setting.train(finished_network, **EXACT) == 0
    assert "mio-state is the end of this run (step 4). Nothing is left to do." in capsys.readouterr().out
    assert (finished_network / "mio.safetensors").stat().st_mtime_ns == before


SHORT = {
    "network_train_unet_only": None, "cache_text_encoder_outputs": None, "gradient_accumulation_steps": 1, "max_train_steps": 2,
    "max_train_epochs": None, "ema_decay": 0.5,
}  # fmt: skip


@pytest.mark.bits
@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("network_setting", {"optimizer_type": "Prodigy", "learning_rate": 1.0}),
        ("network_setting", {
            "network_args": "loraplus_unet_lr_ratio=4", "lr_scheduler_type": "OneCycleLR",
            "lr_scheduler_args": "max_lr=[1e-2,5e-3] total_steps=5 cycle_momentum=False",
        }),
        ("sdxl_setting", {"optimizer_type": "AdamW8bit", "mixed_precision": "fp16", **SHORT}),
    ],
    ids=["prodigy", "scheduler-of-two-groups", "adamw8bit-fp16"],
)  # fmt: skip
def test_other_optimizers_schedules_and_the_loss_scaler_resume_exactly(
    base: str, changes: dict[str, object], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    setting: NetworkSetting = request.getfixturevalue(base)
    options = {**setting.quick, "save_state": "", **changes}
    assert setting.train(tmp_path / "whole", **options) == 0
    with asked(1, STOP, tmp_path / "parts"):
        assert setting.train(tmp_path / "parts", **options) == 75
    assert setting.train(tmp_path / "parts", **options) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_stop_where_an_adapter_is_due_saves_a_state_as_well(network_setting: NetworkSetting, tmp_path: Path) -> None:
    options = {**network_setting.quick, "save_every_n_epochs": 1}
    with asked(2, STOP, tmp_path):
        assert network_setting.train(tmp_path, **options) == 75
    assert {"mio-000001.safetensors", "mio-step00000002-state"} <= set(names(tmp_path))


def test_a_save_file_leaves_a_state_and_the_run_goes_on(network_setting: NetworkSetting, tmp_path: Path) -> None:
    with asked(1, SAVE, tmp_path):
        assert network_setting.train(tmp_path, **network_setting.quick) == 0
    assert "mio-step00000001-state" in names(tmp_path) and not (tmp_path / "save").exists()
    assert "mio.safetensors" in names(tmp_path) and "mio-state" not in names(tmp_path)


@pytest.fixture
def halfway(finished_network: Path, tmp_path: Path) -> Path:
    """The output as it was after the first epoch."""
    shutil.copytree(finished_network, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "mio-state")
    return tmp_path / "out"


def test_what_changes_the_run_is_named_and_what_does_not_may_change(
    halfway: Path, network_setting: NetworkSetting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert network_setting.train(halfway, **{**EXACT, "learning_rate": 1e-3}) == 2
    assert "belongs to a run with other options: learning_rate was 0.01, is 0.001." in capsys.readouterr().err
    for name, lines in (("subset", "num_repeats = 2"), ("subset", "keep_tokens = 1"), ("dataset", "batch_size = 3")):
        config = network_setting.dataset("other", **{name: lines})
        assert network_setting.train(halfway, **EXACT, dataset_config=config) == 2
        assert "the training samples or their" in capsys.readouterr().err
    state = halfway / "mio-000001-state" / "state.json"
    facts = json.loads(state.read_text())
    del facts["options"]["objective"]  # an option that is younger than the state
    state.write_text(json.dumps(facts))
    harmless = {
        "save_state": None, "save_every_n_epochs": None, "training_comment": "x", "save_precision": "fp16",
        "dataset_config": network_setting.dataset("renamed"),
    }  # fmt: skip
    assert network_setting.train(halfway, **{**EXACT, **harmless}) == 0
    assert "mio-state" not in names(halfway)


def test_other_frozen_weights_are_not_continued_silently(
    halfway: Path, network_setting: NetworkSetting, capsys: pytest.CaptureFixture[str]
) -> None:
    file = halfway / "mio-000001-state" / "state.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"base_weights": facts["base_weights"] | {"text_encoder": "other"}}))
    assert network_setting.train(halfway, **EXACT) == 2
    assert "the weights of the base model changed since it was saved" in capsys.readouterr().err


def test_a_run_may_begin_at_a_step_without_a_state(
    finished_network: Path, network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its data, noise, names and learning rate are those of the step; its weights are fresh."""
    options = {**EXACT, "network_weights": finished_network / "mio-000001.safetensors"}
    assert network_setting.train(tmp_path / "step", **options, initial_step=2) == 0
    assert "beginning with step 2" in capsys.readouterr().out
    # Same weights and noise as in the run that went on from there; only the optimizer began anew.
    assert losses(tmp_path / "step")[0] == losses(finished_network)[2] and len(losses(tmp_path / "step")) == 2
    assert [row for row in names(tmp_path / "step") if row.endswith(".safetensors")] == [
        "mio-ema.safetensors", "mio.safetensors",
    ]  # fmt: skip
    assert network_setting.train(tmp_path / "none", **options, initial_step=4) == 2
    assert "initial_step 4 leaves nothing to train: the run has 4 steps." in capsys.readouterr().err
    plan = Plan(6, 2, 2, 1, steps_per_epoch=2, last_step=4, warmup_steps=0)
    for words, step in (([], 0), (["--initial_step", "3"], 3), (["--initial_epoch", "2"], 2)):
        assert first_step(parse_network_options(words, prog="", description=None), plan) == step
