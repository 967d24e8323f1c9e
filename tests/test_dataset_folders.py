"""Datasets without a dataset file: kohya's class folders, a plain folder, a metadata file."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.data.dataset_config import Dataset, Subset, dataset_from_metadata, datasets_from_folders
from library.data.training_images import collect_images
from tests.tools.dataset_files import picture, refusal, text


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an image folder `pics`."""
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "pics" / "a.png")
    return tmp_path


def test_class_folders_are_subsets_with_their_repeats_and_tokens(here: Path) -> None:
    for name in ("10_mio girl", "5_a_b", "3", "0_off", "notes"):
        picture(here / "train" / name / "a.png")
    picture(here / "reg" / "1_girl" / "a.png")
    [dataset] = datasets_from_folders(Path("train"), Path("reg"), {"resolution": "512,512", "dataset_repeats": 7})
    assert [(s.image_dir, s.num_repeats, s.class_tokens, s.is_reg, s.name) for s in dataset.subsets] == [
        (Path("train/0_off"), 0, "off", False, "train/0_off"),
        (Path("train/10_mio girl"), 10, "mio girl", False, "train/10_mio girl"),
        (Path("train/3"), 3, None, False, "train/3"),
        (Path("train/5_a_b"), 5, "a_b", False, "train/5_a_b"),
        (Path("reg/1_girl"), 1, "girl", True, "reg/1_girl"),
    ]
    [note] = dataset.notes
    assert note == "train: folders without a number of repeats in front of their name are left out (notes)."
    picture(here / "train" / "loose.png")
    assert len(datasets_from_folders(Path("train"), None, {"resolution": 512})[0].notes) == 2


def test_a_folder_with_images_but_no_class_folders_is_one_subset(here: Path) -> None:
    picture(here / "mio" / "images" / "a.png")
    for folder in ("pics", "mio"):
        [dataset] = datasets_from_folders(Path(folder), None, {"resolution": 512, "dataset_repeats": 7})
        [subset] = dataset.subsets
        assert (subset.image_dir, subset.num_repeats, subset.name) == (Path(folder), 7, "train")
        assert dataset.notes == (
            f"{folder} has no <repeats>_<class tokens> folders: its images are taken as they are.",
        )


def test_a_folder_with_nothing_to_train_on_says_what_it_wants(here: Path) -> None:
    (here / "train" / "cats").mkdir(parents=True)
    call = lambda: datasets_from_folders(Path("train"), None, {"resolution": 512})  # noqa: E731
    assert refusal(call) == (
        "--train_data_dir train has no images, and no folder named <repeats>_<class tokens>, such as 10_mio girl (but cats)."
    )
    gone = lambda: datasets_from_folders(Path("pics"), Path("gone"), {"resolution": 512})  # noqa: E731
    assert refusal(gone) == "--reg_data_dir gone does not exist."
    assert refusal(lambda: datasets_from_folders(Path("pics"), None, {})).startswith(
        "resolution is missing for the dataset in pics. "
    )


def test_a_metadata_file_is_one_subset(here: Path) -> None:
    (here / "m.json").write_text("{}")
    [dataset] = dataset_from_metadata(Path("m.json"), Path("pics"), {"resolution": 512, "dataset_repeats": 2})
    [subset] = dataset.subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == (Path("m.json"), Path("pics"), 2)
    assert dataset_from_metadata(Path("m.json"), None, {"resolution": 512})[0].subsets[0].name == "m.json"
    message = refusal(lambda: dataset_from_metadata(Path("gone.json"), None, {"resolution": 512}))
    assert message == "metadata_file gone.json does not exist (--in_json)."


def test_a_folder_of_pictures_that_are_not_read_says_which(tmp_path: Path) -> None:
    for name in ("a.heic", "b.HEIC", "c.tga", "notes.txt"):
        text(tmp_path / "heic" / name, "x")
    unread = "Not read are 2 .heic (a.heic; b.HEIC), 1 .tga (c.tga)."
    assert refusal(lambda: datasets_from_folders(tmp_path / "heic", None, {"resolution": 64})).endswith(unread)
    subset = Subset(image_dir=tmp_path / "heic", name="x")
    assert unread in refusal(lambda: collect_images(Dataset((64, 64), subsets=(subset,))))
