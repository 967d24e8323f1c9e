"""What trials are judged by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from library.errors import Diverged, UserError
from library.search.held_out_pictures import held_out_count
from library.search.judging import Judging, read_judging
from library.search.trainer import judge_by_loss
from library.search.trainer.build import held_out_pictures
from library.search.trainer.judge_by_loss import (
    BANDS,
    TIMESTEPS,
    LossJudge,
    by_hash,
    compare,
    in_eval_mode,
    timesteps_of,
)
from library.search.trainer.judge_by_pictures import ImageJudge, PictureModels, settled
from library.search.trainer.kept_models import Kept, fingerprint, sharing_copy
from tests.tools.network_runs import Built, NetworkSetting


@pytest.fixture(scope="module")
def built(network_setting: NetworkSetting) -> Iterator[Built]:
    """U-Net and text encoder with adapters, three pictures in one bucket. Put back what you change."""
    config = network_setting.dataset("few", folder=network_setting.few, dataset="resolution = 64\nbatch_size = 1")
    built = network_setting.build(dataset_config=config)
    yield built
    built.close()


def judge_of(built: Built) -> LossJudge:
    task = built.task
    return LossJudge(held_out_pictures(task, task.training), task.objective, task.models, task.network.disabled)


@pytest.fixture
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_by_loss, "NOISES_OF_FEW", 1)


@pytest.mark.bits
@pytest.mark.usefixtures("few_passes")
def test_adapter_at_zero_has_exactly_the_value_0_and_any_other_has_not(built: Built) -> None:
    judge = judge_of(built)
    at_zero = judge(1)
    assert at_zero.value == 0.0 and set(at_zero.components) == set(BANDS)
    assert all(value == 0.0 for value in at_zero.components.values())
    before = {name: p.detach().clone() for name, p in built.task.network.parameters.items()}
    try:
        built.stir(0.3)
        first, again = judge(2), judge(3)
        assert first.value != 0.0 and first == again
        assert first.value == pytest.approx(sum(first.components.values()) / len(BANDS))
        assert judge_of(built)(1) == first  # the base's losses are the base's whatever the adapter is
    finally:
        with torch.no_grad():
            for name, parameter in built.task.network.parameters.items():
                parameter.copy_(before[name])


@pytest.mark.bits
@pytest.mark.usefixtures("few_passes")
def test_measuring_leaves_no_trace(built: Built) -> None:
    judge, task = judge_of(built), built.task
    modes = [module.training for model in task.models.values() for module in model.modules()]
    state, weights = torch.get_rng_state(), [fingerprint(model) for model in task.models.values()]
    judge(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for model in task.models.values() for module in model.modules()] == modes
    assert [fingerprint(model) for model in task.models.values()] == weights
    assert all(p.grad is None for p in task.network.parameters.values())


@pytest.mark.usefixtures("few_passes")
def test_losses_of_the_base_are_measured_once(built: Built) -> None:
    task, known = built.task, dict[str, torch.Tensor]()
    pictures = held_out_pictures(task, task.training)
    LossJudge(pictures, task.objective, task.models, task.network.disabled, known)
    assert len(known) == 3

    def refuse() -> None:
        raise AssertionError("the base was measured again")

    LossJudge(pictures, task.objective, task.models, refuse, known)  # type: ignore[arg-type]


@pytest.mark.bits
def test_sdxl_at_zero_has_exactly_the_value_0(sdxl_setting: NetworkSetting, few_passes: None) -> None:
    built = sdxl_setting.build(**sdxl_setting.quick)
    try:
        assert judge_of(built)(1).value == 0.0
    finally:
        built.close()


def test_twice_the_loss_is_log_2_in_every_band() -> None:
    base = {"a": torch.rand(TIMESTEPS).double() + 0.1, "b": torch.rand(TIMESTEPS).double() + 0.1}
    measured = compare({name: 2 * losses for name, losses in base.items()}, base)
    assert measured.value == pytest.approx(math.log(2))
    assert measured.components == pytest.approx(dict.fromkeys(BANDS, math.log(2)))


def test_loss_that_is_no_number_is_divergence_and_says_of_which_picture() -> None:
    base = {"a": torch.ones(TIMESTEPS).double(), "b": torch.ones(TIMESTEPS).double()}
    with pytest.raises(Diverged, match="held-out picture b"):
        compare(base | {"b": torch.full((TIMESTEPS,), math.nan).double()}, base)


@given(name=st.text(max_size=20), timesteps=st.sampled_from([100, 1000]))
def test_each_part_of_the_schedule_has_one_timestep(name: str, timesteps: int) -> None:
    chosen = timesteps_of(name, timesteps)
    for part, timestep in enumerate(chosen.tolist()):
        assert part * timesteps // TIMESTEPS <= timestep < (part + 1) * timesteps / TIMESTEPS


@given(names=st.sets(st.text(max_size=6), min_size=1, max_size=30), count=st.integers(1, 30))
def test_choice_by_hash_of_fewer_is_part_of_the_choice_of_more(names: set[str], count: int) -> None:
    ordered = sorted(names)
    chosen, more = by_hash(ordered, str, count), by_hash(ordered, str, count + 1)
    assert set(chosen) <= set(more) and chosen == [name for name in ordered if name in chosen]
    assert set(by_hash(reversed(ordered), str, count)) == set(chosen)


def test_a_tenth_is_held_out_and_two_at_least() -> None:
    assert [held_out_count(n) for n in (3, 20, 21, 100)] == [2, 2, 3, 10]


# ---------------------------------------------------------------------------------------------------- what is shared


def test_sharing_copy_shares_weights_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.requires_grad_(False)
    before, copy = fingerprint(model), sharing_copy(model)
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in model.parameters()]
    copy[0].weight.requires_grad_(True)
    copy[0] = nn.Linear(3, 4)
    copy.register_forward_hook(lambda *_: None)
    copy.to(torch.float16)
    copy.eval()
    assert fingerprint(model) == before and model.training and not model._forward_hooks
    assert not any(p.requires_grad for p in model.parameters()) and model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    model = nn.Linear(64, 64).to(dtype)
    before = fingerprint(model)
    bits = model.weight.data.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[7, 7] ^= 1
    assert fingerprint(model) != before


def test_what_is_kept_is_closed_before_another_is_made() -> None:
    said: list[str] = []
    kept: Kept[str] = Kept(close=lambda value: said.append(f"close {value}"))

    def make(name: str) -> str:
        said.append(f"make {name}")
        return name

    assert [kept.get([1], lambda: make("a")), kept.get([1], lambda: make("b"))] == ["a", "a"]
    assert kept.get([2], lambda: make("c")) == "c"
    assert said == ["make a", "close a", "make c"]


def test_eval_mode_ends_as_it_began() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with in_eval_mode([model]):
        assert not model[1].training
    assert not model[0].training and model[1].training


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.bits
def test_picture_objective_is_0_for_the_base_and_keeps_its_pictures(
    built: Built, tiny_dinov2: Path, tmp_path: Path
) -> None:
    from library.evaluation.picture_encoders import DinoPictures
    from library.inference.drawing_model import DrawingModel, load_drawing_vae
    from networks.families import UNET

    task, prepared = built.task, built.prepared
    vae = load_drawing_vae(prepared.base, prepared.family, dtype=torch.float32, device="cpu")
    assert task.text.conditioner is not None
    parts = task.text.conditioner.parts

    def drawing() -> DrawingModel:
        parametrisation = task.objective.parametrisation
        return DrawingModel(prepared.family, task.models[UNET], parts, vae, parametrisation, torch.float32)

    photos = [Image.open(one.image.path).convert("RGB") for one in prepared.data.training]
    judging = Judging(("a red cat",), ("a blue box",), seeds=2, steps=2, size=64)
    known: dict[str, object] = {}
    models = PictureModels(DinoPictures(str(tiny_dinov2)), None, vae)
    judge = ImageJudge(judging, models, task, drawing, photos, tmp_path, known)  # type: ignore[arg-type]
    state, measured = torch.get_rng_state(), judge(5)
    assert measured.value == 0.0 and measured.components["drift"] == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list((tmp_path / "realtime_evaluations" / "slot_05").glob("subject_*.png"))) == 2
    assert judge.slots == {5, 10}
    before = {name: p.detach().clone() for name, p in task.network.parameters.items()}
    try:
        built.stir(0.5)
        changed = judge(10)
    finally:
        with torch.no_grad():
            for name, parameter in task.network.parameters.items():
                parameter.copy_(before[name])
    parts_of_it = changed.components
    assert parts_of_it["drift"] > 0
    assert changed.value == pytest.approx(0.5 * parts_of_it["drift"] - parts_of_it["likeness_gain"])


def test_settings_of_the_picture_objective_are_checked() -> None:
    with pytest.raises(UserError, match="setting stepz"):
        read_judging({"stepz": 3})
    with pytest.raises(UserError, match="steps of the objective image must be at least 1, got 0"):
        read_judging({"steps": 0})
    assert settled(read_judging({"steps": 3}), "tiny-sd15", ["a (b)", "a (b)"]).prompts == (r"a \(b\)",)
    with pytest.raises(UserError, match="Give it prompts"):
        settled(Judging(), "tiny-sd15", [""])
