"""doctor.py: faults planted in a folder of forty pictures are found, and nothing in a clean one; the page is safe and whole."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

import doctor
import train_network
from library.doctor.likeness import duplicate_pairs
from library.doctor.measures import Measures, measure, square, writing_of
from library.doctor.picture_faults import WRITTEN
from library.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from tests.test_page import Outline
from tests.tools.photo_like import scene, write_scenes

SIZE = ("--resolution", "192", "--enable_bucket")


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean folder; read only."""
    folder = tmp_path_factory.mktemp("clean") / "dog"
    write_scenes(folder)
    return folder


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def looked(folder: Path, *words: str, code: int = EXIT_OK, size: Sequence[str] = SIZE) -> dict[str, Any]:
    """What doctor.py says of a folder."""
    page = folder.parent / "page" / "doctor.html"
    page.parent.mkdir(exist_ok=True)
    assert doctor.main([str(folder), "--page", str(page), *size, *words]) == code
    assert page.is_file()
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def kinds(found: dict[str, Any]) -> dict[str, list[str]]:
    """Kind of finding -> names of its pictures."""
    return {one["kind"]: [Path(path).name for path in one["pictures"]] for one in found["findings"]}


def test_nothing_is_found_in_a_clean_folder(forty: Path) -> None:
    found = looked(forty, "--trigger", "sks")
    assert found["findings"] == [] and found["pictures"] == found["looked_at"] == 40


def test_every_planted_fault_is_found_and_nothing_else(forty: Path, tmp_path: Path) -> None:
    folder = copied(forty, tmp_path / "dog")

    def change(name: str, changed: Image.Image) -> None:
        changed.save(folder / name, quality=88)

    original = scene(3)
    change("11.jpg", original.crop((2, 2, 190, 190)))
    change("12.jpg", original.resize((160, 160)))
    change("13.jpg", ImageOps.mirror(original))
    for name, seed in (("20.jpg", 20), ("21.jpg", 21)):
        change(name, scene(seed).filter(ImageFilter.GaussianBlur(3)))
    bars = scene(30)
    bars.paste((0, 0, 0), (0, 0, 192, 24))
    bars.paste((0, 0, 0), (0, 168, 192, 192))
    change("30.jpg", bars)
    for caption in folder.glob("*.txt"):
        caption.write_text(f"{caption.read_text()}, white fence, greyscale filter")
    (folder / "35.txt").write_text(
        f"sks dog, white fence, greyscale filter, {'a dog and another thing ' * 20}the very end"
    )
    found = looked(folder, "--trigger", "sks")
    by_kind = kinds(found)
    assert by_kind.keys() == {"duplicates", "blurred", "borders", "repeated", "cut captions"}
    assert sorted(by_kind["duplicates"]) == ["03.jpg", "11.jpg", "12.jpg", "13.jpg"]
    assert by_kind["blurred"] == ["20.jpg", "21.jpg"] and by_kind["borders"] == ["30.jpg"]
    assert by_kind["cut captions"] == ["35.jpg"] and len(by_kind["repeated"]) == 40
    finding = {one["kind"]: one for one in found["findings"]}
    assert "fence" in finding["repeated"]["title"] and "sks" not in finding["repeated"]["title"]
    assert finding["cut captions"]["details"][0].endswith("the very end")
    assert all(one["advice"] for one in found["findings"])


def test_captions_that_share_everything_lack_the_trigger_or_contradict_their_folder(
    forty: Path, tmp_path: Path
) -> None:
    root = tmp_path / "sets"
    folder = copied(forty, root / "2_sks dog")
    for number in range(5):
        (folder / f"{number:02}.txt").write_text("a photo of sks dog")
    (folder / "10.txt").write_text("a photo of a dog at sea")
    (folder / "11.txt").write_text("a photo of sks cat at home")
    found = kinds(looked(root, "--trigger", "sks"))
    assert found == {
        "same caption": [f"{number:02}.jpg" for number in range(5)],
        "trigger missing": ["10.jpg"],
        "other class": ["11.jpg"],
    }
    assert "trigger of pieces" in kinds(looked(root, "--trigger", "zorblax"))


