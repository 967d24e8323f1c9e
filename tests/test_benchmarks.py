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
