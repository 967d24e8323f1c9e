"""run.html: what it shows, how large it becomes, whose samples, and that one that cannot be written costs nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from library.data.collect import TrainingData
from library.errors import Stopped
from library.report.page import MOST_BYTES
from library.training.loop import train
from library.training.run_page import FRAMES, POINTS, RunPage, running
from library.training.stop import NOTHING, SAMPLE, STOP, Requests
from tests.test_loop import Regression, run_of
from tests.test_page import Outline

HOSTILE = "</figcaption><script>alert(1)</script> a \"photo\" of <b>dog & 'cat'"


def page_of(folder: Path, *, last_step: int = 1000, step: int = 0, name: str = "dog", **changes: Any) -> RunPage:
    """The page of a run that says what it says into `changes["said"]`."""
    said: list[str] = changes.pop("said", [])
    run = SimpleNamespace(
        output=SimpleNamespace(output_dir=folder, output_name="dog"),
        plan=SimpleNamespace(last_step=last_step, steps_per_epoch=10),
        processes=SimpleNamespace(warnings=["warning: <b>slow</b>"], say=said.append),
    )
    data = TrainingData([], [], [], [], {f"<i>{HOSTILE}": "torn"}, notes=["<u>note"])
    return RunPage(run, name, data, {"train_data_dir": HOSTILE, "seed": None}, step, **changes)  # type: ignore[arg-type]


def write_metrics(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float]] = [{"step": 0, "reference/frozen_base_loss": 0.9}]
    for step in range(1, count + 1):
        rows.append(
            {"step": step, "train/loss": 1 / step, "train/grad_norm": 0.1, "lr/unet": 1e-4, "time/step_ms": 500.0}
        )
        if step % 100 == 0:
            rows.append({"step": step, "val/loss": 0.5, "val/train_loss": 0.4, "val/gap": 0.1})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "train/lo'  # torn by a kill
    (folder / "metrics.jsonl").write_text(text)


def write_sample(folder: Path, name: str, prompt: str, side: int = 8) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{prompt}\nNegative prompt: bad\nSteps: 3, Seed: 1")
    (folder / "sample").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (side, side, 3), np.uint8)).save(
        folder / "sample" / name, pnginfo=info
    )


def test_a_long_run_has_a_small_page_with_its_curves(tmp_path: Path) -> None:
    write_metrics(tmp_path, 20_000)
    html = page_of(tmp_path, last_step=30_000, step=20_000).page().html()
    assert len(html) < 400_000
    for words in (
        "dog: step 20000 of 30000",
        "validation 0.5000",
        "1:23:20 left",
        "frozen base",
        "Gap of the validation",
    ):
        assert words in html
    drawn = html.split('class="curve c0"')[1].split('"')[1]
    assert drawn.count("L") == POINTS - 1


def test_samples_are_strips_over_the_steps_of_this_run_alone_and_many_are_thinned_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    for step in range(FRAMES + 20):
        write_sample(tmp_path, f"dog_{step:06d}_00_20260101000000_42.png", HOSTILE)
    write_sample(tmp_path, "dog_e000002_01_20260101000000_42.png", "old")
    write_sample(tmp_path, "dog_e000002_01_20260101000001_42.png", "a cat")  # of the same step, drawn again
    write_sample(tmp_path, "dog_002000_01_20260101000000_42.png", "of steps after the one that a run came back to")
    write_sample(tmp_path, "dog_big_000001_01_20260101000000_42.png", "of another run")
    outline = Outline(page_of(tmp_path, step=999).page().html())
    strips = [attributes["data-name"] for tag, attributes in outline.tags if attributes.get("class") == "strip"]
    assert strips == ["sample 0", "sample 1"]
    shown = [attributes["alt"] for tag, attributes in outline.tags if tag == "img"]
    assert len(shown) == FRAMES // 2 + 1 and {"step 0", f"step {FRAMES + 19}", "step 20"} <= set(shown)
    assert "a cat" in outline.text and "old" not in outline.text and "another run" not in outline.text


def test_large_pictures_make_no_large_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.report.page.MOST_BYTES", 400_000)
    write_metrics(tmp_path, 3)
    for step in range(12):
        write_sample(tmp_path, f"dog_{step:06d}_00_20260101000000_42.png", "noise", side=256)
    page = page_of(tmp_path, step=999).page()
    assert len(page._html(None)) > 500_000 and 200_000 < len(page.html()) <= 400_000 < MOST_BYTES < 6_000_000


def test_what_people_and_pictures_say_is_no_markup(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    name = "犬 'dög' \"<b>\" (1)+"
    write_sample(tmp_path, f"{name}_000001_00_20260101000000_42.png", HOSTILE)
    write_sample(tmp_path, f"{name}_000002_00_20260101000000_42.png", HOSTILE)
    outline = Outline(page_of(tmp_path, step=2, name=name).page().html())
    assert outline.open == [] and outline.names().count("script") == 1, "the page's own"
    assert f"{name}: step 2 of 1000" in outline.text and outline.names().count("img") == 2
    assert not {"b", "u"} & set(outline.names()) and outline.text.count("<script>alert(1)") >= 3


def test_it_loads_itself_again_until_the_run_ends_however_it_ends(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    path = tmp_path / "run.html"
    for error, words in ((None, "Finished at step 3."), (Stopped("Stopped at step 3 by SIGTERM."), "Stopped at step 3 by SIGTERM."),
                         (ValueError("<oops>"), "Ended at step 3: &lt;oops&gt;")):  # fmt: skip
        page = page_of(tmp_path, step=3)
        try:
            with page:
                assert "data-reload" in path.read_text()
                if error is not None:
                    raise error
        except (Stopped, ValueError) as raised:
            assert raised is error
        html = path.read_text()
        assert "data-reload=" not in html and words in html


def test_who_reads_a_page_while_it_is_replaced_reads_a_whole_one(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    page = page_of(tmp_path, step=1)
    page(1)
    with open(tmp_path / "run.html", encoding="utf-8") as reader:
        begun = reader.read(100)
        page(2)
        old = begun + reader.read()
    assert "dog: step 1 of" in old and old.endswith("</html>\n")
    assert "dog: step 2 of" in (tmp_path / "run.html").read_text()


def test_a_page_that_cannot_be_written_is_said_once_and_the_page_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metrics(tmp_path, 3)
    said: list[str] = []
    page = page_of(tmp_path, step=1, said=said)
    page(1)
    before = (tmp_path / "run.html").read_bytes()

    def refuse(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    page(2)
    page(3)
    assert len(said) == 1 and said[0].startswith("warning: run.html could not be written, and the run goes on: ")
    assert (tmp_path / "run.html").read_bytes() == before and list(tmp_path.glob("*tmp*")) == []


def test_a_run_with_heads_shows_what_the_u_net_sees(finished_run: Path) -> None:
    html = (finished_run / "run.html").read_text()
    seen = html.partition('data-name="seen"')[2].partition("</div></div>")[0]
    assert seen.count("<img") >= 2 and "step 0: cosine " in seen and "step 4: cosine " in seen
    assert ">lambda</p>" in html and "Finished at step 4." in html


def test_a_running_mean_is_the_mean_of_what_is_around() -> None:
    values = np.array([1.0, 2, 6, 3, 4])
    means, deviations = running(values, 3)
    assert means.tolist() == pytest.approx([1.5, 3, 11 / 3, 13 / 3, 3.5])
    assert deviations[0] == pytest.approx(0.5) and np.isfinite(deviations).all()
    level = running(np.full(1000, 1e6), 7)
    assert level[0].tolist() == [1e6] * 1000 and level[1].max() == 0
    assert math.isclose(running(np.array([5.0]), 3)[0][0], 5)


class Eye:
    """A Look that is never due by itself."""

    def __init__(self) -> None:
        self.looked: list[int] = []

    def due(self, step: int, finished: bool) -> bool:
        return False

    def __call__(self, step: int, finished: bool) -> None:
        self.looked.append(step)


class Impatient(Regression):
    """Somebody asks for samples during the second step."""

    folder = Path()

    def losses(self, batch: Any, generator: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        if step == 1:
            (self.folder / "sample").touch()
        return super().losses(batch, generator, step)


class Pages:
    """A page that only says when it was written."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def due(self, step: int) -> bool:
        return False

    def __call__(self, step: int) -> None:
        self.written.append(step)


