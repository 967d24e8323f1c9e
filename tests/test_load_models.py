"""Bases from folders, single files and the hub: what loads is what was saved, and everything else is refused in words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.files import read_json, write_json
from library.models.clip_tokenizer import clip_tokenizer, tokenizer_for
from library.models.load import load_scheduler_config, load_text_encoder, load_text_encoders, load_unet, load_vae
from library.models.locate import base_status, locate_base
from library.models.sd15_configs import SD15_SCHEDULER
from tests.tools.ldm_layout import ldm_checkpoint

ROOT = Path(__file__).resolve().parents[1]
UNET_FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
VAE_FILE = Path("vae") / "diffusion_pytorch_model.safetensors"
TEXT_FILE = Path("text_encoder") / "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tiny_sd15: Path) -> dict[str, Tensor]:
    return ldm_checkpoint(tiny_sd15)


@pytest.fixture(scope="module")
def single(checkpoint: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one file, with what real files also carry and nobody needs."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    ballast = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelout2weight": torch.zeros(4, 32, 3, 3),
        "alphas_cumprod": torch.ones(1000),
    }
    save_file({name: value.contiguous() for name, value in (checkpoint | ballast).items()}, path)
    return path


@pytest.fixture
def folder(tiny_sd15: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_sd15, tmp_path / "base"))


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# What loads


def test_models_come_frozen_in_eval_mode_and_in_the_asked_dtype(tiny_sd15: Path) -> None:
    unet = load_unet(str(tiny_sd15), dtype=torch.bfloat16)
    _, text_encoder = load_text_encoder(str(tiny_sd15))
    for model in (unet, load_vae(str(tiny_sd15)), text_encoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.mark.bits
def test_folder_and_single_file_give_the_same_models_to_the_bit(tiny_sd15: Path, single: Path) -> None:
    assert same_tensors(load_unet(str(tiny_sd15)), load_unet(str(single)))
    assert same_tensors(load_vae(str(tiny_sd15)), load_vae(str(single)))
    tokenizer, text_encoder = load_text_encoder(str(tiny_sd15))
    file_tokenizer, file_text_encoder = load_text_encoder(str(single))
    assert same_tensors(text_encoder, file_text_encoder)
    assert tokenizer("a red circle, odd words").input_ids == file_tokenizer("a red circle, odd words").input_ids


@pytest.mark.bits
def test_folder_and_single_file_compute_the_same_to_the_bit(tiny_sd15: Path, single: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, words = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 64, generator=generator)
    pictures = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    ids = torch.randint(700, (1, 77), generator=generator)
    outputs = []
    for base in (str(tiny_sd15), str(single)):
        vae, (_, text_encoder) = load_vae(base), load_text_encoder(base)
        outputs.append(
            (
                load_unet(base)(latents, 500, words).sample,
                vae.encode(pictures).latent_dist.mean,
                vae.decode(latents).sample,
                text_encoder(ids).last_hidden_state,
            )
        )
    assert all(torch.equal(from_folder, from_file) for from_folder, from_file in zip(*outputs, strict=True))


@pytest.mark.bits
def test_a_text_encoder_without_its_prefix_is_understood(
    checkpoint: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    expected = load_text_encoder(str(folder))[1]
    bare = {name.replace("transformer.text_model.", "transformer."): value for name, value in checkpoint.items()}
    save_file({name: value.contiguous() for name, value in bare.items()}, tmp_path / "bare.safetensors")
    assert same_tensors(load_text_encoder(str(tmp_path / "bare.safetensors"))[1], expected)
    # As transformers 5.6 and later writes a folder.
    save_file({n.removeprefix("text_model."): v for n, v in load_file(folder / TEXT_FILE).items()}, folder / TEXT_FILE)
    assert same_tensors(load_text_encoder(str(folder))[1], expected)


@pytest.mark.bits
def test_attention_names_of_old_diffusers_are_understood(folder: Path) -> None:
    expected = load_vae(str(folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / VAE_FILE)
    for today, before in old.items():
        tensors = {name.replace(f"attentions.0.{today}.", f"attentions.0.{before}."): v for name, v in tensors.items()}
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, folder / VAE_FILE)
    assert same_tensors(load_vae(str(folder)), expected)


@pytest.mark.bits
def test_a_folder_with_fp16_files_only_loads(folder: Path) -> None:
    expected = load_unet(str(folder), dtype=torch.float16)
    halves = {name: value.half() for name, value in load_file(folder / UNET_FILE).items()}
    save_file(halves, (folder / UNET_FILE).with_suffix(".fp16.safetensors"))
    (folder / UNET_FILE).unlink()
    assert base_status(str(folder)) is None
    assert same_tensors(load_unet(str(folder), dtype=torch.float16), expected)


@pytest.mark.bits
def test_shards_are_put_together(folder: Path) -> None:
    expected = load_unet(str(folder))
    tensors = list(load_file(folder / UNET_FILE).items())
    for part in (1, 2):
        shard = dict(tensors[:300] if part == 1 else tensors[300:])
        save_file(shard, folder / "unet" / f"diffusion_pytorch_model-0000{part}-of-00002.safetensors")
    (folder / UNET_FILE).unlink()
    assert same_tensors(load_unet(str(folder)), expected)


@pytest.mark.bits
def test_a_folder_with_tensor_only_pickles_loads(folder: Path) -> None:
    expected = load_text_encoder(str(folder))[1]
    torch.save(load_file(folder / TEXT_FILE), folder / "text_encoder" / "pytorch_model.bin")
    (folder / TEXT_FILE).unlink()
    assert same_tensors(load_text_encoder(str(folder))[1], expected)


def test_the_schedule_is_the_bases_own(
    tiny_sd15: Path, single: Path, checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    assert load_scheduler_config(str(tiny_sd15)) == load_scheduler_config(str(single)) == SD15_SCHEDULER
    few = {"v_pred": torch.zeros(0), "model.diffusion_model.out.2.bias": torch.zeros(4)}
    save_file(few, tmp_path / "v.safetensors")
    assert load_scheduler_config(str(tmp_path / "v.safetensors"))["prediction_type"] == "v_prediction"


def test_the_bundled_tokenizer_is_clips() -> None:
    tokenizer = tokenizer_for(49408, "x")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77 and tokenizer.pad_token_id == 49407
    assert clip_tokenizer()("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_every_text_encoder_of_sd15_is_its_only_one(tiny_sd15: Path) -> None:
    (part,) = load_text_encoders(str(tiny_sd15))
    tokenizer, model = load_text_encoder(str(tiny_sd15))
    assert part.component == "text_encoder" and same_tensors(part.model, model)
    assert part.tokenizer("a cat").input_ids == tokenizer("a cat").input_ids


# What is refused


def saved(path: Path, *names: str) -> str:
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    return str(path)


def test_a_file_without_the_component_says_which_prefix_it_looked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "part.safetensors", "model.diffusion_model.out.2.weight")
    with pytest.raises(UserError, match=r"has no vae: none of its 1 tensors .* begins with first_stage_model\."):
        load_vae(path)


def test_what_training_left_in_a_file_is_refused(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    junk = checkpoint | {"model.diffusion_model.align_heads.0.weight": torch.zeros(2)}
    save_file({name: value.contiguous() for name, value in junk.items()}, tmp_path / "junk.safetensors")
    with pytest.raises(UserError, match=r"1 of 687 tensors .* \(first: model.diffusion_model.align_heads.0.weight\)"):
        load_unet(str(tmp_path / "junk.safetensors"))


def test_an_unknown_vocabulary_is_refused(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_file(
        {n: v.contiguous() for n, v in (checkpoint | {name: torch.zeros(1000, 64)}).items()}, tmp_path / "v.safetensors"
    )
    with pytest.raises(UserError, match="token embedding of 1000 rows"):
        load_text_encoder(str(tmp_path / "v.safetensors"))


def test_a_truncated_file_is_named_with_its_size(single: Path, folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cut.safetensors \(100000 bytes\) is not a whole safetensors file"):
        load_unet(str(cut))
    (folder / UNET_FILE).write_bytes((folder / UNET_FILE).read_bytes()[:-1])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_unet(str(folder))


def test_missing_unknown_and_misshapen_tensors_are_counted(folder: Path) -> None:
    tensors = load_file(folder / UNET_FILE)
    del tensors["conv_in.weight"], tensors["conv_in.bias"]
    tensors |= {"extra": torch.zeros(1), "conv_out.bias": torch.zeros(5)}
    save_file(tensors, folder / UNET_FILE)
    with pytest.raises(
        UserError,
        match=r"2 missing \(first: conv_in.bias\); 1 unknown \(first: extra\); 1 of another shape \(first: conv_out.bias",
    ):
        load_unet(str(folder))


class Evil:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("code ran",)


def test_a_pickle_with_code_is_never_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weights": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET_FILE).unlink()
    with pytest.raises(UserError, match=r"pickle with more than tensors .* convert it once: python -c"):
        load_unet(str(folder))
    assert "code ran" not in capsys.readouterr().out


def test_a_pickled_base_is_refused_with_the_command_that_converts_it(
    checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": checkpoint, "global_step": 1}, path)
    with pytest.raises(UserError, match="is a pickle") as caught:
        locate_base(str(path))
    command = str(caught.value).partition("file: ")[2].replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(command, shell=True, check=True)
    load_unet(str(path.with_suffix(".safetensors")))


def test_a_tokenizer_of_another_vocabulary_is_refused(folder: Path) -> None:
    vocabulary = read_json(folder / "tokenizer" / "vocab.json")
    write_json(folder / "tokenizer" / "vocab.json", vocabulary | {"extra": len(vocabulary)})
    with pytest.raises(UserError, match="They do not belong together"):
        load_text_encoder(str(folder))
