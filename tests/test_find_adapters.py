"""`<lora:name:weight>` to a file: where it is looked for, and what is said when it is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from library.errors import UserError
from library.inference.find_adapters import AdapterFolders, loras_of, title_of, unique_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ("cat", "a/dog", "a/b.1", "one/same", "two/same", "deep/cat", "m/unet/model", "step_000001/lora")
    for name in names:
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "step_000001" / "state.json").touch()
    return tmp_path


def found(folder: Path, prompt: str, **given: float) -> list[tuple[str, float, float]]:
    files = {folder / f"{name}.safetensors": weight for name, weight in given.items()}
    uses = loras_of(prompt, AdapterFolders([folder], list(files)), files)
    return [
        (use.path.relative_to(folder).as_posix(), use.weights.te.weights[0], use.weights.unet.weights[0])
        for use in uses
    ]


def test_names_are_found_at_any_depth_the_nearest_first(folder: Path) -> None:
    assert found(folder, "a <lora:cat:0.5> b <lora:dog:1:0.2> <lyco:b.1>") == [
        ("cat.safetensors", 0.5, 0.5),
        ("a/dog.safetensors", 1.0, 0.2),
        ("a/b.1.safetensors", 1.0, 1.0),
    ]


def test_a_name_may_have_its_folder_and_its_suffix(folder: Path) -> None:
    assert found(folder, "<lora:two/same:1>")[0][0] == "two/same.safetensors"
    assert found(folder, "<lora:deep/cat.safetensors:1>")[0][0] == "deep/cat.safetensors"


def test_given_files_act_unless_a_tag_says_how(folder: Path) -> None:
    assert found(folder, "<lora:cat:0.5>", cat=0.9) == [("cat.safetensors", 0.5, 0.5)]
    assert found(folder, "no tag", cat=0.9) == [("cat.safetensors", 0.9, 0.9)]
    notes: list[str] = []
    given = {folder / "cat.safetensors": 0.9}
    loras_of("<lora:cat:0.5>", AdapterFolders([folder], list(given)), given, notes)
    assert notes == [f"<lora:cat:0.5> of the prompt takes the place of --lora {folder / 'cat.safetensors'}:0.9."]


def test_the_folder_of_a_given_file_is_looked_into(folder: Path) -> None:
    folders = AdapterFolders([], [folder / "a" / "dog.safetensors"])
    assert folders.find("b.1", "tag") == folder / "a" / "b.1.safetensors"


def test_two_given_files_of_one_name_are_told_apart_by_their_folders(folder: Path) -> None:
    given = {folder / "one" / "same.safetensors": 1.0, folder / "two" / "same.safetensors": 0.5}
    folders = AdapterFolders([], list(given))
    with pytest.raises(UserError, match=r"<lora:same:0.3> of the prompt could be 2 files: .*<lora:one/same:1>\."):
        loras_of("<lora:same:0.3>", folders, given)
    assert [use.weights.name for use in loras_of("", folders, given)] == ["one/same", "two/same"]
    tagged = loras_of("<lora:two/same:0.3>", folders, given)
    assert [(use.path, use.weights.unet.weights) for use in tagged] == list(
        zip(reversed(given), [(0.3,), (1.0,)], strict=True)
    )
    assert [use.weights.name for use in tagged] == ["two/same", "one/same"]


def test_a_name_has_as_many_folders_as_tell_it_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    paths = [Path(name) for name in ("a/m/x.safetensors", "b/m/x.safetensors", "x.safetensors", "b/y")]
    assert list(unique_names(paths).values()) == ["a/m/x", "b/m/x", f"{folder.name}/x", "y"]
    assert AdapterFolders([], paths).find(f"{folder.name}/x", "tag") == paths[2], "of a relative path too"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:cta:1>", "<lora:cta:1> of the prompt has no adapter: no cta.safetensors in {folder} (did you mean cat?)."),
        ("<lora:same:1>", "<lora:same:1> of the prompt could be 2 files: {folder}/one/same.safetensors, {folder}/two/same"),
        ("<hypernet:x:1>", "<hypernet:x:1> of the prompt is not supported."),
        ("<lora::1>", "<lora::1> of the prompt names no file."),
        ("<lora:model:1>", "no model.safetensors in"),
        ("<lora:lora:1>", "no lora.safetensors in"),
        ("<lora:cat:strong>", "wants a weight or weight@position"),
        ("<lora:cat:nan>", "wants a weight or weight@position"),
        ("<lora:cat:1:unet=inf>", "wants a weight or weight@position"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(folder: Path, prompt: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        found(folder, prompt)
    assert words.format(folder=folder) in str(refused.value)


# Names in metadata, links, and names that several files have


def named_inside(path: Path, name: str) -> Path:
    """An adapter whose metadata has the name, as kohya's scripts write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1)}, path, {"ss_output_name": name})
    return path


