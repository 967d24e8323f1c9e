"""The main job on real photos, where there are some.

REPA_TEST_PHOTOS names a folder with train.csv, val.csv, class_names.json and the pictures; without it, a folder
shared/data/imagenet_sample beside the project is looked for. Where neither is there, these tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from library.options.toml_file import PROJECT_ROOT
from tests.tools.runs import metric_rows

PHOTOS = Path(os.environ.get("REPA_TEST_PHOTOS", PROJECT_ROOT.parent / "shared" / "data" / "imagenet_sample"))

pytestmark = pytest.mark.skipif(not (PHOTOS / "train.csv").is_file(), reason=f"no photos in {PHOTOS}")


def test_photos_become_caches_and_a_token_loss_below_the_best_constants(
    tmp_path: Path, tiny_sd15: Path, tiny_dinov2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import prepare_cache
    import train_repa

    options = {
        "train_data": PHOTOS / "train.csv", "val_data": PHOTOS / "val.csv", "class_names": PHOTOS / "class_names.json",
        "cache_dir": tmp_path / "caches", "pretrained_model_name_or_path": tiny_sd15, "dino_model": tiny_dinov2,
        "resolution": 128, "dino_resolution": 224, "token_grid": 4, "mixed_precision": "no", "device": "cpu",
        "max_data_loader_n_workers": 2,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert prepare_cache.main([*argv, "--verify"]) == 0
    said = capsys.readouterr().out
    assert "240 samples cached, 0 unreadable" in said and "60 samples cached, 0 unreadable" in said
    assert said.count("8 encoded again: least cosine") == 4
    # Few photos, so that few steps are enough.
    train = (
        "--train_batch_size 12 --max_train_steps 120 --learning_rate 4e-3 --lora_scope down_mid --align_warmup_steps 5"
    )
    train += " --max_train_samples 48 --align_coeff 2.0 --manifold_weight 0.5 --lr_warmup_steps 5 --ema_decay 0.9"
    train += f" --output_dir {tmp_path / 'out'}"
    assert train_repa.main([*argv, *train.split()]) == 0
    constant = metric_rows(tmp_path / "out", "reference/constant_token_loss")[0]["reference/constant_token_loss"]
    last = metric_rows(tmp_path / "out", "train/token")[-1]["train/token"]
    unseen = metric_rows(tmp_path / "out", "val/token")[-1]["val/token"]
    print(f"token loss: best constant {constant:.3f}, trained {last:.3f}, on unseen photos {unseen:.3f}")
    assert last < 0.95 * constant
