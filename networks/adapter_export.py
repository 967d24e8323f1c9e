"""Adapters as files for other programs: tensors and metadata in kohya's, diffusers' and PEFT's forms.

Kohya's is the one that A1111, ComfyUI, diffusers and sd-scripts all read. Formats: kohya sd-scripts (networks/lora.py,
library/train_util.py), ModelSpec 1.0.1, diffusers' save_lora_weights, PEFT's save_pretrained.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from networks import AdapterError
from networks.adapter_alphas import DIFFUSERS_CONFIG_KEY, SPEC_KEYS
from networks.adapter_file import BASE_MODEL_KEY
from networks.adapter_module import AdapterModule
from networks.adapters import Adapter
from networks.families import SD15, UNET, Family
from networks.kinds import Kind
from networks.kinds.full import FullModule
from networks.kinds.lora import LoraModule
from networks.names import Target, peft_key
from networks.prediction_names import BY_SCHEDULER, EPSILON_NAME, PredictionName, name_by_metadata
from networks.spec import RUN_KEY, NetworkSpec

Form = Literal["kohya", "diffusers", "peft"]

# What describes the weights of the file it was read from, not of the one to be written.
_OF_THE_WEIGHTS = (
    *("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module", "lora_alpha", "network_alpha"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "format", RUN_KEY, *SPEC_KEYS),
    DIFFUSERS_CONFIG_KEY,
)


# ------------------------------------------------------------------------------------------------ tensors


def adapter_tensors(
    adapter: Adapter, form: Form, dtype: torch.dtype | None = None, *, keep_dora: bool = False
) -> dict[str, Tensor]:
    """The tensors of an adapter file, on the CPU, weights in `dtype` (default: as they are, float32 where folded).

    kohya: per module lora_down.weight [rank, in, ...], lora_up.weight [out, rank, ...] and a 0-dim float32 alpha, SDXL's
    U-Net under its original names; `with_uniform_alphas` is applied, for diffusers reads no others. diffusers:
    `unet.X.lora_A.weight`, the alphas in the metadata. peft: `base_model.model.X.lora_A.weight`, the alphas in the
    `peft_config` beside; that format is of one model, so the adapter must be of the U-Net alone. CP-decomposed
    convolutions become ordinary ones, which every client reads. DoRA is refused with AdapterError but for
    keep_dora, kohya's form alone: it then has a float32 dora_scale, [out, 1, ...] or [1, in, ...].
    """
    adapter = _exportable(adapter, form, keep_dora)
    if form == "kohya":
        names = _kohya_names(adapter)
        return {
            f"{names[target]}.{suffix}": value
            for target, module in adapter.modules.items()
            for suffix, value in _kohya_parts(target, module, dtype).items()
        }
    tensors: dict[str, Tensor] = {}
    for target, module in adapter.lora_modules(f"the {form} form").items():
        prefix = "base_model.model." if form == "peft" else f"{target.component}."
        plain = module.without_mid()
        for part, value in (("down", plain.down), ("up", plain.up)):
            tensors[prefix + peft_key(target, part).removeprefix(f"{target.component}.")] = _on_host(value, dtype)
    return tensors


def _kohya_parts(target: Target, module: AdapterModule, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Suffix of the key -> tensor. Not in `dtype`: alpha, for half precision would round rsLoRA's alpha * sqrt(rank)."""
    parts = {
        suffix: _on_host(value, torch.float32 if suffix in module.in_float32 else dtype)
        for suffix, value in module.tensors().items()
    }
    if isinstance(module, FullModule):
        return {"diff_b" if target == target.bias else "diff": parts["diff"]}
    return {**parts, "alpha": torch.tensor(module.alpha_in_file, dtype=torch.float32)}


