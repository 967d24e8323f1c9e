"""Folders, manifests and ZIPs list the same samples, and every bad input is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from library.data.pixels import UnreadableImage
from library.data.sources import ImageSource, Sample, check_class_names, load_class_names, missing_files, open_source
from library.errors import UserError

HEADER = "sample_id,path,class_id\n"


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def lay(root: Path, *names: str) -> Path:
    """Files whose content is their own name; reading them needs no picture."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def triples(source: ImageSource, root: Path | None = None) -> list[tuple[str, str, int]]:
    return [(s.sample_id, os.path.relpath(s.path, root) if root else s.path, s.class_id) for s in source.samples]


def test_class_folders_are_numbered_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = open_source(lay(tmp_path, "dog/b.png", "dog/a.JPG", "cat/c.webp", "dog/notes.txt"))
    assert triples(source, tmp_path) == [("c", "cat/c.webp", 0), ("a", "dog/a.JPG", 1), ("b", "dog/b.png", 1)]
    assert source.folder_names == ["cat", "dog"] and source.describe() == f"{tmp_path} (images: 3, classes: 2)"
    # A stem that occurs twice carries its class.
    assert [s.sample_id for s in open_source(lay(tmp_path, "cat/a.png")).samples] == ["cat/a", "c", "dog/a", "b"]


def test_every_usual_extension_counts_but_no_deeper_folder_nor_hidden_file(tmp_path: Path) -> None:
    names = ["1.png", "2.jpg", "3.jpeg", "4.webp", "5.bmp", "6.tif", "7.tiff", "8.gif", "9.PNG"]
    lay(tmp_path, "cat/old.png/2.png", "cat/._1.png", ".cache/3.png", "4.png")
    assert [Path(s.path).name for s in open_source(lay(tmp_path / "cat", *names).parent).samples] == names


def test_a_folder_without_class_folders_says_what_it_wants(tmp_path: Path) -> None:
    lay(tmp_path, "a.png")
    expected = f"{tmp_path} has no class folders with images; expected {tmp_path}/<class name>/*.jpg."
    assert refusal(lambda: open_source(tmp_path)) == expected
    lay(tmp_path, "train.csv", "val.csv")
    expected += " Or name a manifest in it (train.csv; val.csv; 2 in all)."
    assert refusal(lambda: open_source(tmp_path)) == expected


def test_a_folder_with_a_class_or_a_name_that_does_not_count_is_refused(tmp_path: Path) -> None:
    (lay(tmp_path / "hole", "cat/1.png") / "dog").mkdir()
    assert refusal(lambda: open_source(tmp_path / "hole")) == (
        f"{tmp_path}/hole: class folders without images (dog; 1 in all). Class ids follow the sorted folder names, so "
        "none is skipped: fill or remove it."
    )
    cat = lay(tmp_path / "twice", "cat/1.jpg", "cat/1.png") / "cat"
    expected = f"{cat.parent}: sample_id is there twice ('cat/1' in {cat}/1.jpg and {cat}/1.png; 1 in all). "
    assert refusal(lambda: open_source(cat.parent)) == expected + "Give every image a name of its own."
    if sys.platform == "linux":  # other systems keep file names in Unicode
        lay(tmp_path / "latin", "cat/\udcff.png")
        assert "sample_id is not 1 to 480 bytes of UTF-8" in refusal(lambda: open_source(tmp_path / "latin"))


def test_manifest_paths_start_in_its_own_folder(tmp_path: Path) -> None:
    lay(tmp_path, "images/a.png", "images/b.png")
    source = open_source(written(tmp_path / "m.csv", HEADER + "one,images/a.png,5\ntwo,./images//b.png, 0\n"))
    assert triples(source, tmp_path) == [("one", "images/a.png", 5), ("two", "images/b.png", 0)]
    assert source.read(source.samples[0]) == b"images/a.png"
    assert missing_files(source) == [] and source.folder_names is None


