"""The alphas of PEFT's and diffusers' adapter files, which keep them elsewhere: in metadata, in a configuration beside the file.

Where nothing says one, alpha is the rank of each module, as ComfyUI and diffusers take it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from networks import AdapterError
from networks.adapter_module import AdapterModule
from networks.names import Target
from networks.spec import NetworkSpec

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

NETWORK_SPEC_KEY = "network_spec"  # metadata of a training state's files: NetworkSpec as JSON
SPEC_KEYS = (NETWORK_SPEC_KEY, "lora_spec")  # the second, with fewer fields: of earlier versions
DIFFUSERS_CONFIG_KEY = "lora_adapter_metadata"  # metadata of diffusers' files: LoraConfigs as flat JSON, "unet.r": 8
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_RUN_CONFIGS = ("config.json", "config.toml", "args.json")
_RANKS = ("network_dim", "lora_rank", "lora_r", "rank", "lora_dim", "r")  # what trainers call it
_OTHERS_CLASS = re.compile(r"For[A-Z]|Transformer\dD")  # LlamaForCausalLM, FluxTransformer2DModel
_PEFT_RANK = 8  # LoraConfig's default


class Alphas:
    """Where the alphas of a file are to be had. modules: those without one of their own."""

    def __init__(
        self, path: Path, metadata: Mapping[str, str], given: float | None, modules: Mapping[Target, AdapterModule]
    ) -> None:
        self._path = path
        self._metadata = metadata
        self._given = given
        self._modules = modules
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        """What the user should know of where `of` took alphas from, a phrase each."""
        return list(self._notes)

    def of(self, target: Target, module: AdapterModule, *, needed: bool = False) -> float:
        """needed: whether to raise AdapterError, not to take the rank, where nothing says the alpha."""
        if self._spec is not None and (size := self._spec.size_of(target, module.kernel)) is not None:
            return size[1]
        config = self._in_metadata.get(target.component, self._in_metadata.get("", {}))
        if config.get("use_dora") and module.kind.algo != "dora":
            raise AdapterError(f"{self._path} says it is a DoRA, but {target.path} has no lora_magnitude_vector.")
        for source in self._sources(config):
            if (value := self._alpha_in(source, target, module)) is not None:
                # rsLoRA scales with alpha / sqrt(rank).
                return value * math.sqrt(module.rank) if source.get("use_rslora") else value
        if needed:
            raise AdapterError(
                f"{self._path} does not say its alpha: neither its metadata nor an {PEFT_CONFIG} or a run's configuration beside "
                "it does. Give the alpha it was trained with (the rank, where nothing was set): to merge_lora.py as "
                '--network_alpha, or in a config.json beside the file, as {"lora_alpha": 8}.'
            )
        self._note(
            "it does not say its alpha: the rank is taken (scale 1), as ComfyUI does; for another write "
            '{"lora_alpha": 4} to config.json beside'
        )
        return float(module.rank)

    def _note(self, sentence: str) -> None:
        self._notes[sentence] = None

    def _sources(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What may say an alpha, the surest first; looked for only when its turn comes."""
        yield config
        if not config:
            yield self._beside
        yield self._said
        if self._given is not None:
            self._note_scales()
            yield {"lora_alpha": self._given}
        yield self._run_config

    def _note_scales(self) -> None:
        ranks = sorted({module.rank for module in self._modules.values()})
        if len(ranks) > 1 and self._given is not None:
            scales = ", ".join(f"{self._given / rank:.3g} at rank {rank}" for rank in ranks)
            self._note(f"alpha {self._given:g}, as given, is that of every module, so its scales differ: {scales}")

    def _alpha_in(self, config: Mapping[str, Any], target: Target, module: AdapterModule) -> float | None:
        patterns = config.get("alpha_pattern") or {}
        try:
            value = _by_pattern(patterns, target)
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
    def _in_metadata(self) -> dict[str, dict[str, Any]]:
        """Component ("" for any) -> LoraConfig, as diffusers writes it into the metadata."""
        if DIFFUSERS_CONFIG_KEY not in self._metadata:
            return {}
        configs: dict[str, dict[str, Any]] = {}
        flat = _json(self._metadata[DIFFUSERS_CONFIG_KEY], f"{DIFFUSERS_CONFIG_KEY} in {self._path}")
        for key, value in flat.items():
            component, _, name = key.rpartition(".")
            configs.setdefault(component, {})[name] = value
        return configs

    @cached_property
    def _beside(self) -> dict[str, Any]:
        """PEFT's LoraConfig that lies beside the file, where it is this file's."""
        file = self._path.with_name(PEFT_CONFIG)
        if not file.is_file():
            return {}
        if self._path.name != PEFT_WEIGHTS and file.with_name(PEFT_WEIGHTS).is_file():
            return self._refused(file, f"it belongs to {PEFT_WEIGHTS}")
        try:
            config = _json(file.read_text(encoding="utf-8-sig", errors="replace"), str(file))
        except AdapterError as error:
            if self._path.name == PEFT_WEIGHTS:
                raise
            return self._refused(file, str(error).removesuffix("."))
        misfit = _misfit(config, self._modules)
        return config if misfit is None else self._refused(file, misfit)

    def _refused(self, file: Path, why: str) -> dict[str, Any]:
        self._note(f"the alpha in {file} is not taken: {why}")
        return {}

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
        ranks = {module.rank for module in self._modules.values()}
        for folder in (self._path.parent, self._path.absolute().parent.parent):
            for name in _RUN_CONFIGS:
                values = _options_in(folder / name)
                alpha = values.get("lora_alpha", values.get("network_alpha"))
                if _number(alpha) is None:
                    continue
                said = next((rank for key in _RANKS if (rank := _number(values.get(key))) is not None), None)
                if said is None or said in ranks:
                    return {**values, "lora_alpha": alpha}
                self._refused(folder / name, f"it is of a run of rank {said:g}, and the file is of {_listed(ranks)}")
        return {}


