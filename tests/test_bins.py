"""Noise levels drawn by how hard they are: probabilities, corrections, what is learned, and a run that resumes with it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from library.diffusion.bridge import along_flow
from library.diffusion.level_accuracy import LevelAccuracy
from library.diffusion.scheduler_config import parametrisation_of
from library.diffusion.timestep_bins import DECAY, TimestepBins
from library.models.sd15_configs import SD15_SCHEDULER
from library.training.state import load_bins
from tests.tools.network_runs import EXACT, NetworkSetting, losses, metadata
from tests.tools.runs import assert_equal_states

COUNT, FLOOR = 100, 0.2
BINS = {"timestep_sampling": "bins", "timestep_bins": 8}


def hard_at_the_end(power: float = 1.0, usable: int = COUNT, jitter: float = 2.5) -> TimestepBins:
    """The last bin is a hundred times as hard as the first; from `usable` on they are masked."""
    difficulty = torch.arange(1, COUNT + 1)
    return TimestepBins.known(difficulty, torch.arange(COUNT) < usable, power=power, floor=FLOOR, jitter=jitter)


@pytest.mark.parametrize(("power", "usable"), [(0.0, COUNT), (1.0, COUNT), (2.0, 40), (1.0, 0)])
def test_probabilities_sum_to_1_respect_the_floor_and_leave_it_alone_to_masked_bins(power: float, usable: int) -> None:
    chances = hard_at_the_end(power, usable).probabilities
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    assert chances.min().item() >= FLOOR / COUNT * (1 - 1e-5)
    wanted = torch.arange(1, COUNT + 1.0) ** power * (torch.arange(COUNT) < usable)
    wanted = wanted / wanted.sum() if usable else torch.full((COUNT,), 1 / COUNT)
    torch.testing.assert_close(chances, (1 - FLOOR) * wanted + FLOOR / COUNT)


def test_what_is_drawn_has_these_probabilities() -> None:
    """Jitter of half a bin for the hardest: nothing leaves its bin, and a histogram shows the probabilities themselves."""
    bins, number = hard_at_the_end(), 400_000
    quantiles, chosen = bins.draw(number, torch.Generator().manual_seed(0))
    assert torch.equal((quantiles * COUNT).long().clamp(max=COUNT - 1), chosen)
    drawn = torch.bincount(chosen, minlength=COUNT) / number
    error = (bins.probabilities * (1 - bins.probabilities) / number).sqrt()
    assert ((drawn - bins.probabilities).abs() < 5 * error).all()
    path = along_flow(parametrisation_of(SD15_SCHEDULER))
    alpha, sigma = path.at(path.timesteps_at(quantiles))
    shares = torch.histc((sigma / (alpha + sigma)).flatten(), 10, 0, path.high) / number
    torch.testing.assert_close(shares, bins.probabilities.unflatten(0, (10, 10)).sum(1), atol=3e-3, rtol=0)


@pytest.mark.parametrize("jitter", [0.0, 5.0, 40.0])
def test_the_corrected_mean_is_that_without_bins(jitter: float) -> None:
    def loss(quantiles: torch.Tensor) -> torch.Tensor:
        return 0.3 + (3 * quantiles).sin() + 2 * quantiles**4

    bins, generator = hard_at_the_end(jitter=jitter), torch.Generator().manual_seed(0)
    quantiles, chosen = bins.draw(400_000, generator)
    assert quantiles.min() >= 0 and quantiles.max() <= 1
    weights = bins.corrections(chosen)
    assert weights.max() <= 1 / FLOOR + 1e-4 and weights.mean().item() == pytest.approx(1, abs=0.01)
    plain = loss(torch.rand(400_000, generator=generator)).mean().item()
    assert (loss(quantiles) * weights).mean().item() == pytest.approx(plain, rel=0.01)
    assert loss(quantiles).mean().item() > 1.1 * plain, "without it, hard bins would count more"


def test_bins_learn_the_losses_that_all_processes_met() -> None:
    bins = TimestepBins.learning(4, "cpu", floor=FLOOR)
    torch.testing.assert_close(bins.probabilities, torch.full((4,), 0.25))
    bins.note(torch.tensor([1, 1, 3]), torch.tensor([2.0, 4.0, 9.0]), real=torch.tensor([1.0, 1.0, 0.0]))
    bins.note(torch.tensor([0]), torch.tensor([1.0]))
    bins.update(lambda seen: seen * 2)  # another process met the same
    torch.testing.assert_close(
        bins.difficulty, torch.tensor([1.0, 3.0, 2.0, 2.0]), msg="unknown bins are as hard as the mean"
    )
    bins.note(torch.tensor([0]), torch.tensor([11.0]))
    bins.update(lambda seen: seen)
    old, new = (1 - DECAY**2) * DECAY, 1 - DECAY
    assert bins.difficulty[0].item() == pytest.approx((old * 1 + new * 11) / (old + new))
    before = bins.difficulty
    bins.note(torch.tensor([0]), torch.tensor([99.0]))
    bins.forget()
    bins.update(lambda seen: seen)
    torch.testing.assert_close(bins.difficulty, before)
    fixed = hard_at_the_end()
    fixed.note(torch.tensor([0]), torch.tensor([99.0]))
    fixed.update(lambda seen: seen)
    torch.testing.assert_close(fixed.difficulty, torch.arange(1.0, COUNT + 1))


@pytest.mark.parametrize(
    "process", [parametrisation_of(SD15_SCHEDULER), along_flow(parametrisation_of(SD15_SCHEDULER))]
)
def test_quantiles_of_a_process_are_what_it_draws(process) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    drawn = process.draw_timesteps(torch.Size((40_000, 4, 8, 8)), generator, 100, 800).float()
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(
        process.timesteps_at(quantiles, 100, 800).float(), drawn.quantile(quantiles), atol=8, rtol=0
    )
    assert process.timesteps_at(torch.tensor([1.0]), 100, 800).item() <= 800


# -------------------------------------------------------------------------------------------------------- trainings


@pytest.mark.bits
def test_a_bridge_by_its_losses_resumes_to_the_bit_with_what_it_learned(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {**EXACT, **network_setting.quick, **BINS, "flow_model": "", "max_data_loader_n_workers": 1}
    options |= {"caption_dropout_rate": None, "shuffle_caption": None}
    assert network_setting.train(whole, **options) == 0
    shutil.copytree(whole / "mio-000001-state", parts / "mio-000001-state")
    assert network_setting.train(parts, **options) == 0
    assert_equal_states(whole / "mio-state", parts / "mio-state")
    assert losses(parts) == losses(whole)[2:] and all(torch.tensor(losses(whole)).isfinite())
    early, late = (TimestepBins.learning(8, "cpu") for _ in range(2))
    load_bins(whole / "mio-000001-state", early)
    load_bins(whole / "mio-state", late)
    assert 0 < (early.weight > 0).sum() <= (late.weight > 0).sum() <= 8 and not torch.equal(early.total, late.total)
    said = metadata(whole / "mio.safetensors")
    assert (said["ss_timestep_sampling"], said["ss_timestep_bins"], said["ss_timestep_bin_source"]) == (
        "bins",
        "8",
        "loss",
    )


def probe_file(folder: Path, accuracy: list[float]) -> Path:
    edges = torch.linspace(-6, 6, len(accuracy) + 1).tolist()
    LevelAccuracy(edges, accuracy, {"base": "x"}).write(folder / "bins.json")
    return folder / "bins.json"


def test_a_probe_says_which_bins_are_hard_and_the_histogram_shows_it(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = probe_file(tmp_path, [0.0, 0.0, 1.0, 1.0])  # of noisy levels nothing can be told
    options = {
        **network_setting.quick,
        **BINS,
        "flow_model": "",
        "timestep_bin_source": "probe",
        "timestep_bin_file": file,
    }
    built = network_setting.build(**options)
    bins = built.task.bins
    assert bins is not None and not bins.learns
    torch.testing.assert_close(
        bins.difficulty, torch.tensor([0.0] * 4 + [1.0] * 4), msg="an SNR of 1 is sigma 0.5 of 0.936"
    )
    built.close()
    assert network_setting.train(tmp_path / "out", **options, show_timesteps="console") == 0
    said = capsys.readouterr().out
    assert f"8 bins by {file}, floor 0.2, losses corrected by importance" in said
    shares = {line[:9]: float(line.split()[2].rstrip("%")) for line in said.splitlines() if line[:2] == "0."}
    assert shares["0.70-0.75"] > 5 * shares["0.20-0.25"] > 0


def test_an_ordinary_run_learns_too_and_what_its_state_has_learned_is_shown(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**network_setting.quick, **BINS, "save_state": ""}
    assert network_setting.train(tmp_path / "out", **options, show_timesteps="console") == 0
    assert "bins as they begin: all alike" in capsys.readouterr().out
    assert network_setting.train(tmp_path / "out", **options) == 0
    capsys.readouterr()
    assert network_setting.train(tmp_path / "out", **options, show_timesteps="console") == 0
    assert f"bins as {tmp_path / 'out' / 'mio-state'} left them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--timestep_bins 50", "timestep_bins has no effect without timestep_sampling bins"),
        ("--timestep_sampling bins --timestep_bins 1", "timestep_bins must lie between 2 and 1000, got 1"),
        ("--timestep_sampling bins --timestep_bin_floor 0", "timestep_bin_floor must be above 0 and at most 1, got 0.0"),
        ("--timestep_sampling bins --timestep_bin_min_acc 0.1", "timestep_bin_min_acc belongs to timestep_bin_source probe"),
        ("--timestep_sampling bins --timestep_bin_source probe", "timestep_bin_file is missing"),
        (
            "--timestep_sampling bins --timestep_bin_source probe --timestep_bin_file nowhere.json",
            "timestep_bin_file nowhere.json does not exist",
        ),
        (
            "--timestep_sampling bins --timestep_bin_source probe --timestep_bin_file FILE --timestep_bin_min_acc 0.7",
            "timestep_bin_min_acc 0.7 is reached by no bin of .*, whose best has 0.600",
        ),
        ("--timestep_sampling bins --timestep_bin_source probe --timestep_bin_file OTHER", "is no timestep_bins.json"),
        ("--timestep_sampling bins --discrete_flow_shift 2", "discrete_flow_shift has no effect: .* is no flow model"),
        (
            "--flow_model --timestep_sampling bins --weighting_scheme mode",
            "is a density, and timestep_sampling bins another one",
        ),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_sentence_before_anything_slow(
    options: str, said: str, network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"format_version": 1, "log_snr": [0, 1], "accuracy": [0.1, 0.2]}))
    words = options.replace("FILE", str(probe_file(tmp_path, [0.2, 0.6]))).replace(
        "OTHER", str(tmp_path / "other.json")
    )
    assert network_setting.train(tmp_path / "out", *words.split(), **network_setting.quick) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, error), error
    assert not list(tmp_path.glob("out/*"))
