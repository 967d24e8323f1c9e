"""An autoencoder without a model around it, as `--vae` takes it: one file, or what diffusers' AutoencoderKL saves as a folder.

It serves the family of the base that it is used with. Light: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.models.embedded import TINY_BASES
from library.models.header import NESTING, read_shapes
from library.models.locate import (
    LONE_VAE,
    BaseLocation,
    base_status,
    cached_copy,
    check_base,
    locate_base,
    missing_parts,
    weight_files,
)
from library.models.quantised import check_number_formats, is_beside
from networks.families import UNET, VAE, Family
from networks.names import current_key
from networks.original_names import diffusers_keys

_NESTED = "first_stage_model."
_BEGINNINGS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_FIRST = {"encoder.conv_in.weight", "decoder.conv_in.weight"}  # of either layout
_CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class LoneVae(BaseLocation):
    """Where it lies: `path` is its file of weights."""

    config_file: Path | None = None
    """config.json beside the weights, of a folder of diffusers'."""

    @property
    def config(self) -> dict[str, Any] | None:
        return None if self.config_file is None else read_json(self.config_file)

    def scaling_factor(self, family: Family) -> float:
        """What latents for a base of `family` are multiplied with: its configuration's, or else the family's."""
        return float((self.config or {}).get("scaling_factor", family.scaling_factor))


def locate_vae(name: str) -> BaseLocation:
    """Find an autoencoder: a lone one, or else that of a base (see `locate_base`), fetched from the hub if need be.

    A lone one is a `.safetensors` file in the original or in diffusers' layout, a folder with config.json and
    diffusion_pytorch_model.safetensors, or the hub id of such a folder.
    """
    if alone := _local(name):
        return alone
    found = locate_base(name, (VAE,), otherwise=(LONE_VAE,))
    return (None if found.is_file else _of_folder(name, found.path)) or found


def vae_status(name: str) -> str | None:
    """None when `locate_vae(name)` needs no network, else a sentence saying what is missing (see `base_status`)."""
    try:
        return None if _local(name) else base_status(name, (VAE,))
    except UserError as error:
        return str(error)


def check_vae_name(name: str) -> None:
    """Raise UserError where `locate_vae` would, as far as that can be known without fetching anything."""
    if _local(name) is None:
        check_base(name, (VAE,))


def check_lone_vae(vae: LoneVae, family: Family) -> None:
    """Raise UserError for one that no base of `family` can be used with, by its configuration and its header."""
    config, channels = vae.config, None
    if vae.path.suffix == ".safetensors":
        check_number_formats([vae.path])
        shapes = read_shapes(vae.path)
        first = next(
            (shapes[name] for name, key in lone_keys(shapes, family).items() if key in _FIRST and "dec" in key), ()
        )
        channels = first[1] if len(first) == 4 else None
    if channels is None and config is not None:
        channels = config.get("latent_channels")
    if channels not in (None, family.latent_channels):
        raise UserError(
            f"{vae.name} is an autoencoder of {channels} latent channels, and {family.title} has {family.latent_channels}: "
            "it belongs to another family of models. Name another with --vae, or leave it out."
        )


def lone_keys(names: Iterable[str], family: Family) -> dict[str, str]:
    """Name in the file -> key in AutoencoderKL, from either layout. What is none of the autoencoder (`loss.`) is left out."""
    keys = {}
    for name in names:
        bare = name.removeprefix(NESTING).removeprefix(_NESTED)
        if bare.startswith(_BEGINNINGS) and not is_beside(bare):
            original = diffusers_keys(family, family.original[VAE] + bare)
            keys[name] = original[0][1] if original else str(current_key(VAE, bare))
    return keys


def _local(name: str) -> LoneVae | None:
    if name in TINY_BASES:
        return None
    path = Path(name).expanduser()
    if path.is_file():
        return _of_file(name, path) if path.suffix.lower() == ".safetensors" else None
    if path.is_dir():
        return _of_folder(name, path)
    found = cached_copy(name, (LONE_VAE,))
    return None if found is None else _of_folder(name, found.path)


def _of_file(name: str, path: Path) -> LoneVae | None:
    names = list(read_shapes(path))
    inner = {each.removeprefix(_NESTED) for each in names}
    is_base = any(each.startswith("model.diffusion_model.") for each in names)
    if is_base or not any(each.startswith(_BEGINNINGS) for each in inner):
        return None
    if missing := sorted(_FIRST - inner):
        raise UserError(
            f"{name} is no autoencoder of Stable Diffusion's kind ({_CLASS}): the tensor {missing[0]} is missing. Name another "
            "with --vae, or leave it out."
        )
    config = path.with_name("config.json")  # which the file of a folder is named with
    is_of_folder = path.stem.startswith("diffusion_pytorch_model") and config.is_file()
    return LoneVae(name, path, config_file=_autoencoders(config) if is_of_folder else None)


def _of_folder(name: str, folder: Path) -> LoneVae | None:
    """None for a base's."""
    if (folder / "model_index.json").exists() or (folder / UNET).is_dir():
        return None
    for inside in (folder, folder / VAE):
        missing = missing_parts(inside, (LONE_VAE,))
        if (config := inside / "config.json").is_file():
            _autoencoders(config)
        if len(missing) == 1:
            raise UserError(f"{inside} is incomplete: {missing[0]} missing. Complete it or name another.")
        if not missing:
            return LoneVae(name, weight_files(inside, LONE_VAE)[0], config_file=config)
    return None


def _autoencoders(config: Path) -> Path:
    """The same, which describes an AutoencoderKL."""
    found = read_json(config).get("_class_name", "model of transformers'")
    if found != _CLASS:
        raise UserError(f"{config} describes a {found}. An {_CLASS} is needed for --vae.")
    return config
