"""Feature maps of the U-Net at its taps: what they are, what shapes they have, and that hooks never stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import AdapterError
from networks.features import TIME, capture
from networks.taps import TapShape, tap_channels
from tests.tools.unets import SD15, small_unet, unet_inputs

TAPS = ("enc_last", "mid", "dec_first")


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return small_unet()


def hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in unet.modules())


def test_taps_of_sd15_have_the_documented_shapes() -> None:
    assert tap_channels(SD15, TAPS) == {
        "enc_last": TapShape(channels=1280, stride=8),  # 8x8 from latents of 64x64
        "mid": TapShape(channels=1280, stride=8),
        "dec_first": TapShape(channels=1280, stride=4),  # 16x16
    }


def test_every_block_can_be_a_tap() -> None:
    shapes = tap_channels(SD15, ["down_blocks.0", "down_blocks.2", "up_blocks.1", "up_blocks.3"])
    assert [(shape.channels, shape.stride) for shape in shapes.values()] == [(320, 2), (1280, 8), (1280, 2), (320, 1)]


def test_captured_maps_have_the_announced_shapes(unet: nn.Module) -> None:
    inputs = unet_inputs()
    blocks = range(len(unet.config["block_out_channels"]))  # type: ignore[index]
    every = ["mid", *(f"{kind}_blocks.{number}" for kind in ("down", "up") for number in blocks)]
    with capture(unet, [*TAPS, *every, TIME]) as features, torch.no_grad():
        unet(**inputs)
    size = inputs["sample"].shape[-1]
    assert features[TIME].shape == (2, 4 * unet.config["block_out_channels"][0])  # type: ignore[index]
    for tap, shape in (tap_channels(unet.config, TAPS) | tap_channels(unet.config, every)).items():  # type: ignore[arg-type]
        assert features[tap].shape == (2, shape.channels, size // shape.stride, size // shape.stride)


@pytest.mark.bits
def test_captured_maps_are_what_the_blocks_return(unet: nn.Module) -> None:
    seen: dict[str, torch.Tensor] = {}
    inner = unet.mid_block.register_forward_hook(
        lambda module, inputs, output: seen.update(mid=output, enc_last=inputs[0])
    )
    with capture(unet, TAPS) as features, torch.no_grad():
        unet(**unet_inputs())
    inner.remove()
    assert torch.equal(features["mid"], seen["mid"])
    assert torch.equal(features["enc_last"], seen["enc_last"])


def test_each_pass_replaces_the_maps_of_the_one_before(unet: nn.Module) -> None:
    with capture(unet, ["mid"]) as features, torch.no_grad():
        unet(**unet_inputs(batch=2))
        unet(**unet_inputs(batch=1))
    assert features["mid"].shape[0] == 1


def test_gradients_reach_the_input_through_a_captured_map(unet: nn.Module) -> None:
    inputs = unet_inputs()
    inputs["sample"].requires_grad_()
    with capture(unet, ["mid"]) as features:
        unet(**inputs)
    features["mid"].sum().backward()
    assert inputs["sample"].grad is not None and inputs["sample"].grad.abs().sum() > 0


def test_hooks_are_gone_when_the_context_ends(unet: nn.Module) -> None:
    with capture(unet, TAPS):
        assert hooks(unet) == 3
    assert hooks(unet) == 0


def test_hooks_are_gone_after_an_exception(unet: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="out of paper"), capture(unet, TAPS):
        raise RuntimeError("out of paper")
    assert hooks(unet) == 0


@pytest.mark.bits
def test_capturing_leaves_the_output_as_it_is(unet: nn.Module) -> None:
    with torch.no_grad():
        expected = unet(**unet_inputs()).sample
        with capture(unet, TAPS):
            assert torch.equal(unet(**unet_inputs()).sample, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_maps_are_captured_around_compiled_code(whole: bool) -> None:
    """The eager backend runs what torch.compile traced: it shows whether hooks survive tracing, without a compiler."""
    unet = small_unet()
    with torch.no_grad(), capture(unet, ["mid"]) as features:
        unet(**unet_inputs())
        expected = features.pop("mid")
        if whole:
            unet.compile(backend="eager")
        else:
            unet.compile_repeated_blocks(backend="eager")
        for _ in range(2):
            features.clear()
            unet(**unet_inputs())
            torch.testing.assert_close(features["mid"], expected)


def test_gradient_checkpointing_captures_maps_once() -> None:
    unet = small_unet().train()
    unet.enable_gradient_checkpointing()
    calls = []
    counter = unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    inputs = unet_inputs()
    inputs["sample"].requires_grad_()
    with capture(unet, ["mid"]) as features:
        unet(**inputs)
        features["mid"].sum().backward()
    counter.remove()
    assert len(calls) == 1


def test_a_map_that_was_not_captured_says_why(unet: nn.Module) -> None:
    with (
        pytest.raises(AdapterError, match="No feature map was captured at mid: the U-Net has not run inside capture"),
        capture(unet, ["mid"]) as features,
    ):
        _ = features["mid"]


def test_an_unknown_tap_is_refused(unet: nn.Module) -> None:
    with pytest.raises(
        AdapterError, match="A tap must be enc_last, mid, dec_first, down_blocks.N or up_blocks.N, got 'middle'"
    ):
        tap_channels(SD15, ["middle"])
    with pytest.raises(AdapterError, match="got 'middle'"), capture(unet, ["middle"]):
        pass


def test_a_place_that_is_not_there_or_named_twice_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"no up_blocks.4: it goes from up_blocks.0 to up_blocks.3"):
        tap_channels(SD15, ["up_blocks.4"])
    with pytest.raises(
        AdapterError, match=r"taps enc_last and down_blocks.3 are one place in this U-Net. Name it once"
    ):
        tap_channels(SD15, ["enc_last", "mid", "down_blocks.3"])
