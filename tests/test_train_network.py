"""train_network.py end to end on tiny bases: the guide's commands, what they leave, and every mode."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from library.training.stop import STOP
from networks.adapter_file import read_adapter
from networks.names import Target
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.network_runs import NetworkSetting, adapter, asked, draw_pictures, losses, metadata, names, rows

# The guide's command for SDXL, as it stands there: paths are filled in, and rank and epochs are smaller.
GUIDE = """
  --dataset_config {config} --pretrained_model_name_or_path {base} --output_dir {output} --output_name luca_v1
  --network_module networks.lora --network_dim 4 --network_alpha 2 --learning_rate 0.0003 --text_encoder_lr 0.0002
  --unet_lr 0.0003 --max_train_epochs 3 --save_every_n_epochs 2 --save_model_as safetensors --save_precision fp16
  --mixed_precision fp16 --gradient_checkpointing --gradient_accumulation_steps 2 --optimizer_type AdamW8bit
  --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3 --lr_warmup_steps 1 --logging_dir {output}/logs
  --log_with tensorboard --seed 42 --clip_skip 2 --cache_latents --cache_latents_to_disk --max_data_loader_n_workers 8
  --persistent_data_loader_workers --xformers --max_token_length 225 --bucket_reso_steps 64 --bucket_no_upscale
"""

# Its data set files, at a resolution for tests.
DATASET = """
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
[[datasets]]
resolution = 64
batch_size = 1
[[datasets.subsets]]
image_dir = '{data}'
caption_extension = '.txt'
num_repeats = 1
shuffle_caption = true
keep_tokens = 1
"""


def run_guide(folder: Path, base: Path, output: Path, more: str = "") -> int:
    import train_network

    data = draw_pictures(folder / "luca_human", ((64, 64), (64, 64)))
    (folder / "data.toml").write_text(DATASET.format(data=data / "images"))
    words = shlex.split(GUIDE.format(config=folder / "data.toml", base=base, output=output) + more)
    return train_network.main([*words, "--cache_dir", str(folder / "cache"), "--device", "cpu", "--save_state"])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_guides_command_trains_a_single_file_and_a_folder_alike(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    base: Path = request.getfixturevalue(f"tiny_{family}")
    tensors = {name: value.contiguous() for name, value in ldm_checkpoint(base).items()}
    save_file(tensors, tmp_path / "base.safetensors")
    assert run_guide(tmp_path, tmp_path / "base.safetensors", tmp_path / "file") == 0
    assert names(tmp_path / "file") == [
        "logs", "luca_v1-000002-state", "luca_v1-000002.safetensors", "luca_v1-state", "luca_v1.safetensors",
        "metrics.jsonl", "options.toml", "run.html",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{14}/network_train", "/".join(board(tmp_path / "file").parts[-2:]))
    assert any(file.name.startswith("events.") for file in board(tmp_path / "file").iterdir())
    dtypes = {value.dtype for value in adapter(tmp_path / "file" / "luca_v1.safetensors").values()}
    assert dtypes == {torch.float16}, "alphas too"
    assert_diffusers_uses_all_of(tmp_path / "file" / "luca_v1.safetensors", base, caplog)
    # One step is enough to see that the folder is the same model.
    short = " --max_train_epochs 1 --lr_warmup_steps 0 --max_data_loader_n_workers 1"
    assert run_guide(tmp_path, base, tmp_path / "folder", short) == 0
    assert (tmp_path / "folder" / "luca_v1.safetensors").exists()
    file, folder = (losses(tmp_path / name, "reference/frozen_base_loss") for name in ("file", "folder"))
    assert file == folder


def board(output: Path) -> Path:
    (found,) = (output / "logs").glob("*/*")
    return found


def assert_diffusers_uses_all_of(path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loaded without a word, and every module of the file at work."""
    kind = StableDiffusionXLPipeline if (base / "text_encoder_2").exists() else StableDiffusionPipeline
    pipeline: Any = kind.from_pretrained(base)
    diffusers.utils.logging.enable_propagation()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    diffusers.utils.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")] == []
    found = {
        Target(component, name): layer
        for component in ("unet", "text_encoder", "text_encoder_2")
        for name, layer in (getattr(pipeline, component, None) or torch.nn.Module()).named_modules()
        if isinstance(layer, LoraLayer)
    }
    modules = read_adapter(path).modules
    assert sorted(found) == sorted(modules) and len(modules) > 100
    for target, layer in found.items():
        (name,) = layer.lora_A.keys()
        delta = layer.get_delta_weight(name).detach()
        torch.testing.assert_close(delta, modules[target].product().reshape(delta.shape), rtol=1e-3, atol=1e-6)


def test_epochs_and_steps_leave_their_files_and_old_ones_go(network_setting: NetworkSetting, tmp_path: Path) -> None:
    options = {
        **network_setting.quick, "max_train_epochs": 4, "save_state": "", "save_every_n_epochs": 1, "save_last_n_epochs": 2,
        "save_last_n_epochs_state": 1, "save_every_n_steps": 3, "save_last_n_steps": 2, "save_last_n_steps_state": 1,
    }  # fmt: skip
    assert network_setting.train(tmp_path, **options) == 0
    assert [name for name in names(tmp_path) if name.startswith("mio")] == [
        "mio-000002.safetensors", "mio-000003-state", "mio-000003.safetensors", "mio-state",
        "mio-step00000006-state", "mio-step00000006.safetensors", "mio.safetensors",
    ]  # fmt: skip
    assert metadata(tmp_path / "mio-step00000006.safetensors")["ss_epoch"] == "3"


