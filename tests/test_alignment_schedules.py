"""How much alignment counts by step and by noise, against plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from library.diffusion.alignment_schedules import align_coefficient, timestep_weights
from library.diffusion.bridge import along_flow
from library.diffusion.scheduler_config import parametrisation_of
from tests.tools.network_runs import NetworkSetting

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_lambda_follows_its_schedules() -> None:
    def at(step: int, schedule: str, cutoff: int | None = None, last: int | None = None) -> float:
        return align_coefficient(step, 0.5, schedule, 3000, cutoff, last)

    assert [at(s, "warmup") for s in (0, 750, 1500, 2250, 3000, 9000)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert at(0, "constant") == 0.5
    assert [at(s, "cutoff", 5000) for s in (1500, 4999, 5000)] == [0.25, 0.5, 0.0]
    assert align_coefficient(0, 0.5, "warmup", 0, None) == 0.5
    for cutoff, last in ((5000, 9000), (None, 5000)):
        assert [at(s, "linear", cutoff, last) for s in (1500, 3000, 3500, 4000, 5000)] == [0.25, 0.5, 0.375, 0.25, 0]
        expected = [0.25, 0.5, 0.25 * (1 + math.cos(math.pi / 4)), 0.25, 0]
        assert [at(s, "cosine", cutoff, last) for s in (1500, 3000, 3500, 4000, 5000)] == pytest.approx(expected)
    assert at(2000, "cosine", None, 1000) == 0, "a run that ends within its warm-up"


def slow_weight(alpha: float, sigma: float, by: str, window: tuple[float, float]) -> float:
    t = sigma / (alpha + sigma)  # of (1 - t) * latents + t * noise, which is as noisy
    if by == "v":
        return min(1.0, max(1.5 - 2 * t, 2 * t - 0.5))
    value = t if by == "t" else 2 * math.log(alpha / sigma)
    return float(window[0] <= value <= window[1])


@pytest.mark.parametrize(("by", "window"), [("v", (0.0, 0.0)), ("t", (0.1, 0.6)), ("log_snr", (-1.0, 3.0))])
def test_weights_by_noise_are_the_same_whatever_the_network_predicts(by: Any, window: tuple[float, float]) -> None:
    """For epsilon, v, both through a bridge, and a native flow: at the same ratio of signal to noise, and as the formula says."""
    epsilon, v = (parametrisation_of({**SD15, "prediction_type": kind}) for kind in ("epsilon", "v_prediction"))
    native = parametrisation_of({"prediction_type": "flow_prediction", "num_train_timesteps": 1000})
    timesteps = torch.arange(3, 1000, 83)
    alpha, sigma = (part.flatten() for part in epsilon.at(timesteps))
    of_native = 1000 * sigma / (alpha + sigma)
    slow = [slow_weight(a, s, by, window) for a, s in zip(alpha.tolist(), sigma.tolist(), strict=True)]
    assert len(set(slow)) > 1
    for path, at in ((epsilon, timesteps), (v, timesteps), (along_flow(epsilon), timesteps), (native, of_native)):
        assert timestep_weights(path.snr(at), by, window).tolist() == pytest.approx(slow, abs=1e-4)


def test_without_noise_and_of_noise_alone() -> None:
    ends = torch.tensor([torch.inf, 0.0])
    assert timestep_weights(ends, "v").tolist() == [1, 1]
    assert timestep_weights(ends, "t", (0.1, 1.0)).tolist() == [0, 1]
    assert timestep_weights(ends, "log_snr", (0.0, 5.0)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"align_timesteps": "v", "align_window": "0.1 1"}, "align_window cuts off where align_timesteps v weighs: give one"),
        ({"align_window": "0.1 1"}, "align_window has no effect with align_timesteps all. Use align_timesteps t or log_snr."),
        ({"align_timesteps": "t"}, "align_window is missing: the lowest and highest t"),
        ({"align_timesteps": "t", "align_window": "1 0.1"}, "align_window wants the lower end first, got 1 0.1."),
        ({"align_timesteps": "t", "align_window": "0.95 1"}, "their t goes from 0.0283 to 0.936."),
        ({"align_timesteps": "t", "align_window": "0.1 1", "max_timestep": 5}, "align_window 0.1 1 holds no timestep that is"),
        ({"align_timesteps": "log_snr", "align_window": "8 9", "flow_model": ""}, "their log_snr goes from -5.36 to 7.07."),
        ({"align_schedule": "cosine", "align_cutoff_step": 2, "align_warmup_steps": 3}, "nothing is left to fall."),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    changes: dict[str, Any], words: str, network_setting: NetworkSetting, tiny_dinov2: Any, tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = {"alignment": "", "dino_model": tiny_dinov2, "dino_resolution": 56, "token_grid": 4, **changes}
    assert network_setting.train(tmp_path / "out", **options, cache_dir=tmp_path / "caches") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not list((tmp_path / "caches").glob("latents_*"))
