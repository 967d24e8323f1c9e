"""Adapters computed in few operations are the adapters: the same outputs, the same gradients, and no copy outlives its pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from networks.families import UNET
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


def test_no_copy_outlives_its_backward_pass() -> None:
    """So that whoever computes next, the validation or a picture, computes with the weights as they are then."""
    unet, network = stirred()
    network.cast_together(torch.float32)
    unet(**unet_inputs()).sample.sum().backward()
    layers: list[Any] = list(network.layers.values())
    assert all(layer.at_work is None for layer in layers)
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
