"""One table of names: kohya's, PEFT's, diffusers', and those of the original single files, for SD1.x and SDXL.

The common tongue of this project is diffusers': a component (`unet`, `vae`, `text_encoder`, `text_encoder_2`) and the path of
a module in it, or the key of a tensor. Text encoders are spelled as transformers < 5.6 does, with `text_model.` in front.
Every other spelling is turned into that one, and made from it, here (adapters, older folders) and in
`networks.original_names` (single files), and nowhere else.

Source: kohya sd-scripts' networks.lora, PEFT's and diffusers' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from networks.adapter_family import Shapes, family_signs, likely_family
from networks.families import SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, Family
from networks.original_names import unet_from_original, unet_to_original, with_text_model

COMPONENTS = (UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2)


_BIAS = ".bias"


class Target(NamedTuple):
    """What an adapter changes: the weight of a module, or its bias."""

    component: str
    path: str
    """Of the module in the diffusers or transformers model; of a bias with `.bias` behind."""

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.path.removesuffix(_BIAS)

    @property
    def key(self) -> str:
        """Of the tensor, in its model."""
        return self.path if self.path.endswith(_BIAS) else f"{self.path}.weight"

    @property
    def bias(self) -> Target:
        """The bias of the same module."""
        return Target(self.component, f"{self.module}{_BIAS}")


# diffusers 0.17 and before; SD1.5's own VAE on the hub still says so.
_VAE_ATTENTION_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_key(component: str, key: str) -> str | None:
    """The key of a tensor in a diffusers folder as today's models have it; None for buffers that are no part of them."""
    if key.endswith("embeddings.position_ids") or (component == TEXT_ENCODER and key.startswith("text_projection")):
        return None
    if component in (TEXT_ENCODER, TEXT_ENCODER_2):
        return with_text_model(key)
    if component == VAE and ".attentions." in key:
        module, _, leaf = key.rpartition(".")
        parent, _, layer = module.rpartition(".")
        return f"{parent}.{_VAE_ATTENTION_OLD.get(layer, layer)}.{leaf}"
    return key


_WRAPPER = r"(?:base_model[._]model[._])?"  # PEFT's
# Kohya, its OFT, diffusers, ComfyUI ("diffusion_model.", "text_encoders."), OneTrainer ("clip_l."), SimpleTuner ("lycoris_").
_MODULE_NAME = re.compile(
    rf"{_WRAPPER}(?:(?P<unet>(?:lora|oft)_unet[._]|unet\.|(?:model\.)?diffusion_model\.)"
    r"|(?P<text_encoder_2>(?:lora|oft)_te2[._]|text_encoder_2\.|(?:text_encoders\.)?clip_g\.(?:transformer\.)?)"
    r"|(?P<text_encoder>(?:lora|oft)_te1?[._]|text_encoder\.|(?:text_encoders\.)?clip_l\.(?:transformer\.)?)"
    rf"|(?P<vae>vae\.)|lycoris[._])?{_WRAPPER}(?P<path>.+)"
)
_PEFT_SUFFIX = re.compile(
    r"(?:\.processor)?\.(?P<old>to_[qkv]|to_out)_lora\.(?P<old_down_up>down|up)\.weight"
    r"|\.lora_(?P<ab>[ab])(?:\.[^.]+)?\.weight|\.lora(?:_linear_layer)?\.(?P<down_up>down|up)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?",
    re.IGNORECASE,
)
_PEFT_PREFIX = r"(?:(?P<component>unet|vae|text_encoder_2|text_encoder)\.)?(?:base_model\.model\.)?"
_WRAPPED_KEY = re.compile(_PEFT_PREFIX + r"(?P<path>.+?)(?:\.base_layer)?\.(?P<leaf>\w+)")
# diffusers 0.20 and before, in text encoders.
_TEXT_ATTENTION_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# What the paths of each model begin with; those of other models (Flux, SD3, T5) do not.
_UNET_SECTIONS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "conv_norm_out")
_TEXT_SECTIONS = ("text_model.encoder.layers.", "text_model.embeddings.", "text_model.final_layer_norm")
_SECTIONS = {
    UNET: (*_UNET_SECTIONS, "time_embedding.", "add_embedding."),
    VAE: ("encoder.", "decoder.", "quant_conv", "post_quant_conv"),
    TEXT_ENCODER: _TEXT_SECTIONS,
    TEXT_ENCODER_2: (*_TEXT_SECTIONS, "text_projection"),
}


