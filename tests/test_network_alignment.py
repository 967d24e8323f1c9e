"""train_network.py --alignment: heads on the U-Net's features learn a teacher's tokens, each bucket on a grid of its aspect."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.training.stop import STOP
from tests.test_network_resume import assert_same_end
from tests.tools.network_runs import EXACT, Built, NetworkSetting, adapter, asked, draw_pictures, losses, metadata, rows

TEACHER = "tiny-dinov2"


@pytest.fixture(scope="module")
def aligned(tiny_dinov2: Path) -> dict[str, object]:
    """Options of a run with heads: the teacher sees 4 x 4 patches of a square."""
    return {
        "alignment": "", "dino_model": tiny_dinov2, "dino_resolution": 56, "token_grid": 4, "align_warmup_steps": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def built(network_setting: NetworkSetting, aligned: dict[str, object]) -> Built:
    """Heads at every tap, on adapters that have an effect."""
    config = network_setting.dataset("flipped", subset="flip_aug = true")
    return network_setting.build(dataset_config=config, taps="enc_last mid dec_first", **aligned).stir()


def parts_of(built: Built, batch, step: int = 9) -> dict[str, float]:  # type: ignore[no-untyped-def]
    torch.manual_seed(step)
    parts = built.task.losses(batch, torch.Generator().manual_seed(step), step)
    return {name: value.item() for name, value in parts.items()}


def test_the_loss_is_the_diffusion_loss_plus_lambda_times_token_and_manifold_loss(built: Built) -> None:
    batch = built.batch()
    plain, warming, warm = (parts_of(built, batch, step) for step in (0, 1, 9))
    assert plain["loss"] == plain["diffusion"] and plain["lambda"] == 0
    for parts, coefficient in ((warming, 0.25), (warm, 0.5)):
        expected = parts["diffusion"] + coefficient * (parts["token"] + 3 * parts["manifold"])
        assert parts["lambda"] == coefficient and parts["loss"] == pytest.approx(expected, rel=1e-6)
    assert 0 < warm["token"] < 2 and warm["manifold"] > 0


@pytest.fixture
def with_options(built: Built) -> Iterator[Callable[..., None]]:
    """Changes alignment options of the run for one test."""
    alignment = built.task.alignment
    original = alignment.options

    def change(**options: object) -> None:
        alignment.options = replace(original, **options)

    yield change
    alignment.options = original


def test_each_loss_has_a_weight_and_one_of_weight_0_is_only_logged(
    built: Built, with_options: Callable[..., None]
) -> None:
    batch = built.batch()
    every = parts_of(built, batch)
    with_options(token_weight=2.0, manifold_weight=0.0)
    token = parts_of(built, batch)
    assert token["loss"] == pytest.approx(every["diffusion"] + 0.5 * 2 * every["token"], rel=1e-6)
    with_options(token_weight=0.0)
    manifold = parts_of(built, batch)
    assert manifold["loss"] == pytest.approx(every["diffusion"] + 0.5 * 3 * every["manifold"], rel=1e-6)
    logged = [{name: parts[name] for name in ("token", "manifold", "diffusion")} for parts in (every, token, manifold)]
    assert logged[0] == logged[1] == logged[2]


def test_the_teachers_tokens_are_normalised_when_they_are_learned_and_not_in_the_cache(
    built: Built, with_options: Callable[..., None]
) -> None:
    batch = built.batch()
    latents = built.task.latents(batch)
    raw, grid = built.task.alignment.targets(batch, latents)
    with_options(teacher_norm=1.0)
    target = built.task.alignment.targets(batch, latents)[0][TEACHER]
    assert grid == batch.token_grid
    torch.testing.assert_close(target.mean(dim=1), torch.zeros_like(target[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(dim=1), torch.ones_like(target[:, 0]), atol=1e-3, rtol=0)
    assert torch.equal(raw[TEACHER], batch.target_tokens(TEACHER))


def test_taps_have_weights(built: Built, with_options: Callable[..., None]) -> None:
    batch = built.batch()
    found = []
    for weights in ((), (1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (1.0, 4.0, 1.0), (1.0, 1.0, 4.0)):
        with_options(tap_weights=weights)
        found.append(parts_of(built, batch)["token"])
    plain, alike, *leaning = found
    assert alike == pytest.approx(plain, rel=1e-6) and len(set(leaning)) == 3
    assert sum(leaning) / 3 == pytest.approx(plain, rel=1e-6), "each weighs one tap by 2/3 and the others by 1/6"


def test_without_a_teacher_relations_are_those_of_the_clean_latents(
    built: Built, with_options: Callable[..., None]
) -> None:
    batch = built.batch()
    with_options(
        manifold_target="latents", token_weight=0.0, manifold_mode="token", token_grid=3, tap_weights=(1, 1, 1)
    )
    parts = parts_of(replace(built), replace(batch, tokens={}, token_grid=None))
    assert parts["loss"] == pytest.approx(parts["diffusion"] + 0.5 * 3 * parts["manifold"], rel=1e-6)
    assert "token" not in parts
    latents = built.task.latents(batch)  # [B, 4, 12, 12]
    targets, grid = built.task.alignment.targets(batch, latents)
    assert grid == (3, 3)
    slow = [[latents[b, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].mean(dim=(1, 2)) for r in range(3) for c in range(3)]
            for b in range(len(batch))]  # fmt: skip
    torch.testing.assert_close(targets[TEACHER], torch.stack([torch.stack(row) for row in slow]))
    with_options(manifold_target="latents", token_weight=0.0, token_grid=13, dino_resolution=(518,))
    with pytest.raises(UserError, match="token_grid 13 is finer than latents of 12 x 12, which are pooled to it."):
        built.task.alignment.targets(batch, latents)


@pytest.mark.bits
@pytest.mark.parametrize(
    "recipe",
    [
        {"token_weight": 0.0, "manifold_mode": "token", "manifold_loss": "l1", "manifold_margin": 0.1},
        {"teacher_norm": 0.6, "manifold_weight": 0.0},
        {"align_timesteps": "v", "tap_weights": (1.0, 2.0, 3.0)},
        {"align_timesteps": "t", "align_window": (0.1, 0.9), "manifold_mode": "random"},
        {"align_schedule": "cosine"},
        {"manifold_target": "latents", "token_weight": 0.0},
    ],
    ids=lambda recipe: " ".join(map(str, recipe.values()))[:30],
)
def test_lambda_0_gives_the_adapters_the_gradients_of_a_run_without_heads(
    built: Built, with_options: Callable[..., None], recipe: dict[str, object]
) -> None:
    def gradients(alignment: object) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        with mock.patch.object(built.task, "alignment", alignment):
            loss = built.task.losses(batch, torch.Generator().manual_seed(1), 5)["loss"]
        loss.backward()
        found = {name: one.grad for name, one in built.task.network.parameters.items() if one.grad is not None}
        heads = [one.grad for one in built.task.alignment.heads.parameters()]
        for parameter in [*built.task.network.parameters.values(), *built.task.alignment.heads.parameters()]:
            parameter.grad = None
        assert all(gradient is None for gradient in heads)
        return loss.item(), found

    batch = built.batch()
    with_options(**recipe, align_coeff=0.0)
    (plain, of_none), (aligned, of_recipe) = gradients(None), gradients(built.task.alignment)
    assert plain == aligned and len(of_none) > 20
    assert of_none.keys() == of_recipe.keys() and all(torch.equal(of_none[name], of_recipe[name]) for name in of_none)


def test_each_bucket_has_tokens_on_a_grid_of_its_aspect(built: Built) -> None:
    seen = {}
    for number in range(4):
        batch = built.batch(number)
        rows_, columns = batch.token_grid
        assert batch.tokens[TEACHER].shape[1] == rows_ * columns
        seen[tuple(batch.latents.shape[-2:])] = batch.token_grid
        assert np.isfinite(parts_of(built, batch)["token"])
    assert seen == {(12, 12): (4, 4), (8, 16): (3, 6), (16, 8): (6, 3)}


def test_a_mirrored_picture_comes_with_the_tokens_of_its_mirror_image(built: Built) -> None:
    from library.data.cached_samples import requests

    request = next(one for one in requests(built.order, 0) if len(one.micro.indices) == 2)
    samples = built.task.training
    found = set()
    for epoch in range(6):
        batch = samples.empty_batch(request._replace(epoch=epoch), pin=False)
        samples.fill(batch, slice(0, len(batch)))
        for row, index in enumerate(batch.indices):
            tokens, one = built.prepared.training.tokens[TEACHER], samples.images[index]
            stores = tokens.flipped if batch.flipped[row] else tokens.stores
            expected = stores[one.fitted.bucket].read(one.image.sample_id)
            assert np.array_equal(batch.tokens[TEACHER][row].numpy(), expected)
            found.add(bool(batch.flipped[row]))
    assert found == {True, False}


def test_fillers_and_pictures_that_are_preserved_count_nothing_and_others_their_weight(built: Built) -> None:
    batch = built.batch()
    rest = replace(
        batch, **{name: getattr(batch, name)[:1] for name in ("latents", "sizes", "real", "weights", "ids")},
        tokens={TEACHER: batch.tokens[TEACHER][:1]}, indices=batch.indices[:1],
    )  # fmt: skip

    def token(batch, **changes) -> float:  # type: ignore[no-untyped-def]
        latents, draw = drawn(built, batch := replace(batch, **changes))
        built.task.each(batch, latents, draw)
        return built.task.aligned(batch, latents, draw.timesteps, torch.Generator(), with_gradient=False)[
            "token"
        ].item()

    first, both = token(rest), token(batch)
    assert len(batch) == 2 and first != pytest.approx(both)
    filled = token(batch, weights=torch.tensor([1.0, 0.0]), real=torch.tensor([1.0, 0.0]))
    assert filled == pytest.approx(first, rel=1e-5)
    prior = token(batch, weights=torch.tensor([1.0, 0.25]))
    assert prior == pytest.approx((first + 0.25 * (2 * both - first)) / 2, rel=1e-5)
    kept = token(batch, preserve=torch.tensor([False, True]))
    assert kept == pytest.approx(first / 2, rel=1e-5), "and the features are the adapted network's"


def drawn(built: Built, batch):  # type: ignore[no-untyped-def]
    from library.diffusion.noise import Draw

    latents = built.task.latents(batch)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(1)).expand_as(latents)
    return latents, Draw(noise, noise, torch.full((len(batch),), 400))


@pytest.mark.bits
def test_a_mask_counts_for_tokens_as_for_latents(built: Built) -> None:
    batch = built.batch()
    mask = torch.zeros(len(batch), 1, 12, 12)
    mask[..., :6] = 1.0
    weights = built.task.token_weights(replace(batch, mask=mask), (4, 4))
    assert weights.tokens is not None
    assert torch.equal(weights.tokens.view(-1, 4, 4), torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(len(batch), 4, 4))
    built.task.objective = replace(original := built.task.objective, masked_loss_renormalize=True)
    try:
        again = built.task.token_weights(replace(batch, mask=mask), (4, 4))
    finally:
        built.task.objective = original
    assert torch.equal(again.tokens, 2 * weights.tokens)


@pytest.mark.bits
def test_lambda_0_trains_the_adapter_of_a_run_without_heads_to_the_bit(
    finished_network: Path, network_setting: NetworkSetting, aligned: dict[str, object], tmp_path: Path
) -> None:
    """With everything that draws: dropout, captions, mirroring; text encoders, accumulation, several buckets, an average."""
    assert network_setting.train(tmp_path, **EXACT, **aligned, align_coeff=0.0, manifold_mode="random") == 0
    for file in ("mio.safetensors", "mio-ema.safetensors"):
        ours, theirs = adapter(tmp_path / file), adapter(finished_network / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), file
    assert losses(tmp_path) == losses(finished_network) and len(losses(tmp_path, "train/token")) == 4
    assert not (finished_network / "mio-state" / "align_heads.safetensors").exists()


@pytest.fixture(scope="module")
def finished(
    network_setting: NetworkSetting, aligned: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("aligned") / "out"
    assert network_setting.train(output, **EXACT, **aligned) == 0
    return output


@pytest.mark.bits
def test_heads_are_trained_and_kept_in_the_state_and_not_in_the_adapter(finished: Path, finished_network: Path) -> None:
    first, last = (load_file(finished / name / "align_heads.safetensors") for name in ("mio-000001-state", "mio-state"))
    assert set(last) == {f"align_heads.mid.proj.{name}" for name in ("0.weight", "0.bias", "2.weight")}
    assert all(not torch.equal(first[name], last[name]) for name in last)
    average = load_file(finished / "mio-state" / "ema.safetensors")
    assert set(last) <= set(average) and all(not torch.equal(average[name], last[name]) for name in last)
    ours, plain = adapter(finished / "mio.safetensors"), adapter(finished_network / "mio.safetensors")
    assert ours.keys() == plain.keys()
    # At step 0 lambda is 0; from then on the adapter learns from the heads too.
    assert losses(finished)[0] == losses(finished_network)[0] and losses(finished)[1] != losses(finished_network)[1]
    assert any(not torch.equal(ours[name], plain[name]) for name in ours if name.startswith("lora_unet_down"))
    described = json.loads(metadata(finished / "mio.safetensors")["ss_alignment"])
    assert described["taps"] == ["mid"] and described["align_coeff"] == 0.5
    assert TEACHER in described["dino_model"][0]
    assert "ss_alignment" not in metadata(finished_network / "mio.safetensors")
    assert rows(finished, "lr/align_heads")


@pytest.mark.bits
def test_stopped_and_resumed_is_the_uninterrupted_run(
    finished: Path, network_setting: NetworkSetting, aligned: dict[str, object], tmp_path: Path
) -> None:
    for looks in (1, 2):
        with asked(looks, STOP, tmp_path):
            assert network_setting.train(tmp_path, **EXACT, **aligned) == 75
    assert network_setting.train(tmp_path, **EXACT, **aligned, max_data_loader_n_workers=3) == 0
    assert_same_end(finished, tmp_path)


def test_a_state_of_another_teacher_is_not_continued(
    finished: Path, network_setting: NetworkSetting, aligned: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert network_setting.train(finished, **EXACT, **{**aligned, "token_grid": 2}) == 2
    assert "token_grid was 4, is 2" in capsys.readouterr().err
    assert network_setting.train(finished, **EXACT) == 2
    assert "alignment was true, is false" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"taps": "enc_last mid dec_first", "token_dtype": "int8", "gradient_checkpointing": ""},
        {"mixed_precision": "bf16", "full_bf16": "", "manifold_mode": "token", "align_head": "conv3x3"},
        {"mixed_precision": "fp16", "manifold_mode": "random", "align_learning_rate": 1e-3, "optimizer_type": "AdamW8bit",
         "align_gradient_every": 1, "align_max_grad_norm": 1.0},
        {"teacher_layer": 2, "align_recipe": "trd", "gradient_checkpointing": "", "align_gradient_every": 1,
         "blocks_to_swap": 3},
        {"align_recipe": "irepa", "taps": "down_blocks.1 up_blocks.1", "tap_weights": "1 0.5", "align_film": ""},
        {"manifold_target": "latents", "token_weight": 0, "manifold_mode": "token", "taps": "up_blocks.2", "dino_model": None},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "manifold_clip": 0.01, "align_weight_decay": 0.0},
    ],
    ids=lambda changes: " ".join(map(str, changes.values()))[:30],
)  # fmt: skip
def test_every_mode_trains(
    network_setting: NetworkSetting, aligned: dict[str, object], tmp_path: Path, changes: dict[str, object]
) -> None:
    config = network_setting.dataset("pairs", folder=network_setting.few, dataset="resolution = 64\nbatch_size = 2")
    options = {**network_setting.quick, "dataset_config": config, **aligned, "align_schedule": "constant"}
    assert network_setting.train(tmp_path, **{**options, **changes}) == 0
    found = rows(tmp_path)
    assert len(found) == 2 and all(np.isfinite(list(row.values())).all() for row in found)
    name = "train/manifold" if "manifold_target" in changes else "train/token"
    assert all(row["lambda"] == 0.5 and row[name] > 0 for row in found)


def test_sdxl_aligns_at_its_own_width_with_regularisation_pictures_and_validation(
    sdxl_setting: NetworkSetting, aligned: dict[str, object], tmp_path: Path
) -> None:
    reg = draw_pictures(tmp_path / "reg", ((96, 96),) * 2, first=20)
    more = f"[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true"
    config = sdxl_setting.dataset("reg", more=more, dataset="validation_split = 0.4")
    options = {"dataset_config": config, "prior_loss_weight": 0.5, "max_train_epochs": 1, "save_state": ""}
    assert sdxl_setting.train(tmp_path / "out", **options, **aligned, taps="dec_first") == 0
    heads = load_file(tmp_path / "out" / "mio-state" / "align_heads.safetensors")
    config_file = json.loads((sdxl_setting.base / "unet" / "config.json").read_text())
    assert heads["align_heads.dec_first.proj.0.weight"].shape[1] == config_file["block_out_channels"][-1]
    last = rows(tmp_path / "out", "val/loss")[-1]
    assert 0 < last["val/token"] < 2 and last["val/manifold"] >= 0
    begun = rows(tmp_path / "out", "reference/token_loss")[0]
    assert 0 < begun["reference/constant_token_loss"] < begun["reference/token_loss"]


def test_dry_run_counts_heads_and_the_disk_of_their_tokens(
    network_setting: NetworkSetting, aligned: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert network_setting.train(tmp_path / "out", "--dry_run") == 0
    without = capsys.readouterr().out
    assert network_setting.train(tmp_path / "out", "--dry_run", **aligned, cache_dir=tmp_path / "new") == 0
    said = capsys.readouterr().out
    assert f"{96 * 64 + 64 + 64 * 64:,} align_heads = " in said and "align_heads" not in without
    # Six pictures of 16 or 18 tokens of 64 halves: a page of 4 KiB each, and its share of the keys.
    assert "disk             25.5 KiB for tokens in" in said and "missing          nothing" in said
    assert not (tmp_path / "new").exists()
    assert "2 of 4 batches of an epoch hold one picture: manifold_mode sample has nothing to compare there" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batch_size": 1}, "manifold_mode sample compares the pictures of a batch, and no batch has two."),
        ({"dino_model": "nowhere.pth"}, "nowhere.pth"),
        (
            {"align_recipe": "irepa", "token_weight": 0},
            "manifold_weight and token_weight are both 0: nothing would be aligned.",
        ),
        ({"taps": "mid up_blocks.7"}, "This U-Net has no up_blocks.7: it goes from up_blocks.0 to up_blocks.3."),
        (
            {"taps": "middle"},
            "taps has 'middle'. A tap must be enc_last, mid, dec_first, down_blocks.N or up_blocks.N, got",
        ),
        ({"teacher_layer": 4}, "teacher_layer 4 is more than there are: "),
        (
            {"dino_resolution": 64},
            "dino_resolution must be a multiple of the patch size 14, got 64. Nearest: 56 and 70.",
        ),
        ({"tap_weights": "1 2"}, "tap_weights has 2 numbers for 1 tap: give one for each, or none."),
        ({"manifold_target": "latents"}, "latents has no tokens to predict, only similarities. Give token_weight 0"),
        (
            {"align_stop_on_plateau": 9, "token_weight": 0},
            "goes by the token cosine, which nothing raises with token_weight 0",
        ),
        ({"token_grid": 5}, "token_grid is 5, finer than the 4 patches that dino_resolution 56 gives."),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_encoded(
    network_setting: NetworkSetting, aligned: dict[str, object], tmp_path: Path, changes: dict[str, object], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = network_setting.dataset("single", dataset="batch_size = 1") if "train_batch_size" in changes else None
    options = {**aligned, **changes} | ({"dataset_config": config} if config else {})
    assert network_setting.train(tmp_path / "out", **options, cache_dir=tmp_path / "caches") == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert not list((tmp_path / "caches").glob("latents_*"))
