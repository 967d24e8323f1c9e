"""Where a model's files are found: folders, files, the hub cache, the hub; and the sentence when they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from library.errors import UserError
from library.models.load import load_vae, unet_config
from library.models.locate import (
    COMPONENTS,
    base_status,
    choose_weights,
    dino_status,
    locate_base,
    locate_dino,
    refiner_status,
)
from library.models.sd15_configs import SD15_UNET
from library.models.sdxl_configs import SDXL_UNET
from networks.families import SD15, SDXL

ROOT = Path(__file__).resolve().parents[1]


def test_a_refiner_may_be_a_base_or_sdxls_refiner(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "refiner"))
    assert refiner_status(str(folder)) is None
    shutil.rmtree(folder / "text_encoder")
    assert base_status(str(folder)) is not None and refiner_status(str(folder)) is None
    assert "nowhere does not exist" in str(refiner_status("nowhere"))


def test_an_incomplete_folder_says_what_is_missing(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "base"))
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "scheduler")
    sentence = base_status(str(folder))
    assert sentence is not None
    for part in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert part in sentence
    assert base_status(str(folder), ("unet", "text_encoder")) is None
    with pytest.raises(UserError, match="is incomplete"):
        locate_base(str(folder))


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_of_sdxl_needs_both_text_encoders_and_tokenizers(tiny_sdxl: Path, tmp_path: Path, index: bool) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "base"))
    if not index:
        (folder / "model_index.json").unlink()
    assert base_status(str(folder)) is None
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer_2")
    missing = "is incomplete: text_encoder_2/model.safetensors, tokenizer_2/vocab.json missing"
    assert missing in str(base_status(str(folder)))
    assert base_status(str(folder), ("unet", "vae", "text_encoder")) is None
    with pytest.raises(UserError, match=missing):
        locate_base(str(folder))


def test_a_folder_of_something_else_and_a_missing_path_are_told_apart(tmp_path: Path) -> None:
    assert "is not a diffusers folder" in str(base_status(str(tmp_path)))
    assert "does not exist" in str(base_status(str(tmp_path / "nothing.safetensors")))
    assert "is not a DINOv2 folder" in str(dino_status(str(tmp_path)))
    (tmp_path / "notes.txt").write_text("x")
    assert "is not a base model" in str(base_status(str(tmp_path / "notes.txt")))


def test_the_tiny_bases_count_as_there() -> None:
    assert all(base_status(name) is None for name in ("tiny-shapes", "tiny-sd15", "tiny-sdxl"))


def hub_cache(root: Path, hub_id: str, source: Path) -> Path:
    """A cache as huggingface_hub lays it out: refs/main names the snapshot."""
    repository = root / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(source, repository / "snapshots" / commit))


def in_a_fresh_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_hub_ids_are_found_offline_in_the_cache_without_importing_torch(
    tiny_sd15: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    base = hub_cache(tmp_path, "someone/base", tiny_sd15)
    moved = hub_cache(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5", tiny_sd15)
    dino = hub_cache(tmp_path, "facebook/dinov2-large", tiny_dinov2)
    code = """
import sys
from library.errors import UserError
from library.models.locate import *
print(locate_base("someone/base").path)
print(locate_base("runwayml/stable-diffusion-v1-5").path)
print(locate_base("runwayml/stable-diffusion-v1-5").note)
print(locate_dino("facebook/dinov2-large").path)
print(base_status("someone/base"), dino_status("facebook/dinov2-large"), base_status("tiny-sd15"))
try:
    locate_base("someone/absent")
except UserError as error:
    print(error)
