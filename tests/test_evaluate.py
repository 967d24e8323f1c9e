"""evaluate.py: what it draws, measures and writes, which checkpoints it finds, and what it refuses in a sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.evaluation import generation
from library.evaluation.candidates import Candidate, find_candidates
from library.evaluation.photos import held_out_photos, read_photos
from library.evaluation.prompt_sets import plain_text, trained_captions, words_of
from library.evaluation.trained_photos import photos_of_training
from library.files import write_json
from library.inference.picture_request import PictureRequest
from library.inference.prompt_syntax import weighted_spans
from tests.tools.infotext import read_png

WORDS = ["--steps", "1", "--resolution", "64", "--num-samples", "2", "--cfg_scale", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_photos(folder: Path, count: int = 2, captions: bool = True) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"p{number}.png")
        if captions:
            (folder / f"p{number}.txt").write_text("a photo of mio\n")
    return folder


def write_checkpoint(adapter: Path, path: Path, *, factor: float = 1.0, step: int | None = None) -> Path:
    """A copy of an adapter whose effect is multiplied by `factor`, as saved after `step` steps."""
    from safetensors import safe_open

    with safe_open(adapter, "pt") as file:
        metadata = dict(file.metadata())
    metadata |= {} if step is None else {"ss_steps": str(step)}
    tensors = load_file(adapter)
    scaled = {key: value * factor if "lora_up" in key else value for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(scaled, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def evaluated(
    adapter_file: Path, tiny_dinov2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An evaluation of two checkpoints, of which the first does nothing."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(adapter_file, folder / "run" / "mio-000001.safetensors", factor=0.0, step=10)
    write_checkpoint(adapter_file, folder / "run" / "mio-000002.safetensors", factor=8.0, step=20)
    (folder / "unrelated.txt").write_text("a red square\n")
    photos = write_photos(folder / "photos")
    words = ["--checkpoint", folder / "run", "--reference_dir", photos, "--output-dir", folder / "out"]
    words += ["--unrelated_prompts", folder / "unrelated.txt", "--dino_model", tiny_dinov2, "--device", "cpu"]
    words += ["--strength", "--strengths", "0.5", "1"]
    assert evaluate.main([*map(str, words), *WORDS]) == EXIT_OK
    return folder / "out", json.loads((folder / "out" / "metrics.json").read_text())


def row(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in metrics["checkpoints"] if row["name"] == name)


def test_everything_is_there(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = evaluated
    assert [(one["name"], one["step"]) for one in metrics["checkpoints"]] == [
        ("base", 0),
        ("mio-000001", 10),
        ("mio-000002", 20),
    ]
    for name in ("base", "mio-000001", "mio-000002"):
        assert all((folder / "sheets" / f"{name}_{kind}.png").is_file() for kind in ("subject", "unrelated"))
        drawn = sorted(path.name for path in (folder / "pictures" / name).iterdir())
        assert drawn == ["subject_00_42.png", "subject_00_43.png", "unrelated_00_42.png", "unrelated_00_43.png"]
    info = read_png(folder / "pictures" / "mio-000002" / "subject_00_43.png")
    assert info.prompt == "a photo of mio <lora:mio-000002:1>" and (info.seed, info.steps) == (43, 1)
    assert info.model_hash is None and (info.version or "").startswith("repa-scripts "), "a folder has no hash"
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "Evaluation of 2 checkpoints, mio-000001 to mio-000002" in html and "a photo of mio" in html
    assert {"likeness", "drift", "drift_pixels", "diversity", "loss", "loss_q4"} <= metrics["meanings"].keys()
    assert metrics["options"]["steps"] == 1 and metrics["facts"]["device"] == "cpu"


def test_the_page_shows_pictures_then_what_to_do_then_the_strength_curves_and_numbers(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = evaluated
    html = (folder / "report.html").read_text(encoding="utf-8").partition("</nav>")[2]
    order = [">Pictures</h2>", "<img", 'class="verdict"', ">Strength of ", ">Over the checkpoints</h2>", ">Numbers</h2>",
             ">Unrelated prompts</h2>", ">How it was made</h2>"]  # fmt: skip
    places = [html.find(part) for part in order]
    assert -1 not in places and places == sorted(places) and "plotly" not in html


def test_a_checkpoint_is_drawn_at_each_weight_with_the_same_noise(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = evaluated
    strength = metrics["strength"]
    chosen = strength["checkpoint"]
    assert [row["name"] for row in strength["weights"]] == [0.5, 1.0] and chosen in ("mio-000001", "mio-000002")
    info = read_png(folder / "pictures" / f"{chosen}@0.5" / "subject_00_43.png")
    assert info.prompt == f"a photo of mio <lora:{chosen}:0.5>" and info.seed == 43
    at_one = next(one for one in strength["weights"] if one["name"] == 1.0)["metrics"]
    assert at_one["drift"] == row(metrics, chosen)["metrics"]["drift"], "what was drawn already is not drawn again"


@pytest.mark.bits
def test_an_adapter_that_does_nothing_is_the_base_to_the_bit(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = evaluated
    for kind in ("subject_00_42", "unrelated_00_43"):
        base, same, other = (
            np.asarray(Image.open(folder / "pictures" / name / f"{kind}.png"))
            for name in ("base", "mio-000001", "mio-000002")
        )
        assert np.array_equal(base, same) and not np.array_equal(base, other)
    nothing = row(metrics, "mio-000001")
    assert "drift" not in nothing["against_base"], "it is 0 for the base by what it is, and more for anything else"
    for measure in ("drift_pixels", "loss", "loss_q1"):
        assert nothing["metrics"][measure]["value"] == 0
    assert nothing["metrics"]["drift"]["value"] == pytest.approx(0, abs=1e-9)
    assert nothing["metrics"]["diversity"]["value"] == pytest.approx(1)
    assert not any(one["told_apart"] for one in nothing["against_base"].values())


def test_one_that_does_something_drifts_and_differences_are_paired(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = evaluated
    base, strong = row(metrics, "base"), row(metrics, "mio-000002")
    assert strong["metrics"]["drift_pixels"]["value"] > 0
    assert strong["metrics"]["loss"]["value"] != 0
    gap = strong["against_base"]["likeness"]["value"]
    assert gap == pytest.approx(strong["metrics"]["likeness"]["value"] - base["metrics"]["likeness"]["value"])
    assert metrics["best"]["drift"]["checkpoint"] == "mio-000001"
    assert -1 <= metrics["anchors"]["likeness"] <= 1


def test_a_picture_that_copies_a_training_picture_is_shown_beside_it_and_no_other_is_one(
    evaluated: tuple[Path, dict[str, Any]], adapter_file: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    write_checkpoint(adapter_file, tmp_path / "mio.safetensors", factor=8.0)
    trained = write_photos(tmp_path / "trained", 6, captions=False)
    shutil.copy(evaluated[0] / "pictures" / "mio-000002" / "subject_00_43.png", trained / "copy.png")
    words = ["--checkpoint", tmp_path / "mio.safetensors", "--train_data_dir", trained, "--prompt", "a photo of mio"]
    words += ["--unrelated_prompts", evaluated[0].parent / "unrelated.txt", "--dino_model", tiny_dinov2]
    words += ["--output_dir", tmp_path / "out", "--device", "cpu"]
    assert evaluate.main([*map(str, words), *WORDS]) == EXIT_OK
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    first, second = metrics["near_training"]
    assert (first["training_picture"], first["picture"], first["is_copy"]) == ("copy.png", 1, True)
    assert first["cosine"] == pytest.approx(1) and not second["is_copy"]
    assert row(metrics, "mio")["metrics"]["copies"]["value"] == 0.5
    assert metrics["facts"]["training pictures"] == "7 pictures of trained"
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "mio, cosine 1.000, a copy" in html and "trained: copy.png" in html


def test_what_is_left_out_is_said(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = evaluated
    said = " ".join(metrics["left_out"])
    assert "there is no CLIP" in said and "it needs 64 pictures and as many photos; there are 2 and 2" in said
    assert "these pictures are not known" in said and "copies" not in metrics["meanings"]
    assert "adherence" not in metrics["meanings"] and metrics["representation"] is None
    assert "there is no CLIP" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_state_with_heads_is_compared_with_the_teacher_too(
    finished_run: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", finished_run, "--dino_model", tiny_dinov2, "--output_dir", tmp_path / "out"]
    words += ["--representation", "--representation_samples", 10, "--representation_timesteps", 261, "--prompt", "mio"]
    assert evaluate.main([*map(str, words), *WORDS]) == EXIT_OK
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["representation"]
    assert found["settings"]["timesteps"] == [261] and len(found["rows"]) > 4
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    headings = (">Representation</h2>", ">What the U-Net sees</h3>", ">Pictures</h2>")
    assert "At timestep 261" in html and sorted(headings, key=html.index) == list(headings)
    assert "A new head finds the teacher&#x27;s tokens in" in html
    assert len(found["earlier"]) > 0 and "Over the training" in html and found["earlier"][0]["checkpoint"] in html


def test_the_pictures_of_a_training_are_known_by_its_options(
    finished_run: Path, finished_network: Path, tmp_path: Path
) -> None:
    for run in (finished_run, finished_network):
        found = photos_of_training(find_candidates([run]), 64)
        assert found is not None and found.count == len(found.trained) > 1
        assert not {photo.name for photo in found.trained} & {photo.name for photo in found.held_out}
        assert all(photo.read().mode == "RGB" for photo in [*found.trained, *found.held_out])
    (tmp_path / "run").mkdir()
    shutil.copy(finished_network / "options.toml", tmp_path / "run")
    assert photos_of_training([Candidate("mio", tmp_path / "other" / "mio.safetensors", None)], 64) is None


# What is found


def test_candidates_are_in_the_order_of_training(adapter_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name, step in (("mio", 30), ("mio-000002", 20), ("mio-step00000005", None), ("mio-ema", 30)):
        write_checkpoint(adapter_file, run / f"{name}.safetensors", step=step)
    found = find_candidates([run])
    assert [(one.name, one.step) for one in found] == [("mio-step00000005", 5), ("mio-000002", 20), ("mio", 30)]
    assert [one.name for one in find_candidates([run], use_ema=True)] == ["mio-ema"]
    assert [one.name for one in find_candidates([run / "mio.safetensors", run])].count("mio") == 1


def test_a_training_of_train_repa_is_its_states_and_its_end_once(finished_run: Path) -> None:
    assert [(one.name, one.step) for one in find_candidates([finished_run])] == [("step_000002", 2), ("step_000004", 4)]


def test_a_training_of_train_network_is_its_adapters(
    finished_network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find_candidates([finished_network])
    assert [one.step for one in found] == sorted(one.step or 0 for one in found) and len(found) > 1
    assert not any(one.is_state or one.name.endswith("-ema") for one in found)
    words = ["--checkpoint", finished_network, "--output_dir", tmp_path / "out", "--dry_run"]
    assert evaluate.main([*map(str, words), *WORDS]) == EXIT_OK
    said = capsys.readouterr().out
    assert (
        "subject    1 prompt, 2 seeds each; captions of the training, from the adapter's metadata\n           mio\n"
        in said
    )


def test_a_state_of_train_network_stands_for_its_adapter(adapter_file: Path, tmp_path: Path) -> None:
    write_checkpoint(adapter_file, tmp_path / "mio-000001.safetensors")
    (tmp_path / "mio-000001-state").mkdir()
    write_json(tmp_path / "mio-000001-state" / "state.json", {"step": 1})
    assert [one.path.name for one in find_candidates([tmp_path / "mio-000001-state"])] == ["mio-000001.safetensors"]


def test_two_of_one_name_are_told_apart_by_their_folders(adapter_file: Path, tmp_path: Path) -> None:
    files = [write_checkpoint(adapter_file, tmp_path / folder / "mio.safetensors") for folder in ("a", "b")]
    assert [one.name for one in find_candidates(files)] == ["a/mio", "b/mio"]


def test_held_out_photos_lie_where_the_training_points_to(adapter_file: Path, tmp_path: Path) -> None:
    candidates = find_candidates([write_checkpoint(adapter_file, tmp_path / "run" / "mio.safetensors")])
    assert held_out_photos(candidates) is None
    (tmp_path / "data" / "held_out").mkdir(parents=True)
    (tmp_path / "run" / "options.toml").write_text(f'train_data_dir = "{tmp_path / "data" / "train"}"\n')
    assert held_out_photos(candidates) == tmp_path / "data" / "held_out"


def test_photos_are_thinned_evenly_and_know_their_captions(tmp_path: Path) -> None:
    photos = read_photos(write_photos(tmp_path / "photos", 6), limit=3)
    assert [(one.name, one.caption) for one in photos] == [(f"p{i}.png", "a photo of mio") for i in (0, 2, 4)]


def test_captions_of_the_training_become_prompts() -> None:
    def frequency(**tags: int) -> dict[str, str]:
        return {"ss_tag_frequency": json.dumps({"1_mio": {name.replace("_", " "): n for name, n in tags.items()}})}

    assert trained_captions(frequency(mio=12, a_cat=3)) == ["mio"]
    assert trained_captions(frequency(one=1, two=1, three=1, four=1, five=1)) == ["one", "two", "three", "four"]
    assert trained_captions({}) == [] and trained_captions({"ss_tag_frequency": "nonsense"}) == []


def test_a_caption_is_drawn_by_its_letters() -> None:
    assert weighted_spans(plain_text("a (red) [cat], a|b")) == weighted_spans(r"a \(red\) \[cat\], a\|b")
    assert "<" not in plain_text("a <lora:mio:1> cat")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (plain_text("a (red) [cat], a|b"), "a (red) [cat], a|b"),
        ("a (red:1.3) [cat] BREAK on a ((mat))", "a red cat on a mat"),
        ("a [dog:cat:0.5] AND a mat :0.4", "a cat a mat"),
        ("a [dog:cat:15]", "a cat"),
    ],
)
def test_who_reads_words_is_shown_no_syntax(prompt: str, words: str) -> None:
    assert words_of(PictureRequest(prompt, "", steps=20, cfg_scale=7, width=64, height=64)) == words


# Bad input


def refused(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert evaluate.main([*WORDS, *map(str, words)]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


def test_bad_input_is_refused_in_a_sentence(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, one = tmp_path / "empty", write_photos(tmp_path / "one", 1)
    empty.mkdir()
    good = ["--checkpoint", adapter_file]
    assert "checkpoint is missing" in refused([], capsys)
    assert "nowhere.safetensors does not exist" in refused(["--checkpoint", "nowhere.safetensors"], capsys)
    assert "no checkpoints in" in refused(["--checkpoint", empty], capsys)
    assert "holds no pictures; at least 2" in refused([*good, "--reference_dir", empty], capsys)
    assert "holds one picture, p0.png; at least 2" in refused([*good, "--reference_dir", one], capsys)
    assert "is no folder" in refused([*good, "--reference_dir", tmp_path / "gone"], capsys)
    assert "train_data_dir" in refused([*good, "--train_data_dir", empty], capsys)
    assert "must be a multiple of 8, got 100" in refused([*good, "--resolution", 100], capsys)
    assert "must be at least 2, to estimate a standard error, got 1" in refused([*good, "--num_samples", 1], capsys)
    assert "Eulr is no sampler (did you mean Euler?)" in refused([*good, "--sampler", "Eulr"], capsys)
    assert "did you mean" in refused([*good, "--num-sampels", 4], capsys)
    assert "gone does not exist" in refused([*good, "--base-model", tmp_path / "gone"], capsys)
    assert "Evaluated adapters are named with --checkpoint" in refused([*good, "--prompt", "mio <lora:a:1>"], capsys)
    assert "needs a state of train_repa.py with heads" in refused([*good, "--representation"], capsys)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.json").write_text("{}")
    assert "give --overwrite" in refused([*good, "--output_dir", tmp_path / "old"], capsys)


def test_pictures_that_are_no_evaluations_are_never_taken_away(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "mine" / "pictures")
    for more in ([], ["--overwrite"]):
        words = ["--checkpoint", adapter_file, "--output_dir", tmp_path / "mine", *more]
        assert "pictures exists already and belongs to no evaluation" in refused(words, capsys)
    (tmp_path / "mine" / "metrics.json").write_text('{"accuracy": 1}')  # another program's
    words = ["--checkpoint", adapter_file, "--output_dir", tmp_path / "mine", "--overwrite"]
    assert "metrics.json belongs to no evaluation" in refused(words, capsys)
    assert (photos / "p0.png").is_file()


def test_an_evaluation_stays_until_another_can_begin_and_an_interrupted_one_is_drawn_again(
    evaluated: tuple[Path, dict[str, Any]],
    adapter_file: Path,
    tiny_dinov2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated[0], out)
    words = ["--checkpoint", adapter_file, "--prompt", "mio", "--output_dir", out, "--device", "cpu"]
    assert "none" in refused([*words, "--overwrite", "--dino_model", tmp_path / "none"], capsys)
    assert (out / "metrics.json").is_file() and (out / "pictures" / "mio-000001").is_dir()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    words += ["--dino_model", tiny_dinov2]
    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(generation, "draw_prompt_set", interrupted)
        sys.exit(evaluate.main([*WORDS, *map(str, words), "--overwrite"]))
    assert not (out / "metrics.json").exists() and not (out / "pictures").exists()
    assert evaluate.main([*WORDS, *map(str, words)]) == EXIT_OK, "what was begun here is gone on with"
    assert [one["name"] for one in json.loads((out / "metrics.json").read_text())["checkpoints"]][1:] == [
        adapter_file.stem
    ]


def test_a_damaged_photo_is_named(adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "photos")
    (photos / "p1.png").write_bytes(b"nonsense")
    assert "p1.png" in refused(["--checkpoint", adapter_file, "--reference_dir", photos], capsys)


def test_an_unknown_teacher_is_refused_before_anything_is_drawn(
    adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", adapter_file, "--dino_model", tmp_path / "none", "--output_dir", tmp_path / "out"]
    assert "none" in refused(words, capsys)
    assert not (tmp_path / "out" / "pictures").exists()


def test_a_folder_that_is_a_model_is_no_checkpoint(tiny_sd15: Path) -> None:
    with pytest.raises(UserError, match="is a model, not an adapter"):
        find_candidates([tiny_sd15])


def test_a_plan_draws_nothing(adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", adapter_file, "--prompt", "mio", "--output_dir", tmp_path / "out", "--dry_run"]
    assert evaluate.main([*map(str, words), *WORDS]) == EXIT_OK
    said = capsys.readouterr().out
    assert "subject    1 prompt, 2 seeds each; as given" in said and "photos     none" in said
    assert "missing" not in said and not (tmp_path / "out").exists()
    assert (
        evaluate.main([*map(str, words), *WORDS, "--clip_model", "nobody/clip", "--dino_model", "nobody/dino"])
        == EXIT_OK
    )
    said = capsys.readouterr().out
    assert "missing    nobody/clip" in said and "missing    nobody/dino" in said
