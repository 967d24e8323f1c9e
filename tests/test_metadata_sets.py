"""kohya's metadata files name images and captions, and nothing outside of their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.data.dataset_config import dataset_from_metadata
from library.data.training_images import Collected, collect_images
from tests.tools.dataset_files import captions, picture, refusal, text


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a folder `mio` to put images into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mio").mkdir()
    return tmp_path


def from_metadata(content: Any, image_dir: str | None = "mio", name: str = "m.json", **given: Any) -> Collected:
    text(name, content if isinstance(content, str | bytes) else json.dumps(content))
    folder = None if image_dir is None else Path(image_dir)
    return collect_images(dataset_from_metadata(Path(name), folder, {"resolution": 512, **given})[0])


def test_metadata_name_images_by_path_by_whole_path_and_by_stem(here: Path) -> None:
    for name in ("a.png", "deep/b.png", "c.jpg", "d.x.png"):
        picture(here / "mio" / name)
    keys = ["a.png", str(here / "mio" / "deep" / "b.png"), "c", "d.x"]
    collected = from_metadata({key: {"caption": key[-1], "image_size": [8, 8]} for key in keys})
    assert [(image.identity, image.caption_source) for image in collected.images] == [
        (f"mio/{name}", "metadata") for name in ("a.png", "deep/b.png", "c.jpg", "d.x.png")
    ]
    by_stem = {"deep\\b": {"tags": "x"}, "deep/gone.png": {"tags": "x"}}
    collected = from_metadata(by_stem)
    assert [image.identity for image in collected.images] == ["mio/deep/b.png"]
    assert collected.dropped == {"deep/gone.png": "not there"}
    whole = from_metadata({keys[1]: {"caption": "x"}, "mio/a.png": {"caption": "y"}}, image_dir=None)
    assert [image.identity for image in whole.images] == [keys[1], "m.json/mio/a.png"]


def test_metadata_join_caption_and_tags() -> None:
    for name in "abcde":
        picture(f"mio/{name}.png")
    entries = [
        {"image_path": "a.png", "caption": "a cat", "tags": "x, y"},
        {"image_path": "b.png", "caption": "one\ntwo", "tags": "x"},
        {"image_path": "c.png", "tags": "x"},
        {"image_path": "d.png", "caption": ""},
        {"image_path": "e.png"},
    ]
    lines = "\n".join(map(json.dumps, entries)) + "\n"
    collected = from_metadata(lines, name="m.jsonl")
    assert list(captions(collected).values()) == ["a cat,x, y", "one,x", "x", "", ""]
    assert [image.caption_source for image in collected.images] == ["metadata"] * 4 + ["none"]
    assert collected.without_caption == ["mio/e.png"]
    wild = from_metadata(lines, name="m.jsonl", enable_wildcard=True, caption_separator="; ", class_tokens="cat")
    assert list(captions(wild).values()) == ["a cat; x, y", "one; x\ntwo; x", "x", "", "cat"]


@pytest.mark.parametrize("key", ["../a.png", "x/../../a.png", "/etc/passwd", "C:\\a.png", "..\\a.png", "a\0.png"])
def test_metadata_cannot_leave_their_root(key: str) -> None:
    picture("mio/ok.png")
    said = refusal(lambda: from_metadata({"ok.png": {"caption": "x"}, key: {"caption": "x"}}))
    assert said.startswith("m.json names images outside of mio (")
    if not key.startswith(("/", "C:")):
        assert "outside of ." in refusal(lambda: from_metadata({key: {"caption": "x"}}, image_dir=None))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.json", "", "m.json names no images."),
        ("m.json", "{}", "m.json names no images."),
        ("m.json", "[1]", "m.json holds a list. "),
        ("m.json", "{\n,}", "m.json is not valid JSON (line 2, column 1: "),
        ("m.jsonl", '{"image_path": "a.png"}\n{', "m.jsonl is not valid JSON (line 2: "),
        ("m.jsonl", '{"image_path": "a.png"}\n\n{"path": "a.png"}', "m.jsonl: entries without an image path, or whose c"),
        ("m.jsonl", '{"image_path": "a.png"}\n{"image_path": "a.png"}', "m.jsonl: images that are there twice ('a.png' "),
        ("m.json", '{"a.png": {"caption": 1}}', "m.json: entries without an image path, or whose caption or tags are no t"),
        ("m.json", '{"a.png": "a cat"}', "m.json: entries without an image path, or whose caption or tags are no text ('a"),
        ("m.json", b'{\n"\xe9": {}}', "m.json is not UTF-8 text (line 2). Save it as UTF-8."),
        ("m.json", "[" * 100_000, "m.json is not valid JSON (RecursionError)."),
        ("m.json", '{"gone.png": {"caption": ""}}', "No images left in m.json: 1 found, 1 not there (gone.png) (m.json)."),
    ],
)  # fmt: skip
def test_bad_metadata_are_one_sentence(name: str, content: str | bytes, expected: str) -> None:
    assert refusal(lambda: from_metadata(content, name=name)).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": {"caption": "1"}, "a.png": {"caption": "2"}}', "('a' and 'a.png')"),
        ('{"a.png": {"caption": "1"}, "a.png": {"caption": "2"}}', "('a.png')"),
        ('{"a": {}, "b": {}, "a": {}, "b": {}}', "('a'; 'b')"),
        ('{"a.png": {"tags": "1"}, "./a.png": {"tags": "1"}}', "('a.png' and './a.png')"),
        ('{"x/../a.png": {}, "deep//c.png": {}, "a": {}, "deep/c": {}}', "('x/../a.png' and 'a'; 'deep//c.png' and 'deep/c')"),
        ('{"deep\\\\c.png": {"caption": "1"}, "deep/c.png": {"caption": "2"}}', "('deep\\\\c.png' and 'deep/c.png')"),
        ('{"a.png": {"caption": "1"}, "HERE/mio/a.png": {"caption": "2"}}', "('a.png' and 'HERE/mio/a.png')"),
        ('{"linked/c.png": {"caption": "1"}, "deep/c.png": {"caption": "2"}}', "('linked/c.png' and 'deep/c.png')"),
        ('{"cafe\\u0301.png": {"caption": "1"}, "caf\\u00e9.png": {"caption": "2"}}', "('cafe\u0301.png' and 'caf\u00e9.png')"),
        ('{"a.PNG": {"caption": "1"}, "a.png": {"caption": "2"}}', "('a.PNG' and 'a.png')"),
        ('{"a.png": {"caption": "1", "caption": "2"}}', "(the caption of 'a.png')"),
        ('{"image_path": "a", "tags": "x"}\n{"image_path": "a.png"}', "('a' and 'a.png')"),
        ('{"image_path": "a.png", "image_path": "b.png"}', "(the image_path of line 1)"),
    ],
)  # fmt: skip
def test_a_picture_that_is_named_twice_is_refused(here: Path, content: str, expected: str) -> None:
    for name in ("a.png", "b.png", "deep/c.png", "caf\u00e9.png"):
        picture(here / "mio" / name)
    (here / "mio" / "linked").symlink_to("deep")
    (here / "mio" / "x").mkdir()
    name = "m.jsonl" if content.startswith('{"image_path"') else "m.json"
    said = refusal(lambda: from_metadata(content.replace("HERE", str(here)), name=name))
    expected = expected.replace("HERE", str(here))
    assert said == f"{name}: images that are there twice {expected}. Keep one entry of each."


def test_pictures_of_one_stem_and_of_one_name_in_two_folders_are_two() -> None:
    for name in ("a.png", "a.jpg", "deep/a.png"):
        picture(f"mio/{name}")
    collected = from_metadata({name: {"caption": name} for name in ("a.png", "a.jpg", "deep/a.png")})
    assert len(collected.images) == 3


def test_metadata_find_pictures_by_another_unicode_form_and_case_of_the_ending() -> None:
    for name in ("caf\u00e9.png", "B.PNG", "x.y.jfif"):
        picture(f"mio/{name}", format="JPEG" if name.endswith("jfif") else "PNG")
    keys = ["cafe\u0301.png", "B.png", "x.y"]
    collected = from_metadata({key: {"caption": key} for key in keys})
    assert list(captions(collected).values()) == keys and not collected.dropped
    collected = from_metadata({"cafe\u0301": {"caption": "1"}, "b.PNG": {"caption": "2"}})
    assert captions(collected) == {"caf\u00e9.png": "1"} and collected.dropped == {"b.PNG": "not there"}
