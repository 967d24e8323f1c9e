"""Names that cannot be written, and folders that cannot, are answered before anything is cached or trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from library.errors import UserError
from library.files import require_file_name, require_writable
from library.merging.write import Output, check_output
from library.options.kohya.training import NetworkOutputOptions
from library.options.training import OutputOptions
from library.training.saving import saving_of
from tests.tools.network_runs import NetworkSetting, asked, names
from tests.tools.runs import RepaSetting

Say = pytest.CaptureFixture[str]
MOST = os.pathconf("/tmp", "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
TEMPORARY = len(f"..tmp-{os.getpid()}-01234567")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 230, "猫" * 80])
def test_a_name_too_long_is_one_sentence_and_leaves_nothing(
    network_setting: NetworkSetting, repa_setting: RepaSetting, tmp_path: Path, capsys: Say, name: str
) -> None:
    options = {**network_setting.quick, "output_name": name, "cache_dir": tmp_path / "caches"}
    for extra in ((), ("--dry_run",)):
        assert network_setting.train(tmp_path / "out", *extra, **options) == 2
        said = capsys.readouterr().err
        assert (
            "is too long a name: it has" in said and f"takes names of at most {MOST}." in said and said.count("\n") == 1
        )
    assert repa_setting.train(tmp_path / "out", output_name=name + "x" * 20) == 2
    assert "is too long a name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_longest_name_that_is_taken_can_be_written(network_setting: NetworkSetting, tmp_path: Path) -> None:
    """Also where the run is interrupted, and with the averaged weights of a step."""
    from library.training.stop import STOP

    longest = MOST - TEMPORARY - len("-step00000001-ema.safetensors")
    options = {**network_setting.quick, "save_every_n_steps": 1, "ema_decay": 0.5, "output_name": "x" * longest}
    assert network_setting.train(tmp_path / "more", **{**options, "output_name": "x" * (longest + 1)}) == 2
    with asked(1, STOP, tmp_path):
        assert network_setting.train(tmp_path, **options) == 75
    assert len(max(names(tmp_path), key=len)) == MOST - TEMPORARY


def test_the_longest_name_is_that_of_what_is_saved(tmp_path: Path) -> None:
    for changes, averaged, longest in (
        ({}, False, "mio-step00000000-state"),
        ({}, True, "mio-step00000000-state"),
        ({"save_every_n_epochs": 1}, True, "mio-000000-ema.safetensors"),
        ({"save_n_epoch_ratio": 2}, True, "mio-000000-ema.safetensors"),
        ({"save_every_n_steps": 5}, False, "mio-step00000000.safetensors"),
        ({"save_every_n_steps": 5}, True, "mio-step00000000-ema.safetensors"),
    ):
        output = NetworkOutputOptions(output_dir=tmp_path, output_name="mio", **changes)  # type: ignore[arg-type]
        assert saving_of(output).longest_name(averaged) == longest
    assert saving_of(OutputOptions(output_name="mio")).longest_name(True) == "mio-ema.safetensors"


def test_names_of_samples_count(network_setting: NetworkSetting, tmp_path: Path, capsys: Say) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    options = {**network_setting.quick, "output_name": "x" * (MOST - TEMPORARY - 30), "sample_prompts": prompts}
    assert network_setting.train(tmp_path / "out", **options) == 2
    assert "is too long a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "a\\b",
        "..",
        "nul",
        "NUL",
        "Con",
        "aux.v2",
        "com1",
        "LPT9",
        "COM²",
        "conin$",
        "prn .x",
        "a\nb",
        "a\tb",
        'a"b',
    ],
)
def test_names_that_some_system_does_not_take_are_refused(name: str) -> None:
    for kind in (OutputOptions, NetworkOutputOptions):
        with pytest.raises(UserError, match="output_name"):
            kind(output_name=name)


@pytest.mark.parametrize("name", ["null", "console", "com", "com10", "lpt", "aux2", "my.con", "mio v1.2", "猫"])
def test_names_that_only_look_so_are_taken(name: str) -> None:
    assert OutputOptions(output_name=name).output_name == name


def test_a_folder_that_nothing_can_be_written_to_is_refused_first(
    network_setting: NetworkSetting, tmp_path: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its permissions say: root may write to any, but not on a disk that is mounted to be read."""
    import tempfile

    kept, original = tmp_path / "kept", tempfile.TemporaryFile
    kept.mkdir()

    def refuse(*, dir: Path) -> object:
        if Path(dir).is_relative_to(kept):
            raise OSError(30, "Read-only file system")
        return original(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for folder in ("output_dir", "cache_dir", "logging_dir"):
        options = {**network_setting.quick, folder: kept / "new"}
        output = options.pop("output_dir", tmp_path / "out")
        for extra in ((), ("--dry_run",)):
            assert network_setting.train(Path(str(output)), *extra, **options) == 2
            said = capsys.readouterr()
            assert f"cannot be written to: {kept} is not writable (Read-only file system)." in said.err
            assert said.err.count("\n") == 1 and "cached in" not in said.out
    assert names(tmp_path) == ["kept"] and not list(kept.iterdir())


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "link" / "out", "is a link that leads nowhere"),
        (tmp_path / ("y" * (MOST + 1)) / "out", "is too long a name"),
    ):
        with pytest.raises(UserError, match=words):
            require_writable(folder)
    deep = tmp_path.joinpath(*["y" * 200] * 30)
    with pytest.raises(UserError, match="and a path at most"):
        require_file_name(deep / "x.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("mio.safetensors", "mio-ema.safetensors", "mio-000001.safetensors", "mio-step00000002.safetensors"),
        *("metrics.jsonl", "options.toml", ".lock"),
    ],
)
def test_a_folder_where_a_file_is_to_be_is_refused(
    network_setting: NetworkSetting, tmp_path: Path, capsys: Say, name: str
) -> None:
    (tmp_path / name).mkdir()
    often = {"save_every_n_epochs": 1, "save_every_n_steps": 2, "ema_decay": 0.5}
    assert network_setting.train(tmp_path, **network_setting.quick, **often) == 2
    assert f"{tmp_path / name} is a folder" in capsys.readouterr().err


