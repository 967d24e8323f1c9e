"""What classes are called: ImageNet's names are at hand, and prompts that say nothing are shown before anything is cached."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from library.data.class_pictures import IMAGENET_NAMES, Pictures, numbered_pictures, open_pictures
from library.data.collect import TrainingData, collect_classes
from library.data.sources import load_class_names, missing_files, open_source
from library.options.data import ClassPictureOptions
from tests.tools.dataset_files import picture, refusal, text


def collected(pictures: Pictures, **options: object) -> TrainingData:
    given = ClassPictureOptions(**options)  # type: ignore[arg-type]
    return collect_classes(pictures, given, side=64, batch_size=1, validation_split=0.0, seed=1)


def of_folder(folder: Path, **options: object) -> TrainingData:
    given = ClassPictureOptions(train_data=str(folder), **options)  # type: ignore[arg-type]
    return collect_classes(open_pictures(given), given, side=64, batch_size=1, validation_split=0.0, seed=1)


def test_the_thousand_names_of_imagenet_are_sorted_by_id_and_differ_for_clip() -> None:
    rows = json.loads(IMAGENET_NAMES.read_text(encoding="utf-8"))
    assert len(rows) == 1000 and list(rows) == sorted(rows) and all(len(key) == 9 and key[0] == "n" for key in rows)
    assert len({name.lower() for name in rows.values()}) == 1000
    assert all(name == name.strip() and "_" not in name for name in rows.values())
    places = {
        0: "tench", 1: "goldfish", 2: "great white shark", 7: "cock", 134: "crane bird", 207: "golden retriever",
        281: "tabby", 388: "giant panda", 517: "crane", 639: "maillot tank suit", 817: "sports car", 999: "toilet tissue",
    }  # fmt: skip
    assert {place: list(rows.values())[place] for place in places} == places
    assert rows["n02123045"] == "tabby" and rows["n04285008"] == "sports car"


def test_names_by_wordnet_id_serve_folders_subsets_of_them_and_numbers() -> None:
    every = load_class_names(IMAGENET_NAMES)
    assert len(every) == 1000 and (every[0], every[999]) == ("tench", "toilet tissue")
    assert load_class_names(IMAGENET_NAMES, folder_names=["n02123045", "n04285008"]) == {0: "tabby", 1: "sports car"}
    words = "has keys that are neither a class id nor a class folder"
    assert words in refusal(lambda: load_class_names(IMAGENET_NAMES, folder_names=["cat", "dog"]))


@pytest.mark.parametrize(
    ("names", "codes"),
    [
        (["n01440764", "n01443537"], ["n01440764", "n01443537"]),
        (["001", "002"], ["001", "002"]),
        (["c1", "cat"], ["c1"]),
        (["boeing 747", "A", "x2 y"], ["x2 y"]),
        (["\u732b1", "\u72ac2"], []),
        (["cat", "dog"], []),
    ],
)
def test_prompts_are_shown_and_codes_warned_of(names: list[str], codes: list[str]) -> None:
    (note,) = collected(numbered_pictures(9, names), prompt_template="art of {name}").notes
    prompts = "; ".join(f'"art of {name}"' for name in names)
    if not codes:
        assert note == f"prompts: {prompts}"
        return
    warning = (
        f"warning: {len(codes)} of {len(names)} classes are called by codes ({'; '.join(codes)}), which say nothing to"
    )
    assert note.startswith(warning) and f"The prompts are {prompts}. " in note
    assert note.endswith(
        "imagenet_classes.json has the names of ImageNet's classes."
        if codes[0].startswith("n0")
        else f'Give class_names a JSON of names, such as {{"{codes[0]}": "tench"}}.'
    )


def test_the_first_three_of_many_prompts_are_shown() -> None:
    (note,) = collected(numbered_pictures(9, [f"n0000000{n}" for n in range(6)])).notes
    assert (
        'The prompts are "a photo of a n00000000"; "a photo of a n00000001"; "a photo of a n00000002"; 6 in all.'
        in note
    )


def test_class_pictures_of_jpegs_of_every_ending_are_read_and_others_named(tmp_path: Path) -> None:
    for name in ("cat/a.jfif", "cat/b.JPE", "dog/c.jpg"):
        picture(tmp_path / "set" / name, format="JPEG")
    for name in ("cat/d.heic", "dog/d.heic", "dog/e.jp2", "dog/notes.txt", "f.heic"):
        text(tmp_path / "set" / name, "x")
    data = of_folder(tmp_path / "set")
    assert [one.image.sample_id for one in data.training] == ["a", "b", "c"]
    said = "Pictures of kinds that are not read are left out: 2 .heic (cat/d.heic; dog/d.heic), 1 .jp2 (dog/e.jp2)."
    assert data.notes[0] == f"{tmp_path / 'set'}: {said}"
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "set").glob("*/*")):
            archive.write(file, file.relative_to(tmp_path / "set"))
    source = open_source(tmp_path / "set.zip")
    assert [sample.sample_id for sample in source.samples] == ["a", "b", "c"]
    assert source.notes == [f"{tmp_path / 'set.zip'}: {said}"]
    for name in ("a.jfif", "b.JPE"):
        (tmp_path / "set" / "cat" / name).unlink()
    assert refusal(lambda: of_folder(tmp_path / "set")).endswith(said)


def test_a_manifest_that_names_a_picture_twice_is_warned_of(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    text(tmp_path / "m.csv", "sample_id,path,class_id\n1,a.png,0\n2,./a.png,1\n3,b.png,0\n")
    source = open_source(tmp_path / "m.csv")
    assert len(source.samples) == 3
    assert source.notes == [
        f"warning: {tmp_path / 'm.csv'}: pictures that are there twice under two ids (a.png in line 2 and line 3; 1 in all)."
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_manifest_finds_pictures_by_another_unicode_form_and_case_of_the_ending(tmp_path: Path, packed: bool) -> None:
    names = {"1": "pics/cafe\u0301.png", "2": "pics/B.PNG", "3": "pics/c.png"}
    for name in names.values():
        picture(tmp_path / name)
    rows = "sample_id,path,class_id\n1,pics/caf\u00e9.png,0\n2,pics/B.png,0\n3,pics/c.png,1\n4,pics/C.png,1\n"
    manifest = text(tmp_path / "manifest.csv", rows)
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for file in [manifest, *(tmp_path / name for name in names.values())]:
                archive.write(file, file.relative_to(tmp_path))
    source = open_source(tmp_path / "set.zip" if packed else manifest)
    where = "" if packed else f"{tmp_path}/"
    assert {sample.sample_id: sample.path for sample in source.samples} == {
        **{key: where + name for key, name in names.items()},
        "4": f"{where}pics/C.png",
    }
    assert [sample.sample_id for sample in missing_files(source)] == ["4"]
