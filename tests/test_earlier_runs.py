"""What an earlier run left in the output folder: a finished run stays finished, another run's files are not replaced or removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.training.earlier import changed_options
from library.training.plan import Plan
from library.training.saving import KohyaSaving, StepSaving, list_states
from library.training.stop import STOP
from tests.tools.network_runs import NetworkSetting, asked, metadata, names
from tests.tools.runs import RepaSetting, copy_until

Say = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(network_setting: NetworkSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a finished LoRA run that saved no state at its end and has one of an interruption. Copy it first."""
    output = tmp_path_factory.mktemp("trained") / "out"
    with asked(1, STOP, output):
        assert network_setting.train(output, **network_setting.quick) == 75
    assert network_setting.train(output, **network_setting.quick) == 0
    assert "mio-step00000001-state" in names(output) and "mio-state" not in names(output)
    return output


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_finished_run_is_finished_whatever_states_lie_about(
    output: Path, network_setting: NetworkSetting, capsys: Say
) -> None:
    before = contents(output)
    assert network_setting.train(output, **network_setting.quick) == 0
    assert (
        f"{output / 'mio.safetensors'} is the end of this run (step 4). Nothing is left to do."
        in capsys.readouterr().out
    )
    shutil.rmtree(output / "mio-step00000001-state")
    assert network_setting.train(output, **network_setting.quick) == 0
    assert "Nothing is left to do. --overwrite trains it anew." in capsys.readouterr().out
    assert contents(output) == before


def test_states_of_another_run_do_not_hide_that_this_one_is_finished(
    output: Path, network_setting: NetworkSetting, capsys: Say
) -> None:
    state = output / "mio-step00000001-state" / "state.json"
    facts = json.loads(state.read_text())
    state.write_text(json.dumps(facts | {"options": facts["options"] | {"seed": 7}}))
    assert network_setting.train(output, **network_setting.quick) == 0
    assert "mio.safetensors is the end of this run (step 4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001"),
        ({"network_dim": 4, "seed": 7}, "network_dim was 2, is 4; seed was 42, is 7"),
        ({"optimizer_type": "Lion"}, 'optimizer_type was "", is "Lion"'),
        ({"ema_decay": 0.5}, "ema_decay was 0.0, is 0.5"),
        ({"max_train_epochs": 3}, "max_train_epochs was 2, is 3"),
        ({"initial_step": 2}, "initial_step was null, is 2"),
    ],
)
def test_an_adapter_of_other_options_is_not_replaced(
    output: Path, network_setting: NetworkSetting, capsys: Say, changes: dict[str, object], said: str
) -> None:
    before = contents(output)
    options = {**network_setting.quick, **changes}
    assert network_setting.train(output, **options) == 2
    assert capsys.readouterr().err == (
        f"error: {output / 'mio.safetensors'} belongs to a run with other options: {said}. Name another --output_name or "
        "--output_dir, or replace it with --overwrite.\n"
    )
    assert network_setting.train(output, "--dry_run", **options) == 2
    assert contents(output) == before


def test_overwrite_begins_anew_and_an_interruption_of_that_goes_on(
    output: Path, network_setting: NetworkSetting, capsys: Say
) -> None:
    options = {**network_setting.quick, "learning_rate": 1e-3}
    with asked(2, STOP, output):
        assert network_setting.train(output, "--overwrite", **options) == 75
    assert "Stopped at step 2 of 4" in capsys.readouterr().err
    assert network_setting.train(output, "--overwrite", **options) == 0
    assert "mio-step00000002-state at step 2" in capsys.readouterr().out
    assert json.loads(metadata(output / "mio.safetensors")["repa_run"])["options"]["learning_rate"] == 1e-3
    assert network_setting.train(output, **options) == 0
    assert "Nothing is left to do" in capsys.readouterr().out
    assert network_setting.train(output, "--overwrite", **options) == 0
    assert "Nothing is left to do" not in capsys.readouterr().out


def test_an_adapter_of_another_program_is_not_replaced(
    output: Path, network_setting: NetworkSetting, capsys: Say
) -> None:
    file, tensors = output / "mio.safetensors", {"x": torch.zeros(1)}
    same = {"ss_learning_rate": "0.01", "ss_seed": "42", "ss_unet_lr": "None", "ss_lr_warmup_steps": "7"}
    for said, words in (
        (same | {"ss_learning_rate": "0.0005"}, "learning_rate was 0.0005, is 0.01."),
        (
            same | {"ss_mixed_precision": "bf16", "ss_seed": "1"},
            'mixed_precision was "bf16", is "no"; seed was 1, is 42.',
        ),
        (same, "another run, and does not say with which options."),
        ({}, "another run, and does not say with which options."),
    ):
        if said in (same, {}):  # nothing else tells of which run it is
            (output / "options.toml").unlink(missing_ok=True)
        save_file(tensors, file, metadata=said)
        assert network_setting.train(output, **network_setting.quick) == 2
        assert words in capsys.readouterr().err
        assert load_file(file).keys() == tensors.keys()


