"""optimize.py --dry_run finds everything that the real run would refuse, and what its trials would be refused for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

import optimize
import train_network
from library.errors import EXIT_BAD_INPUT
from library.models.embedded import MODELS
from library.options.network import TrainNetworkOptions
from library.processes import usable_device
from library.search.space_file import find_space, read_space
from tests.test_optimize import arguments
from tests.tools.pictures import draw_picture

RATE = {"learning_rate": "low = 1e-4\nhigh = 1e-2\nlog = true\ndefault = 1e-3"}


def written_space(folder: Path, parameters: dict[str, str], script: str = "train_network") -> str:
    """A small search space, as --space takes it: a configuration takes a tenth of a second to check."""
    tables = [f"[parameters.{name}]\n{table}\n" for name, table in parameters.items()]
    (folder / "space.toml").write_text(f'script = "{script}"\n' + "\n".join(tables), encoding="utf-8")
    return str(folder / "space.toml")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of the error of a dry run, which writes nothing."""
    assert optimize.main(arguments(folder, *words, "--dry_run")) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.startswith("error: ") and not list(folder.glob("out/*"))
    return said.removeprefix("error: ").strip().splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "xpu", "npu"])
def test_a_device_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    (said,) = refused(tmp_path, capsys, "--device", device, "--space", written_space(tmp_path, RATE))
    assert f"--device {device} " in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_the_configuration_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text('device = "cuda"\n')
    (said,) = refused(tmp_path, capsys, "--config_file", str(config), "--space", written_space(tmp_path, RATE))
    assert "--device cuda was asked for, but this machine has no usable CUDA device" in said


def test_long_checks_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.search.run import checks

    said: list[str] = []
    monkeypatch.setattr(checks, "TOLD_AFTER", 0.01)
    for _ in checks._told(range(3), "options", said.append):
        time.sleep(0.02)
    assert said == ["checking   options: 1 of 3", "checking   options: 2 of 3"]


def test_a_gpu_beyond_the_last_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.errors import UserError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_device("cuda:0") == torch.device("cuda:0") and usable_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"this machine has 1 CUDA device, counted from 0\."):
        usable_device("cuda:1")


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        (
            {"optimizer_type": 'choices = ["AdamW", "AdamX"]\ndefault = "AdamW"'},
            "A trial with optimizer_type AdamX would be refused: optimizer_type AdamX is unknown",
        ),
        (
            {"lr_scheduler": 'choices = ["cosine", "cosinus"]\ndefault = "cosine"'},
            "lr_scheduler is 'cosinus': input should be 'cosine'",
        ),
        (
            {"lr_scheduler_type": 'choices = ["StepLRR", ""]\ndefault = ""'},
            "A trial with lr_scheduler_type StepLRR would be refused: lr_scheduler_type StepLRR is no scheduler of torch",
        ),
        ({"network_dim": "choices = [0, 4]\ndefault = 4"}, "network_dim must be positive, got 0."),
        ({"network_dimm": "choices = [2, 4]\ndefault = 4"}, "did you mean network_dim?"),
        (
            {"network_args": 'choices = ["algo=lora", "algo=lohx"]\ndefault = "algo=lora"'},
            "network_args algo=lohx: expected lora, dora, loha, lokr, oft.",
        ),
        (
            {"min_timestep": "low = 0\nhigh = 2000\ndefault = 0"},
            "A trial with min_timestep 2000 would be refused: min_timestep must lie between 0 and 999",
        ),
    ],
)
def test_a_choice_that_no_trial_could_be_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], space: dict[str, str], sentence: str
) -> None:
    (said,) = refused(tmp_path, capsys, "--space", written_space(tmp_path, space))
    assert sentence in said and "train_config.toml" not in said


def test_several_faults_are_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = dict.fromkeys(("network_dim", "gradient_accumulation_steps"), "choices = [-2, 4]\ndefault = 4")
    first, second = refused(tmp_path, capsys, "--space", written_space(tmp_path, space))
    assert "network_dim -2" in first and "gradient_accumulation_steps -2" in second


def test_a_fixed_adapter_that_does_not_fit_is_refused_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    keys = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    weights = {f"{keys}.lora_down.weight": torch.zeros(4, 7), f"{keys}.lora_up.weight": torch.zeros(7, 4)}
    save_file({**weights, f"{keys}.alpha": torch.tensor(4.0)}, tmp_path / "start.safetensors")
    config = tmp_path / "config.toml"
    config.write_text(f"network_weights = '{tmp_path / 'start.safetensors'}'\n", encoding="utf-8")
    words = ["--config_file", str(config), "--space", written_space(tmp_path, RATE)]
    assert len(refused(tmp_path, capsys, *words)) == 1


