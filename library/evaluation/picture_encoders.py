"""Embeddings of pictures and prompts: DINOv2's CLS token, CLIP's image and text towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from library.errors import UserError
from library.files import read_json
from library.models.dinov2 import load_dinov2
from library.models.embedded import SHAPES_CLIP
from library.models.locate import check_clip, locate_clip, locate_dino
from library.models.teachers import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

BATCH_SIZE = 16
DINO_RESOLUTION = 224  # published numbers of DINO-I are at 224


class DinoPictures:
    """DINOv2's embedding of a picture. Raises UserError where `name` is no DINOv2.

    Pictures are scaled and cropped to a centred square of 224 pixels, or the nearest multiple of the patch size below.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.model = load_dinov2(locate_dino(name), device=device)
        config: Any = self.model.config
        self.side = max(DINO_RESOLUTION // int(config.patch_size), 1) * int(config.patch_size)
        self.width = int(config.hidden_size)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, D] float32 on the CPU, as the final norm leaves them: not of unit length."""
        rows = []
        for start in range(0, len(pictures), BATCH_SIZE):
            pixels = _pixels(pictures[start : start + BATCH_SIZE], self.side, IMAGENET_MEAN, IMAGENET_STD)
            hidden = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype)).last_hidden_state
            rows.append(hidden[:, 0].float().cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.width)


class ClipPictures:
    """CLIP's embeddings of pictures and prompts, of unit length: [n, D] float32 on the CPU."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        """name: a folder or hub id of a transformers CLIPModel. Raises UserError where it is none."""
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        check_clip_pictures(name)
        folder = _clip_folder(name)
        try:
            where = folder if folder.is_dir() else name
            if folder.is_dir():
                logging.disable_progress_bar()  # nothing is downloaded, and weights are read in a moment
            loaded: Any = CLIPModel.from_pretrained(where, use_safetensors=True, output_loading_info=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(where)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise _no_clip(name, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
        self.model, found = loaded
        if absent := sorted(
            map(str, {*found["missing_keys"], *found["mismatched_keys"]})
        ):  # transformers initialises them at random
            raise _no_clip(
                name, f"{len(absent)} of its weights are missing or have another shape, such as {absent[0]}."
            )
        self.model.requires_grad_(False).eval().to(device)
        self.side = int(self.model.config.vision_config.image_size)
        fields = (
            read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
        )
        self.mean = tuple(fields.get("image_mean", CLIP_MEAN))
        self.std = tuple(fields.get("image_std", CLIP_STD))

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        rows = []
        for start in range(0, len(pictures), BATCH_SIZE):
            pixels = _pixels(pictures[start : start + BATCH_SIZE], self.side, self.mean, self.std)
            pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
            rows.append(self.model.visual_projection(pooled).float().cpu())
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts of more than 75 tokens are cut."""
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=int(self.model.config.text_config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        pooled = self.model.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(pooled).float().cpu(), dim=1)


def check_clip_pictures(name: str) -> None:
    """Raise UserError where `ClipPictures` would, as far as names and configuration tell; nothing is fetched."""
    folder = _clip_folder(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _no_clip(name, "it has no config.json.")
        if (kind := read_json(folder / "config.json").get("model_type")) != "clip":
            raise _no_clip(name, f"its config.json describes a {kind}.")
        if not [*folder.glob("*.safetensors")]:
            raise _no_clip(name, "it has no weights (model.safetensors).")
    else:
        check_clip(name)


def _clip_folder(name: str) -> Path:
    return locate_clip(name).path if name == SHAPES_CLIP else Path(name).expanduser()


def _no_clip(name: str, reason: str) -> UserError:
    return UserError(
        f"clip_model {name} cannot be used: {reason} Give a folder or hub id of a CLIPModel with its tokenizer, such as "
        "openai/clip-vit-large-patch14."
    )


def unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.double(), dim=1)


def _pixels(pictures: Sequence[Image.Image], side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The centred square of each, [B, 3, side, side] float32, normalised."""
    squares = []
    for picture in pictures:
        short = min(picture.size)
        left, top = (picture.width - short) // 2, (picture.height - short) // 2
        square = picture.convert("RGB").crop((left, top, left + short, top + short))
        square = square.resize((side, side), Image.Resampling.BICUBIC)
        squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    values = torch.stack(squares).float() / 255
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
