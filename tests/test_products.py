"""Products and convolutions with frozen weights: those of plain loops in float64, by whichever kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library.models import products
from library.models.products import Settings

SETTINGS = Settings((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture
def onednn_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of the weights of all products by oneDNN; skips where this torch has none."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    calls: list[Any] = []
    plain = products._onednn
    monkeypatch.setattr(
        products, "_onednn", lambda x, weight, bias: calls.append(weight.shape) or plain(x, weight, bias)
    )
    return calls


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(64,), (2, 32), (1, 8, 8)])
def test_large_products_and_their_gradients(rows: tuple[int, ...], onednn_calls: list[Any]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*rows, 160), torch.randn(240, 160), torch.randn(240)
    close(products.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    close(products.linear(x, weight), x.double() @ weight.double().T)
    gradient = torch.randn(*rows, 240)
    close(products.linear_gradient(gradient, weight), gradient.double() @ weight.double())
    close(products.linear(x.mT.contiguous().mT, weight), x.double() @ weight.double().T)
    assert len(onednn_calls) == 4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 1, 0), (1, 2, 0), (1, 1, 1)])
def test_convolutions_to_few_pixels_and_their_gradients(
    batch: int, kernel: int, stride: int, padding: int, onednn_calls: list[Any]
) -> None:
    torch.manual_seed(0)
    settings = Settings((stride, stride), (padding, padding), (1, 1), 1)
    side = 6 * stride
    x = torch.randn(batch, 192, side, side, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(320, 192, kernel, kernel), torch.randn(320)
    expected = F.conv2d(x, weight.double(), bias.double(), *settings)
    close(products.convolution(x.float(), weight, bias, settings), expected.detach())
    gradient = torch.randn(expected.shape)
    expected.backward(gradient.double())
    assert x.grad is not None
    close(products.convolution_gradient(gradient, weight, x.shape, settings), x.grad)
    assert len(onednn_calls) == (0 if kernel == 1 and (stride, padding) != (1, 0) else 2)


@pytest.mark.parametrize(
    "weight, side, settings",
    [
        (torch.randn(16, 8, 3, 3), 4, SETTINGS),  # too little to do
        (torch.randn(64, 256, 3, 3), 16, SETTINGS),  # more pixels than output channels
        (torch.randn(320, 96, 3, 3), 8, SETTINGS._replace(groups=2)),
        (torch.randn(320, 192, 3, 3), 8, SETTINGS._replace(dilation=(2, 2))),
        (torch.randn(320, 192, 3, 3).to(memory_format=torch.channels_last), 8, SETTINGS),
    ],
)
def test_all_other_convolutions_are_torchs_own(
    weight: Tensor, side: int, settings: Settings, onednn_calls: list[Any]
) -> None:
    x = torch.randn(1, weight.shape[1] * settings.groups, side, side)
    expected = F.conv2d(x, weight, None, *settings)
    assert torch.equal(products.convolution(x, weight, None, settings), expected) and not onednn_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats_are_torchs_own(dtype: torch.dtype, onednn_calls: list[Any]) -> None:
    x, weight = torch.randn(64, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight)) and not onednn_calls


def test_a_compiler_is_given_torchs_own_operations(onednn_calls: list[Any]) -> None:
    """oneDNN's takes constant weights there only: `--compile` on a CPU ended in the compiler's error."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    x, weight = torch.randn(64, 256), torch.randn(256, 256)
    compiled: Any = torch.compile(products.linear, backend=keep, fullgraph=True)
    close(compiled(x, weight), F.linear(x.double(), weight.double()))
    assert len(graphs) == 1 and "linear_pointwise" not in graphs[0] and not onednn_calls
