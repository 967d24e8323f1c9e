"""A diffusers folder with an adapter folded in: what the adapter does not touch keeps its bytes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from library.errors import RunFailed, UserError
from library.files import read_json, require_space, whole_folder, write_json
from library.merging.merge import Change, merge_adapter, place
from library.models.locate import BaseLocation, weight_files
from library.models.weights import read_tensors
from networks.adapter_file import Adapter
from networks.names import TEXT_ENCODER, UNET, with_text_model

Weights = dict[str, Tensor]

_FILE_NAMES = {UNET: "diffusion_pytorch_model.safetensors", TEXT_ENCODER: "model.safetensors"}
# Parts of a pipeline besides the two that adapters touch. The last three are copied where a folder has them.
_WITH_WEIGHTS = (UNET, "vae", TEXT_ENCODER)
_COPIED = ("vae", "tokenizer", "scheduler", "feature_extractor", "safety_checker", "image_encoder")
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Merged:
    """What became of one component's weights."""

    component: str
    keys_before: int
    keys_after: int
    changes: list[Change]

    @property
    def largest(self) -> Change | None:
        return max(self.changes, key=lambda change: change.relative, default=None)


def check_output(output: Path, sources: list[Path], *, overwrite: bool) -> None:
    """Raise UserError where writing the folder `output` would replace something that is not an earlier merge."""
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists already. Name another --output_dir, or replace it with --overwrite.")
    if not (output / "model_index.json").is_file():
        raise UserError(f"{output} is no diffusers folder, so --overwrite does not replace it. Name another --output_dir.")
    inside = [source for source in sources if source.resolve().is_relative_to(output.resolve())]
    if inside:
        raise UserError(f"{output} holds {inside[0]}, which is to be read. Name another --output_dir.")


def write_merged_folder(
    base: BaseLocation,
    adapter: Adapter,
    output: Path,
    *,
    ratio: float = 1.0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> tuple[list[Merged], list[str]]:
    """Fold `adapter` into `base` and write `output`, a whole folder or none. Returns what was done, and notes to print.

    dtype: of the U-Net, and of a text encoder that the adapter touches; None keeps that of the base. Keys of the text
    encoder carry `text_model.`, without which transformers < 5.6 loads random weights.
    Raises UserError where the adapter does not fit, RunFailed where the result cannot be written.
    """
    weights = {component: _weights_of(base, component) for component in (UNET, TEXT_ENCODER)}
    placed = place(adapter, {c: {key: value.shape for key, value in named.items()} for c, named in weights.items()})
    require_space(output, sum(value.nbytes for named in weights.values() for value in named.values()), "The merged model")
    done = []
    with whole_folder(output, overwrite=overwrite) as folder:
        for component, named in weights.items():
            before = len(named)
            touched = bool(placed[component])
            changes = merge_adapter(named, placed[component], ratio, dtype) if touched or component == UNET else []
            renamed = {_new_name(component, key): value for key, value in named.items()}
            if touched or component == UNET or base.is_file or renamed.keys() != named.keys():
                _save_weights(renamed, folder / component / _FILE_NAMES[component])
                _write_config(base, component, folder / component)
            else:
                _copy_component(base.path, component, folder)
            done.append(Merged(component, before, len(renamed), changes))
        notes = _write_rest(base, folder)
    return done, notes
