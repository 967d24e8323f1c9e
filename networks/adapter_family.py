"""Which family's models an adapter is for, by every sign that its file has: modules, sizes, metadata, spelling of names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from networks.families import FAMILIES, SD15, SDXL, UNET, Family

Module = tuple[str, str]
"""A component and the path of a module in it, as `networks.names.Target` has it."""
Shapes = Mapping[Module, tuple[int, ...]]
"""Module -> shape of its weight, as far as it is known."""


class Sign(NamedTuple):
    says: Family | str
    """The family, or what another model is called."""
    because: str
    """For a message, after "it looks like SDXL"."""
    is_spelling: bool = False
    """Whether only a name is spelled so, which counts where nothing else tells: some programs write others' names."""

    @property
    def title(self) -> str:
        return self.says.title if isinstance(self.says, Family) else self.says


_BLOCK = re.compile(r"(?P<section>down_blocks|up_blocks|mid_block)(?:\.(?P<level>\d+))?\.(?P<kind>[a-z]+)")
_DEPTH = re.compile(r"\.transformer_blocks\.(\d+)\.")
_TEXT_INPUTS = (".attn2.to_k", ".attn2.to_v")
# Layers with as many outputs as the block has channels.
_AS_WIDE = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.2", ".conv1", ".conv2", ".conv", ".time_emb_proj")
_SD2, _SD2_TEXT_WIDTH = "Stable Diffusion 2", 1024

# What ss_base_model_version and modelspec.architecture begin with.
_VERSIONS: tuple[tuple[str, Family | str], ...] = (
    ("sdxl", SDXL),
    ("sd_xl", SDXL),
    ("stable-diffusion-xl", SDXL),
    ("sd_v1", SD15),
    ("sd_1", SD15),
    ("sd1", SD15),
    ("stable-diffusion-v1", SD15),
    ("sd_v2", _SD2),
    ("sd_2", _SD2),
    ("stable-diffusion-v2", _SD2),
    ("sd3", "Stable Diffusion 3"),
    ("stable-diffusion-3", "Stable Diffusion 3"),
    ("flux", "Flux"),
)
_SPELLINGS: tuple[tuple[str, Family], ...] = (
    (r"(?:lora|oft|lycoris)_unet_(?:input_blocks|middle_block|output_blocks)_", SDXL),
    (r"lora_te[12]_", SDXL),
    (r"lora_te_", SD15),
)


def family_signs(shapes: Shapes, metadata: Mapping[str, str], spelled: Iterable[str] = ()) -> list[Sign]:
    """Every sign, one of a kind for each family. spelled: the modules' names as they stand in the file."""
    signs = [*_of_modules(shapes), *_of_metadata(metadata), *_of_spelling(spelled)]
    return list({(sign.title, sign.is_spelling): sign for sign in reversed(signs)}.values())[::-1]


def known_family(signs: Iterable[Sign]) -> Family | None:
    """What the signs agree on; None where there are none, where they contradict each other, and for other models."""
    found = list(signs)
    sure = [sign.says for sign in found if not sign.is_spelling] or [sign.says for sign in found]
    agreed = sure[0] if sure and all(says == sure[0] for says in sure) else None
    return agreed if isinstance(agreed, Family) else None


def likely_family(signs: Iterable[Sign]) -> Family:
    """What the signs agree on; where they contradict each other SDXL, whose names are the rarer; SD1.5 where there is none."""
    found = list(signs)
    said = [sign.says for sign in found if not sign.is_spelling]
    return known_family(found) or (SDXL if SDXL in said else SD15)


def _of_modules(shapes: Shapes) -> Iterator[Sign]:
    for (component, path), shape in shapes.items():
        homes = [family for family in FAMILIES.values() if _has(family, component, path)]
        if len(homes) == 1:
            yield Sign(homes[0], f"only that has {component}.{path}")
        if component == UNET:
            yield from _of_sizes(path, shape, homes)


def _of_sizes(path: str, shape: tuple[int, ...], homes: list[Family]) -> Iterator[Sign]:
    if path.endswith(_TEXT_INPUTS) and len(shape) > 1:
        because = f"its cross attention takes {shape[1]} numbers"
        yield from (Sign(family, because) for family in FAMILIES.values() if family.text_width == shape[1])
        if shape[1] == _SD2_TEXT_WIDTH:
            yield Sign(_SD2, because)
    elif path.endswith(_AS_WIDE) and shape:
        fitting = [family for family in homes if _width(family, path) == shape[0]]
        if len(fitting) == 1:
            yield Sign(fitting[0], f"{path} has {shape[0]} outputs")


def _has(family: Family, component: str, path: str) -> bool:
    """Whether the family's models have a module, as far as levels and depths tell."""
    if component != UNET:
        return component in family.original
    if path.startswith("add_embedding."):
        return family.has_size_conditions
    if (match := _BLOCK.match(path)) is None:
        return True
    if (depth := _DEPTH.search(path)) is not None and int(depth[1]) >= family.transformers_in_a_row:
        return False
    if match["level"] is None or match["section"] == "mid_block":
        return True
    level, levels = int(match["level"]), len(family.up_attention)
    if level >= levels or (match["kind"].endswith("samplers") and level == levels - 1):
        return False
    attention = family.up_attention if match["section"] == "up_blocks" else family.up_attention[::-1]
    return attention[level] or match["kind"] != "attentions"


def _width(family: Family, path: str) -> int | None:
    """Channels of the block that a module lies in."""
    if (match := _BLOCK.match(path)) is None:
        return None
    if match["section"] == "mid_block" or match["level"] is None:
        return family.widths[-1]
    return (family.widths if match["section"] == "down_blocks" else family.widths[::-1])[int(match["level"])]


def _of_metadata(metadata: Mapping[str, str]) -> Iterator[Sign]:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        said = metadata.get(key, "").lower()
        yield from (Sign(says, f"{key} is {said}") for beginning, says in _VERSIONS if said.startswith(beginning))
    if metadata.get("ss_v2") == "True":
        yield Sign(_SD2, "ss_v2 is True")
    try:
        spec = json.loads(metadata.get("network_spec", "{}"))  # of a training state
    except ValueError:
        spec = {}
    family = FAMILIES.get(str(spec.get("family"))) if isinstance(spec, dict) else None
    if family is not None:
        yield Sign(family, "network_spec says so")


def _of_spelling(names: Iterable[str]) -> Iterator[Sign]:
    for name in names:
        for mark, family in _SPELLINGS:
            if re.match(mark, name):
                yield Sign(family, f"{name} is spelled so", is_spelling=True)
