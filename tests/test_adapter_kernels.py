"""Adapters computed in few operations are the adapters: the same outputs, the same gradients, and no copy outlives its pass."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from networks.families import UNET
from networks.kinds.lora_products import LoraLinears
from networks.network import Network, add_network
from networks.spec import NetworkSpec
from networks.targets import ADAPTER
from tests.tools.unets import small_unet, unet_inputs

LORA = NetworkSpec(rank=3, alpha=2.0, text_encoder=False)


def stirred(spec: NetworkSpec = LORA, dtype: torch.dtype = torch.float32) -> tuple[Any, Network]:
    unet = small_unet(dtype=dtype)
    network = add_network({UNET: unet}, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters.values():
        parameter.data.normal_(std=0.2, generator=generator)
    return unet, network


def as_written(layer: Any, x: Tensor) -> Tensor:
    """base + scale * up(down(x)), an operation for each sign."""
    down, up = (factor.to(x.dtype) for factor in layer.factors())
    if down.ndim == 2:
        return layer.base_layer(x) + x @ down.T @ up.T * layer.scale
    plain = torch.nn.functional.conv2d
    return (
        layer.base_layer(x)
        + plain(plain(x, down, None, layer.base_layer.stride, layer.base_layer.padding), up) * layer.scale
    )


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_every_layer_computes_the_product_and_its_gradients(multiplier: float) -> None:
    _, network = stirred(NetworkSpec(rank=3, alpha=2.0, conv_rank=2, text_encoder=False))
    network.set_multiplier(multiplier)
    generator = torch.Generator().manual_seed(2)
    kinds = set()
    for layer in network.layers.values():
        base: Any = layer.base_layer
        shape = (2, 5, base.in_features) if base.weight.ndim == 2 else (2, base.in_channels, 6, 4)
        for needs_input in (True, False):
            results = []
            x = torch.randn(shape, generator=generator)
            for compute in (layer, lambda x, layer=layer: as_written(layer, x)):
                x = x.detach().requires_grad_(needs_input)
                output = compute(x)  # type: ignore[operator]
                wanted = [*layer.factors(), *([x] if needs_input else [])]
                results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
            for ours, plain in zip(*results, strict=True):
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        kinds.add(type(base).__name__)
    assert kinds == {"Linear", "Conv2d"}


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cast_together_are_those_cast_one_by_one(dtype: torch.dtype) -> None:
    unet, network = stirred(dtype=dtype)
    for layer in network.layers.values():
        layer.together = None  # type: ignore[attr-defined]  # one product for several has a rounding of its own
    results = []
    for together in (False, True):
        if together:
            network.cast_together(dtype)
        output = unet(**unet_inputs(dtype)).sample
        output.float().square().mean().backward()
        results.append([output, *(p.grad for p in network.parameters.values())])
        for parameter in network.parameters.values():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            parameter.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_one_input_compute_together_what_each_does_alone(checkpointing: bool) -> None:
    results, calls = [], []
    for together in (False, True):
        unet, network = stirred()
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for layer in network.layers.values():
            layer.together = layer.together if together else None  # type: ignore[attr-defined]
        with mock.patch.object(LoraLinears, "forward", wraps=LoraLinears.forward) as products:
            network.cast_together(torch.float32)
            output = unet(**unet_inputs()).sample
            output.square().mean().backward()
        results.append([output, *(p.grad for p in network.parameters.values())])
        calls.append(products.call_count)
    for alone, joined in zip(*results, strict=True):
        torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-6)
    attentions = sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules())
    # One for q, k and v, and one for k and v of the text; a block that is recomputed computes twice.
    assert calls[0] - calls[1] == 3 * attentions * (1 + checkpointing)


def test_layers_that_are_given_different_inputs_after_all_compute_with_their_own() -> None:
    unet, network = stirred()
    attention = next(module for module in unet.modules() if type(module).__name__ == "Attention")
    first, second = torch.randn(2, 1, 5, attention.to_q.in_features).unbind()
    with torch.no_grad():
        wanted = [attention.to_q(first), attention.to_k(second), attention.to_v(first), attention.to_q(second)]
    network.cast_together(torch.float32)
    layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_q)
    for layer, x, alone in zip(layers, (first, second, first, second), wanted, strict=True):
        torch.testing.assert_close(layer(x), alone)


@pytest.mark.bits
def test_fresh_adapters_of_one_input_are_the_base() -> None:
    base, unet = small_unet(), small_unet()
    network = add_network({UNET: unet}, LORA, seed=0)
    network.cast_together(torch.float32)
    assert torch.equal(unet(**unet_inputs()).sample, base(**unet_inputs()).sample)


def test_no_copy_outlives_its_backward_pass() -> None:
    """So that whoever computes next, the validation or a picture, computes with the weights as they are then."""
    unet, network = stirred()
    network.cast_together(torch.float32)
    unet(**unet_inputs()).sample.sum().backward()
    layers: list[Any] = list(network.layers.values())
    assert all(layer.at_work is None and (layer.together is None or layer.together.downs is None) for layer in layers)
    network.cast_together(torch.float32)  # of a pass that does not come
    with torch.no_grad():
        before = unet(**unet_inputs()).sample
        for layer in layers:
            layer.lora_B[ADAPTER].weight.data.zero_()  # as some optimizers write them
        assert not torch.equal(unet(**unet_inputs()).sample, before)


@pytest.mark.bits
def test_a_recomputed_block_uses_the_copies_of_its_pass() -> None:
    results = []
    for checkpointing in (False, True):
        unet, network = stirred()
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        network.cast_together(torch.float32)
        unet(**unet_inputs()).sample.square().mean().backward()
        results.append([p.grad for p in network.parameters.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_layer_that_did_not_run_has_no_gradient() -> None:
    unet, network = stirred()
    first: Any = next(iter(network.layers.values()))
    first.enabled = False
    network.cast_together(torch.float32)
    unet(**unet_inputs()).sample.sum().backward()
    assert all(p.grad is None for p in first.factors())
    assert all(p.grad is not None for layer in network.layers.values() if layer is not first for p in layer.factors())