def test_what_spoils_a_training_gives_exit_code_1(forty: Path, tmp_path: Path) -> None:
    folder = copied(forty, tmp_path / "empty")
    for caption in folder.glob("*.txt"):
        caption.write_text("")
    assert kinds(looked(folder, code=EXIT_FAILED)).keys() == {"no captions"}
    folder = copied(forty, tmp_path / "torn")
    (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:1000])
    (folder / "08.jpg").write_bytes(b"no picture")
    assert kinds(looked(folder, code=EXIT_FAILED))["unreadable"] == ["08.jpg", "07.jpg"]


def test_copies_of_held_out_pictures_and_odd_regularisation_pictures_are_found(forty: Path, tmp_path: Path) -> None:
    folder = copied(forty, tmp_path / "train" / "1_sks dog")
    prior = tmp_path / "reg" / "1_dog"
    prior.mkdir(parents=True)
    for number in range(4):
        scene(100 + number).save(prior / f"{number}.png")
        (prior / f"{number}.txt").write_text("a photo of a dog" if number else "a photo of a house")
    for number in range(10):
        (folder / f"{number + 10}.jpg").write_bytes((folder / f"{number:02}.jpg").read_bytes())
    found = looked(folder.parent, "--reg_data_dir", str(prior.parent), "--validation_split", "0.4", "--seed", "3")
    by_kind = kinds(found)
    assert by_kind["held out and trained"] and set(by_kind["held out and trained"]) <= {
        f"{n:02}.jpg" for n in range(20)
    }
    assert by_kind["regularisation unlike"] == ["0.png"]


