"""A base whose files say another noise schedule than those of this program is refused by name, in every script."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.diffusion.predictions import FLOW as FLOW_VELOCITY
from library.diffusion.rectified_flow import RectifiedFlow
from library.diffusion.scheduler_config import PARAMETRISATIONS, parametrisation_of
from library.errors import UserError
from library.files import read_json, write_json
from library.models.checkpoint import open_checkpoint
from library.models.load import load_scheduler_config
from library.models.locate import base_status, check_base, locate_base
from networks import prediction_names
from networks.prediction_names import SCHEDULE_NAMES, VARIANCE_PRESERVING_NAME, PredictionName, ScheduleName
from tests.tools.merging import save, single_file

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}
TRAINED = {"prediction_type": "epsilon", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Based = Callable[[dict[str, Any]], Path]


@pytest.fixture
def based(tiny_sd15: Path, tmp_path: Path) -> Based:
    """The tiny base with another scheduler_config.json."""

    def make(config: dict[str, Any]) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_sd15, folder, dirs_exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").unlink()
        write_json(folder / "scheduler" / "scheduler_config.json", config)
        return folder

    return make


@pytest.mark.parametrize("dry", ["", "--dry_run"], ids=["run", "dry"])
@pytest.mark.parametrize(
    "words",
    [
        "train_network --pretrained_model_name_or_path BASE --train_data_dir demo --output_dir OUT --network_dim 2",
        "train_repa --pretrained_model_name_or_path BASE --output_dir OUT",
        "prepare_cache --pretrained_model_name_or_path BASE --train_data demo",
        "generate --pretrained_model_name_or_path BASE --prompt x --output OUT/x.png",
        "merge_lora --pretrained_model_name_or_path BASE --models LORA --output_dir OUT",
        "extract_lora --model_org BASE --model_tuned BASE --save_to OUT.safetensors",
        "evaluate --pretrained_model_name_or_path BASE --checkpoint LORA --output_dir OUT",
        "optimize --pretrained_model_name_or_path BASE --output_dir OUT --n_trials 1",
    ],
    ids=lambda words: words.split()[0],
)
def test_every_script_refuses_a_base_of_another_schedule_by_name(
    words: str, dry: str, based: Based, adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": based(EDM), "LORA": adapter_file, "OUT": tmp_path / "out"}
    for word, path in places.items():
        words = words.replace(word, str(path))
    script, *argv = f"{words} {dry}".split()
    assert importlib.import_module(script).main(argv) == 2
    errors = capsys.readouterr().err.splitlines()
    (error,) = [line for line in errors if line.startswith("error: ")]
    assert f"The scheduler of {places['BASE']} is EDMEulerScheduler (the noise levels of EDM)" in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            FLOW | {"use_dynamic_shifting": True},
            "is FlowMatchEulerDiscreteScheduler (flow matching with a shift that follows",
        ),
        (FLOW | {"shift": 0}, "says shift 0, which is no number above 0"),
        (FLOW | {"prediction_type": "epsilon"}, "says prediction_type 'epsilon'"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "is FlowMatchLCMScheduler (another form of flow matching)"),
        (EDM, "(the noise levels of EDM)"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "(the noise levels of EDM)"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "(a consistency model)"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "(variance-exploding noise)"),
        ({"_class_name": "MyScheduler", **TRAINED}, "is MyScheduler (not known here)"),
        (
            {"_class_name": "UniPCMultistepScheduler", **TRAINED, "use_flow_sigmas": True},
            "says prediction_type 'epsilon'",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", **TRAINED, "timestep_type": "continuous"},
            "EulerDiscreteScheduler (the noise levels of EDM)",
        ),
        ({"_class_name": "DDIMScheduler", **TRAINED, "prediction_type": "sample"}, "says prediction_type 'sample'"),
        ({"_class_name": "DDIMScheduler", **TRAINED, "beta_schedule": "cubic"}, "says beta_schedule 'cubic'"),
        ({"_class_name": ["DDIMScheduler"], **TRAINED}, "is ['DDIMScheduler'] (not known here)"),
        ({"_class_name": "DDIMScheduler", **TRAINED, "beta_start": "0.1"}, "says beta_start '0.1', which is no number"),
        (
            {"_class_name": "DDIMScheduler", **TRAINED, "beta_end": 2.0},
            "says beta_end 2.0, which is no number between 0 and 1",
        ),
        ({"_class_name": "DDIMScheduler", **TRAINED, "num_train_timesteps": 0}, "says num_train_timesteps 0"),
        (
            {"_class_name": "DDIMScheduler", **TRAINED, "trained_betas": [0.1, 0.2]},
            "trained_betas that are not 1000 numbers",
        ),
        ({"prediction_type": "v_prediction"}, "says neither its _class_name nor its betas"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.get("_class_name", "no class"),
)
def test_what_is_no_schedule_of_this_program_is_named(config: dict[str, Any], found: str, based: Based) -> None:
    base = based(config)
    write_json(base / "model_index.json", {"scheduler": [None, None]})
    for ask in (check_base, base_status, locate_base):
        with pytest.raises(UserError) as refused:
            ask(str(base))
        assert f"The scheduler of {base} " in str(refused.value) and found in str(refused.value)
    with pytest.raises(UserError) as refused:
        parametrisation_of(config)
    assert found in str(refused.value)


def test_every_sampler_of_a_known_schedule_is_taken_and_the_schedule_is_its_own(based: Based) -> None:
    expected = parametrisation_of(TRAINED).levels
    for name in sorted(VARIANCE_PRESERVING_NAME.classes):
        check_base(str(based({"_class_name": name, **TRAINED})))
        found = parametrisation_of({"_class_name": name, **TRAINED})
        assert found.levels.timestep(1.0) == expected.timestep(1.0)
    linear = parametrisation_of({"_class_name": "LCMScheduler"})  # whose own betas are those of TRAINED
    assert linear.levels.timestep(1.0) == expected.timestep(1.0)
    assert parametrisation_of({"_class_name": "DDIMScheduler"}).levels.timestep(1.0) != expected.timestep(1.0)


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        (FLOW, 3.0),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, 1.0),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 2.5}, 2.5),
        ({"_class_name": "PNDMScheduler", **TRAINED, "prediction_type": "flow_prediction"}, 1.0),
    ],
    ids=lambda value: None if isinstance(value, float) else value["_class_name"],
)
def test_a_flow_base_is_found_by_its_scheduler_or_by_what_it_predicts(
    config: dict[str, Any], shift: float, based: Based
) -> None:
    check_base(str(based(config)))
    found = parametrisation_of(load_scheduler_config(str(based(config))))
    assert isinstance(found, RectifiedFlow) and found.shift == shift and found.output is FLOW_VELOCITY


def test_every_prediction_of_a_known_schedule_has_its_process() -> None:
    assert list(PARAMETRISATIONS) == [name.scheduler for kind in SCHEDULE_NAMES for name in kind.predictions]


def test_another_schedule_is_a_row_of_the_table(based: Based, monkeypatch: pytest.MonkeyPatch) -> None:
    name = PredictionName("edm_prediction", "edm")
    row = ScheduleName("EDM", frozenset((EDM["_class_name"],)), (name,))
    config = EDM | {"prediction_type": "edm_prediction"}
    monkeypatch.setattr(prediction_names, "SCHEDULE_NAMES", (*SCHEDULE_NAMES, row))
    assert prediction_names.schedule_of(config) == (row, name)
    check_base(str(based(config)))
    assert "v_prediction, flow_prediction and edm_prediction" in str(prediction_names.schedule_of({"_class_name": "X"}))


def test_a_file_without_its_class_is_of_the_one_that_the_index_names(based: Based) -> None:
    base = based({"num_train_timesteps": 1000, **TRAINED})
    check_base(str(base))
    index = read_json(base / "model_index.json")
    (base / "model_index.json").unlink()
    write_json(base / "model_index.json", index | {"scheduler": ["diffusers", "EDMEulerScheduler"]})
    with pytest.raises(UserError, match="is EDMEulerScheduler"):
        check_base(str(base))


@pytest.mark.parametrize("content", ["[]", "3", '"DDIMScheduler"'])
def test_a_scheduler_file_that_is_no_configuration_is_refused(content: str, based: Based) -> None:
    base = based({})
    (base / "scheduler" / "scheduler_config.json").write_text(content)
    with pytest.raises(UserError, match="scheduler_config.json is no configuration"):
        check_base(str(base))


def test_a_value_of_null_is_not_said(based: Based) -> None:
    config = {"_class_name": None, "beta_start": None, "trained_betas": None}
    base = based(config)  # the tiny base's index names PNDM, of which diffusers' defaults are these
    check_base(str(base))
    found, expected = (
        parametrisation_of(load_scheduler_config(str(base))),
        parametrisation_of({"_class_name": "PNDMScheduler"}),
    )
    assert found.levels.timestep(1.0) == expected.levels.timestep(1.0)


def test_the_vae_of_a_base_of_another_schedule_can_be_used(based: Based) -> None:
    assert locate_base(str(based(EDM)), ("vae",)).path.is_dir()


@pytest.mark.parametrize(
    ("said", "expected"),
    [("v", "v_prediction"), ("V_Prediction", "v_prediction"), ("epsilon", "epsilon"), ("flow", "flow_prediction")],
)
def test_a_single_file_predicts_what_its_metadata_says(
    said: str, expected: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    plain = single_file(tiny_sd15, tmp_path / "plain.safetensors")
    told = save(load_file(plain), tmp_path / "told.safetensors", {"modelspec.prediction_type": said})
    assert load_scheduler_config(str(told))["prediction_type"] == expected
    assert open_checkpoint(locate_base(str(told))).marks == (("v_pred",) if expected == "v_prediction" else ())
    marked = save(
        load_file(plain) | {"v_pred": torch.zeros(0)},
        tmp_path / "m.safetensors",
        {"modelspec.prediction_type": "epsilon"},
    )
    assert load_scheduler_config(str(marked))["prediction_type"] == "v_prediction"  # as ComfyUI reads it


def test_a_single_file_that_says_another_prediction_is_refused_by_name(tmp_path: Path) -> None:
    path = save({"x": torch.zeros(1)}, tmp_path / "edm.safetensors", {"modelspec.prediction_type": "edm"})
    for ask in (check_base, base_status, locate_base):
        with pytest.raises(UserError, match="edm.safetensors says prediction_type 'edm'; this program trains epsilon"):
            ask(str(path))
