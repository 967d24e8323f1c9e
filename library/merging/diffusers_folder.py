"""What a diffusers folder holds besides the weights that are merged: configurations, tokenizers, the index."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from library.files import read_json, write_json
from library.models import single_file
from library.models.checkpoint import Checkpoint
from library.models.clip_tokenizer import PADS, merges_for, write_tokenizer
from library.models.configs import configs_of
from library.models.locate import BaseLocation
from networks.families import TOKENIZERS
from networks.names import COMPONENTS, UNET, VAE
from networks.prediction_names import FLOW_NAME, flow_scheduler

INDEX = "model_index.json"

# Parts that are folders of their own and carry no weights to merge; the last three may be absent.
_OPTIONAL = ("feature_extractor", "image_encoder", "safety_checker")
_COPIED = ("tokenizer", "tokenizer_2", "scheduler", *_OPTIONAL)


def weights_file(component: str) -> str:
    """Where a component's weights lie in a diffusers folder."""
    name = "diffusion_pytorch_model" if component in (UNET, VAE) else "model"
    return f"{component}/{name}.safetensors"


def copied_bytes(base: BaseLocation) -> int:
    """How much `write_rest` would copy."""
    return 0 if base.is_file else sum(file.stat().st_size for file in _copied_files(base.path))


def write_rest(base: Checkpoint, folder: Path) -> list[str]:
    """Complete a folder that has the weights; returns the parts that the base's index names and the base lacks."""
    if base.location.is_file:
        _write_configurations(base, folder)
    else:
        for file in _copied_files(base.location.path):
            target = folder / file.relative_to(base.location.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if base.prediction is FLOW_NAME and not read_json(scheduler).get("use_flow_sigmas"):
        write_json(scheduler, flow_scheduler(base.flow_shift))  # its own is another model's, or fits no pipeline of SD
    return _write_index(base, folder)


def _copied_files(base: Path) -> Iterator[Path]:
    for component in _COPIED:
        yield from (file for file in (base / component).rglob("*") if file.is_file())
    for component in COMPONENTS:
        # An index names shards, which are one file now.
        yield from (file for file in (base / component).glob("*.json") if not file.name.endswith(".index.json"))


def _write_configurations(base: Checkpoint, folder: Path) -> None:
    """What a single file does not carry, read off its shapes."""
    path, family = base.location.path, base.family
    write_json(folder / UNET / "config.json", single_file.file_unet_config(path, family))
    write_json(folder / VAE / "config.json", single_file.file_vae_config(path, family))
    write_json(folder / "scheduler" / "scheduler_config.json", single_file.file_scheduler_config(path, family))
    for component in family.text_encoders:
        config = single_file.file_text_config(path, family, component)
        write_json(folder / component / "config.json", config)
        merges = merges_for(config["vocab_size"], str(path))
        # vocab.json and merges.txt, which transformers 4 wants too; 5 alone would save one tokenizer.json.
        write_tokenizer(folder / TOKENIZERS[component], merges, PADS[component])


def _write_index(base: Checkpoint, folder: Path) -> list[str]:
    """The base's index, copied where it is true of `folder`; parts that are not there become null, and are returned."""
    source = base.location.path / INDEX
    if base.location.is_file or not source.is_file():
        write_json(folder / INDEX, configs_of(base.family).pipeline | _scheduler_of(folder))
        return []
    index = read_json(source) | (_scheduler_of(folder) if base.prediction is FLOW_NAME else {})
    absent = [
        name for name, value in index.items() if isinstance(value, list) and value[0] and not (folder / name).is_dir()
    ]
    if absent or index != read_json(source):
        write_json(folder / INDEX, index | dict.fromkeys(absent, [None, None]))
    else:
        shutil.copyfile(source, folder / INDEX)
    return absent


def _scheduler_of(folder: Path) -> dict[str, list[str]]:
    """The index's entry for the scheduler that the folder has: diffusers loads what the index names."""
    name = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    return {} if name is None else {"scheduler": ["diffusers", name]}