def _on_host(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def _kohya_names(adapter: Adapter) -> dict[Target, str]:
    try:
        return adapter.names()
    except KeyError as error:
        raise AdapterError(
            f"{error.args[0]} is no module of {adapter.family.title}, so kohya has no name for it."
        ) from None


def with_uniform_alphas(adapter: Adapter) -> Adapter:
    """The same adapter with one alpha per component for Linear layers and 1x1 convolutions, and one for larger kernels.

    The commonest alpha stays; where another was, `up` takes alpha / commonest over, in float32. Diffusers (0.42) reads
    alphas of single modules under names that match nothing, and lets the commonest of all hold: so where larger kernels
    are the more, there is but one alpha for all. An adapter that is so already comes back as it is, and modules that
    diffusers does not read at all stay.
    """
    lora = {target: module for target, module in adapter.modules.items() if isinstance(module, LoraModule)}
    kinds: dict[tuple[str, bool], list[float]] = {}
    for target, module in lora.items():
        kinds.setdefault((target.component, module.kernel == 1), []).append(module.alpha)
    common = {kind: _commonest(alphas) for kind, alphas in kinds.items()}
    for component, is_linear in kinds:
        if not is_linear and 0 < len(kinds.get((component, True), [])) <= len(kinds[component, False]):
            common[component, True] = common[component, True] or common[component, False]
            common[component, False] = common[component, True]
    changed: dict[Target, LoraModule] = {}
    for target, module in lora.items():
        alpha = common[target.component, module.kernel == 1]
        if module.alpha != alpha:
            changed[target] = replace(module, up=module.up.float() * (module.alpha / alpha), alpha=alpha)
    return replace(adapter, modules={**adapter.modules, **changed}) if changed else adapter


def _commonest(alphas: Iterable[float]) -> float:
    """0 only where there is no other: nothing can be folded into it."""
    counted = Counter(alphas)
    return max((alpha for alpha in counted if alpha), key=lambda alpha: counted[alpha], default=0.0)


def _exportable(adapter: Adapter, form: Form, keep_dora: bool = False) -> Adapter:
    modules = adapter.modules
    dora = [target for target, module in modules.items() if module.kind.algo == "dora"]
    if dora and not (keep_dora and form == "kohya"):
        raise AdapterError(
            f"{len(dora)} of {len(modules)} modules are DoRA (first: {dora[0].path}), which every program computes "
            "differently. Merge it into a base model instead."
        )
    if form == "peft" and (others := sorted({target.component for target in modules} - {UNET})):
        raise AdapterError(
            f"PEFT's format holds an adapter of one model, and this one is of the {' and the '.join(others)} as well. "
            "Write it in kohya's or diffusers' format."
        )
    return with_uniform_alphas(adapter) if form == "kohya" else adapter


# ------------------------------------------------------------------------------------------------ metadata


def adapter_metadata(
    spec: NetworkSpec,
    tensors: Mapping[str, Tensor],
    *,
    output_name: str,
    date: str,
    resolution: tuple[int, int],
    family: Family = SD15,
    base_model: str | None = None,
    prediction_type: str = EPSILON_NAME.scheduler,
    title: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of the kohya file of a training that holds `tensors`; all values are strings, as safetensors wants.

    date: local time, ISO with seconds. resolution: (width, height) trained at. base_model: as the user named it, from
    which merge_lora.py finds the base again. prediction_type: as a scheduler says it. extra: further entries, which win
    over these. Of kinds that not every program reads modelspec.usage_hint says which do.
    """
    metadata = {
        **_identity(
            family, BY_SCHEDULER[prediction_type], output_name=output_name, title=title or output_name, date=date
        ),
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}",
        "ss_network_dropout": str(spec.dropout) if spec.dropout > 0 else "None",
        **_network_facts(spec),
    }
    if base_model is not None:
        metadata["ss_sd_model_name"] = Path(base_model).name
        metadata[BASE_MODEL_KEY] = _without_home(base_model)
    return _with_hashes({**metadata, **(extra or {})}, tensors)


def _network_facts(spec: NetworkSpec) -> dict[str, str]:
    is_uniform = spec.sizes is None
    facts = {
        "ss_network_dim": str(spec.rank) if is_uniform else "Dynamic",
        "ss_network_alpha": str(spec.alpha) if is_uniform else "Dynamic",
        **_kind_facts(spec.kind),
    }
    if arguments := spec.arguments():
        facts["ss_network_args"] = json.dumps(arguments)
    return facts


def _kind_facts(kind: Kind) -> dict[str, str]:
    """What tells readers of an adapter that is no plain LoRA."""
    hint = {"modelspec.usage_hint": kind.readers} if kind.readers else {}
    return {**hint, "ss_network_module": "lycoris.kohya"} if kind.is_lycoris else hint


def form_metadata(
    adapter: Adapter,
    form: Form,
    tensors: Mapping[str, Tensor],
    *,
    output_name: str,
    date: str,
    keep_dora: bool = False,
) -> dict[str, str]:
    """The metadata of the file that holds `tensors`, what `adapter_tensors` made of `adapter` in this form.

    What the adapter's own metadata says of its training and its base stays. Ranks and alphas that differ within a kind of
    layer are "Dynamic", as kohya's resizing writes.
    """
    adapter = _exportable(adapter, form, keep_dora)
    before = {key: value for key, value in adapter.metadata.items() if key not in _OF_THE_WEIGHTS}
    family = adapter.family
    metadata = {
        "modelspec.resolution": family.resolution,  # where nothing is known; kohya's scripts write the same
        **before,
        **_identity(family, name_by_metadata(before), output_name=output_name, title=output_name, date=date),
        **_sizes(adapter.modules.values()),
    }
    for kind in sorted({module.kind for module in adapter.modules.values()}, key=lambda kind: kind.title):
        metadata |= _kind_facts(kind)
    if form == "kohya":
        return _with_hashes(metadata, tensors)
    if form == "diffusers":
        configs = {
            f"{component}.{name}": value
            for component in dict.fromkeys(target.component for target in adapter.modules)
            for name, value in _lora_config(adapter, component).items()
        }
        metadata[DIFFUSERS_CONFIG_KEY] = json.dumps(configs, indent=2, sort_keys=True)
    return {"format": "pt", **metadata}


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json that PEFT wants beside the "peft" form; the file itself is then adapter_model.safetensors."""
    config = _lora_config(_exportable(adapter, "peft"), UNET)
    return {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, **config}


def _lora_config(adapter: Adapter, component: str) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig for one component."""
    lora = adapter.lora_modules("a LoraConfig")
    modules = {target.path: module for target, module in lora.items() if target.component == component}
    # Suffixes of a path do in a LoraConfig; transformers >= 5.6 has no text_model in CLIPTextModel.
    named = {path.removeprefix("text_model."): module for path, module in modules.items()}
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: module.rank for path, module in named.items() if module.rank != rank},
        "alpha_pattern": {path: module.alpha for path, module in named.items() if module.alpha != alpha},
        "target_modules": sorted(named),
    }


def _identity(family: Family, prediction: PredictionName, *, output_name: str, title: str, date: str) -> dict[str, str]:
    """What makes the file known to the programs that list it; A1111 hides a file of the wrong base."""
    ending = prediction.version_ending if family.version_tells_prediction else ""
    return {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": family.base_version + ending,
        "ss_v2": "False",
        "ss_output_name": output_name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/lora",
        # As kohya's scripts say.
        "modelspec.implementation": family.implementation if family.sgm_adapters else "diffusers",
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.prediction_type": prediction.modelspec,
    }


def _sizes(modules: Iterable[AdapterModule]) -> dict[str, str]:
    kinds: dict[bool, list[AdapterModule]] = {True: [], False: []}
    for module in modules:
        if module.rank > 0:
            kinds[module.kernel == 1].append(module)
    linear, conv = ([_one(m.rank for m in kind), _one(m.alpha for m in kind)] for kind in (kinds[True], kinds[False]))
    rank, alpha = linear if kinds[True] else conv
    sizes = {"ss_network_dim": rank, "ss_network_alpha": alpha}
    if kinds[False]:
        sizes["ss_network_args"] = json.dumps({"conv_dim": conv[0], "conv_alpha": conv[1]})
    return sizes


def _one(values: Iterable[float]) -> str:
    found = set(values)
    return str(found.pop()) if len(found) == 1 else "Dynamic"


def _without_home(base_model: str) -> str:
    """A published file should not tell how its author's home folder is called."""
    home = f"{Path.home()}{os.sep}"
    return f"~{os.sep}{base_model.removeprefix(home)}" if base_model.startswith(home) else base_model


def _with_hashes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sshs_model_hash: SHA-256 of the tensors' bytes. sshs_legacy_hash: of 64 KiB at 1 MiB, so with ss_ metadata."""
    whole = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(whole[:8], "little")
    legacy = whole[0x100000 : 0x100000 + 0x10000]
    return {
        **metadata,
        "sshs_model_hash": hashlib.sha256(memoryview(whole)[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }
