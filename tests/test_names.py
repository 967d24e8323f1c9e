"""Names of one module in kohya's, PEFT's and diffusers' files, for every module of the published models."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE
from networks.names import (
    Target,
    adapter_family,
    current_key,
    is_wrapped,
    kohya_name,
    parse_kohya_name,
    peft_key,
    split_peft_key,
    split_wrapped_key,
)
from tests.tools.adapters import kohya_targets, model_without_weights

# SHA-256 of kohya's modules, sorted, a line each: name, shape of lora_down and of lora_up at rank 4. Made by running
# create_network of kohya's scripts on models of the real size.
KOHYA_LISTS = {
    ("sd15", False): (264, "9f0cd146d1ff5d1825e926127bba29d93ee11cf79285c1f63046a79d1efacc03"),
    ("sd15", True): (350, "178a24f5b446daad1e3a652d449e109e70edb8308f5c7e54b2a9107dc8bb0517"),
    ("sdxl", False): (986, "4f7613e49cc94f58e057dd4a230fc07457f1b3336deb7e852323585b4aa37ddc"),
    ("sdxl", True): (1052, "501fbec71d2609dc17a2c5902ae7b23404ca8fbff3e37f8b54c2b0b9fefd6d7a"),
}
# Some of their lines, to see what differs when a sum does.
KOHYA_EXCERPTS = {
    "sd15": """
lora_te_text_model_encoder_layers_0_self_attn_k_proj	(4, 768)	(768, 4)
lora_te_text_model_encoder_layers_11_mlp_fc2	(4, 3072)	(768, 4)
lora_unet_down_blocks_0_attentions_0_proj_in	(4, 320, 1, 1)	(320, 4, 1, 1)
lora_unet_down_blocks_1_resnets_0_conv_shortcut	(4, 320, 1, 1)	(640, 4, 1, 1)
lora_unet_down_blocks_2_downsamplers_0_conv	(4, 1280, 3, 3)	(1280, 4, 1, 1)
lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0	(4, 1280)	(1280, 4)
lora_unet_mid_block_resnets_1_time_emb_proj	(4, 1280)	(1280, 4)
lora_unet_up_blocks_2_attentions_2_transformer_blocks_0_ff_net_0_proj	(4, 640)	(5120, 4)
lora_unet_up_blocks_2_resnets_0_conv1	(4, 1920, 3, 3)	(640, 4, 1, 1)
lora_unet_up_blocks_2_upsamplers_0_conv	(4, 640, 3, 3)	(640, 4, 1, 1)
lora_unet_up_blocks_3_attentions_1_transformer_blocks_0_attn2_to_k	(4, 768)	(320, 4)
""",
    "sdxl": """
