"""Rectified flow: the straight path, the exact bridge to SD's schedule, shifts and densities, and what other programs compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from library.diffusion.bridge import Bridge, along_flow
from library.diffusion.densities import SigmaDensity
from library.diffusion.loss import FLOW_WEIGHTS, timestep_weights
from library.diffusion.noise_levels import FlowLevels, shifted
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import EPSILON, FLOW, VELOCITY
from library.diffusion.rectified_flow import FlowPath, RectifiedFlow
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.inference.sampler_names import SAMPLER_NAMES, SAMPLERS_NOT_ALONG_FLOW
from library.inference.sampler_noise import StepNoise
from library.inference.sampler_run import run_sampler
from library.inference.samplers import SAMPLERS, no_noise
from library.inference.sigmas import noise_levels
from library.models.sd15_configs import SD15_SCHEDULER
from networks.families import SD15

NATIVE = parametrisation_of({"_class_name": "FlowMatchEulerDiscreteScheduler"})
FLOW_SAMPLERS = [name for name in SAMPLER_NAMES if name not in SAMPLERS_NOT_ALONG_FLOW]


def plain(prediction_type: str = "epsilon") -> Parametrisation:
    return parametrisation_of(SD15_SCHEDULER | {"prediction_type": prediction_type})


def bridged(prediction_type: str = "epsilon") -> Bridge:
    found = along_flow(plain(prediction_type))
    assert isinstance(found, Bridge)
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------- the bridge

PUBLISHED = dict(
    zip(
        (0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.93),
        (0.2, 2.3, 12.9, 59.7, 137.8, 238.7, 353.9, 477.2, 605.9, 744.2, 914.2, 983.1),
        strict=True,
    )
)
"""sigma -> the timestep of SD1.5 and SDXL with the same signal-to-noise ratio, to a tenth."""


def test_every_timestep_comes_back_from_its_sigma_and_both_ways_agree() -> None:
    bridge = bridged()
    timesteps = torch.arange(0, 1000, 9)
    sigmas = torch.tensor([bridge.sigma_of(t) for t in timesteps.tolist()])
    assert (sigmas.diff() > 0).all() and bridge.high == pytest.approx(0.93596, abs=1e-5)
    torch.testing.assert_close(bridge.timesteps_of(sigmas), timesteps.float(), rtol=0, atol=1e-3)
    for own, theirs in zip(bridge.at(timesteps.float()), bridge.process.at(timesteps), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)
    for sigma, timestep in PUBLISHED.items():
        assert bridge.timestep_of(sigma) == pytest.approx(timestep, abs=0.1)
        assert bridge.timesteps_of(torch.tensor([sigma])).item() == pytest.approx(timestep, abs=0.1)
        assert 1 / bridge.inverse_scale(sigma) == pytest.approx(1 / math.hypot(sigma, 1 - sigma))


@pytest.mark.parametrize(("kind", "prediction_type"), [(EPSILON, "epsilon"), (VELOCITY, "v_prediction")])
def test_the_velocity_of_a_bridge_is_the_one_of_the_change_of_variables(kind: object, prediction_type: str) -> None:
    """u = (eps(cx) - x) / (1 - sigma), and u = c v(cx) + (2 sigma - 1) c^2 x."""
    bridge, x, output = bridged(prediction_type), normal(6, 4, 2, 2), normal(6, 4, 2, 2, seed=1)
    sigmas = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.93])
    sigma = sigmas.double().view(-1, 1, 1, 1)
    c = 1 / (sigma**2 + (1 - sigma) ** 2).sqrt()
    expected = (output - x) / (1 - sigma) if kind is EPSILON else c * output + (2 * sigma - 1) * c**2 * x
    found = bridge.convert(output, c * x, bridge.timesteps_of(sigmas), FLOW)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_an_euler_step_along_the_flow_is_a_step_of_ddim(prediction_type: str, scale: float) -> None:
    """For whatever weights: the network is a random one, of input and timestep."""
    from diffusers import DDIMScheduler

    mixing, bridge = normal(4, 4, seed=3) / 2, bridged(prediction_type)

    def network(z: Tensor, timestep: float) -> Tensor:
        parts = [torch.tanh(torch.einsum("ij,bjhw->bihw", mixing * sign, z) + timestep / 1000) for sign in (1, -1)]
        return parts[0] + scale * (parts[1] - parts[0])

    ddim = DDIMScheduler.from_config({**SD15_SCHEDULER, "prediction_type": prediction_type, "clip_sample": False})
    ddim.set_timesteps(20)
    z = start = normal(2, 4, 3, 3)
    for timestep in ddim.timesteps:
        z = ddim.step(network(z, float(timestep)), timestep, z).prev_sample
    sigmas = [bridge.sigma_of(int(timestep)) for timestep in (*ddim.timesteps, 0)]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return bridge.clean(network(x / bridge.inverse_scale(sigma), bridge.levels.timestep(sigma)), x, sigma)

    x = start * bridge.inverse_scale(sigmas[0])
    x = run_sampler(SAMPLERS["Euler"], denoise, x, torch.tensor(sigmas, dtype=torch.float64), no_noise, bridge)
    torch.testing.assert_close(x / bridge.inverse_scale(sigmas[-1]), z, rtol=1e-5, atol=1e-5)


def test_guidance_of_velocities_is_guidance_of_noise() -> None:
    bridge, x = bridged(), normal(1, 4, 2, 2)
    one, other = (bridge.clean(normal(1, 4, 2, 2, seed=seed), x, 0.6) for seed in (1, 2))
    both = bridge.clean(7.5 * normal(1, 4, 2, 2, seed=1) - 6.5 * normal(1, 4, 2, 2, seed=2), x, 0.6)
    torch.testing.assert_close(7.5 * one - 6.5 * other, both)


def test_the_loss_on_velocities_is_the_one_on_noise_times_a_known_weight() -> None:
    """(1 + lambda)^2, lambda = 1 / sqrt(snr), and (alpha + sigma)^2 of v."""
    timesteps = torch.tensor([10.0, 300.0, 700.0, 999.0])
    for prediction_type, weights in (("epsilon", [1.206, 3.359, 18.787, 243.82]), ("v_prediction", None)):
        bridge = bridged(prediction_type)
        alpha, sigma = bridge.at(timesteps)
        latents, noise, wrong = (normal(4, 4, 3, 3, seed=seed) for seed in range(3))
        noisy, target = bridge.add_noise(latents, noise, timesteps), bridge.target(latents, noise, timesteps)
        own = (wrong - target).square().mean(dim=(1, 2, 3))
        flow = bridge.convert(wrong, noisy, timesteps, FLOW) - bridge.target(latents, noise, timesteps, FLOW)
        expected = (alpha + sigma).square().flatten() / (1 if weights is None else alpha.square().flatten())
        torch.testing.assert_close(flow.square().mean(dim=(1, 2, 3)) / own, expected.double(), rtol=1e-4, atol=0)
        if weights is not None:
            assert expected.tolist() == pytest.approx(weights, rel=1e-3)


def test_a_bridge_of_a_schedule_that_ends_in_noise_is_finite() -> None:
    bridge = along_flow(plain("v_prediction").with_zero_terminal_snr())
    last = torch.tensor([999.0])
    noisy, output = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1)
    assert bridge.high > 0.9997
    assert bridge.convert(output, noisy, last, FLOW).isfinite().all()


# -------------------------------------------------------------------------------------------- shifts, densities


def test_a_shift_multiplies_the_noise_to_signal_ratio_and_two_of_them_multiply() -> None:
    sigma = np.linspace(0.01, 0.99, 50)
    there = shifted(sigma, 2.5)
    np.testing.assert_allclose(there / (1 - there), 2.5 * sigma / (1 - sigma))
    np.testing.assert_allclose(shifted(there, 1 / 2.5), sigma)
    np.testing.assert_allclose(shifted(shifted(sigma, 2), 3), shifted(sigma, 6))
    np.testing.assert_array_equal(shifted(sigma, 1.0), sigma)


DENSITIES: dict[str, tuple[SigmaDensity, Callable[[np.ndarray], np.ndarray]]] = {
    "uniform": (SigmaDensity(), lambda u: u),
    "shifted": (SigmaDensity(shift=2.5), lambda u: 2.5 * u / (1 + 1.5 * u)),
    "logit_normal": (SigmaDensity("logit_normal", 0.3, 1.2), lambda u: u),
    "mode": (SigmaDensity("mode"), lambda u: 1 - (1 - u) - 1.29 * (np.cos(np.pi * (1 - u) / 2) ** 2 - u)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_draws_what_its_formula_says_and_a_part_of_it_is_that_part(name: str) -> None:
    density, formula = DENSITIES[name]
    generator = torch.Generator().manual_seed(0)
    drawn = density.part(torch.rand(40_000, generator=generator)).sort().values
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() <= 1
    if name == "logit_normal":
        logits = torch.logit(drawn.double())
        assert logits.mean().item() == pytest.approx(0.3, abs=0.02) and logits.std().item() == pytest.approx(
            1.2, abs=0.02
        )
    else:
        places = (np.arange(40_000) + 0.5) / 40_000
        assert np.abs(drawn.numpy() - np.sort(formula(places))).max() < 0.015
    inner = drawn[(drawn > 0.2) & (drawn < 0.7)]
    part = density.part(torch.rand(40_000, generator=generator), 0.2, 0.7)
    assert part.min() >= 0.2 and part.max() <= 0.7
    for quantile in (0.1, 0.5, 0.9):
        assert part.quantile(quantile).item() == pytest.approx(inner.quantile(quantile).item(), abs=0.01)


def test_a_logit_normal_that_is_shifted_has_another_mean() -> None:
    places = torch.linspace(0.01, 0.99, 99)
    one, other = SigmaDensity("logit_normal", shift=2.5), SigmaDensity("logit_normal", math.log(2.5))
    torch.testing.assert_close(one.part(places), other.part(places))


def test_larger_pictures_are_shifted_by_the_root_of_their_area() -> None:
    density, generator = SigmaDensity(base_area=64.0 * 64), torch.Generator().manual_seed(0)
    assert [density.shift_at(area) for area in (32.0 * 32, 64.0 * 64, 128.0 * 128)] == [0.5, 1, 2]
    path = RectifiedFlow(FLOW, density=density)
    small, large = (path.draw_timesteps(torch.Size((4000, 4, side, side)), generator).mean() for side in (32, 128))
    assert small < 420 < 560 < large


def test_timesteps_of_a_native_flow_are_fractions_and_of_a_bridge_the_networks_own() -> None:
    shape, generator = torch.Size((5000, 4, 8, 8)), torch.Generator().manual_seed(0)
    assert isinstance(NATIVE, FlowPath)
    for path, most in ((NATIVE, 1000), (bridged(), 999)):
        drawn = path.draw_timesteps(shape, generator)
        assert drawn.dtype == torch.float32 and drawn.max() <= most and (drawn != drawn.round()).any()
        part = path.draw_timesteps(shape, generator, 100, 300)
        assert 100 - 1e-2 <= part.min() < 105 and 295 < part.max() <= 300 + 1e-2
    below = (bridged().draw_timesteps(shape, generator) < PUBLISHED[0.5]).float().mean()
    assert below.item() == pytest.approx(0.5 / bridged().high, abs=0.02), (
        "uniform in sigma, up to what the network knows"
    )


# ------------------------------------------------------------------------------------------------------ weights


def test_weights_by_sigma_are_those_of_their_papers() -> None:
    sigma = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    snr = ((1 - sigma) / sigma).square()
    weights = {name: timestep_weights(snr, FLOW, flow_loss_weight=name) for name in FLOW_WEIGHTS}
    torch.testing.assert_close(weights["sigma"], sigma)
    torch.testing.assert_close(weights["eps"], (1 - sigma).square())
    torch.testing.assert_close(weights["cosmap"], 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)))
    assert weights["lune_min_snr"].tolist() == pytest.approx(
        [4e-5, 8e-4, 0.018, 0.14, 0.5, 0.84, 0.99], rel=0.1, abs=2e-5
    )
    min_snr = timestep_weights(snr, FLOW, min_snr_gamma=5.0)
    torch.testing.assert_close(min_snr, sigma.square() * snr.clamp(max=5))
    torch.testing.assert_close(min_snr, torch.minimum((1 - sigma).square(), 5 * sigma.square()))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_means_the_same_loss_on_clean_latents_in_every_form(gamma: float) -> None:
    bridge, timesteps = bridged(), torch.tensor([20.0, 400.0, 900.0])
    latents, noise, wrong = (normal(3, 4, 3, 3, seed=seed) for seed in range(3))
    noisy = bridge.add_noise(latents, noise, timesteps)
    losses = []
    for kind in (EPSILON, VELOCITY, FLOW):
        error = bridge.convert(wrong, noisy, timesteps, kind) - bridge.target(latents, noise, timesteps, kind)
        weights = timestep_weights(bridge.snr(timesteps), kind, min_snr_gamma=gamma)
        losses.append(error.square().mean(dim=(1, 2, 3)) * weights)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------ drawing


def test_a_native_model_means_here_what_it_means_in_comfyui() -> None:
    """ModelSamplingDiscreteFlow with multiplier 1000, and CONST: comfy/model_sampling.py."""
    latents, noise, output = (normal(1, 4, 2, 2, seed=seed) for seed in range(3))
    for sigma in (1.0, 0.6, 0.1):
        x = NATIVE.signal(sigma) * latents + sigma * noise
        torch.testing.assert_close(x, sigma * noise + (1 - sigma) * latents)  # noise_scaling
        assert NATIVE.inverse_scale(sigma) == 1  # calculate_input
        assert NATIVE.levels.timestep(sigma) == 1000 * sigma  # timestep
        torch.testing.assert_close(NATIVE.clean(output, x, sigma), x - output * sigma)  # calculate_denoised
    table = shifted(np.arange(1, 1001) / 1000, 3.0)  # its sigmas
    simple = [float(table[-(1 + int(i * 1000 / 20))]) for i in range(20)] + [0.0]
    np.testing.assert_allclose(FlowLevels(lambda sigma: 1000 * sigma, 3.0).spaced(20), simple)


def straight_data(x: Tensor, sigma: float) -> Tensor:
    """Perfect prediction of latents that are N(0.7, 0.4^2), from x on the flow."""
    variance = (0.4 * (1 - sigma)) ** 2 + sigma**2
    return 0.7 + 0.4**2 * (1 - sigma) / variance * (x - 0.7 * (1 - sigma))


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_every_sampler_that_flow_has_draws_the_distribution(name: str, shift: float) -> None:
    sigmas = noise_levels("Normal", 200, FlowLevels(lambda sigma: 1000 * sigma, shift), SD15)
    noise = StepNoise([0], (1, 100, 200)) if SAMPLERS[name].noise != "none" else no_noise
    drawn = run_sampler(SAMPLERS[name], straight_data, normal(1, 1, 100, 200), sigmas, noise, NATIVE)
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("name", ["Heun", "DPM++ 2M", "UniPC"])
def test_samplers_of_higher_order_are_closer_to_the_solution_than_euler(name: str) -> None:
    """Along this flow a point keeps its number of standard deviations."""
    start = normal(1, 1, 10, 10)
    levels = FlowLevels(lambda sigma: 1000 * sigma, 2.5)
    errors = [
        (run_sampler(SAMPLERS[one], straight_data, start, noise_levels("Normal", 20, levels, SD15), no_noise, NATIVE)
        - (0.7 + 0.4 * start)).abs().max().item()
        for one in (name, "Euler")
    ]  # fmt: skip
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_network_of_sds_schedule_draws_the_distribution_through_the_bridge(prediction_type: str) -> None:
    bridge = bridged(prediction_type)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        z, alpha = x / bridge.inverse_scale(sigma), (1 - sigma) / bridge.inverse_scale(sigma)
        clean, deviation = straight_data(x, sigma), math.sqrt(1 - alpha**2)
        noise = (z - alpha * clean) / deviation
        return bridge.clean(noise if bridge.output is EPSILON else alpha * noise - deviation * clean, x, sigma)

    sigmas = noise_levels("Normal", 25, bridge.levels, SD15)
    assert float(sigmas[0]) == pytest.approx(bridge.high)
    x = normal(1, 1, 100, 200) * float(sigmas[0])
    drawn = run_sampler(SAMPLERS["Euler"], denoise, x, sigmas, no_noise, bridge)
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.05) and drawn.std().item() == pytest.approx(0.4, abs=0.03)


def test_latents_that_were_scaled_by_k_in_training_are_a_shift_by_k_and_a_gain() -> None:
    """logit sigma = logit sigma_k - ln k, and x = (sigma / sigma_k) X: why Lune's pictures want a multiplier of their latents."""
    k, start = 2.0, normal(1, 1, 4, 4)
    scaled = torch.linspace(1, 0, 31, dtype=torch.float64)

    def denoise_scaled(x: Tensor, sigma: float) -> Tensor:
        unit = shifted(sigma, 1 / k)
        return k * straight_data(x * (unit / sigma), unit)

    found = run_sampler(SAMPLERS["Euler"], denoise_scaled, start, scaled, no_noise, NATIVE)
    unit = run_sampler(SAMPLERS["Euler"], straight_data, start, shifted(scaled, 1 / k), no_noise, NATIVE)
    torch.testing.assert_close(found / k, unit, rtol=1e-12, atol=1e-12)


