"""Noise levels of the steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from library.diffusion.noise_levels import NoiseLevels
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.inference.sigmas import SCHEDULES, noise_levels, part_of
from library.models.sd15_configs import SD15_SCHEDULER
from networks.families import SD15, SDXL

PROCESS = parametrisation_of(SD15_SCHEDULER)
LEVELS = PROCESS.levels
BETAS = {key: SD15_SCHEDULER[key] for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}


def test_the_levels_are_those_of_the_training() -> None:
    assert LEVELS.low == pytest.approx(0.0291671582, rel=2e-5) and LEVELS.high == pytest.approx(14.6146412293, rel=1e-5)


def test_normal_is_eulers_spacing_of_diffusers() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")  # linear where this is log-linear
    scheduler.set_timesteps(20)
    np.testing.assert_allclose(noise_levels("Normal", 20, LEVELS, SD15).numpy(), scheduler.sigmas.numpy(), rtol=1e-4)


def test_karras_and_exponential_are_those_of_diffusers() -> None:
    for name, flag in (("Karras", "use_karras_sigmas"), ("Exponential", "use_exponential_sigmas")):
        scheduler = EulerDiscreteScheduler(**BETAS, **{flag: True})
        scheduler.set_timesteps(20)
        np.testing.assert_allclose(noise_levels(name, 20, LEVELS, SD15).numpy(), scheduler.sigmas.numpy(), rtol=1e-5)


def test_karras_is_k_diffusions() -> None:
    """get_sigmas_karras(5, 0.03, 14.6) of k-diffusion 0.1.1.post1."""
    levels = NoiseLevels(torch.tensor([0.03, 14.6], dtype=torch.float64))
    expected = [14.6, 4.808641, 1.283704, 0.2517273, 0.03, 0]
    np.testing.assert_allclose(noise_levels("Karras", 5, levels, SD15).numpy(), expected, rtol=1e-5)


def test_ddim_is_the_timesteps_of_diffusers() -> None:
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    found = noise_levels("DDIM", 20, LEVELS, SD15)
    assert scheduler.timesteps.tolist() == [round(LEVELS.timestep(float(sigma))) for sigma in found[:-1]]
    assert found[-1] == LEVELS.sigmas[0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 11, 32, 50])
def test_levels_fall(name: str, steps: int) -> None:
    for family in (SD15, SDXL):
        found = noise_levels(name, steps, LEVELS, family)
        assert found.shape == (steps + 1,) and found.dtype == torch.float64
        assert (found.diff() < 0).all() and torch.isfinite(found).all()
        assert found[-1] == (LEVELS.sigmas[0] if name == "DDIM" else 0)


def test_align_your_steps_is_the_table_where_it_has_as_many() -> None:
    eleven = noise_levels("Align Your Steps 11", 11, LEVELS, SD15)
    assert eleven[:4].tolist() == pytest.approx([14.6146, 6.47525, 3.86120, 2.69742], rel=1e-5)
    assert noise_levels("Align Your Steps 11", 11, LEVELS, SDXL)[1] == pytest.approx(6.31575, rel=1e-5)
    assert noise_levels("Align Your Steps 32", 32, LEVELS, SD15)[-2] == pytest.approx(0.015)


def test_align_your_steps_is_interpolated_in_log_sigma() -> None:
    """21 levels over the table of 11 have one between any two neighbours: their geometric mean."""
    table = noise_levels("Align Your Steps 11", 11, LEVELS, SD15)[:-1]
    found = noise_levels("Align Your Steps 11", 21, LEVELS, SD15)[:-1]
    torch.testing.assert_close(found[::2], table)
    torch.testing.assert_close(found[1::2], (table[:-1] * table[1:]).sqrt())


def test_ten_align_your_steps_are_not_comfyuis() -> None:
    ten = noise_levels("Align Your Steps 11", 10, LEVELS, SD15)
    assert ten[-2] == pytest.approx(0.029) and ten[1] != pytest.approx(6.47525, rel=1e-2)


def test_timesteps_and_levels_are_inverse() -> None:
    for timestep in (0, 0.5, 261, 889.55, 999):
        assert LEVELS.timestep(LEVELS.sigma(timestep)) == pytest.approx(timestep, abs=1e-6)
    assert LEVELS.sigma(499) == pytest.approx(float(LEVELS.sigmas[499]))
    middle = math.sqrt(float(LEVELS.sigmas[10] * LEVELS.sigmas[11]))
    assert LEVELS.timestep(middle) == pytest.approx(10.5)
    assert [LEVELS.timestep(sigma) for sigma in (0.0, 1e-3, 100.0)] == [0, 0, 999]


def test_a_schedule_that_ends_in_noise_has_finite_levels() -> None:
    levels = PROCESS.with_zero_terminal_snr().levels
    assert levels.high == pytest.approx(4518.76, rel=1e-4)
    for name in SCHEDULES:
        assert torch.isfinite(noise_levels(name, 20, levels, SD15)).all()


def test_the_next_to_last_level_can_be_left_out() -> None:
    longer = noise_levels("Karras", 21, LEVELS, SD15)
    found = noise_levels("Karras", 20, LEVELS, SD15, discard_next_to_last=True)
    assert found.tolist() == [*longer[:-2].tolist(), 0.0]


@pytest.mark.bits
def test_a_strength_takes_the_end_of_the_levels() -> None:
    sigmas = noise_levels("Karras", 20, LEVELS, SD15)
    assert torch.equal(part_of(sigmas, 0.5), sigmas[9:])
    assert torch.equal(part_of(sigmas, 1.0), sigmas) and torch.equal(part_of(sigmas, 0.01), sigmas[19:])
    with pytest.raises(UserError, match="denoising strength must be above 0 and at most 1, got 1.5"):
        part_of(sigmas, 1.5)


def test_inputs_of_the_unet_have_unit_variance() -> None:
    assert PROCESS.inverse_scale(0) == 1 and PROCESS.inverse_scale(math.sqrt(3)) == pytest.approx(2)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match=r"Karas is no schedule \(did you mean Karras\?\)"):
        noise_levels("Karas", 20, LEVELS, SD15)
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        noise_levels("Karras", 0, LEVELS, SD15)
    with pytest.raises(UserError, match="at most 1000 steps, got 1001"):
        noise_levels("DDIM", 1001, LEVELS, SD15)
