"""The diffusion loss against loops over floats in double precision: what is compared, losses, masks and weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.diffusion.loss import PointwiseLoss
from library.diffusion.noise import draw
from library.diffusion.objective import Objective
from library.diffusion.predictions import EPSILON, VELOCITY, Prediction
from library.errors import UserError
from library.options.kohya.objective import NoiseOptions
from tests.test_parametrisation import TIMESTEPS, alpha_bars, batch, parametrisation
from tests.tools.no_reads import NoReads

KINDS = [
    (output, compares, f"{output.noun} compared as {(compares or output).noun}")
    for output in (EPSILON, VELOCITY)
    for compares in (None, EPSILON, VELOCITY)
]
every_comparison = pytest.mark.parametrize(
    ("output", "compares"), [kind[:2] for kind in KINDS], ids=[kind[2] for kind in KINDS]
)


def slow_bend(name: str, c: float, scale: float, timestep: int, alpha_bar: float) -> float:
    if name == "constant":
        return c * scale
    if name == "exponential":
        return math.exp(math.log(c) / 1000 * timestep) * scale
    if alpha_bar == 0:
        return c * scale
    sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
    return ((1 - c) / (1 + sigma) ** 2 + c) * scale


def slow_losses(objective: Objective, zero: bool = False, mask: np.ndarray | None = None) -> list[float]:
    """Every sample's loss before its weight, by loops; mask [B, h, w]."""
    latents, noise, output, _ = batch()
    p, losses = objective.pointwise, []
    said, compared = objective.parametrisation.output, objective.compared
    for i, t in enumerate(TIMESTEPS):
        a_bar = alpha_bars(zero)[t]
        a, s = math.sqrt(a_bar), math.sqrt(1 - a_bar)
        c = slow_bend(p.huber_schedule, p.huber_c, p.huber_scale, t, a_bar)
        total = area = 0.0
        for channel in range(4):
            for y in range(3):
                for x in range(2):
                    z, e, o = (float(v[i, channel, y, x]) for v in (latents, noise, output))
                    noisy = a * z + s * e
                    if (said, compared) == (EPSILON, VELOCITY):
                        o = (o - s * noisy) / a
                    elif (said, compared) == (VELOCITY, EPSILON):
                        o = a * o + s * noisy
                    d = o - (a * e - s * z if compared is VELOCITY else e)
                    root = math.sqrt(d * d + c * c) - c
                    value = {"l2": d * d, "l1": abs(d), "huber": 2 * c * root, "smooth_l1": 2 * root}[p.loss_type]
                    weight = 1.0 if mask is None else float(mask[i, y, x])
                    total, area = total + value * weight, area + weight
        losses.append(total / area if objective.masked_loss_renormalize and area else total / 24)
    return losses


def slow_weight(objective: Objective, timestep: int, alpha_bar: float) -> float:
    """kohya's factors in kohya's order; SNRs stay between 1/1000 and 1000 where they are divided by."""
    snr = alpha_bar / (1 - alpha_bar)
    bounded = min(max(snr, 1e-3), 1000.0)
    s = bounded / (bounded + 1)
    v = objective.compared is VELOCITY
    loss = 1.0
    if objective.min_snr_gamma is not None:
        low = min(snr, objective.min_snr_gamma)
        loss *= low / (snr + 1) if v else (low / snr if snr else 1.0)
    if objective.scale_v_pred_loss_like_noise_pred:
        loss *= s
    if objective.v_pred_like_loss is not None:
        loss = loss + loss / s * objective.v_pred_like_loss
    if objective.debiased_estimation_loss:
        loss *= 1 / (bounded + 1) if v else 1 / math.sqrt(bounded)
    return loss


def losses(objective: Objective, **extra: torch.Tensor) -> list[float]:
    latents, noise, output, timesteps = batch()
    noisy = objective.parametrisation.add_noise(latents, noise, timesteps)
    return objective.losses(output, latents, noise, noisy, timesteps, **extra).tolist()


# ------------------------------------------------------------------------------------------------- what is compared


@every_comparison
def test_the_loss_is_the_slow_one_whatever_is_said_and_compared(
    output: Prediction, compares: Prediction | None
) -> None:
    objective = Objective(replace(parametrisation(), output=output), compares)
    assert losses(objective) == pytest.approx(slow_losses(objective), rel=2e-3)


def test_the_v_loss_of_an_epsilon_base_is_its_epsilon_loss_over_alpha_bar() -> None:
    as_v, as_epsilon = losses(Objective(parametrisation(), VELOCITY)), losses(Objective(parametrisation()))
    scaled = [loss / alpha_bars()[t] for loss, t in zip(as_epsilon, TIMESTEPS, strict=True)]
    assert as_v == pytest.approx(scaled, rel=1e-3)


def test_losses_are_float32_when_the_network_computes_in_bfloat16() -> None:
    latents, noise, output, timesteps = batch()
    noisy = parametrisation().add_noise(latents, noise, timesteps)
    found = Objective(parametrisation()).losses(output.bfloat16(), latents, noise, noisy, timesteps)
    assert found.dtype == torch.float32


def test_a_perfect_epsilon_model_taken_for_v_scores_0_94() -> None:
    """(1 - alpha)^2 + sigma^2 * m2 for latents of second moment 1; the U-REPA document's 2.05 needs wrong latents."""
    latents, noise = torch.randn(2, 2000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.randint(0, 1000, (2000,), generator=torch.Generator().manual_seed(1))
    noisy = parametrisation().add_noise(latents, noise, timesteps)
    raw = Objective(replace(parametrisation(), output=VELOCITY)).losses(noise, latents, noise, noisy, timesteps)
    exact = Objective(parametrisation(), VELOCITY).losses(noise, latents, noise, noisy, timesteps)
    assert raw.mean().item() == pytest.approx(0.941, abs=0.02) and exact.mean().item() == pytest.approx(0, abs=1e-6)


def test_velocities_out_of_epsilon_are_refused_where_the_schedule_ends_in_noise() -> None:
    ends = parametrisation(zero=True)
    with pytest.raises(
        UserError, match="divides by 0. Leave zero_terminal_snr out, or take the base's raw output for v"
    ):
        Objective(ends, VELOCITY)
    for compares in (None, EPSILON, VELOCITY):
        Objective(replace(ends, output=VELOCITY), compares)


@every_comparison
def test_preserved_samples_are_compared_with_the_frozen_output_and_the_others_are_not(
    output: Prediction, compares: Prediction | None
) -> None:
    latents, noise, said, timesteps = batch()
    preserved = torch.randn(said.shape, generator=torch.Generator().manual_seed(5))
    chosen = torch.tensor([True, False, True, False, False, False])
    objective = Objective(replace(parametrisation(), output=output), compares)
    noisy = objective.parametrisation.add_noise(latents, noise, timesteps)
    difference = objective.prediction(said, noisy, timesteps) - objective.prediction(preserved, noisy, timesteps)
    kept = difference.square().mean(dim=(1, 2, 3)).tolist()
    plain, mixed = losses(objective), losses(objective, preserved=preserved, preserve_mask=chosen)
    assert mixed == pytest.approx([k if c else p for k, p, c in zip(kept, plain, chosen.tolist(), strict=True)])
    assert losses(objective, preserved=preserved) == pytest.approx(kept)
    assert losses(objective, preserved=said) == [0.0] * 6


# ------------------------------------------------------------------------------------------------- losses and masks


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_every_loss_type_is_the_slow_one(loss_type: str, huber_schedule: str, zero: bool) -> None:
    pointwise = PointwiseLoss(loss_type, huber_schedule, huber_c=0.15, huber_scale=1.7)  # type: ignore[arg-type]
    objective = Objective(parametrisation("v_prediction", zero=zero), pointwise=pointwise)
    assert losses(objective) == pytest.approx(slow_losses(objective, zero), rel=1e-3)


def test_huber_is_the_square_near_0_and_its_gradient_is_bounded_far_off() -> None:
    pointwise = PointwiseLoss("smooth_l1", "constant", 0.1)
    prediction = torch.tensor([[[[1e-3, 50.0]]]], requires_grad=True)
    values = pointwise(prediction, torch.zeros(1, 1, 1, 2), parametrisation(), torch.tensor([5]))
    values.sum().backward()
    assert values[0, 0, 0, 0].item() == pytest.approx(1e-6 / 0.1, rel=1e-2)
    assert prediction.grad is not None and prediction.grad[0, 0, 0, 1].item() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("renormalize", [False, True])
def test_masked_losses_are_the_slow_ones(renormalize: bool) -> None:
    generator = np.random.default_rng(0)
    fine = generator.random((6, 24, 16)).astype(np.float32)
    fine[2], fine[3] = 0.0, 1.0
    coarse = np.zeros((6, 3, 2))
    for y in range(3):
        for x in range(2):
            coarse[:, y, x] = fine[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean(axis=(1, 2))
    # 4 channels share a mask.
    objective = Objective(parametrisation("v_prediction"), masked_loss_renormalize=renormalize)
    values = losses(objective, mask=torch.from_numpy(fine)[:, None])
    assert values == pytest.approx(slow_losses(objective, mask=coarse), rel=1e-3)
    assert values[2] == 0 and values[3] == pytest.approx(losses(objective)[3])


def test_a_sample_weight_scales_its_sample_alone() -> None:
    plain = losses(Objective(parametrisation()))
    weighted = losses(Objective(parametrisation()), sample_weights=torch.tensor([1.0, 1.0, 0.25, 1.0, 0.0, 1.0]))
    assert weighted[2] == plain[2] * 0.25 and weighted[4] == 0
    assert [weighted[i] for i in (0, 1, 3, 5)] == [plain[i] for i in (0, 1, 3, 5)]


# ------------------------------------------------------------------------------------------------- weights by timestep

WEIGHTS = [
    {"min_snr_gamma": 5.0},
    {"debiased_estimation_loss": True},
    {"min_snr_gamma": 1.0, "debiased_estimation_loss": True},
]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("prediction_type", "weights"),
    [(kind, weights) for kind in ("epsilon", "v_prediction") for weights in WEIGHTS]
    + [
        ("epsilon", {"v_pred_like_loss": 0.5}),
        ("epsilon", {"min_snr_gamma": 5.0, "v_pred_like_loss": 2.0, "debiased_estimation_loss": True}),
        ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True}),
        (
            "v_prediction",
            {"min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True},
        ),
    ],
)
def test_every_weighting_is_the_slow_one_also_at_an_snr_of_0(
    prediction_type: str, weights: dict[str, float], zero: bool
) -> None:
    objective = Objective(parametrisation(prediction_type, zero=zero), **weights)  # type: ignore[arg-type]
    plain = slow_losses(objective, zero)
    expected = [loss * slow_weight(objective, t, alpha_bars(zero)[t]) for loss, t in zip(plain, TIMESTEPS, strict=True)]
    values = losses(objective)
    assert all(math.isfinite(value) for value in values)
    # float32 keeps few digits of 1 - alphas_cumprod at t = 0.
    assert values == pytest.approx(expected, rel=5e-3)


