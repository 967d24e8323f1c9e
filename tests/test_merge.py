"""Adapters folded into weights: the formula, that it is what adapters do at run time, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.merging.merge import fold, fold_into_modules, merge_adapter, place
from networks.adapter_file import Adapter, LoraModule
from networks.lora import target_modules
from networks.names import kohya_name
from tests.tools.adapters import SPEC, random_module, train_lora
from tests.tools.unets import small_unet, unet_inputs


def adapter_of(params: Mapping[str, Tensor]) -> Adapter:
    modules = {}
    for name in params:
        if ".lora_A." in name:
            down, up = params[name], params[name.replace("lora_A", "lora_B")]
            modules[kohya_name(name.split(".lora_A.")[0])] = LoraModule(
                down, up, 1.0 if down.shape[2:] == (3, 3) else 2.0
            )
    return Adapter(modules)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1, 1), (5, 7, 3, 3)])
def test_a_merged_weight_is_the_formula(shape: tuple[int, ...]) -> None:
    """W + ratio * alpha / rank * sum over r of up[o, r] * down[r, i, y, x], one weight at a time, in float64."""
    module = random_module(*shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up, down, expected = (value.double().numpy().copy() for value in (module.up, module.down, weight))
    for place_ in np.ndindex(*shape):
        for r in range(module.rank):
            up_value = up[(place_[0], r) + (0,) * (len(shape) - 2)]
            expected[place_] += 0.7 * (2.0 / 3) * up_value * down[(r, *place_[1:])]
    np.testing.assert_allclose(fold(weight, module, 0.7).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_is_rounded_once() -> None:
    """From bfloat16 through float32 to float16, not through bfloat16 again."""
    weight, module = torch.randn(5, 7).bfloat16(), random_module(5, 7)
    weights = {"x.weight": weight}
    merge_adapter(weights, {"x.weight": module}, 1.0, torch.float16)
    assert torch.equal(weights["x.weight"], fold(weight.float(), module, 1.0).half())


def test_ratio_zero_is_the_base_to_the_bit() -> None:
    weights = {name: value.clone() for name, value in small_unet().state_dict().items()}
    before = {name: value.clone() for name, value in weights.items()}
    modules = {
        f"{path}.weight": random_module(*layer.weight.shape)
        for path, layer in target_modules(small_unet(), SPEC).items()
    }
    changes = merge_adapter(weights, modules, 0.0)
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert {change.relative for change in changes} == {0.0}


def test_changes_are_relative_to_the_weight() -> None:
    weight, module = torch.randn(5, 7), random_module(5, 7)
    (change,) = merge_adapter({"x.weight": weight}, {"x.weight": module}, 1.0)
    assert change.relative == pytest.approx(
        float((fold(weight, module, 1.0) - weight).norm() / weight.norm()), rel=1e-5
    )


def test_folded_modules_compute_as_adapters_do_at_run_time() -> None:
    adapted, folded = small_unet(), small_unet()
    adapter = adapter_of(train_lora(adapted, size=0.3))
    with torch.no_grad():
        base, expected = (unet(**unet_inputs()).sample for unet in (folded, adapted))
        assert len(fold_into_modules(folded, None, adapter, 1.0)) == len(adapter.modules)
        torch.testing.assert_close(folded(**unet_inputs()).sample, expected, atol=2e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01


def test_folding_with_minus_one_undoes_it() -> None:
    unet, before = small_unet(), small_unet().state_dict()
    adapter = adapter_of(train_lora(small_unet()))
    for ratio in (1.0, -1.0):
        fold_into_modules(unet, None, adapter, ratio)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def shapes_of(unet: nn.Module) -> Mapping[str, Any]:
    return {"unet": {name: value.shape for name, value in unet.state_dict().items()}}


def adapter_with(**modules: LoraModule) -> Adapter:
    return Adapter(modules)


PROJ_IN = "lora_unet_mid_block_attentions_0_proj_in"
TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (
            adapter_with(**{PROJ_IN: random_module(16, 16), "lora_te2_text_model_x": random_module(2, 2)}),
            "1 of 2 LoRA modules have no place in this checkpoint (first: lora_te2_text_model_x). "
            "It looks like an SDXL LoRA on an SD1.5 model.",
        ),
        (adapter_with(**{TO_K: random_module(16, 2048)}), "It looks like an SDXL LoRA on an SD1.5 model."),
        (adapter_with(**{TO_K: random_module(16, 1024)}), "It looks like an SD2 LoRA on an SD1.5 model."),
        (
            adapter_with(lora_te_text_model_x=random_module(2, 2)),
            "1 of 1 LoRA modules have no place in this checkpoint (first: lora_te_text_model_x). "
            "They are of a text encoder that this base does not have.",
        ),
        (
            adapter_with(**{PROJ_IN: random_module(1280, 1280, 1, 1)}),
            f"{PROJ_IN} is for a weight [1280, 1280, 1, 1], the base has [16, 16, 1, 1]: it was trained on a model of "
            "another size.",
        ),
        (
            adapter_with(**{f"lora_unet_blocks_{i}": random_module(2, 2) for i in range(4)}),
            "4 of 4 LoRA modules have no place in this checkpoint (first: lora_unet_blocks_0, lora_unet_blocks_1, "
            "lora_unet_blocks_2). It was made for another kind of model, or for layers this base does not have.",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_a_guess_why(adapter: Adapter, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        place(adapter, shapes_of(small_unet()))


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    unet = small_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    adapter = adapter_with(**{PROJ_IN: random_module(16, 16, 1, 1), "lora_unet_x": random_module(2, 2)})
    with pytest.raises(UserError, match="1 of 2 LoRA modules have no place"):
        fold_into_modules(unet, None, adapter, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_matrix_fits_a_1x1_convolution() -> None:
    """SD2-style files keep proj_in as Linear; kohya's merge squeezes the same way."""
    assert place(adapter_with(**{PROJ_IN: random_module(16, 16)}), shapes_of(small_unet()))["unet"]


def test_a_weight_that_overflows_its_format_is_refused() -> None:
    weights = {"x.weight": torch.full((2, 2), 6e4)}
    module = LoraModule(torch.full((1, 2), 100.0), torch.full((2, 1), 100.0), 1.0)
    with pytest.raises(
        UserError, match="x.weight has values that are not finite as torch.float16. Try --save_precision float."
    ):
        merge_adapter(weights, {"x.weight": module}, 1.0, torch.float16)
