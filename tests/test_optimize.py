"""optimize.py: what it refuses before the first trial, and a study of fake trainings from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import optimize
from library.search.trainer import parent_side
from tests.tools.search import FakeTrainer

WORDS = ["--no_sheet", "--no_export", "--sampler", "random", "--confirm", "0"]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--output-dir", str(folder / "out"), "--study-name", "mio", *WORDS, *more]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(env: Any, log: Any) -> FakeTrainer:
        return FakeTrainer()

    monkeypatch.setattr(parent_side, "TrainerProcess", trainer)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--n-trials", "0"], "n_trials must be at least 1, got 0."),
        (["--n_trials", "-3"], "n_trials must be at least 1, got -3."),
        (["--base-model", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--space", "nosuch"], "no search space nosuch"),
        (["--objective_args", "steps=3"], "objective_args are settings of the objective image"),
        (
            ["--objective", "image", "--objective_args", "stepz=3"],
            "The setting stepz of the objective image is unknown (did",
        ),
        (["--n-trails", "3"], "did you mean n_trials?"),
        (["--seed", "-1"], "seed must be a whole number from 0"),
        (["--device", "nonsense"], "device must be one of cpu, cuda"),
        (["--storage", "foo://x"], "--storage foo://x is not a storage"),
        (["--script", "train_repa", "--objective", "image"], "train_repa.py has classes"),
        (["--script", "train_repa", "--dataset-config", "repa.toml"], "nowhere"),
        (["statsu"], "did you mean status?"),
        (
            ["status", "--study-name", "mio-confirm"],
            "must not end with -confirm, got 'mio-confirm': mio trains its best again under that name",
        ),
        (["pick"], "name the number of a trial"),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repa.toml").write_text('train_data = "nowhere.csv"\n')
    given = words if words[0][0] != "-" else arguments(tmp_path, *words, "--dry_run")
    assert optimize.main(given) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("out/trial_*"))


def test_an_unknown_key_of_a_space_is_named_with_its_neighbour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.toml"
    space.write_text("[parameters.learning_rte]\nlow = 1e-5\nhigh = 1e-3\ndefault = 1e-4\n")
    assert optimize.main(arguments(tmp_path, "--space", str(space))) == 2
    assert "did you mean learning_rate?" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimize.main(arguments(tmp_path, "--dry_run", "--n-trials", "5")) == 0
    assert "searches   learning_rate" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_study_runs_resumes_and_is_looked_at_from_the_command_line(
    tmp_path: Path, fake: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimize.main(arguments(tmp_path, "--n-trials", "5")) == 0
    out = tmp_path / "out"
    best = json.loads((out / "best_params.json").read_text())
    assert (out / "report.html").stat().st_size > 100_000
    assert len(list(out.glob("trial_*"))) == 5 and best["study"] == "mio" and best["dataset"]
    assert len(best["base_model"]["sha256"]) == 64 and sum(best["objective"]["scales"].values()) == pytest.approx(1)
    place = ["--output-dir", str(out), "--study-name", "mio"]
    capsys.readouterr()

    assert optimize.main(["status", *place]) == 0
    assert "trial 5/5" in capsys.readouterr().out
    other = next(n for n in range(1, 6) if n != best["trial"])
    assert optimize.main(["pick", str(other), *place]) == 0
    assert json.loads((out / "best_params.json").read_text())["trial"] == other

    # The same command goes on to the new total, and a study of another objective is refused.
    assert optimize.main(arguments(tmp_path, "--n-trials", "6")) == 0
    assert len(list(out.glob("trial_*"))) == 6
    for more in ([], ["--dry_run"]):
        assert optimize.main(arguments(tmp_path, "--objective", "image", *more)) == 2
        assert "is judged by loss, not image" in capsys.readouterr().err


def test_what_a_configuration_says_in_vain_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "learning_rate = 1e-4\nunet_lr = 1e-4\nseed = 3\nsave_state = true\nlr_scheduler = 'cosine_with_restarts'\n"
        "lr_scheduler_num_cycles = 2\nmin_snr_gamma = 5.0\n"
    )
    words = ["--config_file", str(config), "--space", "default", "--dry_run"]
    assert optimize.main(arguments(tmp_path, *words)) == 0
    said = capsys.readouterr().out
    assert "searched, so not taken from the configuration: learning_rate, unet_lr, lr_scheduler\n" in said
    assert "set by lr_scheduler cosine_with_restarts" in said and "there: lr_scheduler_num_cycles" in said
    assert "seed is the study's" in said and "set by each trial itself" in said and "save_state" in said
    assert "min_snr_gamma" not in said


# --- from SD1.5 to SDXL ---

KOHYA = {
    "learning_rate": 0.0003, "network_dim": 64, "network_alpha": 32, "optimizer_type": "AdamW8bit",
    "lr_scheduler": "cosine_with_restarts", "gradient_accumulation_steps": 2, "max_train_epochs": 12, "min_snr_gamma": 5,
}  # fmt: skip


def plan_of(folder: Path, content: dict[str, Any], *more: str) -> Any:
    from library.options.parser import parse
    from library.options.search import DIALECT, OptimizeOptions
    from library.search.run.setup import set_up

    (folder / "guide.json").write_text(json.dumps(content))
    words = arguments(folder, "--base-model", "tiny-sdxl", "--init-params", str(folder / "guide.json"), *more)
    return set_up(parse(OptimizeOptions, words, prog="optimize.py", description=None, dialect=DIALECT)).plan


def test_a_bare_table_starts_the_small_study_on_sdxl(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, KOHYA)
    first, second, third = plan.initial
    assert plan.n_trials == 15 and plan_of(tmp_path, KOHYA, "--n-trials", "7").n_trials == 7
    assert (
        first["learning_rate_multiplier"] == 1 and first["network_dim"] == 64 and first["train_text_encoders"] is True
    )
    assert second == {**first, "learning_rate_multiplier": 0.7} and third == {**first, "train_text_encoders": False}
    options = plan.terms.options
    wanted = {"mixed_precision": "bf16", "gradient_checkpointing": True, "learning_rate": 3e-4, "max_train_epochs": 15}
    wanted |= {"lr_warmup_steps": 0.05, "lr_scheduler_num_cycles": 3, "min_snr_gamma": 5, "network_alpha": 32}
    assert {name: options[name] for name in wanted} == wanted
    text = Path(options["dataset_config"]).read_text()
    assert "resolution = 256" in text and "guide.json" in text, "twice the tiny base's 128"


@pytest.mark.parametrize(
    ("change", "more", "sentence"),
    [
        ({"network_dim": 48}, [], "network_dim is 48; it must be one of"),
        ({"learning_rates": 1}, [], "did you mean learning_rate?"),
        ({"lr_warmup_steps": 100}, [], "gives lr_warmup_steps 100 in steps"),
        ({"output_dir": "x"}, [], "where or on what one training ran"),
        ({"network_args": "algo"}, [], "network_args"),
        ({}, ["--config_file", "a.toml"], "a.toml"),
    ],
)
def test_a_table_that_cannot_be_carried_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], more: list[str], sentence: str
) -> None:
    from library.errors import UserError

    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, {**KOHYA, **change}, *more)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_edited_space_is_used_and_must_have_room_for_the_export(tmp_path: Path) -> None:
    from library.errors import UserError
    from library.search.space_file import find_space

    space, text = tmp_path / "mine.toml", find_space("sdxl").read_text()
    space.write_text(text.replace("[64, 96, 128]", "[32, 64]"))
    plan = plan_of(tmp_path, KOHYA, "--space", str(space))
    assert len(plan.initial) == 3 and plan.terms.options["mixed_precision"] == "bf16"
    # Without the rank it is fixed to the export's.
    begin, end = text.index("[parameters.network_dim]"), text.index("[parameters.text_encoder_ratio]")
    space.write_text(text[:begin] + text[end:])
    plan = plan_of(tmp_path, KOHYA, "--space", str(space))
    assert "network_dim" not in plan.initial[0] and plan.terms.options["network_dim"] == 64
    with pytest.raises(UserError, match="is outside the search space: network_dim is 16; it must be one of 64"):
        plan_of(tmp_path, {**KOHYA, "network_dim": 16, "network_args": ["algo=lokr"]})


def test_a_study_on_sdxl_goes_on_from_another_folder_of_its_own(tmp_path: Path, fake: None) -> None:
    (tmp_path / "guide.json").write_text(json.dumps(KOHYA))
    words = ["--base-model", "tiny-sdxl", "--init-params", str(tmp_path / "guide.json")]
    words += ["--storage", f"journal:{tmp_path / 'study.log'}", "--study-name", "mio", *WORDS]
    for number, folder in enumerate(("one", "two"), start=1):
        assert optimize.main(["--output-dir", str(tmp_path / folder), "--n-trials", str(number), *words]) == 0


def test_picking_keeps_the_wishes_of_the_export(tmp_path: Path, fake: None) -> None:
    assert optimize.main(arguments(tmp_path, "--n-trials", "3")) == 0
    place = ["--output-dir", str(tmp_path / "out"), "--study-name", "mio"]
    wishes = ["--sdxl_dim", "96", "--max_batch", "1", "--base-model", "tiny-sdxl"]
    assert optimize.main(["export", *place, *wishes]) == 0
    config = tmp_path / "out" / "sdxl_config.toml"
    assert "network_dim = 96" in config.read_text() and "# No winner" in config.read_text()
    assert optimize.main(["pick", "2", *place]) == 0
    assert "network_dim = 96" in config.read_text() and "trial 2 of the study mio" in config.read_text()
    assert "picked by a person" in config.read_text()
    assert "batch_size = 1" in (tmp_path / "out" / "sdxl_dataset.toml").read_text()