def test_a_file_where_the_logs_are_to_be_is_refused(
    network_setting: NetworkSetting, tmp_path: Path, capsys: Say
) -> None:
    (tmp_path / "logs").write_text("")
    assert network_setting.train(tmp_path, **network_setting.quick) == 2
    assert "logs is a file" in capsys.readouterr().err


def test_a_file_where_the_samples_are_to_be_is_refused(
    network_setting: NetworkSetting, tmp_path: Path, capsys: Say
) -> None:
    (tmp_path / "sample").write_text("")
    (tmp_path / "prompts.txt").write_text("a cat")
    assert network_setting.train(tmp_path, sample_prompts=tmp_path / "prompts.txt", **network_setting.quick) == 2
    assert "sample is a file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["log_prefix", "log_tracker_name"])
def test_names_of_logs_count(network_setting: NetworkSetting, tmp_path: Path, capsys: Say, option: str) -> None:
    for extra in ((), ("--dry_run",)):
        options = {**network_setting.quick, option: "x" * 300}
        assert network_setting.train(tmp_path / "out", *extra, **options) == 2
        assert "is too long a name" in capsys.readouterr().err


def test_names_of_pictures_are_checked_before_models_are_loaded(tmp_path: Path, capsys: Say) -> None:
    """With the seeds in them, where several are drawn."""
    import generate

    words = ["--pretrained_model_name_or_path", "tiny-sd15", "--prompt", "x"]
    one = tmp_path / f"{'x' * (MOST - TEMPORARY - 4)}.png"
    for extra, output, code in (
        ([], tmp_path / f"{'x' * MOST}.png", 2),
        (["--images", "1"], one, 0),
        (["--images", "2"], one, 2),
    ):
        assert generate.main([*words, "--output", str(output), *extra, "--dry_run"]) == code
        assert ("is too long a name" in capsys.readouterr().err) == (code == 2)


def test_merges_and_extractions_check_their_names_too(tmp_path: Path) -> None:
    for output in (
        Output(None, tmp_path / f"{'x' * MOST}.safetensors"),
        Output(tmp_path / ("x" * MOST), None),
        Output(None, tmp_path / f"{'x' * (MOST - TEMPORARY - 15)}.safetensors"),  # its report would not fit
    ):
        with pytest.raises(UserError, match="is too long a name"):
            check_output(output, [])


def test_what_is_missing_is_said_all_at_once(
    network_setting: NetworkSetting, repa_setting: RepaSetting, tmp_path: Path, capsys: Say
) -> None:
    nowhere = {name: tmp_path / f"no_{name}" for name in ("pretrained_model_name_or_path", "train_data", "val_data")}
    blocked = {"output_name": "x" * 300, "dino_model": tmp_path / "no.pth"}
    assert repa_setting.train(tmp_path / "out", **nowhere, **blocked) == 2
    said = capsys.readouterr().err.splitlines()
    assert [next(word for word in ("no_pre", "no.pth", "no_train", "no_val", "xxx") if word in line) for line in said] == [
        "no_pre", "no.pth", "no_train", "no_val", "xxx",
    ]  # fmt: skip
    assert all(line.startswith("error: ") for line in said)
    config = tmp_path / "sets.toml"
    config.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'no_images'}'\n")
    more = {
        "pretrained_model_name_or_path": tmp_path / "no_base",
        "vae": str(tmp_path / "no_vae"),
        "dataset_config": config,
    }
    for extra in ((), ("--dry_run",)):
        assert network_setting.train(tmp_path / "out", *extra, **more) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 3 and "no_base" in said[0] and "no_vae" in said[1] and "no_images" in said[2]