def velocity(x: Tensor, timestep: float) -> Tensor:
    mixing = normal(4, 4, seed=3) / 2
    return torch.tanh(torch.einsum("ij,bjhw->bihw", mixing, x) + timestep / 1000)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "more"),
    [
        ("Euler", "FlowMatchEulerDiscreteScheduler", {}),
        ("Euler", "DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("Heun", "FlowMatchHeunDiscreteScheduler", {}),
        ("DPM++ 2M", "DPMSolverMultistepScheduler", {"solver_order": 2}),
        ("UniPC", "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samplers_step_as_diffusers_does_on_the_same_sigmas(
    sampler: str, scheduler: str, more: dict[str, object]
) -> None:
    import diffusers

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.5}
    theirs = getattr(diffusers, scheduler)(**({"shift": 2.5} if scheduler.startswith("Flow") else flow), **more)
    theirs.set_timesteps(12)
    x = start = normal(2, 4, 3, 3)
    first = 0 if scheduler.startswith("Flow") else 1  # they begin at sigma 0.999999 and correct even that step
    theirs.set_begin_index(first)
    sigmas = theirs.sigmas.double()[first:]
    for timestep in theirs.timesteps[first:]:
        index = first if theirs.step_index is None else theirs.step_index
        output = velocity(x, 1000 * float(theirs.sigmas[index]))
        last = x - float(theirs.sigmas[index]) * output
        x = theirs.step(output, timestep, x).prev_sample
    levels = sigmas.unique_consecutive() if sampler == "Heun" else sigmas

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return NATIVE.clean(velocity(x, NATIVE.levels.timestep(sigma)), x, sigma)

    found = run_sampler(SAMPLERS[sampler], denoise, start, levels, no_noise, NATIVE)
    torch.testing.assert_close(found, last, rtol=2e-4, atol=2e-4)  # its UniPC divides by the last level, 0


@pytest.mark.parametrize("schedule", ["Karras", "Exponential", "Align Your Steps 11", "Align Your Steps 32", "DDIM"])
def test_schedules_of_sds_levels_are_refused_with_the_reason(schedule: str) -> None:
    levels = FlowLevels(lambda sigma: 1000 * sigma)
    with pytest.raises(UserError, match=f"{schedule}.* has the levels of SD's own noise schedules"):
        noise_levels(schedule, 10, levels, SD15)
