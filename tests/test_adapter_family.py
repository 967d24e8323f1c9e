"""Which family's models an adapter file is for, by every sign that it has; where none tells, or they differ, it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.merging.source import read_source
from networks.adapter_family import family_signs, known_family
from networks.families import FAMILIES, SD15, SDXL, UNET
from tests.tools.adapters import kohya_targets, model_without_weights
from tests.tools.merging import metadata_of, run_merge, save

FEW = {  # name in the file -> (outputs, inputs)
    "spelling of the U-Net": ({"lora_unet_input_blocks_7_1_transformer_blocks_0_attn1_to_q": (1280, 1280)}, {}, SDXL),
    "spelling of the middle": ({"lora_unet_middle_block_1_proj_in": (1280, 1280)}, {}, SDXL),
    "spelling of the text encoder": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}, {}, SDXL),
    "spelling of SD1.5's text encoder": ({"lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}, {}, SD15),
    "second text encoder": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280)}, {}, SDXL),
    "width of the words": (
        {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 2048)},
        {},
        SDXL,
    ),
    "width of SD1.5's words": (
        {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (1280, 768)},
        {},
        SD15,
    ),
    "depth": ({"lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_q": (1280, 1280)}, {}, SDXL),
    "a level of SDXL": ({"lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280)}, {}, SDXL),
    "a level of SD1.5": (
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320)},
        {},
        SD15,
    ),
    "channels of SDXL": ({"lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (640, 640)}, {}, SDXL),
    "channels of SD1.5": (
        {"lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280)},
        {},
        SD15,
    ),
    "size conditions": ({"lora_unet_add_embedding_linear_1": (1280, 2816)}, {}, SDXL),
    "sizes before spelling": (
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),  # as diffusers writes SD1.5's too
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 768),
        },
        {},
        SD15,
    ),
    **{
        f"{key} {value}": ({"lora_unet_mid_block_attentions_0_proj_in": (1280, 1280)}, {key: value}, family)
        for key, value, family in (
            ("ss_base_model_version", "sdxl_base_v1-0", SDXL),
            ("ss_base_model_version", "sdxl_base_v0-9", SDXL),
            ("ss_base_model_version", "sd_v1_v", SD15),
            ("ss_base_model_version", "sd_1.5", SD15),
            ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", SDXL),
            ("modelspec.architecture", "stable-diffusion-v1/lora", SD15),
            ("network_spec", '{"family": "sdxl"}', SDXL),
        )
    },
}
MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
UNSAID = {f"{MIDDLE}_attn1_to_q": (1280, 1280)}


def write(path: Path, sizes: dict[str, tuple[int, int]], metadata: dict[str, str] | None = None) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in sizes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs, generator=torch.Generator().manual_seed(inputs))
        tensors[f"{name}.lora_up.weight"] = torch.ones(outputs, 4)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return save(tensors, path, metadata)


@pytest.mark.parametrize("sign", FEW)
def test_one_sign_is_enough_and_a_file_keeps_its_family(sign: str, tmp_path: Path) -> None:
    sizes, metadata, family = FEW[sign]
    path = write(tmp_path / "few.safetensors", sizes, {"format": "pt", **metadata})
    assert read_source(path).adapter.known_family is family
    for number, words in enumerate(((), ("--new_rank", 2), ("--ratios", 0.5))):
        output = tmp_path / f"out{number}.safetensors"
        if "network_spec" in metadata:
            break  # of a training state, which is no kohya file
        assert run_merge("--models", path, "--lora_only", "--save_to", output, *words) == 0
        written = metadata_of(output)
        assert written["ss_base_model_version"].startswith("sdxl" if family is SDXL else "sd_v1")
        assert written["modelspec.architecture"] == f"{family.architecture}/lora"
        names = {name.split(".")[0] for name in load_file(output)}
        assert all(
            name.startswith(("lora_te1", "lora_te2", "lora_unet")) == (family is SDXL)
            for name in names
            if "te" in name[:7]
        )
        if family is SDXL:
            assert not any(part in name for name in names for part in ("down_blocks", "mid_block", "up_blocks"))
        else:
            assert not any(part in name for name in names for part in ("input_blocks", "middle_block", "output_blocks"))


def test_every_published_module_alone_is_of_its_family_or_of_both() -> None:
    for family in FAMILIES.values():
        for target, layer in kohya_targets(UNET, model_without_weights(family.key, UNET), conv=True).items():
            shape = tuple(layer.weight.shape)  # type: ignore[arg-type, union-attr]
            assert known_family(family_signs({target: shape}, {})) in (family, None), target


@pytest.mark.parametrize(
    ("sizes", "metadata", "said"),
    [
        (UNSAID, {}, "it tells neither by its modules, their sizes and names, nor by its metadata."),
        (
            {f"{MIDDLE}_attn2_to_k": (1280, 2048)},
            {"ss_base_model_version": "sd_v1"},
            "looks like SDXL (its cross attention takes 2048 numbers) and like SD1.5 (ss_base_model_version is sd_v1).",
        ),
        (
            {
                "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
                "lora_te_text_model_encoder_layers_1_mlp_fc1": (3072, 768),
            },
            {},
            "is spelled so) and like",
        ),
    ],
    ids=["nothing", "metadata against sizes", "spellings"],
)
def test_where_signs_are_none_or_contradict_each_other_an_option_is_asked_for(
    sizes: dict[str, tuple[int, int]],
    metadata: dict[str, str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "unsaid.safetensors", sizes, metadata)
    words = ("--models", path, "--lora_only", "--save_to", tmp_path / "out.safetensors")
    assert run_merge(*words) == 2
    error = capsys.readouterr().err
    assert f"Whether {path} is for SD1.5 or SDXL is not known" in error and said in error
    assert "--family sd15 or --family sdxl" in error
    for family in FAMILIES.values():
        assert run_merge(*words, "--family", family.key, "--overwrite") == 0
        assert metadata_of(tmp_path / "out.safetensors")["ss_base_model_version"] == family.base_version
    assert run_merge("--models", path, "--inspect") == 0
    assert "SD1.5 or SDXL, which its file does not tell" in capsys.readouterr().out


def test_a_file_that_does_not_tell_is_of_the_family_of_those_it_is_added_to(tmp_path: Path) -> None:
    unsaid = write(tmp_path / "unsaid.safetensors", UNSAID)
    known = write(tmp_path / "known.safetensors", {f"{MIDDLE}_attn2_to_k": (1280, 2048)})
    output = tmp_path / "out.safetensors"
    assert run_merge("--models", unsaid, known, "--lora_only", "--save_to", output) == 0
    assert metadata_of(output)["ss_base_model_version"] == SDXL.base_version
    assert all(name.startswith("lora_unet_middle_block_1") for name in load_file(output))


def test_another_family_than_the_files_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "xl.safetensors", {f"{MIDDLE}_attn2_to_k": (1280, 2048)})
    words = ("--models", path, "--lora_only", "--save_to", tmp_path / "out.safetensors")
    assert run_merge(*words, "--family", "sd15") == 2
    assert (
        "looks like SDXL (its cross attention takes 2048 numbers), and --family says SD1.5." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("sizes", "metadata", "because"),
    [
        ({f"{MIDDLE}_attn2_to_k": (1280, 1024)}, {}, "its cross attention takes 1024 numbers"),
        (UNSAID, {"ss_v2": "True", "ss_base_model_version": "sd_v2"}, "ss_base_model_version is sd_v2"),
    ],
    ids=["width", "metadata"],
)
def test_a_lora_of_another_model_is_named(
    sizes: dict[str, tuple[int, int]],
    metadata: dict[str, str],
    because: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "sd2.safetensors", sizes, metadata)
    assert run_merge("--models", path, "--lora_only", "--save_to", tmp_path / "out.safetensors") == 2
    assert f"looks like a LoRA for Stable Diffusion 2 ({because})" in capsys.readouterr().err


def test_a_base_that_is_given_decides(tiny_sdxl: Path, tmp_path: Path) -> None:
    width = load_file(tiny_sdxl / "unet/diffusion_pytorch_model.safetensors")[
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ].shape[0]
    path = write(tmp_path / "unsaid.safetensors", {f"{MIDDLE}_attn1_to_q": (width, width)})
    output = tmp_path / "merged.safetensors"
    assert run_merge("--models", path, "--pretrained_model_name_or_path", tiny_sdxl, "--save_to", output) == 0


@pytest.mark.parametrize("spelled", ["lora_te1", "lora_te"])
def test_what_the_user_says_counts_above_how_names_are_spelled(spelled: str, tmp_path: Path) -> None:
    """diffusers' converter spells SD1.5's text encoder lora_te1 too."""
    path = write(tmp_path / "te.safetensors", {f"{spelled}_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})
    for family, expected in (("sd15", "lora_te"), ("sdxl", "lora_te1")):
        output = tmp_path / f"{family}.safetensors"
        assert run_merge("--models", path, "--lora_only", "--family", family, "--save_to", output) == 0
        assert {name.partition("_text")[0] for name in load_file(output)} == {expected}


def test_of_what_a_lora_is_made_the_base_that_is_given_says_the_family(
    tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "unsaid.safetensors", UNSAID)
    output = tmp_path / "out.safetensors"
    words = ("--models", path, "--lora_only", "--save_to", output, "--overwrite", "--sd_model")
    for base, family in ((tiny_sd15, SD15), (tiny_sdxl, SDXL)):
        assert run_merge(*words, base, "--new_rank", 2) == 0
        assert metadata_of(output)["ss_base_model_version"] == family.base_version
    capsys.readouterr()
    assert run_merge(*words, tiny_sd15, "--family", "sdxl") == 2
    assert "family and pretrained_model_name_or_path both say what the adapters are for" in capsys.readouterr().err
    known = write(tmp_path / "known.safetensors", {f"{MIDDLE}_attn2_to_k": (1280, 2048)})
    assert run_merge("--models", known, *words[2:], tiny_sd15) == 2
    assert f"and {tiny_sd15} is of SD1.5." in capsys.readouterr().err