def _misfit(config: Mapping[str, Any], modules: Mapping[Target, AdapterModule]) -> str | None:
    """Why a LoraConfig is of another adapter; None where kind, ranks and target modules are those of these modules."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        return f"it is of {kind}"
    if config.get("task_type") not in (None, "FEATURE_EXTRACTION"):
        return f"it is of a language model ({config['task_type']})"
    mapped = config.get("auto_mapping")
    trained = str(mapped.get("base_model_class")) if isinstance(mapped, dict) else ""
    if _OTHERS_CLASS.search(trained):
        return f"it is of a {trained}"
    try:
        for target, module in modules.items():
            said = _by_pattern(config.get("rank_pattern") or {}, target)
            rank = config.get("r", _PEFT_RANK) if said is None else said
            if rank != module.rank:
                return f"it is of rank {rank} where the file has {module.rank} ({target.path})"
            if not _is_targeted(config.get("target_modules"), target):
                return f"it is of other modules than {target.path}"
            if config.get("use_dora") and module.kind.algo != "dora":
                return "it is of a DoRA"
    except (re.error, AttributeError, TypeError):
        return "its patterns are no tables of patterns and numbers"
    return None


def _by_pattern(patterns: Mapping[str, Any], target: Target) -> Any:
    return patterns.get(get_pattern_key(list(patterns), target.path))


def _is_targeted(targets: Any, target: Target) -> bool:
    """As PEFT matches them: a pattern for whole paths, or ends of paths. A file that names none, or all, leaves it open."""
    # transformers >= 5.6 has no text_model in CLIPTextModel.
    paths = (target.path, target.path.removeprefix("text_model."))
    if targets in (None, "all-linear"):
        return True
    if isinstance(targets, str):
        return any(re.fullmatch(targets, path) for path in paths)
    return any(path == end or path.endswith(f".{end}") for path in paths for end in targets)


def _listed(ranks: set[int]) -> str:
    return " and ".join(map(str, sorted(ranks)))


def _options_in(path: Path) -> dict[str, Any]:
    """Options in a run's configuration, sections opened; none where it cannot be read, for it may be of something else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
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