def test_another_way_to_the_same_folder_is_the_same_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pictures", "others/pictures"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)

    def changes(then: str, now: str) -> list[str]:
        return changed_options({"train_data_dir": then}, {"train_data_dir": now}, frozenset())

    ways = ["pictures", "./pictures", "others/../pictures", "link", str(tmp_path / "pictures")]
    assert not any(changes(then, now) for then in ways for now in ways)
    assert all(changes(str(tmp_path / "others" / "pictures"), now) for now in ways)
    assert changes("gone/pictures", "pictures") and changes("gone", "") and changes("", "pictures")


def test_adapters_of_epochs_are_those_of_a_run_too(network_setting: NetworkSetting, output: Path, capsys: Say) -> None:
    """A run that was killed without a state left them; only a run that would write such names meets them."""
    (output / "mio.safetensors").rename(output / "mio-000001.safetensors")
    shutil.rmtree(output / "mio-step00000001-state")
    assert network_setting.train(output, **{**network_setting.quick, "seed": 7, "save_every_n_epochs": 1}) == 2
    assert "mio-000001.safetensors belongs to a run with other options: seed was 42, is 7." in capsys.readouterr().err
    assert network_setting.train(output, **{**network_setting.quick, "seed": 7, "max_train_epochs": 1}) == 0


def test_without_metadata_the_folder_tells(network_setting: NetworkSetting, tmp_path: Path, capsys: Say) -> None:
    options = {**network_setting.quick, "no_metadata": "", "max_train_epochs": 1}
    for _ in range(2):  # whether it is finished cannot be known
        assert network_setting.train(tmp_path, **options) == 0
    assert "repa_run" not in metadata(tmp_path / "mio.safetensors")
    assert network_setting.train(tmp_path, **options, seed=7) == 2
    assert "mio.safetensors belongs to a run with other options: seed was 42, is 7." in capsys.readouterr().err


def test_what_was_made_of_an_adapter_at_its_place_is_not_replaced(
    network_setting: NetworkSetting, output: Path, tmp_path: Path, capsys: Say
) -> None:
    """Of the same rank, such that no option differs from those of the folder's last run."""
    import merge_lora

    shutil.rmtree(output / "mio-step00000001-state")
    file, source = (
        output / "mio.safetensors",
        Path(shutil.copy(output / "mio.safetensors", tmp_path / "source.safetensors")),
    )
    lora_only = ["--lora_only", "--save_to", str(file), "--overwrite"]
    for more in ([], ["--lora_format", "diffusers"], ["--ratios", "0.5"]):
        assert merge_lora.main(["--models", str(source), *lora_only, *more]) == 0
        made = file.read_bytes()
        assert network_setting.train(output, **network_setting.quick) == 2
        assert "mio.safetensors belongs to a" in capsys.readouterr().err
        assert file.read_bytes() == made
    save_file(load_file(source), file)
    assert network_setting.train(output, **network_setting.quick) == 2, "a file without any metadata"


def test_the_metadata_tell_no_folder_and_stay_with_the_file(output: Path, network_setting: NetworkSetting) -> None:
    import merge_lora

    file, other = output / "mio.safetensors", output / "small.safetensors"
    assert str(network_setting.folder.parent) not in metadata(file)["repa_run"]
    words = ["--models", str(file), "--lora_only", "--new_rank", "1", "--save_to", str(other)]
    assert merge_lora.main(words) == 0 and "repa_run" not in metadata(other)


def test_a_run_of_another_name_keeps_metrics_options_and_page(
    output: Path, network_setting: NetworkSetting, capsys: Say
) -> None:
    before = contents(output)
    options = {**network_setting.quick, "max_train_epochs": 1}
    assert network_setting.train(output, **options, output_name="other") == 0
    now = contents(output)
    assert now["metrics-mio.jsonl"] == before["metrics.jsonl"] and now["options-mio.toml"] == before["options.toml"]
    assert now["run-mio.html"] == before["run.html"] != now["run.html"]
    assert now["mio.safetensors"] == before["mio.safetensors"] and "other.safetensors" in now
    assert network_setting.train(output, "--overwrite", **network_setting.quick) == 0
    assert contents(output)["metrics-other.jsonl"] == now["metrics.jsonl"]


