"""What train_repa.py has by the engine that it shares with train_network.py: captions, buckets, SDXL, kinds of adapter, fp16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prepare_cache
import train_repa
from tests.tools.network_runs import NetworkSetting
from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows


@pytest.fixture(scope="module")
def captioned(sdxl_setting: NetworkSetting, tiny_dinov2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a run on SDXL over captioned pictures in three buckets, options and data sets in one file."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "prompts.txt").write_text("mio --w 64 --h 64 --s 2\n")
    file = (
        sdxl_setting.folder / "captioned.toml"
    )  # from where pictures have the same names anywhere, so the same are held out
    file.write_text(
        f"""
        [run]
        pretrained_model_name_or_path = "{sdxl_setting.base}"
        dino_model = "{tiny_dinov2}"
        cache_dir = "{folder / "caches"}"
        dino_resolution = 56
        token_grid = 4
        mixed_precision = "no"
        device = "cpu"
        max_train_steps = 4
        learning_rate = 1e-2
        align_warmup_steps = 2
        lr_warmup_steps = 1
        ema_decay = 0.5
        save_every_n_steps = 2
        validate_every_n_steps = 2
        log_every_n_steps = 1
        max_data_loader_n_workers = 1
        sample_prompts = "{folder / "prompts.txt"}"
        sample_every_n_steps = 2
        [general]
        enable_bucket = true
        bucket_reso_steps = 32
        min_bucket_reso = 64
        resolution = 96
        batch_size = 2
        validation_split = 0.3
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "{sdxl_setting.data.name}"
        flip_aug = true
        shuffle_caption = true
        caption_extension = ".txt"
        """
    )
    return ["--dataset_config", str(file)]


@pytest.mark.bits
def test_captions_in_buckets_on_sdxl_train_sample_and_resume_to_the_bit(captioned: list[str], tmp_path: Path) -> None:
    assert train_repa.main([*captioned, "--output_dir", str(tmp_path / "whole")]) == 0
    assert len(list((tmp_path / "whole" / "sample").glob("*.png"))) == 2
    (row, *_) = metric_rows(tmp_path / "whole", "val/loss")
    assert row.keys() >= {"val/token", "val/manifold", "val/total", "val/train_loss", "val/gap"}
    copy_until(tmp_path / "whole", tmp_path / "resumed", 2)
    assert train_repa.main([*captioned, "--output_dir", str(tmp_path / "resumed")]) == 0
    assert_equal_states(tmp_path / "whole" / "step_000004", tmp_path / "resumed" / "step_000004")
    left, right = (load_file(tmp_path / name / "repa.safetensors") for name in ("whole", "resumed"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_caches_of_captions_are_prepared_by_the_same_file(
    captioned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*captioned, "--cache_dir", str(tmp_path / "caches")]
    assert prepare_cache.main(argv) == 0
    assert "All caches are complete" in capsys.readouterr().out
    assert prepare_cache.main(argv) == 0
    again = capsys.readouterr().out
    assert "All caches are complete" in again and "encoded" not in again


def test_class_pictures_train_on_sdxl(repa_setting: RepaSetting, tiny_sdxl: Path, tmp_path: Path) -> None:
    changes = {"pretrained_model_name_or_path": tiny_sdxl, "cache_dir": tmp_path / "caches", "max_train_steps": 2}
    assert repa_setting.train(tmp_path / "out", **changes) == 0
    prompts = load_file(tmp_path / "caches" / "text_embeddings.safetensors")
    assert prompts["embeddings"].shape[0] == prompts["pooled"].shape[0] == 3
    keys = load_file(tmp_path / "out" / "repa.safetensors").keys()
    assert all(key.startswith("lora_unet_middle_block") for key in keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"network_args": "algo=lokr factor=2", "lora_scope": "all"},
        {"network_args": "algo=dora rank_dropout=0.2 module_dropout=0.2", "network_dropout": 0.1},
        {"mixed_precision": "fp16", "encoder_precision": "no"},
        {"early_stop": 1, "validate_every_n_steps": 1, "learning_rate": 1e-30, "max_train_steps": 9},
        {"validation_split": 0.3, "val_data": None},
        {"objective": "v", "scale_v_pred_loss_like_noise_pred": "", "noise_offset": 0.05},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_class_pictures_take_the_options_of_the_engine(
    repa_setting: RepaSetting, tmp_path: Path, changes: dict[str, object]
) -> None:
    options = {"max_train_steps": 2, **changes}
    if options.pop("val_data", "") is None:
        argv = repa_setting.argv(tmp_path, **options)
        place = argv.index("--val_data")
        assert train_repa.main(argv[:place] + argv[place + 2 :]) == 0
    else:
        assert repa_setting.train(tmp_path, **options) == 0
    (state,) = tmp_path.glob("step_*")
    assert (state.name == "step_000002") and json.loads((state / "state.json").read_text())["finished"]
    assert metric_rows(tmp_path, "train/token")


def test_adapters_are_folded_into_the_base_first(repa_setting: RepaSetting, finished_run: Path, tmp_path: Path) -> None:
    before = metric_rows(finished_run, "reference/frozen_base_loss")[0]
    weights = finished_run / "repa.safetensors"
    assert repa_setting.train(tmp_path, base_weights=weights, base_weights_multiplier=3.0, max_train_steps=1) == 0
    after = metric_rows(tmp_path, "reference/frozen_base_loss")[0]
    assert after["reference/frozen_base_loss"] != before["reference/frozen_base_loss"]
