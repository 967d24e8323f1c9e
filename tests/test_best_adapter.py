"""Which of the adapters that a training saved has the best validation loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from library.training import best_adapter


def test_the_adapter_of_the_least_validation_loss_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, step in (("a-000001", 2), ("a-000002", 4), ("a-000002-ema", 4), ("a", 6), ("a-step00000005", 5)):
        save_file({"x": np.zeros(1)}, tmp_path / f"{name}.safetensors", metadata={"ss_steps": str(step)})
    rows = [{"step": step, "val/loss": loss} for step, loss in ((0, 0.1), (2, 0.5), (4, 0.3), (6, 0.4))]
    lines = [json.dumps(row) for row in ({"step": 1, "train/loss": 0.2}, *rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "val/l')
    assert [(one.file.stem, one.loss) for one in best_adapter.judged_adapters(tmp_path)] == [
        ("a-000002-ema", 0.3),
        ("a", 0.4),
        ("a-000001", 0.5),
    ]
    assert best_adapter.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"best: {tmp_path / 'a-000002-ema.safetensors'}"


def test_a_run_without_validation_has_no_best_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert best_adapter.main([str(tmp_path)]) == 2 and "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.2}\n')
    assert best_adapter.main([str(tmp_path)]) == 2 and "has no val/loss" in capsys.readouterr().err
