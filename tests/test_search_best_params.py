"""best_params.json: written whole, read strictly, and its damage named."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from library.errors import RunFailed, UserError
from library.search.best_params import read_best_params, write_best_params
from tests.tools.sdxl_export import best_params


def test_best_params_are_read_as_they_were_written(tmp_path: Path) -> None:
    best = best_params({"text_encoder_lr": [1e-4], "network_args": ["conv_dim=4"]})
    write_best_params(tmp_path / "best_params.json", best)
    assert read_best_params(tmp_path / "best_params.json") == best
    assert type(read_best_params(tmp_path / "best_params.json").params["network_dim"]) is int


def test_best_params_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "best_params.json"
    write_best_params(path, best_params())
    before = path.read_bytes()
    with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")), pytest.raises(RunFailed):
        write_best_params(path, best_params(value=-1.0))
    with pytest.raises(ValueError):
        write_best_params(path, best_params(value=float("nan")))
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema_version": 2}, "has schema_version 2, but this program reads 1"),
        ({"trail": 1}, r"trail is unknown \(did you mean trial\?\)"),
        ({"value": "low"}, "value is 'low': input should be a valid number"),
        ({"value": float("inf")}, "value is inf: input should be a finite number"),
        ({"lr_reference": {"alpha": 1.0, "dim": 4, "steps": 9}}, "lr_reference.effective_batch is missing"),
        (
            {"params": {"network_dim": [1]}},
            r"params.network_dim is \[1\]: it should be a number, a string, true or false\.$",
        ),
        (
            {"base_model": {"family": "sd3", "path": "x"}},
            "base_model.family is 'sd3': input should be 'sd15' or 'sdxl'",
        ),
    ],
)
def test_damaged_best_params_are_named(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "best_params.json"
    write_best_params(path, best_params())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        read_best_params(path)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"network_dim": 4}')
    for name, sentence in (("a", "is not valid JSON"), ("b", "is not a best_params.json"), ("c", "does not exist")):
        with pytest.raises(UserError, match=sentence):
            read_best_params(tmp_path / f"{name}.json")
