"""Checkpoints of the real size with random weights, and pictures to train on: for what no download is needed to measure."""

from __future__ import annotations

from pathlib import Path

from common import RESULTS  # noqa: F401  # puts the project on the path

PICTURES = 8


def random_checkpoint(path: Path, family_key: str) -> Path:
    """An original single file, float16, of the family's names and shapes; one tensor in memory at a time."""
    import torch
    from accelerate import init_empty_weights
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from library.models.configs import configs_of
    from library.models.tensor_files import NewTensor, write_tensor_file
    from networks.families import FAMILIES, TEXT_ENCODER_2, UNET, VAE
    from networks.original_names import Form, original_place

    family = FAMILIES[family_key]
    configs = configs_of(family)
    with init_empty_weights():
        models = {UNET: UNet2DConditionModel.from_config(configs.unet), VAE: AutoencoderKL.from_config(configs.vae)}
        for component, config in configs.text_encoders.items():
            kind = CLIPTextModelWithProjection if component == TEXT_ENCODER_2 else CLIPTextModel
            models[component] = kind(CLIPTextConfig(**config))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, NewTensor] = {}
    for component, model in models.items():
        for key, value in model.state_dict().items():
            place = original_place(family, component, key)
            shape = tuple(value.shape)
            if place.form is Form.CONVOLUTION:
                shape = (*shape, 1, 1)
            elif place.form is Form.STACKED:
                shape = (3 * shape[0], *shape[1:])
            elif place.form is Form.TRANSPOSED:
                shape = shape[::-1]
            is_norm = len(shape) == 1 and key.endswith("weight")

            def make(shape: tuple[int, ...] = shape, is_norm: bool = is_norm) -> torch.Tensor:
                values = 0.02 * torch.randn(shape, generator=generator)
                return (values + 1.0 if is_norm else values).half()

            tensors[place.key] = NewTensor(place.key, torch.float16, shape, make=make)
    write_tensor_file(path, list(tensors.values()), {"format": "pt"})
    return path


def make_pictures(folder: Path, side: int) -> None:
    """PICTURES smooth random pictures with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        small = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of thing {number}", encoding="utf-8")
