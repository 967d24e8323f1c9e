"""Adapters folded into weights: the formulas, that they are what adapters do at run time, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.merging import merge
from library.merging.merge import (
    Part,
    all_finite,
    fold,
    fold_and_cast,
    fold_into_modules,
    in_rows,
    not_finite_as,
    place,
)
from library.merging.strength import Strength
from networks.adapter_module import AdapterModule
from networks.adapters import Adapter
from networks.families import SD15, SDXL, Family
from networks.kinds.full import FullModule
from networks.kinds.lora import LoraModule
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, Target
from tests.tools.adapters import cp_module, random_module, train_lora
from tests.tools.unets import small_unet, unet_inputs

SHAPES = [(5, 7), (5, 7, 1, 1), (5, 7, 3, 3)]


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dora(module: LoraModule, *, of_inputs: bool = False) -> LoraModule:
    out, inner, *kernel = module.shape
    shape = (1, inner, *(1 for _ in kernel)) if of_inputs else (out, 1, *(1 for _ in kernel))
    return replace(module, magnitude=1 + torch.rand(shape, generator=torch.Generator().manual_seed(8)))


def slowly(weight: Tensor, parts: list[Part]) -> np.ndarray:
    """W + sum of ratio * what each adapter adds, one weight at a time, in float64."""
    base = weight.double().numpy()
    merged = base.copy()
    for module, ratio in parts:
        merged += ratio * slow_delta(module, base)
    return merged


def slow_delta(module: LoraModule, base: np.ndarray) -> np.ndarray:
    down, up = (part.double().flatten(1).numpy() for part in (module.down, module.up))
    rank, product = module.down.shape[0], np.zeros_like(base)
    for o, i, *at in np.ndindex(*base.shape):
        if module.mid is not None:
            kernel = module.mid.double().numpy()[(slice(None), slice(None), *at)]
            terms = [up[o, m] * kernel[m, n] * down[n, i] for m in range(rank) for n in range(rank)]
        else:
            whole = module.down.double().numpy()
            terms = [up[o, r] * (whole[(r, i, *at)] if whole.ndim == base.ndim else whole[r, i]) for r in range(rank)]
        product[(o, i, *at)] = module.alpha / rank * sum(terms)
    if module.magnitude is None:
        return product
    # DoRA: the direction of W + product, of each output channel (LyCORIS also: input channel), at the length m.
    direction, magnitude, result = base + product, module.magnitude.double().numpy(), np.empty_like(base)
    axis = 0 if magnitude.shape[0] > 1 else 1
    for channel in range(base.shape[axis]):
        one = direction.take(channel, axis)
        length = float(magnitude.take(channel, axis).ravel()[0])
        result[(slice(None),) * axis + (channel,)] = length * one / np.sqrt((one**2).sum())
    return result - base


MODULES = {
    "linear": random_module(5, 7),
    "convolution_1x1": random_module(5, 7, 1, 1),
    "convolution_3x3": random_module(5, 7, 3, 3),
    "cp": cp_module(5, 7),
    "dora": dora(random_module(5, 7)),
    "dora_of_inputs": dora(random_module(5, 7), of_inputs=True),
    "dora_3x3": dora(random_module(5, 7, 3, 3)),
    "dora_of_inputs_3x3": dora(random_module(5, 7, 3, 3), of_inputs=True),
    "dora_cp": dora(cp_module(5, 7)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("ratio", [1.0, 0.7, -0.3])
def test_a_merged_weight_is_the_formula(kind: str, ratio: float) -> None:
    module = MODULES[kind]
    weight = weight_of(*module.shape)
    expected = slowly(weight, [(module, ratio)])
    np.testing.assert_allclose(fold(weight, [(module, ratio)]).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.bits
@pytest.mark.parametrize("kinds", [("convolution_3x3", "cp", "dora_3x3"), ("linear", "dora", "linear")])
def test_several_adapters_add_up_each_with_its_ratio_in_any_order(kinds: tuple[str, ...]) -> None:
    parts = [(MODULES[kind], ratio) for kind, ratio in zip(kinds, (0.7, 0.3, -0.5), strict=True)]
    weight = weight_of(*parts[0][0].shape)
    expected = slowly(weight, parts)
    for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        found = fold(weight, [parts[i] for i in order])
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(fold(weight, parts[:2]), fold(weight, parts[1::-1]))


@pytest.mark.bits
@pytest.mark.parametrize("kind", MODULES)
def test_twice_is_twice_the_ratio_and_minus_one_undoes_it(kind: str) -> None:
    module = MODULES[kind]
    weight = weight_of(*module.shape)
    twice = fold(weight, [(module, 1.0), (module, 1.0)])
    torch.testing.assert_close(twice, fold(weight, [(module, 2.0)]), rtol=1e-6, atol=1e-6)
    assert torch.equal(fold(weight, [(module, 1.0), (module, -1.0)]), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_merge_adds_to_the_first_and_minus_one_takes_it_away(shape: tuple[int, ...]) -> None:
    weight, module = weight_of(*shape), random_module(*shape)
    once = fold(weight, [(module, 1.0)])
    largest = float(once.abs().max())
    torch.testing.assert_close(fold(once, [(module, -1.0)]), weight, rtol=0, atol=2e-7 * largest)
    twice = fold(once, [(module, 1.0)])
    torch.testing.assert_close(twice, fold(weight, [(module, 2.0)]), rtol=0, atol=4e-7 * float(twice.abs().max()))


@pytest.mark.bits
@pytest.mark.parametrize("kind", MODULES)
def test_ratio_zero_is_the_base_to_the_bit(kind: str) -> None:
    module = MODULES[kind]
    shapes = {UNET: {"x.weight": module.shape, "y.weight": module.shape}}
    adapter = Adapter({Target(UNET, "x"): module, Target(UNET, "y"): module})
    assert place([(adapter, Strength(0.0))], shapes, SD15) == {UNET: {}}
    folds = place([(adapter, Strength(0.0)), (adapter, Strength(1.0))], shapes, SD15)
    assert folds == {UNET: {"x.weight": [(module, 1.0)], "y.weight": [(module, 1.0)]}}


@pytest.mark.bits
@pytest.mark.parametrize("shape", SHAPES)
def test_an_untrained_adapter_changes_nothing(shape: tuple[int, ...]) -> None:
    weight, module = weight_of(*shape), random_module(*shape)
    merged, change = fold_and_cast(
        UNET, "x", weight, [(replace(module, up=torch.zeros_like(module.up)), 1.0)], weight.dtype
    )
    assert torch.equal(merged, weight) and change.relative == 0.0


@pytest.mark.bits
def test_a_weight_is_rounded_once() -> None:
    """From bfloat16 through float32 to float16, not through bfloat16 again."""
    weight, module = weight_of(5, 7).bfloat16(), random_module(5, 7).product()
    adapter = random_module(5, 7)
    merged, _ = fold_and_cast(UNET, "x", weight, [(adapter, 1.0)], torch.float16)
    assert torch.equal(merged, (weight.float() + module).half())


def test_changes_are_relative_to_the_weight() -> None:
    weight, module = weight_of(5, 7), random_module(5, 7)
    _, change = fold_and_cast(UNET, "x", weight, [(module, 1.0)], weight.dtype)
    assert change.relative == pytest.approx(float(module.product().norm() / weight.norm()), rel=1e-5)
    _, change = fold_and_cast(UNET, "x", torch.zeros(5, 7), [(module, 1.0)], weight.dtype)
    assert change.relative == 1.0, "where there was nothing, all of it is the change"


@pytest.mark.bits
@pytest.mark.parametrize("rows", [16, 33, 100, 113])
@pytest.mark.parametrize("kind", ["linear", "convolution_3x3", "cp", "full"])
def test_pieces_of_rows_give_the_bits_of_the_whole(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "linear": lambda: random_module(rows, 40),
        "convolution_3x3": lambda: random_module(rows, 40, 3, 3),
        "cp": lambda: cp_module(rows, 40),
        "full": lambda: FullModule(weight_of(rows, 40, seed=3)),
    }
    module: AdapterModule = made[kind]()
    weight, parts = weight_of(*module.shape), [(module, 0.7), (random_module(*module.shape), -0.3)]
    monkeypatch.setattr(merge, "_PIECE", 1)
    pieces = list(in_rows(weight.shape, parts))
    assert [piece.start for piece, _ in pieces] == [start for start in range(0, rows, 16) if rows - start >= 16]
    assert torch.equal(torch.cat([fold(weight[piece], own) for piece, own in pieces]), fold(weight, parts))


@pytest.mark.parametrize("kind", ["dora", "dora_of_inputs_3x3"])
def test_what_needs_the_whole_weight_gets_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_PIECE", 1)
    parts: list[Part] = [(random_module(40, 7), 1.0), (MODULES[kind], 1.0)]
    assert list(in_rows((40, 7), parts)) == [(slice(None), parts)]


def fold_in(unet: nn.Module, adapter: Adapter, ratio: float) -> int:
    return len(fold_into_modules({UNET: unet}, SD15, adapter, ratio))


def test_folded_modules_compute_as_adapters_do_at_run_time() -> None:
    adapted, folded = small_unet(), small_unet()
    adapter = train_lora(adapted, size=0.3).adapter()
    with torch.no_grad():
        base, expected = (unet(**unet_inputs()).sample for unet in (folded, adapted))
        assert fold_in(folded, adapter, 1.0) == len(adapter.modules) == 277
        torch.testing.assert_close(folded(**unet_inputs()).sample, expected, atol=2e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01


def test_folding_with_minus_one_undoes_it() -> None:
    unet, before = small_unet(), small_unet().state_dict()
    adapter = train_lora(small_unet()).adapter()
    for ratio in (1.0, -1.0):
        fold_in(unet, adapter, ratio)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------ what is refused


def shapes_of(unet: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    return {UNET: {name: tuple(value.shape) for name, value in unet.state_dict().items()}}


TO_K = Target(UNET, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
PROJ_IN = Target(UNET, "mid_block.attentions.0.proj_in")
FC1, FC1_2 = (Target(te, "text_model.encoder.layers.0.mlp.fc1") for te in (TEXT_ENCODER, TEXT_ENCODER_2))
NEW = [Target(UNET, f"mid_block.resnets.{i}.conv1") for i in range(7, 11)]


@pytest.mark.bits
@pytest.mark.parametrize(
    ("modules", "family", "sentence"),
    [
        (
            {PROJ_IN: random_module(16, 16), FC1_2: random_module(2, 2)},
            SD15,
            "1 of 2 LoRA modules have no place in this checkpoint (first: lora_te2_text_model_encoder_layers_0_mlp_fc1). "
            "It looks like an SDXL LoRA on an SD1.5 model.",
        ),
        ({TO_K: random_module(16, 2048)}, SD15, "It looks like an SDXL LoRA on an SD1.5 model."),
        ({TO_K: random_module(16, 1024)}, SD15, "It looks like an SD2 LoRA on an SD1.5 model."),
        (
            {FC1: random_module(2, 2)},
            SD15,
            "1 of 1 LoRA modules have no place in this checkpoint (first: lora_te_text_model_encoder_layers_0_mlp_fc1). "
            "They are of a text encoder that this base does not have.",
        ),
        ({NEW[0]: random_module(2, 2)}, SDXL, "It looks like an SD1.5 LoRA on an SDXL model."),
        (
            {PROJ_IN: random_module(1280, 1280, 1, 1)},
            SD15,
            "lora_unet_mid_block_attentions_0_proj_in is for a weight [1280, 1280, 1, 1], the base has [16, 16, 1, 1]: it "
            "was trained on a model of another size.",
        ),
        (
            {target: random_module(2, 2) for target in NEW},
            SD15,
            "4 of 4 LoRA modules have no place in this checkpoint (first: lora_unet_mid_block_resnets_10_conv1, "
            "lora_unet_mid_block_resnets_7_conv1, lora_unet_mid_block_resnets_8_conv1). It was made for another kind of "
            "model, or for layers this base does not have.",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_a_guess_why(
    modules: dict[Target, LoraModule], family: Family, sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        place([(Adapter(modules), Strength())], shapes_of(small_unet()), family)


def test_a_module_that_its_own_family_does_not_have_is_named_by_its_path() -> None:
    """SDXL has no fourth level, so the original code has no name for it."""
    adapter = Adapter(
        {Target(UNET, "down_blocks.3.resnets.0.conv3"): random_module(2, 2)},
        {"ss_base_model_version": "sdxl_base_v1-0"},
    )
    with pytest.raises(
        UserError, match=r"first: unet\.down_blocks\.3\.resnets\.0\.conv3\)\. It looks like an SDXL LoRA"
    ):
        place([(adapter, Strength())], shapes_of(small_unet()), SD15)


@pytest.mark.bits
def test_an_adapter_that_does_not_fit_is_refused_even_at_ratio_zero_and_changes_nothing() -> None:
    unet = small_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    adapter = Adapter({PROJ_IN: random_module(16, 16, 1, 1), NEW[0]: random_module(2, 2)})
    for ratio in (0.0, 1.0):
        with pytest.raises(UserError, match="1 of 2 LoRA modules have no place"):
            fold_in(unet, adapter, ratio)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_matrix_fits_a_1x1_convolution() -> None:
    """SD2-style files keep proj_in as Linear; kohya's merge squeezes the same way."""
    folds = place([(Adapter({PROJ_IN: random_module(16, 16)}), Strength())], shapes_of(small_unet()), SD15)
    assert folds[UNET].keys() == {f"{PROJ_IN.path}.weight"}


