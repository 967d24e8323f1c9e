"""Small networks that are trained along a flow's path, or by SD's schedule and drawn with through its bridge, draw their data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from library.diffusion.bridge import Bridge, along_flow
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.diffusion.scheduler_config import parametrisation_of
from library.inference.sampler_run import run_sampler
from library.inference.samplers import SAMPLERS, no_noise
from library.inference.sigmas import noise_levels
from library.models.sd15_configs import SD15_SCHEDULER
from networks.families import SD15

NATIVE = parametrisation_of({"_class_name": "FlowMatchEulerDiscreteScheduler"})
PLAIN = parametrisation_of(SD15_SCHEDULER)
STEPS, BATCH, COUNT = 3000, 256, 4000
NEAR = 0.08
"""A distance of samples that are of the data: noise is 0.2 away, and data from data 0.02."""

Net = Callable[[Tensor, Tensor], Tensor]


def two_moons(count: int, generator: torch.Generator) -> Tensor:
    """[count, 2, 1, 1], mean 0 and deviation about 1."""
    angle, side = math.pi * torch.rand(count, generator=generator), torch.rand(count, generator=generator) < 0.5
    upper, lower = (angle.cos(), angle.sin()), (1 - angle.cos(), 0.5 - angle.sin())
    points = torch.stack([torch.where(side, a, b) for a, b in zip(upper, lower, strict=True)], dim=1)
    points = points + 0.05 * torch.randn(count, 2, generator=generator)
    return ((points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]))[:, :, None, None]


def trained(process: Parametrisation, drawn: Callable[[Tensor], Tensor]) -> Net:
    """A network of what `process` predicts. drawn: timesteps of uniform numbers."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    layers = nn.Sequential(nn.Linear(10, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def net(x: Tensor, timesteps: Tensor) -> Tensor:
        waves = timesteps[:, None].float() / 1000 * torch.tensor([1.0, 2, 4, 8])
        return layers(torch.cat([x.flatten(1), waves.sin(), waves.cos()], dim=1))[:, :, None, None]

    optimizer = torch.optim.Adam(layers.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        latents, noise = two_moons(BATCH, generator), torch.randn(BATCH, 2, 1, 1, generator=generator)
        timesteps = drawn(torch.rand(BATCH, generator=generator))
        output = net(process.add_noise(latents, noise, timesteps), timesteps)
        optimizer.zero_grad()
        (output - process.target(latents, noise, timesteps)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def distance(net: Net, path: FlowPath, sigmas: Tensor) -> float:
    """Sliced Wasserstein distance of what Euler draws to the data."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        told = torch.full((len(x),), path.timestep_of(sigma))
        return path.clean(net(x / path.inverse_scale(sigma), told), x, sigma)

    start = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(2))
    drawn = run_sampler(SAMPLERS["Euler"], denoise, start * float(sigmas[0]), sigmas, no_noise, path)
    return sliced(drawn)


def sliced(points: Tensor) -> float:
    data = two_moons(COUNT, torch.Generator().manual_seed(3))
    angles = torch.linspace(0, math.pi, 33)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])  # [2, 32]
    one, other = ((x.flatten(1) @ directions).sort(dim=0).values for x in (points, data))
    return (one - other).abs().mean().item()


@pytest.fixture(scope="module")
def native() -> Net:
    return trained(NATIVE, lambda uniform: 1000 * uniform)


@pytest.mark.parametrize("shift", [1.0, 2.0, 2.5])
def test_a_flow_that_is_trained_draws_its_data_with_any_shift(native: Net, shift: float) -> None:
    assert isinstance(NATIVE, FlowPath)
    path = replace(NATIVE, shift=shift)
    few, more = (distance(native, path, noise_levels("Normal", steps, path.levels, SD15)) for steps in (25, 50))
    assert few < NEAR and more < 1.2 * few
    assert sliced(torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(2))) > 2 * NEAR


@torch.no_grad()
def test_a_network_of_sds_schedule_draws_its_data_through_the_bridge_also_from_noise_alone() -> None:
    bridge = along_flow(PLAIN)
    assert isinstance(bridge, Bridge)
    with torch.enable_grad():
        net = trained(PLAIN, lambda uniform: (1000 * uniform).long())
    assert distance(net, bridge, noise_levels("Normal", 25, bridge.levels, SD15)) < NEAR
    x = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(2))
    for sigma, after in itertools.pairwise(torch.linspace(1, 0, 26).tolist()):
        sigmas = torch.full((COUNT,), sigma)
        x = x + (after - sigma) * bridge.velocity(net(*bridge.seen(x, sigmas)), x, sigmas)
    assert sliced(x) < NEAR