def test_sizes_transparency_and_orientation_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    folder.mkdir()
    scene(0, (96, 96)).save(folder / "small.png")
    scene(1, (400, 192)).save(folder / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    scene(2).save(folder / "turned.jpg", exif=turned)
    clear = scene(3).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 60, 60))
    clear.save(folder / "clear.png")
    Image.eval(scene(4), lambda value: value // 8).save(folder / "dark.png")
    found = looked(folder, code=EXIT_FAILED, size=("--resolution", "192"))
    by_kind = kinds(found)
    assert by_kind["enlarged"] == ["small.png"] and by_kind["cut"] == ["wide.png"]
    assert by_kind["turned"] == ["turned.jpg"] and by_kind["transparent"] == ["clear.png"]
    assert by_kind["exposure"] == ["dark.png"]


def test_class_pictures_are_read_as_train_repa_reads_them_and_their_balance_is_told(tmp_path: Path) -> None:
    root = tmp_path / "classes"
    for name, first, count in (("tench", 50, 6), ("hen", 60, 1)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            scene(first + number, (256, 192)).save(root / name / f"{number}.png")
    found = looked(root, size=("--resolution", "192", "--train_batch_size", "1"))
    assert "balance" in kinds(found) and found["pictures"] == 7 and kinds(found)["balance"] == ["0.png"]


def test_of_very_many_pictures_a_sample_is_looked_at_and_said(forty: Path, tmp_path: Path) -> None:
    found = looked(copied(forty, tmp_path / "dog"), "--max_pictures", "10", "--trigger", "sks")
    assert found["looked_at"] == 10 and found["pictures"] == 40
    assert any("10 of 40 pictures were looked at" in note for note in found["notes"])


def test_captions_and_names_cannot_change_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "犬 & \"quoted\" 'single'"
    folder.mkdir()
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for number in range(3):
        name = f'"o\'k" <b>собака</b> {number}' if number else "</figure>"
        (folder / f"{name.replace('/', '∕')}.png").write_bytes(b"")
        scene(number).save(folder / f"{name.replace('/', '∕')}.png")
        (folder / f"{name.replace('/', '∕')}.txt").write_text(f"{evil} {number} " + "word " * 90, encoding="utf-8")
    looked(folder, "--trigger", evil.split()[0])
    html = (tmp_path / "page" / "doctor.html").read_text(encoding="utf-8")
    outline = Outline(html)
    assert outline.open == [] and "script" not in outline.names() and "b" not in outline.names()
    assert all(dict(attributes)["src"].startswith("data:image/") for tag, attributes in outline.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert evil in outline.text and "собака" in outline.text


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    locked = tmp_path / "file"
    locked.write_text("no folder")
    scene(0).save(tmp_path / "one.png")
    for words, said in (
        ([str(tmp_path / "none")], "has no images"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path), "--page", str(locked / "x" / "doctor.html")], "file"),
        ([str(tmp_path), "--page", "doctor.txt"], "must be a .html file"),
        ([str(tmp_path), "--max_pictures", "0"], "max_pictures"),
    ):
        assert doctor.main(words) == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error


def test_a_dry_run_of_a_training_writes_the_page_where_the_run_will_be(
    forty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = types.ModuleType("the plan, which has tests of its own")
    plan.print_plan = lambda options: print("steps per epoch")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "library.training.forecast", plan)
    folders = ("--train_data_dir", str(forty), "--output_dir", str(tmp_path / "run"))
    words = [*folders, "--cache_dir", str(tmp_path / "cache"), "--resolution", "128", "--report"]
    assert train_network.main([*words, "--dry_run"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "steps per epoch" in said and str(tmp_path / "run" / "doctor.html") in said
    assert (tmp_path / "run" / "doctor.html").is_file() and (tmp_path / "run" / "doctor.json").is_file()
    assert train_network.main(words) == EXIT_BAD_INPUT and "needs --dry_run" in capsys.readouterr().err


def test_deep_shows_the_teachers_components(forty: Path, tmp_path: Path, tiny_dinov2: Path) -> None:
    folder = tmp_path / "dog"
    folder.mkdir()
    for number in range(3):
        scene(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks dog number {number}")
    looked(folder, "--deep", "--dino_model", str(tiny_dinov2))
    assert "What the teacher sees" in (tmp_path / "page" / "doctor.html").read_text(encoding="utf-8")


def drawn(colour: str, box: tuple[int, int, int, int]) -> Image.Image:
    """A brown ground that grows lighter downwards, and on it a box."""
    ground = Image.linear_gradient("L").resize((128, 128))
    picture = ImageOps.colorize(ground, (110, 75, 50), (160, 120, 90))
    picture.paste(colour, box)
    return picture


def measured(picture: Image.Image) -> Measures:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return measure(file.getvalue(), "picture", square(128))


def test_other_things_on_one_ground_are_no_copies() -> None:
    one, other = drawn("yellow", (40, 60, 66, 74)), drawn("yellow", (46, 60, 66, 80))
    copy = one.resize((90, 90)).crop((1, 1, 89, 89))
    assert duplicate_pairs(list(map(measured, (one, other, copy)))) == [(0, 2)]


def test_stripes_are_no_border_and_a_railing_is_no_writing() -> None:
    bars, frame = drawn("white", (0, 0, 20, 128)), drawn("white", (0, 0, 20, 128))
    bars.paste("white", (50, 0, 70, 128))
    assert measured(frame).borders.left == pytest.approx(20 / 128, abs=0.01) and measured(bars).borders.left == 0
    rng = np.random.default_rng(0)
    for upright, is_writing in ((np.arange(200) % 8 < 3, False), (rng.random(100).repeat(2) < 0.5, True)):
        grey = np.full((256, 256), 255, np.float32)
        grey[100:116, 28:228] = np.where(upright, 0, 255)
        assert (writing_of(grey) > WRITTEN) is is_writing