def test_min_snr_weights_what_is_compared_and_not_what_the_network_says() -> None:
    objective = Objective(parametrisation(), VELOCITY, 5.0)
    weights = [slow_weight(objective, t, alpha_bars()[t]) for t in TIMESTEPS]
    expected = [loss * weight for loss, weight in zip(slow_losses(objective), weights, strict=True)]
    assert losses(objective) == pytest.approx(expected, rel=5e-3)


def test_a_velocity_loss_scaled_like_noise_is_the_noise_loss() -> None:
    latents, noise, output, timesteps = batch(5)
    timesteps = torch.tensor([10, 100, 300, 600, 900])
    noisy = parametrisation().add_noise(latents, noise, timesteps)
    as_noise = Objective(parametrisation()).losses(output, latents, noise, noisy, timesteps)
    scaled = Objective(parametrisation(), VELOCITY, scale_v_pred_loss_like_noise_pred=True)
    torch.testing.assert_close(scaled.losses(output, latents, noise, noisy, timesteps), as_noise, rtol=1e-3, atol=1e-4)


def test_at_the_last_timestep_of_zero_terminal_snr_nothing_is_infinite_and_gradients_are_finite() -> None:
    latents, noise, output, _ = batch()
    timesteps = torch.full((6,), 999)
    for prediction_type, huber in (("epsilon", "snr"), ("v_prediction", "exponential")):
        objective = Objective(
            parametrisation(prediction_type, zero=True), min_snr_gamma=5.0, debiased_estimation_loss=True,
            pointwise=PointwiseLoss("huber", huber),  # type: ignore[arg-type]
        )  # fmt: skip
        noisy = objective.parametrisation.add_noise(latents, noise, timesteps)
        assert torch.equal(noisy, noise)
        leaf = output.clone().requires_grad_()
        values = objective.losses(leaf, latents, noise, noisy, timesteps)
        values.sum().backward()
        assert leaf.grad is not None and values.isfinite().all() and leaf.grad.isfinite().all()