def test_u_repa_follows_the_same_rule(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path, capsys: Say
) -> None:
    output = Path(shutil.copytree(finished_run, tmp_path / "out"))
    for states in (4, 2, 0):
        for step, state in list_states(output):
            if step > states:
                shutil.rmtree(state)
        assert repa_setting.train(output, learning_rate=1e-3) == 2
        said = capsys.readouterr().err
        assert "repa.safetensors belongs to a run with other options: learning_rate was 0.01, is 0.001." in said
        assert "--overwrite" in said
        assert repa_setting.train(output) == 0
        assert "(step 4). Nothing is left to do." in capsys.readouterr().out
    copy_until(finished_run, tmp_path / "states", 2)
    assert repa_setting.train(tmp_path / "states", "--overwrite", learning_rate=1e-3, save_every_n_steps=4) == 0
    assert "resuming" not in capsys.readouterr().out
    assert [step for step, _ in list_states(tmp_path / "states")] == [2, 4], "states of the other run stay"


PLAN = Plan(4, 1, 1, 1, steps_per_epoch=2, last_step=100, warmup_steps=0)
FOREIGN = (
    "mio-1.safetensors", "mio-1-ema.safetensors", "mio-0000001.safetensors", "mio-00001.safetensors", "mio-step1.safetensors",
    "mio-step000000001.safetensors", "mio-step00000001-ema-state", "mio-1-state", "mio-v2.safetensors", "mio-000001.txt",
    "mio-000001", "mio-000001-ema-state", "mio-٠٠٠٠٠١.safetensors", "mio-000001.safetensors.bak", "MIO-000001.safetensors",
    "mio-x-000001.safetensors", "mio-000001-state.old", "amio-000001.safetensors", "step_1", "step_2", "step_000002.old",
)  # fmt: skip
OWN = ("mio-000001.safetensors", "mio-000001-ema.safetensors", "mio-step00000001.safetensors")


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by what was written"])
def test_only_what_a_run_wrote_is_removed(kohya: Callable[..., KohyaSaving], tmp_path: Path, by_name: bool) -> None:
    written = {*OWN, "mio-000001-state"}
    for name in (*FOREIGN, *OWN, "mio-000002.safetensors"):
        (tmp_path / name).mkdir() if name.endswith(("-state", "mio-000001")) else (tmp_path / name).write_text("")
    (tmp_path / "mio-000001-state").mkdir()
    saving = kohya(
        save_every_n_epochs=1, save_last_n_epochs=1, save_every_n_steps=1, save_last_n_steps=1, save_state=True
    )
    saving.prune(6, False, tmp_path / "mio-000003-state", PLAN, None if by_name else written)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*FOREIGN} | (set() if by_name else {"mio-000002.safetensors"}) and (by_name or not written)


def test_no_name_of_a_run_is_too_short(kohya: Callable[..., KohyaSaving], tmp_path: Path) -> None:
    """Counts beyond their digits are written with more."""
    saving = kohya(save_every_n_epochs=1, save_last_n_epochs=1)
    names = [f"mio-{epoch:06d}.safetensors" for epoch in (999_999, 1_000_000, 1_000_001)]
    assert saving.outdated(2_000_002, False, names, PLAN) == sorted(names[:2])
    assert [step for step, _ in list_states(tmp_path)] == []
    for name in ("step_999999", "step_1000000", "step_0000001", "step_5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text('{"step": 1}')
    assert [step for step, _ in list_states(tmp_path)] == [999_999, 1_000_000]


def test_the_newest_written_states_stay_in_the_order_of_steps(tmp_path: Path) -> None:
    from library.options.training import OutputOptions

    saving = StepSaving(OutputOptions(output_dir=tmp_path, save_last_n_states=1))
    written = {"step_999999", "step_1000000", "repa.safetensors"}
    assert saving.outdated(1_000_000, False, written, PLAN) == ["step_999999"]


@pytest.fixture
def kohya(tmp_path: Path) -> Callable[..., KohyaSaving]:
    from library.options.kohya.training import NetworkOutputOptions

    return lambda **changes: KohyaSaving(NetworkOutputOptions(output_dir=tmp_path, output_name="mio", **changes))


def test_files_of_another_run_survive_a_training_that_removes_its_own(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    for name in (*FOREIGN, "mio-step00000001.safetensors"):  # the last by its name this run's, which saves no steps
        (tmp_path / name).write_text(name)
    options = {**network_setting.quick, "max_train_epochs": 3, "save_every_n_epochs": 1, "save_last_n_epochs": 1}
    with asked(4, STOP, tmp_path):
        assert network_setting.train(tmp_path, **options) == 75
    assert network_setting.train(tmp_path, **options) == 0
    assert {*FOREIGN, "mio-step00000001.safetensors"} <= set(names(tmp_path))
    assert {"mio-000002.safetensors", "mio.safetensors"} <= set(names(tmp_path)) and not (tmp_path / OWN[0]).exists()


def test_a_folder_called_save_or_stop_is_no_request(tmp_path: Path) -> None:
    from library.training.stop import NOTHING, Requests

    for name in ("save", "stop"):
        (tmp_path / name).mkdir()
    assert Requests(tmp_path).look() == NOTHING
