"""Several teachers in one run: each has stores and heads of its own, and the first those of a run without the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.evaluation.feature_model import extract_features, read_heads
from library.evaluation.probe_pictures import pictures_of_state
from tests.tools.caches import CacheSetting
from tests.tools.network_runs import Built, NetworkSetting
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows


@pytest.fixture(scope="session")
def other(tiny_dinov2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with other weights."""
    folder = tmp_path_factory.mktemp("teachers") / "other.1"
    shutil.copytree(tiny_dinov2, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for number, value in enumerate(tensors.values()):
        value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def both(repa_setting: RepaSetting, tiny_dinov2: Path, other: Path) -> dict[str, object]:
    return {"dino_model": f"{tiny_dinov2} {other}", "teacher_weights": "3 1", "save_every_n_steps": 2}


@pytest.fixture(scope="session")
def finished_both(repa_setting: RepaSetting, both: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("both") / "out"
    assert repa_setting.train(output, **both, validate_every_n_steps=4) == 0
    return output


def test_a_run_with_two_teachers_has_a_head_and_metrics_of_each(finished_both: Path, repa_setting: RepaSetting) -> None:
    weights = load_file(finished_both / "step_000004" / "align_heads.safetensors")
    layers = ("0.weight", "0.bias", "2.weight")
    assert set(weights) == {f"align_heads.{head}.proj.{name}" for head in ("mid", "mid_other_1") for name in layers}
    rows = metric_rows(finished_both, "train/token")
    for row in rows:
        for loss in ("token", "manifold"):
            first, second = (row[f"align/{name}/{loss}"] for name in ("tiny-dinov2", "other_1"))
            assert row[f"train/{loss}"] == pytest.approx((3 * first + second) / 4, rel=1e-5) and first != second
    last = metric_rows(finished_both, "val/token")[-1]
    assert last["val/token"] == pytest.approx(
        (3 * last["val/align/tiny-dinov2/token"] + last["val/align/other_1/token"]) / 4, rel=1e-5
    )
    for row_set in ("train", "val"):
        assert (repa_setting.folder / "caches" / f"{row_set}_tokens_other_1").is_dir()
    heads = read_heads(finished_both / "step_000004")
    assert heads.teachers == ("tiny-dinov2", "other_1") and list(heads) == ["mid"]


def test_evaluation_measures_the_first_teachers_head_and_says_so(finished_both: Path) -> None:
    pictures = pictures_of_state(finished_both / "step_000004", fit=4, test=4)
    assert "the first, tiny-dinov2; heads of other_1 are not measured." in " ".join(pictures.notes)
    tokens = extract_features(finished_both / "step_000004", torch.zeros(1, 4, 16, 16), torch.zeros(1, 77, 64))
    assert tokens.shape == (1, 16, 64)


@pytest.mark.bits
def test_a_resumed_run_with_two_teachers_is_the_uninterrupted_one(
    finished_both: Path, repa_setting: RepaSetting, both: dict[str, object], tmp_path: Path
) -> None:
    copy_until(finished_both, tmp_path / "out", 2)
    assert repa_setting.train(tmp_path / "out", **both) == 0
    assert_equal_states(finished_both / "step_000004", tmp_path / "out" / "step_000004")


@pytest.mark.bits
def test_lambda_0_with_two_teachers_trains_the_adapter_of_a_run_without_heads(
    repa_setting: RepaSetting, both: dict[str, object], tmp_path: Path
) -> None:
    short = {"max_train_steps": 2, "manifold_mode": "random"}
    assert repa_setting.train(tmp_path / "zero", **both, **short, align_coeff=0.0) == 0
    assert repa_setting.train(tmp_path / "none", "--no_alignment", max_train_steps=2) == 0
    zero, none = (load_file(tmp_path / name / "step_000002" / "lora.safetensors") for name in ("zero", "none"))
    assert zero.keys() == none.keys() and all(torch.equal(zero[name], none[name]) for name in none)


def test_the_first_teachers_store_is_that_of_a_run_without_the_other(
    cache_setting: CacheSetting, tiny_dinov2: Path, other: Path
) -> None:
    alone = cache_setting.build()
    kept = alone.train.stores["tokens"].read("p1").copy()
    found = cache_setting.build(rebuild=False, dino_model=f"{tiny_dinov2} {other}", dino_resolution="56 112")
    assert not any("train_tokens was made differently" in line for line in cache_setting.said)
    assert (found.train.stores["tokens"].read("p1") == kept).all()
    store = found.train.stores["tokens_other_1"]
    assert store.path.name == "train_tokens_other_1" and store.meta.producer["dino_resolution"] == 112
    assert (store.read("p1") != kept).any()


@pytest.fixture(scope="module")
def built(network_setting: NetworkSetting, tiny_dinov2: Path, other: Path) -> Built:
    return network_setting.build(
        alignment="", dino_model=f"{tiny_dinov2} {other}", dino_resolution=56, token_grid=4, align_warmup_steps=2,
        taps="mid enc_last",
    ).stir()  # fmt: skip


@pytest.mark.usefixtures("no_forecast")
def test_a_plan_says_which_teachers_are_missing(
    network_setting: NetworkSetting, tiny_dinov2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = f"facebook/dinov2-nowhere {tiny_dinov2}"
    options = {"alignment": "", "dino_model": names, "dino_resolution": 56, "token_grid": 4}
    assert network_setting.train(tmp_path / "out", "--dry_run", **options) == 0
    said = capsys.readouterr().out
    assert "missing          facebook/dinov2-nowhere" in said and said.count("missing  ") == 1


def test_each_head_learns_the_tokens_of_its_teacher_in_every_bucket(built: Built) -> None:
    assert built.prepared.training.tokens.keys() == {"tiny-dinov2", "other_1"}
    for number in range(3):
        batch = built.batch(number)
        first, second = batch.tokens.values()
        assert first.shape == second.shape and not torch.equal(first, second)
    parts = built.task.losses(batch, torch.Generator().manual_seed(0), 9)
    alone = (parts["align/tiny-dinov2/token"] + parts["align/other_1/token"]) / 2
    assert parts["token"].item() == pytest.approx(alone.item(), rel=1e-6)
    parts["loss"].backward()
    heads = built.task.alignment.heads
    gradients = {name: weight.grad for name, weight in heads.named_parameters()}
    assert len(gradients) == 4 * 3 and all(grad is not None and grad.any() for grad in gradients.values())
    assert {name.partition(".")[0] for name in gradients} == {
        "mid", "enc_last", "mid_other_1", "enc_last_other_1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dino_model": "{dino} {dino}"}, "dino_model has tiny-dinov2 twice."),
        ({"teacher_weights": "1 2 3"}, "teacher_weights has 3 numbers for 2 teachers (dino_model): give one for each"),
        ({"dino_resolution": "56 56 56"}, "dino_resolution has 3 numbers for 2 teachers (dino_model): give one for"),
        ({"teacher_weights": "1 0"}, "teacher_weights must all be positive."),
        ({"dino_resolution": "56 64"}, "patch size 14, got 64. Nearest: 56 and 70. The teacher is "),
        (
            {"manifold_target": "latents", "token_weight": 0},
            "dino_model has no effect with manifold_target latents, which asks no teacher.",
        ),
    ],
)
def test_what_does_not_fit_several_teachers_is_one_sentence(
    network_setting: NetworkSetting, tiny_dinov2: Path, other: Path, tmp_path: Path, changes: dict[str, object], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = {"dino_model": "{dino} {other}", "dino_resolution": 56, "token_grid": 4, "alignment": "", **changes}
    options["dino_model"] = str(options["dino_model"]).format(dino=tiny_dinov2, other=other)
    assert network_setting.train(tmp_path / "out", **options, cache_dir=tmp_path / "caches") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "caches").exists()


def test_a_lone_teacher_of_a_file_of_options_is_a_text_and_its_default_fits_its_patch(tmp_path: Path) -> None:
    from library.options.repa import parse_repa_options

    (tmp_path / "run.toml").write_text('train_data = "x"\ndino_model = "a/b"\ndino_resolution = 224\n')
    options = parse_repa_options(["--dataset_config", str(tmp_path / "run.toml")], prog="x", description=None)
    assert options.model.dino_model == ("a/b",) and options.alignment.dino_resolution == (224,)
    default = parse_repa_options(["--train_data", "x"], prog="x", description=None).alignment
    assert [default.resolution(0, patch) for patch in (14, 16)] == [518, 512]
    assert options.alignment.resolution(0, 16) == 224
    assert json.dumps(options.model.teachers) == '{"b": "a/b"}'
