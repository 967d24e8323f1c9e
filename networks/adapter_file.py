"""LoRA files: kohya's format in and out, PEFT's and diffusers' in. Read by safetensors only, nothing is unpickled.

Format: kohya sd-scripts (networks/lora.py, library/train_util.py) and ModelSpec 1.0.1; the one LoRA format that A1111,
ComfyUI, diffusers and sd-scripts all read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from networks import AdapterError
from networks.lora import LoraSpec, rank_and_alpha
from networks.names import KOHYA_PREFIXES, canonical_kohya_name, kohya_name, split_peft_key

SPEC_KEY = "lora_spec"  # metadata of a training state's files: LoraSpec as JSON
BASE_MODEL_KEY = "repa_base_model"  # metadata of an adapter file: the base as its user named it

_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid.weight": "CP-decomposed LoCon",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
}


@dataclass(frozen=True)
class LoraModule:
    """One module's adapter: W' = W + ratio * alpha / rank * up @ down."""

    down: Tensor
    """[rank, in] or [rank, in, kh, kw]"""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]"""
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def kernel(self) -> int:
        return self.down.shape[-1] if self.down.ndim == 4 else 1


@dataclass(frozen=True)
class Adapter:
    """An adapter file in one form, whichever it came in."""

    modules: dict[str, LoraModule]
    """Kohya's module name -> its adapter; `lora_te_` is the first text encoder. `names.kohya_table` gives the paths."""
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Keys that are no part of the adapter (AlignHeads in a training state)."""


def to_kohya(
    params: Mapping[str, Tensor],
    spec: LoraSpec,
    *,
    prefix: str = KOHYA_PREFIXES["unet"],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of a kohya file from adapter weights under the names of `add_lora`.

    Per module lora_down.weight [rank, in, ...], lora_up.weight [out, rank, ...] and a 0-dim alpha, on the CPU, all in
    `dtype` (default: as they are).
    """
    tensors: dict[str, Tensor] = {}
    for key, value in params.items():
        split = split_peft_key(key)
        if split is None:
            raise AdapterError(f"{key} is not the name of a LoRA weight, so it has no place in an adapter file.")
        _, path, part = split
        name = kohya_name(path, prefix)
        tensors[f"{name}.lora_{part}.weight"] = weight = value.detach().to("cpu", dtype, copy=True).contiguous()
        if part == "down":
            _, alpha = rank_and_alpha(spec, kernel=weight.shape[-1] if weight.ndim == 4 else 1)
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=weight.dtype)
    return tensors


def adapter_metadata(
    spec: LoraSpec,
    tensors: Mapping[str, Tensor],
    *,
    output_name: str,
    date: str,
    resolution: tuple[int, int],
    base_model: str | None = None,
    base_model_version: str = "sd_v1",
    prediction_type: str = "epsilon",
    title: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of the kohya file that holds `tensors`; all values are strings, as safetensors wants.

    date: local time, ISO with seconds. resolution: (width, height) trained at. base_model: as the user named it, from
    which merge_lora.py finds the base again. extra: further entries, which win over these.
    """
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": str(spec.alpha),
        "ss_network_dropout": str(spec.dropout) if spec.dropout > 0 else "None",
        "ss_base_model_version": base_model_version,
        "ss_output_name": output_name,
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title or output_name,
        "modelspec.date": date,
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}",
        "modelspec.prediction_type": prediction_type,
        SPEC_KEY: spec.to_json(),
    }
    if spec.conv_rank is not None:
        conv_rank, conv_alpha = rank_and_alpha(spec, kernel=3)
        metadata["ss_network_args"] = json.dumps({"conv_dim": str(conv_rank), "conv_alpha": str(conv_alpha)})
    if base_model is not None:
        metadata["ss_sd_model_name"] = Path(base_model).name
        metadata[BASE_MODEL_KEY] = _without_home(base_model)
    metadata |= extra or {}
    model_hash, legacy_hash = _kohya_hashes(tensors, metadata)
    return {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}


def _without_home(base_model: str) -> str:
    """A published file should not tell how its author's home folder is called."""
    home = f"{Path.home()}{os.sep}"
    return f"~{os.sep}{base_model.removeprefix(home)}" if base_model.startswith(home) else base_model


def _kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """sshs_model_hash: SHA-256 of the tensors' bytes. sshs_legacy_hash: of 64 KiB at 1 MiB, so with ss_ metadata."""
    whole = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(whole[:8], "little")
    legacy = whole[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(memoryview(whole)[start:]).hexdigest(), hashlib.sha256(legacy).hexdigest()[:8]


def read_adapter(path: Path | str, *, alpha: float | None = None) -> Adapter:
    """Read a kohya, PEFT or diffusers LoRA file of safetensors.

    Kohya files without alpha mean alpha = rank. PEFT files carry no alpha: it comes from their metadata (`lora_spec`,
    or diffusers' `lora_adapter_metadata`), from an adapter_config.json beside them, or else from the argument.
    Raises AdapterError for other files and other kinds of adapters, missing halves, missing alphas, values not finite.
    """
    path = Path(path)
    tensors, metadata = _read_file(path)
    left_out = tuple(key for key in tensors if key.startswith("align_heads."))
    parts, foreign = _sort_parts({key: value for key, value in tensors.items() if key not in left_out})
    if foreign or not parts:
        raise AdapterError(_not_lora(path, foreign, len(tensors)))
    alpha_of = _alpha_source(path, metadata, alpha)
    modules = {module.name: _whole(module, path, alpha_of) for module in parts.values()}
    return Adapter(modules, metadata, left_out)


@dataclass
class _Parts:
    """The tensors of one module as they are found in a file."""

    name: str
    component: str | None = None
    """None in a kohya file."""
    path: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is not a .safetensors file; adapters in other formats can run code and are not read."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}.") from error


def _sort_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Parts], list[str]]:
    """Tensors gathered by module, and the keys that are of no LoRA."""
    parts: dict[str, _Parts] = {}
    foreign = []
    for key, value in tensors.items():
        name, _, suffix = key.partition(".")
        if name.startswith("lora_") and suffix in _KOHYA_PARTS:
            name = canonical_kohya_name(name)
            parts.setdefault(name, _Parts(name)).tensors[_KOHYA_PARTS[suffix]] = value
        elif (split := split_peft_key(key)) is not None:
            component, path, part = split
            name = kohya_name(path, KOHYA_PREFIXES[component])
            parts.setdefault(name, _Parts(name, component, path)).tensors[part] = value
        else:
            foreign.append(key)
    return parts, foreign


