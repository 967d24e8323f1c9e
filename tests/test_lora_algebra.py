"""Sums of adapters and lower ranks, against full products and torch.linalg.svd."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.merging.algebra import DynamicRank, concatenate, factor_svd, reduce_rank
from networks.adapters import Adapter
from networks.kinds.lora import LoraModule
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, Target
from tests.tools.adapters import cp_module

LINEAR = Target(UNET, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
WIDE = Target(UNET, "down_blocks.0.resnets.0.conv1")
TEXT = Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1")
TEXT_2 = Target(TEXT_ENCODER_2, "text_model.encoder.layers.0.mlp.fc1")


def module(
    *shape: int, rank: int = 4, alpha: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LoraModule:
    """A random module for a weight of `shape`."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator).to(dtype)
    return LoraModule(down, up, alpha)


def dora(plain: LoraModule) -> LoraModule:
    return replace(plain, magnitude=torch.ones(plain.up.shape[0], 1))


def whole(of: LoraModule) -> Tensor:
    """alpha / rank * up @ down, float64, each output channel and kernel position on its own."""
    down = of.down.double() if of.down.ndim == 4 else of.down.double()[:, :, None, None]
    kernel = down
    if of.mid is not None:
        kernel = torch.einsum("mnhw,ni->mihw", of.mid.double(), down[:, :, 0, 0])
    product = torch.stack([(row[:, None, None, None] * kernel).sum(0) for row in of.up.double().flatten(1)])
    return of.alpha / of.down.shape[0] * product


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.25), (0.7, -0.3), (-1.0, 2.0)])
@pytest.mark.parametrize("shape", [(12, 20), (12, 20, 1, 1), (12, 20, 3, 3)])
def test_a_sum_is_the_sum_of_the_products(shape: tuple[int, ...], ratios: tuple[float, float]) -> None:
    a, b = module(*shape, rank=4, alpha=1.0, seed=1), module(*shape, rank=7, alpha=16.0, seed=2)
    found = concatenate([(Adapter({LINEAR: a}), ratios[0]), (Adapter({LINEAR: b}), ratios[1])]).modules[LINEAR]
    assert (found.rank, found.alpha, found.shape) == (11, 11.0, shape)
    close(whole(found), ratios[0] * whole(a) + ratios[1] * whole(b))


def test_a_sum_takes_modules_that_only_some_have_and_strengths_of_their_own() -> None:
    first = Adapter({LINEAR: module(12, 20, seed=1), TEXT: module(16, 8, seed=2)})
    second = Adapter({LINEAR: module(12, 20, seed=3, dtype=torch.float16), WIDE: cp_module(9, 7)})
    found = concatenate([(first, lambda target: 0.0 if target == TEXT else 2.0), (second, -0.5), (first, 0.25)]).modules
    assert list(found) == [LINEAR, WIDE, TEXT]
    assert [found[target].rank for target in found] == [12, 3, 4]
    close(whole(found[LINEAR]), 2.25 * whole(first.modules[LINEAR]) - 0.5 * whole(second.modules[LINEAR]))
    close(whole(found[WIDE]), -0.5 * whole(second.modules[WIDE]))
    close(whole(found[TEXT]), 0.25 * whole(first.modules[TEXT]))
    assert {part.dtype for one in found.values() for part in (one.down, one.up)} == {torch.float32}


def test_an_adapter_and_its_negative_cancel() -> None:
    adapter = Adapter({LINEAR: module(12, 20)})
    assert float(whole(concatenate([(adapter, 1.0), (adapter, -1.0)]).modules[LINEAR]).abs().max()) < 1e-14


@pytest.mark.bits
def test_one_adapter_of_scale_one_is_its_own_sum_to_the_bit() -> None:
    plain = module(12, 20, rank=4, alpha=4.0)
    found = concatenate([(Adapter({LINEAR: plain}), 1.0)]).modules[LINEAR]
    assert torch.equal(found.down, plain.down) and torch.equal(found.up, plain.up)


