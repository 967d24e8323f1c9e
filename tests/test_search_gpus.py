"""One GPU for each worker, found without torch."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.search.run import gpus


@pytest.fixture(autouse=True)
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible_gpus", lambda: ["GPU-a", "GPU-b", "GPU-c", "GPU-d"])


def test_each_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_lock", lambda gpu: True)
    assert gpus.assign(2, None) == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]
    assert gpus.assign(3, "cpu") == [{}, {}, {}]
    assert gpus.assign(1, "cuda:2") == [{}]


@pytest.mark.parametrize(
    ("workers", "device", "sentence"),
    [(5, "cuda", "needs as many GPUs, but 4 are visible"), (2, "cuda:1", "--device cuda:1 is one GPU")],
)
def test_more_workers_than_gpus_are_refused(workers: int, device: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        gpus.assign(workers, device)


def test_a_gpu_that_another_study_has_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gpus, "_lock", lambda gpu: gpu != "GPU-b")
    gpus.assign(2, None, said.append)
    assert len(said) == 1 and "uses GPU GPU-b" in said[0]


def test_what_the_environment_hides_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 3,GPU-x ")
    assert gpus.visible_gpus() == ["3", "GPU-x"]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert gpus.visible_gpus() == []
