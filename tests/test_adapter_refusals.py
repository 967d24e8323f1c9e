"""Files that are no adapter for Stable Diffusion are refused, in a sentence that says what was found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from networks import AdapterError
from networks.adapter_file import read_adapter
from tests.tools.adapters import kohya_module, one_module, write_tensors

ONE = torch.ones(1)
CONV = {"lora_down_weight": torch.ones(2, 4, 3, 3), "lora_up_weight": torch.ones(8, 2, 1, 1)}


def loha(**others: Tensor) -> dict[str, Tensor]:
    """Of a weight [8, 4] with rank 2, with changes."""
    a, b = torch.ones(8, 2), torch.ones(2, 4)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b, **others}
    return {f"lora_unet_conv_in.{part}": value for part, value in parts.items()}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "a.safetensors has no LoRA weights in it."),
        (
            {"conv_in.bias": ONE},
            "1 of 1 keys .* is not of a LoRA (first: conv_in.bias). It is of no kind that is known here",
        ),
        ({"model.diffusion_model.out.2.bias": ONE}, "It looks like a whole model."),
        (
            {f"lora_unet_double_blocks_{i}_img_attn_proj.lora_up.weight": ONE for i in range(5)},
            "5 of 5 keys .* (first: lora_unet_double_blocks_0_img_attn_proj.lora_up.weight, .*). It looks like a LoRA for "
            "Flux; only those for SD1.5 and SDXL are supported.",
        ),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": ONE}, "looks like a LoRA for Flux;"),
        ({"lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_up.weight": ONE}, "looks like a LoRA for SD3;"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ONE}, "looks like a LoRA for Flux or SD3;"),
        (
            {"base_model.model.conv_in.hada_w1_a": ONE},
            "It is LoHa in another form than kohya's, which is not supported.",
        ),
        ({"base_model.model.conv_in.lokr_w1": ONE}, "It is LoKr in another form than kohya's, which"),
        ({"base_model.model.conv_in.oft_R.weight": ONE}, "It is OFT in another form than kohya's, which"),
        ({"lora_unet_conv_in.oft_diag": ONE}, "It is OFT in another form than kohya's, which"),
        (
            {"lora_unet_conv_in.oft_blocks": torch.ones(2, 2, 2, 2)},
            "lora_unet_conv_in is BOFT, which is not supported.",
        ),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(2, 2, 3)}, "has oft_blocks [2, 2, 3], which do not fit together."),
        ({"lora_unet_conv_in.rescale": ONE}, "has rescale, and not what belongs to it: it is incomplete."),
        ({"lora_unet_conv_in.hada_w1_a": ONE}, "lora_unet_conv_in has no hada_w1_b: it is incomplete."),
        (loha(hada_w2_b=torch.ones(3, 4)), "has hada_w2_a [8, 2] and hada_w2_b [3, 4], which do not fit together."),
        (loha(hada_w2_b=torch.ones(2, 5)), "has w1 [8, 4] and w2 [8, 5], which do not fit together."),
        (
            loha(dora_scale=torch.ones(1, 5)),
            "the DoRA magnitude of lora_unet_conv_in has the shape [1, 5], which is of no weight [8, 4].",
        ),
        (loha(diff=torch.ones(8, 4)), "has diff beside LoHa, which do not go together."),
        (
            loha(hada_w1_a=torch.full((8, 2), torch.nan)),
            "hada_w1_a of lora_unet_conv_in has values that are not finite",
        ),
        (loha(alpha=torch.ones(2)), "alpha of lora_unet_conv_in has the shape [2], not one value."),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "has no lokr_w2_a and no lokr_w2_b: it is incomplete."),
        ({"base_model.model.conv_in.boft_R": ONE}, "It is BOFT, which"),
        ({"base_model.model.conv_in.ia3_l": ONE}, "It is IA3 in PEFT's form, which is not supported."),
        ({"lora_unet_conv_in.on_input": ONE}, "has no factors weight for lora_unet_conv_in: it is incomplete."),
        ({"lora_unet_conv_in.a1.weight": ONE}, "has no a2 and no b1 and no b2 weight for lora_unet_conv_in"),
        (
            {f"lora_unet_conv_in.{part}.weight": torch.ones(2, 4) for part in ("a1", "a2", "b1", "b2")},
            "has a1 [2, 4] and a2 [2, 4] and b1 [2, 4] and b2 [2, 4], which do not fit together.",
        ),
        (
            {"lora_unet_conv_in.weight": torch.ones(2, 3), "lora_unet_conv_in.on_input": torch.tensor(0)},
            "has factors [2, 3] and on_input [], which are of no IA3.",
        ),
        ({"base_model.model.conv_in.vera_lambda_b": ONE}, "It is VeRA, which"),
        (
            {"unet.conv_in.base_layer.weight": ONE, "unet.conv_in.lora_B.default.bias": ONE},
            "LoRA with biases (lora_bias)",
        ),
        ({"unet.conv_in.modules_to_save.default.weight": ONE}, "It is a set of layers trained whole (modules_to_save)"),
        ({"lora_unet_conv_in.set_weight": ONE}, "weights that take the place of the model's (set_weight), which"),
        (
            {**one_module(), "lora_unet_extra": torch.ones(0)},
            "1 of 3 keys .* is not of a LoRA (first: lora_unet_extra). The rest of the file is an adapter that is read here; "
            "what this key is, is not known. Remove it, if",
        ),
        (
            {**one_module(), "lora_unet_a.lora_up.weight": ONE, "scaled_fp8": ONE},
            "2 of 4 keys .* (first: lora_unet_a.lora_up.weight, scaled_fp8). The rest of the file is an adapter that is read here;",
        ),
        ({"bundle_emb.cat.clip_l": ONE}, "1 of 1 keys .* It looks like a textual inversion embedding."),
        ({"lora_unet_conv_in.lora_down.weight": ONE}, "has no up weight for lora_unet_conv_in: it is incomplete."),
        ({"lora_unet_conv_in.alpha": ONE}, "a.safetensors has alphas in it, and no LoRA weights."),
        ({"unet.conv_in.lora_B.weight": ONE}, "has no down weight for unet.conv_in: it is incomplete."),
        (
            {**one_module(), **one_module(prefix="base_model.model.")},
            "two adapters on one module: base_model.model.conv_in.lora_A.weight and unet.conv_in.lora_A.weight.",
        ),
        (
            kohya_module(lora_up_weight=torch.ones(8, 3)),
            "lora_unet_conv_in has down [2, 4] and up [8, 3], whose ranks differ.",
        ),
        (kohya_module(lora_up_weight=torch.ones(8, 2, 3, 3)), "are of no Linear layer and of no convolution."),
        (kohya_module(lora_down_weight=torch.ones(2)), "down [2] and up [8, 2], which are of no Linear layer"),
        (
            kohya_module(lora_down_weight=torch.ones(0, 4), lora_up_weight=torch.ones(8, 0)),
            "down [0, 4] and up [8, 0], which are of no Linear layer",
        ),
        (kohya_module(lora_mid_weight=torch.ones(3, 2, 3, 3)), "to which mid [3, 2, 3, 3] does not belong."),
        (kohya_module(lora_mid_weight=torch.ones(2, 2, 3, 3), **CONV), "to which mid [2, 2, 3, 3] does not belong."),
        (
            kohya_module(dora_scale=torch.ones(1, 8)),
            "the DoRA magnitude of lora_unet_conv_in has the shape [1, 8], which is of no weight [8, 4].",
        ),
        (
            {**one_module(), "unet.conv_in.lora_magnitude_vector": torch.ones(4)},
            "has the shape [4], which is of no weight",
        ),
        (kohya_module(alpha=torch.ones(2)), "alpha of lora_unet_conv_in has the shape [2], not one value."),
        (
            kohya_module(lora_up_weight=torch.full((8, 2), torch.nan)),
            "up of lora_unet_conv_in has values that are not finite; the training has diverged.",
        ),
        (kohya_module(alpha=torch.tensor(torch.inf)), "alpha of lora_unet_conv_in has values that are not finite"),
        (
            kohya_module(lora_up_weight=torch.ones(8, 2, dtype=torch.int8)),
            "lora_unet_conv_in.lora_up.weight holds torch.int8, not floating-point numbers.",
        ),
    ],
)
def test_a_file_that_is_no_whole_lora_is_refused(tensors: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    path = write_tensors(tmp_path, tensors)
    with pytest.raises(AdapterError, match=re.escape(sentence).replace(r"\.\*", ".*")):
        read_adapter(path)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in .* is not valid JSON"),
        ({"lora_adapter_metadata": "[]"}, "lora_adapter_metadata in .* is a JSON list, not an object."),
        (
            {"lora_adapter_metadata": '{"unet.lora_alpha": 2, "unet.use_dora": true}'},
            "a.safetensors says it is a DoRA, but conv_in has no lora_magnitude_vector.",
        ),
        (
            {"lora_adapter_metadata": '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}'},
            "alpha_pattern of .*a.safetensors is not a table of patterns and numbers.",
        ),
        ({"lora_spec": '{"rank": 4, "colour": "red"}'}, "unknown entries: colour"),
    ],
)
def test_metadata_that_says_what_cannot_be_is_refused(metadata: dict[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=sentence):
        read_adapter(write_tensors(tmp_path, one_module(), metadata))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no.safetensors does not exist."):
        read_adapter(tmp_path / "no.safetensors")
    with pytest.raises(AdapterError, match="a.ckpt is not a .safetensors file; adapters in other formats can run code"):
        read_adapter(tmp_path / "a.ckpt")
    whole = write_tensors(tmp_path, kohya_module()).read_bytes()
    for name, content in (("torn", whole[:-9]), ("cut", whole[:40]), ("empty", b""), ("page", b"<!DOCTYPE html>" * 9)):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(AdapterError, match=f"{name}.safetensors is not a whole safetensors file"):
            read_adapter(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["emb_params"], "a textual inversion embedding"),
        (["clip_g", "clip_l"], "a textual inversion embedding"),
        (["string_to_param.*"], "a textual inversion embedding"),
        (["<cat-toy>"], "a textual inversion embedding"),
        (["768.0.linear.0.weight", "320.1.linear.1.bias"], "a hypernetwork"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight", "down_blocks.0.a.bias"], "a ControlNet"),
        (["lllite_unet_input_blocks_4_1_to_q.down.0.weight"], "a ControlNet-LLLite"),
        (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.norm.weight"], "an AnimateDiff motion module"),
        (["encoder.conv_in.weight", "decoder.up_blocks.0.a.weight"], "a VAE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder"),
        (["down_blocks.0.resnets.0.conv1.bias", "mid_block.resnets.0.conv1.bias"], "a U-Net"),
        (["model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.weight"], "a whole model"),
        (["double_blocks.0.img_attn.qkv.weight"], "a whole model that is neither SD1.5 nor SDXL"),
        (["model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscaler"),
        (["unet:0:up", "unet:0:down"], "a LoRA in the format of cloneofsimo's lora, which only that program reads"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"], "a LoRA for Flux"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "a LoRA for a video model such as Wan"),
        (["lora_unet_blocks_0_cross_attn_q.lora_down.weight"], "a LoRA for a video model such as Wan"),
        (["unet.foo.transformer_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA for another model"),
        (["lycoris_transformer_blocks_0_attn_add_q_proj.lokr_w1"], "a LoRA for Flux, SD3 or Qwen-Image"),
        (["lora_prior_unet_down_blocks_0.lora_down.weight"], "a LoRA for Stable Cascade"),
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "a LoRA for a language model"),
        (["text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight"], "a LoRA for SD2"),
        (["lora_unet_somewhere_else.lora_up.weight"], "a LoRA for another model"),
    ],
)
def test_what_is_no_adapter_is_named_by_its_kind(keys: list[str], kind: str, tmp_path: Path) -> None:
    path = write_tensors(tmp_path, dict.fromkeys(keys, ONE))
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    assert str(caught.value).partition("It looks like ")[2].split(";")[0].removesuffix(".") == kind