def _whole(parts: _Parts, path: Path, alpha_of: Callable[[_Parts, LoraModule], float]) -> LoraModule:
    if missing := {"down", "up"} - parts.tensors.keys():
        raise AdapterError(
            f"{path} has no {' and no '.join(sorted(missing))} weight for {parts.name}: it is incomplete."
        )
    down, up = parts.tensors["down"], parts.tensors["up"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0]:
        raise AdapterError(
            f"{path}: {parts.name} has down {list(down.shape)} and up {list(up.shape)}, whose ranks differ."
        )
    for part, value in parts.tensors.items():
        if not torch.isfinite(value).all():
            raise AdapterError(
                f"{path}: {part} of {parts.name} has values that are not finite; the training has diverged."
            )
    module = LoraModule(down, up, alpha=float(down.shape[0]))
    if "alpha" in parts.tensors:
        return LoraModule(down, up, alpha=float(parts.tensors["alpha"]))
    return module if parts.component is None else LoraModule(down, up, alpha_of(parts, module))


def _alpha_source(
    path: Path, metadata: Mapping[str, str], given: float | None
) -> Callable[[_Parts, LoraModule], float]:
    """Where the alphas of a PEFT file are to be had."""
    if SPEC_KEY in metadata:
        spec = LoraSpec.from_json(metadata[SPEC_KEY])
        return lambda parts, module: rank_and_alpha(spec, kernel=module.kernel)[1]
    configs = _peft_configs(path, metadata)

    def alpha_of(parts: _Parts, module: LoraModule) -> float:
        config = configs.get(parts.component or "", configs.get("", {}))
        if config.get("use_dora"):
            raise AdapterError(f"{path} is a DoRA, which is not supported. Merge it with the tool that made it.")
        patterns = config.get("alpha_pattern") or {}
        found = patterns.get(get_pattern_key(list(patterns), parts.path), config.get("lora_alpha"))
        value = given if found is None else found
        if value is None:
            raise AdapterError(
                f"{path} does not say its alpha: neither its metadata nor an adapter_config.json beside it does. "
                "Give the alpha it was trained with as --network_alpha (the rank, where nothing was set)."
            )
        # rsLoRA scales with alpha / sqrt(rank).
        return value * math.sqrt(module.rank) if config.get("use_rslora") else float(value)

    return alpha_of


def _peft_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Component ("" for any) -> LoraConfig, as diffusers writes it into the metadata or PEFT into a file beside."""
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        flat = _json(metadata["lora_adapter_metadata"], f"lora_adapter_metadata in {path}")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
        return configs
    return {"": _json(beside.read_text(encoding="utf-8"), str(beside))} if beside.is_file() else {}


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is a JSON {type(value).__name__}, not an object.")
    return value


def _not_lora(path: Path, foreign: list[str], count: int) -> str:
    if not foreign:
        return f"{path} has no LoRA weights in it."
    kinds = sorted({kind for mark, kind in _OTHER_KINDS.items() if any(mark in key for key in foreign)})
    guess = f"It is a {' or '.join(kinds)}, which is not supported." if kinds else "It is probably not a LoRA file."
    return f"{len(foreign)} of {count} keys in {path} are not of a LoRA (first: {', '.join(foreign[:3])}). {guess}"
