"""Noise schedule and diffusion loss against the published formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from library.diffusion.objective import Objective
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
}


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config(SD15)


def reference_alphas() -> list[float]:
    alphas, product = [], 1.0
    for i in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        product *= 1 - root**2
        alphas.append(product)
    return alphas


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 3, 2, generator=generator)
    noise = torch.randn(count, 4, 3, 2, generator=generator)
    output = torch.randn(count, 4, 3, 2, generator=generator)
    timesteps = torch.tensor([0, 1, 250, 500, 900, 999])[:count]
    return latents, noise, output, timesteps


def test_the_schedule_is_scaled_linear_and_not_linear(schedule: NoiseSchedule) -> None:
    assert schedule.alphas_cumprod.tolist() == pytest.approx(reference_alphas(), rel=2e-4)
    # repa.md section 5: mean 0.3734, last 0.00466.
    assert schedule.alphas_cumprod.mean().item() == pytest.approx(0.3734, abs=1e-4)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.bits
def test_the_schedule_is_the_one_that_diffusers_samples_with(schedule: NoiseSchedule) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config({k: v for k, v in SD15.items() if k != "skip_prk_steps"})
    latents, noise, _, timesteps = batch()
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        schedule.velocity(latents, noise, timesteps), theirs.get_velocity(latents, noise, timesteps)
    )


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="prediction_type 'sample'"):
        NoiseSchedule.from_config(SD15 | {"prediction_type": "sample"})


def slow_loss(kind: str, prediction_type: str, gamma: float | None, i: int) -> float:
    """One sample's loss by loops over Python floats."""
    latents, noise, output, timesteps = batch()
    alpha_bar = reference_alphas()[int(timesteps[i])]
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    total, count = 0.0, 0
    flat = zip(latents[i].flatten().tolist(), noise[i].flatten().tolist(), output[i].flatten().tolist(), strict=True)
    velocities = kind != "base" or prediction_type == "v_prediction"
    for x, e, o in flat:
        noisy = a * x + s * e
        target = a * e - s * x if velocities else e
        predicted = (o - s * noisy) / a if kind == "v" and prediction_type == "epsilon" else o
        total, count = total + (predicted - target) ** 2, count + 1
    loss = total / count
    if gamma is not None:
        snr = alpha_bar / (1 - alpha_bar)
        loss *= min(snr, gamma) / (snr + 1 if velocities else snr)
    return loss


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["base", "v", "raw_v"])
def test_the_diffusion_loss_equals_the_slow_one(kind: str, prediction_type: str, gamma: float | None) -> None:
    objective = Objective(NoiseSchedule.from_config(SD15 | {"prediction_type": prediction_type}), kind, gamma)
    latents, noise, output, timesteps = batch()
    noisy = objective.schedule.add_noise(latents, noise, timesteps)
    values = objective.losses(output, latents, noise, noisy, timesteps)
    expected = [slow_loss(kind, prediction_type, gamma, i) for i in range(6)]
    assert values.tolist() == pytest.approx(expected, rel=2e-3)


def test_the_v_loss_of_an_epsilon_base_is_its_epsilon_loss_over_alpha_bar(schedule: NoiseSchedule) -> None:
    latents, noise, output, timesteps = batch()
    noisy = schedule.add_noise(latents, noise, timesteps)
    as_v = Objective(schedule, "v").losses(output, latents, noise, noisy, timesteps)
    as_epsilon = Objective(schedule).losses(output, latents, noise, noisy, timesteps)
    torch.testing.assert_close(as_v, as_epsilon / schedule.alphas_cumprod[timesteps], rtol=1e-3, atol=1e-5)


def test_the_zero_predictor_scores_about_1_on_velocities(schedule: NoiseSchedule) -> None:
    # repa.md section 5: alphas_cumprod + (1 - alphas_cumprod) * m2 = 1.000 for latents of second moment 1.
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2000, 4, 4, 4, generator=generator)
    noise = torch.randn(2000, 4, 4, 4, generator=generator)
    timesteps = torch.randint(0, 1000, (2000,), generator=generator)
    assert schedule.velocity(latents, noise, timesteps).square().mean().item() == pytest.approx(1.0, abs=0.01)


def test_losses_are_float32_when_the_network_computes_in_bfloat16(schedule: NoiseSchedule) -> None:
    latents, noise, output, timesteps = batch()
    noisy = schedule.add_noise(latents, noise, timesteps)
    assert Objective(schedule).losses(output.bfloat16(), latents, noise, noisy, timesteps).dtype == torch.float32


def test_a_perfect_epsilon_model_taken_for_v_scores_0_94(schedule: NoiseSchedule) -> None:
    # repa.md section 5: (1 - alpha)^2 + sigma^2 * m2 for latents of second moment 1; the document's 2.05 needs wrong latents.
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2000, 4, 4, 4, generator=generator)
    noise = torch.randn(2000, 4, 4, 4, generator=generator)
    timesteps = torch.randint(0, 1000, (2000,), generator=generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    raw = Objective(schedule, "raw_v").losses(noise, latents, noise, noisy, timesteps)
    exact = Objective(schedule, "v").losses(noise, latents, noise, noisy, timesteps)
    assert raw.mean().item() == pytest.approx(0.941, abs=0.02) and exact.mean().item() == pytest.approx(0, abs=1e-6)