@pytest.mark.bits
@pytest.mark.parametrize(
    ("weight", "dtype", "sentence"),
    [
        (6e4, torch.float16, "x has values that are not finite as float16. Try --save_precision float."),
        (torch.nan, torch.float32, "x of the base has values that are not finite: the base is damaged."),
    ],
)
def test_a_value_that_does_not_fit_its_format_is_refused(weight: float, dtype: torch.dtype, sentence: str) -> None:
    module = LoraModule(torch.full((1, 2), 100.0), torch.full((2, 1), 100.0), 1.0)
    with pytest.raises(UserError, match=re.escape(sentence)):
        fold_and_cast(UNET, "x", torch.full((2, 2), weight), [(module, 1.0)], dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64]
)
def test_finite_is_what_isfinite_says(dtype: torch.dtype) -> None:
    values = torch.arange(9).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    if dtype.is_floating_point:
        values[4] = torch.nan
        assert not all_finite(values)


def test_a_wider_format_is_offered_where_there_is_one() -> None:
    assert not_finite_as(torch.float16) == "has values that are not finite as float16. Try --save_precision float."
    sentence = "has values that are not finite as {}. The adapter or its ratio is too large."
    assert [not_finite_as(dtype) for dtype in (torch.float32, torch.float64)] == [
        sentence.format(name) for name in ("float32", "float64")
    ]
