"""Kinds of adapters that are read alone, each beside its definition written slowly: as a layer's output, or entry by entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from networks.adapter_file import read_adapter
from networks.adapter_module import AdapterModule
from networks.families import UNET
from networks.names import Target
from tests.tools.adapters import write_tensors

CONV_IN = Target(UNET, "conv_in")
MATRIX, CONVOLUTION = (8, 6), (8, 6, 3, 3)
RANK, ALPHA = 2, 3.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 97 * seed))


def read(folder: Path, name: str = "lora_unet_conv_in", **parts: Tensor) -> AdapterModule:
    """Of a file with these parts; "__" is a dot."""
    tensors = {f"{name}.{part.replace('__', '.')}": value for part, value in parts.items()}
    adapter = read_adapter(write_tensors(folder, tensors))
    assert list(adapter.modules) == [CONV_IN]
    return adapter.modules[CONV_IN]


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=1)


def inputs(shape: tuple[int, ...]) -> Tensor:
    return draw(5, shape[1]) if len(shape) == 2 else draw(2, shape[1], 5, 5)


# ------------------------------------------------------------------------------------------------ DoRA around products


def loha(shape: tuple[int, ...], *, tucker: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, what they add)"""
    out, inner, *kernel = shape
    parts, factors = {}, []
    for i in (1, 2):
        if tucker:
            a, b, t = draw(RANK, out, seed=i), draw(RANK, inner, seed=i), draw(RANK, RANK, *kernel, seed=i)
            parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": t}
            factors.append(
                sum(
                    a[p, :, None, None, None] * b[q, None, :, None, None] * t[p, q]
                    for p in range(RANK)
                    for q in range(RANK)
                )
            )
        else:
            a, b = draw(out, RANK, seed=i), draw(RANK, torch.Size(shape[1:]).numel(), seed=i)
            parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b}
            factors.append((a @ b).reshape(shape))
    return parts, ALPHA / RANK * factors[0] * factors[1]


