"""Frozen convolutions: the numbers of plain ones, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.models.frozen import FrozenConv2d, freeze_layers


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size() if not isinstance(tensor, nn.Parameter) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    return total


@pytest.mark.bits
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"padding": 1}, {"groups": 2}, {"bias": False, "kernel_size": 1}]
)
def test_output_and_gradient_are_those_of_a_plain_convolution(
    layout: torch.memory_format, options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, **{"kernel_size": 3, **options}).requires_grad_(False).to(memory_format=layout)
    frozen = (
        nn.Sequential(nn.Conv2d(4, 6, **{"kernel_size": 3, **options})).requires_grad_(False).to(memory_format=layout)
    )
    frozen[0].load_state_dict(plain.state_dict())
    assert freeze_layers(frozen) == 1 and isinstance(frozen[0], FrozenConv2d)
    a = torch.randn(2, 4, 9, 8).to(memory_format=layout).requires_grad_()
    b = a.detach().clone().requires_grad_()
    for output in (plain(a), frozen(b)):
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert torch.equal(plain(a), frozen(b))
    torch.testing.assert_close(a.grad, b.grad)


def test_nothing_of_the_input_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).requires_grad_(False)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    assert kept_bytes(model, x) >= x.numel() * 4
    freeze_layers(model)
    assert kept_bytes(model, x) == 0


def test_trained_convolutions_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    assert freeze_layers(model) == 0 and type(model[0]) is nn.Conv2d


def test_gradients_are_right_to_second_differences() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)).double().requires_grad_(False)
    freeze_layers(model)
    assert torch.autograd.gradcheck(model, torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True))


def test_linear_layers_give_the_gradient_of_their_input_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double().requires_grad_(False)
    assert freeze_layers(model, linear=True) == 2
    assert torch.autograd.gradcheck(model, torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True))
    assert kept_bytes(model, torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)) == 0
