"""The SDXL that comes with the project: SDXL's names, small widths, and pipelines that draw with it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import StableDiffusionXLPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from library.files import file_hash
from library.models import tiny
from library.models.base_family import family_of
from library.models.calibration import synthetic_pictures
from library.models.embedded import TINY_SDXL
from library.models.load import load_text_encoders, load_unet, load_vae
from library.models.locate import locate_base
from library.models.sdxl_configs import SDXL_SCHEDULER, SDXL_TEXT_ENCODER_2, SDXL_UNET, SDXL_VAE
from networks.families import SDXL
from tests.tools.ldm_layout import ldm_checkpoint

ONLY = (SDXL,)


def tensor_names(folder: Path, component: str) -> set[str]:
    (file,) = (folder / component).glob("*.safetensors")
    return set(load_file(file))


def test_tensor_names_are_those_of_sdxl_less_its_deepest_blocks(tiny_sdxl: Path) -> None:
    with torch.device("meta"):
        real = {
            "unet": UNet2DConditionModel.from_config(SDXL_UNET),
            "vae": AutoencoderKL.from_config(SDXL_VAE),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_TEXT_ENCODER_2)),
        }
    left_out = re.compile(r"transformer_blocks\.[3-9]\.|encoder\.layers\.(1[2-9]|[23]\d)\.")
    for component, model in real.items():
        expected = {name for name in model.state_dict() if not left_out.search(name)}
        assert tensor_names(tiny_sdxl, component) == expected, component
    assert len(tensor_names(tiny_sdxl, "text_encoder")) == 196


def draw(load: Callable[[], StableDiffusionXLPipeline], caplog: pytest.LogCaptureFixture) -> np.ndarray:
    """A picture by a pipeline that loads without a complaint."""
    for library in (diffusers, transformers):
        library.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error", UserWarning)
            pipeline = load()
        assert not caplog.records, caplog.text
    finally:
        for library in (diffusers, transformers):
            library.utils.logging.disable_propagation()
    pipeline.set_progress_bar_config(disable=True)
    prompt, generator = "a red circle on a blue background", torch.Generator().manual_seed(0)
    return pipeline(prompt, height=64, width=64, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.bits
def test_pipelines_from_the_folder_and_from_a_single_file_draw_the_same_picture(
    tiny_sdxl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file({name: value.contiguous() for name, value in ldm_checkpoint(tiny_sdxl).items()}, file)
    from_folder = draw(lambda: StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True), caplog)
    from_file = draw(
        lambda: StableDiffusionXLPipeline.from_single_file(str(file), config=str(tiny_sdxl), local_files_only=True),
        caplog,
    )
    assert from_folder.shape == (1, 64, 64, 3) and from_folder.std() > 0.05
    assert np.array_equal(from_folder, from_file)


def test_it_stays_small(tiny_sdxl: Path) -> None:
    assert sum(file.stat().st_size for file in tiny_sdxl.rglob("*") if file.is_file()) < 16e6


def test_latents_are_near_zero_mean_and_unit_variance(tiny_sdxl: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        pictures = synthetic_pictures(32, 64)
    vae = load_vae(str(tiny_sdxl), families=ONLY)
    latents = vae.encode(pictures).latent_dist.mode() * 0.13025
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.5
    assert latents.std(dim=(0, 2, 3)).min() > 0.6 and latents.std(dim=(0, 2, 3)).max() < 1.6


def test_the_unet_predicts_noise_and_listens_to_every_condition(tiny_sdxl: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        pictures = synthetic_pictures(32, 64)
    unet, vae = (load(str(tiny_sdxl), families=ONLY) for load in (load_unet, load_vae))
    one, two = (
        part.model(
            part.tokenizer(["a red circle", "a photo of a cat"], padding="max_length", return_tensors="pt").input_ids,
            output_hidden_states=True,
        )
        for part in load_text_encoders(str(tiny_sdxl))
    )
    words = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)  # [2, 77, 80]
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64], [512, 64, 128, 0, 64, 64]])
    latents = vae.encode(pictures).latent_dist.mode() * 0.13025
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(30, 990, 30)
    scheduler = EulerDiscreteScheduler.from_config(SDXL_SCHEDULER)
    sigmas = scheduler.sigmas.flip(0)[1:][timesteps].view(-1, 1, 1, 1)
    noisy = (latents + sigmas * noise) / (sigmas**2 + 1) ** 0.5

    def predict(prompt: int, pooled: int, size: int) -> torch.Tensor:
        conditions = {"text_embeds": two.text_embeds[[pooled] * 32], "time_ids": sizes[[size] * 32]}
        return unet(noisy, timesteps, words[[prompt] * 32], added_cond_kwargs=conditions).sample

    usual = predict(0, 0, 0)
    assert F.mse_loss(usual, noise) < 0.75  # zero scores 1
    for changed in (predict(1, 0, 0), predict(0, 1, 0), predict(0, 0, 1)):
        assert (changed - usual).std() > 1e-3 * usual.std()


@pytest.mark.bits
def test_the_reserved_name_is_built_and_the_same_seed_gives_the_same_bytes(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "MODELS", tmp_path / "models")
    location = locate_base(TINY_SDXL)
    assert location.path == tmp_path / "models" / TINY_SDXL and family_of(location) == SDXL
    files = [file.relative_to(tiny_sdxl) for file in tiny_sdxl.rglob("*") if file.is_file()]
    assert len(files) == 19
    assert all(file_hash(location.path / file) == file_hash(tiny_sdxl / file) for file in files)


def test_the_command_line_knows_it(tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.main(["--kind", "sdxl", "--out", str(tiny_sdxl)]) == 2
    assert "exists already" in capsys.readouterr().err