def test_a_small_scale_survives_half_precision() -> None:
    """alpha 1 at rank 128: all of it in up would be below what half precision holds in full."""
    small = module(64, 64, rank=128, alpha=1.0)
    small = replace(small, up=small.up * 1e-3)
    found = concatenate([(Adapter({LINEAR: small}), 0.5)]).modules[LINEAR]
    halved = replace(found, down=found.down.half(), up=found.up.half())
    close(whole(halved), 0.5 * whole(small), tolerance=1e-3)


def test_a_matrix_and_a_1x1_convolution_are_added() -> None:
    a, b = module(12, 20, 1, 1, seed=1), module(12, 20, seed=2)
    found = concatenate([(Adapter({LINEAR: a}), 1.0), (Adapter({LINEAR: b}), 1.0)]).modules[LINEAR]
    assert found.shape == (12, 20, 1, 1)
    close(whole(found), whole(a) + whole(b))


def test_what_the_inputs_say_alike_of_their_base_is_kept() -> None:
    first = Adapter({LINEAR: module(4, 4)}, {"ss_base_model_version": "sd_v1", "ss_seed": "1", "ss_sd_model_name": "a"})
    second = Adapter(
        {LINEAR: module(4, 4)}, {"ss_base_model_version": "sd_v1", "ss_seed": "1", "ss_sd_model_name": "b"}
    )
    assert concatenate([(first, 1.0), (second, 1.0)]).metadata == {"ss_base_model_version": "sd_v1"}


