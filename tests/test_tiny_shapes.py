"""The trained models that come with the project: what their card says of them holds, in small."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.demo_pictures import CLASSES, draw, imagine
from library.evaluation.picture_encoders import ClipPictures, DinoPictures
from library.files import file_hash, read_json
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.picture_request import PictureRequest
from library.inference.text_to_image import draw as draw_pictures
from library.inference.text_to_image import native_size
from library.models.embedded import MODELS, SHAPES, SHAPES_CLIP, SHAPES_DINOV2
from library.models.encoders import VaeEncoder
from library.models.locate import locate_base

ALL = (SHAPES, SHAPES_CLIP, SHAPES_DINOV2)
SIDE = 128


@pytest.fixture(scope="module")
def model() -> DrawingModel:
    return load_model(locate_base(SHAPES), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def renders() -> list[Image.Image]:
    """Four of each class, as no part of the training set drew them."""
    return [draw(imagine(name, random.Random(f"test {name} {index}")), SIDE) for name in CLASSES for index in range(4)]


def test_all_three_take_less_than_20_mb() -> None:
    files = [file for name in ALL for file in (MODELS / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000


def test_the_card_speaks_of_these_files() -> None:
    measured = read_json(MODELS / SHAPES / "measured.json")
    assert len(measured["sha256"]) == 5  # U-Net, VAE, text encoder, teacher, CLIP
    for name, digest in measured["sha256"].items():
        file = MODELS / name if name.startswith(ALL) else MODELS / SHAPES / name
        assert file_hash(file) == digest, name


def test_the_card_says_what_was_asked_for() -> None:
    measured = read_json(MODELS / SHAPES / "measured.json")
    assert measured["reconstruction_psnr_db"] >= 25.0
    assert min(measured["shape_and_colour_right"].values()) >= 0.8 and measured["prompts"] == 200
    assert set(map(float, measured["shape_and_colour_right"])) >= {4.0, 7.0}


def test_the_autoencoder_gives_unseen_pictures_back(model: DrawingModel, renders: list[Image.Image]) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in renders[:16]])).permute(0, 3, 1, 2).contiguous()
    latents, _ = VaeEncoder(model.vae).moments(pixels)
    with torch.no_grad():
        decoded = model.vae.decode(latents.float()).sample.clamp(-1, 1)
    error = ((decoded - (pixels.float() / 127.5 - 1)) / 2).square().mean(dim=(1, 2, 3))
    assert float((-10 * error.log10()).mean()) >= 25.0


def test_it_draws_what_it_is_asked_for(model: DrawingModel) -> None:
    """Pictures of eight of the sixteen classes; CLIP, which reads 71 % of renders right, finds most, and chance half a one."""
    clip = ClipPictures(str(MODELS / SHAPES_CLIP))
    pictures = [
        draw_pictures(model, PictureRequest(f"a photo of a {name}", "", 12, 5.0, SIDE, SIDE, "DPM++ 2M"), [seed])[0]
        for seed, name in [*enumerate(CLASSES)][::2]
    ]
    words = clip.prompts([f"a {name}" for name in CLASSES])
    found = (clip.pictures(pictures) @ words.T).argmax(1).tolist()
    assert sum(index == 2 * place for place, index in enumerate(found)) >= 5


def test_its_native_size_is_what_it_was_trained_on(model: DrawingModel) -> None:
    assert native_size(model) == SIDE


def test_the_teacher_tells_the_classes_apart(renders: list[Image.Image]) -> None:
    """By the CLS token: the class whose other three pictures' mean is nearest is right far more often than 1 time in 16."""
    cls = DinoPictures(str(MODELS / SHAPES_DINOV2))(renders)
    cls = torch.nn.functional.normalize(cls - cls.mean(0), dim=1)
    by_class = cls.view(len(CLASSES), 4, -1)
    own = (by_class.sum(1, keepdim=True) - by_class) / 3  # without the picture itself
    others = by_class.mean(1)
    right = 0
    for index in range(len(CLASSES)):
        for picture in range(4):
            means = others.clone()
            means[index] = own[index, picture]
            near = torch.nn.functional.normalize(means, dim=1) @ by_class[index, picture]
            right += int(near.argmax()) == index
    assert right / len(renders) >= 0.25
