"""A user's own pictures in the comparison of alignment: which study they are for, what is held out, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.files import read_json
from tools.alignment_study import claim
from tools.alignment_study.own_data import copy_classes, copy_concept, studies_of
from tools.alignment_study.settings import Folders, Settings
from tools.does_alignment_help import parsed, settings_of


def _pictures(folder: Path, count: int, captions: bool = False) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02d}.png")
        if captions:
            (folder / f"{number:02d}.txt").write_text(f"number {number}")


def test_a_quarter_of_the_users_classes_is_held_out(tmp_path: Path) -> None:
    for name, count in (("big_cat", 12), ("dog", 4)):
        _pictures(tmp_path / "data" / name, count)
    (tmp_path / "data/dog/03.png").chmod(0o400)
    assert studies_of([tmp_path / "data"]) == {"classes": str(tmp_path / "data")}
    copy_classes(tmp_path / "data", tmp_path / "copied")
    train, val = ((tmp_path / "copied" / f"{part}.csv").read_text().splitlines()[1:] for part in ("train", "val"))
    assert len(train) == 12 and val == [
        "big_cat/03,images/big_cat/03.png,0",
        "07,images/big_cat/07.png,0",
        "11,images/big_cat/11.png,0",
        "dog/03,images/dog/03.png,1",
    ]
    assert (tmp_path / "data/dog/03.png").stat().st_mode & 0o777 == 0o400, "the user's own file stays as it was"
    assert read_json(tmp_path / "copied" / "class_names.json") == {"0": "big cat", "1": "dog"}
    assert (tmp_path / "copied/images/dog/03.png").read_bytes() == (tmp_path / "data/dog/03.png").read_bytes()


def test_a_quarter_of_the_users_captioned_pictures_is_held_out(tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 8, captions=True)
    assert studies_of([tmp_path / "data"]) == {"concept": str(tmp_path / "data")}
    copy_concept(tmp_path / "data", tmp_path / "copied")
    held_out = sorted(file.name for file in (tmp_path / "copied" / "held_out").iterdir())
    assert held_out == ["03.png", "03.txt", "07.png", "07.txt"]
    assert len(list((tmp_path / "copied" / "train").iterdir())) == 12


def test_pictures_that_no_study_can_use_are_refused(tmp_path: Path) -> None:
    few, plain = tmp_path / "few", tmp_path / "plain"
    _pictures(few, 7, captions=True)
    _pictures(plain, 8)
    _pictures(tmp_path / "classes" / "dog", 3)
    _pictures(tmp_path / "one" / "images", 9)
    with pytest.raises(UserError, match="fewer than 8 pictures, of which two"):
        copy_concept(few, tmp_path / "copied")
    with pytest.raises(UserError, match=r"00\.png has no caption beside it\. Write one into 00\.txt"):
        copy_concept(plain, tmp_path / "copied")
    with pytest.raises(UserError, match="one class folder, images; at least two"):
        copy_classes(tmp_path / "one", tmp_path / "copied")
    _pictures(tmp_path / "classes" / "cat", 4)
    with pytest.raises(UserError, match="dog has fewer than 4 pictures"):
        copy_classes(tmp_path / "classes", tmp_path / "copied")
    assert not (tmp_path / "copied").exists()
    _pictures(tmp_path / "small" / "a", 4)
    _pictures(tmp_path / "small" / "b", 4)
    with pytest.raises(UserError, match="2 pictures would be held out"):
        copy_classes(tmp_path / "small", tmp_path / "copied")
    with pytest.raises(UserError, match="two folders of captioned pictures"):
        studies_of([few, plain])
    _pictures(tmp_path / "kohya" / "10_luca", 4)
    with pytest.raises(UserError, match=r"kohya's layout \(10_luca\)\. Name that folder itself"):
        studies_of([tmp_path / "kohya"])
    _pictures(tmp_path / "classes" / "dog" / "inner", 1)
    with pytest.raises(UserError, match="holds pictures, and folders with pictures too"):
        studies_of([tmp_path / "classes" / "dog"])
    shutil.copy(few / "00.png", few / "00.jpg")
    with pytest.raises(UserError, match="several pictures called 00, which share a caption"):
        copy_concept(few, tmp_path / "copied")
    with pytest.raises(UserError, match="none is no folder"):
        studies_of([tmp_path / "none"])
    assert not (tmp_path / "copied").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "some/model"], "name them with --data"),
        (["--teacher_steps", "5", "--teacher", "other"], "no other --teacher"),
        (["--data", "DATA", "--studies", "scratch"], "has pictures for concept alone"),
        (["--data", "DATA", "--base", "m"], "For --base m give --resolution, --token_grid, --learning_rate too"),
        (["--teacher_steps", "5", "--studies", "scratch"], "trains no teacher of scratch and plain"),
        (["--docs", "x"], "Name the --part"),
        (["--jobs", "0"], "--jobs must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 8, captions=True)
    with pytest.raises(UserError, match=said):
        settings_of(parsed([str(tmp_path / "data") if word == "DATA" else word for word in words]))


def test_a_picture_that_comes_later_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_weights", lambda of: "as they were")
    _pictures(tmp_path / "animals" / "cat", 4)
    folders, settings = Folders(tmp_path / "out"), Settings(class_data=str(tmp_path / "animals"))
    claim.claim_folder(folders, settings)
    claim.claim_folder(folders, settings)
    _pictures(tmp_path / "animals" / "dog", 1)
    with pytest.raises(UserError, match=r"classes 4 pictures \(\w{8}\) is now 5 pictures \(\w{8}\)\. Name another"):
        claim.claim_folder(folders, settings)


def test_a_default_of_the_tiny_base_that_is_named_is_taken(tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 8, captions=True)
    words = ["--data", str(tmp_path / "data"), "--base", "m", "--resolution", "128", "--token_grid", "4"]
    with pytest.raises(UserError, match="For --base m give --learning_rate too"):
        settings_of(parsed(words))
    settings, _ = settings_of(parsed([*words, "--learning_rate", "1e-3"]))
    assert (settings.resolution, settings.learning_rate) == (128, 1e-3)
