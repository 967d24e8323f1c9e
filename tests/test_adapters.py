"""What each kind of adapter adds to a weight, against PEFT's own merging and against slow formulas."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from networks.adapters import Adapter
from networks.families import SD15, SDXL
from networks.kinds.lora import LoraModule
from networks.names import Target
from tests.tools.adapters import cp_module, random_module

LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "convolution": lambda: nn.Conv2d(6, 10, 3),
    "convolution_1x1": lambda: nn.Conv2d(6, 10, 1),
}


def trained_by_peft(layer: nn.Module, **options: bool) -> tuple[LoraModule, Tensor]:
    """(the adapter that PEFT put on `layer`, with random weights; what merging it adds there)"""
    torch.manual_seed(0)
    before = layer.weight.detach().clone()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(layer), config)
    lora = model.base_model.model[0]
    magnitude = None
    if options.get("use_dora"):
        weight = lora.lora_magnitude_vector["default"].weight
        weight.data *= 1 + torch.rand(weight.shape)
        magnitude = weight.detach().clone().reshape(10, *(1 for _ in before.shape[1:]))
    down, up = lora.lora_A["default"].weight.detach().clone(), lora.lora_B["default"].weight.detach().clone()
    merged = model.merge_and_unload()[0].weight.detach()
    return LoraModule(down, up, 5.0, magnitude=magnitude), merged - before


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_delta_is_what_peft_merges(kind: str, use_dora: bool) -> None:
    layer = LAYERS[kind]()
    weight = layer.weight.detach().clone()
    module, expected = trained_by_peft(layer, use_dora=use_dora)
    torch.testing.assert_close(module.delta(weight), expected, rtol=1e-5, atol=1e-6)
    assert module.shape == tuple(weight.shape)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1, 1)])
def test_a_dora_of_a_matrix_serves_a_1x1_convolution_and_the_other_way_round(shape: tuple[int, ...]) -> None:
    lora = random_module(5, 4)
    matrix = LoraModule(lora.down, lora.up, lora.alpha, magnitude=torch.rand(5, 1) + 0.5)
    convolution = LoraModule(
        lora.down[..., None, None], lora.up[..., None, None], lora.alpha, magnitude=matrix.magnitude[..., None, None]
    )
    weight = torch.randn(shape)
    assert matrix.fits(shape) and convolution.fits(shape)
    torch.testing.assert_close(matrix.delta(weight), convolution.delta(weight))


def test_a_cp_decomposed_convolution_is_the_sum_over_both_ranks() -> None:
    module = cp_module(5, 4, alpha=6.0, kernel=(3, 2))
    assert module.mid is not None
    expected = torch.zeros(5, 4, 3, 2)
    for m in range(3):
        for n in range(3):
            expected += module.up[:, m, 0, 0, None, None, None] * module.mid[m, n] * module.down[n, :, 0, 0, None, None]
    assert module.shape == (5, 4, 3, 2) and module.rank == 3
    torch.testing.assert_close(module.product(), 6.0 / 3 * expected)
    plain = module.without_mid()
    assert plain.mid is None and plain.down.shape == (3, 4, 3, 2)
    torch.testing.assert_close(plain.product(), module.product())


def test_a_module_without_a_mid_is_itself() -> None:
    module = random_module(5, 4, 3, 3)
    assert module.without_mid() is module


@pytest.mark.parametrize(
    ("target", "metadata", "family"),
    [
        (Target("unet", "mid_block.resnets.0.conv1"), {}, SD15),
        (Target("unet", "mid_block.resnets.0.conv1"), {"ss_base_model_version": "sdxl_base_v1-0"}, SDXL),
        (
            Target("unet", "mid_block.resnets.0.conv1"),
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
            SDXL,
        ),
        (Target("unet", "mid_block.attentions.0.transformer_blocks.9.attn1.to_q"), {}, SDXL),
        (Target("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"), {}, SDXL),
    ],
)
def test_the_family_is_what_metadata_or_modules_say(target: Target, metadata: dict[str, str], family: object) -> None:
    assert Adapter({target: random_module(4, 4)}, metadata).family is family