def test_what_cannot_be_added_is_refused() -> None:
    plain = Adapter({LINEAR: module(12, 20)})
    for others, sentence in (
        (
            {LINEAR: dora(module(12, 20)), TEXT: module(4, 4)},
            "1 of 2 modules are DoRA (first: unet mid_block.attentions.0.tra",
        ),
        ({TEXT_2: module(4, 4)}, "Adapters of SD1.5 and SDXL cannot be added"),
        (
            {LINEAR: module(12, 24)},
            f"unet {LINEAR.path} is for a weight [12, 20] in one adapter and [12, 24] in another",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            concatenate([(plain, 1.0), (Adapter(others), 1.0)])
    with pytest.raises(UserError, match="Nothing remains of the sum: every ratio is 0"):
        concatenate([(plain, 0.0)])


def decaying(*shape: int, rank: int) -> LoraModule:
    """Singular values that fall off, as trained adapters have them."""
    plain = module(*shape, rank=rank, alpha=2.0)
    sizes = 0.6 ** torch.arange(rank)
    return replace(plain, down=plain.down * sizes.reshape(-1, *(1 for _ in plain.down.shape[1:])))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24, 1, 1), (24, 40, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_a_lower_rank_is_the_truncated_svd_of_the_product(shape: tuple[int, ...], rank: int) -> None:
    before = decaying(*shape, rank=8)
    reduced, (change,) = reduce_rank(Adapter({LINEAR: before}), rank)
    after = reduced.modules[LINEAR]
    u, s, vh = torch.linalg.svd(whole(before).flatten(1), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    kept = min(rank, 8)
    assert (change.before, change.after, after.rank, after.alpha, after.shape) == (8, kept, kept, float(kept), shape)
    close(whole(after).flatten(1), best)
    assert change.retained == pytest.approx(float(best.norm() / s.norm()), rel=1e-6)


def test_3x3_convolutions_have_a_rank_of_their_own() -> None:
    adapter = Adapter({LINEAR: module(12, 20, 1, 1, rank=8), WIDE: module(12, 20, 3, 3, rank=8)})
    assert [change.after for change in reduce_rank(adapter, 5, 2)[1]] == [5, 2]
    assert [change.after for change in reduce_rank(adapter, 5)[1]] == [5, 5]


def test_a_rank_above_the_weight_is_cut_without_loss() -> None:
    before = module(6, 40, rank=32)
    reduced, (change,) = reduce_rank(Adapter({LINEAR: before}), 32)
    assert change.after == 6
    assert change.retained == pytest.approx(1.0)
    close(whole(reduced.modules[LINEAR]), whole(before))


def test_a_cp_convolution_is_reduced_as_the_product_it_is() -> None:
    before = cp_module(9, 7)
    after = reduce_rank(Adapter({WIDE: before}), 8)[0].modules[WIDE]
    assert after.mid is None and after.shape == before.shape == (9, 7, 3, 3)
    close(whole(after), whole(before))


def fewest(s: Tensor, method: str, value: float) -> int:
    """The smallest rank that satisfies the condition, by trying them all."""
    for rank in range(1, len(s) + 1):
        kept = s[:rank]
        if method == "sv_ratio" and (rank == len(s) or s[rank] < s[0] / value):
            return rank
        if method == "sv_fro" and float(kept.norm() / s.norm()) >= value - 1e-12:
            return rank
        if method == "sv_cumulative" and float(kept.sum() / s.sum()) >= value - 1e-12:
            return rank
    return len(s)


@pytest.mark.parametrize(
    ("method", "value"),
    [("sv_ratio", 1.0), ("sv_ratio", 3.0), ("sv_ratio", 1e6), ("sv_fro", 0.5), ("sv_fro", 0.9), ("sv_fro", 1.0)]
    + [("sv_cumulative", 0.2), ("sv_cumulative", 0.9), ("sv_cumulative", 1.0)],
)
def test_ranks_follow_the_singular_values(method: str, value: float) -> None:
    before = decaying(24, 40, rank=8)
    s = torch.linalg.svdvals(whole(before).flatten(1))[:8]
    for limit in (2, 8):
        _, (change,) = reduce_rank(Adapter({LINEAR: before}), limit, dynamic=DynamicRank(method, value))  # type: ignore[arg-type]
        assert change.after == min(limit, fewest(s, method, value))


def test_a_module_that_is_zero_keeps_one_dimension() -> None:
    empty = replace(module(12, 20), up=torch.zeros(12, 4))
    _, (change,) = reduce_rank(Adapter({LINEAR: empty}), 4, dynamic=DynamicRank("sv_fro", 0.9))
    assert (change.after, change.retained) == (1, 1.0)


def test_ranks_that_cannot_be_are_refused() -> None:
    adapter = Adapter({LINEAR: module(12, 20)})
    for call, sentence in (
        (lambda: reduce_rank(adapter, 0), "new_rank must be at least 1, got 0."),
        (lambda: reduce_rank(adapter, 4, 0), "new_conv_rank must be at least 1, got 0."),
        (
            lambda: reduce_rank(adapter, 4, dynamic=DynamicRank("sv_ratio", 0.5)),
            "of sv_ratio must be at least 1, got 0.5.",
        ),
        (
            lambda: reduce_rank(adapter, 4, dynamic=DynamicRank("sv_fro", 1.5)),
            "of sv_fro must be above 0 and at most 1",
        ),
        (lambda: reduce_rank(Adapter({LINEAR: dora(module(4, 4))}), 2), "Merge into a base instead."),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            call()


@pytest.mark.parametrize("of", [module(24, 40, rank=4), module(6, 5, rank=12), module(8, 6, 3, 3), cp_module(9, 7)])
def test_norms_and_singular_values_come_from_the_factors(of: LoraModule) -> None:
    product = whole(of).flatten(1)
    assert of.norm() == pytest.approx(float(product.norm()), rel=1e-6)
    u, s, vh = factor_svd(of)
    torch.testing.assert_close(s, torch.linalg.svdvals(product)[: len(s)], rtol=1e-6, atol=1e-6)
    close(u @ torch.diag(s) @ vh, product)
