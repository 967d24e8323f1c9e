"""Samplers agree with k-diffusion's and diffusers', and a picture with itself in any batch.

tests/data/sampler_references.json: what k-diffusion 0.1.1.post1 made of `tests.tools.sampling`'s model and noise, in float64.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from library.diffusion.scheduler_config import parametrisation_of
from library.inference.sampler_noise import BrownianNoise, NoiseSource, StepNoise
from library.inference.samplers import (
    SAMPLERS,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    euler_ancestral,
    no_noise,
    plms,
    unipc,
)
from library.inference.sigmas import SCHEDULES, noise_levels
from library.models.sd15_configs import SD15_SCHEDULER
from networks.families import SD15
from tests.tools.sampling import denoise, start, wavy_noise

REFERENCES = json.loads((Path(__file__).parent / "data" / "sampler_references.json").read_text(encoding="utf-8"))
LEVELS = parametrisation_of(SD15_SCHEDULER).levels
BETAS = {key: SD15_SCHEDULER[key] for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}
SHAPE = (4, 8, 8)


def source(name: str, seeds: list[int]) -> NoiseSource:
    return {"none": no_noise, "step": StepNoise(seeds, SHAPE), "brownian": BrownianNoise(seeds, SHAPE)}[
        SAMPLERS[name].noise
    ]


def pictures(name: str, seeds: list[int], steps: int = 8) -> torch.Tensor:
    sigmas = noise_levels("Karras", steps, LEVELS, SD15)
    first = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return SAMPLERS[name].function(denoise, torch.stack(first) * float(sigmas[0]), sigmas, source(name, seeds))


@pytest.mark.parametrize("case", REFERENCES["results"], ids=lambda case: f"{case['sampler']} {case['sigmas']}")
def test_the_samplers_are_k_diffusions(case: dict[str, Any]) -> None:
    sigmas = torch.tensor(REFERENCES["sigmas"][case["sigmas"]], dtype=torch.float64)
    noise = no_noise if SAMPLERS[case["sampler"]].noise == "none" else wavy_noise
    found = SAMPLERS[case["sampler"]].function(denoise, start(float(sigmas[0])), sigmas, noise)
    assert found[0].tolist() == pytest.approx(case["x"], rel=1e-8, abs=1e-8)


def test_every_sampler_is_compared() -> None:
    others = {"DDIM", "UniPC", "PLMS", "Heun", "DPM2", "DPM2 a", "DPM-Solver 2M", "DPM++ 2S"}  # diffusers', below
    assert {case["sampler"] for case in REFERENCES["results"]} == set(SAMPLERS) - others


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_diffusers(eta: float) -> None:
    scheduler = DDIMScheduler(
        **BETAS,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="sample",
    )
    scheduler.set_timesteps(20)
    sigmas = noise_levels("DDIM", 20, LEVELS, SD15)
    begin = start(float(sigmas[0]))
    theirs = begin / math.sqrt(1 + float(sigmas[0]) ** 2)
    for timestep, (sigma, after) in zip(scheduler.timesteps, zip(sigmas, sigmas[1:], strict=False), strict=True):
        clean = denoise(theirs * math.sqrt(1 + sigma**2), float(sigma))
        noise = wavy_noise(float(sigma), float(after)) if eta else None
        theirs = scheduler.step(clean, timestep, theirs, eta=eta, variance_noise=noise).prev_sample
    ours = ddim(denoise, begin, sigmas, wavy_noise, eta=eta) / math.sqrt(1 + float(sigmas[-1]) ** 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def by_diffusers(scheduler: SchedulerMixin, steps: int, sigmas: torch.Tensor) -> torch.Tensor:
    """What a scheduler of epsilon with latents of k-diffusion's scale makes of the model of these tests."""
    scheduler.set_timesteps(steps)
    x = start(float(sigmas[0]))
    for timestep in scheduler.timesteps:
        scale = float((x / scheduler.scale_model_input(x, timestep))[0, 0])
        sigma = math.sqrt(scale**2 - 1)
        x = scheduler.step((x - denoise(x, sigma)) / sigma, timestep, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Heun", HeunDiscreteScheduler), ("DPM2", KDPM2DiscreteScheduler), ("DPM2 a", KDPM2AncestralDiscreteScheduler)],
    ids=["Heun", "DPM2", "DPM2 a"],
)
def test_the_samplers_of_two_calls_are_diffusers(
    name: str, kind: type[SchedulerMixin], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPM2 a with its noise left out on both sides."""
    ancestral = "diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(ancestral, lambda shape, **_: torch.zeros(shape))
    sigmas = noise_levels("Karras", 12, LEVELS, SD15)
    theirs = by_diffusers(kind(**BETAS, use_karras_sigmas=True), 12, sigmas)
    ours = SAMPLERS[name].function(denoise, start(float(sigmas[0])), sigmas, lambda *_: torch.zeros(()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_plms_is_diffusers_pndm(steps: int) -> None:
    scheduler = PNDMScheduler(
        **BETAS, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True
    )
    scheduler.set_timesteps(steps)
    sigmas = noise_levels("DDIM", steps, LEVELS, SD15)
    theirs = start(float(sigmas[0])) / math.sqrt(1 + float(sigmas[0]) ** 2)
    for timestep in scheduler.timesteps:
        sigma = float(LEVELS.sigmas[int(timestep)])
        noisy = theirs * math.sqrt(1 + sigma**2)
        theirs = scheduler.step((noisy - denoise(noisy, sigma)) / sigma, timestep, theirs).prev_sample
    ours = plms(denoise, start(float(sigmas[0])), sigmas, no_noise) / math.sqrt(1 + float(sigmas[-1]) ** 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 5, 20])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        (
            "DPM-Solver 2M",
            DPMSolverMultistepScheduler(
                **BETAS, use_karras_sigmas=True, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
            ),
        ),
        ("DPM++ 2S", DPMSolverSinglestepScheduler(**BETAS, use_karras_sigmas=True)),
    ],
    ids=["DPM-Solver 2M", "DPM++ 2S"],
)
def test_kohyas_dpm_solvers_are_diffusers(name: str, scheduler: SchedulerMixin, steps: int) -> None:
    """To the last level but one: diffusers ends "dpmsolver" above 0."""
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    theirs = start(float(sigmas[0])) / math.sqrt(1 + float(sigmas[0]) ** 2)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = float(sigmas[index])
        noisy = theirs * math.sqrt(1 + sigma**2)
        epsilon = (noisy - denoise(noisy, sigma)) / sigma
        theirs = scheduler.step(epsilon, timestep, theirs).prev_sample
    last = float(sigmas[-1])
    ours = SAMPLERS[name].function(denoise, start(float(sigmas[0])), sigmas, no_noise)
    torch.testing.assert_close(ours / math.sqrt(1 + last**2), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [3, 20])
def test_unipc_is_diffusers(order: int, steps: int) -> None:
    """But for its last step, of which diffusers makes NaN with bh1: there the answer is the model's."""
    scheduler = UniPCMultistepScheduler(
        **BETAS, solver_order=order, solver_type="bh1", use_karras_sigmas=True, prediction_type="sample"
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    theirs = start(float(sigmas[0])) / math.sqrt(1 + float(sigmas[0]) ** 2)
    for index, timestep in enumerate(scheduler.timesteps):
        clean = denoise(theirs * math.sqrt(1 + float(sigmas[index]) ** 2), float(sigmas[index]))
        theirs = scheduler.step(clean, timestep, theirs).prev_sample
    ours = unipc(denoise, start(float(sigmas[0])), sigmas, no_noise, order=order)
    torch.testing.assert_close(ours, clean, rtol=1e-4, atol=1e-4)


def test_dpmpp_2m_is_diffusers() -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, prediction_type="sample")
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double()
    theirs = start(float(sigmas[0])) / math.sqrt(1 + float(sigmas[0]) ** 2)
    for index, timestep in enumerate(scheduler.timesteps):
        clean = denoise(theirs * math.sqrt(1 + float(sigmas[index]) ** 2), float(sigmas[index]))
        theirs = scheduler.step(clean, timestep, theirs).prev_sample
    torch.testing.assert_close(
        dpmpp_2m(denoise, start(float(sigmas[0])), sigmas, no_noise), theirs, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_takes_every_schedule(name: str, schedule: str) -> None:
    for steps in (1, 2, 12):
        sigmas = noise_levels(schedule, steps, LEVELS, SD15, discard_next_to_last=SAMPLERS[name].discard_next_to_last)
        calls: list[float] = []

        def counted(x: torch.Tensor, sigma: float, calls: list[float] = calls) -> torch.Tensor:
            calls.append(sigma)
            return denoise(x, sigma)

        found = SAMPLERS[name].function(counted, start(float(sigmas[0])), sigmas, wavy_noise)
        assert torch.isfinite(found).all() and found.dtype == torch.float64
        most = steps * SAMPLERS[name].calls_per_step + SAMPLERS[name].extra_calls
        assert len(calls) in (most, most - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_many_steps_come_to_the_data(name: str) -> None:
    """Half around -0.8, half around 0.8, deviation 0.3."""
    found = pictures(name, list(range(15)), steps=60)
    torch.testing.assert_close(found.abs().mean(), torch.tensor(0.8), rtol=0, atol=0.03)
    torch.testing.assert_close(found.std(), torch.tensor(math.sqrt(0.8**2 + 0.3**2)), rtol=0, atol=0.03)


@pytest.mark.bits
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    together = pictures(name, [5, 6, 7])
    for index, seed in enumerate((5, 6, 7)):
        assert torch.equal(pictures(name, [seed])[0], together[index])
    assert torch.equal(pictures(name, [7, 5])[1], together[0])


@pytest.mark.parametrize(
    "function", [euler_ancestral, dpmpp_2s_ancestral, dpmpp_2m_sde, dpmpp_3m_sde], ids=lambda one: one.__name__
)
def test_without_eta_no_noise_is_asked_for(function: Any) -> None:
    sigmas = noise_levels("Karras", 6, LEVELS, SD15)
    assert torch.isfinite(partial(function, eta=0.0)(denoise, start(float(sigmas[0])), sigmas, no_noise)).all()


def test_half_precision_latents_stay_half() -> None:
    sigmas = noise_levels("Karras", 6, LEVELS, SD15)
    for name in SAMPLERS:
        noise = source(name, [1])
        begin = (torch.ones(1, *SHAPE) * float(sigmas[0])).bfloat16()
        assert SAMPLERS[name].function(denoise, begin, sigmas, noise).dtype == torch.bfloat16


@pytest.mark.bits
def test_step_noise_is_its_seeds_and_its_number() -> None:
    one, other = StepNoise([3], SHAPE), StepNoise([9, 3], SHAPE)
    for _ in range(3):
        assert torch.equal(one(2.0, 1.0)[0], other(7.0, 5.0)[1])
    assert not torch.equal(one(2.0, 1.0), one(2.0, 1.0))


@pytest.mark.bits
def test_brownian_increments_add_up() -> None:
    noise = BrownianNoise([1, 2], SHAPE)

    def increment(sigma: float, after: float) -> torch.Tensor:
        return noise(sigma, after) * math.sqrt(math.log(sigma / after))

    torch.testing.assert_close(increment(8.0, 0.5), increment(8.0, 2.0) + increment(2.0, 0.5), rtol=1e-4, atol=1e-5)
    assert torch.equal(noise(8.0, 2.0), BrownianNoise([1, 2], SHAPE)(8.0, 2.0))
    assert torch.equal(noise(8.0, 2.0)[1:], BrownianNoise([2], SHAPE)(8.0, 2.0))
    with pytest.raises(ValueError, match="the two levels of a step must differ"):
        noise(1.0, 1.0)


def test_brownian_increments_are_normal_and_independent() -> None:
    noise = BrownianNoise(list(range(8)), (32, 32))
    sigmas = [14.6, 9.0, 3.0, 2.9, 0.2, 0.19, 0.03, 0.029]
    drawn = torch.stack([noise(a, b).flatten() for a, b in zip(sigmas, sigmas[1:], strict=False)])
    assert drawn.mean(dim=1).abs().max() < 0.05
    torch.testing.assert_close(torch.cov(drawn), torch.eye(len(drawn)), rtol=0, atol=0.06)


def test_more_steps_of_an_sde_refine_the_picture() -> None:
    """One path of noise: 200 and 400 steps come nearer to each other than pictures of two seeds ever are."""
    few, many = (pictures("DPM++ 2M SDE", [3], steps) for steps in (200, 400))
    assert (few - many).abs().mean() < 0.25 * (few - pictures("DPM++ 2M SDE", [4], 200)).abs().mean()
