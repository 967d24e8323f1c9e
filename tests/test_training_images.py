"""A dataset's images, captions and masks are found as kohya finds them, and nothing is lost without a word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import library.data.picture_files as picture_files
from library.data.dataset_config import Dataset, Subset, datasets_from_folders
from library.data.image_headers import read_header
from library.data.picture_files import MAX_ID_BYTES
from library.data.training_images import Collected, collect_images
from tests.tools.dataset_files import captions, picture, refusal, text

DREAMBOOTH = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambooth"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a folder `mio` to put images into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mio").mkdir()
    return tmp_path


def collect(*folders: str, policy: Any = "class_tokens", **values: Any) -> Collected:
    subsets = tuple(Subset(image_dir=Path(folder), name=folder, **values) for folder in folders or ("mio",))
    return collect_images(Dataset((512, 512), subsets=subsets, name="512x512"), missing_caption=policy)


def test_images_of_a_folder_are_those_directly_in_it_in_any_letter_case(here: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.Jpeg", "d.webp", "e.bmp", "._hidden.png", "deep/f.png"):
        picture(here / "mio" / name, format="PNG")
    text("mio/notes.txt", "x")
    picture("mio/g.tif")
    collected = collect()
    assert [image.sample_id for image in collected.images] == [
        f"512x512:mio/{name}" for name in ("a.jpg", "b.PNG", "c.Jpeg", "d.webp", "e.bmp")
    ]
    assert collected.notes == ["mio: pictures of kinds that are not read are left out: 1 .tif (g.tif)."]
    assert collected.dropped == {} and len(collected.without_caption) == 5


def test_images_and_captions_side_by_side_are_found_from_either_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("mio/images/a.png")
    text("mio/captions/a.txt", "a cat")
    for folder in ("mio", "mio/images", str(here / "mio"), "mio/../mio/images/"):
        [image] = collect(folder).images
        assert (image.caption, image.caption_source) == ("a cat", "file")
    assert collect("mio").images[0].sample_id == collect("mio/images").images[0].sample_id
    monkeypatch.chdir(here / "mio" / "images")
    assert captions(collect(".")) == {"a.png": "a cat"}
    text("a.txt", "beside")
    assert captions(collect(".")) == {"a.png": "beside"}
    picture(here / "mio" / "b.png")
    assert [image.path.name for image in collect(str(here / "mio")).images] == ["b.png"]


def test_a_captions_folder_counts_only_beside_one_named_images() -> None:
    picture("mio/a.png")
    text("captions/a.txt", "of something else")
    assert captions(collect()) == {"a.png": ""}


def test_txt_captions_are_found_where_there_are_no_caption_files() -> None:
    picture("mio/a.png")
    picture("mio/b.png")
    text("mio/a.txt", "from txt")
    collected = collect()
    assert captions(collected) == {"a.png": "from txt", "b.png": ""}
    assert collected.notes == ["mio: captions are taken from 1 .txt file, since there are no .caption files."]
    assert collected.without_caption == ["mio/b.png"]
    # Picture by picture: one .caption does not hide the .txt of the others.
    text("mio/b.caption", "from caption")
    text("mio/b.txt", "not this one")
    collected = collect()
    assert captions(collected) == {"a.png": "from txt", "b.png": "from caption"}
    assert collected.notes == ["mio: captions are taken from 1 .txt file, since these pictures have no .caption files."]
    # An extension that the user chose is taken at its word, and what else lies there is named.
    assert captions(collect(caption_extension=".tags")) == {"a.png": "", "b.png": ""}
    Path("mio/b.txt").unlink()
    collected = collect(caption_extension=".txt")
    assert captions(collected) == {"a.png": "from txt", "b.png": ""}
    assert collected.notes == ["mio: 1 .caption file is not read, since caption_extension is .txt (b.caption)."]


@pytest.mark.parametrize(
    ("name", "caption", "extension"),
    [
        ("café.png", "café.txt", ".caption"),
        ("café.png", "café.txt", ".txt"),
        ("café.PNG", "café.Caption", ".caption"),
        ("a.jpg", "a.TXT", ".txt"),
        ("a.jpg", "a.txt", ".TXT"),
        ("a.b.webp", "a.b.Wd14.Txt", ".wd14.txt"),
        ("が_10_20_30_40.png", "が.TXT", ".txt"),
    ],
)
def test_captions_are_found_by_another_unicode_form_and_case_of_the_ending(
    name: str, caption: str, extension: str
) -> None:
    picture(f"mio/{name}", format="PNG")
    text(f"mio/{caption}", "words")
    assert captions(collect(caption_extension=extension)) == {name: "words"}


def test_a_caption_of_the_very_name_comes_first_and_the_case_of_the_stem_counts() -> None:
    for name in ("café", "café", "B"):
        picture(f"mio/{name}.png")
    for name, words in (("café.txt", "one"), ("café.txt", "two"), ("café.TXT", "3"), ("b.txt", "4")):
        text(f"mio/{name}", words)
    assert captions(collect()) == {"B.png": "", "café.png": "two", "café.png": "one"}


def test_jpegs_of_every_ending_are_read_and_other_pictures_are_named_and_counted() -> None:
    for name in ("a.jfif", "b.JPE", "c.jpg"):
        picture(f"mio/{name}", format="JPEG")
    for name in ("d.jp2", "e.HEIF", "f.tga", "g.heif", "h.tga", "i.tga", "j.tga", ".hidden.tga", "notes.md", "k.npz"):
        text(f"mio/{name}", "x")
    collected = collect()
    assert list(captions(collected)) == ["a.jfif", "b.JPE", "c.jpg"]
    assert collected.notes == [
        "mio: pictures of kinds that are not read are left out: 4 .tga (f.tga; h.tga; i.tga; ...), "
        "2 .heif (e.HEIF; g.heif), 1 .jp2 (d.jp2)."
    ]


def test_the_first_line_is_the_caption_and_a_wildcard_keeps_all_that_say_something() -> None:
    picture("mio/a.png")
    text("mio/a.txt", "\ufeff  first, caption \r\n\r\n second \n")
    collected = collect(caption_extension=".txt")
    assert captions(collected) == {"a.png": "first, caption"}
    assert "only the first line is used of captions with more (a.txt)" in collected.notes[0]
    collected = collect(caption_extension=".txt", enable_wildcard=True)
    assert captions(collected) == {"a.png": "first, caption\nsecond"} and collected.notes == []


def test_a_face_cut_out_of_a_picture_shares_its_caption() -> None:
    picture("mio/cat_10_20_30_40.png")
    picture("mio/cat_on_a_nice_mat.png")
    text("mio/cat.caption", "a cat")
    assert captions(collect()) == {"cat_10_20_30_40.png": "a cat", "cat_on_a_nice_mat.png": ""}


def test_an_empty_caption_file_is_an_empty_caption_and_said() -> None:
    picture("mio/a.png")
    text("mio/a.txt", "\n")
    collected = collect(class_tokens="cat", caption_extension=".txt")
    assert (collected.images[0].caption, collected.images[0].caption_source) == ("", "file")
    assert collected.notes == ["mio: caption files that are empty stand for an empty caption (a.txt)."]


def test_captions_that_are_not_utf8_are_named() -> None:
    for number in range(5):
        picture(f"mio/{number}.png")
        text(f"mio/{number}.txt", b"fine\ncaf\xe9" if number else "café")
    assert refusal(collect) == (
        "Caption files that are not UTF-8 text: mio/1.txt, line 2; mio/2.txt, line 2; mio/3.txt, line 2; 4 in all. "
        "Save them as UTF-8."
    )


def test_an_image_without_a_caption_follows_the_policy() -> None:
    picture("mio/a.png")
    picture("mio/b.png")
    text("mio/a.txt", "a cat")

    def outcome(policy: str, class_tokens: str | None) -> tuple[Any, ...]:
        collected = collect(policy=policy, class_tokens=class_tokens)
        said = [(image.caption, image.caption_source) for image in collected.images[1:]]
        return said, collected.dropped, collected.without_caption

    for policy in ("class_tokens", "skip", "error"):
        assert outcome(policy, "mio girl") == ([("mio girl", "class_tokens")], {}, [])
    assert outcome("empty", "mio girl") == ([("", "none")], {}, [])
    assert outcome("class_tokens", None) == outcome("empty", None) == ([("", "none")], {}, ["mio/b.png"])
    assert outcome("skip", None) == ([], {"mio/b.png": "without a caption"}, ["mio/b.png"])
    assert refusal(lambda: outcome("error", None)) == (
        "mio: 1 of 2 images have no caption (mio/b.png). Write a text file of the same name for each, or set "
        "class_tokens, or let missing_caption be another than error."
    )


def test_duplicate_stems_are_two_images_with_one_caption() -> None:
    picture("mio/a.png")
    picture("mio/a.jpg", (16, 8))
    text("mio/a.txt", "a cat")
    first, second = collect().images
    assert first.caption == second.caption and first.sample_id != second.sample_id


def test_unreadable_images_are_dropped_with_their_reason(here: Path) -> None:
    good = picture("mio/good.png", (64, 64)).read_bytes()
    text("mio/empty.png", b"")
    text("mio/words.jpg", "not a picture")
    text("mio/cut.png", good[:20])
    (here / "mio" / "folder.png").mkdir()
    (here / "mio" / "link.png").symlink_to("gone.png")
    (here / "mio" / "fine.png").symlink_to(here / "mio" / "good.png")
    collected = collect()
    assert sorted(captions(collected)) == ["fine.png", "good.png"]
    assert collected.dropped.keys() == {
        f"mio/{n}" for n in ("empty.png", "words.jpg", "cut.png", "folder.png", "link.png")
    }
    assert collected.dropped["mio/words.jpg"] == "unreadable: not an image, or of a format that is not read"
    assert collected.dropped["mio/link.png"] == "not a file: a link to nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep file names in Unicode")
def test_a_name_that_is_not_utf8_is_dropped() -> None:
    picture("mio/a.png")
    picture("mio/\udcff.png")
    assert collect().dropped == {"mio/\\udcff.png": "with a name that is not UTF-8"}


def test_too_many_pixels_are_dropped_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    picture("mio/a.png")
    for name, side in (("b.png", 11), ("c.png", 20)):
        picture(f"mio/{name}", (side, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    dropped = collect().dropped
    assert dropped.keys() == {"mio/b.png", "mio/c.png"}
    assert dropped["mio/b.png"] == "unreadable: 11 x 10 pixels, more than the limit of 100"


def test_nothing_left_says_what_became_of_all() -> None:
    for number in range(4):
        text(f"mio/{number}.png", b"")
    picture("mio/z.png")
    said = refusal(lambda: collect(policy="skip", place="set.toml, line 4"))
    assert said.startswith(
        "No images left in mio: 5 found, 4 unreadable (0.png: not an image, or of a format that is not "
    )
    assert said.endswith("; 4 in all), 1 without a caption (z.png) (set.toml, line 4).")


def test_a_subset_without_images_says_what_is_looked_for() -> None:
    picture("mio/10_cat/a.png")
    said = refusal(lambda: collect(place="set.toml, line 4"))
    assert said.startswith("mio has no images (set.toml, line 4). Read are png, jpg, jpeg, webp, bmp")
    assert said.endswith(". It has folders (10_cat), which are not looked into: name one of them.")


def test_a_subset_that_is_there_twice_or_has_no_repeats_is_left_out_and_said() -> None:
    picture("mio/a.png")
    collected = collect("mio", "./mio")
    assert len(collected.images) == 1
    assert collected.notes == ["mio is in this dataset twice; the second subset is left out."]
    subsets = tuple(Subset(image_dir=Path("mio"), name="mio", num_repeats=n) for n in (0, 2))
    collected = collect_images(Dataset((512, 512), subsets=subsets))
    assert [image.subset.num_repeats for image in collected.images] == [2]
    assert collected.notes == ["mio is left out: its num_repeats is 0."]
    assert refusal(lambda: collect(num_repeats=0)).startswith(
        "The dataset has no images: num_repeats of all its subsets"
    )


def test_cache_info_has_no_effect_and_says_so() -> None:
    picture("mio/a.png")
    assert "cache_info has no effect" in collect(cache_info=True).notes[0]


def test_no_picture_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp"):
        picture(f"mio/{name}", (600, 400))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert {image.size for image in collect().images} == {(600, 400)}


def test_masks_have_the_stem_and_the_aspect_of_their_image() -> None:
    picture("mio/a.png", (40, 20))
    picture("mio/a.jpg", (40, 20))
    picture("mio/b.png", (30, 20))
    picture("masks/a.png", (40, 20), "L")
    picture("masks/b.webp", (15, 10))
    folder = Path("masks")
    masks = {i.path.name: i.mask for i in collect(conditioning_data_dir=folder).images}
    assert masks == {"a.png": folder / "a.png", "a.jpg": folder / "a.png", "b.png": folder / "b.webp"}
    picture("masks/c.png")
    assert collect(conditioning_data_dir=folder).notes == ["masks: masks without an image are left out (c)."]
    picture("masks/b.webp", (10, 10))
    assert refusal(lambda: collect(conditioning_data_dir=folder)) == (
        "masks: masks of another shape than their image (b.webp is 10x10 for 30x20). Cut them alike."
    )
    text("masks/b.webp", "no image")
    assert refusal(lambda: collect(conditioning_data_dir=folder)).startswith(
        "Masks that cannot be read: masks/b.webp: not"
    )
    (folder / "b.webp").unlink()
    assert refusal(lambda: collect(conditioning_data_dir=folder)) == "masks has no mask for 1 of 3 images (b.png)."


def test_an_alpha_mask_is_the_images_own(here: Path) -> None:
    picture("mio/a.png", mode="RGBA")
    picture("mio/b.png")
    collected = collect(alpha_mask=True)
    assert [(image.mask, image.subset.alpha_mask) for image in collected.images] == [(None, True)] * 2
    assert collected.notes == ["mio: 1 image has no alpha channel, so every pixel counts."]
    assert [read_header(here / "mio" / name).has_alpha for name in ("a.png", "b.png")] == [True, False]


def test_class_folders_end_to_end() -> None:
    picture("train/10_mio girl/a.png")
    picture("train/10_mio girl/b.png")
    text("train/10_mio girl/b.txt", "mio smiling")
    picture("reg/1_girl/a.png")
    [dataset] = datasets_from_folders(Path("train"), Path("reg"), {"resolution": 512})
    found = [(i.identity, i.caption, i.subset.num_repeats, i.subset.is_reg) for i in collect_images(dataset).images]
    assert found == [
        ("train/10_mio girl/a.png", "mio girl", 10, False),
        ("train/10_mio girl/b.png", "mio smiling", 10, False),
        ("reg/1_girl/a.png", "girl", 1, True),
    ]


def test_ids_do_not_depend_on_other_images_and_fit_a_key(here: Path) -> None:
    deep = "é" * 60
    folder = f"mio/{deep}/{deep}/{deep}"
    for name in (f"{'x' * 200}.png", f"{'x' * 199}y.png", "a.png"):
        picture(f"{folder}/{name}")
    before = {image.path: image.sample_id for image in collect(folder).images}
    assert all(len(one.encode()) <= MAX_ID_BYTES for one in before.values()) and len(set(before.values())) == 3
    picture(f"{folder}/0.png")
    after = {image.path: image.sample_id for image in collect(folder).images}
    assert before.items() <= after.items() and len(set(after.values())) == 4


def test_an_image_that_two_subsets_name_has_two_ids() -> None:
    picture("mio/a.png")
    for name in ("m.json", "n.json"):
        text(name, '{"a.png": {"caption": "x"}}')
    subsets = [Subset(image_dir=Path("mio"), metadata_file=Path(name), name="mio") for name in ("m.json", "n.json")]
    images = collect_images(Dataset((512, 512), subsets=tuple(subsets), name="512x512")).images
    assert [image.sample_id for image in images] == ["512x512:mio/a.png", "512x512+2:mio/a.png"]
    assert images[0].identity == images[1].identity


def test_photographs_are_found_with_their_captions() -> None:
    if not DREAMBOOTH.is_dir():
        pytest.skip("the DreamBooth photographs are not here")
    folders = sorted(str(folder) for folder in DREAMBOOTH.iterdir() if (folder / "images").is_dir())
    collected = collect(*folders)
    assert len(collected.images) == 106 and not collected.dropped and not collected.without_caption
    assert len({image.sample_id for image in collected.images}) == 106


def test_listing_many_images_reads_each_folder_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        picture(f"mio/{number}.png")
    listed: list[Path] = []
    real = picture_files.names_in
    monkeypatch.setattr(picture_files, "names_in", lambda folder: listed.append(folder) or real(folder))
    collect()
    assert len(listed) <= 4
