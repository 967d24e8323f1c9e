"""The data set that comes with the project: the same bytes everywhere, evenly filled, captions that tell the truth."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from library.data import demo_pictures
from library.data.demo_pictures import CLASSES, COLOURS, draw, ensure_demo_pictures, imagine, main, make_demo_pictures
from library.data.sources import check_class_names, load_class_names, missing_files, open_source
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError

# Where these change, GENERATOR_VERSION has to be raised, or users keep the old pictures under the new code.
GOLDEN = (1, "d87cf03685eeb30090499699d4ce4ebcbd26f193e5b1250dd10dfc0f8f23a84f")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as everybody gets it, but only its first 96 pictures: a fifth of it."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo_pictures(folder, images=96, validation=16)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_bytes_are_the_same_on_every_machine(demo: Path) -> None:
    digest = hashlib.sha256()
    for name, content in contents(demo).items():
        digest.update(name.encode() + b"\0" + content)
    assert (demo_pictures.GENERATOR_VERSION, digest.hexdigest()) == GOLDEN


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo_pictures(tmp_path / name, images=16, validation=0, size=32, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_a_picture_does_not_depend_on_how_many_there_are(demo: Path, tmp_path: Path) -> None:
    make_demo_pictures(tmp_path / "few", images=20, validation=4)
    few, all_of_them = contents(tmp_path / "few" / "images"), contents(demo / "images")
    assert len(few) == 40 and few.items() <= all_of_them.items()


def test_all_of_it_is_drawn_in_seconds(tmp_path: Path) -> None:
    """A tenth of it in less than Pillow takes for noise on half as many pictures of the size that it is drawn at."""
    start = time.process_time()
    make_demo_pictures(tmp_path / "demo", images=48, validation=8)
    drawn = time.process_time()
    for _ in range(24):
        Image.effect_noise((512, 512), 50)
    assert drawn - start < time.process_time() - drawn


def test_both_parts_hold_as_many_of_each_class(demo: Path) -> None:
    assert len(CLASSES) == 16
    for name, count in (("train.csv", 5), ("val.csv", 1)):
        assert Counter(row["class_id"] for row in rows(demo / name)) == {str(number): count for number in range(16)}
    ids = [row["sample_id"] for name in ("train.csv", "val.csv") for row in rows(demo / name)]
    assert len(set(ids)) == 96
    assert (demo_pictures.DEFAULT_IMAGES, demo_pictures.DEFAULT_VALIDATION_IMAGES) == (480, 80)


def test_the_manifests_the_folders_and_the_names_agree(demo: Path) -> None:
    names = load_class_names(demo / "class_names.json")
    folders = open_source(demo / "images")
    assert names == load_class_names(None, folder_names=folders.folder_names) == dict(enumerate(CLASSES))
    manifests = [open_source(demo / name) for name in ("train.csv", "val.csv")]
    for source in manifests:
        assert missing_files(source) == []
        check_class_names(source.samples, names)
    assert {s for source in manifests for s in source.samples} == set(folders.samples)


def test_every_picture_is_an_intact_png_of_the_size(demo: Path) -> None:
    for path in demo.glob("images/*/*.png"):
        with Image.open(path) as image:
            image.verify()
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))


def test_no_two_pictures_are_alike(demo: Path) -> None:
    assert len({path.read_bytes() for path in demo.glob("images/*/*.png")}) == 96


def test_captions_name_the_class_and_use_every_word(demo: Path) -> None:
    captions = {path: path.read_text(encoding="utf-8").strip() for path in demo.glob("images/*/*.txt")}
    assert len(captions) == 96
    for path, caption in captions.items():
        assert path.parent.name.replace("_", " ") in caption
    words = {word for caption in captions.values() for word in caption.split()}
    assert words >= {"small", "medium", "large", "top", "bottom", "left", "right", "middle", *demo_pictures.BACKGROUNDS}
    assert words >= set(demo_pictures.TEXTURES)


# Of a radius of 1: a circle of 0.9, the polygons inscribed, the star's inner corners at 0.45.
AREAS = {
    "circle": 0.81 * math.pi,
    "square": 2.0,
    "triangle": 0.75 * 3**0.5,
    "star": 10 * 0.45 * math.sin(math.pi / 5) / 2,
}


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_shape_is_where_and_as_large_as_the_caption_says(class_name: str) -> None:
    for number in range(4):
        picture = imagine(class_name, random.Random(number))
        # Shading moves the three channels alike, so a pixel of the shape keeps its distances between them.
        apart = np.array(draw(picture, 64)).astype(int) - COLOURS[picture.colour]
        shape = (np.ptp(apart, axis=-1) < 26) & (np.abs(apart.mean(-1)) < 42)
        assert shape.mean() == pytest.approx(AREAS[picture.shape] * picture.radius**2, rel=0.1, abs=0.01), picture
        columns, rows = (np.flatnonzero(shape.any(axis)) for axis in (0, 1))
        across, down = ((places[0] + places[-1] + 1) / 128 - 0.5 for places in (columns, rows))
        for word, side in (("left", -across), ("right", across), ("top", -down), ("bottom", down)):
            assert (word in picture.caption) == (word in picture.place)
            assert word not in picture.place or side > 0, picture
        size = "small" if picture.radius < 0.18 else "medium" if picture.radius < 0.27 else "large"
        assert f"a {size} {class_name} {picture.place} on" in picture.caption
        assert not shape[[0, -1]].any() and not shape[:, [0, -1]].any(), "cut off"


def test_polygons_are_filled_as_pillow_fills_them() -> None:
    polygon = [(10, 5), (60, 20), (33, 30), (50, 61), (4, 40)]
    ours, theirs = Image.new("L", (64, 64)), Image.new("L", (64, 64))
    demo_pictures._fill(ImageDraw.Draw(ours), polygon)
    ImageDraw.Draw(theirs).polygon(polygon, fill=255)
    different = np.array(ours) != np.array(theirs)
    assert different.sum() < 0.1 * (np.array(theirs) > 0).sum()  # no more than the rim


def test_a_set_that_is_not_there_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(demo_pictures, "make_demo_pictures", made.append)
    assert ensure_demo_pictures(tmp_path / "demo") == tmp_path / "demo"
    assert made == [tmp_path / "demo"]


def test_a_set_that_is_there_is_left_alone(demo: Path) -> None:
    before = (demo / "train.csv").stat().st_mtime_ns
    assert ensure_demo_pictures(demo) == demo
    assert (demo / "train.csv").stat().st_mtime_ns == before


def test_a_set_of_another_version_is_drawn_again_with_its_own_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    make_demo_pictures(folder, images=3, validation=1, size=16, seed=5)
    wanted = contents(folder)
    record = json.loads(wanted["dataset.json"])
    assert record == {
        "generator": "library.data.demo_pictures",
        "version": demo_pictures.GENERATOR_VERSION,
        "arguments": {"images": 3, "validation": 1, "size": 16, "seed": 5},
    }
    (folder / "dataset.json").write_text(json.dumps({**record, "version": 0}))
    (folder / "images" / "left_over.png").write_bytes(b"")
    ensure_demo_pictures(folder)
    assert contents(folder) == wanted


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    expected = f"{folder} exists and is not the demo data set (no dataset.json of its kind). Move it away."
    for content in (None, "[]", '{"generator": "another"}'):
        if content is not None:
            (folder / "dataset.json").write_text(content)
        with pytest.raises(UserError) as caught:
            ensure_demo_pictures(folder)
        assert str(caught.value) == expected


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_pictures, "_write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_demo_pictures(tmp_path / "demo", images=2, validation=1, size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"images": 0}, "validation must be from 0 to less than images (0), got 80."),
        ({"images": 5, "validation": 5}, "validation must be from 0 to less than images (5), got 5."),
        ({"images": 5, "validation": -1}, "validation must be from 0 to less than images (5), got -1."),
        ({"size": 8}, "size must be at least 16 pixels, got 8."),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        make_demo_pictures(tmp_path / "demo", **arguments)
    assert str(caught.value) == expected


def test_the_command_says_what_it_made_and_refuses_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "demo"), "--images", "5", "--validation", "2", "--size", "16"]
    assert main(arguments) == EXIT_OK
    said = f"5 pictures of 16 x 16 in 16 classes in {tmp_path}/demo (train.csv 3, val.csv 2), "
    assert capsys.readouterr().out.startswith(said)
    assert main(arguments) == EXIT_BAD_INPUT
    assert f"error: {tmp_path}/demo exists already." in capsys.readouterr().err
