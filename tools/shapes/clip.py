"""The text encoder of the tiny base, and a picture encoder beside it: CLIP, trained on captions that a picture fulfils."""

from __future__ import annotations

import random
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from library.data.demo_pictures import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Picture,
    caption_of,
)
from library.models.clip_tokenizer import tiny_tokenizer
from library.models.sd15_configs import SD15_TEXT_ENCODER
from library.models.tiny_parts import text_encoder_sizes
from tools.shapes.fit import Record, fit
from tools.shapes.pictures import SIDE, Pictures, batches

HIDDEN, LAYERS = 128, 4
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
BATCH, VISION_BATCH, RATE = 128, 64, 1e-3
_TRAINED_POSITIONS = 40  # longer captions than the set's are never seen


def text_config() -> dict[str, object]:
    return {**SD15_TEXT_ENCODER, **text_encoder_sizes(HIDDEN), "num_hidden_layers": LAYERS}


def vision_config() -> dict[str, object]:
    return {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": 16,
        "projection_dim": HIDDEN,
    }


def config() -> CLIPConfig:
    return CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=HIDDEN)


def train_clip(pictures: Pictures, steps: int) -> tuple[CLIPModel, Record]:
    """Contrastive (Radford et al. 2021), with every picture of the batch that fulfils a caption as a match of it."""
    model = CLIPModel(
        CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=HIDDEN)
    ).train()
    tokenizer, choose = tiny_tokenizer(), random.Random(2)

    def loss_at(step: int, indices: Tensor) -> Tensor:
        known = [pictures.known[index] for index in indices.tolist()]
        captions = [caption_of(picture, choose) for picture in known]
        ids = tokenizer(captions, padding="max_length", max_length=_TRAINED_POSITIONS, return_tensors="pt").input_ids
        matches = fulfilled(captions, known)  # [captions, pictures]
        with torch.autocast("cpu", torch.bfloat16):
            similarities = model(
                input_ids=ids, pixel_values=clip_inputs(pictures.pixels[indices])
            ).logits_per_text.float()
        return 0.5 * (_cross_entropy(similarities, matches) + _cross_entropy(similarities.t(), matches.t()))

    record = fit("clip", {"clip": model}, loss_at, list(batches(len(pictures), BATCH, steps, 2)), RATE)
    return model.eval(), record


def train_picture_tower(pictures: Pictures, model: CLIPModel, steps: int) -> tuple[CLIPModel, Record]:
    """Go on with the picture tower alone, against the locked text tower (Zhai et al. 2022, arXiv 2111.07991).

    The base's U-Net stands on the text tower by then. Beside the batch's captions, the sixteen classes are told apart.
    """
    model.train().text_model.eval()
    tokenizer, choose = tiny_tokenizer(), random.Random(6)

    def texts_of(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", max_length=_TRAINED_POSITIONS, return_tensors="pt").input_ids
        with torch.no_grad():
            features = model.get_text_features(input_ids=ids)
        return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)

    classes = texts_of([f"a {name}" for name in CLASSES])
    of = {name: index for index, name in enumerate(CLASSES)}
    wanted = torch.tensor([of[f"{picture.colour} {picture.shape}"] for picture in pictures.known])

    def loss_at(step: int, indices: Tensor) -> Tensor:
        known = [pictures.known[index] for index in indices.tolist()]
        captions = [caption_of(picture, choose) for picture in known]
        texts = texts_of(captions)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.get_image_features(pixel_values=clip_inputs(pictures.pixels[indices]))
        seen = F.normalize(getattr(seen, "pooler_output", seen).float(), dim=-1)
        scale = model.logit_scale.exp()
        matches = fulfilled(captions, known)
        similarities = scale * texts @ seen.t()
        contrast = 0.5 * (_cross_entropy(similarities, matches) + _cross_entropy(similarities.t(), matches.t()))
        return contrast + F.cross_entropy(scale * seen @ classes.t(), wanted[indices])

    tower = {"vision": model.vision_model, "projection": model.visual_projection}
    record = fit("picture tower", tower, loss_at, list(batches(len(pictures), VISION_BATCH, steps, 6)), RATE)
    return model.eval(), record


def clip_inputs(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> what the picture encoder takes, [B, 3, 128, 128] float32."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255.0 - mean) / std


def fulfilled(captions: list[str], known: list[Picture]) -> Tensor:
    """[captions, pictures] float32: 1 where everything a caption says holds for a picture."""
    said = torch.stack([_marks(text) for text in captions])
    true = torch.stack([_marks(picture.caption) for picture in known])
    return (said @ (1.0 - true).t() == 0).float()


_WORDS = [
    *(f" {colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f" {size} " for size in SIZES),
    *(f" {place}( on|$)" for place in PLACES.values()),
    *(f" {texture} [a-z]+ background| [a-z]+ {texture} background" for texture in TEXTURES),
    *(f" {ground} (gradient )?background" for ground in BACKGROUNDS),
]


def _marks(text: str) -> Tensor:
    """[len(_WORDS)] float32: which of the things that can be said of a picture the caption says."""
    return torch.tensor([float(re.search(word, f" {text}") is not None) for word in _WORDS])


def _cross_entropy(similarities: Tensor, matches: Tensor) -> Tensor:
    """Rows of similarities against their matches, all equally likely."""
    return F.cross_entropy(similarities, matches / matches.sum(dim=1, keepdim=True))
