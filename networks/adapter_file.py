"""Adapter files of kohya, PEFT and diffusers, and whole checkpoints with adapters in them, read into one form.

Read by safetensors only, nothing is unpickled; of a checkpoint with 3 GB of frozen weights only the adapter is loaded.
Formats: kohya sd-scripts (networks/lora.py, oft.py), LyCORIS, PEFT, diffusers' save_lora_weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from networks import AdapterError
from networks.adapter_module import AdapterModule, data_forms
from networks.adapters import Adapter
from networks.kinds import KINDS
from networks.names import Target, is_wrapped, parse_kohya_name, split_peft_key, split_wrapped_key
from networks.spec import NetworkSpec

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

NETWORK_SPEC_KEY = "network_spec"  # metadata of a training state's files: NetworkSpec as JSON
SPEC_KEYS = (NETWORK_SPEC_KEY, "lora_spec")  # the second, with fewer fields: of earlier versions
BASE_MODEL_KEY = "repa_base_model"  # metadata of an adapter file: the base as its user named it
DIFFUSERS_CONFIG_KEY = "lora_adapter_metadata"  # metadata of diffusers' files: LoraConfigs as flat JSON, "unet.r": 8

_FORMS = data_forms()
_KOHYA_PARTS = {suffix: part for form in _FORMS for suffix, part in form.parts.items()} | {"alpha": "alpha"}
_KOHYA_PREFIX = re.compile("|".join(sorted({prefix for form in _FORMS for prefix in form.prefixes})))
_OTHER_KINDS = {
    **{kind.other_form: f"{kind.title} in another form than kohya's" for kind in KINDS.values() if kind.other_form},
    r"\.boft_": "BOFT",
    r"\.ia3_|\.on_input$": "IA3",
    r"\.vera_": "VeRA",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.lora_embedding_[AB]": "LoRA on embeddings",
    r"\.lora_\w+(\.\w+)?\.bias$": "LoRA with biases (lora_bias)",
    r"\.diff(_b)?$|\.modules_to_save\.": "a set of layers trained whole",
    r"^bundle_emb\.|^emb_params$|string_to_param": "textual inversion",
    r"^lora_controlnet": "Control-LoRA",
}
_OTHER_MODELS = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks": "SD3",
    r"^transformer\.|^lora_transformer_|^(base_model\.model\.)?transformer_blocks\.": "Flux or SD3",
}
_RUN_CONFIGS = ("config.json", "config.toml", "args.json")


def read_adapter(path: Path | str, *, alpha: float | None = None) -> Adapter:
    """Read a safetensors file of a kohya, PEFT or diffusers LoRA, DoRA or LoCon, or of a whole model wrapped by PEFT.

    In kohya's form every kind of networks.kinds. Kohya files without alpha mean alpha = rank. PEFT files carry no alpha: it
    comes from their metadata (`network_spec`, `lora_spec`, diffusers' `lora_adapter_metadata`, `ss_network_alpha`), from an
    adapter_config.json beside them, else from `alpha`, else from the run's config.json, config.toml or args.json in their
    folder or the one above. Raises AdapterError for other files and other kinds of adapters, missing halves, missing alphas,
    shapes that cannot be, values not finite.
    """
    path = Path(path)
    with _opened(path) as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
        found = _sort_keys(path, keys)
        if found.foreign or not found.modules:
            raise AdapterError(_not_lora(path, found.foreign, len(keys)))
        for entry in found.modules.values():
            if missing := [part for part in entry.form.needed if part not in entry.keys]:
                raise AdapterError(
                    f"{path} has no {' and no '.join(missing)} weight for {entry.name}: it is incomplete."
                )
        alphas = _Alphas(path, metadata, alpha)
        modules = {}
        for target, entry in found.modules.items():
            # Copied out of the file's memory map: tensors lie there on odd addresses, and kernels for those round otherwise.
            tensors = {part: file.get_tensor(key).clone() for part, key in entry.keys.items()}
            modules[target] = _module(path, target, entry, tensors, alphas)
    spelled = tuple(entry.name for entry in found.modules.values())
    return Adapter(modules, metadata, tuple(found.left_out), tuple(found.frozen), spelled=spelled)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is not a .safetensors file; adapters in other formats can run code and are not read."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}.") from error


# ------------------------------------------------------------------------------------------------ what the keys mean


@dataclass
class _Entry:
    """One module's keys as they stand in a file."""

    name: str
    is_kohya: bool
    keys: dict[str, str] = field(default_factory=dict)
    """Part ("alpha", or one of a form's) -> key."""

    @property
    def form(self) -> type[AdapterModule]:
        """That of which most parts are here."""
        return max(_FORMS, key=lambda form: sum(part in self.keys for part in form.parts.values()))


@dataclass
class _Found:
    modules: dict[Target, _Entry] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def _sort_keys(path: Path, keys: list[str]) -> _Found:
    found = _Found()
    wrapped = is_wrapped(keys)
    for key in keys:
        if (place := _place(key)) is not None:
            target, part, name, is_kohya = place
            entry = found.modules.setdefault(target, _Entry(name, is_kohya))
            if part in entry.keys:
                raise AdapterError(f"{path} has two adapters on one module: {entry.keys[part]} and {key}.")
            entry.keys[part] = key
        elif key.startswith("align_heads.") or (wrapped and key.endswith("embeddings.position_ids")):
            found.left_out.append(key)
        elif wrapped and not _kinds([key]) and split_wrapped_key(key) is not None:
            found.frozen.append(key)
        else:
            found.foreign.append(key)
    return found


def _place(key: str) -> tuple[Target, str, str, bool] | None:
    """(module, part, the module's name in this file, whether it is kohya's) of an adapter's tensor, else None."""
    name, _, suffix = key.partition(".")
    if _KOHYA_PREFIX.match(name) and suffix in _KOHYA_PARTS:
        target = parse_kohya_name(_KOHYA_PREFIX.sub("lora_", name, count=1))
        return None if target is None else (target, _KOHYA_PARTS[suffix], name, True)
    # A training state's magnitude has kohya's name and shape; PEFT's is another part.
    split = split_peft_key(re.sub(r"\.dora_scale$", ".lora_magnitude_vector", key))
    if split is None:
        return None
    is_pefts = split.part == "magnitude" and not key.endswith(".dora_scale")
    name = re.split(r"\.lora[_.]|\.dora_scale$", key)[0]
    return split.target, "vector" if is_pefts else split.part, name, False


def _kinds(keys: Iterable[str]) -> list[str]:
    joined = "\n".join(keys)
    return sorted(kind for mark, kind in _OTHER_KINDS.items() if re.search(mark, joined, re.MULTILINE))


def _not_lora(path: Path, foreign: list[str], count: int) -> str:
    if not foreign:
        return f"{path} has no LoRA weights in it."
    joined = "\n".join(foreign)
    models = [model for mark, model in _OTHER_MODELS.items() if re.search(mark, joined, re.MULTILINE)]
    if kinds := _kinds(foreign):
        guess = f"It is {' and '.join(kinds)}, which is not supported."
    elif models:
        guess = f"It looks like a LoRA for {models[0]}; only those for SD1.5 and SDXL are supported."
    elif "model.diffusion_model." in joined:
        guess = "It looks like a whole model."
    else:
        guess = "It is probably not a LoRA file."
    return f"{len(foreign)} of {count} keys in {path} are not of a LoRA (first: {', '.join(foreign[:3])}). {guess}"


# ------------------------------------------------------------------------------------------------ one module


def _module(path: Path, target: Target, entry: _Entry, tensors: dict[str, Tensor], alphas: _Alphas) -> AdapterModule:
    for part, value in tensors.items():
        # diffusers' converter writes alphas as integers.
        if not value.is_floating_point() and part != "alpha":
            raise AdapterError(f"{path}: {entry.keys[part]} holds {value.dtype}, not floating-point numbers.")
        if not torch.isfinite(value.float()).all():
            raise AdapterError(
                f"{path}: {part} of {entry.name} has values that are not finite; the training has diverged."
            )
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        raise AdapterError(
            f"{path}: alpha of {entry.name} has the shape {list(tensors['alpha'].shape)}, not one value."
        )
    parts = dict(tensors)
    alpha = float(parts.pop("alpha")) if "alpha" in parts else None
    try:
        module = entry.form.read(entry.name, parts, alpha)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    if parts:
        left = " and ".join(parts)
        raise AdapterError(f"{path}: {entry.name} has {left} beside {module.kind.title}, which do not go together.")
    if entry.is_kohya or alpha is not None:
        return module
    return replace(module, alpha=alphas.of(target, module))  # type: ignore[type-var]  # each kind is a dataclass


# ------------------------------------------------------------------------------------------------ alphas


class _Alphas:
    """Where the alphas of a PEFT or diffusers file are to be had."""

    def __init__(self, path: Path, metadata: Mapping[str, str], given: float | None) -> None:
        self._path = path
        self._metadata = metadata
        self._given = given

    def of(self, target: Target, module: AdapterModule) -> float:
        if self._spec is not None and (size := self._spec.size_of(target, module.kernel)) is not None:
            return size[1]
        config = self._configs.get(target.component, self._configs.get("", {}))
        if config.get("use_dora") and module.kind.algo != "dora":
            raise AdapterError(f"{self._path} says it is a DoRA, but {target.path} has no lora_magnitude_vector.")
        for source in self._sources(config):
            if (value := self._alpha_in(source, target, module)) is not None:
                # rsLoRA scales with alpha / sqrt(rank).
                return value * math.sqrt(module.rank) if source.get("use_rslora") else value
        raise AdapterError(
            f"{self._path} does not say its alpha: neither its metadata nor an adapter_config.json or a run's "
            "configuration beside it does. Give the alpha it was trained with as --network_alpha (the rank, where "
            "nothing was set)."
        )

    def _sources(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What may say an alpha, the surest first; looked for only when its turn comes."""
        yield config
        yield self._said
        yield {"lora_alpha": self._given}
        yield self._run_config

    def _alpha_in(self, config: Mapping[str, Any], target: Target, module: AdapterModule) -> float | None:
        patterns = config.get("alpha_pattern") or {}
        try:
            value = patterns.get(get_pattern_key(list(patterns), target.path))
        except (re.error, AttributeError, TypeError):
            raise AdapterError(f"alpha_pattern of {self._path} is not a table of patterns and numbers.") from None
        if value is None and module.kernel > 1:
            value = config.get("conv_alpha")
        return _number(config.get("lora_alpha") if value is None else value)

    @cached_property
    def _spec(self) -> NetworkSpec | None:
        text = next((self._metadata[key] for key in SPEC_KEYS if key in self._metadata), None)
        return None if text is None else NetworkSpec.from_json(text)

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        """Component ("" for any) -> LoraConfig, as diffusers writes it into the metadata or PEFT into a file beside."""
        if DIFFUSERS_CONFIG_KEY in self._metadata:
            flat = _json(self._metadata[DIFFUSERS_CONFIG_KEY], f"{DIFFUSERS_CONFIG_KEY} in {self._path}")
            configs: dict[str, dict[str, Any]] = {}
            for key, value in flat.items():
                component, _, name = key.rpartition(".")
                configs.setdefault(component, {})[name] = value
            return configs
        beside = self._path.with_name("adapter_config.json")
        return (
            {"": _json(beside.read_text(encoding="utf-8", errors="replace"), str(beside))} if beside.is_file() else {}
        )

    @cached_property
    def _said(self) -> dict[str, Any]:
        """What other trainers' metadata says."""
        names = ("lora_alpha", "network_alpha", "ss_network_alpha")
        alpha = next((self._metadata[name] for name in names if _number(self._metadata.get(name)) is not None), None)
        arguments = self._metadata.get("ss_network_args")
        conv_alpha = (
            None if arguments is None else _json(arguments, f"ss_network_args in {self._path}").get("conv_alpha")
        )
        return {"lora_alpha": alpha, "conv_alpha": conv_alpha}

    @cached_property
    def _run_config(self) -> dict[str, Any]:
        """The options of the run that wrote the file, sections and all, where a file of it has an alpha."""
        for folder in (self._path.parent, self._path.absolute().parent.parent):
            for name in _RUN_CONFIGS:
                values = _options_in(folder / name)
                alpha = values.get("lora_alpha", values.get("network_alpha"))
                if _number(alpha) is not None:
                    return {**values, "lora_alpha": alpha}
        return {}


def _options_in(path: Path) -> dict[str, Any]:
    """Options in a run's configuration, sections opened; none where it cannot be read, for it may be of something else."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for section in values.values():
        flat |= section if isinstance(section, dict) else {}
    return flat


def _number(value: Any) -> float | None:
    """A finite number, as such or in a string; None for everything else ("None", "Dynamic", true)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is a JSON {type(value).__name__}, not an object.")
    return value
