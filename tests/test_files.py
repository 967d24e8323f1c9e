"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from library import files
from library.errors import RunFailed, UserError, script


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="half"), files.whole_file(path) as temporary:
        temporary.write_text("half")
        raise ValueError("half")
    assert files.read_json(path) == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_who_writes_one_file_at_once_does_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of one process, and processes of containers that have the same number."""
    path = tmp_path / "best.json"
    with files.whole_file(path) as one, files.whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["best.json"]
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for number in range(30):
                files.write_json(path, [number] * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and files.read_json(path) == [29] * 100 and len(list(tmp_path.iterdir())) == 1


def test_what_is_renamed_into_place_is_on_the_disk_before_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fsync(descriptor: int) -> None:
        of = os.fstat(descriptor)
        parent = of.st_ino == tmp_path.stat().st_ino
        done.append("parent" if parent else "folder" if stat.S_ISDIR(of.st_mode) else "file")

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    files.write_json(tmp_path / "a.json", {"x": 1})
    assert done == ["file", "rename", "parent"]
    done.clear()
    with files.whole_folder(tmp_path / "s") as folder:
        (folder / "one").write_text("1")
    assert done == ["file", "folder", "rename", "parent"]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="could not be written: No space left"), files.whole_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    with files.whole_folder(tmp_path / "s") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), files.whole_folder(tmp_path / "s", overwrite=True) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (tmp_path / "s" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with files.whole_folder(tmp_path / "s", overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_an_existing_folder_is_not_replaced_unasked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"), files.whole_folder(tmp_path):
        pass


@pytest.mark.skipif(os.name != "posix", reason="modes are posix")
def test_files_can_be_read_by_other_users(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(0o022)
    try:
        with files.whole_file(tmp_path / "w.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        with files.whole_folder(tmp_path / "f") as folder:
            save_file({"x": torch.zeros(1)}, folder / "w.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "w.safetensors", tmp_path / "f" / "w.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_remembered_hash_follows_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    first = files.remembered_hash(tmp_path / "a", tmp_path / "memory.json")
    assert first == files.file_hash(tmp_path / "a") == files.remembered_hash(tmp_path / "a", tmp_path / "memory.json")
    (tmp_path / "a").write_bytes(b"another")
    assert files.remembered_hash(tmp_path / "a", tmp_path / "memory.json") != first


def test_too_little_space_names_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"A cache needs .* \({1 << 60} bytes\) in .* \(\d+ bytes\) are free there"):
        files.require_space(tmp_path / "not" / "there", 1 << 60, "A cache")


def test_json_that_is_none_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a.json is not valid JSON: .*line 1"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("bad."), 2, "error: bad."),
        (RunFailed("full."), 1, "error: full."),
        (KeyboardInterrupt(), 75, "run the same command again"),
        (None, 0, ""),
    ],
)
def test_a_script_ends_with_a_sentence_and_a_code(
    raised: BaseException | None, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @script
    def main(argv: list[str]) -> None:
        if raised is not None:
            raise raised

    assert main([]) == code
    assert words in capsys.readouterr().err


def test_a_full_device_names_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    @script
    def main(argv: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert main([]) == 77 and "lower --train_batch_size" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback() -> None:
    @script
    def main(argv: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_after_a_kill_an_old_folder_comes_back_and_half_written_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = 2**22 + 12345  # beyond the largest process number of Linux
    monkeypatch.setattr(os, "getpid", lambda: dead)
    old, again, half = (
        files.beside(tmp_path / name, kind) for name, kind in (("a.b", "old"), ("b", "old"), ("c", "tmp"))
    )
    monkeypatch.undo()
    alive = files.beside(tmp_path / "d", "tmp").name.replace(str(os.getpid()), str(os.getppid()))
    foreign = [".f.tmp-other", f".e-1.tmp-{dead}", f".e.old-{dead}", ".notes.old-2023", f".g.tmp-{dead}-2024"]
    for name in (old.name, again.name, "b", half.name, alive, *foreign):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / f".g.json.tmp-{dead}-0123abcd").write_text("")
    files.recover_folders(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive, *foreign, "a.b", "b"])
    assert (tmp_path / "a.b" / "x").read_text() == old.name and (tmp_path / "b" / "x").read_text() == "b"


def test_safetensors_own_write_failure_is_a_sentence_too(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with (
        pytest.raises(RunFailed, match="could not be written: Error while serializing"),
        files.whole_folder(tmp_path / "s"),
    ):
        raise SafetensorError("Error while serializing: I/O error: File too large")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written to: .*file is a file"):
        files.require_writable(tmp_path / "file" / "out")
    files.require_writable(tmp_path / "not" / "yet" / "there")