def test_manifest_paths_start_in_the_image_root_where_one_is_given(tmp_path: Path) -> None:
    folder, linked, gone = lay(tmp_path / "folder", "a.png"), tmp_path / "linked", tmp_path / "gone"
    linked.symlink_to(folder)
    manifest = written(tmp_path / "train.csv", HEADER + "one,a.png,0\n")
    assert [len(missing_files(open_source(manifest, image_root=root))) for root in (None, folder, linked)] == [1, 0, 0]
    expected = f"--image_root {gone} is not a folder. Give the one that the paths of {manifest} start in."
    assert refusal(lambda: open_source(manifest, image_root=gone)) == expected
    expected = f"--image_root {linked} goes with a CSV manifest, but {folder} is none. Leave it out."
    assert refusal(lambda: open_source(folder, image_root=linked)) == expected


def test_columns_may_come_in_any_order_with_others_between_and_a_byte_order_mark(tmp_path: Path) -> None:
    manifest = written(tmp_path / "m.csv", '\ufeffclass_id,split,path, sample_id\r\n3,train,"a,b.png",é\r\n\r\n')
    assert triples(open_source(manifest), tmp_path) == [("é", "a,b.png", 3)]


def test_missing_files_are_found_by_listing_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, *(f"{i % 3}/{i}.png" for i in range(0, 30, 2)))
    (tmp_path / "1" / "folder.png").mkdir()
    rows = "".join(f"{i},{i % 3}/{i}.png,0\n" for i in range(30)) + "x,nowhere/x.png,0\ny,1/folder.png,0\n"
    source = open_source(written(tmp_path / "m.csv", HEADER + rows))
    listing = Mock(side_effect=os.scandir)
    monkeypatch.setattr(os, "scandir", listing)
    missing = missing_files(source)
    assert missing == [s for s in source.samples if not os.path.isfile(s.path)] and len(missing) == 17
    listed = sorted(os.path.relpath(call.args[0], tmp_path) for call in listing.call_args_list)
    assert listed == ["0", "1", "2", "nowhere"]
    (lay(tmp_path / "folder", "cat/1.png") / "cat" / "2.png").symlink_to("gone.png")
    assert [s.sample_id for s in missing_files(open_source(tmp_path / "folder"))] == ["2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " has no column sample_id or path or class_id; its first line is ''. The first line must name "),
        ("sample_id,path,classid\n", "'sample_id,path,classid'. Is 'classid' meant to be 'class_id'? The first line"),
        (HEADER, " has a header but no rows. Write one row per image."),
        (HEADER + "a,b,0\nb,b,cat\nc,c,-1\n", ": class_id is not a whole number from 0 (line 3: 'cat'; line 4: '-1'; "),
        (HEADER + "a,a,1.0\nb,b,\n", "(line 2: '1.0'; line 3: ''; 2 in all). Number the classes, the first one 0."),
        (HEADER + "a,a,0\na,b,0\na,c,1\n", ": sample_id is there twice ('a' in line 2 and line 3; 'a' in line 2 and l"),
        (HEADER + " ,a,0\n", ": sample_id is not 1 to 480 bytes of UTF-8 (line 2: ' ', 1 bytes; 1 in all). It is a"),
        (HEADER + "é" * 240 + ",b,0\n" + "é" * 241 + ",c,0\n", "(line 3: '" + "é" * 24 + "', 482 bytes; 1 in all). "),
        (HEADER + "a,a,0\nb,b, c,0\nd,d\n", ": the number of columns is not 3 (line 3: 4; line 4: 2; 2 in all). Put"),
        (HEADER + 'a,"a,0\n', ", line 2, is not CSV (unexpected end of data). Check its quotes."),
        (HEADER.encode() + b"a,a,0\nb,\xe9,0\n", " is not UTF-8 text (line 3). Save it as CSV UTF-8."),
    ],
)
def test_a_bad_manifest_says_what_is_wrong_where(tmp_path: Path, text: str | bytes, expected: str) -> None:
    manifest = written(tmp_path / "m.csv", text)
    message = refusal(lambda: open_source(manifest))
    assert message.startswith(str(manifest)) and expected in message


