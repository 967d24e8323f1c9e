"""What a plan says of time and disk: hours by a benchmark of the device, or which one to run; caches that will not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.options.toml_file import PROJECT_ROOT
from library.training.hours import RESULTS, Workload, hours_line
from library.training.plan import Plan
from tests.tools.adapters import kohya_module, write_tensors
from tests.tools.network_runs import NetworkSetting
from tests.tools.runs import RepaSetting

Say = pytest.CaptureFixture[str]
PLAN = Plan(8, 4, 2, 1, steps_per_epoch=100, last_step=900, warmup_steps=0)
LORA = Workload("sdxl", 1024, 4, "bf16", "none", False, "all")
REPA = Workload("sd15", 512, 128, "bf16", "regional", True, "mid")


def result(folder: Path, name: str, device: str = "H200", rate: float = 2.0, **settings: object) -> None:
    of_lora = {"family": "sdxl", "resolution": 1024, "batch": 4, "precision": "bf16", "more": "none"}
    found = {"settings": of_lora | settings, "measured": {"samples_per_second": rate}, "device": device}
    (folder / f"{name}.json").write_text(json.dumps(found))


def test_hours_follow_from_the_result_most_alike_of_this_device(tmp_path: Path) -> None:
    result(tmp_path, "a", device="H100", rate=100)
    result(tmp_path, "b", family="sd15", rate=100)
    result(tmp_path, "c", resolution=512, rate=100)
    result(tmp_path, "d", more="--alignment", rate=100)
    result(tmp_path, "d2", more="--fp8_base", rate=100)
    (tmp_path / "e.json").write_text('{"settings": {"images": 4}, "measured": {}}')
    (tmp_path / "f.json").write_text("torn")
    assert "unknown" in str(hours_line(LORA, PLAN, "H200", on_gpu=True, results=tmp_path))
    result(tmp_path, "g", batch=1, precision="no")
    line = hours_line(LORA, PLAN, "H200", on_gpu=True, results=tmp_path)
    assert line == (
        "about 60 minutes of training alone, at 2 img/s on H200 (benchmarks/results/g.json; batch 1 there, 4 here; "
        "precision no there, bf16 here)"
    )
    result(tmp_path, "h", batch=8, rate=1.0)
    result(tmp_path, "i", batch=64, rate=50.0)
    line = hours_line(LORA, replace(PLAN, last_step=18_000), "H200", on_gpu=True, results=tmp_path)
    assert line == (
        "about 40 hours of training alone, at 1 img/s on H200 (benchmarks/results/h.json; batch 8 there, 4 here)"
    )


def test_where_nothing_was_measured_the_command_is_named(tmp_path: Path) -> None:
    def command(workload: Workload, on_gpu: bool) -> str:
        line = hours_line(workload, PLAN, "a device", on_gpu=on_gpu, results=tmp_path)
        assert line is not None and line.startswith("unknown: no benchmark of such a training on a device yet.")
        return line.partition("To measure one: ")[2]

    of_network = "python benchmarks/train_network.py --family"
    assert command(LORA, True) == f"{of_network} sdxl --resolution 1024 --batch 4 --precision bf16"
    assert command(REPA, True) == "python benchmarks/repa_step.py --batch 128 --lora_scope mid --compile regional"
    more = "--precision bf16 -- --alignment --compile regional"
    assert command(REPA, False) == f"{of_network} sd15 --resolution 512 --batch 128 {more}"
    assert command(replace(REPA, side=768), True) == f"{of_network} sd15 --resolution 768 --batch 128 {more}"
    assert hours_line(replace(LORA, base="tiny-shapes"), PLAN, "x", on_gpu=False, results=tmp_path) is None


def test_a_result_that_is_kept_here_is_found() -> None:
    """Those of both benchmarks, as they were written."""
    of_network = json.loads((PROJECT_ROOT / RESULTS / "train_network_sd15_256_b1_cpu.json").read_text())
    of_repa = json.loads((PROJECT_ROOT / RESULTS / "repa_step_cpu_tiny.json").read_text())
    for found, workload in (
        (of_network, Workload("sd15", 256, 1, "bf16", "none", False, "all")),
        (of_repa, Workload("tiny-sd15", 128, 8, "no", "none", True, "mid")),
    ):
        line = hours_line(workload, PLAN, found["device"], on_gpu=False)
        assert line is not None and f"at {found['measured']['samples_per_second']:.3g} img/s" in line
        assert line.endswith(".json)")


def test_a_plan_has_a_line_of_time(network_setting: NetworkSetting, tmp_path: Path, capsys: Say) -> None:
    assert network_setting.train(tmp_path, "--dry_run", **network_setting.quick) == 0
    said = capsys.readouterr().out
    assert "time             unknown: no benchmark" in said
    assert "benchmarks/train_network.py --family sd15 --resolution 64 --batch 1 --precision no" in said


def test_caches_that_do_not_fit_are_a_warning_of_the_plan_and_end_the_run_before_any_is_begun(
    network_setting: NetworkSetting,
    repa_setting: RepaSetting,
    tiny_dinov2: Path,
    tmp_path: Path,
    capsys: Say,
    monkeypatch: pytest.MonkeyPatch,
    no_forecast: None,
) -> None:
    import library.training.disk as disk
    import train_repa

    aligned = {
        "alignment": "",
        "dino_model": tiny_dinov2,
        "dino_resolution": 56,
        "token_grid": 4,
        "manifold_mode": "token",
    }
    monkeypatch.setattr(disk, "free_bytes", lambda path: 4000)
    for caches, train in (
        ("captioned", lambda *extra: network_setting.train(
            tmp_path / "out", *extra, **network_setting.quick, **aligned, cache_dir=tmp_path / "captioned")),
        ("classes", lambda *extra: train_repa.main(
            repa_setting.argv(tmp_path / "out", *extra, cache_dir=tmp_path / "classes"))),
    ):  # fmt: skip
        assert train("--dry_run") == 0
        warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
        assert "The caches of latents and tokens still need" in warning and "and 3.9 KiB are free there" in warning
        assert train() == 2
        said = capsys.readouterr()
        assert f"error: {warning[17:].removesuffix(' The run would refuse to begin.')}\n" == said.err
        assert not list((tmp_path / caches).glob("*/*.mdb")) and not list((tmp_path / caches).glob("*/*/*.mdb")), (
            said.out
        )
    monkeypatch.undo()
    assert network_setting.train(tmp_path / "out", "--dry_run", **network_setting.quick) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_plan_finds_what_the_run_would_refuse_and_says_what_it_would_say(
    network_setting: NetworkSetting, tmp_path: Path, capsys: Say, no_forecast: None
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --colour red\n")
    foreign = write_tensors(tmp_path, {**kohya_module("lora_te2_text_model_encoder_layers_0_mlp_fc1")})
    for changes in (
        {"sample_prompts": prompts, "sample_every_n_steps": 1},
        {"base_weights": foreign},
        {"base_weights": foreign, "clip_skip": 40, "network_train_unet_only": None},
    ):
        given = {**network_setting.quick, **changes}
        errors = []
        for extra in (("--dry_run",), ()):
            assert network_setting.train(tmp_path / "out", *extra, **given) == 2
            errors.append(capsys.readouterr().err)
        assert errors[0] == errors[1] and errors[0].startswith("error: ")
    stray = {"lora_unet_conv_out.alpha": torch.ones(1)}
    file = write_tensors(tmp_path, {**kohya_module(lora_up_weight=torch.ones(32, 2)), **stray})
    assert network_setting.train(tmp_path / "out", "--dry_run", **network_setting.quick, base_weights=file) == 0
    said = capsys.readouterr().out
    assert f"base_weights {file}: left out: 1 tensor of modules that it has no other weights of" in said
