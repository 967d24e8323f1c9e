"""evaluate.py --dry_run: it refuses what the evaluation would stop at, in the same words, and the evaluation at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import evaluate
from library.errors import EXIT_BAD_INPUT, EXIT_OK
from library.evaluation import generation


@pytest.fixture(autouse=True)
def nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "load_model", None)
    monkeypatch.setattr(generation, "DinoPictures", None)


def both(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What the dry run refuses to do, and the real run in the same words."""
    said = []
    for more in (["--dry_run"], []):
        assert evaluate.main([*map(str, words), "--prompt", "mio", "--output_dir", "out", *more]) == EXIT_BAD_INPUT
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and said[0].startswith("error: ") and not Path("out").exists()
    return said[0].removeprefix("error: ")


def test_an_adapter_of_the_other_family(
    adapter_file: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = both(["--checkpoint", adapter_file, "--base-model", tiny_sdxl], capsys)
    assert said.startswith(f"{adapter_file} is not for {tiny_sdxl}: ")
    assert said.endswith("It looks like an SD1.5 LoRA on an SDXL model.\n") and said.count("\n") == 1


def test_judges_and_devices_that_are_not_there(
    adapter_file: Path, tiny_sd15: Path, tiny_dinov2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good: list[object] = ["--checkpoint", adapter_file]
    torn = shutil.copytree(tiny_dinov2, tmp_path / "torn")
    next(torn.glob("*.safetensors")).write_bytes(b"torn")
    assert "nowhere does not exist" in both([*good, "--dino_model", tmp_path / "nowhere"], capsys)
    assert "describes a clip_text_model" in both([*good, "--dino_model", tiny_sd15 / "text_encoder"], capsys)
    assert "torn" in both([*good, "--dino_model", torn], capsys)
    assert "nowhere does not exist" in both([*good, "--clip_model", tmp_path / "nowhere"], capsys)
    assert "has no config.json" in both([*good, "--clip_model", tmp_path], capsys)
    assert "describes a dinov2" in both([*good, "--clip_model", tiny_dinov2], capsys)
    assert "device cuda:7 cannot be used" in both([*good, "--device", "cuda:7"], capsys)
    assert "clip_skip must lie between 1 and 12" in both([*good, "--clip_skip", 99], capsys)


def test_all_faults_at_once(adapter_file: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for base, said in (
        (tiny_sdxl, "SD1.5 LoRA on an SDXL model"),
        ("/gone.safetensors", "/gone.safetensors does not exist"),
    ):
        words = ["--base-model", base, "--dino_model", "/a", "--clip_model", "/b", "--device", "no"]
        first, *others = both(["--checkpoint", adapter_file, *words], capsys).splitlines()
        assert first.startswith("device no cannot be used") and said in others[0]
        assert [line.split()[1] for line in others[1:]] == ["/a", "/b"]


def test_a_dry_run_fetches_nothing(
    adapter_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("library.models.locate._fetch", None)
    words = ["--checkpoint", adapter_file, "--base-model", "somebody/finetuned", "--prompt", "mio", "--dry_run"]
    assert evaluate.main([*map(str, words)]) == EXIT_OK
    said = capsys.readouterr().out
    assert "missing    somebody/finetuned" in said and "of 512 x 512 pixels" in said


def test_without_the_hub_what_is_not_there_is_refused(
    adapter_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", adapter_file, "--dino_model", "nobody/dino", "--clip_model", "nobody/clip"]
    assert evaluate.main([*map(str, words), "--prompt", "mio", "--dry_run"]) == EXIT_OK, "the hub may have them"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert both(words, capsys).count("HF_HUB_OFFLINE is set") == 2


def test_a_representation_without_its_caches(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = shutil.copytree(sorted(finished_run.glob("step_*"))[-1], tmp_path / "run" / "step_000004")
    facts = json.loads((state / "state.json").read_text())
    for name in ("cache_dir", "latents_cache", "tokens_cache"):
        if facts["options"].get(name):
            facts["options"][name] = str(tmp_path / "gone")
    (state / "state.json").write_text(json.dumps(facts))
    assert "gone" in both(["--checkpoint", state, "--representation"], capsys)
