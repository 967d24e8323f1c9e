"""Noise of a step against loops over its definition, with the generator's numbers in kohya's order."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from library.diffusion.noise import draw
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.models.sd15_configs import SD15_SCHEDULER
from library.options.kohya.objective import NoiseOptions

pytestmark = pytest.mark.bits

SHAPE = (3, 4, 6, 10)
PROCESS = parametrisation_of(SD15_SCHEDULER)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def latents() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) + 0.5


def test_without_options_it_draws_randn_and_randint_and_nothing_else() -> None:
    drawn = draw(latents(), seeded(), NoiseOptions(), PROCESS)
    generator = seeded()
    assert torch.equal(drawn.noise, torch.randn(SHAPE, generator=generator))
    assert torch.equal(drawn.timesteps, torch.randint(0, 1000, (3,), generator=generator))
    assert drawn.added_noise is drawn.noise


@pytest.mark.parametrize("random_strength", [False, True])
@pytest.mark.parametrize("adaptive", [None, 0.3, -0.1])
def test_the_noise_offset_is_the_slow_one(random_strength: bool, adaptive: float | None) -> None:
    options = NoiseOptions(
        noise_offset=0.1, noise_offset_random_strength=random_strength, adaptive_noise_scale=adaptive
    )
    drawn = draw(latents(), seeded(), options, PROCESS)
    generator, x = seeded(), latents().double().numpy()
    expected = torch.randn(SHAPE, generator=generator).double().numpy()
    strength = 0.1 * (torch.rand(1, generator=generator).item() if random_strength else 1.0)
    shifts = torch.randn((3, 4, 1, 1), generator=generator)
    for b in range(3):
        for c in range(4):
            o = strength if adaptive is None else max(0.0, strength + adaptive * abs(x[b, c].sum() / 60))
            expected[b, c] += o * shifts[b, c].item()
    np.testing.assert_allclose(drawn.noise.numpy(), expected, atol=1e-6)
    assert torch.equal(drawn.timesteps, torch.randint(0, 1000, (3,), generator=generator))


def slow_bilinear(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel bilinear upsampling of [h, w], loops over pixels."""
    h, w = small.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            sy, sx = max(0.0, (y + 0.5) * h / height - 0.5), max(0.0, (x + 0.5) * w / width - 0.5)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = small[y0, x0] * (1 - fx) + small[y0, x1] * fx
            out[y, x] = top * (1 - fy) + (small[y1, x0] * (1 - fx) + small[y1, x1] * fx) * fy
    return out


@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_pyramid_noise_is_the_slow_one(iterations: int) -> None:
    drawn = draw(
        latents(), seeded(), NoiseOptions(multires_noise_iterations=iterations, multires_noise_discount=0.6), PROCESS
    )
    generator, host = seeded(), random.Random("pyramid noise 7")
    expected = torch.randn(SHAPE, generator=generator).double().numpy()
    levels = 0
    for i in range(iterations):
        r = host.random() * 2 + 2
        assert 2 <= r < 4
        h, w = max(1, int(6 / r**i)), max(1, int(10 / r**i))
        small = torch.randn((3, 4, h, w), generator=generator).double().numpy()
        for b in range(3):
            for c in range(4):
                expected[b, c] += slow_bilinear(small[b, c], 6, 10) * 0.6**i
        levels += 1
        if h == 1 or w == 1:
            break
    assert levels <= 3
    np.testing.assert_allclose(drawn.noise.numpy(), expected / expected.std(ddof=1), atol=1e-5)
    assert drawn.noise.std().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(drawn.timesteps, torch.randint(0, 1000, (3,), generator=generator))


def test_the_sizes_of_a_pyramid_follow_from_the_seed_of_the_step() -> None:
    options = NoiseOptions(multires_noise_iterations=3)
    first, again = (draw(latents(), seeded(), options, PROCESS).noise for _ in range(2))
    other = draw(latents(), torch.Generator().manual_seed(8), options, PROCESS).noise
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("random_strength", [False, True])
def test_input_perturbation_changes_what_is_added_and_not_the_target(random_strength: bool) -> None:
    drawn = draw(
        latents(), seeded(), NoiseOptions(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=random_strength), PROCESS
    )
    generator = seeded()
    noise = torch.randn(SHAPE, generator=generator)
    torch.randint(0, 1000, (3,), generator=generator)
    gamma = 0.2 * (torch.rand(1, generator=generator).item() if random_strength else 1.0)
    extra = torch.randn(SHAPE, generator=generator)
    assert torch.equal(drawn.noise, noise)
    np.testing.assert_allclose(drawn.added_noise.numpy(), (noise + gamma * extra).numpy(), atol=1e-6)


def test_timesteps_stay_between_the_bounds_and_reach_both_ends() -> None:
    drawn = draw(torch.zeros(4000, 1, 1, 1), seeded(), NoiseOptions(min_timestep=3, max_timestep=7), PROCESS)
    assert set(drawn.timesteps.tolist()) == {3, 4, 5, 6}


def test_all_at_once_follow_kohyas_order() -> None:
    options = NoiseOptions(
        noise_offset=0.1, multires_noise_iterations=1, multires_noise_discount=0.5, ip_noise_gamma=0.1
    )
    drawn = draw(latents(), seeded(), options, PROCESS)
    generator = seeded()
    noise = torch.randn(SHAPE, generator=generator)
    noise = noise + 0.1 * torch.randn((3, 4, 1, 1), generator=generator)
    noise = noise + F.interpolate(torch.randn(SHAPE, generator=generator), size=SHAPE[2:], mode="bilinear")
    noise = noise / noise.std()
    timesteps = torch.randint(0, 1000, (3,), generator=generator)
    torch.testing.assert_close(drawn.noise, noise)
    assert torch.equal(drawn.timesteps, timesteps)
    torch.testing.assert_close(drawn.added_noise, noise + 0.1 * torch.randn(SHAPE, generator=generator))


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        ((None, 501), "max_timestep is 501, and the schedule has 500 timesteps."),
        ((500, None), "min_timestep is 500, and the schedule's last timestep is 499."),
    ],
)
def test_timesteps_outside_the_schedule_are_refused(bounds: tuple[int | None, int | None], sentence: str) -> None:
    shorter = parametrisation_of(SD15_SCHEDULER | {"num_train_timesteps": 500})
    with pytest.raises(UserError) as error:
        draw(latents(), seeded(), NoiseOptions(min_timestep=bounds[0], max_timestep=bounds[1]), shorter)
    assert str(error.value) == sentence


def test_the_offset_of_a_sample_is_the_same_for_all_its_pixels() -> None:
    plain = torch.randn(SHAPE, generator=seeded())
    shift = draw(latents(), seeded(), NoiseOptions(noise_offset=0.5), PROCESS).noise - plain
    assert (shift.std(dim=(2, 3)) < 1e-6).all() and not math.isclose(shift[0, 0, 0, 0].item(), shift[0, 1, 0, 0].item())
