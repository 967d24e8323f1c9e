"""Representations of a trained state beside their baselines: which pictures, which features, and that the numbers are theirs."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch

from library.diffusion.alignment_losses import spatially_normalised
from library.errors import UserError
from library.evaluation.block_pictures import find_pictures
from library.evaluation.feature_model import FeatureModel, load_feature_model, load_folded_model, read_heads
from library.evaluation.probe_pictures import ProbePictures, StoredPictures, open_probe_pictures, pictures_of_state
from library.evaluation.representation import (
    RepresentationResult,
    RepresentationSettings,
    evaluate_representation,
    evaluate_states,
)
from library.evaluation.representation_measures import meaning
from library.evaluation.similarity import token_cosine
from library.evaluation.tap_features import TapFeatures, features_at_tap
from library.options.data import ClassCacheOptions, ClassPictureOptions
from library.training.state import list_states
from networks.features import capture
from tests.tools.runs import RepaSetting

SETTINGS = RepresentationSettings(
    timesteps=(50, 400), seeds=(0, 1), neighbours=2, recall_at=(1, 10), batch_size=4, pictures=2
)


@pytest.fixture(scope="module")
def state(finished_run: Path) -> Path:
    return finished_run / "step_000004"


@pytest.fixture(scope="module")
def pictures(state: Path) -> ProbePictures:
    return pictures_of_state(state, fit=100, test=100)


@pytest.fixture(scope="module")
def model(state: Path) -> FeatureModel:
    return load_feature_model(state)


@pytest.fixture(scope="module")
def result(state: Path) -> RepresentationResult:
    return evaluate_representation(state, SETTINGS)


def look(
    model: FeatureModel, pictures: ProbePictures, *, seed: int = 0, batch_size: int = 4, tap: str = "mid"
) -> TapFeatures:
    return features_at_tap(
        model, pictures.test.samples, pictures.empty_prompt, tap=tap, timestep=261, seed=seed, batch_size=batch_size
    )


# ------------------------------------------------------------------------------------------------ pictures


def test_the_pictures_of_a_state_are_those_it_was_trained_and_validated_on(pictures: ProbePictures) -> None:
    assert sorted(pictures.fit.ids) == [f"p{i}" for i in range(8)]
    assert set(pictures.test.ids) == {f"p{i}" for i in range(8, 12)} and len(pictures.test) == 4
    for one in (pictures.fit, pictures.test):
        assert one.labels.tolist() == [int(name[1:]) % 2 for name in one.ids]
        assert one.teacher(batch_size=3).shape == (len(one), 16, 64)
        assert one.photo(0).size == (128, 128)
    assert pictures.notes == []


def test_fewer_pictures_are_chosen_by_their_ids(state: Path, pictures: ProbePictures) -> None:
    few = pictures_of_state(state, fit=3, test=2)
    assert (len(few.fit), len(few.test)) == (3, 2)
    place = pictures.fit.ids.index(few.fit.ids[0])
    torch.testing.assert_close(few.fit.teacher()[0], pictures.fit.teacher()[place])


def test_the_prompt_is_the_empty_one(pictures: ProbePictures, repa_setting: RepaSetting) -> None:
    from library.data.text_embeddings import read_text_embeddings

    text = read_text_embeddings(repa_setting.folder / "caches" / "text_embeddings.safetensors")
    assert torch.equal(pictures.empty_prompt, text.embeddings[-1])


def with_facts(state: Path, target: Path, **changes: object) -> Path:
    """A copy of a state whose state.json says otherwise; None takes an entry out, options are joined."""
    shutil.copytree(state, target)
    facts = json.loads((target / "state.json").read_text())
    options = facts["options"] | changes.pop("options", {})  # type: ignore[operator]
    facts = {name: value for name, value in (facts | changes).items() if value is not None} | {"options": options}
    (target / "state.json").write_text(json.dumps(facts))
    return target


def test_a_run_without_held_out_pictures_is_refused(state: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="the training had no val_data. Give val_data, and build its caches with prepare_cache"
    ):
        pictures_of_state(with_facts(state, tmp_path / "s", options={"val_data": None}), fit=9, test=9)


def test_absent_caches_are_refused(state: Path, tmp_path: Path, repa_setting: RepaSetting) -> None:
    shutil.copytree(repa_setting.folder / "caches", tmp_path / "caches", ignore=shutil.ignore_patterns("val_tokens"))
    with pytest.raises(UserError, match=r"no LMDB store at .*val_tokens. prepare_cache.py builds one"):
        pictures_of_state(
            with_facts(state, tmp_path / "s", options={"cache_dir": str(tmp_path / "caches")}), fit=9, test=9
        )


def test_caches_of_another_teacher_than_the_trained_one_are_refused(state: Path, tmp_path: Path) -> None:
    caches = json.loads((state / "state.json").read_text())["caches"]
    caches["tokens 128x128"]["weights"] = "0123"
    changed = with_facts(state, tmp_path / "s", caches=caches)
    with pytest.raises(UserError, match="is not the one that .* was trained on: weights was 0123, is "):
        pictures_of_state(changed, fit=9, test=9)


def test_held_out_pictures_that_were_trained_on_are_noted(repa_setting: RepaSetting, tmp_path: Path) -> None:
    shutil.copytree(repa_setting.folder / "caches", tmp_path, dirs_exist_ok=True)
    for kind in ("latents", "tokens"):
        shutil.rmtree(tmp_path / f"val_{kind}")
        shutil.copytree(tmp_path / f"train_{kind}", tmp_path / f"val_{kind}")
    train, names = str(repa_setting.folder / "train.csv"), repa_setting.folder / "names.json"
    classes = ClassPictureOptions(train_data=train, val_data=train, class_names=names)
    found = open_probe_pictures(classes, ClassCacheOptions(cache_dir=tmp_path), side=128, fit=9, test=9)
    assert len(found.notes) == 1 and found.notes[0].startswith("8 of 8 held-out pictures share an id")


def test_a_block_probe_takes_the_pictures_of_a_state_with_their_classes(state: Path, pictures: ProbePictures) -> None:
    source = find_pictures(None, [state], None, "x", 128, 24)
    assert len(source) == 12 and source.where == f"the caches of {state}"
    shown = source.labelled(None, 0)  # type: ignore[arg-type]
    assert shown.kind == "class" and len(set(shown.ids)) == 12 and shown.labels is not None
    assert shown.labels.tolist() == [*pictures.fit.labels.tolist(), *pictures.test.labels.tolist()]
    assert torch.equal(shown.latents[8:], pictures.test.samples.read_latents(range(4)))


# ------------------------------------------------------------------------------------------------ features


def test_features_are_those_of_a_whole_pass(model: FeatureModel, pictures: ProbePictures) -> None:
    seen = look(model, pictures)
    samples = pictures.test.samples
    latents = samples.read_latents(range(len(samples)))
    inputs: list[torch.Tensor] = []
    hook = model.unet.conv_in.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    look(model, pictures)
    hook.remove()
    timesteps = torch.full((4,), 261)
    with torch.no_grad(), capture(model.unet, ["mid"]) as features:
        model.unet(inputs[0], timesteps, pictures.empty_prompt.float().expand(4, -1, -1))
    torch.testing.assert_close(seen.maps, features["mid"])
    assert seen.tokens is not None
    torch.testing.assert_close(seen.tokens, model.heads["mid"](features["mid"]))
    alpha, sigma = model.parametrisation.at(timesteps)
    noise = (inputs[0] - alpha * latents) / sigma
    assert abs(noise.mean().item()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)


def test_noise_belongs_to_picture_and_timestep_whatever_the_batch(model: FeatureModel, pictures: ProbePictures) -> None:
    together, alone = look(model, pictures), look(model, pictures, batch_size=1)
    torch.testing.assert_close(together.maps, alone.maps, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.maps, look(model, pictures, seed=1).maps, atol=1e-2)
    turned = pictures.test.samples
    turned = StoredPictures(turned.sample_ids[::-1], turned.latents, turned.tokens)
    again = features_at_tap(model, turned, pictures.empty_prompt, tap="mid", timestep=261, seed=0, batch_size=4)
    torch.testing.assert_close(again.maps.flip(0), together.maps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tap", ["enc_last", "mid", "dec_first"])
def test_nothing_behind_the_tap_is_computed_and_no_hook_stays(
    model: FeatureModel, pictures: ProbePictures, tap: str
) -> None:
    seen = look(model, pictures, tap=tap)
    assert (seen.tokens is not None) == (tap == "mid") and seen.maps.shape[0] == 4
    assert not any(module._forward_hooks for module in model.unet.modules())


@pytest.mark.bits
def test_a_state_without_its_adapters_is_the_base(
    model: FeatureModel, pictures: ProbePictures, tiny_sd15: Path
) -> None:
    base = load_folded_model(str(tiny_sd15))
    assert model.network is not None
    with model.network.disabled():
        assert torch.equal(look(model, pictures).maps, look(base, pictures).maps)
    assert not torch.equal(look(model, pictures).maps, look(base, pictures).maps)


@pytest.mark.bits
def test_an_adapter_file_with_its_heads_is_the_state(state: Path, pictures: ProbePictures, tiny_sd15: Path) -> None:
    adapter = next(path for path in state.parent.glob("*.safetensors") if not path.stem.endswith("-ema"))
    folded = load_folded_model(str(tiny_sd15), adapter, heads=read_heads(state, use_ema=False))
    whole = load_feature_model(state, use_ema=False)
    for mine, theirs in zip(vars(look(folded, pictures)).values(), vars(look(whole, pictures)).values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    averaged = read_heads(state)["mid"].proj[0].weight
    assert torch.equal(averaged, load_feature_model(state).heads["mid"].proj[0].weight)
    assert not torch.equal(averaged, whole.heads["mid"].proj[0].weight)


# ------------------------------------------------------------------------------------------------ the whole


def test_every_trunk_head_and_baseline_has_its_row(result: RepresentationResult) -> None:
    moving = ["checkpoint trunk", "checkpoint trunk + fitted head", "checkpoint head", "base trunk"]
    moving += ["base trunk + fitted head", "random trunk", "random trunk + fitted head"]
    still = ["mean token", "per-position mean", "grid ceiling, pooled", "grid ceiling, best", "teacher"]
    assert result.names() == moving + still
    assert [(row.name, row.timestep) for row in result.rows if row.timestep is None] == [(name, None) for name in still]
    assert sorted((row.name, row.timestep) for row in result.rows if row.timestep is not None) == sorted(
        (name, timestep) for name in moving for timestep in (50, 400)
    )
    assert (result.tap, result.fitted, result.held_out, result.classes) == ("mid", 8, 4, 2)


def test_the_numbers_are_of_the_features(
    result: RepresentationResult, model: FeatureModel, pictures: ProbePictures
) -> None:
    target = pictures.test.teacher()
    expected = []
    for seed in (0, 1):
        seen = features_at_tap(
            model, pictures.test.samples, pictures.empty_prompt, tap="mid", timestep=400, seed=seed, batch_size=4
        )
        assert seen.tokens is not None
        expected.append(token_cosine(seen.tokens, target))
    found = result.row("checkpoint head", 400).measures["token_cosine"]
    assert found.values == pytest.approx(expected, abs=1e-5)
    assert found.deviation is not None and found.deviation > 0
    fit = pictures.fit.teacher()
    mean = torch.nn.functional.normalize(torch.nn.functional.normalize(fit, dim=-1).mean((0, 1)), dim=0)
    assert result.row("mean token").measures["token_cosine"].mean == pytest.approx(
        token_cosine(mean.expand_as(target), target), abs=1e-5
    )


def test_the_teacher_is_1_with_itself_and_the_ceiling_is_below(result: RepresentationResult) -> None:
    teacher = {name: spread.mean for name, spread in result.row("teacher").measures.items()}
    for name, value in teacher.items():
        if name.startswith("sample_mae"):
            assert value == pytest.approx(0, abs=1e-5)
        elif not name.startswith(("linear_probe", "knn")):
            assert value == pytest.approx(1, abs=1e-5), name
    pooled, best = (result.row(f"grid ceiling, {one}").measures["token_cosine"].mean for one in ("pooled", "best"))
    assert result.row("mean token").measures["token_cosine"].mean < pooled <= best < 1


def test_the_result_is_plain_json_with_every_measure_explained(result: RepresentationResult) -> None:
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["settings"]["timesteps"] == [50, 400] and len(written["rows"]) == len(result.rows)
    names = {name for row in written["rows"] for name in row["measures"]}
    assert names == written["meanings"].keys() and written["meanings"]["recall@1"] == meaning("recall@1")
    assert {"token_cosine", "sample_mae", "cka", "linear_probe", "knn_accuracy", "retrieval@1"} <= names
    assert written["chance"]["linear_probe"] == 0.5 and written["chance"]["recall@1"] == pytest.approx(1 / 3)


def test_what_few_pictures_do_not_allow_is_said(state: Path, result: RepresentationResult) -> None:
    assert result.notes == ["recall@10 is left out: 4 held-out pictures are too few."]
    assert "recall@10" not in result.chance
    settings = RepresentationSettings(timesteps=(50,), seeds=(0,), neighbours=5, recall_at=(1,), pictures=0)
    other = evaluate_representation(state, settings)
    assert other.notes == ["mutual_knn and cknna are left out: 4 pictures are too few for 5 neighbours."]
    assert other.pictures == [] and other.row("checkpoint trunk", 50).measures["cka"].deviation is None


def test_earlier_states_are_measured_alone_at_one_timestep(finished_run: Path, result: RepresentationResult) -> None:
    states = [path for _, path in list_states(finished_run)]
    found = evaluate_states(states, SETTINGS)
    assert len(states) > 1 and [one.checkpoint for one in found.earlier] == [path.name for path in states[:-1]]
    assert found.names() == result.names() and found.row("checkpoint head", 400) == result.row("checkpoint head", 400)
    for one in found.earlier:
        assert one.names() == ["checkpoint trunk", "checkpoint trunk + fitted head", "checkpoint head"]
        assert {row.timestep for row in one.rows} == {SETTINGS.pictured_at} == {400} and one.pictures == []
    assert found.earlier[0].row("checkpoint head", 400) != found.row("checkpoint head", 400)
    assert [one["checkpoint"] for one in found.to_json()["earlier"]] == [path.name for path in states[:-1]]


def test_a_model_without_heads_or_base_is_measured_by_its_trunk(pictures: ProbePictures, tiny_sd15: Path) -> None:
    settings = RepresentationSettings(timesteps=(400,), seeds=(0,), neighbours=2, recall_at=(1,), pictures=1)
    found = evaluate_representation(load_folded_model(str(tiny_sd15)), settings, pictures=pictures, name="bare")
    assert found.names()[:3] == ["checkpoint trunk", "checkpoint trunk + fitted head", "random trunk"]
    assert found.checkpoint == "bare" and len(found.notes) == 2
    assert found.pictured == "tokens of a head fitted on the checkpoint's trunk at timestep 400, noise seed 0"


def test_the_base_is_measured_alike_beside_a_state_and_alone(
    result: RepresentationResult, pictures: ProbePictures, tiny_sd15: Path
) -> None:
    alone = evaluate_representation(load_folded_model(str(tiny_sd15)), SETTINGS, pictures=pictures)
    for name in ("trunk", "trunk + fitted head"):
        mine, theirs = (r.measures for r in (alone.row(f"checkpoint {name}", 50), result.row(f"base {name}", 50)))
        assert mine == theirs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"timesteps": (50, 50)}, "timesteps must name each once"),
        ({"seeds": ()}, "seeds must name each once, and at least one"),
        ({"test_samples": 3}, "test_samples must be at least 4, got 3"),
        ({"timesteps": (1000,)}, r"timesteps must lie in 0..999, got 1000"),
        ({"tap": "middle"}, "A tap must be enc_last, mid, dec_first, down_blocks.N or up_blocks.N, got 'middle'"),
    ],
)
def test_bad_settings_are_named(state: Path, changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        evaluate_representation(state, RepresentationSettings(**changes))  # type: ignore[arg-type]


def test_what_cannot_be_measured_is_refused(state: Path, model: FeatureModel, tmp_path: Path) -> None:
    other_script = with_facts(state, tmp_path / "network")
    (other_script / "lora.safetensors").rename(other_script / "lora_unet.safetensors")
    with pytest.raises(UserError, match="was not made by train_repa.py. Give the adapter file"):
        evaluate_representation(other_script)
    other_base = with_facts(state, tmp_path / "base", base_weights={"unet": "0123"})
    with pytest.raises(UserError, match="U-Net of .* is not the one that .* was trained on"):
        evaluate_representation(other_base)
    with pytest.raises(UserError, match="Give pictures"):
        evaluate_representation(model)
    with pytest.raises(UserError, match="is no training state"):
        evaluate_representation(tmp_path)


# ------------------------------------------------------------------------------------------------ dense maps


def test_dense_maps_are_of_the_held_out_photos(result: RepresentationResult, pictures: ProbePictures) -> None:
    assert [one.sample_id for one in result.pictures] == [pictures.test.ids[0], pictures.test.ids[3]]
    assert result.pictured == "tokens of the checkpoint's head at timestep 400, noise seed 0"
    assert result.pictures[0].photo.tobytes() == pictures.test.photo(0).tobytes()
    assert all(image.size == (128, 128) for one in result.pictures for image in one.columns().values())


def test_the_head_reads_the_trunks_of_checkpoint_and_base_at_three_timesteps(
    result: RepresentationResult, model: FeatureModel, pictures: ProbePictures
) -> None:
    assert [(one.timestep, one.name) for one in result.seen] == list(product((100, 400, 750), ("base", "checkpoint")))
    assert model.network is not None
    ids, teacher = pictures.test.ids, pictures.test.teacher()
    for one in result.seen:
        assert [maps.sample_id for maps in one.maps] == [ids[0], ids[3]]
        assert one.maps[0].teacher.tobytes() == result.seen[0].maps[0].teacher.tobytes(), "in the same colours"
        with nullcontext() if one.name == "checkpoint" else model.network.disabled():
            tokens = features_at_tap(
                model,
                pictures.test.samples,
                pictures.empty_prompt,
                tap="mid",
                timestep=one.timestep,
                seed=0,
                batch_size=4,
            ).tokens
        assert tokens is not None
        assert one.maps[1].mean_cosine == pytest.approx(token_cosine(tokens[3:], teacher[3:]), abs=1e-5)
    by_model = [[one.maps[0].mean_cosine for one in result.seen if one.name == name] for name in ("base", "checkpoint")]
    assert by_model[0] != pytest.approx(by_model[1], abs=1e-6)


def test_a_time_aware_head_of_any_block_is_measured_against_the_tokens_it_learned(
    repa_setting: RepaSetting, tmp_path: Path
) -> None:
    options = {"align_recipe": "irepa", "align_film": "", "taps": "down_blocks.1 mid", "max_train_steps": 2}
    assert repa_setting.train(tmp_path, **options, save_every_n_steps=2, lora_scope="down_mid") == 0
    state = tmp_path / "step_000002"
    model = load_feature_model(state)
    assert list(model.heads) == ["down_blocks.1", "mid"] and model.heads.timed and model.teacher_norm == 0.6
    one = RepresentationSettings(
        timesteps=(261,), seeds=(0,), neighbours=2, recall_at=(1,), pictures=2, baselines=False
    )
    pictures = pictures_of_state(state, fit=100, test=100)
    found = evaluate_representation(model, one, pictures=pictures)
    assert found.tap == "down_blocks.1"
    seen = look(model, pictures, tap="down_blocks.1")
    assert seen.tokens is not None and seen.maps.shape[-2:] == (4, 4)
    cosine = found.row("checkpoint head", 261).measures["token_cosine"].mean
    normalised = spatially_normalised(pictures.test.teacher(), 0.6)
    assert cosine == pytest.approx(token_cosine(seen.tokens, normalised), abs=1e-5)
    assert cosine != pytest.approx(token_cosine(seen.tokens, pictures.test.teacher()), abs=1e-3)
