"""Folders and single files seen as one thing: every base that is published opens, tensor by tensor, as diffusers has it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from library.errors import UserError
from library.models.checkpoint import MARKS, Checkpoint
from networks.families import SD15, SDXL
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE
from tests.tools.merging import EMA, FILES, assert_same_tensors, opened, single_file
from tests.tools.merging import save as save_tensors

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(params=["sd15", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"tiny_{request.param}")
    return found


def everything(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {
        f"{component}/{key}": checkpoint.read(component, key)
        for component, named in checkpoint.tensors.items()
        for key in named
    }


def loaded(folder: Path) -> dict[str, Tensor]:
    return {
        f"{component}/{key}": value
        for component, file in FILES.items()
        if (folder / file).exists()
        for key, value in load_file(folder / file).items()
    }


def changed(base: Path, folder: Path, component: str, change: Change) -> Path:
    """A copy of a diffusers folder with other tensors in one component's file."""
    shutil.copytree(base, folder)
    save_tensors(change(load_file(folder / FILES[component])), folder / FILES[component], {"format": "pt"})
    return folder


def test_a_folder_is_read_as_it_is(folder: Path) -> None:
    checkpoint = opened(folder)
    assert checkpoint.family is (SDXL if (folder / "text_encoder_2").exists() else SD15)
    assert_same_tensors(everything(checkpoint), loaded(folder))
    assert checkpoint.stored_names == {part: len(named) for part, named in checkpoint.tensors.items()}
    assert (checkpoint.others, checkpoint.marks) == ((), ())
    assert checkpoint.shapes[UNET]["conv_in.weight"] == (32, 4, 3, 3)
    assert checkpoint.files() == sorted(folder / FILES[component] for component in checkpoint.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_file_is_read_as_the_folder_it_was(folder: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = opened(single_file(folder, tmp_path / "a.safetensors", dtype))
    assert_same_tensors(everything(checkpoint), {name: value.to(dtype) for name, value in loaded(folder).items()})
    stored = {UNET: 686, VAE: 248, TEXT_ENCODER: 196}
    if checkpoint.family is SDXL:
        stored = {UNET: len(checkpoint.tensors[UNET]), VAE: 248, TEXT_ENCODER: 196, TEXT_ENCODER_2: 149}
    assert checkpoint.stored_names == stored  # 149 of 12 layers: queries, keys and values are stacked


def test_what_a_single_file_also_carries_is_told_apart(tiny_sdxl: Path, tmp_path: Path) -> None:
    extra = {
        **EMA,
        "alphas_cumprod": torch.ones(1000),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    }
    marks = {mark: torch.zeros(0) for mark in MARKS}
    checkpoint = opened(single_file(tiny_sdxl, tmp_path / "a.safetensors", extra={**extra, **marks}))
    assert sorted(checkpoint.others) == sorted(extra)
    assert checkpoint.marks == MARKS == ("v_pred", "ztsnr")
    assert_same_tensors(everything(checkpoint), loaded(tiny_sdxl))


def test_a_folders_schedule_says_what_marks_a_file(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert opened(tmp_path / "v").marks == ("v_pred",)


def test_a_text_encoder_without_its_prefix_gets_it(folder: Path, tmp_path: Path) -> None:
    """As transformers >= 5.6 writes it, and as single files have it that were made from there."""
    flat = changed(
        folder, tmp_path / "flat", TEXT_ENCODER, lambda t: {k.removeprefix("text_model."): v for k, v in t.items()}
    )
    assert_same_tensors(everything(opened(flat)), loaded(folder))


def test_position_ids_of_older_folders_are_left_out(tiny_sd15: Path, tmp_path: Path) -> None:
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    checkpoint = opened(changed(tiny_sd15, tmp_path / "old", TEXT_ENCODER, lambda t: t | ids))
    assert_same_tensors(everything(checkpoint), loaded(tiny_sd15))
    assert checkpoint.stored_names[TEXT_ENCODER] == 197


@pytest.mark.parametrize("dimensions", [2, 4])
def test_old_names_of_the_vaes_attention_are_todays(tiny_sd15: Path, tmp_path: Path, dimensions: int) -> None:
    """Diffusers 0.17 and before, and SD1.5's own VAE on the hub."""

    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, value in tensors.items():
            if ".attentions." in name and "group_norm" not in name:
                for new, old in OLD_NAMES.items():
                    name = name.replace(f".{new}.", f".{old}.")
                if dimensions == 4 and value.ndim == 2:
                    value = value[:, :, None, None]
            renamed[name] = value
        return renamed

    old = changed(tiny_sd15, tmp_path / "old", VAE, older)
    assert {".query.", ".proj_attn."} <= {
        m[0] for n in load_file(old / FILES[VAE]) if (m := re.search(r"\.(query|proj_attn)\.", n))
    }
    assert_same_tensors(everything(opened(old)), loaded(tiny_sd15))


def test_a_vae_whose_attention_is_matrices_in_a_single_file_is_read(tiny_sd15: Path, tmp_path: Path) -> None:
    tensors = load_file(single_file(tiny_sd15, tmp_path / "a.safetensors"))
    flat = {n: v.flatten(1) if ".attn_1." in n and v.ndim == 4 else v for n, v in tensors.items()}
    assert sum(flat[name].ndim != tensors[name].ndim for name in flat) == 8
    assert_same_tensors(everything(opened(save_tensors(flat, tmp_path / "b.safetensors"))), loaded(tiny_sd15))


def sharded(folder: Path, count: int) -> None:
    file = folder / FILES[UNET]
    tensors = list(load_file(file).items())
    size = -(-len(tensors) // count)
    for i in range(count):
        name = f"{file.stem}-{i + 1:05}-of-{count:05}.safetensors"
        save_file(dict(tensors[i * size : (i + 1) * size]), file.with_name(name))
    file.with_suffix(".safetensors.index.json").write_text("{}")
    file.unlink()


def pickled(folder: Path) -> None:
    for component, name in ((UNET, "diffusion_pytorch_model.bin"), (TEXT_ENCODER, "pytorch_model.bin")):
        file = folder / FILES[component]
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


def variant(folder: Path) -> None:
    for component in (UNET, VAE, TEXT_ENCODER):
        file = folder / FILES[component]
        file.rename(file.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize("layout", [lambda folder: sharded(folder, 3), pickled, variant], ids=["shards", "bin", "fp16"])
def test_every_way_to_save_a_folder_is_read(layout: Callable[[Path], None], tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    layout(tmp_path / "base")
    assert_same_tensors(everything(opened(tmp_path / "base")), loaded(tiny_sd15))


def test_one_component_may_come_from_elsewhere(tiny_sd15: Path, tmp_path: Path) -> None:
    base, other = opened(tiny_sd15), opened(single_file(tiny_sd15, tmp_path / "a.safetensors", torch.float16))
    both = base.replaced(UNET, other.tensors[UNET], 686)
    assert both.read(UNET, "conv_in.weight").dtype == torch.float16
    assert both.read(VAE, "quant_conv.weight").dtype == torch.float32
    assert tmp_path / "a.safetensors" in both.files() and tiny_sd15 / FILES[UNET] not in both.files()


# ------------------------------------------------------------------------------------------------ what is refused


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        opened(path)


def test_what_training_left_in_a_single_file_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    extra = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 4)}
    path = single_file(tiny_sd15, tmp_path / "a.safetensors", extra=extra)
    # A stranger among the U-Net's own names.
    refused(path, f"1 of 1131 tensors in {path} have no place in SD1.5 (first: {next(iter(extra))}). Merge or remove")


def test_a_single_file_that_lacks_a_model_says_which(tiny_sd15: Path, tmp_path: Path) -> None:
    tensors = load_file(single_file(tiny_sd15, tmp_path / "a.safetensors"))
    path = save_tensors({k: v for k, v in tensors.items() if not k.startswith("first_")}, tmp_path / "b.safetensors")
    refused(path, f"{path} has no vae: none of its 882 tensors begins with first_stage_model.")


def test_damaged_weights_are_named(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    file = tmp_path / "base" / FILES[VAE]
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path / "base", f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file")
    file.unlink()
    refused(tmp_path / "base", f"{tmp_path / 'base'} has no weights for vae")


def test_a_pickle_with_more_than_tensors_in_it_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    file = tmp_path / "base" / FILES[UNET]
    torch.save({"x": Path("y")}, file.with_suffix(".bin"))
    file.unlink()
    refused(tmp_path / "base", f"{file.with_suffix('.bin')} is a pickle with more than tensors in it")
    file.with_suffix(".bin").write_bytes(save({"x": torch.zeros(2)})[:20])
    refused(tmp_path / "base", str(file.with_suffix(".bin")))


def test_a_folder_with_adapters_in_it_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    """As save_pretrained of a model with PEFT adapters writes it."""

    def wrap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("conv_in.", "conv_in.base_layer."): value for name, value in tensors.items()}

    base = changed(tiny_sd15, tmp_path / "base", UNET, wrap)
    refused(base, f"2 of 686 tensors in {base / FILES[UNET]} have no place in SD1.5 (first: conv_in.base_layer.")
