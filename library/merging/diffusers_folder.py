"""A diffusers folder with an adapter folded in: what the adapter does not touch keeps its bytes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from library.errors import RunFailed, UserError
from library.files import read_json, require_space, whole_folder, write_json
from library.merging.merge import Change, merge_adapter, place
from library.models.load import load_scheduler_config, load_text_encoder, load_unet, load_vae
from library.models.locate import COMPONENTS, BaseLocation, weight_files
from library.models.single_file import PREFIXES
from library.models.weights import read_shapes, read_tensors
from networks.adapter_file import Adapter
from networks.names import TEXT_ENCODER, UNET

_FILE_NAMES = {UNET: "diffusion_pytorch_model.safetensors", TEXT_ENCODER: "model.safetensors"}
_PARTS = {
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_OPTIONAL = (
    "feature_extractor",
    "image_encoder",
    "safety_checker",
)  # parts of StableDiffusionPipeline that may be absent


@dataclass(frozen=True)
class Merged:
    """What became of the weights of one component."""

    component: str
    keys_before: int
    keys_after: int
    changes: list[Change]
    copied: bool
    """Whether the file is the base's to the byte."""

    @property
    def largest(self) -> Change | None:
        return max(self.changes, key=lambda change: change.relative, default=None)


@dataclass(frozen=True)
class MergeReport:
    components: list[Merged]
    absent: list[str]
    """Parts that the base's index names and this folder does not have (safety_checker, where it was not fetched)."""


def check_output(output: Path, sources: list[Path], *, overwrite: bool) -> None:
    """Raise UserError where writing `output` would replace what is not an earlier merge, or what is to be read."""
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists already. Name another --output_dir, or replace it with --overwrite.")
    if not (output / "model_index.json").is_file():
        raise UserError(
            f"{output} is no diffusers folder, so --overwrite does not replace it. Name another --output_dir."
        )
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise UserError(f"{output} holds {source}, which is to be read. Name another --output_dir.")


def write_merged_folder(
    base: BaseLocation,
    adapter: Adapter,
    output: Path,
    *,
    ratio: float = 1.0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Fold `adapter` into `base` and write the diffusers folder `output`, whole or not at all.

    dtype: of the U-Net, and of the text encoder where the adapter touches it; None keeps the base's. Keys of the text
    encoder carry `text_model.`, without which transformers < 5.6 loads random weights.
    Raises UserError where base or adapter do not fit, RunFailed where the result cannot be written.
    """
    tokenizer, text_encoder = load_text_encoder(base)
    unet = load_unet(base)
    weights = {UNET: unet.state_dict(), TEXT_ENCODER: text_encoder.state_dict()}
    placed = place(adapter, {part: {key: w.shape for key, w in named.items()} for part, named in weights.items()})
    values = sum(w.numel() for named in weights.values() for w in named.values())
    require_space(output, values * (dtype or _stored_dtype(base, UNET)).itemsize, "The merged model")
    done = []
    with whole_folder(output, overwrite=overwrite) as folder:
        for component, named in weights.items():
            before = _stored_names(base, component)
            touched = component == UNET or bool(placed[component])
            copied = not touched and _can_be_copied(base, before)
            changes: list[Change] = []
            if not copied:
                target = dtype if touched and dtype is not None else _stored_dtype(base, component)
                changes = merge_adapter(named, placed[component], ratio, target)
                _save_weights(named, folder / component / _FILE_NAMES[component])
            done.append(Merged(component, len(before), len(named), changes, copied))
        if base.is_file:
            _save_rest(base, folder, unet, tokenizer, text_encoder)
        else:
            for component in (*COMPONENTS, *_OPTIONAL):
                _copy_component(base.path, component, folder)
        absent = _write_model_index(base, folder)
    return MergeReport(done, absent)


def _stored_names(base: BaseLocation, component: str) -> list[str]:
    """The names of a component's tensors as the base's files have them."""
    if base.is_file:
        return [name for name in read_shapes(base.path) if name.startswith(PREFIXES[component])]
    files = weight_files(base.path, component)
    return [name for file in files for name in (read_shapes if file.suffix == ".safetensors" else read_tensors)(file)]


def _stored_dtype(base: BaseLocation, component: str) -> torch.dtype:
    """That of the component's first weight."""
    file = base.path if base.is_file else weight_files(base.path, component)[0]
    first = next(name for name in _stored_names(base, component) if name.endswith(".weight"))
    return read_tensors(file, first)[first].dtype


def _can_be_copied(base: BaseLocation, names: list[str]) -> bool:
    """Whether a text encoder of these names loads everywhere: it has the prefix that transformers < 5.6 needs."""
    return not base.is_file and all(name.startswith("text_model.") for name in names)


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, path, metadata={"format": "pt"})
    again = read_tensors(path)
    if again.keys() != weights.keys() or not all(torch.equal(again[key], weights[key]) for key in weights):
        raise RunFailed(
            f"{path.name} reads back differently from what was written. Nothing was replaced; check the disk."
        )


def _save_rest(
    base: BaseLocation,
    folder: Path,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
) -> None:
    """What a single file has of the other components, and the configurations it does not have."""
    unet.save_config(folder / UNET)
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(folder / TEXT_ENCODER)
    tokenizer.save_pretrained(folder / "tokenizer")
    load_vae(base, dtype=_stored_dtype(base, "vae")).save_pretrained(folder / "vae")
    write_json(folder / "scheduler" / "scheduler_config.json", load_scheduler_config(base))


def _copy_component(base: Path, component: str, folder: Path) -> None:
    """Copy one component of a diffusers folder; of several variants of its weights, the one that would be loaded.

    Weights that stand in `folder` already stay.
    """
    source, target = base / component, folder / component
    if not source.is_dir():
        return
    if component not in (UNET, TEXT_ENCODER, "vae"):
        shutil.copytree(source, target)
        return
    target.mkdir(exist_ok=True)
    weights = [] if any(target.glob("*.safetensors")) else weight_files(base, component)
    for file in weights:
        # The fp16 variant becomes the default one, or readers would have to ask for it.
        shutil.copyfile(file, target / file.name.replace(".fp16.", "."))
    for file in source.glob("*.json"):
        if len(weights) > 1 or not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def _write_model_index(base: BaseLocation, folder: Path) -> list[str]:
    """The base's index, copied where it is true of `folder`; parts that are not there become null, and are returned."""
    source = base.path / "model_index.json"
    if base.is_file or not source.is_file():
        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", **_PARTS, "requires_safety_checker": False}
        write_json(folder / source.name, index | dict.fromkeys(_OPTIONAL, [None, None]))
        return []
    index = read_json(source)
    absent = [
        name for name, value in index.items() if isinstance(value, list) and value[0] and not (folder / name).is_dir()
    ]
    if absent:
        write_json(folder / source.name, index | dict.fromkeys(absent, [None, None]))
    else:
        shutil.copyfile(source, folder / source.name)
    return absent
