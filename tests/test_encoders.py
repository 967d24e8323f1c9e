"""What goes into the caches: latents, tokens, text embeddings, quantised tokens, fingerprints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.errors import UserError
from library.files import file_hash
from library.models.encoders import (
    TeacherEncoder,
    VaeEncoder,
    dequantize_tokens,
    grid_in_aspect,
    quantize_tokens,
)
from library.models.fingerprint import hash_ahead, weight_fingerprint
from library.models.load import load_vae
from library.models.locate import DINOV2, BaseLocation, locate_base, locate_dino, weight_files
from library.models.teachers import load_teacher
from networks.families import UNET, VAE


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Smooth random pictures, uint8 [2, 3, 128, 128]."""
    coarse = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return (F.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def vae_encoder(tiny_sd15: Path) -> VaeEncoder:
    return VaeEncoder(load_vae(str(tiny_sd15)))


def dino_encoder(folder: Path, resolution: int, grid: int) -> TeacherEncoder:
    return TeacherEncoder(load_teacher(str(folder)), resolution, grid)


# Latents


def test_latents_are_the_scaled_mode_of_pixels_mapped_once_to_minus_one_and_one(
    vae_encoder: VaeEncoder, pixels: Tensor
) -> None:
    expected = vae_encoder.vae.encode(pixels.double().div(255).mul(2).sub(1).float()).latent_dist.mode() * 0.18215
    latents = vae_encoder.encode(pixels)
    assert latents.dtype == torch.float16 and latents.shape == (2, 4, 16, 16)
    assert torch.allclose(latents.float(), expected, atol=2e-3)
    mean, logvar = vae_encoder.moments(pixels)
    assert torch.allclose(mean * 0.18215, expected, atol=1e-3) and logvar.shape == mean.shape


@pytest.mark.bits
def test_latents_are_the_same_twice_and_take_any_multiple_of_eight(vae_encoder: VaeEncoder, pixels: Tensor) -> None:
    assert torch.equal(vae_encoder.encode(pixels), vae_encoder.encode(pixels))
    assert vae_encoder.encode(pixels[..., :64, :96]).shape == (2, 4, 8, 12)
    with pytest.raises(UserError, match=r"multiples of 8, got \(128, 100\)"):
        vae_encoder.encode(pixels[..., :100])


def test_the_vae_computes_in_the_dtype_it_was_loaded_in(
    tiny_sd15: Path, pixels: Tensor, vae_encoder: VaeEncoder
) -> None:
    half = VaeEncoder(load_vae(str(tiny_sd15), dtype=torch.bfloat16))
    assert half.moments(pixels)[0].dtype == torch.bfloat16
    assert (
        F.cosine_similarity(half.encode(pixels).float().flatten(), vae_encoder.encode(pixels).float().flatten(), 0)
        > 0.99
    )


def test_float_pixels_are_a_defect_and_not_scaled_again(
    vae_encoder: VaeEncoder, tiny_dinov2: Path, pixels: Tensor
) -> None:
    for encoder in (vae_encoder, dino_encoder(tiny_dinov2, 224, 16)):
        with pytest.raises(TypeError, match="pixels must be uint8"):
            encoder.encode(pixels.float() / 255)


# Tokens


@pytest.mark.parametrize("resolution", [224, 448, 518])
def test_tokens_are_float16_row_major_and_not_normalised(tiny_dinov2: Path, pixels: Tensor, resolution: int) -> None:
    encoder = dino_encoder(tiny_dinov2, resolution, 16)
    tokens = encoder.encode(pixels)
    assert tokens.dtype == torch.float16 and tokens.shape == (2, 256, encoder.width)
    assert tokens.float().norm(dim=-1).mean() > 4  # of 8 = sqrt(64), less what pooling averages out
    grid = encoder.patch_tokens(pixels)
    assert grid.shape == (2, 64, resolution // 14, resolution // 14)
    corner = grid[0, :, : -(-encoder.side // 16), : -(-encoder.side // 16)].mean(dim=(1, 2))
    assert torch.allclose(tokens[0, 0].float(), corner, atol=2e-3)


def test_at_224_the_tokens_are_the_models_own(tiny_dinov2: Path, pixels: Tensor) -> None:
    encoder = dino_encoder(tiny_dinov2, 224, 16)
    inputs = F.interpolate(pixels / 255, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    inputs = (inputs - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    own = encoder.teacher.model(inputs).last_hidden_state[:, 1:]
    assert torch.allclose(encoder.encode(pixels).float(), own, atol=3e-3)


def test_tokens_stay_upright_at_518(tiny_dinov2: Path) -> None:
    """A picture that varies by row alone gives equal tokens along a row. Cutting 37 x 37 to 36 x 36 sheared them."""
    rows = torch.linspace(0, 255, 16).round().to(torch.uint8).repeat_interleave(16)
    pixels = rows.view(1, 1, 256, 1).expand(1, 3, 256, 256).contiguous()
    tokens = dino_encoder(tiny_dinov2, 518, 16).encode(pixels).float().unflatten(1, (16, 16))
    along_rows, along_columns = tokens.std(dim=2).mean(), tokens.std(dim=1).mean()
    assert along_rows < 0.35 * along_columns


@given(side=st.integers(1, 40), width=st.integers(8, 300), height=st.integers(8, 300))
@settings(max_examples=200)
def test_a_grid_has_the_area_of_the_square_and_the_aspect_of_the_picture(side: int, width: int, height: int) -> None:
    rows, columns = grid_in_aspect(side, width, height)
    assert (columns, rows) == grid_in_aspect(side, height, width)
    assert grid_in_aspect(side, width, width) == (side, side)
    fewer, more = sorted((rows, columns))
    long, short = max(width, height), min(width, height)
    assert fewer >= 1 and abs(fewer - max(side * (short / long) ** 0.5, 1)) <= 0.5
    assert abs(more - fewer * long / short) <= 0.5, "cells are squares up to half a cell over the whole length"
    # Tokens are never finer than the patches they are pooled of.
    finer = grid_in_aspect(side + 3, width, height)
    assert finer[0] >= rows and finer[1] >= columns


def test_tokens_of_a_lying_picture_are_pooled_to_a_lying_grid_and_stay_in_place(tiny_dinov2: Path) -> None:
    """A picture that varies by column alone gives equal tokens down each column."""
    columns = torch.linspace(0, 255, 12).round().to(torch.uint8).repeat_interleave(16)
    pixels = columns.view(1, 1, 1, 192).expand(1, 3, 128, 192).contiguous()
    encoder = dino_encoder(tiny_dinov2, 224, 8)
    assert encoder.patch_tokens(pixels).shape == (1, 64, 13, 20)
    tokens = encoder.encode(pixels).float()
    assert tokens.shape[1] == 7 * 11
    grid = tokens.unflatten(1, (7, 11))
    assert grid.std(dim=1).mean() < 0.35 * grid.std(dim=2).mean()


def test_the_whole_crop_is_seen(tiny_dinov2: Path, pixels: Tensor) -> None:
    """A change in the outermost pixels reaches the corner token most: no centre crop cuts it off."""
    encoder = dino_encoder(tiny_dinov2, 224, 16)
    changed = pixels.clone()
    changed[:, :, :8, :8] = 255 - changed[:, :, :8, :8]
    difference = (encoder.encode(changed).float() - encoder.encode(pixels).float()).norm(dim=-1)
    assert (difference.argmax(dim=1) == 0).all()


def test_registers_are_left_out(tmp_path: Path, pixels: Tensor) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig.from_dict(
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14, "image_size": 56}
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "registers")
    encoder = dino_encoder(tmp_path / "registers", 56, 4)
    kind = encoder.teacher.size.kind
    inputs = (encoder._pictures(pixels) - torch.tensor(kind.mean).view(3, 1, 1)) / torch.tensor(kind.std).view(3, 1, 1)
    own = encoder.teacher.model(inputs).last_hidden_state
    assert own.shape[1] == 1 + 4 + 16
    assert torch.allclose(encoder.encode(pixels).float(), own[:, 5:], atol=3e-3)


def test_a_resolution_or_grid_that_does_not_fit_names_those_that_do(tiny_dinov2: Path) -> None:
    with pytest.raises(UserError, match="multiple of the patch size 14, got 512. Nearest: 504 and 518"):
        dino_encoder(tiny_dinov2, 512, 16)
    with pytest.raises(
        UserError, match="token_grid must lie between 1 and 16, .* got 32. Raise dino_resolution to 448"
    ):
        dino_encoder(tiny_dinov2, 224, 32)


def test_a_model_that_gives_another_number_of_tokens_is_an_error_with_both_numbers(
    tiny_dinov2: Path, pixels: Tensor
) -> None:
    encoder = dino_encoder(tiny_dinov2, 224, 16)
    encoder.teacher.model.config.num_register_tokens = 4
    with pytest.raises(UserError, match="gave 252 patch tokens for 224 x 224 pixels, not 16 x 16"):
        encoder.encode(pixels)


# Quantised tokens


def test_quantised_tokens_keep_their_direction(tiny_dinov2: Path, pixels: Tensor) -> None:
    tokens = dino_encoder(tiny_dinov2, 224, 16).encode(pixels)
    values, scale = quantize_tokens(tokens)
    assert values.dtype == torch.int8 and values.shape == tokens.shape
    assert scale.dtype == torch.float16 and scale.shape == tokens.shape[:-1]
    assert F.cosine_similarity(dequantize_tokens(values, scale), tokens.float(), dim=-1).min() >= 0.999


def test_an_outlier_of_nineteen_times_the_rms_still_leaves_the_direction() -> None:
    tokens = torch.randn(4, 256, 1024, generator=torch.Generator().manual_seed(0))
    tokens[..., 7] = 19 * tokens.square().mean(dim=-1).sqrt()
    values, scale = quantize_tokens(tokens.half())
    assert F.cosine_similarity(dequantize_tokens(values, scale), tokens, dim=-1).min() >= 0.999


def test_rounding_is_against_the_scale_as_stored() -> None:
    tokens = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)) * 3
    values, scale = quantize_tokens(tokens)
    # Half a step, and at the largest value the clamp: the stored scale is off by at most 2^-11.
    allowed = scale.float().unsqueeze(-1) * (0.5 + 127 * 2**-11)
    assert ((dequantize_tokens(values, scale) - tokens).abs() <= allowed).all()


def test_a_token_of_zeros_stays_zero() -> None:
    tokens = torch.zeros(2, 3, 8)
    tokens[0, 0, 0] = 1e-7
    values, scale = quantize_tokens(tokens)
    assert not values.any() and not scale.any()
    assert torch.equal(dequantize_tokens(values, scale), torch.zeros(2, 3, 8))


# Fingerprints


def test_a_fingerprint_is_the_hash_of_the_file_that_is_loaded(
    tiny_sd15: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "cache"
    base, dino = locate_base(str(tiny_sd15)), locate_dino(str(tiny_dinov2))
    expected = file_hash(tiny_sd15 / "vae" / "diffusion_pytorch_model.safetensors")
    assert weight_fingerprint(base, "vae", memory) == weight_fingerprint(base, "vae", memory) == expected
    assert weight_fingerprint(dino, DINOV2, memory) == file_hash(tiny_dinov2 / "model.safetensors")
    single = tmp_path / "single.safetensors"
    single.write_bytes(b"weights")
    assert weight_fingerprint(BaseLocation("x", single), "vae", memory) == file_hash(single)
    assert (memory / "weight_hashes.json").is_file()


def test_weights_hashed_ahead_are_not_hashed_again_and_a_file_that_changed_meanwhile_is(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(tiny_sd15, tmp_path / "base")
    files = {part: weight_files(base, part)[0] for part in (UNET, VAE)}
    hash_ahead(str(base), (UNET, VAE), tmp_path / "cache")
    with open(files[VAE], "ab") as file:
        file.write(b" ")
    changed = file_hash(files[VAE])
    taken: list[Path] = []
    monkeypatch.setattr("library.models.fingerprint.file_hash", lambda path: taken.append(path) or file_hash(path))
    location = locate_base(str(base))
    for _ in range(2):
        assert weight_fingerprint(location, UNET, tmp_path / "cache") == file_hash(files[UNET])
        assert weight_fingerprint(location, VAE, tmp_path / "cache") == changed
    assert taken == [files[VAE]]