print(base_status("someone/absent"))
print("torch" in sys.modules)
"""
    lines = in_a_fresh_process(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)).splitlines()
    assert lines[:2] == [str(base), str(moved)]
    assert lines[2].startswith("runwayml/stable-diffusion-v1-5 has left the hub; its copy")
    assert lines[3:5] == [str(dino), "None None None"]
    assert lines[5] == lines[6]
    assert f"someone/absent is not on this machine: no such file or folder in {ROOT}" in lines[5]
    assert "HF_HUB_OFFLINE is set" in lines[5] and "tiny-shapes" in lines[5]
    assert lines[7] == "False"


def test_a_cached_hub_model_loads(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, "someone/base", tiny_sd15)
    cached, expected = load_vae("someone/base").state_dict(), load_vae(str(tiny_sd15)).state_dict()
    assert all(torch.equal(cached[name], expected[name]) for name in expected)


def hub_of(files: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A hub all of whose models have these files; what is asked of each."""
    asked: dict[str, list[str]] = {}

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked[hub_id] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, hub_id: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_of_a_hub_model_only_what_is_needed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "README.md", "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt",
        "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/config.json",
        "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "safety_checker/model.safetensors",
    ]  # fmt: skip
    asked = hub_of(files, tmp_path, monkeypatch)
    locate_base("someone/base", COMPONENTS)
    wanted = set(files) - {f for f in files if f.endswith((".bin", ".ckpt", ".md")) or "non_ema" in f or "pruned" in f}
    assert set(asked["someone/base"]) == wanted - {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
    }
    locate_base("runwayml/stable-diffusion-v1-5", ("scheduler",))
    assert asked["stable-diffusion-v1-5/stable-diffusion-v1-5"] == [
        "model_index.json",
        "scheduler/scheduler_config.json",
    ]
    with pytest.raises(UserError, match="not in the needed layout: config.json, model.safetensors missing"):
        locate_dino("someone/base")


def test_of_sdxl_on_the_hub_both_text_encoders_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "model_index.json", "sd_xl_base_1.0.safetensors", "scheduler/scheduler_config.json", "vae_1_0/config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "unet/openvino_model.xml", "unet/model.onnx_data", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        *(f"text_encoder{n}/{name}" for n in ("", "_2") for name in ("config.json", "model.safetensors", "flax_model.msgpack")),
        *(f"tokenizer{n}/{name}" for n in ("", "_2") for name in ("vocab.json", "merges.txt", "tokenizer_config.json")),
    ]  # fmt: skip
    asked = hub_of(files, tmp_path, monkeypatch)
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    locate_base(sdxl)
    left = ("sd_xl_base_1.0.safetensors", "vae_1_0/config.json", "unet/diffusion_pytorch_model.fp16.safetensors")
    others = (".xml", ".onnx_data", ".msgpack")
    assert set(asked[sdxl]) == {file for file in files if file not in left and not file.endswith(others)}
    locate_base(sdxl, ("tokenizer_2",))
    assert asked[sdxl] == ["model_index.json", *sorted(f for f in files if f.startswith("tokenizer_2/"))]


def test_a_cached_sdxl_is_used_when_all_of_it_is_there(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = hub_cache(tmp_path, "someone/xl", tiny_sdxl)
    assert locate_base("someone/xl").path == snapshot
    shutil.rmtree(snapshot / "tokenizer_2")
    assert "someone/xl is not on this machine" in str(base_status("someone/xl"))
    assert base_status("someone/xl", ("unet", "vae")) is None


def test_a_failing_fetch_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object, hub_id: str) -> list[str]:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(
        UserError, match=r"could not be fetched from the hub \(Name or service not known\).*tiny-shapes"
    ):
        locate_base("someone/absent")


def test_the_configurations_of_published_models_need_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sd15: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert unet_config("stable-diffusion-v1-5/stable-diffusion-v1-5") == SD15_UNET
    assert unet_config("runwayml/stable-diffusion-v1-5") == SD15_UNET
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    assert unet_config(sdxl, families=(SD15, SDXL)) == SDXL_UNET
    with pytest.raises(UserError, match=f"{sdxl} looks like SDXL. An SD1.5 base model is needed here"):
        unet_config(sdxl)
    assert unet_config(str(tiny_sd15))["block_out_channels"] == [32, 64, 96, 96]
    with pytest.raises(UserError, match="someone/absent is not on this machine"):
        unet_config("someone/absent")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["model-00002-of-00002.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["config.json"], []),
    ],
)
def test_the_best_set_of_weights_is_chosen(names: list[str], chosen: list[str]) -> None:
    assert choose_weights(names, "text_encoder") == chosen
