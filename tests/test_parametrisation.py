"""Every parametrisation against its definition: noise, targets, conversions, schedules and what samplers ask."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from library.diffusion.bridge import along_flow
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import EPSILON, FLOW, VELOCITY, Prediction
from library.diffusion.rectified_flow import FlowPath
from library.diffusion.scheduler_config import PARAMETRISATIONS, parametrisation_of
from library.errors import UserError
from library.models.sd15_configs import SD15_SCHEDULER

TIMESTEPS = [0, 1, 250, 500, 900, 999]


def parametrisation(prediction_type: str = "epsilon", *, zero: bool = False) -> Parametrisation:
    """SD1.5's."""
    found = parametrisation_of(SD15_SCHEDULER | {"prediction_type": prediction_type})
    return found.with_zero_terminal_snr() if zero else found


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise, a network's output, timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, output = (torch.randn(count, 4, 3, 2, generator=generator) for _ in range(3))
    return latents, noise, output, torch.tensor(TIMESTEPS)[:count]


def alpha_bars(zero: bool = False) -> list[float]:
    """alphas_cumprod of SD1.5 by its definition."""
    products, product = [], 1.0
    for i in range(1000):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        products.append(product)
    if not zero:
        return products
    roots = [math.sqrt(a) for a in products]
    return [((r - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for r in roots]


PROCESSES = {
    **{name: parametrisation(name) for name in PARAMETRISATIONS},
    **{f"bridged {name}": along_flow(parametrisation(name)) for name in ("epsilon", "v_prediction")},
}


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_perfect_output_means_the_noise_and_the_latents_that_it_was_made_of(process: Parametrisation) -> None:
    latents, noise, _, timesteps = batch()
    noisy, output = process.add_noise(latents, noise, timesteps), process.target(latents, noise, timesteps)
    alpha, sigma = process.at(timesteps)
    torch.testing.assert_close(process.output.noise(output, noisy, alpha, sigma), noise)
    torch.testing.assert_close(process.output.of_noise(noise, noisy, alpha, sigma), output, rtol=1e-3, atol=1e-3)
    levels = (sigma / (alpha + sigma if isinstance(process, FlowPath) else alpha)).flatten().tolist()
    assert [process.levels.timestep(level) for level in levels] == pytest.approx(timesteps.tolist(), rel=1e-3, abs=1e-2)
    for i, level in enumerate(levels):
        x = noisy[i] * process.inverse_scale(level)
        torch.testing.assert_close(x, process.signal(level) * latents[i] + level * noise[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(process.clean(output[i], x, level), latents[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("said", "asked"), permutations((EPSILON, VELOCITY, FLOW), 2), ids=lambda kind: kind.noun)
def test_any_output_is_converted_exactly(said: Prediction, asked: Prediction) -> None:
    process = replace(parametrisation(), output=said)
    latents, noise, output, timesteps = batch()
    noisy = process.add_noise(latents, noise, timesteps)
    perfect = process.convert(process.target(latents, noise, timesteps), noisy, timesteps, asked)
    torch.testing.assert_close(perfect, process.target(latents, noise, timesteps, asked), rtol=1e-4, atol=1e-5)
    there = process.convert(output, noisy, timesteps, asked)
    back = replace(process, output=asked).convert(there, noisy, timesteps, said)
    torch.testing.assert_close(back, output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(there, output, atol=0.1)
    assert process.convert(output, noisy, timesteps, said) is output


def test_the_schedule_is_scaled_linear_and_not_linear() -> None:
    found = parametrisation().alphas_cumprod
    assert found.tolist() == pytest.approx(alpha_bars(), rel=2e-4)
    assert found.mean().item() == pytest.approx(0.3734, abs=1e-4) and found[-1].item() == pytest.approx(
        0.00466, abs=1e-5
    )


def test_the_process_is_the_one_that_diffusers_samples_with() -> None:
    from diffusers import DDPMScheduler

    process = parametrisation("v_prediction")
    theirs = DDPMScheduler.from_config({k: v for k, v in SD15_SCHEDULER.items() if k != "skip_prk_steps"})
    latents, noise, _, timesteps = batch()
    assert torch.equal(process.alphas_cumprod, theirs.alphas_cumprod)
    torch.testing.assert_close(
        process.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        process.target(latents, noise, timesteps), theirs.get_velocity(latents, noise, timesteps)
    )


@pytest.mark.parametrize(
    "config",
    [{"prediction_type": "sample"}, {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}],
    ids=lambda config: next(iter(config)),
)
def test_what_is_not_known_is_refused(config: dict[str, object]) -> None:
    trains = "this program trains epsilon, v_prediction and flow_prediction"
    with pytest.raises(UserError, match=f"prediction_type '{config['prediction_type']}'; {trains}"):
        parametrisation_of(config)


def test_zero_terminal_snr_ends_at_0_keeps_the_beginning_and_its_snr_follows() -> None:
    plain, zero = parametrisation(), parametrisation(zero=True)
    alphas = zero.alphas_cumprod
    assert alphas[-1].item() == 0 and zero.snr(torch.tensor([999])).item() == 0
    assert alphas[0].item() == pytest.approx(alpha_bars()[0], rel=1e-4)
    assert alphas.tolist() == pytest.approx(alpha_bars(True), rel=1e-3, abs=1e-7)
    assert zero.snr(torch.tensor([900])).item() < 0.7 * plain.snr(torch.tensor([900])).item()
    assert zero.ends_in_noise and not plain.ends_in_noise
    torch.testing.assert_close(zero.with_zero_terminal_snr().alphas_cumprod, alphas)
    rescaled = parametrisation_of(SD15_SCHEDULER | {"rescale_betas_zero_snr": True})
    torch.testing.assert_close(rescaled.alphas_cumprod, alphas, rtol=1e-3, atol=1e-6)


def test_out_of_pure_noise_noise_follows_and_a_velocity_does_not() -> None:
    ends, nothing, last = parametrisation(zero=True), torch.zeros(1, 4, 2, 2), torch.tensor([999])
    with pytest.raises(
        UserError, match="zero_terminal_snr ends the schedule in pure noise, where a base that predicts eps"
    ):
        ends.convert(nothing, nothing, last, VELOCITY)
    noisy = torch.ones(1, 4, 2, 2)
    assert torch.equal(replace(ends, output=VELOCITY).convert(nothing, noisy, last, EPSILON), noisy)


def test_the_zero_predictor_scores_about_1_on_velocities() -> None:
    """alphas_cumprod + (1 - alphas_cumprod) * m2 is 1 for latents of second moment m2 = 1 (Salimans and Ho 2022, appendix D)."""
    latents, noise = torch.randn(2, 2000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.randint(0, 1000, (2000,), generator=torch.Generator().manual_seed(1))
    velocities = parametrisation().target(latents, noise, timesteps, VELOCITY)
    assert velocities.square().mean().item() == pytest.approx(1.0, abs=0.01)
