"""Adapter files of kohya, LyCORIS, PEFT, diffusers, ComfyUI, OneTrainer and SimpleTuner, and whole checkpoints with adapters in
them, read into one form.

Read by safetensors only, nothing is unpickled; of a checkpoint with 3 GB of frozen weights only the adapter is loaded.
Formats: kohya sd-scripts (networks/lora.py, oft.py), LyCORIS, PEFT, diffusers' save_lora_weights, ComfyUI's LoraSave.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from networks import AdapterError
from networks.adapter_alphas import Alphas
from networks.adapter_module import AdapterModule, data_forms
from networks.adapters import Adapter
from networks.finite import all_finite
from networks.foreign_files import adapter_kinds, file_kind
from networks.kinds.full import OF_BIASES
from networks.names import Target, is_wrapped, parse_module_name, split_peft_key, split_wrapped_key

BASE_MODEL_KEY = "repa_base_model"  # metadata of an adapter file: the base as its user named it

_FORMS = data_forms()
_PARTS = {suffix: part for form in _FORMS for suffix, part in form.parts.items()} | {"alpha": "alpha"}
_ENDING = re.compile(
    rf"(?P<name>.+?)\.(?P<suffix>{'|'.join(map(re.escape, sorted(_PARTS, key=len, reverse=True)))})", re.IGNORECASE
)
_LORA_ENDINGS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha")
_OF_IA3 = ("weight", "on_input")  # endings that are any layer's after other names
_NOT_FLOATS = ("alpha", "on_input")
_EMBEDDING = re.compile(r"bundle_emb\.(?P<word>.+?)\.(clip_\w+|string_to_\w+.*|emb_params|[^.]+)")
_UNUSED_PROJECTION = re.compile(r"((text_encoders\.)?clip_l\.(transformer\.)?|lora_te1?_)text_projection\.")


def read_adapter(path: Path | str, *, alpha: float | None = None) -> Adapter:
    """Read a safetensors file of adapters in any program's names, or of a whole model wrapped by PEFT.

    Every kind of networks.kinds; of PEFT's own forms LoRA and DoRA. Kohya files without alpha mean alpha = rank. PEFT files carry
    no alpha: it comes from their metadata (`network_spec`, `lora_spec`, diffusers' `lora_adapter_metadata`, `ss_network_alpha`),
    from an adapter_config.json beside them that fits, else from `alpha`, else from the run's config.json, config.toml or
    args.json in their folder or the one above, else it is the rank too; of a whole model it must be said. What is left out,
    and an alpha that nothing says, is in the adapter's notes. Raises AdapterError for other files and other kinds of adapters,
    missing halves, shapes that cannot be, values not finite.
    """
    path = Path(path)
    with _opened(path) as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
        found = _sort_keys(path, keys)
        if found.foreign or not found.modules:
            raise AdapterError(_not_lora(path, found, len(keys)))
        for entry in found.modules.values():
            if missing := [part for part in entry.form.needed if part not in entry.keys]:
                raise AdapterError(
                    f"{path} has no {' and no '.join(missing)} weight for {entry.name}: it is incomplete."
                )
        modules = {}
        for target, entry in found.modules.items():
            # Copied out of the file's memory map: tensors lie there on odd addresses, and kernels for those round otherwise.
            tensors = {part: file.get_tensor(key).clone() for part, key in entry.keys.items()}
            modules[target] = _module(path, entry, tensors)
    without = {t: modules[t] for t, entry in found.modules.items() if entry.is_pefts and "alpha" not in entry.keys}
    alphas = Alphas(path, metadata, alpha, without)
    for target, module in without.items():
        own = alphas.of(target, module, needed=bool(found.frozen))
        modules[target] = replace(module, alpha=own)  # type: ignore[type-var]  # each kind is a dataclass
    notes, spelled = (*found.notes, *alphas.notes), tuple(entry.name for entry in found.modules.values())
    return Adapter(modules, metadata, tuple(found.left_out), tuple(found.frozen), notes=notes, spelled=spelled)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix.lower() != ".safetensors":
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
    is_pefts: bool = False
    """Whether it is written as PEFT and diffusers do, who keep alphas elsewhere."""
    keys: dict[str, str] = field(default_factory=dict)
    """Part ("alpha", or one of a form's) -> key."""

    @property
    def form(self) -> type[AdapterModule]:
        """That of which most parts are here."""
        return max(_FORMS, key=lambda form: sum(part in self.keys for part in dict.fromkeys(form.parts.values())))


@dataclass
class _Found:
    modules: dict[Target, _Entry] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Key -> what it is of; "" for a buffer that nobody misses."""

    @property
    def notes(self) -> list[str]:
        counts = Counter(reason for reason in self.left_out.values() if reason)
        return [f"left out: {n} {'tensor' if n == 1 else 'tensors'} of {reason}" for reason, n in counts.items()]


def _sort_keys(path: Path, keys: list[str]) -> _Found:
    found = _Found()
    wrapped = is_wrapped(keys)
    for key in keys:
        if (place := _place(key)) is not None:
            target, part, name, is_pefts = place
            entry = found.modules.setdefault(target, _Entry(name))
            if part in entry.keys:
                raise AdapterError(f"{path} has two adapters on one module: {entry.keys[part]} and {key}.")
            entry.keys[part] = key
            entry.is_pefts |= is_pefts
        elif (reason := _left_out(key, wrapped)) is not None:
            found.left_out[key] = reason
        elif wrapped and not adapter_kinds([key]) and split_wrapped_key(key) is not None:
            found.frozen.append(key)
        else:
            found.foreign.append(key)
    for target in [target for target, entry in found.modules.items() if entry.keys.keys() == {"alpha"}]:
        found.left_out[found.modules.pop(target).keys["alpha"]] = "modules that it has no other weights of"
    return found


def _place(key: str) -> tuple[Target, str, str, bool] | None:
    """(what it changes, part, the module's name in this file, whether it is written as PEFT does) of an adapter's tensor, else
    None."""
    if (split := split_peft_key(key)) is not None:
        name = re.split(r"(\.processor)?\.(to_\w+_)?lora[_.]", key, flags=re.IGNORECASE)[0]
        # PEFT's magnitude is another part than kohya's and LyCORIS'.
        return split.target, "vector" if split.part == "magnitude" else split.part, name, True
    match = _ENDING.fullmatch(key)
    if match is None:
        return None
    name, suffix = match["name"], match["suffix"].lower()
    is_pefts_form = suffix not in _LORA_ENDINGS and "base_model.model." in name
    if is_pefts_form or (suffix in _OF_IA3 and not name.startswith(("lora_", "lycoris_"))):
        return None
    target = parse_module_name(name)
    if target is not None and suffix in OF_BIASES:
        target = target.bias
    return None if target is None else (target, _PARTS[suffix], name, False)


def _left_out(key: str, wrapped: bool) -> str | None:
    """What a tensor is of that is no part of an adapter, and may stand beside one; None for any other."""
    if match := _EMBEDDING.fullmatch(key):
        return f"the textual inversion embedding {match['word']}, which is not read"
    if key.startswith("align_heads."):
        return "AlignHeads, which only training needs"
    if _UNUSED_PROJECTION.match(key):
        return "the first text encoder's text_projection, which Stable Diffusion does not use"
    return "" if wrapped and key.endswith("embeddings.position_ids") else None


def _not_lora(path: Path, found: _Found, count: int) -> str:
    foreign = found.foreign or list(found.left_out)
    if not foreign:
        return f"{path} has no LoRA weights in it."
    if not found.modules and not found.foreign and any("alpha" in key for key in foreign):
        return f"{path} has alphas in it, and no LoRA weights."
    is_of = "are" if len(foreign) != 1 else "is"
    kind = file_kind(foreign, of_the_rest=bool(found.modules))
    return f"{len(foreign)} of {count} keys in {path} {is_of} not of a LoRA (first: {', '.join(foreign[:3])}). {kind}"


# ------------------------------------------------------------------------------------------------ one module


def _module(path: Path, entry: _Entry, tensors: dict[str, Tensor]) -> AdapterModule:
    for part, value in tensors.items():
        # diffusers' converter writes alphas as integers.
        if not value.is_floating_point() and part not in _NOT_FLOATS:
            raise AdapterError(f"{path}: {entry.keys[part]} holds {value.dtype}, not floating-point numbers.")
        if not all_finite(value):
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
    return module