def test_early_stop_ends_the_run_with_its_final_save(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates too small to move a weight: no validation is better than the first."""
    options = {
        "learning_rate": 1e-30, "validation_split": 0.4, "early_stop": 2, "max_train_epochs": 9, "save_state": "",
        "network_train_unet_only": "", "validate_every_n_steps": 1,
    }  # fmt: skip
    with asked(2, STOP, tmp_path):
        assert network_setting.train(tmp_path, **options) == 75
    assert network_setting.train(tmp_path, **options) == 0
    assert "early stop: 2 validations without a better loss" in capsys.readouterr().out
    found = rows(tmp_path, "val/loss")
    assert [row["step"] for row in found] == [1, 2, 3]
    # The same pictures, noise and timesteps each time.
    assert len({(row["val/loss"], row["val/train_loss"], row["val/gap"]) for row in found}) == 1
    assert found[0]["val/gap"] == pytest.approx(found[0]["val/loss"] - found[0]["val/train_loss"])
    assert {"mio.safetensors", "mio-state"} <= set(names(tmp_path))
    assert network_setting.train(tmp_path, **options) == 0
    assert "mio-state is the end of this run (step 3). Nothing is left to do." in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"network_args": "conv_dim=2 conv_alpha=1 rank_dropout=0.1 module_dropout=0.1", "scale_weight_norms": 0.01},
        {"network_args": "algo=dora loraplus_unet_lr_ratio=4", "mixed_precision": "bf16", "noise_offset": 0.05},
        {"network_args": "algo=lokr factor=2", "min_snr_gamma": 5, "multires_noise_iterations": 3},
        {"network_args": "algo=oft", "loss_type": "huber", "ip_noise_gamma": 0.1, "optimizer_type": "Lion"},
        {"full_bf16": "", "mixed_precision": "bf16", "debiased_estimation_loss": "", "optimizer_type": "Adafactor"},
        {"v_parameterization": "", "zero_terminal_snr": "", "scale_v_pred_loss_like_noise_pred": "", "no_sdpa": ""},
        {
            "fp8_base_unet": "",
            "mixed_precision": "bf16",
            "gradient_checkpointing": "",
            "optimizer_type": "AdamWScheduleFree",
        },
    ],
    ids=lambda changes: " ".join(map(str, changes.values()))[:30],
)
def test_every_mode_trains(network_setting: NetworkSetting, tmp_path: Path, changes: dict[str, object]) -> None:
    assert network_setting.train(tmp_path, **{**network_setting.quick, "max_train_epochs": 1, **changes}) == 0
    found = rows(tmp_path)
    assert len(found) == 2 and all(np.isfinite(list(row.values())).all() for row in found)
    if "scale_weight_norms" in changes:
        assert found[-1]["train/norm/max_norm"] == pytest.approx(0.01) and found[-1]["train/norm/keys_scaled"] > 0


@pytest.mark.bits
def test_gradient_checkpointing_changes_no_bit(network_setting: NetworkSetting, tmp_path: Path) -> None:
    """Text encoders included."""
    options = {
        **network_setting.quick,
        "network_train_unet_only": None,
        "cache_text_encoder_outputs": None,
        "max_train_epochs": 1,
    }
    assert network_setting.train(tmp_path / "plain", **options) == 0
    assert network_setting.train(tmp_path / "checkpointed", **options, gradient_checkpointing="") == 0
    a, b = (adapter(tmp_path / name / "mio.safetensors") for name in ("plain", "checkpointed"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_two_processes_share_an_epoch(network_setting: NetworkSetting, tmp_path: Path, tiny_dinov2: Path) -> None:
    """Three pictures in two steps, the second of which one process only passes through, its heads too."""
    options = {
        **network_setting.quick, "save_state": "", "gradient_accumulation_steps": 1, "alignment": "",
        "dino_model": tiny_dinov2, "dino_resolution": 56, "token_grid": 4, "manifold_mode": "token",
    }  # fmt: skip
    output = network_setting.start(tmp_path, processes=2, **options).end()
    assert "3 samples, 2 steps per epoch, 4 steps, up to batch 1 x 1 accumulated x 2 processes" in output
    assert {"mio.safetensors", "mio-state"} <= set(names(tmp_path))
    facts = json.loads((tmp_path / "mio-state" / "state.json").read_text())
    assert (facts["step"], facts["samples_seen"], facts["world_size"]) == (4, 6, 2)
    assert all(0 < row["train/token"] < 2 and row["lambda"] > 0 for row in rows(tmp_path)[1:])


def test_the_bare_command_needs_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_network

    where = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--device", "cpu"]
    assert train_network.main([*where, "--dry_run"]) == 0
    said = capsys.readouterr().out
    for words in ("dataset 128x128, batch size 4", "bucket   images", "steps            1600", "trained   "):
        assert words in said
    assert "device memory    about" in said and "missing          nothing" in said and not list(tmp_path.iterdir())
    # Fewer of the pictures, for time.
    folder = draw_pictures(tmp_path / "demo" / "images" / "cat", ((64, 64),) * 9).parents[1]
    monkeypatch.setattr("library.data.collect.ensure_demo_pictures", lambda where: folder)
    assert train_network.main([*where, "--max_train_steps", "2"]) == 0
    assert "last.safetensors" in names(tmp_path / "out") and len(losses(tmp_path / "out")) == 1


def test_a_written_config_file_trains_the_same_run(network_setting: NetworkSetting, tmp_path: Path) -> None:
    import train_network

    file = str(tmp_path / "all.toml")
    options = {**network_setting.quick, "max_train_epochs": 1, "sample_sampler": None}
    assert network_setting.train(tmp_path / "a", "--output_config", config_file=file, **options) == 0
    assert not (tmp_path / "a").exists()
    assert network_setting.train(tmp_path / "a", **options) == 0
    assert train_network.main(["--config_file", file, "--output_dir", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
