"""Adapters inside the U-Net: where they sit, how many, what they start from and in what dtype they compute."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from networks import AdapterError
from networks.lora import LoraSpec, add_lora, lora_disabled, remove_lora, target_modules
from tests.tools.unets import sd15_unet_without_weights, small_unet, unet_inputs

EVERYTHING = LoraSpec(rank=4, alpha=2.0, scope="all", targets="kohya", conv_rank=2, conv_alpha=1.0)


def run(unet: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return unet(**unet_inputs(dtype)).sample


def fill(params: dict[str, nn.Parameter], size: float = 0.3) -> None:
    """Give B weights that are not zero, as training would."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in params.items():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("spec", "modules", "parameters"),
    [
        (LoraSpec(scope="mid"), 8, 155_648),
        (LoraSpec(scope="down_mid"), 56, 731_136),
        (LoraSpec(scope="all"), 128, 1_594_368),
        (LoraSpec(scope="all", targets="kohya"), 192, 3_391_488),
        (LoraSpec(scope="all", targets="kohya", conv_rank=4), 278, 6_230_528),
    ],
)
def test_sd15_gets_the_documented_numbers_of_modules_and_parameters(
    spec: LoraSpec, modules: int, parameters: int
) -> None:
    params = add_lora(sd15_unet_without_weights(), spec, seed=0)
    assert len(params) == 2 * modules
    assert sum(parameter.numel() for parameter in params.values()) == parameters


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [LoraSpec(), EVERYTHING])
def test_a_new_adapter_leaves_the_output_to_the_bit(dtype: torch.dtype, spec: LoraSpec) -> None:
    unet = small_unet(dtype=dtype)
    base = run(unet, dtype)
    add_lora(unet, spec, seed=0)
    assert torch.equal(run(unet, dtype), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_is_trained_and_in_float32(dtype: torch.dtype) -> None:
    unet = small_unet(dtype=dtype).requires_grad_(True)
    params = add_lora(unet, EVERYTHING, seed=0)
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained.keys() == params.keys()
    assert all(parameter is params[name] for name, parameter in trained.items())
    assert {parameter.dtype for parameter in params.values()} == {torch.float32}
    assert {parameter.dtype for name, parameter in unet.named_parameters() if name not in params} == {dtype}


def test_adapters_of_a_bfloat16_base_compute_in_bfloat16() -> None:
    unet = small_unet(dtype=torch.bfloat16)
    fill(add_lora(unet, EVERYTHING, seed=0))
    dtypes = []
    for name, module in unet.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            module.register_forward_hook(lambda module, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    run(unet, torch.bfloat16)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_trained_weight_gets_a_float32_gradient(dtype: torch.dtype) -> None:
    unet = small_unet(dtype=dtype).train()
    params = add_lora(unet, EVERYTHING, seed=0)
    fill(params)
    unet(**unet_inputs(dtype)).sample.float().square().mean().backward()
    for name, parameter in params.items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spec", [LoraSpec(rank=4, alpha=2.0, scope="all"), EVERYTHING])
def test_an_adapter_adds_scaled_up_down_to_each_layer(spec: LoraSpec) -> None:
    """Each adapted layer against the formula, on its own, in float64."""
    unet = small_unet()
    params = add_lora(unet, spec, seed=0)
    fill(params)
    generator = torch.Generator().manual_seed(0)
    layers = target_modules(small_unet(), spec)
    assert len(params) == 2 * len(layers)
    for path, layer in layers.items():
        down, up = (params[f"{path}.lora_{part}.default.weight"].detach().double() for part in "AB")
        if down.shape[2:] == (3, 3):
            rank, scale = 2, 1.0 / 2
        else:
            rank, scale = 4, 2.0 / 4
        assert down.shape[0] == up.shape[1] == rank
        weight = layer.weight.double() + scale * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        bias = None if layer.bias is None else layer.bias.double()
        x = torch.randn(
            (2, weight.shape[1], 6, 6) if weight.ndim == 4 else (2, 5, weight.shape[1]), generator=generator
        )
        if isinstance(layer, nn.Conv2d):
            expected = nn.functional.conv2d(x.double(), weight, bias, layer.stride, layer.padding)
        else:
            expected = nn.functional.linear(x.double(), weight, bias)
        with torch.no_grad():
            torch.testing.assert_close(unet.get_submodule(path)(x), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.bits
def test_initial_weights_follow_from_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one = add_lora(small_unet(), LoraSpec(scope="mid"), seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = add_lora(small_unet(dtype=torch.bfloat16), LoraSpec(scope="all"), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    other = add_lora(small_unet(), LoraSpec(scope="mid"), seed=6)
    for name, parameter in one.items():
        assert torch.equal(parameter, two[name])
        if ".lora_A." in name:
            assert not torch.equal(parameter, other[name])
            assert 0 < parameter.abs().max() <= parameter[0].numel() ** -0.5
        else:
            assert not parameter.any()


@pytest.mark.bits
def test_adapters_train_from_the_same_names_after_saving_and_loading() -> None:
    unet, again = small_unet(), small_unet()
    params = add_lora(unet, EVERYTHING, seed=0)
    fill(params)
    fresh = add_lora(again, EVERYTHING, seed=1)
    again.load_state_dict(dict(params), strict=False)
    assert fresh.keys() == params.keys()
    assert torch.equal(run(again), run(unet))


@pytest.mark.bits
def test_removing_gives_the_base_back() -> None:
    unet = small_unet()
    base, names = run(unet), list(unet.state_dict())
    fill(add_lora(unet, EVERYTHING, seed=0))
    assert not torch.equal(run(unet), base)
    remove_lora(unet)
    assert torch.equal(run(unet), base)
    assert list(unet.state_dict()) == names
    add_lora(unet, LoraSpec(), seed=0)  # and adapters can be put on again


@pytest.mark.bits
def test_a_disabled_adapter_is_the_base_and_stays_trained() -> None:
    unet = small_unet()
    base = run(unet)
    params = add_lora(unet, EVERYTHING, seed=0)
    fill(params)
    frozen = next(iter(params.values())).requires_grad_(False)
    adapted = run(unet)
    with pytest.raises(RuntimeError, match="interrupted"), lora_disabled(unet):
        assert torch.equal(run(unet), base)
        raise RuntimeError("interrupted")
    assert torch.equal(run(unet), adapted)
    assert [parameter.requires_grad for parameter in params.values()] == [
        parameter is not frozen for parameter in params.values()
    ]


@pytest.mark.bits
def test_a_model_that_is_not_in_training_drops_nothing() -> None:
    unet, plain = small_unet(), small_unet()
    fill(add_lora(unet, LoraSpec(dropout=0.5), seed=0))
    fill(add_lora(plain, LoraSpec(), seed=0))
    assert torch.equal(run(unet), run(plain))
    assert not torch.equal(run(unet.train()), run(plain.train()))


def test_a_specification_survives_json() -> None:
    assert LoraSpec.from_json(EVERYTHING.to_json()) == EVERYTHING


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LoraSpec(rank=0), "LoRA rank must be positive, got 0."),
        (lambda: LoraSpec(alpha=float("nan")), "LoRA alpha must be positive, got nan."),
        (lambda: LoraSpec(conv_rank=-1), "LoRA conv_rank must be positive, got -1."),
        (lambda: LoraSpec(dropout=1.0), "LoRA dropout must be at least 0 and below 1, got 1.0."),
        (lambda: LoraSpec(scope="up"), "LoRA scope must be one of mid, down_mid, all, got 'up'."),  # type: ignore[arg-type]
        (lambda: LoraSpec(targets="ff"), "LoRA targets must be one of attention, kohya, got 'ff'."),  # type: ignore[arg-type]
        (
            lambda: LoraSpec.from_json('{"rank": 4, "dora": true}'),
            "LoRA specification has unknown entries: dora. It is of a newer version.",
        ),
        (lambda: LoraSpec.from_json("{"), "LoRA specification is not valid JSON: "),
        (
            lambda: add_lora(nn.Linear(2, 2), LoraSpec(), seed=0),
            "LoRA of scope mid on attention finds no module in a Linear.",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        make()


def test_a_second_adapter_is_refused() -> None:
    unet = small_unet()
    add_lora(unet, LoraSpec(), seed=0)
    with pytest.raises(AdapterError, match="The model has LoRA adapters already; remove_lora takes them off."):
        add_lora(unet, LoraSpec(), seed=0)
