"""The page of the benchmarks, and what they count; that they run is in test_on_gpu.py."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from library.options.toml_file import PROJECT_ROOT


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(PROJECT_ROOT / "benchmarks"), *sys.path])


def test_the_page_has_a_section_for_each_result(benchmarks: None) -> None:
    import page
    from common import RESULTS

    text = (PROJECT_ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("*.json"):
        assert page.section(path).strip() in text, f"{path.name}: run python benchmarks/page.py"


def test_a_picture_that_is_not_finite_counts_as_none(
    benchmarks: None, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import samplers

    from library.inference.samplers import SAMPLERS

    broken = replace(SAMPLERS["Heun"], function=lambda denoise, x, sigmas, noise: x * float("nan"))
    monkeypatch.setitem(SAMPLERS, "Heun", broken)
    arguments = argparse.Namespace(base=str(tiny_sd15), size=64, steps=1, dtype="float")
    _, measured = samplers.measure(arguments, str(tiny_sd15))
    assert measured["samplers_that_drew"] == len(SAMPLERS) - 1 and "Heun_seconds" not in measured


def test_the_page_says_at_a_glance_which_targets_are_missed(benchmarks: None) -> None:
    import page

    def result(met: object, value: float) -> dict[str, object]:
        return {"measured": {"step_seconds": value}, "targets": {"step_seconds": {"at_most": 0.09, "met": met}}}

    unknown = "not measured: no GPU here"
    text = page.glance(
        {Path("a.json"): result(True, 0.08), Path("b.json"): result(unknown, 2.0), Path("c.json"): result(False, 0.1)}
    )
    assert "1 met, 1 missed, 1 not measured." in text
    rows = [line for line in text.splitlines() if "](#" in line]
    assert rows[0] == "| **missed** | [c](#c) | step | 0.1 s | <= 0.09 |"
    assert rows[1:] == [
        "| met | [a](#a) | step | 0.08 s | <= 0.09 |",
        "| not measured | [b](#b) | step | 2 s | <= 0.09 |",
    ]


def test_the_decoding_benchmark_goes_through_the_pipeline(benchmarks: None, tmp_path: Path) -> None:
    import cache_build

    measured, targets = cache_build.decode_bound(argparse.Namespace(count=10, repeats=1, workers=2), tmp_path)
    for name in ("1024_to_1024", "1024_to_512", "3000_to_1024"):
        assert measured[f"{name}_share"] > 0 and measured[f"{name}_pipeline_cpu_seconds_per_1000"] > 0  # type: ignore[operator]
    assert targets.keys() <= measured.keys()


def test_the_merge_benchmark_sums_up_its_rounds(benchmarks: None) -> None:
    import merge

    ways = {"cp": 2.0, "cp_and_sync": 3.0, "written": 3.0, "whole": 5.0, "other": 20.0, "command": 10.0}
    one = {way: {"seconds": value, "cpu_seconds": value, "peak_gb": 0.5} for way, value in ways.items()}
    measured, targets = merge.summary([one, one], merge.TARGETS["sdxl"])
    assert measured["whole_of_cp"] == 2.5 and measured["command_of_other"] == 0.5 and measured["other_peak_gb"] == 0.5
    assert {name: target["met"] for name, target in targets.items()} == dict.fromkeys(merge.TARGETS["sdxl"], True)


COUNTS = """
import sys, time
print("loading 3/8", flush=True)
memory = bytearray(b"1") * 50_000_000
for step in range(1, 4):
    time.sleep(0.3)
    print(f"step {step}/3  loss 0.1", flush=True)
sys.exit(int(sys.argv[1]))
"""


def test_a_training_is_watched_from_outside(benchmarks: None, tmp_path: Path) -> None:
    import os

    import watch

    cores = sorted(os.sched_getaffinity(0))
    figures = watch.watch([sys.executable, "-c", COUNTS, "0"], 3, cores=cores, folder=tmp_path)
    assert 0.3 <= figures.first_step_seconds <= figures.whole_seconds - 0.6 and figures.step_seconds >= 0.3
    assert figures.peak_pss_gb > figures.peak_anonymous_gb > 0.05
    with pytest.raises(watch.TrainingFailed, match="exit code 2 after 3 of 3 steps"):
        watch.watch([sys.executable, "-c", COUNTS, "2"], 3, cores=cores, folder=tmp_path)
    with pytest.raises(watch.TrainingFailed, match="after 0 of 5 steps"):
        watch.watch([sys.executable, "-c", COUNTS, "0"], 5, cores=cores, folder=tmp_path)


def test_programs_are_compared_round_by_round(benchmarks: None) -> None:
    import beside
    from watch import Figures

    ours = [Figures(10, 15, 2, 4, 3, 2.5, 30), Figures(12, 15, 4, 4, 3, 2.5, 30), Figures(11, 15, 3, 4, 3, 2.5, 30)]
    kohya = [Figures(40, 50, 4, 8, 6, 5.5, 90), Figures(40, 50, 4, 8, 6, 5.5, 90), Figures(40, 50, 4, 8, 6, 5.5, 90)]
    measured, targets = beside.summary({"ours": ours, "kohya": kohya})
    assert measured["ours_step_seconds"] == 3 and measured["step_seconds_of_kohya_by_round"] == [0.5, 1.0, 0.75]
    assert targets["step_seconds_of_kohya"] == {"at_most": 0.75, "met": True}
    assert targets["first_step_seconds_of_kohya"]["met"] and targets["peak_pss_gb_of_kohya"]["met"]


def test_the_profile_names_the_operations_of_a_step(benchmarks: None, tiny_sd15: Path, tmp_path: Path) -> None:
    import profile_step

    arguments = argparse.Namespace(
        family="sd15", base=str(tiny_sd15), resolution=64, batch=1, precision="no", folder=None, rest=[]
    )
    settings, measured = profile_step.measure(arguments, tmp_path)
    shares = [value for name, value in measured.items() if name.endswith(": share")]
    assert len(shares) == profile_step.SHOWN and shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1.001
    assert any(name.startswith("aten::") and value > 10 for name, value in measured.items() if name.endswith(": calls"))
    assert settings["weights"] == "random"
