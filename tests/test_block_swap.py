"""Blocks whose weights are swapped: what is where when, and that a step computes the same. The device is memory of its own."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from library.models.block_swap import BlockSwap, chosen_blocks, frozen_weights, saved_bytes, swap_blocks, swappable
from library.models.configs import configs_of
from library.models.frozen import encode, freeze_layers
from library.quiet import quiet_libraries
from networks.families import SD15, SDXL, Family
from networks.network import add_network
from networks.spec import NetworkSpec

quiet_libraries()


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "layers_per_block": 1,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    }
    sizes |= {"up_block_types": ["CrossAttnUpBlock2D"] * 2, "attention_head_dim": 4, "cross_attention_dim": 16}
    unet = UNet2DConditionModel.from_config({**configs_of(SD15).unet, **sizes})
    return unet.requires_grad_(False)


def forward(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    output: Tensor = unet(x, torch.tensor([7]), text, return_dict=False)[0]
    return output


def train(unet: nn.Module) -> list[Tensor]:
    """Output and gradients of a pass through the U-Net and back."""
    output = forward(unet)
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in unet.parameters() if p.grad is not None)]


def lora(unet: nn.Module) -> None:
    network = add_network({"unet": unet}, NetworkSpec(family="sd15", rank=2, alpha=2, scope="all", targets="kohya"), 0)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def swapped_unet(checkpointing: bool, name: str | None = None) -> UNet2DConditionModel:
    """With adapters, ready to have blocks swapped."""
    unet = tiny_unet()
    if name is not None:
        encode(unet, name, torch.float32)
    lora(unet)
    freeze_layers(unet, linear=True)  # as a run on a CPU has them
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


@pytest.mark.bits
@pytest.mark.parametrize(("checkpointing", "name"), [(False, None), (True, None), (True, "nf4")])
def test_a_step_with_swapped_blocks_is_the_step_without_to_the_bit(checkpointing: bool, name: str | None) -> None:
    results = []
    for count in (None, 3, 15):
        unet = swapped_unet(checkpointing, name)
        if count is not None:
            assert len(swappable(unet)) == 15
            swap_blocks(unet, count)
        result = train(unet)
        with torch.no_grad():
            result.append(forward(unet))
        results.append([*result, *train(unet)])
    assert len(results[0]) > 100
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_next_block_comes_while_one_computes_and_no_more_than_two_are_there(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = swapped_unet(checkpointing)
    blocks = chosen_blocks(unet, 5)
    turns: list[tuple[int, bool, set[int]]] = []
    enter = BlockSwap.enter

    def recorded(swap: BlockSwap, block: nn.Module, direction: int) -> None:
        again, ready = block is swap._turn, block in swap._taken
        enter(swap, block, direction)
        there = {other for other in blocks if all(weight.numel() for weight in frozen_weights(other))}
        assert {block} <= there <= swap._taken.keys()
        if not again:
            turns.append((blocks.index(block), ready, {blocks.index(other) for other in swap._taken}))

    monkeypatch.setattr(BlockSwap, "enter", recorded)
    swap_blocks(unet, 5)
    train(unet)
    # As the U-Net computes, which is not as it is built: its middle is built last.
    order = [number for number, _, _ in turns[:5]]
    a, b, c, d, e = order
    assert sorted(order) == [0, 1, 2, 3, 4] and order != [0, 1, 2, 3, 4]
    assert turns[0] == (a, False, {a})
    back = [(d, True, {d, c}), (c, True, {c, b}), (b, True, {b, a}), (a, True, {a, b})]
    assert turns[5:] == back
    forth = [(b, True, {b, c}), (c, True, {c, d}), (d, True, {d, e})]
    turns.clear()
    train(unet)
    assert turns == [*forth, (e, True, {e, d}), *back]
    turns.clear()
    with torch.no_grad():
        forward(unet)
        assert turns == [*forth, (e, True, {e, a})]
    turns.clear()
    train(unet)
    assert turns == [(a, True, {a, b}), *forth, (e, True, {e, d}), *back]


def test_a_weight_that_is_not_there_cannot_be_computed_with() -> None:
    unet = swapped_unet(False)
    swap_blocks(unet, 5)
    assert all(weight.numel() == 0 for block in chosen_blocks(unet, 5) for weight in frozen_weights(block))
    with pytest.raises((RuntimeError, IndexError)):
        chosen_blocks(unet, 5)[1].forward(torch.randn(1, 32, 8, 8), torch.randn(1, 128))


@pytest.mark.parametrize(("family", "blocks"), [(SD15, 38), (SDXL, 87)])
def test_blocks_are_spread_over_the_unet_and_what_they_save_is_counted(family: Family, blocks: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs_of(family).unet).requires_grad_(False)
    every = swappable(unet)
    assert len(every) == blocks and chosen_blocks(unet, blocks) == every
    assert [every.index(block) for block in chosen_blocks(unet, blocks // 2)][:3] == [0, 2, 4]
    layers = [layer for block in every for layer in block.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    sizes = [sum(layer.weight.nbytes for layer in block.modules() if layer in layers) for block in every]
    assert saved_bytes(unet, blocks) == sum(sizes) - 2 * max(sizes)
