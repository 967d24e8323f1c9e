"""train_repa.py end to end on tiny models: exactness, every mode, failures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.data.store_writer import StoreWriter
from library.evaluation.feature_model import extract_features, load_feature_model
from library.options.toml_file import PROJECT_ROOT
from tests.test_dinov2 import meta_weights
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows, state_tensors


def test_a_run_leaves_states_adapters_metrics_and_its_options(finished_run: Path) -> None:
    assert sorted(p.name for p in finished_run.iterdir() if p.name != ".lock") == [
        "logs", "metrics.jsonl", "options.toml", "repa-ema.safetensors", "repa.safetensors", "run.html",
        "step_000002", "step_000004",
    ]  # fmt: skip
    state = json.loads((finished_run / "step_000004" / "state.json").read_text())
    assert state["step"] == 4 and state["samples_seen"] == 16 and state["versions"]["torch"] == torch.__version__
    weights = load_file(finished_run / "step_000004" / "align_heads.safetensors")
    assert set(weights) == {f"align_heads.mid.proj.{name}" for name in ("0.weight", "0.bias", "2.weight")}
    adapter = load_file(finished_run / "repa.safetensors")
    assert len(adapter) == 8 * 3 and all(name.startswith("lora_unet_mid_block_") for name in adapter)
    assert any(finished_run.joinpath("logs").iterdir())


def test_the_demo_sums_up_what_a_run_logs(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = runpy.run_path(str(PROJECT_ROOT / "tools" / "demo.py"))
    summary = demo["print_summary"]
    monkeypatch.setitem(summary.__globals__, "OUTPUT", finished_run)
    monkeypatch.setitem(summary.__globals__, "ROOT", finished_run.parent)
    summary(finished_run / "repa.safetensors", finished_run, finished_run, 1.0)
    said = capsys.readouterr().out
    assert all(name in said for name in ("train/diffusion", "val/loss", "val/manifold", "repa.safetensors"))


def test_training_changes_every_trained_weight_and_lowers_the_token_loss(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path
) -> None:
    before, after = state_tensors(finished_run / "step_000002"), state_tensors(finished_run / "step_000004")
    for name in before:
        if name.startswith(("lora/", "align_heads/", "ema/")):
            assert not torch.equal(before[name], after[name]), name
    assert repa_setting.train(tmp_path, max_train_steps=24) == 0
    token = [row["train/token"] for row in metric_rows(tmp_path, "train/token")]
    assert np.mean(token[-4:]) < 0.8 * token[0]


@pytest.mark.bits
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path
) -> None:
    assert repa_setting.train(tmp_path / "again", max_data_loader_n_workers=3) == 0
    assert_equal_states(finished_run / "step_000004", tmp_path / "again" / "step_000004")
    assert repa_setting.train(tmp_path / "other", seed=43) == 0
    a, b = state_tensors(finished_run / "step_000004"), state_tensors(tmp_path / "other" / "step_000004")
    assert not any(torch.equal(a[n], b[n]) for n in a if n.startswith("lora/"))


@pytest.mark.bits
def test_lambda_0_trains_the_lora_of_a_run_without_heads_to_the_bit(repa_setting: RepaSetting, tmp_path: Path) -> None:
    short = {"lora_scope": "all", "max_train_steps": 2}
    assert repa_setting.train(tmp_path / "zero", **short, align_coeff=0.0) == 0
    assert repa_setting.train(tmp_path / "none", "--no_alignment", **short) == 0
    zero, none = (load_file(tmp_path / name / "step_000002" / "lora.safetensors") for name in ("zero", "none"))
    assert all(torch.equal(zero[name], none[name]) for name in none) and zero.keys() == none.keys()
    assert any(t.abs().sum() > 0 for name, t in none.items() if "lora_B" in name)
    assert not (tmp_path / "none" / "step_000002" / "align_heads.safetensors").exists()
    # The losses of the heads are watched all the same.
    assert metric_rows(tmp_path / "zero", "train/token") and not metric_rows(tmp_path / "none", "train/token")


def test_the_frozen_bases_loss_is_that_of_an_untrained_run_and_stays_while_weights_move(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path
) -> None:
    first = metric_rows(finished_run, "reference/frozen_base_loss")[0]
    assert first["reference/zero_predictor_loss"] == pytest.approx(1.0, abs=0.1)
    assert 0 < first["reference/grid_ceiling_mid"] <= 1
    assert first["reference/positional_token_loss"] <= first["reference/constant_token_loss"]
    copy_until(finished_run, tmp_path / "out", 2)
    assert repa_setting.train(tmp_path / "out", save_every_n_steps=2, validate_every_n_steps=2) == 0
    again = metric_rows(tmp_path / "out", "reference/frozen_base_loss")
    # At step 2 adapters are trained and switched off for the reference.
    assert again[-1]["step"] == 2 and again[-1]["reference/frozen_base_loss"] == first["reference/frozen_base_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"taps": "enc_last mid dec_first", "lora_scope": "down_mid"},
        {"align_head": "linear", "manifold_mode": "token", "manifold_margin": 0.1},
        {"align_head": "conv3x3", "manifold_mode": "random", "manifold_random_tokens": 8, "manifold_clip": 0.01},
        {"objective": "v", "min_snr_gamma": 5.0, "align_schedule": "cutoff", "align_cutoff_step": 1},
        {"raw_v_target": "", "align_schedule": "constant", "ema_decay": 0.0, "max_grad_norm": 0.0},
        {"conv_dim": 2, "lora_scope": "all", "gradient_checkpointing": "", "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "encoder_precision": "no", "lr_scheduler": "linear", "class_dropout": 1.0},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_mode_trains(repa_setting: RepaSetting, tmp_path: Path, changes: dict[str, object]) -> None:
    assert repa_setting.train(tmp_path, max_train_steps=2, **changes) == 0
    rows = metric_rows(tmp_path, "train/loss")
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)


@pytest.mark.bits
def test_gradient_checkpointing_changes_no_bit(finished_run: Path, repa_setting: RepaSetting, tmp_path: Path) -> None:
    assert repa_setting.train(tmp_path, "--gradient_checkpointing") == 0
    assert_equal_states(finished_run / "step_000004", tmp_path / "step_000004")


def test_validation_numbers_depend_on_the_weights_alone(repa_setting: RepaSetting, tmp_path: Path) -> None:
    # Rates too small to move float32 weights: every validation sees the same ones.
    assert repa_setting.train(tmp_path, learning_rate=1e-30, validate_every_n_steps=1, align_schedule="constant") == 0
    rows = [{k: v for k, v in row.items() if k != "step"} for row in metric_rows(tmp_path, "val/total")]
    assert len(rows) == 4 and all(row == rows[0] for row in rows)
    parts = rows[0]
    assert parts["val/total"] == pytest.approx(
        parts["val/loss"] + 0.5 * (parts["val/token"] + 3 * parts["val/manifold"])
    )
    # Four samples stand at timesteps 500, 118, 736 and 354: one, one and two in the quarters, none in the last.
    q1, q2, q3 = (parts[f"val/loss_q{i}"] for i in (1, 2, 3))
    assert (q1 + q2 + 2 * q3) / 4 == pytest.approx(parts["val/loss"], rel=1e-5) and "val/loss_q4" not in parts


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(
    repa_setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = tmp_path / "caches"
    assert repa_setting.train(tmp_path / "out", cache_dir=caches, save_every_n_steps=1, max_train_steps=2) == 0
    writer = StoreWriter(caches / "train_latents", "latents", expected_bytes=0)
    with writer._environment.begin() as transaction:
        sources = {f"p{i}": transaction.get(f"p{i}#source".encode()) for i in range(8)}
    for sample_id, source in sources.items():
        writer.put(sample_id, np.full((4, 16, 16), np.inf, np.float16), source)
    writer.commit()
    writer.close()
    assert (
        repa_setting.train(
            tmp_path / "out", "--allow_changed_options", cache_dir=caches, save_every_n_steps=1, max_train_steps=4
        )
        == 76
    )
    said = capsys.readouterr().err
    assert "step 2: loss nan" in said and "Samples of that step: p" in said and "The last good state is" in said
    assert sorted(p.name for p in (tmp_path / "out").glob("step_*")) == ["step_000001", "step_000002"]


def test_data_smaller_than_a_batch_and_other_bad_input_are_one_sentence_with_code_2(
    repa_setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, words in (
        ({"train_batch_size": 9}, "is 9 samples a step, but the training set has only 8"),
        ({"train_data": tmp_path / "nowhere"}, "nowhere does not exist"),
        ({"pretrained_model_name_or_path": tmp_path / "nowhere"}, "nowhere"),
        ({"dino_model": tmp_path / "nowhere.pth"}, "nowhere"),
        ({"dino_resolution": 112}, "train_tokens was made differently: dino_resolution 56 there, 112 here"),
    ):
        assert repa_setting.train(tmp_path / "out", **changes) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_features_come_as_tokens_pooled_or_as_a_map(finished_run: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    text = torch.zeros(3, 77, 64)
    model = load_feature_model(finished_run / "step_000004")
    tokens = extract_features(model, latents, text, timestep=100)
    assert tokens.shape == (3, 16, 64)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(3, 16))
    torch.testing.assert_close(extract_features(model, latents, text, timestep=100, what="pooled"), tokens.mean(1))
    features = extract_features(finished_run / "step_000004", latents, text, timestep=100, what="map", tap="dec_first")
    assert features.shape[0] == 3 and features.shape[2:] == (4, 4) and features.dtype == torch.float32
    live = load_feature_model(finished_run / "step_000004", use_ema=False)
    assert not torch.equal(extract_features(live, latents, text, timestep=100), tokens)
    with pytest.raises(Exception, match="no AlignHead at enc_last"):
        extract_features(model, latents, text, tap="enc_last")


def test_dry_run_of_track_a_prints_1562_and_62480(capsys: pytest.CaptureFixture[str]) -> None:
    import train_repa

    assert train_repa.main(["--dataset_config", "trackA.toml", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "steps per epoch  1562\n" in said and "steps            62480 (40 epochs)" in said
    assert "155,648 unet + 2,360,320 align_heads" in said and "device memory    about" in said
    assert "missing          " in said


def test_dry_run_of_the_demo_misses_nothing_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, no_forecast: None
) -> None:
    import train_repa

    argv = [
        "--dataset_config",
        "demo.toml",
        "--dry_run",
        "--output_dir",
        str(tmp_path / "o"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    assert train_repa.main(argv) == 0
    assert "missing          nothing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.bits
def test_one_safetensors_file_as_base_and_metas_file_as_teacher_train_as_folders_do(
    repa_setting: RepaSetting, tmp_path: Path, tiny_sd15: Path
) -> None:
    save_file(ldm_checkpoint(tiny_sd15), tmp_path / "sd15.safetensors")
    torch.save(meta_weights(registers=0, swiglu=False), tmp_path / "dinov2_vitt14_pretrain.pth")
    changes = {"cache_dir": tmp_path / "caches", "dino_model": tmp_path / "dinov2_vitt14_pretrain.pth"}
    single = {**changes, "pretrained_model_name_or_path": tmp_path / "sd15.safetensors"}
    assert repa_setting.train(tmp_path / "file", **single) == 0
    # The teacher's store fits both bases; the latents are those of the folder.
    latents = {"train_latents": tmp_path / "folder_train", "val_latents": tmp_path / "folder_val"}
    assert (
        repa_setting.train(tmp_path / "folder", **changes, **latents, text_embeddings=tmp_path / "folder.safetensors")
        == 0
    )
    assert_equal_states(tmp_path / "file" / "step_000004", tmp_path / "folder" / "step_000004")


def test_prompt_embeddings_of_another_width_are_refused(
    repa_setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.zeros(3, 77, 768), tmp_path / "clip.pt")
    assert repa_setting.train(tmp_path / "out", text_embeddings=tmp_path / "clip.pt") == 2
    assert (
        "clip.pt holds prompt embeddings (77, 768), and the U-Net wants 64 wide ones: they" in capsys.readouterr().err
    )
