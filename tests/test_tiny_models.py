"""The models that come with the project: real layout, small widths, sane numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDPMScheduler
from safetensors import safe_open

from library.errors import UserError
from library.files import file_hash, read_json, write_json
from library.models import tiny
from library.models.calibration import synthetic_pictures
from library.models.clip_tokenizer import _TINY_WORDS, tiny_tokenizer
from library.models.conditioning import TextConditioner
from library.models.embedded import TINY_DINOV2
from library.models.encoders import TeacherEncoder
from library.models.load import load_text_encoders, load_unet, load_vae
from library.models.sd15_configs import SD15_SCHEDULER, SD15_UNET, SD15_VAE
from library.models.teachers import load_teacher
from networks.families import SD15
from tests.tools.warm import Run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Pictures the calibration has not seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return synthetic_pictures(32, 64)


def tensor_names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def file_hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file_hash(file) for file in folder.rglob("*") if file.is_file()}


def test_tensor_names_are_exactly_those_of_sd15(tiny_sd15: Path) -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(SD15_UNET), AutoencoderKL.from_config(SD15_VAE)
    names = tensor_names(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(names) == 686 and names == set(unet.state_dict())
    names = tensor_names(tiny_sd15 / "vae" / "diffusion_pytorch_model.safetensors")
    assert len(names) == 248 and names == set(vae.state_dict())


def test_text_encoder_file_keeps_the_prefix_that_every_reader_knows(tiny_sd15: Path) -> None:
    names = tensor_names(tiny_sd15 / "text_encoder" / "model.safetensors")
    assert len(names) == 196 and all(name.startswith("text_model.") for name in names)


def test_a_pipeline_loads_the_folder_and_makes_a_picture(tiny_sd15: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "a red circle", height=64, width=64, num_inference_steps=2, generator=generator, output_type="np"
    ).images
    assert image.shape == (1, 64, 64, 3)
    assert image.std() > 0.05


@pytest.mark.bits
def test_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = tiny.build_tiny_base(SD15, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert file_hashes(again) == file_hashes(tiny_sd15)


def test_another_seed_gives_other_weights(tiny_dinov2: Path, tmp_path: Path) -> None:
    other = tiny.build_tiny_dinov2(tmp_path / "other", seed=1)
    assert file_hash(other / "model.safetensors") != file_hash(tiny_dinov2 / "model.safetensors")


def test_latents_are_near_zero_mean_and_unit_variance(tiny_sd15: Path, pictures: torch.Tensor) -> None:
    vae = load_vae(str(tiny_sd15))
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.mode() * SD15.scaling_factor
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.5
    spread = latents.std(dim=(0, 2, 3))
    assert spread.min() > 0.6 and spread.max() < 1.6
    assert posterior.std.max() < 0.1 * posterior.mean.std()


def test_decoding_gives_back_a_blurred_picture(tiny_sd15: Path, pictures: torch.Tensor) -> None:
    vae = load_vae(str(tiny_sd15))
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    assert (decoded.abs() > 1.2).float().mean() < 0.01
    assert F.mse_loss(decoded, pictures) < 0.5 * pictures.var()


def test_the_unet_predicts_noise_better_than_zero_does_and_listens_to_the_prompt(
    tiny_sd15: Path, pictures: torch.Tensor
) -> None:
    unet, vae = load_unet(str(tiny_sd15)), load_vae(str(tiny_sd15))
    conditioner = TextConditioner(SD15, load_text_encoders(str(tiny_sd15)))
    words = conditioner(["a red circle on a blue background", "a photo of a cat"]).states
    generator = torch.Generator().manual_seed(0)
    latents = vae.encode(pictures).latent_dist.mode() * SD15.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.arange(30, 990, 30)
    noisy = DDPMScheduler.from_config(SD15_SCHEDULER).add_noise(latents, noise, timesteps)
    first = unet(noisy, timesteps, words[:1].expand(32, -1, -1)).sample
    second = unet(noisy, timesteps, words[1:].expand(32, -1, -1)).sample
    assert F.mse_loss(first, noise) < 0.7  # zero scores 1
    assert 0.5 < first.std() < 1.2
    assert (first - second).std() > 0.02 * first.std()


def test_every_word_of_the_small_vocabulary_is_one_token() -> None:
    tokenizer = tiny_tokenizer()
    lengths = {word: len(tokenizer(word).input_ids) for word in _TINY_WORDS.split()}
    assert set(lengths.values()) == {3}, lengths
    ids = tokenizer("a red circle", padding="max_length").input_ids
    assert len(ids) == 77 and ids[0] == len(tokenizer) - 2 and set(ids[4:]) == {len(tokenizer) - 1}


def test_the_written_tokenizer_is_the_built_one(tiny_sd15: Path) -> None:
    tokenizer = load_text_encoders(str(tiny_sd15))[0].tokenizer
    texts = ["a red circle", "Étude, 42 zebras!", ""]
    assert tokenizer(texts).input_ids == tiny_tokenizer()(texts).input_ids
    assert tokenizer.pad_token_id == tiny_tokenizer().pad_token_id
    assert tokenizer.model_max_length == 77


def test_dino_tokens_say_what_is_in_the_patch_and_hardly_where_it_is(tiny_dinov2: Path, pictures: torch.Tensor) -> None:
    pixels = ((pictures + 1) * 127.5).to(torch.uint8)
    encoder = TeacherEncoder(load_teacher(str(tiny_dinov2)), 224, 16)
    tokens = encoder.encode(pixels).float()  # [32, 256, 64]
    rolled = encoder.encode(pixels.roll((32, 32), dims=(2, 3))).float()
    moved = tokens.unflatten(1, (16, 16)).roll((8, 8), dims=(1, 2)).flatten(1, 2)
    at_the_same_patch = F.cosine_similarity(rolled, moved, dim=-1).mean()
    at_the_same_place = F.cosine_similarity(rolled, tokens, dim=-1).mean()
    assert at_the_same_patch > 0.95 and at_the_same_place < 0.8


def test_both_stay_small(tiny_sd15: Path, tiny_dinov2: Path) -> None:
    for folder, limit in ((tiny_sd15, 30e6), (tiny_dinov2, 2e6)):
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < limit


def test_a_reserved_name_is_built_once_and_again_for_another_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "MODELS", tmp_path / "models")
    folder = tiny.ensure_tiny(TINY_DINOV2)
    assert folder == tmp_path / "models" / TINY_DINOV2
    built = (folder / "model.safetensors").stat().st_ino
    assert tiny.ensure_tiny(TINY_DINOV2) == folder
    assert (folder / "model.safetensors").stat().st_ino == built
    write_json(folder / "tiny.json", {"kind": TINY_DINOV2, "builder_version": 0, "seed": 0})
    tiny.ensure_tiny(TINY_DINOV2)
    assert read_json(folder / "tiny.json")["builder_version"] == tiny.BUILDER_VERSION


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "MODELS", tmp_path)
    (tmp_path / TINY_DINOV2).mkdir()
    (tmp_path / TINY_DINOV2 / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"was not made by this project \(tiny.json is missing\)"):
        tiny.ensure_tiny(TINY_DINOV2)
    assert (tmp_path / TINY_DINOV2 / "mine.txt").exists()


def test_the_command_line_builds_a_folder_and_refuses_to_overwrite_it(tmp_path: Path) -> None:
    command = ["--kind", "dinov2", "--out", str(tmp_path / "dino")]
    assert tiny.main(command) == 0
    assert tiny.main(command) == 2


def test_the_module_runs_as_a_program() -> None:
    code = "import runpy; runpy.run_module('library.models.tiny', run_name='__main__')"
    assert "--kind" in Run("-c", [code, "--help"]).end()
