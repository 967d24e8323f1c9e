"""What files of bases hold beside the model: left out, kept, or said rightly what is the matter with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.files import read_json, write_json
from library.models.base_family import family_of
from library.models.checkpoint import open_checkpoint
from library.models.load import load_text_encoders, load_unet, load_vae
from library.models.locate import locate_base
from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, UNET, VAE, Family
from tests.tools.merging import FILES, assert_same_tensors, run_merge, save, single_file

Bases = dict[str, Path]


@pytest.fixture(scope="module")
def files(tiny_sd15: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Family -> single file."""
    folder = tmp_path_factory.mktemp("stray")
    return {
        key: single_file(base, folder / f"{key}.safetensors")
        for key, base in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl))
    }


def assert_reads_alike(found: Path, expected: Path, family: Family) -> None:
    """Loaded and opened, one is the other."""
    one, other = str(found), str(expected)
    assert family_of(locate_base(one)) == family
    both = (family,)
    assert_same_tensors(load_unet(one, families=both).state_dict(), load_unet(other, families=both).state_dict())
    assert_same_tensors(load_vae(one, families=both).state_dict(), load_vae(other, families=both).state_dict())
    texts = zip(load_text_encoders(one), load_text_encoders(other), strict=True)
    for mine, theirs in texts:
        assert_same_tensors(mine.model.state_dict(), theirs.model.state_dict())
    assert open_checkpoint(locate_base(one)).shapes == open_checkpoint(locate_base(other)).shapes


STRAYS: dict[str, Tensor] = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(7),
    "epoch": torch.tensor(3),
    "global_step": torch.tensor(1000),
    "callbacks.x": torch.zeros(1),
    "encoder.conv_in.weight": torch.zeros(1),
    "text_model.x": torch.zeros(1),
    "lora_unet_x.alpha": torch.zeros(1),
    "unet.x": torch.zeros(1),
    "down_blocks.0.x": torch.zeros(1),
    "double_blocks.0.x": torch.zeros(1),
    "alphas_cumprod": torch.zeros(1000),
}


@pytest.mark.parametrize("key", FAMILIES)
def test_stray_root_keys_do_not_hide_a_whole_model(key: str, files: Bases, tmp_path: Path) -> None:
    file = save(load_file(files[key]) | STRAYS, tmp_path / "stray.safetensors")
    assert_reads_alike(file, files[key], FAMILIES[key])
    assert set(open_checkpoint(locate_base(str(file))).others) == set(STRAYS)


@pytest.mark.parametrize("key", FAMILIES)
def test_a_file_nested_in_its_state_dict_is_read(key: str, files: Bases, tmp_path: Path) -> None:
    nested = {f"state_dict.{name}": value for name, value in load_file(files[key]).items()}
    file = save(nested | {"epoch": torch.tensor(1)}, tmp_path / "nested.safetensors")
    assert_reads_alike(file, files[key], FAMILIES[key])


@pytest.mark.parametrize(
    "leaf", ["text_projection.weight", "text_projection", "logit_scale", "text_model.embeddings.position_ids"]
)
@pytest.mark.parametrize("key", FAMILIES)
def test_what_the_first_text_encoder_has_no_use_for_is_left_out(
    key: str, leaf: str, files: Bases, tmp_path: Path
) -> None:
    stray = {f"{FAMILIES[key].original[TEXT_ENCODER]}{leaf}": torch.ones(4, 4)}
    file = save(load_file(files[key]) | stray, tmp_path / "projected.safetensors")
    assert_reads_alike(file, files[key], FAMILIES[key])


def test_a_folder_whose_text_encoder_was_saved_with_its_projection_is_read(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "base"))
    text = load_file(folder / FILES[TEXT_ENCODER])
    save(text | {"text_projection.weight": torch.ones(4, 4)}, folder / FILES[TEXT_ENCODER])
    config = read_json(folder / TEXT_ENCODER / "config.json")
    write_json(folder / TEXT_ENCODER / "config.json", config | {"architectures": ["CLIPTextModelWithProjection"]})
    assert_reads_alike(folder, tiny_sd15, SD15)


def test_the_guidance_of_an_lcm_is_kept(files: Bases, adapter_file: Path, tmp_path: Path) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    name = f"{SD15.original[UNET]}time_embed.cond_proj.weight"
    file = save(load_file(files["sd15"]) | {name: weight}, tmp_path / "lcm.safetensors")
    unet = load_unet(str(file))
    assert unet.config["time_cond_proj_dim"] == 256
    assert torch.equal(unet.state_dict()["time_embedding.cond_proj.weight"], weight)
    words = ("--models", adapter_file, "--pretrained_model_name_or_path", file)
    assert run_merge(*words, "--save_to", tmp_path / "merged.safetensors") == 0
    assert torch.equal(load_file(tmp_path / "merged.safetensors")[name], weight)
    assert run_merge(*words, "--output_dir", tmp_path / "folder") == 0
    assert load_unet(str(tmp_path / "folder")).config["time_cond_proj_dim"] == 256


def test_a_leaf_that_no_layer_has_is_named(files: Bases, tmp_path: Path) -> None:
    stray = {f"{SD15.original[UNET]}middle_block.1.proj_in.lokr": torch.zeros(1)}
    file = save(load_file(files["sd15"]) | stray, tmp_path / "x.safetensors")
    for read in (load_unet, lambda name: open_checkpoint(locate_base(name))):
        with pytest.raises(UserError, match=r"1 of \d+ tensors in .* have no place in SD1.5 \(first: .*proj_in.lokr\)"):
            read(str(file))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_vae_is_said_to_be_damaged(
    value: float, tiny_sdxl: Path, files: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(files["sdxl"])
    name = f"{SDXL.original[VAE]}decoder.conv_out.weight"
    tensors[name] = tensors[name].half()
    tensors[name][0, 0, 0, 0] = value
    file = save(tensors, tmp_path / "damaged.safetensors")
    said = r"not finite in 1 tensor \(first: decoder.conv_out.weight\), in the file itself: it is damaged.*another.*with --vae"
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(UserError, match=said):
            load_vae(str(file), families=(SDXL,), dtype=dtype)
    from generate import main

    assert (
        main(f"--pretrained_model_name_or_path {file} --prompt x --output {tmp_path / 'x.png'} --steps 1".split()) == 2
    )
    assert "it is damaged" in capsys.readouterr().err


def test_a_merge_says_that_the_base_is_damaged(
    files: Bases, adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(files["sd15"])
    tensors[f"{SD15.original[VAE]}decoder.conv_out.weight"][0, 0, 0, 0] = torch.nan
    file = save(tensors, tmp_path / "damaged.safetensors")
    output = tmp_path / "merged.safetensors"
    assert run_merge("--models", adapter_file, "--pretrained_model_name_or_path", file, "--save_to", output) == 1
    assert (
        "finite: 1 are not (first: decoder.conv_out.weight), as in the base, which is damaged"
        in capsys.readouterr().err
    )
    assert not output.exists()
