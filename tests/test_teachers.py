"""Teachers other than DINOv2: real configurations on the meta device, and small ones whose tokens are where their patches are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from library.errors import UserError
from library.models import teachers
from library.models.encoders import TeacherEncoder
from library.models.locate import BaseLocation
from library.models.teachers import KINDS, VisionTeacher, load_teacher, teacher_size

REAL: dict[str, tuple[dict[str, Any], int, tuple[int, int, int]]] = {
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (
        {"model_type": "dinov3_vit", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096, "patch_size": 16, "num_register_tokens": 4}, 512, (1024, 16, 24)),
    "google/siglip2-so400m-patch14-384": (
        {"model_type": "siglip", "text_config": {}, "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14}}, 448, (1152, 14, 27)),
    "openai/clip-vit-large-patch14": (
        {"model_type": "clip", "text_config": {}, "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 224, "patch_size": 14}}, 448, (1024, 14, 24)),
    "facebook/vit-mae-large": (
        {"model_type": "vit_mae", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "image_size": 224, "patch_size": 16, "mask_ratio": 0.75}, 256, (1024, 16, 24)),
}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
         "image_size": 32}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_published_sizes_give_a_token_for_each_patch(name: str, tmp_path: Path) -> None:
    fields, resolution, expected = REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    location = BaseLocation(name, tmp_path)
    size = teacher_size(location)
    assert size[1:] == expected
    config = teachers._configuration(location)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = teachers._class(size.kind, size.kind.classes[0])(config)
    encoder = TeacherEncoder(VisionTeacher(model, size), resolution, 16)
    for shape in ((512, 512), (384, 640)):
        pixels = torch.empty(2, 3, *shape, dtype=torch.uint8, device="meta")
        rows, columns = encoder.patch_tokens(pixels).shape[-2:]
        assert rows * columns == pytest.approx((resolution // size.patch) ** 2, rel=0.1)
        assert encoder.encode(pixels).shape[-1] == size.width


def saved(kind: str, folder: Path) -> Path:
    """A small teacher of random weights, as transformers writes it; of CLIP and SigLIP the whole model."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    if kind in ("clip", "siglip"):
        whole, config = {
            "clip": (transformers.CLIPModel, transformers.CLIPConfig),
            "siglip": (transformers.SiglipModel, transformers.SiglipConfig),
        }[kind]
        model = whole(config(text_config=text, vision_config=SMALL))
    else:
        row = KINDS[kind]
        model = teachers._class(row, row.classes[0])(teachers._class(row, row.classes[1])(**SMALL))
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.shape[0] > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "clip", "vit_mae"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_tokens_are_where_their_patches_are(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Of the picture's own size and another aspect: what is changed in a patch changes its token most."""
    teacher = load_teacher(str(saved(kind, tmp_path)))
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = teacher.patch_tokens(picture)
        columns = size[1] // 8
        assert before.shape == (1, size[0] // 8 * columns, 32)
        for row, column in ((0, 0), (1, 2), (2, columns - 1)):
            other = picture.clone()
            other[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0.0
            change = (teacher.patch_tokens(other) - before).norm(dim=-1)[0]
            assert change.argmax() == row * columns + column
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters()) and not teacher.model.training


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "siglip", "clip", "vit_mae"])
def test_tokens_of_an_inner_layer_are_those_of_the_teacher_cut_after_it(kind: str, tmp_path: Path) -> None:
    folder, picture = str(saved(kind, tmp_path)), torch.rand(1, 3, 32, 32)
    whole, cut, last = (load_teacher(folder, layer) for layer in (None, 2, 3))
    with torch.no_grad():
        layers = next(one for one in whole.model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == 3)
        tokens = whole.patch_tokens(picture)
        assert torch.equal(last.patch_tokens(picture), tokens)
        layers[2].forward = lambda hidden, *_, **__: hidden
        torch.testing.assert_close(cut.patch_tokens(picture), whole.patch_tokens(picture))
    with pytest.raises(UserError, match="teacher_layer 4 is more than there are: .* has 3 layers."):
        load_teacher(folder, 4)


def test_what_is_no_teacher_is_refused_by_name(tmp_path: Path) -> None:
    for kind in ("resnet", "siglip2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            UserError, match=f"describes a {kind}. A teacher is one of DINOv2, DINOv3, SigLIP, CLIP, MAE."
        ):
            teacher_size(BaseLocation("x", tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    with (
        mock.patch.dict(sys.modules, transformers=SimpleNamespace(__version__="4.9")),
        pytest.raises(UserError, match="DINOv3 needs DINOv3ViTConfig, which transformers 4.9 does"),
    ):
        teacher_size(BaseLocation("x", tmp_path))
    with pytest.raises(UserError, match="x cannot be read as DINOv3: "):
        load_teacher(BaseLocation("x", tmp_path))
