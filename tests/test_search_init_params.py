"""--init-params: three kinds of files, and what a study on SDXL begins with."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.data.dataset_config import read_dataset_config
from library.errors import UserError
from library.options.search import SdxlOptions
from library.search.best_params import BestParams, Params, write_best_params
from library.search.run.init_params import read_init_params
from library.search.run.sdxl_study import first_trials, fixed_options, start_from_sd15
from library.search.space import Parameter, Space
from library.search.space_file import find_space, read_space
from library.search.to_sdxl.export import export
from library.search.to_sdxl.rules import apply_rules, written_options
from tests.tools.pictures import draw_picture
from tests.tools.sdxl_export import best_params, found_training

SPACE = read_space(find_space("default"))
SDXL_SPACE = read_space(find_space("sdxl"))

# As in the guide: what the ancestor of this project wrote for a trial.
KOHYA = {
    "learning_rate": 0.0003, "network_dim": 64, "network_alpha": 32, "optimizer_type": "AdamW8bit",
    "lr_scheduler": "cosine_with_restarts", "gradient_accumulation_steps": 2, "max_train_epochs": 12,
}  # fmt: skip


def written(folder: Path, content: Any) -> Path:
    path = folder / "params.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def written_best(folder: Path, best: BestParams) -> Path:
    write_best_params(folder / "best_params.json", best)
    return folder / "best_params.json"


# --- three kinds of files ---


def test_all_three_kinds_give_the_same_point_of_the_space(tmp_path: Path) -> None:
    params: Params = {**SPACE.defaults, "network_dim": 32, "text_encoder_ratio": 0.5, "learning_rate": 2e-4}
    best = read_init_params(written_best(tmp_path, best_params(params=params)), SPACE)
    bare = read_init_params(written(tmp_path, params), SPACE)
    nested = read_init_params(written(tmp_path, {"trial": 3, "params": params}), SPACE)
    names = {**KOHYA, "network_dim": 32, "text_encoder_lr": 1e-4, "unet_lr": 2e-4, "learning_rate": 2e-4}
    kohya = read_init_params(written(tmp_path, names), SPACE)
    assert best == bare == nested == params
    assert kohya == {**params, "text_encoder_ratio": pytest.approx(0.5)}


def test_the_guides_params_are_a_point_and_the_rest_is_the_default(tmp_path: Path) -> None:
    found = read_init_params(written(tmp_path, KOHYA), SPACE)
    assert found == {**SPACE.defaults, **KOHYA}
    assert SPACE.objection(found) is None


def test_values_become_the_spaces_own(tmp_path: Path) -> None:
    found = read_init_params(written(tmp_path, {"network_dim": 64.0, "max_train_epochs": 10.0}), SPACE)
    assert (type(found["network_dim"]), type(found["max_train_epochs"])) == (int, int)


def test_unet_lr_is_the_learning_rate(tmp_path: Path) -> None:
    assert read_init_params(written(tmp_path, {"unet_lr": 1e-4}), SPACE)["learning_rate"] == 1e-4
    with pytest.raises(UserError, match="learning_rate 0.0002 and unet_lr 0.0001, but the space has one rate"):
        read_init_params(written(tmp_path, {"unet_lr": 1e-4, "learning_rate": 2e-4}), SPACE)


def test_rates_of_two_text_encoders_are_one_where_they_are_equal(tmp_path: Path) -> None:
    params = {"learning_rate": 2e-4, "text_encoder_lr": [1e-4, 1e-4]}
    assert read_init_params(written(tmp_path, params), SPACE)["text_encoder_ratio"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="text_encoder_lr has 2 different values"):
        read_init_params(written(tmp_path, {**params, "text_encoder_lr": [1e-4, 5e-5]}), SPACE)


def test_a_study_of_another_space_is_read_by_its_options(tmp_path: Path) -> None:
    space = Space("train_network", (Parameter("dim", 16, choices=(16, 64), option="network_dim"),))
    assert read_init_params(written_best(tmp_path, best_params()), space) == {"dim": 64}


# --- refused ---


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"learning_rate": 0.5}, "outside the search space: learning_rate is 0.5; it must lie between"),
        ({"network_dim": 48}, "network_dim is 48; it must be one of 8, 16, 32, 64, 128"),
        ({"optimizer_type": "Prodigy"}, "optimizer_type is 'Prodigy'; it must be one of AdamW8bit"),
        ({"max_train_epochs": 12.5}, "max_train_epochs is 12.5; it must be a whole number"),
        ({"network_dim": True}, "network_dim is True; it must be one of"),
        ({"learning_rates": 1e-4}, r"Not in the search space: learning_rates \(did you mean learning_rate\?\)"),
        ({"lr_warmup_steps": 100}, "gives lr_warmup_steps 100, which is fixed to 0.05 in this study"),
        ({"min_snr_gamma": 5.0}, "gives min_snr_gamma 5.0, which is not searched in this study"),
        ({"learning_rate": None}, "learning_rate is None. Parameters are numbers, strings, true or false"),
        ('{"learning_rate": NaN}', "learning_rate is nan"),
        ({"network_dim": {"low": 1}}, r"network_dim is {'low': 1}"),
        ({}, "has no parameters. Expected"),
        ([1, 2], "has no parameters. Expected"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_is_no_point_of_the_space_is_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_init_params(written(tmp_path, content), SPACE)
    assert re.search(sentence, str(caught.value)) and "params.json" in str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_an_option_that_repeats_what_is_fixed_is_no_error(tmp_path: Path) -> None:
    path = written(tmp_path, {**KOHYA, "min_snr_gamma": 5.0, "lr_warmup_steps": 0.05})
    assert read_init_params(path, SPACE, {"min_snr_gamma": 5.0}) == {**SPACE.defaults, **KOHYA}


# --- a study on SDXL ---


def exported_options(best: BestParams, wishes: SdxlOptions | None = None) -> dict[str, Any]:
    found = found_training(**{**best.train_config})
    return written_options(apply_rules(found, wishes or SdxlOptions()))


def test_the_first_trials_are_points_of_the_shipped_space() -> None:
    for config in (
        {},
        {"network_dim": 8},
        {"text_encoder_lr": 1e-5},
        {"text_encoder_lr": 3e-4},
        {"text_encoder_lr": 0.0},
    ):
        trials = first_trials(best_params(config))
        assert [SDXL_SPACE.objection(trial) for trial in trials] == [None] * len(trials)
        assert len({json.dumps(trial) for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    "config", [{}, {"network_dim": 8, "unet_lr": 1.37e-4}, {"text_encoder_lr": 1e-5, "unet_lr": 2e-4}]
)
def test_the_first_trial_is_the_exact_export(config: dict[str, Any]) -> None:
    best = best_params(config)
    export = exported_options(best)
    options = SDXL_SPACE.resolve(first_trials(best)[0], fixed_options(export, SDXL_SPACE))
    rates = options.pop("text_encoder_lr")
    assert [rates, rates] == export.pop("text_encoder_lr")
    assert options == export


def test_the_second_has_a_smaller_rate_and_the_third_no_text_encoders() -> None:
    best = best_params()
    first, second, third = first_trials(best)
    assert second == {**first, "learning_rate_multiplier": 0.7}
    assert third == {**first, "train_text_encoders": False}
    options = SDXL_SPACE.resolve(second, fixed_options(exported_options(best), SDXL_SPACE))
    assert options["learning_rate"] == options["unet_lr"] == pytest.approx(2.1e-4)
    assert options["text_encoder_lr"] == pytest.approx(1.4e-4)
    assert SDXL_SPACE.resolve(third, fixed_options(exported_options(best), SDXL_SPACE))["text_encoder_lr"] == 0


def test_text_encoders_that_were_off_stay_off_in_the_first_trials() -> None:
    best = best_params({"text_encoder_lr": 0.0})
    first, second = first_trials(best)
    assert first["train_text_encoders"] is second["train_text_encoders"] is False
    fixed = fixed_options(exported_options(best), SDXL_SPACE)
    assert "network_train_unet_only" not in fixed, "later trials may train them"
    assert SDXL_SPACE.resolve(first, fixed)["text_encoder_lr"] == 0


def test_a_study_of_the_text_encoders_alone_has_no_study_on_sdxl() -> None:
    with pytest.raises(UserError, match="trained the text encoders only"):
        first_trials(best_params({"network_train_text_encoder_only": True, "unet_lr": None}))


# --- a study on SDXL with data of its own ---


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a few pictures and nothing of the study on SD1.5."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mio").mkdir()
    for number in range(6):
        draw_picture(tmp_path / "mio" / f"{number}.png", number, 128)
    return tmp_path


def dataset_file(folder: Path, *batches: int) -> str:
    tables = [
        f'[[datasets]]\nresolution = 128\nbatch_size = {batch}\n[[datasets.subsets]]\nimage_dir = "mio"\nnum_repeats = {batch}\n'
        for batch in batches
    ]
    (folder / "mine.toml").write_text("\n".join(tables), encoding="utf-8")
    return "mine.toml"


def started(folder: Path, best: BestParams, dataset: str) -> tuple[int, int, tuple[str, ...]]:
    """The largest batch of the datasets that a study on SDXL begins with, the accumulation, and what is said."""
    start = start_from_sd15(
        written_best(folder, best), SDXL_SPACE, base="tiny-sdxl", folder=folder, dataset_config=dataset, data={}
    )
    found = read_dataset_config(folder / "sdxl_dataset.toml", {})
    return max(one.batch_size for one in found), start.fixed["gradient_accumulation_steps"], start.notes


@pytest.mark.parametrize(
    ("batch", "effective", "wanted"),
    [(8, 16, (4, 4)), (4, 16, (2, 8)), (1, 16, (1, 16)), (32, 16, (4, 4)), (4, 3, (1, 3)), (6, 12, (3, 4))],
)
def test_a_study_on_sdxl_has_the_pictures_per_step_with_which_the_rate_was_found(
    own_data: Path, batch: int, effective: int, wanted: tuple[int, int]
) -> None:
    best = best_params({"dataset_config": "gone.toml"})
    best = replace(best, lr_reference=replace(best.lr_reference, effective_batch=effective))
    *found, notes = started(own_data, best, dataset_file(own_data, batch))
    assert tuple(found) == wanted
    said = f"a step has {effective} pictures, {wanted[0]} x {wanted[1]} (batch x accumulation), with which the learning"
    assert said in notes[1]


def test_datasets_that_cannot_have_those_pictures_per_step_change_the_rate_and_say_so(own_data: Path) -> None:
    best = best_params({"dataset_config": "gone.toml"})
    batch, accumulation, notes = started(own_data, best, dataset_file(own_data, 4, 6))
    assert (batch, accumulation) == (3, 6)
    assert "a step has 18 pictures, 3 x 6" in notes[1] and "found with 16, and is multiplied by the root" in notes[1]


def test_an_export_with_another_dataset_file_says_what_it_did_to_the_batch(own_data: Path) -> None:
    best = best_params({"dataset_config": "gone.toml"})
    made = export(best, sdxl_base="tiny-sdxl", output_dir=own_data, dataset_config=dataset_file(own_data, 4))
    assert made.training.options["gradient_accumulation_steps"] == 8 and made.training.datasets[0].batch_size == 2
    assert any(
        "4 x 2 (batch x accumulation) pictures per step, but learning_rate was found with 16" in one
        for one in made.warnings
    )


@pytest.mark.parametrize(
    "data",
    [
        {"train_data_dir": "gone/train", "reg_data_dir": "gone/reg", "train_batch_size": 8},
        {"train_data_dir": "gone/train", "in_json": "gone/meta.json", "dataset_repeats": 3, "train_batch_size": 8},
        {"train_data_dir": "gone/train", "train_batch_size": 8, "resolution": "128,128", "enable_bucket": True,
         "caption_extension": ".txt", "conditioning_data_dir": "gone/masks", "masked_loss": True},
    ],
)  # fmt: skip
def test_a_study_on_folders_starts_elsewhere_with_a_dataset_file(own_data: Path, data: dict[str, Any]) -> None:
    best = best_params(data)
    *found, _ = started(own_data, best, dataset_file(own_data, 8))
    assert found == [4, 4]
    with pytest.raises(UserError, match="gone"):
        start_from_sd15(
            written_best(own_data, best), SDXL_SPACE, base="tiny-sdxl", folder=own_data, dataset_config=None, data={}
        )