class PeftKey(NamedTuple):
    target: Target
    part: str
    """ "down", "up" or "magnitude"."""


def split_peft_key(key: str) -> PeftKey | None:
    """What a tensor of a PEFT or diffusers LoRA file is of; None for any other key.

    Known: `unet.X.lora_A.weight`, with or without `unet.`, `base_model.model.` and the adapter's name after lora_A, diffusers'
    older `unet.X.lora.down.weight` and `X.processor.to_q_lora.down.weight`, of text encoders `self_attn.to_q_lora.down.weight`,
    and DoRA's `lora_magnitude_vector`; the ending in capitals too. A key that names no component is of the first text encoder
    where its path says so, else of the U-Net.
    """
    match = next((m for m in _PEFT_SUFFIX.finditer(key) if m.end() == len(key)), None)
    if match is None:
        return None
    name, old = key[: match.start()], match["old"]
    if old and ".self_attn" in name:
        name = f"{name}.{_TEXT_ATTENTION_OLD[old.lower()]}"
    elif old:
        name = f"{name}.{'to_out.0' if old.lower() == 'to_out' else old.lower()}"
    target = parse_module_name(name)
    if match["magnitude"]:
        part = "magnitude"
    else:
        down_up = match["old_down_up"] or match["down_up"] or {"a": "down", "b": "up"}[match["ab"].lower()]
        part = down_up.lower()
    return None if target is None else PeftKey(target, part)


def peft_key(target: Target, part: str) -> str:
    """`unet.X.lora_A.weight`: the key that diffusers' save_lora_weights writes, the inverse of `split_peft_key`."""
    suffix = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}[part]
    return f"{target.component}.{target.path}.{suffix}"


def split_wrapped_key(key: str) -> tuple[str, str] | None:
    """(component, key in the model without adapters) of a frozen tensor in a checkpoint of a model wrapped by PEFT.

    Known: `unet.base_model.model.X.base_layer.weight` and the same without any of its prefixes. None for keys of no part of
    Stable Diffusion, and for buffers that are no part of today's models.
    """
    match = _WRAPPED_KEY.fullmatch(key)
    target = None if match is None else _target(match["component"], f"{match['path']}.{match['leaf']}")
    if target is None or (current := current_key(*target)) is None:
        return None
    return target.component, current


