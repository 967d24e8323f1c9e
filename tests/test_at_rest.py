"""Weights at rest: every format against a slow reference, its layers against layers of what it decodes to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.models.at_rest import FORMATS
from library.models.frozen import EncodedConv2d, EncodedLinear, encode, freeze_layers
from library.quiet import quiet_libraries

quiet_libraries()

# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution between -1 and 1, one of them zero.
NF4 = (
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


def nf4(weight: Tensor) -> Tensor:
    values = weight.flatten().tolist()
    decoded: list[float] = []
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        largest = max(map(abs, block)) or 1.0
        decoded += [min(NF4, key=lambda level: abs(value / largest - level)) * largest for value in block]
    return torch.tensor(decoded).view_as(weight)


def int8(weight: Tensor) -> Tensor:
    rows = []
    for row in weight.flatten(1).tolist():
        scale = max(max(map(abs, row)), 1e-30) / 127
        rows.append([round(value / scale) * scale for value in row])
    return torch.tensor(rows).view_as(weight)


def fp8(weight: Tensor) -> Tensor:
    """e4m3: 3 bits of mantissa, exponents from -6, no infinity, 448 at most."""

    def nearest(value: float) -> float:
        if value == 0:
            return 0.0
        exponent = max(torch.tensor(abs(value)).log2().floor().item(), -6.0)
        step = 2.0 ** (exponent - 3)
        return max(-448.0, min(448.0, round(value / step) * step))

    return torch.tensor([nearest(value) for value in weight.flatten().tolist()]).view_as(weight)


REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "stored": lambda weight: weight,
    "fp8": fp8,
    "int8": int8,
    "nf4": nf4,
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_back_is_what_a_slow_reference_makes(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 30), (3, 31), (4, 3, 3, 3)):
        weight = torch.randn(shape, generator=generator) * 0.05
        weight[0] = 0.0
        weight[1] *= 1e4  # beyond what float8 holds
        back = FORMATS[name].decode(*FORMATS[name].encode(weight), weight.shape, torch.float32)
        torch.testing.assert_close(back, REFERENCES[name](weight), rtol=1e-6, atol=0)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Flatten(2),
        nn.Linear(16, 12),
        nn.Linear(12, 5, bias=False),
        nn.LayerNorm(5),
    )
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.bits
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_layers_with_the_decoded_weights(name: str, dtype: torch.dtype) -> None:
    kept, plain = model(), model().to(dtype)
    kept = (
        kept.to(torch.float8_e4m3fn if dtype == torch.bfloat16 else torch.float16)
        if name == "stored"
        else kept.to(dtype)
    )
    encode(kept, name, dtype)
    assert [type(layer) for layer in kept][::2] == [EncodedConv2d, EncodedLinear, nn.LayerNorm]
    assert kept[0].format == {"nf4": "int8"}.get(name, name) and kept[2].format == name
    for mine, other in zip(kept, plain, strict=True):
        if isinstance(mine, EncodedConv2d | EncodedLinear):
            other.weight.data = mine.weight
        for part in ("bias",) if getattr(mine, "bias", None) is not None else ():
            assert getattr(mine, part).dtype == dtype
            getattr(other, part).data = getattr(mine, part).data
    freeze_layers(plain)
    inputs = [
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_() for _ in "ab"
    ]
    for one, x in zip((kept, plain), inputs, strict=True):
        (one(x).float() * torch.linspace(-1, 1, 5)).square().sum().backward()
    assert torch.equal(kept(inputs[0]), plain(inputs[1]))
    assert inputs[0].grad is not None and inputs[0].grad.any() and torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "share"), [("stored", 0.5), ("fp8", 0.25), ("int8", 0.28), ("nf4", 0.22)])
def test_nothing_but_what_is_at_rest_is_kept_for_the_backward_pass(name: str, share: float) -> None:
    whole = nn.Sequential(nn.Linear(256, 256), nn.Conv2d(32, 64, 1)).requires_grad_(False)
    if name == "stored":
        whole.half()
    result = encode(whole, name, torch.float32)
    assert result.layers == 2 and result.bytes <= share * result.plain_bytes
    assert sum(p.nbytes for p in whole.parameters()) == result.bytes + sum(layer.bias.nbytes for layer in whole)
    weights, others = {p.data_ptr() for p in whole.parameters()}, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal others
        others += tensor.data_ptr() not in weights
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        whole[0](torch.randn(2, 256, requires_grad=True))
        whole[1](torch.randn(1, 32, 4, 4, requires_grad=True))
    assert others == 0


def test_the_error_is_that_of_all_weights_together() -> None:
    whole, before = model(), model()
    result = encode(whole, "nf4", torch.float32)
    pairs = [(whole[i].weight, before[i].weight) for i in (0, 2, 3)]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    assert result.error == pytest.approx((wrong / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5, rel=1e-5)


def test_trained_layers_and_short_weights_stay_as_they_are() -> None:
    trained = nn.Sequential(nn.Linear(8, 8))
    assert encode(trained, "nf4", torch.float32).layers == 0 and type(trained[0]) is nn.Linear
    short = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False).half()
    assert encode(short, "stored", torch.bfloat16).layers == 0 and short[0].weight.dtype == torch.bfloat16
