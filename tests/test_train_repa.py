"""train_repa.py end to end on tiny models: exactness, resume, requests, failures, every mode."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.data.store_writer import StoreWriter
from library.inference.features import extract_features, load_feature_model
from tests.test_dinov2 import meta_weights
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows, state_tensors


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_dinov2: Path) -> RepaSetting:
    return RepaSetting(tmp_path_factory.mktemp("repa") / "data", tiny_sd15, tiny_dinov2)


@pytest.fixture(scope="module")
def finished(setting: RepaSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a state every 2."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert setting.train(output, save_every_n_steps=2, validate_every_n_steps=2) == 0
    return output


def test_a_run_leaves_states_adapters_metrics_and_its_options(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir() if p.name != ".lock") == [
        "logs", "metrics.jsonl", "options.toml", "repa-ema.safetensors", "repa.safetensors", "step_000002", "step_000004",
    ]  # fmt: skip
    state = json.loads((finished / "step_000004" / "state.json").read_text())
    assert state["step"] == 4 and state["samples_seen"] == 16 and state["versions"]["torch"] == torch.__version__
    weights = load_file(finished / "step_000004" / "align_heads.safetensors")
    assert set(weights) == {f"align_heads.mid.proj.{name}" for name in ("0.weight", "0.bias", "2.weight")}
    adapter = load_file(finished / "repa.safetensors")
    assert len(adapter) == 8 * 3 and all(name.startswith("lora_unet_mid_block_") for name in adapter)
    assert any(finished.joinpath("logs").iterdir())


def test_training_changes_every_trained_weight_and_lowers_the_token_loss(
    finished: Path, setting: RepaSetting, tmp_path: Path
) -> None:
    before, after = state_tensors(finished / "step_000002"), state_tensors(finished / "step_000004")
    for name in before:
        if name.startswith(("lora/", "align_heads/", "ema/")):
            assert not torch.equal(before[name], after[name]), name
    assert setting.train(tmp_path, max_train_steps=24) == 0
    token = [row["train/token"] for row in metric_rows(tmp_path, "train/token")]
    assert np.mean(token[-4:]) < 0.8 * token[0]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    finished: Path, setting: RepaSetting, tmp_path: Path
) -> None:
    assert setting.train(tmp_path / "again", max_data_loader_n_workers=3) == 0
    assert_equal_states(finished / "step_000004", tmp_path / "again" / "step_000004")
    assert setting.train(tmp_path / "other", seed=43) == 0
    a, b = state_tensors(finished / "step_000004"), state_tensors(tmp_path / "other" / "step_000004")
    assert not any(torch.equal(a[n], b[n]) for n in a if n.startswith("lora/"))


def test_resuming_gives_the_bits_of_the_uninterrupted_run(finished: Path, setting: RepaSetting, tmp_path: Path) -> None:
    copy_until(finished, tmp_path / "out", 2)
    assert setting.train(tmp_path / "out", save_every_n_steps=2, validate_every_n_steps=2) == 0
    assert_equal_states(finished / "step_000004", tmp_path / "out" / "step_000004")
    whole, resumed = (metric_rows(p, "train/loss") for p in (finished, tmp_path / "out"))
    assert [(r["step"], r["train/loss"]) for r in whole] == [(r["step"], r["train/loss"]) for r in resumed]
    whole, resumed = (metric_rows(p, "val/total") for p in (finished, tmp_path / "out"))
    assert [r["val/total"] for r in whole] == [r["val/total"] for r in resumed]


def test_sigkill_and_the_same_command_again_give_the_bits_of_the_uninterrupted_run(
    setting: RepaSetting, tmp_path: Path
) -> None:
    changes = {"max_train_steps": 30, "save_every_n_steps": 3, "gradient_accumulation_steps": 2, "network_dropout": 0.1}
    whole = setting.start(tmp_path / "whole", **changes)
    output, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, output[-2000:]
    for _ in range(2):
        child = setting.start(tmp_path / "killed", **changes)
        seen = len(list((tmp_path / "killed").glob("step_*")))
        while len(list((tmp_path / "killed").glob("step_*"))) <= seen and child.poll() is None:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not (tmp_path / "killed" / "step_000030").exists()
    child = setting.start(tmp_path / "killed", **changes)
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0 and "resuming from" in output, output[-2000:]
    assert_equal_states(tmp_path / "whole" / "step_000030", tmp_path / "killed" / "step_000030")
    assert [p.name for p in (tmp_path / "killed").glob(".*")] == [".lock"]


def test_the_same_command_after_the_end_has_nothing_to_do(
    finished: Path, setting: RepaSetting, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "repa.safetensors").stat().st_mtime_ns
    assert setting.train(finished, save_every_n_steps=2, validate_every_n_steps=2) == 0
    assert "is the end of this run (4 steps). Nothing is left to do." in capsys.readouterr().out
    assert (finished / "repa.safetensors").stat().st_mtime_ns == before


def test_lambda_0_trains_the_lora_of_a_run_without_heads_to_the_bit(setting: RepaSetting, tmp_path: Path) -> None:
    assert setting.train(tmp_path / "zero", align_coeff=0.0, lora_scope="all") == 0
    assert setting.train(tmp_path / "none", "--no_alignment", lora_scope="all") == 0
    zero, none = (load_file(tmp_path / name / "step_000004" / "lora.safetensors") for name in ("zero", "none"))
    assert all(torch.equal(zero[name], none[name]) for name in none) and zero.keys() == none.keys()
    assert any(t.abs().sum() > 0 for name, t in none.items() if "lora_B" in name)
    assert not (tmp_path / "none" / "step_000004" / "align_heads.safetensors").exists()
    # The losses of the heads are watched all the same.
    assert metric_rows(tmp_path / "zero", "train/token") and not metric_rows(tmp_path / "none", "train/token")


def test_the_frozen_bases_loss_is_that_of_an_untrained_run_and_stays_while_weights_move(
    finished: Path, setting: RepaSetting, tmp_path: Path
) -> None:
    first = metric_rows(finished, "reference/frozen_base_loss")[0]
    assert first["reference/zero_predictor_loss"] == pytest.approx(1.0, abs=0.1)
    assert 0 < first["reference/grid_ceiling_mid"] <= 1
    assert first["reference/positional_token_loss"] <= first["reference/constant_token_loss"]
    copy_until(finished, tmp_path / "out", 2)
    assert setting.train(tmp_path / "out", save_every_n_steps=2, validate_every_n_steps=2) == 0
    again = metric_rows(tmp_path / "out", "reference/frozen_base_loss")
    # At step 2 adapters are trained and switched off for the reference.
    assert again[-1]["step"] == 2 and again[-1]["reference/frozen_base_loss"] == first["reference/frozen_base_loss"]


def test_adapters_lost_after_the_last_state_are_written_by_the_same_command(
    finished: Path, setting: RepaSetting, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    for name in ("repa.safetensors", "repa-ema.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert setting.train(tmp_path / "out", save_every_n_steps=2, validate_every_n_steps=2) == 0
    for name in ("repa.safetensors", "repa-ema.safetensors"):
        a, b = load_file(finished / name), load_file(tmp_path / "out" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_state_of_other_samples_or_base_weights_is_not_continued_silently(
    finished: Path, setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(finished, tmp_path / "out", 2)
    file = tmp_path / "out" / "step_000002" / "state.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"samples": "x", "base_weights": "y"}))
    assert setting.train(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "the training samples or their classes changed; the weights of the base model's U-Net changed since" in said
    file.write_text(json.dumps(facts | {"versions": facts["versions"] | {"torch": "1.0"}}))
    assert setting.train(tmp_path / "out") == 0
    assert "other versions may compute other bits: torch 1.0 then" in capsys.readouterr().out


def test_moments_come_back_in_the_layout_of_their_weights(setting: RepaSetting, tmp_path: Path) -> None:
    from library.training.ema import ExponentialAverage
    from library.training.state import Trained, load_state, save_state

    def trained() -> Trained:
        weight = torch.nn.Parameter(torch.ones(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return Trained({"lora": {"w": weight}}, optimizer, ExponentialAverage({"w": weight}, 0.5), {})

    saved, loaded = trained(), trained()
    save_state(tmp_path / "step_000001", saved, {"step": 1})
    load_state(tmp_path / "step_000001", loaded)
    (weight,) = loaded.parameters.values()
    (original,) = saved.parameters.values()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = loaded.optimizer.state[weight][key]
        assert moment.stride() == weight.stride() and torch.equal(moment, saved.optimizer.state[original][key])


@pytest.mark.parametrize(
    "changes",
    [
        {"taps": "enc_last mid dec_first", "lora_scope": "down_mid"},
        {"align_head": "linear", "manifold_mode": "token", "manifold_margin": 0.1},
        {"align_head": "conv3x3", "manifold_mode": "random", "manifold_random_tokens": 8, "manifold_clip": 0.01},
        {"v_parameterization": "", "min_snr_gamma": 5.0, "align_schedule": "cutoff", "align_cutoff_step": 1},
        {"raw_v_target": "", "align_schedule": "constant", "ema_decay": 0.0, "max_grad_norm": 0.0},
        {"conv_dim": 2, "lora_scope": "all", "gradient_checkpointing": "", "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "encoder_precision": "no", "lr_scheduler": "linear", "class_dropout": 1.0},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_mode_trains(setting: RepaSetting, tmp_path: Path, changes: dict[str, object]) -> None:
    assert setting.train(tmp_path, max_train_steps=2, **changes) == 0
    rows = metric_rows(tmp_path, "train/loss")
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)


def test_gradient_checkpointing_changes_no_bit(finished: Path, setting: RepaSetting, tmp_path: Path) -> None:
    assert setting.train(tmp_path, "--gradient_checkpointing") == 0
    assert_equal_states(finished / "step_000004", tmp_path / "step_000004")


def test_validation_numbers_depend_on_the_weights_alone(setting: RepaSetting, tmp_path: Path) -> None:
    # Rates too small to move float32 weights: every validation sees the same ones.
    assert setting.train(tmp_path, learning_rate=1e-30, validate_every_n_steps=1, align_schedule="constant") == 0
    rows = [{k: v for k, v in row.items() if k != "step"} for row in metric_rows(tmp_path, "val/total")]
    assert len(rows) == 4 and all(row == rows[0] for row in rows)
    parts = rows[0]
    assert parts["val/total"] == pytest.approx(
        parts["val/diffusion"] + 0.5 * (parts["val/token"] + 3 * parts["val/manifold"])
    )
    # Four samples stand at timesteps 500, 118, 736 and 354: one, one and two in the quarters, none in the last.
    q1, q2, q3 = (parts[f"val/diffusion_q{i}"] for i in (1, 2, 3))
    assert (q1 + q2 + 2 * q3) / 4 == pytest.approx(parts["val/diffusion"], rel=1e-5) and "val/diffusion_q4" not in parts


def test_a_stop_file_saves_a_state_and_the_run_goes_on_later(
    finished: Path,
    setting: RepaSetting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from library.training.stop import Requests

    # Looks at the folder each time, and the file appears while step 3 runs.
    looks = iter(range(100))
    original = Requests.look

    def look(self: Requests) -> int:
        if next(looks) == 3:
            (tmp_path / "stop").touch()
        self._looked = 0.0
        return original(self)

    monkeypatch.setattr(Requests, "look", look)
    assert setting.train(tmp_path, save_every_n_steps=2, validate_every_n_steps=2) == 75
    assert "Stopped at step 3 of 4 by the file" in capsys.readouterr().err
    assert (tmp_path / "step_000003").is_dir() and not (tmp_path / "stop").exists()
    monkeypatch.undo()
    assert setting.train(tmp_path, save_every_n_steps=2, validate_every_n_steps=2) == 0
    assert_equal_states(finished / "step_000004", tmp_path / "step_000004")


def test_sigterm_saves_a_resumable_state(setting: RepaSetting, tmp_path: Path) -> None:
    child = setting.start(tmp_path, max_train_steps=100000, save_every_n_steps=100000)
    rows = tmp_path / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("train/loss") > 2) and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 75 and "by SIGTERM. Run the same command again to continue." in output
    assert len(list(tmp_path.glob("step_*"))) == 1 and "Traceback" not in output


def test_only_the_newest_states_are_kept_when_asked(setting: RepaSetting, tmp_path: Path) -> None:
    assert setting.train(tmp_path, save_every_n_steps=1, save_last_n_states=2) == 0
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000003", "step_000004"]


def test_a_resume_with_other_options_names_them(
    finished: Path, setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(finished, tmp_path / "out", 2)
    assert setting.train(tmp_path / "out", learning_rate=1e-3, align_coeff=0.7) == 2
    said = capsys.readouterr().err
    assert "belongs to a run with other options: align_coeff was 0.5, is 0.7; learning_rate was 0.01, is 0.001." in said
    assert setting.train(tmp_path / "out", "--allow_changed_options", learning_rate=1e-3) == 0
    assert setting.train(tmp_path / "out", resume="none") == 2
    assert "already holds states (newest: step_000004) and --resume none asks for a new run" in capsys.readouterr().err


def test_a_damaged_or_foreign_state_is_one_sentence(
    finished: Path, setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(finished, tmp_path / "out", 2)
    whole = (tmp_path / "out" / "step_000002" / "optimizer.safetensors").read_bytes()
    (tmp_path / "out" / "step_000002" / "optimizer.safetensors").write_bytes(whole[:-100])
    assert setting.train(tmp_path / "out") == 2
    assert "optimizer.safetensors cannot be read" in capsys.readouterr().err
    assert setting.train(tmp_path / "new", resume=str(tmp_path)) == 2
    assert "is no training state: there is no state.json in it." in capsys.readouterr().err
    copy_until(finished, tmp_path / "two", 2)
    save_file({"x": torch.zeros(1)}, tmp_path / "two" / "step_000002" / "lora.safetensors")
    assert setting.train(tmp_path / "two") == 2
    assert "does not fit this run: 16 weights are missing and 1 unknown" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(
    setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = tmp_path / "caches"
    assert setting.train(tmp_path / "out", cache_dir=caches, save_every_n_steps=1, max_train_steps=2) == 0
    writer = StoreWriter(caches / "train_latents", "latents", expected_bytes=0)
    with writer._environment.begin() as transaction:
        sources = {f"p{i}": transaction.get(f"p{i}#source".encode()) for i in range(8)}
    for sample_id, source in sources.items():
        writer.put(sample_id, np.full((4, 16, 16), np.inf, np.float16), source)
    writer.commit()
    writer.close()
    assert (
        setting.train(
            tmp_path / "out", "--allow_changed_options", cache_dir=caches, save_every_n_steps=1, max_train_steps=4
        )
        == 76
    )
    said = capsys.readouterr().err
    assert "step 2: loss nan" in said and "Samples of that step: p" in said and "The last good state is" in said
    assert sorted(p.name for p in (tmp_path / "out").glob("step_*")) == ["step_000001", "step_000002"]


def test_data_smaller_than_a_batch_and_other_bad_input_are_one_sentence_with_code_2(
    setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, words in (
        ({"train_batch_size": 9}, "is 9 samples a step, but the training set has only 8"),
        ({"train_data": tmp_path / "nowhere"}, "nowhere does not exist"),
        ({"pretrained_model_name_or_path": tmp_path / "nowhere"}, "nowhere"),
        ({"dino_model": tmp_path / "nowhere.pth"}, "nowhere"),
        ({"dino_resolution": 112}, "train_tokens was made differently: dino_resolution 56 there, 112 here"),
    ):
        assert setting.train(tmp_path / "out", **changes) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_xformers_asked_for_and_unusable_names_sdpa(
    setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("xformers may work here")
    assert setting.train(tmp_path / "out", "--xformers") == 2
    assert "--xformers was asked for" in (said := capsys.readouterr().err) and "--sdpa" in said


def test_features_come_as_tokens_pooled_or_as_a_map(finished: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    text = torch.zeros(3, 77, 64)
    model = load_feature_model(finished / "step_000004")
    tokens = extract_features(model, latents, text, timestep=100)
    assert tokens.shape == (3, 16, 64)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(3, 16))
    torch.testing.assert_close(extract_features(model, latents, text, timestep=100, what="pooled"), tokens.mean(1))
    features = extract_features(finished / "step_000004", latents, text, timestep=100, what="map", tap="dec_first")
    assert features.shape[0] == 3 and features.shape[2:] == (4, 4) and features.dtype == torch.float32
    live = load_feature_model(finished / "step_000004", use_ema=False)
    assert not torch.equal(extract_features(live, latents, text, timestep=100), tokens)
    with pytest.raises(Exception, match="no AlignHead at enc_last"):
        extract_features(model, latents, text, tap="enc_last")


def test_dry_run_of_track_a_prints_1562_and_62480(capsys: pytest.CaptureFixture[str]) -> None:
    import train_repa

    assert train_repa.main(["--dataset_config", "trackA.toml", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "steps per epoch  1562\n" in said and "steps            62480 (40 epochs)" in said
    assert "155,648 lora + 2,360,320 align_heads" in said and "device memory    about" in said
    assert "missing          " in said


def test_dry_run_of_the_demo_misses_nothing_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
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


def test_one_safetensors_file_as_base_and_metas_file_as_teacher_train_as_folders_do(
    setting: RepaSetting, tmp_path: Path, tiny_sd15: Path
) -> None:
    save_file(ldm_checkpoint(tiny_sd15), tmp_path / "sd15.safetensors")
    torch.save(meta_weights(registers=0, swiglu=False), tmp_path / "dinov2_vitt14_pretrain.pth")
    changes = {"cache_dir": tmp_path / "caches", "dino_model": tmp_path / "dinov2_vitt14_pretrain.pth"}
    single = {**changes, "pretrained_model_name_or_path": tmp_path / "sd15.safetensors"}
    assert setting.train(tmp_path / "file", **single) == 0
    # The teacher's store fits both bases; the latents are those of the folder.
    latents = {"train_latents": tmp_path / "folder_train", "val_latents": tmp_path / "folder_val"}
    assert (
        setting.train(tmp_path / "folder", **changes, **latents, text_embeddings=tmp_path / "folder.safetensors") == 0
    )
    assert_equal_states(tmp_path / "file" / "step_000004", tmp_path / "folder" / "step_000004")
