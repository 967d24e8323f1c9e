"""What a file is that is no adapter for SD1.5 or SDXL, told by its keys, so that it is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from networks.kinds import KINDS

_OTHER_FORMS = {
    kind.other_form: f"{kind.title} in another form than kohya's" for kind in KINDS.values() if kind.other_form
}
_KINDS_OF_ADAPTERS = {
    **_OTHER_FORMS,
    r"\.boft_": "BOFT",
    r"\.ia3_": "IA3 in PEFT's form",
    r"\.vera_": "VeRA",
    r"\.lora_embedding_[AB]": "LoRA on embeddings",
    r"\.lora_\w+(\.\w+)?\.bias$": "LoRA with biases (lora_bias)",
    r"\.modules_to_save\.": "a set of layers trained whole (modules_to_save)",
    r"\.set_weight$|\.reshape_weight$": "a set of weights that take the place of the model's (set_weight)",
    r"\.bias_(indices|values|size)$": "LoCon with sparse biases",
    r"^lora_controlnet": "Control-LoRA",
}
_ADAPTERS_FOR = {
    r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]": "Flux",
    r"(^|[._])joint_blocks[._]": "SD3",
    r"transformer_blocks[._]\d+[._](img_mlp|txt_mlp|img_mod|txt_mod|attn[._]add_[qkv]_proj)": "Flux, SD3 or Qwen-Image",
    r"(^|\.|^lora_unet_|^lycoris_)blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)[._]": "a video model such as Wan",
    r"^transformer\.|^lora_transformer_|^(base_model\.model\.)?transformer_blocks\.|^lora_te3_|\bt5xxl\b": "Flux or SD3",
    r"^lora_prior_|^prior\.": "Stable Cascade",
    r"(^|\.)layers\.\d+\.(attention|feed_forward|adaLN_modulation)\.": "Lumina or Z-Image",
    r"^diffusion_model\.transformer_blocks\.": "a video model such as LTX",
    r"(^|\.)model\.layers\.\d+\.|(^|\.)lm_head\.": "a language model",
    r"motion_modules": "AnimateDiff (a motion LoRA)",
    r"temporal_transformer_blocks|^lora_unet_.*time_stack": "Stable Video Diffusion",
    r"vision_model[._]": "an image encoder (CLIP vision)",
    r"clip_h\.": "SD2",
    r"\bvae\.|^lora_vae": "a VAE",
}
_FILES = {
    r"^bundle_emb\.|^emb_params$|string_to_(param|token)|^clip_[lgh]$|^<.+>$|^learned_embeds": "a textual inversion embedding",
    r"^(320|640|768|1024|1280|2048)\.[01]\.": "a hypernetwork",
    r"^lllite_": "a ControlNet-LLLite",
    r"^control_model\.|^controlnet_|(^|\.)zero_convs\.|(^|\.)input_hint_block\.": "a ControlNet",
    r"^(adapter\.)?body\.\d+\.(resnets|block1|in_conv|conv_in)\b": "a T2I-Adapter",
    r"^image_proj\b|^ip_adapter\.": "an IP-Adapter",
    r"motion_modules": "an AnimateDiff motion module",
    r"^(unet|text_encoder):\d+:(up|down)$": "a LoRA in the format of cloneofsimo's lora, which only that program reads",
    r"^model\.diffusion_model\.|^cond_stage_model\.|^conditioner\.embedders\.": "a whole model",
    r"^(double_blocks|single_blocks|joint_blocks|single_transformer_blocks)\.": "a whole model that is neither SD1.5 nor SDXL",
    r"^(model\.layers\.\d+|lm_head)\.": "a language model",
    r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|conv_out|down|mid|up|down_blocks|mid_block|up_blocks)\b": "a VAE",
    r"^(text_encoder(_2)?\.)?text_model\.(encoder|embeddings|final_layer_norm)\b": "a text encoder",
    r"^vision_model\.|^visual\.": "an image encoder (CLIP vision)",
    r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.": "a U-Net",
    r"^(model\.\d+|body\.\d+\.(rdb|residual_group)|conv_first|params_ema)\b": "an upscaler",
    r"^sides\.\d+\.(modality|project|decoder)\b": "a text fusion of train_lyra.py, which --text_fusion takes",
    r"^align_heads\.": "a set of AlignHeads without an adapter",
}
_LORA_LIKE = re.compile(
    r"lora|lokr_|hada_|\.alpha$|^lycoris_|oft_|\.diff(_b)?$|\.dora_scale$", re.MULTILINE | re.IGNORECASE
)


def adapter_kinds(keys: Iterable[str]) -> list[str]:
    """The kinds of adapters that are not read, and that these keys are of."""
    return _matches(_KINDS_OF_ADAPTERS, keys)


def file_kind(keys: Iterable[str], *, of_the_rest: bool = False) -> str:
    """A sentence that says what a file is that has these keys, none of which is of an adapter that is read.

    of_the_rest: whether the file's other keys are of one.
    """
    keys = list(keys)
    is_lora = _LORA_LIKE.search("\n".join(keys)) is not None
    if is_lora and (models := _matches(_ADAPTERS_FOR, keys)):
        return f"It looks like a LoRA for {models[0]}; only those for SD1.5 and SDXL are supported."
    if kinds := adapter_kinds(keys):
        return f"It is {' and '.join(kinds)}, which is not supported."
    if files := _matches(_FILES, keys):
        return f"It looks like {files[0]}."
    if of_the_rest:
        these, are, them = ("these keys", "are", "them") if len(keys) > 1 else ("this key", "is", "it")
        return (
            f"The rest of the file is an adapter that is read here; what {these} {are}, is not known. Remove {them}, if you know "
            "that nothing is lost."
        )
    if is_lora:
        return "It looks like a LoRA for another model; only those for SD1.5 and SDXL are supported."
    return "It is of no kind that is known here: its keys are neither of an adapter nor of a part of Stable Diffusion."


def _matches(table: dict[str, str], keys: Iterable[str]) -> list[str]:
    joined = "\n".join(keys)
    return [what for mark, what in table.items() if re.search(mark, joined, re.MULTILINE)]
