"""Which family a base is of; everything else is refused by what it looks like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.files import write_json
from library.models.base_family import family_of
from library.models.load import load_unet, load_vae, unet_config
from library.models.locate import BaseLocation, locate_base
from library.models.sd15_configs import SD15_UNET
from library.models.sdxl_configs import SDXL_PIPELINE, SDXL_UNET
from networks.families import SD15, SDXL

ROOT = Path(__file__).resolve().parents[1]
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TEXT = "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"
TEXT_2 = "conditioner.embedders.1.model.ln_final.bias"


def single_file(folder: Path, *names: str, channels: int = 4) -> BaseLocation:
    path = folder / "other.safetensors"
    save_file({n: torch.zeros(2, channels, 1, 1) if n == FIRST else torch.zeros(2) for n in names}, path)
    return BaseLocation("other", path)


def folder_with_unet(folder: Path, **config: object) -> BaseLocation:
    write_json(folder / "unet" / "config.json", config)
    return BaseLocation("other", folder)


def test_the_family_is_found_without_torch(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path, FIRST, TEXT, TEXT_2).path
    code = f"""
import sys
from library.models.base_family import family_of
from library.models.locate import locate_base
print(*(family_of(locate_base(name)).key for name in {[str(tiny_sd15), str(tiny_sdxl), str(file)]}), "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["sd15", "sdxl", "sdxl", "False"]


def test_a_folder_without_its_unet_is_known_by_its_index(tmp_path: Path) -> None:
    assert family_of(BaseLocation("x", tmp_path)) == SD15
    write_json(tmp_path / "model_index.json", SDXL_PIPELINE)
    assert family_of(BaseLocation("x", tmp_path)) == SDXL


def test_marks_and_leftovers_do_not_hide_the_family(tmp_path: Path) -> None:
    marks = ["v_pred", "ztsnr", "model_ema.decay", "denoiser.sigmas"]
    assert (
        family_of(single_file(tmp_path, FIRST, TEXT, TEXT_2, "model.diffusion_model.label_emb.0.0.bias", *marks))
        == SDXL
    )
    assert family_of(single_file(tmp_path, FIRST, "cond_stage_model.logit_scale", *marks)) == SD15


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        ([FIRST, "conditioner.embedders.0.model.ln_final.bias"], "the SDXL refiner"),
        ([FIRST, TEXT], "SDXL without one of its text encoders"),
        ([FIRST, "model.diffusion_model.label_emb.0.0.bias"], "SDXL without its text encoders"),
        ([FIRST, TEXT, TEXT_2, "edm_mean"], "Playground 2.5"),
        ([FIRST, TEXT, TEXT_2, "edm_vpred.sigma_max"], "CosXL"),
        ([FIRST, "cond_stage_model.model.x"], "Stable Diffusion 2"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["model.diffusion_model.double_blocks.0.x"], "Flux"),
        (["double_blocks.0.x"], "Flux"),
        ([FIRST, "control_model.x"], "a ControlNet"),
        (["lora_unet_mid_block.lora_down.weight"], "a LoRA adapter"),
        (["lycoris_mid_block.lokr_w1"], "a LoRA adapter"),
        (
            ["diffusion_model.out.2.lora_up.weight", "text_encoders.clip_l.x.lora_up.weight"],
            "a U-Net alone or a LoRA adapter, as ComfyUI saves them",
        ),
        (["unet.mid_block.lora_A.weight"], "a LoRA adapter or a training checkpoint"),
        (["down_blocks.0.x"], "a diffusers U-Net alone"),
        (["encoder.conv_in.weight"], "a VAE alone"),
        (["text_model.x"], "a text encoder alone"),
    ],
)
def test_a_file_of_another_family_is_named(tmp_path: Path, names: list[str], looks: str) -> None:
    with pytest.raises(UserError, match=f"other.safetensors looks like {looks}.*An SD1.5 or SDXL base model is needed"):
        family_of(single_file(tmp_path, *names))


@pytest.mark.parametrize(
    ("config", "looks"),
    [
        ({**SD15_UNET, "cross_attention_dim": 1024}, "Stable Diffusion 2"),
        ({**SD15_UNET, "addition_embed_type": "image"}, "a model with conditions of the kind image"),
        ({**SDXL_UNET, "cross_attention_dim": 1280}, "the SDXL refiner"),
        ({**SDXL_UNET, "encoder_hid_dim": 4096}, "Kolors"),
        ({**SDXL_UNET, "in_channels": 9}, r"an inpainting model \(9 input channels\)"),
        ({**SD15_UNET, "in_channels": 8}, r"an editing model \(8 input channels\)"),
    ],
)
def test_a_folder_of_another_family_is_named(tmp_path: Path, config: dict[str, object], looks: str) -> None:
    with pytest.raises(UserError, match=f"looks like {looks}.*An SD1.5 or SDXL base model is needed here"):
        family_of(folder_with_unet(tmp_path, **config))


def test_an_inpainting_file_is_named(tmp_path: Path) -> None:
    for names in ([FIRST], [FIRST, TEXT, TEXT_2]):
        with pytest.raises(UserError, match=r"looks like an inpainting model \(9 input channels\)"):
            family_of(single_file(tmp_path, *names, channels=9))


def test_sdxl_is_refused_where_only_sd15_will_do(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path, FIRST, TEXT, TEXT_2)
    for location in (file, locate_base(str(tiny_sdxl))):
        for loads in (unet_config, load_unet, load_vae):
            with pytest.raises(UserError, match=r"looks like SDXL\. An SD1.5 base model is needed here\."):
                loads(location)
