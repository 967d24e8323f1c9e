"""Which family of models a base is of, and what it looks like where it is of none. Light: no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.models.header import read_shapes
from library.models.locate import BaseLocation, choose_weights, weight_files
from library.models.quantised import check_number_formats
from networks.families import SD15, SDXL, TEXT_ENCODER_2, UNET, VAE, Family

_UNET = SD15.original[UNET]

# What other models look like: a tensor name, or the beginning of one, that only their files have.
_OTHER_MODELS = (
    ("edm_mean", "Playground 2.5, which has SDXL's shapes and another noise schedule"),
    ("edm_vpred.", "CosXL, which has SDXL's shapes and another noise schedule"),
    ("conditioner.embedders.0.model.", "the SDXL refiner"),
    ("conditioner.embedders.", "SDXL without one of its text encoders"),
    (_UNET + "label_emb.", "SDXL without its text encoders"),
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    (_UNET + "joint_blocks.", "Stable Diffusion 3"),
    (_UNET + "double_blocks.", "Flux"),
    ("control_model.", "a ControlNet"),
)
_VAE_ALONE = "a VAE alone"
# What is no whole model. In one with a U-Net, such a name is a stray that no program looks at.
_PARTS = (
    ("lora_", "a LoRA adapter"),
    ("lycoris_", "a LoRA adapter"),
    ("diffusion_model.", "a U-Net alone or a LoRA adapter, as ComfyUI saves them"),
    ("double_blocks.", "Flux"),
    ("unet.", "a LoRA adapter or a training checkpoint"),
    ("down_blocks.", "a diffusers U-Net alone"),
    ("encoder.", _VAE_ALONE),
    ("text_model.", "a text encoder alone"),
    ("first_stage_model.", _VAE_ALONE),
)
_OTHER_INPUTS = {9: "an inpainting model (9 input channels)", 8: "an editing model (8 input channels)"}


def family_of(location: BaseLocation, allowed: Collection[Family] = (SD15, SDXL)) -> Family:
    """The family of a located base, from names of tensors and configurations alone.

    Raises UserError, with what the base looks like, where that is none of the `allowed` ones, and where its weights are
    quantised in a form that is not read.
    """
    path = location.path
    found = require_family(_family_of_file(path) if location.is_file else _family_of_folder(path), allowed, str(path))
    check_number_formats(*_weights(path, found))
    return found


def _weights(path: Path, family: Family) -> tuple[list[Path], tuple[str, ...]]:
    """The safetensors files that a base's weights lie in, and what their names begin with; not the autoencoder's folder, in
    place of which another may serve.
    """
    if path.is_file():
        return [path], tuple(family.original.values())
    parts = [part for part in family.original if part != VAE and (path / part).is_dir()]
    names = {part: choose_weights([file.name for file in (path / part).iterdir()], part) for part in parts}
    files = [path / part / name for part, found in names.items() for name in found]
    return [file for file in files if file.suffix == ".safetensors"], ("",)


def check_headers(location: BaseLocation, *, without: Collection[str] = ()) -> None:
    """Raise UserError for a base of no family, and for files of tensors that are damaged or not there. Of pickles, nothing is read.

    without: components that are not asked for.
    """
    family = family_of(location)  # which reads the header of a single file
    if not location.is_file:
        for component in (name for name in family.original if name not in without):
            for path in weight_files(location.path, component):
                if path.suffix == ".safetensors":
                    read_shapes(path)


def require_family(found: Family | str, allowed: Collection[Family], where: str) -> Family:
    """`found` (or what `where` looks like instead) if it is one of the `allowed` families; else UserError."""
    if isinstance(found, Family) and found in allowed:
        return found
    looks = found.title if isinstance(found, Family) else found
    needed = " or ".join(family.title for family in allowed)
    hint = " Give it to --vae, beside a base model." if looks == _VAE_ALONE else ""
    raise UserError(f"{where} looks like {looks}. An {needed} base model is needed here.{hint}")


def native_side(location: BaseLocation) -> int:
    """Side in pixels that a base was trained at, from its configuration alone."""
    family = family_of(location)
    latents = None if location.is_file else read_json(location.path / UNET / "config.json").get("sample_size")
    return family.native_side if latents is None else int(latents) * family.vae_factor


def _family_of_file(path: Path) -> Family | str:
    """The family, or what the file looks like instead."""
    shapes = read_shapes(path)
    first = shapes.get(_UNET + "input_blocks.0.0.weight", ())
    if len(first) == 4 and first[1] in _OTHER_INPUTS:
        return _OTHER_INPUTS[first[1]]
    is_sdxl = all(any(name.startswith(SDXL.original[part]) for name in shapes) for part in SDXL.text_encoders)
    is_whole = any(name.startswith(_UNET) for name in shapes)
    for beginning, looks in _OTHER_MODELS if is_whole else (*_OTHER_MODELS, *_PARTS):
        sdxl_has_it = is_sdxl and beginning.startswith(("conditioner.", _UNET))
        if not sdxl_has_it and any(name.startswith(beginning) for name in shapes):
            return looks
    return SDXL if is_sdxl else SD15


def _family_of_folder(folder: Path) -> Family | str:
    config = folder / "unet" / "config.json"
    if config.is_file():
        return _family_of_unet(read_json(config))
    # Of a hub model only the components that were asked for are here, and the index.
    index = folder / "model_index.json"
    return SDXL if index.is_file() and (read_json(index).get(TEXT_ENCODER_2) or [None])[0] else SD15


def _family_of_unet(config: Mapping[str, Any]) -> Family | str:
    if config.get("in_channels") in _OTHER_INPUTS:
        return _OTHER_INPUTS[config["in_channels"]]
    conditions, words = config.get("addition_embed_type"), config.get("cross_attention_dim")
    if conditions == "text_time":
        if config.get("encoder_hid_dim") is not None:
            return "Kolors, which has SDXL's U-Net and another text encoder"
        return "the SDXL refiner" if words == 1280 else SDXL
    if conditions is not None:
        return f"a model with conditions of the kind {conditions}"
    return "Stable Diffusion 2" if words == 1024 else SD15
