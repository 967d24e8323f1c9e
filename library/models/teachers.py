"""Vision models that AlignHeads learn from, a row each: what their pictures are normalised with, and where their patch tokens are.

DINOv2 is read by `dinov2.py`, from Meta's files too; the others as transformers reads them, from folders and the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.errors import UserError
from library.files import read_json
from library.models.dinov2 import dinov2_config, load_dinov2
from library.models.locate import BaseLocation, locate_dino

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)


def _nothing(pixels: Tensor, patches: int) -> dict[str, Any]:
    return {}


def _interpolated(pixels: Tensor, patches: int) -> dict[str, Any]:
    """Position embeddings of another size than the pictures of its training are interpolated."""
    return {"interpolate_pos_encoding": True}


def _in_order(pixels: Tensor, patches: int) -> dict[str, Any]:
    """MAE shuffles its patches by this noise, and keeps all of them at mask_ratio 0."""
    noise = torch.arange(patches, device=pixels.device, dtype=torch.float32).expand(len(pixels), -1)
    return {"noise": noise, "interpolate_pos_encoding": True}


@dataclass(frozen=True)
class TeacherKind:
    """classes: of model and configuration, in transformers. whole: the configuration's part, where a file is of a whole model.

    first: tokens before those of the patches. inputs: what else the model is given. settings: changes of its configuration.
    """

    title: str
    classes: tuple[str, str]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    first: Callable[[Any], int] = lambda config: 1
    inputs: Callable[[Tensor, int], dict[str, Any]] = _nothing
    settings: tuple[tuple[str, Any], ...] = ()


def _with_registers(config: Any) -> int:
    return 1 + int(getattr(config, "num_register_tokens", 0))


DINOV2 = TeacherKind("DINOv2", ("Dinov2Model", "Dinov2Config"), first=_with_registers)
_SIGLIP = TeacherKind(
    "SigLIP", ("SiglipVisionModel", "SiglipVisionConfig"), HALF, HALF, lambda config: 0, _interpolated,
    (("vision_use_head", False),),
)  # fmt: skip
_CLIP = TeacherKind("CLIP", ("CLIPVisionModel", "CLIPVisionConfig"), CLIP_MEAN, CLIP_STD, inputs=_interpolated)
KINDS: dict[str, TeacherKind] = {
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": TeacherKind("DINOv3", ("DINOv3ViTModel", "DINOv3ViTConfig"), first=_with_registers),
    # SigLIP 2 of one resolution is SigLIP's model; that of any aspect (NaFlex) takes patches, not pictures.
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "vit_mae": TeacherKind("MAE", ("ViTMAEModel", "ViTMAEConfig"), inputs=_in_order, settings=(("mask_ratio", 0.0),)),
}
"""By model_type of config.json."""
KNOWN = ", ".join(dict.fromkeys(kind.title for kind in KINDS.values()))


class TeacherSize(NamedTuple):
    """width: of a token. patch: side in pixels."""

    kind: TeacherKind
    width: int
    patch: int
    layers: int


@dataclass
class VisionTeacher:
    """A frozen vision model as tokens are made with it."""

    model: Any
    size: TeacherSize

    def patch_tokens(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] float32 in 0..1, sides multiples of the patch -> patch tokens [B, N, D] in the model's dtype, row by row.

        Without CLS token and registers, after the last layer norm where the model has one. Raises UserError where the model gives
        others than one a patch.
        """
        kind, (height, width) = self.size.kind, pictures.shape[-2:]
        rows, columns = height // self.size.patch, width // self.size.patch
        mean, std = (torch.tensor(values, device=pictures.device).view(1, 3, 1, 1) for values in (kind.mean, kind.std))
        inputs = ((pictures - mean) / std).to(self.model.dtype)
        given = kind.inputs(inputs, rows * columns)
        tokens: Tensor = self.model(pixel_values=inputs, **given).last_hidden_state[:, kind.first(self.model.config) :]
        if tokens.shape[1] != rows * columns:
            raise UserError(
                f"The teacher gave {tokens.shape[1]} patch tokens for {width} x {height} pixels, not {columns} x {rows}. Its "
                "configuration (patch size, registers) does not describe its weights."
            )
        return tokens


def load_teacher(
    location: BaseLocation | str,
    layer: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VisionTeacher:
    """The teacher, frozen. layer: after which it is cut, counted from 1; None: whole.

    Raises UserError for what is no teacher, lacks weights, or has no such layer.
    """
    location = locate_dino(location) if isinstance(location, str) else location
    size = teacher_size(location)
    require_layer(layer, size, location.name)
    if size.kind is DINOV2:
        return VisionTeacher(load_dinov2(location, dtype=dtype, device=device, layers=layer), size)
    config = _configuration(location)
    config.num_hidden_layers = layer or size.layers
    return VisionTeacher(_read(location, size.kind, config, dtype).to(device), size)


def teacher_size(location: BaseLocation | str) -> TeacherSize:
    """Without loading more than the configuration of a folder. Raises UserError where it describes no teacher."""
    location = locate_dino(location) if isinstance(location, str) else location
    kind = DINOV2 if location.is_file else _kind(location)
    config: Any = dinov2_config(location) if kind is DINOV2 else _configuration(location)
    return TeacherSize(kind, int(config.hidden_size), int(config.patch_size), int(config.num_hidden_layers))


def require_layer(layer: int | None, size: TeacherSize, name: str) -> None:
    if layer is not None and layer > size.layers:
        raise UserError(f"teacher_layer {layer} is more than there are: {name} has {size.layers} layers.")


def _kind(location: BaseLocation) -> TeacherKind:
    path = location.path / "config.json"
    found = read_json(path).get("model_type")
    if found not in KINDS:
        raise UserError(f"{path} describes a {found}. A teacher is one of {KNOWN}.")
    return KINDS[found]


def _class(kind: TeacherKind, name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise UserError(
            f"{kind.title} needs {name}, which transformers {transformers.__version__} does not have. Update it."
        )
    return found


def _configuration(location: BaseLocation) -> Any:
    fields = read_json(location.path / "config.json")
    kind = _kind(location)
    config = _class(kind, kind.classes[1]).from_dict(fields.get("vision_config") or fields)
    for name, value in kind.settings:
        setattr(config, name, value)
    return config


def _read(location: BaseLocation, kind: TeacherKind, config: Any, dtype: torch.dtype) -> Any:
    """By transformers, which knows how its own names of weights have changed; pickles are not read."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    shown = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # of text towers and layers that are left out
        model, found = _class(kind, kind.classes[0]).from_pretrained(
            location.path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{location.name} cannot be read as {kind.title}: {reason}") from error
    finally:
        logging.set_verbosity(shown)
    if absent := sorted(found["missing_keys"]):
        raise UserError(
            f"{location.name} lacks {len(absent)} weights of {kind.title} (first: {absent[0]}). Fetch it again."
        )
    return model.requires_grad_(False).eval()