def is_wrapped(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a whole model with PEFT adapters in it: `X.base_layer.weight`."""
    return any(".base_layer." in key for key in keys)


def _target(component: str | None, path: str) -> Target | None:
    """None for paths that no model of Stable Diffusion has."""
    if component is None:
        component = TEXT_ENCODER if path.startswith(("text_model.", "encoder.layers.")) else UNET
    path = path if component in (UNET, VAE) else with_text_model(path)
    return Target(component, path) if path.startswith(_SECTIONS[component]) else None


# ------------------------------------------------------------------------------------------------ kohya's adapters

# Words of module paths that have an underscore in them; all others end at an underscore.
_LONG_WORDS = (
    *(
        "down_blocks",
        "mid_block",
        "up_blocks",
        "transformer_blocks",
        "time_embedding",
        "add_embedding",
        "time_emb_proj",
    ),
    *("linear_1", "linear_2", "conv_in", "conv_out", "conv_norm_out", "conv_shortcut", "proj_in", "proj_out"),
    *("to_q", "to_k", "to_v", "to_out", "text_model", "text_projection", "self_attn"),
    *("q_proj", "k_proj", "v_proj", "out_proj", "token_embedding", "position_embedding"),
    *("final_layer_norm", "layer_norm1", "layer_norm2", "input_blocks", "middle_block", "output_blocks"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection", "time_embed", "label_emb"),
)
_WORD = re.compile("|".join(sorted(_LONG_WORDS, key=len, reverse=True)) + r"|[a-z]+\d*|\d+")
_KOHYA_PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2")
_SD15_UPSAMPLER = re.compile(r"output_blocks\.\d+\.1\.conv")
_SGM_SECTIONS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")


def kohya_name(target: Target, family: Family = SD15) -> str:
    """Kohya's name of a module: `lora_unet_mid_block_attentions_0_proj_in`, SDXL `lora_unet_middle_block_1_proj_in`.

    Text encoders always say text_model_, which transformers >= 5.6 dropped from the paths of CLIPTextModel and
    every reader of these files expects.
    """
    path = target.module
    if target.component == UNET:
        path = unet_to_original(family, path) if family.sgm_adapters else path
    else:
        path = with_text_model(path)
    return f"{family.kohya[target.component]}_{path.replace('.', '_')}"


def parse_kohya_name(name: str) -> Target | None:
    """The module that a name in a kohya file means, in either spelling of the U-Net; None for names of other models.

    `lora_te_` and `lora_te1_` both mean the first text encoder: diffusers writes the latter even for SD1.5.
    """
    return parse_module_name(name) if name.startswith(tuple(f"{p}_" for p in _KOHYA_PREFIXES)) else None


def parse_module_name(name: str) -> Target | None:
    """The module that a name in an adapter file means, whichever program wrote it; None for names of other models.

    Kohya's, with underscores or dots; diffusers' and PEFT's; ComfyUI's (`diffusion_model.`, `text_encoders.clip_l.`), OneTrainer's
    (`unet.` and `clip_l.` before the original names), SimpleTuner's (`lycoris_`). The U-Net's path may be the original code's.
    A name that says no component is of the first text encoder where its path says so, else of the U-Net.
    """
    match = _MODULE_NAME.fullmatch(name)
    if match is None or match["vae"]:
        return None
    component = next((c for c in (UNET, TEXT_ENCODER, TEXT_ENCODER_2) if match[c]), None)
    path = match["path"] if "." in match["path"] else _dotted(match["path"])
    if path is None:
        return None
    if component in (UNET, None) and path.startswith(_SGM_SECTIONS):
        # An upsampler stands where the other family has attention; all else is named alike.
        families = (SD15, SDXL) if _SD15_UPSAMPLER.fullmatch(path) else (SDXL, SD15)
        found = next((found for family in families if (found := unet_from_original(family, path))), None)
        return None if found is None else Target(UNET, found)
    return _target(component, path)


def _dotted(words: str) -> str | None:
    """A path with its dots back: which underscores were dots follows from the words that have one themselves."""
    path, position = [], 0
    while position < len(words):
        match = _WORD.match(words, position)
        if match is None or (match.end() < len(words) and words[match.end()] != "_"):
            return None
        path.append(match[0])
        position = match.end() + 1
    return ".".join(path) if position == len(words) + 1 else None


def adapter_family(modules: Iterable[Target], metadata: Mapping[str, str], spelled: Iterable[str] = ()) -> Family:
    """The family that an adapter is most likely for; SD1.5 where nothing tells. See `networks.adapter_family`.

    modules: the targets, or what is on each. spelled: their names as they stand in the file.
    """
    return likely_family(family_signs(shapes_of(modules), metadata, spelled))


def shapes_of(modules: Iterable[Target]) -> Shapes:
    """The shape of each module's weight, where what is on it says one."""
    known = modules if isinstance(modules, Mapping) else {}
    return {target: tuple(getattr(known.get(target), "shape", ())) for target in modules}
