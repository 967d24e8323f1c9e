"""A file of kinds that only others make (LoRA and whole differences as ComfyUI saves them, GLoRA, IA3, DoRA around LoHa) in every
script that reads adapters: it does what it says, or is refused by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import evaluate
from library.errors import EXIT_BAD_INPUT, EXIT_OK
from networks.families import FAMILIES, TEXT_ENCODER, TEXT_ENCODER_2, UNET
from networks.original_names import unet_to_original
from tests.tools.generating import run
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.merging import FILES, assert_same_tensors, run_merge, save
from tests.tools.network_runs import NetworkSetting

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
VALUE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
NORM = "mid_block.resnets.0.norm1"
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"

Changes = dict[str, dict[str, Tensor]]
"""Component -> key -> what is added to it at ratio 1."""


def draw(*shape: int, seed: int = 0, size: float = 0.1) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 97 * seed))


def foreign_adapter(base: Path, family: str) -> tuple[dict[str, Tensor], Changes]:
    """The tensors of a file for this base, and what each adds."""
    states = {component: load_file(base / FILES[component]) for component in (UNET, *FAMILIES[family].text_encoders)}
    unet = states[UNET]
    tensors: dict[str, Tensor] = {}
    changes: Changes = {component: {} for component in states}

    def lora(component: str, prefix: str, path: str) -> None:
        out, inner = states[component][f"{path}.weight"].shape
        down, up = draw(2, inner), draw(out, 2)
        tensors.update({f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up})
        changes[component][f"{path}.weight"] = up @ down

    def whole(component: str, key: str, name: str) -> None:
        tensors[name] = changes[component][key] = draw(*states[component][key].shape)

    def comfyui(path: str) -> str:
        return f"diffusion_model.{unet_to_original(FAMILIES[family], path)}"

    lora(UNET, comfyui(QUERY), QUERY)
    whole(UNET, f"{NORM}.weight", f"{comfyui(NORM)}.diff")
    whole(UNET, f"{NORM}.bias", f"{comfyui(NORM)}.diff_b")
    whole(UNET, f"{CONV}.bias", f"{comfyui(CONV)}.diff_b")
    lora(TEXT_ENCODER, f"text_encoders.clip_l.transformer.{TEXT}", TEXT)
    whole(TEXT_ENCODER, f"{TEXT}.bias", f"text_encoders.clip_l.transformer.{TEXT}.diff_b")
    if TEXT_ENCODER_2 in states:
        lora(TEXT_ENCODER_2, f"text_encoders.clip_g.transformer.{TEXT}", TEXT)
        lora(TEXT_ENCODER_2, "text_encoders.clip_g.transformer.text_projection", "text_projection")
        whole(TEXT_ENCODER_2, f"{TEXT}.bias", f"text_encoders.clip_g.transformer.{TEXT}.diff_b")
        position = "text_model.embeddings.position_embedding"
        whole(TEXT_ENCODER_2, f"{position}.weight", f"text_encoders.clip_g.transformer.{position}.diff")
    # GLoRA and IA3 of LyCORIS, in kohya's names.
    out, inner = unet[f"{KEY}.weight"].shape
    a1, a2, b1, b2 = draw(inner, 2), draw(2, inner), draw(out, 2), draw(2, inner)
    name = f"lora_unet_{KEY.replace('.', '_')}"
    tensors |= {
        f"{name}.{part}.weight": value for part, value in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    changes[UNET][f"{KEY}.weight"] = b1 @ b2 + unet[f"{KEY}.weight"].float() @ a1 @ a2
    factors = draw(unet[f"{VALUE}.weight"].shape[0])
    name = f"lora_unet_{VALUE.replace('.', '_')}"
    tensors |= {f"{name}.weight": factors, f"{name}.on_input": torch.tensor(0)}
    changes[UNET][f"{VALUE}.weight"] = unet[f"{VALUE}.weight"].float() * factors[:, None]
    tensors["bundle_emb.cat.clip_l"] = draw(2, 64)
    return tensors, changes


@pytest.fixture
def sd15_file(tiny_sd15: Path, tmp_path: Path) -> Path:
    return save(foreign_adapter(tiny_sd15, "sd15")[0], tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_merged_as_it_says_into_a_folder_and_into_a_single_file(
    family: str, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}[family]
    tensors, changes = foreign_adapter(base, family)
    version = {"ss_base_model_version": FAMILIES[family].base_version}
    file = save(tensors, tmp_path / "foreign.safetensors", version)
    words = ["--models", file, "--ratios", 0.5, "--pretrained_model_name_or_path", base, "--save_precision", "float"]
    assert run_merge(*words, "--output_dir", tmp_path / "merged") == EXIT_OK
    said = capsys.readouterr().out
    assert "left out: 1 tensor of the textual inversion embedding cat, which is not read" in said
    assert f"{len(tensors)} keys = 0 frozen + {len(tensors) - 1} merged + 1 dropped" in said
    for component, added in changes.items():
        before, after = (load_file(folder / FILES[component]) for folder in (base, tmp_path / "merged"))
        different = {key for key, value in after.items() if not torch.equal(value, before[key].float())}
        assert different == added.keys()
        for key, change in added.items():
            torch.testing.assert_close(after[key], before[key].float() + 0.5 * change, rtol=1e-6, atol=1e-6)
    assert run_merge(*words, "--save_to", tmp_path / "single.safetensors") == EXIT_OK
    assert_same_tensors(tmp_path / "single.safetensors", ldm_checkpoint(tmp_path / "merged"))


def test_a_picture_with_it_is_that_of_the_merged_base(
    sd15_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--pretrained_model_name_or_path", tiny_sd15]
    assert run_merge("--models", sd15_file, *base, "--output_dir", tmp_path / "merged") == EXIT_OK
    merged = ["--pretrained_model_name_or_path", tmp_path / "merged", "--output", tmp_path / "merged.png"]
    assert run(*merged, "--seed", 1) == EXIT_OK
    capsys.readouterr()
    assert run(*base, "--lora", sd15_file, "--seed", 1, "--output", tmp_path / "folded.png") == EXIT_OK
    assert "left out: 1 tensor of the textual inversion embedding cat, which is not read" in capsys.readouterr().out
    assert run(*base, "--seed", 1, "--output", tmp_path / "base.png") == EXIT_OK
    folded, expected, without = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("folded.png", "merged.png", "base.png")
    )
    assert np.abs(folded - expected).max() <= 1 < np.abs(without - expected).max()


@pytest.mark.parametrize("words", [[], ["--new_rank", "2"], ["--lora_format", "diffusers"], ["--lora_format", "peft"]])
def test_glora_and_ia3_are_neither_summed_nor_resized_nor_converted(
    words: list[str], sd15_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    assert run_merge("--models", sd15_file, "--lora_only", "--save_to", output, *words) == EXIT_BAD_INPUT
    said = "error: 2 of 8 modules are GLoRA and IA3, and --lora_only is for LoRA. Merge the adapter into a base model instead."
    assert said in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comfyui_saves_is_summed_resized_and_converted_with_its_whole_differences(
    family: str, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}[family]
    tensors = foreign_adapter(base, family)[0]
    metadata = {"ss_base_model_version": FAMILIES[family].base_version}
    kept = {key: value for key, value in tensors.items() if not key.startswith(("lora_unet", "bundle"))}
    file = save(kept, tmp_path / "comfyui.safetensors", metadata)
    # A LoRA on a module that is a whole difference in the other file: the sum is one.
    key = next(
        key
        for key in kept
        if key.endswith(".clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_up.weight")
    )
    diff = {key.replace("lora_up.weight", "diff"): draw(len(kept[key]), len(kept[key]), seed=3)}
    other = save(diff, tmp_path / "other.safetensors", metadata)

    def merged(name: str, *files: Path, ratios: tuple[float, ...]) -> dict[str, Tensor]:
        words = ["--models", *files, "--ratios", *ratios, "--pretrained_model_name_or_path", base]
        assert run_merge(*words, "--save_to", tmp_path / f"{name}-merged.safetensors") == EXIT_OK
        return load_file(tmp_path / f"{name}-merged.safetensors")

    def made(name: str, *words: object) -> Path:
        output = tmp_path / f"{name}.safetensors"
        assert run_merge(*words, "--lora_only", "--save_precision", "float", "--save_to", output) == EXIT_OK
        return output

    converted = made("converted", "--models", file)
    assert all(key.startswith("lora_") for key in load_file(converted))
    assert_same_tensors(merged("converted", converted, ratios=(0.5,)), merged("itself", file, ratios=(0.5,)))
    resized = made("resized", "--models", file, "--new_rank", 2)
    summed = made("summed", "--models", file, other, "--ratios", 0.5, -1)
    for found, expected in (
        (merged("resized", resized, ratios=(1,)), merged("one", file, ratios=(1,))),
        (merged("summed", summed, ratios=(1,)), merged("both", file, other, ratios=(0.5, -1))),
    ):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    for form in ("diffusers", "peft"):
        words = ["--models", file, "--lora_only", "--lora_format", form, "--save_to", tmp_path / f"{form}.safetensors"]
        capsys.readouterr()
        assert run_merge(*words) == EXIT_BAD_INPUT
        said = (
            "modules are Full (diff), and the diffusers form is for"
            if form == "diffusers"
            else "an adapter of one model"
        )
        assert said in capsys.readouterr().err


def test_it_is_looked_into(sd15_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_merge("--models", sd15_file, "--inspect") == EXIT_OK
    said = capsys.readouterr().out
    assert "8 modules: " in said and "4 Full (diff)" in said and "1 GLoRA" in said and "1 IA3" in said


def test_it_is_not_trained_on_but_may_be_folded_into_the_base(
    sd15_file: Path, network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert network_setting.train(tmp_path / "out", "--dry_run", network_weights=sd15_file) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert f"error: network_weights {sd15_file}: 2 of 8 modules are GLoRA, IA3, which cannot be trained" in said
    assert "Fold the file into the base with --base_weights" in said and said.count("\n") == 1
    assert network_setting.train(tmp_path / "out", base_weights=sd15_file, max_train_steps=1) == EXIT_OK
    assert f"base_weights {sd15_file}: left out: 1 tensor of the textual" in capsys.readouterr().out


def test_it_is_evaluated(
    sd15_file: Path,
    tiny_sd15: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--checkpoint", sd15_file, "--base_model", tiny_sd15, "--prompt", "mio", "--steps", 1, "--resolution", 64]
    assert evaluate.main([*map(str, words), "--output_dir", "out", "--dry_run"]) == EXIT_OK
    assert "left out: 1 tensor of the textual inversion embedding cat, which is not read" in capsys.readouterr().out