lora_te1_text_model_encoder_layers_0_self_attn_k_proj	(4, 768)	(768, 4)
lora_te2_text_model_encoder_layers_31_mlp_fc1	(4, 1280)	(5120, 4)
lora_unet_input_blocks_1_0_emb_layers_1	(4, 1280)	(320, 4)
lora_unet_input_blocks_3_0_op	(4, 320, 3, 3)	(320, 4, 1, 1)
lora_unet_input_blocks_4_0_skip_connection	(4, 320, 1, 1)	(640, 4, 1, 1)
lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k	(4, 2048)	(1280, 4)
lora_unet_middle_block_1_proj_in	(4, 1280)	(1280, 4)
lora_unet_middle_block_2_out_layers_3	(4, 1280, 3, 3)	(1280, 4, 1, 1)
lora_unet_output_blocks_0_0_in_layers_2	(4, 2560, 3, 3)	(1280, 4, 1, 1)
lora_unet_output_blocks_2_2_conv	(4, 1280, 3, 3)	(1280, 4, 1, 1)
lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2	(4, 2560)	(640, 4)
""",
}


def layers_of(family: str) -> dict[Target, nn.Module]:
    """Every Linear and convolution of U-Net and text encoders, adapted or not."""
    return {
        Target(component, path): module
        for component in (UNET, *FAMILIES[family].text_encoders)
        for path, module in model_without_weights(family, component).named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def kohya_lines(family: str, *, conv: bool) -> list[str]:
    lines = []
    for component in (UNET, *FAMILIES[family].text_encoders):
        for target, layer in kohya_targets(component, model_without_weights(family, component), conv=conv).items():
            out, *inner = layer.weight.shape
            up = (out, 4, *(1 for _ in inner[1:]))
            lines.append(f"{kohya_name(target, FAMILIES[family])}\t{(4, *inner)}\t{up}")
    return sorted(lines)


@pytest.mark.parametrize(("family", "conv"), sorted(KOHYA_LISTS))
def test_names_and_shapes_of_all_adapted_modules_are_kohyas(family: str, conv: bool) -> None:
    lines = kohya_lines(family, conv=conv)
    if conv:
        assert set(KOHYA_EXCERPTS[family].strip().splitlines()) <= set(lines)
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == KOHYA_LISTS[family, conv]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohyas_names_lead_back_to_every_layer(family: str) -> None:
    layers = layers_of(family)
    names = {kohya_name(target, FAMILIES[family]): target for target in layers}
    assert len(names) == len(layers)
    assert {name: parse_kohya_name(name) for name in names} == names


def test_sdxl_in_diffusers_spelling_means_the_same_modules() -> None:
    for target in layers_of("sdxl"):
        if target.component == UNET:
            assert parse_kohya_name(f"lora_unet_{target.path.replace('.', '_')}") == target


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pefts_keys_lead_back_to_every_layer(family: str) -> None:
    for target in layers_of(family):
        for part in ("down", "up", "magnitude"):
            assert split_peft_key(peft_key(target, part)) == (target, part)


BLOCKS = st.sampled_from(["down_blocks.{}", "up_blocks.{}", "mid_block"])
INSIDE = st.sampled_from(
    [
        *("attentions.{}.proj_in", "attentions.{}.transformer_blocks.{}.attn1.to_out.0", "resnets.{}.time_emb_proj"),
        *("attentions.{}.transformer_blocks.{}.ff.net.0.proj", "resnets.{}.conv_shortcut", "upsamplers.{}.conv"),
    ]
)
TEXT = st.sampled_from(
    [f"text_model.encoder.layers.{{}}.{layer}" for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
)


@given(BLOCKS, INSIDE, st.lists(st.integers(0, 99), min_size=3, max_size=3))
def test_unet_names_lead_back_whatever_the_size_of_the_model(block: str, inside: str, numbers: list[int]) -> None:
    target = Target(UNET, f"{block}.{inside}".format(*numbers))
    assert parse_kohya_name(kohya_name(target)) == target


@given(TEXT, st.integers(0, 999), st.sampled_from([TEXT_ENCODER, TEXT_ENCODER_2]))
def test_text_names_lead_back_whatever_the_size_of_the_model(layer: str, number: int, component: str) -> None:
    target = Target(component, layer.format(number))
    assert parse_kohya_name(kohya_name(target, SDXL)) == target


@given(st.text(st.sampled_from("abcdown_blksmi012.é "), max_size=30))
def test_no_text_breaks_the_parser(text: str) -> None:
    for prefix in ("lora_unet_", "lora_te_", "lora_te2_", ""):
        target = parse_kohya_name(prefix + text)
        assert target is None or target.component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2)


def test_documented_names() -> None:
    attention = Target(UNET, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0")
    assert kohya_name(attention) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert kohya_name(attention, SDXL) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    text = Target(TEXT_ENCODER, "text_model.encoder.layers.3.mlp.fc1")
    assert kohya_name(text) == "lora_te_text_model_encoder_layers_3_mlp_fc1"
    assert kohya_name(text, SDXL) == "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    assert kohya_name(text._replace(component=TEXT_ENCODER_2), SDXL) == "lora_te2_text_model_encoder_layers_3_mlp_fc1"


def test_text_encoders_say_text_model_whatever_transformers_calls_them() -> None:
    """transformers >= 5.6 has no text_model in CLIPTextModel."""
    flat = Target(TEXT_ENCODER, "encoder.layers.3.mlp.fc1")
    whole = Target(TEXT_ENCODER, "text_model.encoder.layers.3.mlp.fc1")
    assert kohya_name(flat) == kohya_name(whole)
    for name in ("lora_te_encoder_layers_3_mlp_fc1", "lora_te1_text_model_encoder_layers_3_mlp_fc1"):
        assert parse_kohya_name(name) == whole
    assert split_peft_key("base_model.model.encoder.layers.3.mlp.fc1.lora_A.weight") == (whole, "down")


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_proj",  # Flux
        "lora_unet_joint_blocks_0_x_block_attn_qkv",  # SD3
        "lora_te3_encoder_block_0_layer_0_SelfAttention_k",  # T5
        "lora_te1_encoder_block_0_layer_0_attention_k",
        "lora_transformer_single_transformer_blocks_0_attn_to_q",
        "lora_unet_input_blocks_99_1_proj_in",
        "lora_unet_",
        "lora_unet_down_blocks_",
        "lora_unet__down_blocks_0_resnets_0_conv1",
        "lora_vae_decoder_conv_in",
        "unet_conv_in",
    ],
)
def test_names_of_other_models_mean_nothing(name: str) -> None:
    assert parse_kohya_name(name) is None


PROJ_IN = Target(UNET, "mid_block.attentions.0.proj_in")
FC1 = Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("mid_block.attentions.0.proj_in.lora_A.default.weight", (PROJ_IN, "down")),
        ("unet.mid_block.attentions.0.proj_in.lora_B.weight", (PROJ_IN, "up")),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", (PROJ_IN, "down")),
        ("unet.base_model.model.mid_block.attentions.0.proj_in.lora_B.default.weight", (PROJ_IN, "up")),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", (PROJ_IN, "down")),
        ("mid_block.attentions.0.proj_in.lora_magnitude_vector", (PROJ_IN, "magnitude")),
        ("mid_block.attentions.0.proj_in.lora_magnitude_vector.default.weight", (PROJ_IN, "magnitude")),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            (Target(UNET, "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"), "up"),
        ),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (FC1, "down")),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight", (FC1, "down")),
        ("text_model.encoder.layers.0.mlp.fc1.lora_B.default.weight", (FC1, "up")),
        (
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora.up.weight",
            (FC1._replace(component=TEXT_ENCODER_2), "up"),
        ),
        ("unet.conv_in.weight", None),
        ("unet.conv_in.base_layer.weight", None),
        ("unet.conv_in.lora_B.bias", None),
        ("align_heads.mid.proj.0.weight", None),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", None),
        ("vae.decoder.conv_in.lora_A.weight", None),
    ],
)
def test_peft_and_diffusers_keys(key: str, expected: tuple[Target, str] | None) -> None:
    assert split_peft_key(key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("unet.base_model.model.conv_in.weight", (UNET, "conv_in.weight")),
        ("unet.base_model.model.conv_in.base_layer.bias", (UNET, "conv_in.bias")),
        ("unet.conv_in.base_layer.weight", (UNET, "conv_in.weight")),
        ("base_model.model.conv_norm_out.weight", (UNET, "conv_norm_out.weight")),
        ("time_embedding.linear_1.weight", (UNET, "time_embedding.linear_1.weight")),
        ("text_encoder.text_model.final_layer_norm.bias", (TEXT_ENCODER, "text_model.final_layer_norm.bias")),
        ("text_encoder_2.text_projection.weight", (TEXT_ENCODER_2, "text_projection.weight")),
        ("vae.quant_conv.weight", (VAE, "quant_conv.weight")),
        ("text_encoder.text_model.embeddings.position_ids", None),
        ("optimizer.step", None),
        ("global_step", None),
    ],
)
def test_keys_of_wrapped_checkpoints(key: str, expected: tuple[str, str] | None) -> None:
    assert split_wrapped_key(key) == expected


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("prefix", ["unet.base_model.model.", "unet.", "base_model.model.", ""])
def test_a_wrapped_checkpoint_has_every_tensor_of_the_unet(prefix: str, family: str) -> None:
    keys = list(model_without_weights(family, UNET).state_dict())
    wrapped = {prefix + key.replace(".to_q.", ".to_q.base_layer."): key for key in keys}
    assert is_wrapped(wrapped) and not is_wrapped(keys)
    assert {key: split_wrapped_key(key) for key in wrapped} == {key: (UNET, plain) for key, plain in wrapped.items()}


def test_keys_of_older_folders_become_todays() -> None:
    old = "encoder.mid_block.attentions.0."
    assert current_key(VAE, f"{old}proj_attn.weight") == f"{old}to_out.0.weight"
    assert current_key(VAE, f"{old}query.bias") == f"{old}to_q.bias"
    assert current_key(VAE, f"{old}group_norm.bias") == f"{old}group_norm.bias"
    assert current_key(TEXT_ENCODER, "final_layer_norm.weight") == "text_model.final_layer_norm.weight"
    assert current_key(TEXT_ENCODER, "text_model.embeddings.position_ids") is None


def test_modules_say_whether_they_are_sdxls() -> None:
    for family in (SD15, SDXL):
        for conv in (False, True):
            unet = kohya_targets(UNET, model_without_weights(family.key, UNET), conv=conv)
            assert adapter_family(unet, {}) is family
    assert adapter_family([FC1._replace(component=TEXT_ENCODER_2)], {}) is SDXL
    assert adapter_family([FC1], {}) is SD15