def test_the_name_in_the_metadata_counts_where_no_file_has_it(tmp_path: Path) -> None:
    renamed = named_inside(tmp_path / "a" / "download(3).safetensors", "mio v2.1")
    notes: list[str] = []
    uses = loras_of("<lora:mio v2.1:0.7>", AdapterFolders([tmp_path]), {}, notes)
    assert [(use.path, use.weights.name) for use in uses] == [(renamed, "mio v2.1")]
    assert notes == [
        f"<lora:mio v2.1:0.7> of the prompt is {renamed}, which its metadata names mio v2.1 (ss_output_name)."
    ]
    own = named_inside(tmp_path / "mio v2.1.safetensors", "x")
    assert AdapterFolders([tmp_path]).find("mio v2.1", "tag") == own, "a file's name goes first"


def test_the_metadata_of_a_given_file_counts_too(tmp_path: Path) -> None:
    given = named_inside(tmp_path / "a.safetensors", "mio")
    assert AdapterFolders([], [given]).find("mio", "tag") == given


def test_a_name_in_several_files_metadata_is_refused(tmp_path: Path) -> None:
    for name in ("x-000001", "x-000002"):
        named_inside(tmp_path / f"{name}.safetensors", "mio")
    with pytest.raises(UserError, match=r"could be 2 files: .*Write the name of the file, as in <lora:x-000001:1>\.$"):
        AdapterFolders([tmp_path]).find("mio", "<lora:mio:1>")
    with pytest.raises(UserError, match=r"no mioo.safetensors in .* \(did you mean mio\?\)"):
        AdapterFolders([tmp_path]).find("mioo", "<lora:mioo:1>")


def test_folders_and_files_are_found_through_links(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    far = named_inside(elsewhere / "deep" / "far.safetensors", "inside")
    (folder / "link").symlink_to(elsewhere)
    (folder / "alias.safetensors").symlink_to(far)
    (folder / "broken.safetensors").symlink_to(elsewhere / "gone.safetensors")
    folders = AdapterFolders([folder])
    assert folders.find("far", "tag") == folder / "link" / "deep" / "far.safetensors"
    assert folders.find("link/deep/far", "tag").samefile(far)
    assert folders.find("alias", "tag").samefile(far)
    assert folders.find("inside", "tag").samefile(far), "one file by two paths is no two files"
    with pytest.raises(UserError, match="no broken.safetensors"):
        folders.find("broken", "tag")


def test_links_in_a_circle_end(folder: Path) -> None:
    for name, target in (("loop", "."), ("a/up", "/"), ("one/two", "../two"), ("two/one", "../one"), ("me", "me")):
        (folder / name).symlink_to(target)
    folders = AdapterFolders([folder])
    assert folders.find("dog", "tag") == folder / "a" / "dog.safetensors"
    assert folders.find("one/same", "tag") == folder / "one" / "same.safetensors"
    assert len(folders.known) < 20


def test_which_of_several_files_is_taken_is_said(folder: Path) -> None:
    notes: list[str] = []
    loras_of("<lora:cat:1>", AdapterFolders([folder]), {}, notes)
    deep = folder / "deep" / "cat.safetensors"
    assert notes == [f"<lora:cat:1> of the prompt is {folder / 'cat.safetensors'}; {deep} has the same name."]


def test_without_any_adapter_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no adapters. Name its folder with --lora_dir."):
        AdapterFolders([tmp_path]).find("x", "<lora:x>")


def test_only_the_suffix_is_left_out_of_a_title() -> None:
    assert [title_of(Path(name)) for name in ("v1.5", "v1.5.safetensors")] == ["v1.5", "v1.5"]


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("Mio.SAFETENSORS", "luca.SafeTensors"):
        (tmp_path / name).touch()
    folders = AdapterFolders([tmp_path])
    assert folders.find("Mio", "<lora:Mio>") == folders.find("Mio.safetensors", "") == tmp_path / "Mio.SAFETENSORS"
    assert title_of(folders.find("luca", "<lora:luca>")) == "luca"