def test_defaults_change_nothing_to_the_bit() -> None:
    latents, noise, output, timesteps = batch()
    for prediction_type in ("epsilon", "v_prediction"):
        objective = Objective(parametrisation(prediction_type), min_snr_gamma=5.0)
        noisy = objective.parametrisation.add_noise(latents, noise, timesteps)
        difference = output - objective.target(latents, noise, timesteps)
        snr = objective.parametrisation.snr(timesteps)
        weight = snr.clamp(max=5.0) / (snr + 1.0 if prediction_type == "v_prediction" else snr)
        expected = difference.square().mean(dim=(1, 2, 3)) * weight
        assert torch.equal(objective.losses(output, latents, noise, noisy, timesteps), expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, "scale_v_pred_loss_like_noise_pred weights a loss on velocities, and "
         "this run compares noise. Leave it out, or use v_parameterization."),
        ({"compares": VELOCITY, "v_pred_like_loss": 1.0}, "v_pred_like_loss adds to a loss on noise, and this run compares "
         "velocities. Leave it out."),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be positive, got 0.0."),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_what_is_compared_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Objective(parametrisation(), **arguments)  # type: ignore[arg-type]


@every_comparison
def test_noise_and_loss_never_wait_for_the_device(output: Prediction, compares: Prediction | None) -> None:
    recipe = NoiseOptions(10, 900, 0.1, True, 0.1, 4, 0.3, 0.1, True)
    compared = compares or output
    process = replace(parametrisation(zero=(output, compared) != (EPSILON, VELOCITY)), output=output)
    own = {"v_pred_like_loss": 0.5} if compared is EPSILON else {"scale_v_pred_loss_like_noise_pred": True}
    generator = torch.Generator().manual_seed(0)
    latents, _, said, _ = batch()
    chosen, mask = torch.tensor([True, False] * 3), torch.ones(6, 1, 24, 16)
    for loss_type in ("l2", "l1", "huber", "smooth_l1"):
        for huber_schedule in ("constant", "exponential", "snr"):
            objective = Objective(
                process, compares, min_snr_gamma=5.0, debiased_estimation_loss=True, masked_loss_renormalize=True,
                pointwise=PointwiseLoss(loss_type, huber_schedule), **own,  # type: ignore[arg-type]
            )  # fmt: skip
            with NoReads():
                drawn = draw(latents, generator, recipe, objective.parametrisation)
                noisy = objective.parametrisation.add_noise(latents, drawn.added_noise, drawn.timesteps)
                values = objective.losses(
                    said, latents, drawn.noise, noisy, drawn.timesteps, mask=mask, sample_weights=torch.ones(6),
                    preserved=said, preserve_mask=chosen,
                )  # fmt: skip
            assert values.isfinite().all() and (values[chosen] == 0).all()
    with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        latents.sum().item()