@pytest.mark.parametrize(
    "path", ["", "..", "../a", "b/../../a", "b/..", "/etc/passwd", "..\\a", "C:\\a", "c:a", "\\\\host\\a", "\\a"]
)
def test_a_path_cannot_leave_its_root(tmp_path: Path, path: str) -> None:
    text = HEADER + f'ok,ok..png,0\nbad,"{path}",0\n'
    problem = f"path is empty, absolute or leaves the folder it starts in (line 3: {path!r}; 1 in all)."
    manifest = written(tmp_path / "m.csv", text)
    remedy = f"Write paths relative to {tmp_path}, or give another folder for them to start in with --image_root."
    assert refusal(lambda: open_source(manifest)) == f"{manifest}: {problem} {remedy}"
    archive = pack(tmp_path / "a.zip", {"m.csv": text.encode(), "../a": b""})
    expected = f"{archive}:m.csv: {problem} Write the member names of the archive."
    assert refusal(lambda: open_source(archive)) == expected


def test_a_link_cannot_leave_the_root_of_a_manifest(tmp_path: Path) -> None:
    lay(tmp_path, "outside/a.png", "root/real/a.png")
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "real" / "b.png").symlink_to(tmp_path / "outside" / "a.png")
    (root / "real" / "inside.png").symlink_to(root / "real" / "a.png")
    assert missing_files(open_source(written(root / "a.csv", HEADER + "1,real/a.png,0\n2,real/inside.png,0\n"))) == []
    bad = written(root / "bad.csv", HEADER + "1,real/a.png,0\n2,linked/a.png,0\n3,real/b.png,0\n")
    assert refusal(lambda: open_source(bad)) == (
        f"{bad}: path is a link to outside of {root} (line 3: 'linked/a.png'; line 4: 'real/b.png'; 2 in all). "
        f"Write paths relative to {root}, or give another folder for them to start in with --image_root."
    )


def test_what_is_not_there_or_no_source_is_said(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    expected = f"{note} does not exist. Give a folder of class folders, a CSV manifest or a ZIP."
    assert refusal(lambda: open_source(note)) == expected
    expected = f"{note} is neither a folder of class folders, a CSV manifest (.csv) nor a ZIP."
    assert refusal(lambda: open_source(written(note, "hello"))) == expected


def test_a_zip_with_a_manifest_reads_its_members(tmp_path: Path) -> None:
    manifest = (HEADER + "a,in/x.png,0\nb,in/y.png,1\nc,in/z.png,1\n").encode()
    members = {"in/x.png": b"one", "in/y.png": b"two" * 1000, "other.csv": b"", "manifest.csv": manifest}
    source = open_source(pack(tmp_path / "set.zip", members))
    assert triples(source) == [("a", "in/x.png", 0), ("b", "in/y.png", 1), ("c", "in/z.png", 1)]
    assert [source.read(s) for s in source.samples[:2]] == [b"one", b"two" * 1000]
    assert source.signature(source.samples[0]) == struct.pack("<QQ", zlib.crc32(b"one"), 3)
    assert [s.sample_id for s in missing_files(source)] == ["c"]
    for use in (source.read, source.signature):
        with pytest.raises(UnreadableImage, match=r"set.zip:in/z.png: not in the archive"):
            use(source.samples[2])
    only = pack(tmp_path / "only.zip", {"list.csv": f"{HEADER}a,a.png,0".encode(), "__MACOSX/x.csv": b""})
    assert triples(open_source(only)) == [("a", "a.png", 0)]


@pytest.mark.parametrize("top", ["", "train/", "data/train/"])
def test_a_zip_of_class_folders_is_listed_like_the_folder(tmp_path: Path, top: str) -> None:
    names = ["cat/1.png", "cat b/1.png", "dog/2.JPG", "dog/notes.txt"]
    folder = open_source(lay(tmp_path / "folder", *names))
    noise = {"__MACOSX/cat/._1.png": b"", top + "dog/._2.JPG": b"", "README.md": b""}
    source = open_source(pack(tmp_path / "set.zip", {**{top + n: n.encode() for n in names}, **noise}))
    assert source.folder_names == folder.folder_names == ["cat", "cat b", "dog"]
    assert triples(source) == [(i, top + path, c) for i, path, c in triples(folder, tmp_path / "folder")]
    assert [source.read(s) for s in source.samples] == [folder.read(s) for s in folder.samples]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.png"], "0 CSV files and 1 images in 1 folders"),
        (["a/1.png", "b/c/2.png"], "0 CSV files and 2 images in 2 folders"),
        (["a.csv", "b.csv", "c/1.png"], "2 CSV files and 1 images in 1 folders"),
        ([], "0 CSV files and 0 images in 0 folders"),
    ],
)
def test_a_zip_without_either_says_what_it_has(tmp_path: Path, names: list[str], found: str) -> None:
    path = pack(tmp_path / "set.zip", dict.fromkeys(names, b""))
    assert refusal(lambda: open_source(path)) == (
        f"{path} has neither a manifest.csv nor class folders side by side, but {found}. Add a manifest.csv with the "
        "columns sample_id, path, class_id, or pack the images as <class name>/*.jpg."
    )


