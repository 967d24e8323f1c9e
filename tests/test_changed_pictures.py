"""A run that goes on from a state names the pictures that were added, removed or changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from library.training.stop import STOP
from library.training.trained_pictures import UNREADABLE, Mark, changed_pictures, read_marks
from tests.tools.network_runs import NetworkSetting, asked, draw_pictures, names
from tests.tools.runs import RepaSetting

Say = pytest.CaptureFixture[str]


def mark(caption: str = "a", cut: str = "b", settings: str = "c", content: str = "d") -> Mark:
    return Mark(caption, cut, settings, content)


def test_every_kind_of_change_is_named() -> None:
    then = {f"d:mio/{n}.png": mark() for n in range(9)} | {"d:mio/bad.png": mark(content=UNREADABLE)}
    now = {name: one for name, one in then.items() if not name.endswith(("0.png", "bad.png"))}
    assert changed_pictures(then, then) == "" and changed_pictures(None, now) == ""
    now |= {
        "d:mio/1.png": mark(caption="x"), "d:mio/2.png": mark(cut="x"), "d:mio/3.png": mark(content="x"),
        "d:mio/4.png": mark(content=""), "d:mio/5.png": mark(settings="x"), "e:new.png": mark(),
    }  # fmt: skip
    assert changed_pictures(then, now) == (
        "1 picture added (new.png), 1 picture removed (mio/0.png), 1 picture whose file changed (mio/3.png), 1 picture with "
        "another caption (mio/1.png), 1 picture cut, repeated or weighted differently (mio/2.png), 1 picture with other settings "
        "of their data set (mio/5.png)"
    )
    assert changed_pictures(then, {}).startswith(
        "9 pictures removed (mio/0.png, mio/1.png, mio/2.png, mio/3.png, mio/4.png, ...)"
    )


def test_a_resumed_lora_run_names_changed_pictures(
    network_setting: NetworkSetting, tmp_path: Path, capsys: Say
) -> None:
    data = draw_pictures(tmp_path / "cats", ((64, 64),) * 4, first=20)
    config = tmp_path / "cats.toml"
    config.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{data}'\n")
    options = {**network_setting.quick, "dataset_config": config, "cache_dir": tmp_path / "caches"}
    with asked(1, STOP, tmp_path / "out"):
        assert network_setting.train(tmp_path / "out", **options) == 75
    state = tmp_path / "out" / "mio-step00000001-state"
    marks = read_marks(state)
    assert marks is not None and len(marks) == 4 and all(len(one.content) == 32 for one in marks.values())
    capsys.readouterr()

    def said(cached: bool) -> str:
        """The error, from before anything is cached or from after it."""
        caches = names(tmp_path / "caches")
        assert network_setting.train(tmp_path / "out", **options) == 2
        found = capsys.readouterr()
        assert ("cached in" in found.out) == cached and names(tmp_path / "caches") == caches
        assert f"{state} cannot be continued exactly: the training samples or their classes changed: " in found.err
        return found.err

    before = shutil.copytree(data, tmp_path / "before")

    def restore() -> None:
        shutil.rmtree(data)
        shutil.copytree(before, data)

    draw_pictures(data, ((64, 64),), first=30)
    (data / "captions" / "p21.txt").write_text("another cat")
    (data / "images" / "p22.png").unlink()
    found = said(cached=False)
    images = data / "images"
    assert f"1 picture added ({images}/p30.png), 1 picture removed ({images}/p22.png)" in found
    assert f"1 picture with another caption ({images}/p21.png) since it was saved." in found and "p20" not in found
    restore()
    Image.new("RGB", (64, 64), "red").save(data / "images" / "p23.png")
    assert f"changed: 1 picture whose file changed ({images}/p23.png) since it was saved." in said(cached=True)
    restore()
    assert network_setting.train(tmp_path / "out", **options) == 0


def test_a_resumed_u_repa_run_names_changed_pictures(
    finished_run: Path, repa_setting: RepaSetting, tmp_path: Path, capsys: Say
) -> None:
    shutil.copytree(finished_run, tmp_path / "out")
    (tmp_path / "out" / "repa.safetensors").unlink()
    (tmp_path / "out" / "repa-ema.safetensors").unlink()
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join((repa_setting.folder / "train.csv").read_text().splitlines(keepends=True)[:-1]))
    options = repa_setting.argv(tmp_path / "out", train_data=fewer, image_root=repa_setting.folder)
    state = tmp_path / "out" / "step_000004" / "state.json"
    facts = json.loads(state.read_text())
    facts["options"]["train_data"] = str(fewer)  # the same file, of which a line has gone
    state.write_text(json.dumps(facts))
    import train_repa

    assert train_repa.main(options) == 2
    assert "or their classes changed: 1 picture removed (p7) since it was saved." in capsys.readouterr().err