def test_a_file_called_sample_draws_now_saves_nothing_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.stop.LOOKED_EVERY", 0.0)
    task, eye, pages = Impatient(), Eye(), Pages()
    task.folder = tmp_path
    run = run_of(task, tmp_path)
    run.look, run.page = eye, pages
    saved: list[int] = []
    save = run.checkpoints.save
    monkeypatch.setattr(run.checkpoints, "save", lambda step, **how: (saved.append(step), save(step, **how)))
    train(run, 0)
    assert eye.looked == [2] and saved == [3, 6] and not (tmp_path / "sample").exists()
    assert pages.written == [2, 3, 6], "drawn, validated and saved"


def test_without_prompts_it_is_said_that_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("library.training.stop.LOOKED_EVERY", 0.0)
    run = run_of(Regression(), tmp_path)
    (tmp_path / "sample").touch()
    train(run, 0)
    assert "samples were asked for, and there are no prompts. Give --sample_prompts." in capsys.readouterr().out
    assert not (tmp_path / "sample").exists()


def test_touching_the_folder_of_samples_asks_too_and_pictures_in_it_do_not(tmp_path: Path) -> None:
    samples, requests = tmp_path / "sample", Requests(tmp_path)

    def look() -> int:
        requests._looked = 0.0
        return requests.look()

    samples.mkdir()
    assert look() == NOTHING, "a folder that is new"
    for name, second in (("a.png", 10), ("b.png", 20)):
        (samples / name).touch()
        os.utime(samples, ns=(5 * 10**9, second * 10**9))  # a picture came: only the time of the change
        assert look() == NOTHING
    os.utime(samples, ns=(30 * 10**9, 30 * 10**9))
    assert look() == SAMPLE
    requests.done(SAMPLE)
    assert look() == NOTHING and sorted(path.name for path in samples.iterdir()) == ["a.png", "b.png"]


def test_a_stop_comes_before_a_sample(tmp_path: Path) -> None:
    for name in ("sample", "stop"):
        (tmp_path / name).touch()
    requests = Requests(tmp_path)
    assert requests.look() == STOP
    requests.done(STOP)
    requests._looked = 0.0
    assert requests.look() == SAMPLE and STOP > SAMPLE