def test_class_folders_of_a_zip_cannot_leave_it(tmp_path: Path) -> None:
    path = pack(tmp_path / "set.zip", {"../cat/1.png": b""})
    expected = "it starts in (../cat/1.png: '../cat/1.png'; 1 in all). Pack it again without such names."
    assert refusal(lambda: open_source(path)) == f"{path}: path is empty, absolute or leaves the folder {expected}"


def test_a_zip_that_is_none_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "set.zip", pack(tmp_path / "a", {"cat/1.png": b"x" * 100}).read_bytes()[:80])
    expected = f"{path} is not a readable ZIP (File is not a zip file). Download or pack it again."
    assert refusal(lambda: open_source(path)) == expected


def test_damage_to_one_member_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "set.zip", {"cat/1.png": b"a" * 50, "cat/2.png": b"b" * 50}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"a" * 50, b"a" * 49 + b"!"))
    source = open_source(path)
    with pytest.raises(UnreadableImage, match=r"set.zip:cat/1.png: damaged in the archive \(Bad CRC-32"):
        source.read(source.samples[0])
    assert source.read(source.samples[1]) == b"b" * 50


def edited(path: Path, offset: int, value: bytes) -> Path:
    """Change the last entry of a ZIP's central directory, which is what zipfile believes."""
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02") + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (24, struct.pack("<I", (256 << 20) + 1), "256.0 MiB, method 8, flags 0"),
        (8, struct.pack("<H", 1), "1000 B, method 8, flags 1"),
        (10, struct.pack("<H", zipfile.ZIP_BZIP2), "1000 B, method 12, flags 0"),
        (10, struct.pack("<H", zipfile.ZIP_LZMA), "1000 B, method 14, flags 0"),
    ],
)
def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path: Path, offset: int, value: bytes, said: str) -> None:
    for name in ("cat/2.png", "manifest.csv"):
        path = edited(pack(tmp_path / "set.zip", {"cat/1.png": b"", name: bytes(1000)}), offset, value)
        assert refusal(partial(open_source, path)) == (
            f"{path}: members that are not read ({name}: {said}; 1 in all). Pack it again: stored or deflated, no "
            "password, no member above 256.0 MiB."
        )


def test_never_more_is_read_than_a_member_declares(tmp_path: Path) -> None:
    path = edited(pack(tmp_path / "set.zip", {"cat/1.png": bytes(50_000_000)}), 24, struct.pack("<I", 1000))
    source = open_source(path)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="damaged in the archive"):
        source.read(source.samples[0])
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # the peak
    tracemalloc.stop()


def test_a_signature_has_16_bytes_and_changes_with_the_file(tmp_path: Path) -> None:
    source = open_source(lay(tmp_path / "set", "cat/1.png"))
    sample, before = source.samples[0], source.signature(source.samples[0])
    assert source.signature(sample) == before and len(before) == 16
    modified = os.stat(sample.path).st_mtime_ns
    os.utime(sample.path, ns=(0, modified + 1000))
    touched = source.signature(sample)
    Path(sample.path).write_bytes(b"longer than before")
    os.utime(sample.path, ns=(0, modified))
    assert len({before, touched, source.signature(sample)}) == 3
    Path(sample.path).unlink()
    for use in (source.read, source.signature):
        with pytest.raises(UnreadableImage, match=r"cat/1.png: No such file or directory"):
            use(sample)


