"""SDXL's own refiner: what it is told, and what is refused."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from library.errors import UserError
from library.files import read_json, write_json
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.picture_request import PictureRequest
from library.inference.prompt_syntax import weighted_spans
from library.inference.refiner import SdxlRefiner, load_refiner
from library.inference.text_to_image import draw
from library.models.locate import BaseLocation
from library.models.tiny import HIDDEN_2, SIZE_WIDTH

CPU, FLOAT = "cpu", torch.float32


@pytest.fixture(scope="module")
def folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner in diffusers' layout: the second text encoder alone, and a score in place of the target size."""
    path = tmp_path_factory.mktemp("refiner") / "tiny-refiner"
    copytree(tiny_sdxl, path, ignore=lambda *_: ["text_encoder", "tokenizer"])
    index = read_json(path / "model_index.json")
    write_json(path / "model_index.json", {**index, "text_encoder": [None, None], "tokenizer": [None, None]})
    config = {
        **read_json(path / "unet" / "config.json"),
        "cross_attention_dim": HIDDEN_2,
        "projection_class_embeddings_input_dim": 5 * SIZE_WIDTH + HIDDEN_2,
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(path / "unet")
    return path


@pytest.fixture(scope="module")
def base(tiny_sdxl: Path) -> DrawingModel:
    return load_model(BaseLocation("tiny", tiny_sdxl), dtype=FLOAT, device=CPU)


def test_it_is_told_what_diffusers_tells_it(folder: Path, base: DrawingModel) -> None:
    refiner = load_refiner(str(folder), base, dtype=FLOAT, device=CPU)
    assert isinstance(refiner, SdxlRefiner) and refiner.vae is base.vae
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder, text_encoder=None, tokenizer=None, requires_aesthetics_score=True
    )
    sizes = ((64, 96), (0, 0), (64, 96), 6.0, 2.5, (64, 96), (0, 0), (64, 96))
    theirs = pipeline._get_add_time_ids(*sizes, dtype=FLOAT, text_encoder_projection_dim=HIDDEN_2)
    assert [[*refiner.size_ids(96, 64)], [*refiner.negative_size_ids(96, 64)]] == [ids[0].tolist() for ids in theirs]
    prompts = pipeline.encode_prompt("a red cat", device=CPU, negative_prompt="blue")
    encoder = refiner.encoder(1, "original")
    for text, states, pooled in (("a red cat", prompts[0], prompts[2]), ("blue", prompts[1], prompts[3])):
        found = encoder.encode_texts([weighted_spans(text)])
        torch.testing.assert_close(found.states, states, rtol=1e-4, atol=1e-4)
        assert found.pooled is not None
        torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-4)


def test_its_unet_draws_the_last_steps(folder: Path, base: DrawingModel) -> None:
    refiner = load_refiner(str(folder), base, dtype=FLOAT, device=CPU)
    told: list[torch.Tensor] = []
    refiner.unet.register_forward_pre_hook(
        lambda _, __, named: told.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    request = PictureRequest("a AND b", "c", steps=4, cfg_scale=5.0, width=64, height=64, refiner_switch_at=0.5)
    (refined,) = draw(base, request, [1], refiner=refiner)
    assert [ids[:, -1].tolist() for ids in told] == [[6.0, 6.0, 2.5]] * 2
    assert refined.tobytes() != draw(base, request, [1])[0].tobytes()


def test_a_folder_without_an_index_will_do(folder: Path, base: DrawingModel, tmp_path: Path) -> None:
    copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "model_index.json").unlink()
    assert isinstance(load_refiner(str(tmp_path / "bare"), base, dtype=FLOAT, device=CPU), SdxlRefiner)


def test_any_base_of_the_family_will_do(tiny_sdxl: Path, base: DrawingModel) -> None:
    found = load_refiner(str(tiny_sdxl), base, dtype=FLOAT, device=CPU)
    assert not isinstance(found, SdxlRefiner) and found.family == base.family


def test_what_cannot_be_is_told(tiny_sd15: Path, base: DrawingModel, tmp_path: Path) -> None:
    file = tmp_path / "refiner.safetensors"
    save_file({"conditioner.embedders.0.model.ln_final.weight": torch.ones(2)}, file)
    for name, words in (
        (file, "is SDXL's refiner as a single file, which is not read here."),
        (tiny_sd15, "is for SD1.5, and the base is SDXL: their latents are not compatible."),
        (tmp_path / "absent", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            load_refiner(str(name), base, dtype=FLOAT, device=CPU)
