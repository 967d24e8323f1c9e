"""States: saved on request, resumed to the bit, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.runs import RepaSetting, assert_equal_states, copy_until, metric_rows


@pytest.mark.bits
def test_resuming_gives_the_bits_of_the_uninterrupted_run(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path
) -> None:
    copy_until(finished_run, tmp_path / "out", 2)
    assert repa_setting.train(tmp_path / "out", save_every_n_steps=2, validate_every_n_steps=2) == 0
    assert_equal_states(finished_run / "step_000004", tmp_path / "out" / "step_000004")
    whole, resumed = (metric_rows(p, "train/loss") for p in (finished_run, tmp_path / "out"))
    assert [(r["step"], r["train/loss"]) for r in whole] == [(r["step"], r["train/loss"]) for r in resumed]
    whole, resumed = (metric_rows(p, "val/total") for p in (finished_run, tmp_path / "out"))
    assert [r["val/total"] for r in whole] == [r["val/total"] for r in resumed]


@pytest.mark.bits
def test_sigkill_and_the_same_command_again_give_the_bits_of_the_uninterrupted_run(
    repa_setting: RepaSetting, tmp_path: Path
) -> None:
    changes = {"max_train_steps": 18, "save_every_n_steps": 3, "gradient_accumulation_steps": 2, "network_dropout": 0.1}
    killed = tmp_path / "killed"
    repa_setting.start(tmp_path / "whole", **changes).end()
    for _ in range(2):
        seen = len(list(killed.glob("step_*")))
        run = repa_setting.start(killed, **changes)
        run.until(lambda seen=seen: len(list(killed.glob("step_*"))) > seen)  # type: ignore[misc]
        run.send(signal.SIGKILL)
        run.end(-signal.SIGKILL)
        assert not (killed / "step_000018").exists()
    assert "resuming from" in repa_setting.start(killed, **changes).end()
    assert_equal_states(tmp_path / "whole" / "step_000018", killed / "step_000018")
    assert [path.name for path in killed.glob(".*")] == [".lock"]


def test_the_same_command_after_the_end_has_nothing_to_do(
    finished_run: Path, repa_setting: RepaSetting, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished_run / "repa.safetensors").stat().st_mtime_ns
    assert repa_setting.train(finished_run, save_every_n_steps=2, validate_every_n_steps=2) == 0
    assert "is the end of this run (step 4). Nothing is left to do." in capsys.readouterr().out
    assert (finished_run / "repa.safetensors").stat().st_mtime_ns == before


@pytest.mark.bits
def test_adapters_lost_after_the_last_state_are_written_by_the_same_command(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "out")
    for name in ("repa.safetensors", "repa-ema.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert repa_setting.train(tmp_path / "out", save_every_n_steps=2, validate_every_n_steps=2) == 0
    for name in ("repa.safetensors", "repa-ema.safetensors"):
        a, b = load_file(finished_run / name), load_file(tmp_path / "out" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_state_of_other_samples_or_base_weights_is_not_continued_silently(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(finished_run, tmp_path / "out", 2)
    file = tmp_path / "out" / "step_000002" / "state.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"samples": "x", "base_weights": "y"}))
    assert repa_setting.train(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "the training samples or their classes changed; the weights of the base model changed since" in said
    file.write_text(json.dumps(facts | {"versions": facts["versions"] | {"torch": "1.0"}}))
    assert repa_setting.train(tmp_path / "out") == 0
    assert "other versions may compute other bits: torch 1.0 then" in capsys.readouterr().out


@pytest.mark.bits
def test_moments_come_back_in_the_layout_of_their_weights(repa_setting: RepaSetting, tmp_path: Path) -> None:
    from library.training.ema import ExponentialAverage
    from library.training.state import Trained, load_state, save_state

    def trained() -> Trained:
        weight = torch.nn.Parameter(torch.ones(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return Trained({"lora": {"w": weight}}, optimizer, ExponentialAverage({"w": weight}, 0.5), {})

    saved, loaded = trained(), trained()
    save_state(tmp_path / "step_000001", saved, {"step": 1})
    load_state(tmp_path / "step_000001", loaded)
    (weight,) = loaded.parameters.values()
    (original,) = saved.parameters.values()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = loaded.optimizer.state[weight][key]
        assert moment.stride() == weight.stride() and torch.equal(moment, saved.optimizer.state[original][key])


@pytest.mark.bits
def test_a_stop_file_saves_a_state_and_the_run_goes_on_later(
    finished_run: Path,
    repa_setting: RepaSetting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from library.training.stop import Requests

    # Looks at the folder each time, and the file appears while step 3 runs.
    looks = iter(range(100))
    original = Requests.look

    def look(self: Requests) -> int:
        if next(looks) == 3:
            (tmp_path / "stop").touch()
        self._looked = 0.0
        return original(self)

    monkeypatch.setattr(Requests, "look", look)
    assert repa_setting.train(tmp_path, save_every_n_steps=2, validate_every_n_steps=2) == 75
    assert "Stopped at step 3 of 4 by the file" in capsys.readouterr().err
    assert (tmp_path / "step_000003").is_dir() and not (tmp_path / "stop").exists()
    monkeypatch.undo()
    assert repa_setting.train(tmp_path, save_every_n_steps=2, validate_every_n_steps=2) == 0
    assert_equal_states(finished_run / "step_000004", tmp_path / "step_000004")


def test_sigterm_saves_a_resumable_state(repa_setting: RepaSetting, tmp_path: Path) -> None:
    run = repa_setting.start(tmp_path, max_train_steps=100000, save_every_n_steps=100000)
    rows = tmp_path / "metrics.jsonl"
    run.until(lambda: rows.exists() and rows.read_text().count("train/loss") > 2)
    run.send(signal.SIGTERM)
    output = run.end(75)
    assert "by SIGTERM. Run the same command again to continue." in output
    assert len(list(tmp_path.glob("step_*"))) == 1 and "Traceback" not in output


def test_only_the_newest_states_are_kept_when_asked(repa_setting: RepaSetting, tmp_path: Path) -> None:
    assert repa_setting.train(tmp_path, save_every_n_steps=1, save_last_n_states=2) == 0
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000003", "step_000004"]


def test_a_resume_with_other_options_names_them(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(finished_run, tmp_path / "out", 2)
    assert repa_setting.train(tmp_path / "out", learning_rate=1e-3, align_coeff=0.7) == 2
    said = capsys.readouterr().err
    assert "belongs to a run with other options: align_coeff was 0.5, is 0.7; learning_rate was 0.01, is 0.001." in said
    assert repa_setting.train(tmp_path / "out", "--allow_changed_options", learning_rate=1e-3) == 0
    assert repa_setting.train(tmp_path / "out", resume="none") == 2
    assert "already holds states (newest: step_000004) and --resume none asks for a new run" in capsys.readouterr().err


def test_a_damaged_or_foreign_state_is_one_sentence(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(finished_run, tmp_path / "out", 2)
    whole = (tmp_path / "out" / "step_000002" / "optimizer.safetensors").read_bytes()
    (tmp_path / "out" / "step_000002" / "optimizer.safetensors").write_bytes(whole[:-100])
    assert repa_setting.train(tmp_path / "out") == 2
    assert "optimizer.safetensors cannot be read" in capsys.readouterr().err
    assert repa_setting.train(tmp_path / "new", resume=str(tmp_path)) == 2
    assert "is no training state: there is no state.json in it." in capsys.readouterr().err
    copy_until(finished_run, tmp_path / "two", 2)
    save_file({"x": torch.zeros(1)}, tmp_path / "two" / "step_000002" / "lora.safetensors")
    assert repa_setting.train(tmp_path / "two") == 2
    assert "does not fit this run: 16 weights are missing and 1 unknown" in capsys.readouterr().err