def test_a_source_survives_pickling(tmp_path: Path) -> None:
    for path in (lay(tmp_path, "cat/1.png"), pack(tmp_path / "set.zip", {"cat/1.png": b"cat/1.png"})):
        source = open_source(path)
        source.read(source.samples[0])
        copy = pickle.loads(pickle.dumps(source))
        assert copy.samples == source.samples and copy.folder_names == ["cat"]
        assert copy.read(copy.samples[0]) == b"cat/1.png"
        assert copy.signature(copy.samples[0]) == source.signature(source.samples[0])


def mismatches(source: ImageSource) -> int:
    return sum(source.read(s) != s.sample_id.encode() * 500 for _ in range(20) for s in source.samples)


def test_threads_and_forked_workers_read_the_right_members(tmp_path: Path) -> None:
    source = open_source(pack(tmp_path / "set.zip", {f"cat/{i}.png": str(i).encode() * 500 for i in range(20)}))
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(mismatches, [source] * 3)) == [0, 0, 0]
    if "fork" in multiprocessing.get_all_start_methods():
        fork, inherited = multiprocessing.get_context("fork"), vars(source)["_opened"]

        def work() -> None:  # an inherited archive would share its position in the file with the parent's
            sys.exit(mismatches(source) or vars(source)["_opened"] is inherited)

        workers = [fork.Process(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        assert mismatches(source) == 0
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize(
    ("content", "folders", "expected"),
    [
        ({"0": "tench", "7": "goldfish"}, None, {0: "tench", 7: "goldfish"}),
        (["tench", "goldfish"], None, {0: "tench", 1: "goldfish"}),
        ({"0": ["n01", "tench"], "1": ["n02", "white_shark"]}, None, {0: "tench", 1: "white shark"}),
        ({"n02": "goldfish", "n01": "tench", "n03": "shark"}, ["n01", "n02"], {0: "tench", 1: "goldfish"}),
        ({"0": "blue circle", "1": "red star"}, ["blue_circle", "red_star"], {0: "blue circle", 1: "red star"}),
        (None, ["great_white", "cat"], {0: "great white", 1: "cat"}),
        # A subset of ImageNet's folders beside the whole list; folders called by numbers, which sort as text.
        (
            {"0": ["n01", "tench"], "1": ["n02", "goldfish"], "2": ["n03", "ray"]},
            ["n02", "n03"],
            {0: "goldfish", 1: "ray"},
        ),
        ({"1": "one", "2": "two", "10": "ten"}, ["1", "10", "2"], {0: "one", 1: "ten", 2: "two"}),
    ],
)
def test_class_names_have_five_forms(tmp_path: Path, content: object, folders: list[str], expected: object) -> None:
    path = None if content is None else written(tmp_path / "names.json", json.dumps(content))
    assert load_class_names(path, folder_names=folders) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('"tench"', ' has no class names. Expected {"0": "tench", ...} or ["tench", ...].'),
        ("{}", ' has no class names. Expected {"0": "tench", ...} or ["tench", ...].'),
        ('["tench", 3]', ": class 1 has the name 3. Expected a text that is not empty."),
        ('{"0": " "}', ": class '0' has the name ' '. Expected a text that is not empty."),
        (
            '{"n1": "ray"}',
            " has keys that are neither a class id nor a class folder of the data set (n1; 1 in all). Na",
        ),
        ("{", " is not valid JSON: "),
    ],
)
def test_bad_class_names_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = written(tmp_path / "names.json", content)
    assert refusal(lambda: load_class_names(path)).startswith(f"{path}{expected}")
    expected = 'The classes have no names: give a JSON file with them, such as {"0": "tench"}.'
    assert refusal(lambda: load_class_names(None)) == expected


def test_class_ids_without_a_name_are_counted() -> None:
    samples = [Sample(str(i), "a.png", i) for i in (0, 1, 1, 5, 6, 7, 8)]
    check_class_names(samples, dict.fromkeys(range(9), "x"))
    assert refusal(lambda: check_class_names(samples, {0: "a", 1: "b"})) == (
        "The data set has class ids without a name (5; 6; 7; 4 in all); there are names for ids 0 to 1 (2 in all). "
        "Add the missing names, or correct the class ids."
    )
    assert "there are no names." in refusal(lambda: check_class_names(samples, {}))