def lokr(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    out, inner, *kernel = shape
    w1, a, b = draw(2, 3), draw(out // 2, RANK), draw(RANK, inner // 3 * torch.Size(kernel).numel())
    w2 = (a @ b).reshape(out // 2, inner // 3, *kernel)
    whole = torch.zeros(shape)
    for i in range(out):
        for j in range(inner):
            whole[i, j] = w1[i // (out // 2), j // (inner // 3)] * w2[i % (out // 2), j % (inner // 3)]
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, ALPHA / RANK * whole


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize(
    ("shape", "made", "label"),
    [
        (MATRIX, loha(MATRIX, tucker=False), "DoRA LoHa"),
        (CONVOLUTION, loha(CONVOLUTION, tucker=False), "DoRA LoHa"),
        (CONVOLUTION, loha(CONVOLUTION, tucker=True), "DoRA LoHa"),
        (MATRIX, lokr(MATRIX), "DoRA LoKr"),
        (CONVOLUTION, lokr(CONVOLUTION), "DoRA LoKr"),
    ],
)
def test_doras_magnitudes_stand_around_loha_and_lokr_too(
    shape: tuple[int, ...], made: tuple[dict[str, Tensor], Tensor], label: str, axis: int, tmp_path: Path
) -> None:
    parts, added = made
    weight = draw(*shape, seed=5)
    sides = [shape[place] if place == axis else 1 for place in range(len(shape))]
    magnitude = draw(shape[axis], seed=6).abs().reshape(sides)
    module = read(tmp_path, **parts, dora_scale=magnitude, alpha=torch.tensor(ALPHA))
    expected = torch.empty(shape)
    for place in range(shape[axis]):
        row = (weight + added).select(axis, place)
        expected.select(axis, place).copy_(magnitude.flatten()[place] * row / row.square().sum().sqrt())
    torch.testing.assert_close(weight + module.delta(weight), expected, rtol=1e-5, atol=1e-5)
    assert module.label == label and module.fits(shape) and not module.fits((12, 4, *shape[2:]))
    assert module.norm() == pytest.approx(float(added.norm()), rel=1e-5)


def test_a_magnitude_of_other_inputs_does_not_fit(tmp_path: Path) -> None:
    parts, _ = loha(CONVOLUTION, tucker=False)
    module = read(tmp_path, **parts, dora_scale=torch.ones(1, 9, 1, 1))
    assert not module.fits(CONVOLUTION) and module.fits((8, 9, 2, 3))


# ------------------------------------------------------------------------------------------------ whole differences


@pytest.mark.parametrize(
    ("part", "shape", "target"),
    [
        ("diff", MATRIX, CONV_IN),
        ("diff", CONVOLUTION, CONV_IN),
        ("diff", (8,), CONV_IN),
        ("w_norm", (8,), CONV_IN),
        ("diff_b", (8,), CONV_IN.bias),
        ("b_norm", (8,), CONV_IN.bias),
    ],
)
def test_a_whole_difference_is_added_as_it_is(
    part: str, shape: tuple[int, ...], target: Target, tmp_path: Path
) -> None:
    diff, before = draw(*shape), draw(*shape, seed=1)
    adapter = read_adapter(write_tensors(tmp_path, {f"lora_unet_conv_in.{part}": diff.half()}))
    module = adapter.modules[target]
    assert torch.equal(module.delta(before), diff.half().float()) and module.delta(before).shape == before.shape
    assert module.fits(shape) and not module.fits((9, *shape[1:]))
    assert target.key == ("conv_in.bias" if target.path.endswith(".bias") else "conv_in.weight")


def test_a_matrix_serves_a_convolution_of_one_pixel(tmp_path: Path) -> None:
    module = read(tmp_path, diff=draw(*MATRIX))
    assert module.fits((8, 6, 1, 1)) and module.delta(torch.zeros(8, 6, 1, 1)).shape == (8, 6, 1, 1)


# ------------------------------------------------------------------------------------------------ GLoRA and IA3


def glora(shape: tuple[int, ...], *, tucker: bool = False) -> dict[str, Tensor]:
    out, inner, *kernel = shape
    ones = [1] * len(kernel)
    parts = {"a1": draw(inner, RANK, *ones), "a2": draw(RANK, inner, *ones, seed=1), "b1": draw(out, RANK, *ones)}
    b2 = draw(RANK, inner, *(ones if tucker else kernel))
    return {**parts, "b2": b2, **({"bm": draw(RANK, RANK, *kernel)} if tucker else {})}


@pytest.mark.parametrize("old", [False, True], ids=["of LyCORIS 2 and later", "as earlier versions named them"])
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        (MATRIX, glora(MATRIX)),
        ((8, 8), glora((8, 8))),
        (CONVOLUTION, glora(CONVOLUTION)),
        ((8, 8, 3, 3), glora((8, 8, 3, 3))),
        (CONVOLUTION, glora(CONVOLUTION, tucker=True)),
    ],
)
def test_glora_computes_the_layer_of_changed_inputs_and_adds_a_lora(
    shape: tuple[int, ...], parts: dict[str, Tensor], old: bool, tmp_path: Path
) -> None:
    """f(x) = W(x + s A(x)) + s B(x), A = a1 a2, B = b1 b2 (LyCORIS)."""
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"} if old else {}
    named = {f"{swapped.get(part, part)}__weight": value for part, value in parts.items()}
    module = read(tmp_path, **named, alpha=torch.tensor(ALPHA))
    weight, x, scale = draw(*shape, seed=5), inputs(shape), ALPHA / RANK

    def product(x: Tensor, *factors: Tensor) -> Tensor:
        for factor in factors:
            is_kernel = factor.ndim == 4 and factor.shape[-1] == 3
            x = F.linear(x, factor) if factor.ndim == 2 else F.conv2d(x, factor, padding=1 if is_kernel else 0)
        return x

    changed = x + scale * product(x, parts["a2"], parts["a1"])
    middle = [parts["bm"]] if "bm" in parts else []
    expected = layer(changed, weight) + scale * product(x, parts["b2"], *middle, parts["b1"])
    torch.testing.assert_close(layer(x, weight + module.delta(weight)), expected, rtol=1e-4, atol=1e-3)
    assert module.fits(shape) and (module.rank, module.alpha, module.norm()) == (RANK, ALPHA, None)


@pytest.mark.parametrize("shape", [MATRIX, CONVOLUTION])
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_scales_the_inputs_or_the_outputs_of_a_layer(shape: tuple[int, ...], on_input: int, tmp_path: Path) -> None:
    size = shape[1 if on_input else 0]
    factors = draw(size) if len(shape) == 2 else draw(1, size, 1, 1)
    module = read(tmp_path, weight=factors, on_input=torch.tensor(on_input))
    weight, x, ratio = draw(*shape, seed=5), inputs(shape), 0.7
    by = 1 + ratio * factors
    expected = layer(x * by, weight) if on_input else layer(x, weight) * by
    torch.testing.assert_close(layer(x, weight + ratio * module.delta(weight)), expected, rtol=1e-4, atol=1e-4)
    assert module.fits(shape) and not module.fits((9, 9, *shape[2:]))