def test_a_base_whose_file_is_torn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(MODELS / "tiny-shapes", tmp_path / "base")
    file = base / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "mio").mkdir()
    for number in range(4):
        draw_picture(tmp_path / "mio" / f"{number}.png", number)
    data = tmp_path / "data.toml"
    data.write_text(f'[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = "{tmp_path / "mio"}"\n')
    words = ["--base-model", str(base), "--dataset-config", str(data), "--space", written_space(tmp_path, RATE)]
    (said,) = refused(tmp_path, capsys, *words)
    assert "model.safetensors" in said and "is not a whole safetensors file" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--storage", "sqlite:///file/x.db"], "The storage file/x.db cannot be created: "),
        (["--storage", "journal:file/x.log"], "The storage file/x.log cannot be created: "),
        (["--storage", "sqlite:///folder"], "The storage folder is a folder. Name a file."),
        (["--storage", "sqlite:///file"], "file is not a database"),
        (["--storage", "journal:file"], "The journal file is damaged and cannot be read"),
        (["--output-dir", "file", "--storage", "sqlite:///x.db"], "file cannot be written to: file is a file."),
        (["--output-dir", "other"], "other has trials of another study: mio has no trials yet."),
        (["--workers", "2", "--device", "cuda:0"], "--device cuda:0 is one GPU"),
        (["--objective", "image", "--objective_args", "dino_model=nowhere"], "nowhere does not exist"),
        (
            ["--objective", "image", "--objective_args", "clip_model=nowhere"],
            "nowhere is not a folder with a CLIPModel",
        ),
        (["--objective", "image", "--objective_args", "size=100"], "must be a multiple of 8"),
        (["--export", "--sdxl_base", "nowhere"], "The SDXL base cannot be checked: nowhere does not exist"),
    ],
)
def test_a_place_or_a_model_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{no storage\n" * 50)
    (tmp_path / "folder").mkdir()
    (tmp_path / "other" / "trial_0001").mkdir(parents=True)
    (said,) = refused(tmp_path, capsys, *words, "--space", written_space(tmp_path, RATE))
    assert sentence in said


def test_the_weights_of_the_base_are_hashed_where_a_study_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.search.run import setup

    hashes = iter(["a", "b"])
    monkeypatch.setattr(setup, "base_hash", lambda base, cache_dir: next(hashes))
    from tests.tools.search import FakeTrainer

    monkeypatch.setattr("library.search.trainer.parent_side.TrainerProcess", lambda env, log: FakeTrainer())
    space = {**RATE, "network_dim": "choices = [4, 8]\ndefault = 4"}
    words = arguments(tmp_path, "--n-trials", "1", "--space", written_space(tmp_path, space))
    assert optimize.main(words) == 0
    capsys.readouterr()
    assert optimize.main([*words, "--dry_run"]) == 2
    assert "on other weights of the base" in capsys.readouterr().err


def test_a_study_of_train_repa_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(scope: str) -> list[str]:
        space = {"lora_scope": f'choices = ["mid", "{scope}"]\ndefault = "mid"'}
        return ["--script", "train_repa", "--space", written_space(tmp_path, space, "train_repa")]

    assert optimize.main(arguments(tmp_path, *words("all"), "--dry_run")) == 0
    capsys.readouterr()
    (said,) = refused(tmp_path, capsys, *words("middle"))
    assert "A trial with lora_scope middle would be refused" in said


def test_what_is_fixed_for_one_schedule_is_left_out_of_trials_with_another() -> None:
    space = read_space(find_space("default"))
    fixed = {"lr_scheduler_num_cycles": 2, "lr_scheduler_power": 2.0, "min_snr_gamma": 5.0}
    for schedule, left in (("cosine", {}), ("polynomial", {"lr_scheduler_power": 2.0})):
        options = space.resolve({**space.defaults, "lr_scheduler": schedule}, fixed)
        assert {name: value for name, value in options.items() if name in fixed} == {**left, "min_snr_gamma": 5.0}


def test_a_study_on_sdxl_is_checked_with_the_export_that_a_dry_run_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guide.json").write_text('{"learning_rate": 0.0003, "network_dim": 64}')
    space = tmp_path / "space.toml"
    rate = '[parameters.learning_rate_multiplier]\noption = "learning_rate"\ntimes = ["learning_rate"]\n'
    space.write_text(f"{rate}low = 0.5\nhigh = 2.0\ndefault = 1.0\n")
    words = ["--base-model", "tiny-sdxl", "--init-params", "guide.json", "--space", str(space), "--dry_run"]
    assert optimize.main(arguments(tmp_path, *words)) == 0
    assert "a step has 8 pictures" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_the_neighbours_of_the_default_are_all_choices_and_both_ends() -> None:
    space = read_space(find_space("sdxl"))
    words = [name for name, _ in space.neighbours()]
    assert words == [
        *("learning_rate_multiplier 0.25", "learning_rate_multiplier 2.0", "network_dim 96", "network_dim 128"),
        *("text_encoder_ratio 0.5", "text_encoder_ratio 0.8", "train_text_encoders false"),
    ]
    assert all(space.objection(params) is None for _, params in space.neighbours())


def test_what_lies_where_the_script_itself_would_write_does_not_matter(
    tmp_path: Path, adapter_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = TrainNetworkOptions().output
    output.output_dir.mkdir(parents=True)
    shutil.copy(adapter_file, output.output_dir / f"{output.output_name}.safetensors")
    assert train_network.main(["--dry_run"]) == EXIT_BAD_INPUT
    assert optimize.main(arguments(tmp_path, "--dry_run")) == 0
