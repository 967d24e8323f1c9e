"""Merges as processes of their own: killed at any moment they leave nothing or all, and they stay small."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from library.files import recover_folders
from networks.adapter_file import read_adapter
from tests.test_merge_verify import check
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.merging import MergeServer, left_over, merging_of, payload, save

KILLS = int(os.environ.get("MERGE_KILLS", "2"))
"""Of each kind, spread over the run."""


@pytest.fixture(scope="module")
def server() -> Iterator[MergeServer]:
    server = MergeServer()
    yield server
    server.close()


Fingerprint = dict[str, str]
"""File -> SHA-256 of its bytes, of tensor files without the header, which has a date."""


class Victim:
    """A merge into a place of its own, and what stands there."""

    known: dict[tuple[str, float], Fingerprint] = {}
    """(output, ratio) -> what an undisturbed merge leaves."""
    seconds: dict[str, float] = {}
    """output -> how long the quickest took."""

    def __init__(self, server: MergeServer, adapter: Path, base: Path, folder: Path, *, single: bool) -> None:
        self.server, self.adapter, self.folder = server, adapter, folder
        self.output = folder / ("m.safetensors" if single else "m")
        self.words = ("--models", adapter, *(("--save_to",) if single else ("--save_single_file", "--output_dir")))
        for ratio in (0.5, 1.0):
            if (self.output.name, ratio) not in self.known:
                started = time.perf_counter()
                assert self.run(ratio) == 0
                taken = time.perf_counter() - started
                self.seconds[self.output.name] = min(taken, self.seconds.get(self.output.name, taken))
                file = self.output if single else self.output / "model.safetensors"
                checks = check(merging_of(base, (read_adapter(adapter), ratio)), file)
                assert all(one.passed for one in checks.values())
                self.known[self.output.name, ratio] = self.fingerprint()
                self.remove()

    def run(self, ratio: float, *words: object, kill_after: float | None = None, **options: tuple[str, int]) -> int:
        process = self.server.start(*self.words, self.output, "--ratios", ratio, *words, **options)
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it was quicker
                os.kill(process, signal.SIGKILL)
        return self.server.wait()[0]

    def remove(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def fingerprint(self) -> Fingerprint:
        files = [self.output] if self.output.is_file() else [f for f in self.output.rglob("*") if f.is_file()]
        return {
            file.relative_to(self.folder).as_posix(): hashlib.sha256(
                payload(file) if file.suffix == ".safetensors" else file.read_bytes()
            ).hexdigest()
            for file in files
            if not file.name.startswith("merge_report.")
        }

    def stands(self) -> float | None:
        """The ratio of the merge whose output stands there, None where there is none; it must be whole."""
        if not self.output.exists():
            return None
        assert self.output.is_file() or (self.output / "merge_report.json").exists()
        found = self.fingerprint()
        ratios = [ratio for ratio in (0.5, 1.0) if self.known[self.output.name, ratio] == found]
        assert ratios, found
        return ratios[0]


@pytest.fixture(params=["file", "folder"])
def victim(
    request: pytest.FixtureRequest, server: MergeServer, adapter_file: Path, tiny_sd15: Path, tmp_path: Path
) -> Victim:
    (tmp_path / "out").mkdir()
    return Victim(server, adapter_file, tiny_sd15, tmp_path / "out", single=request.param == "file")


def moments(victim: Victim) -> Iterator[float]:
    """Seconds after the start, one in each part of a run's duration."""
    draw = random.Random(20260101)
    for i in range(KILLS):
        yield victim.seconds[victim.output.name] * (i + draw.random()) / KILLS


def test_sigkill_leaves_nothing_or_all_and_the_next_run_tidies_up(victim: Victim) -> None:
    killed = 0
    for moment in moments(victim):
        killed += victim.run(1.0, kill_after=moment) == -signal.SIGKILL
        assert victim.stands() in (None, 1.0)
        assert victim.run(1.0, "--overwrite") == 0
        assert victim.stands() == 1.0 and left_over(victim.folder) == []
        victim.remove()
    print(f"{killed} of {KILLS} killed")
    assert killed > 0


def test_sigkill_while_replacing_leaves_the_old_output_or_the_new(victim: Victim) -> None:
    killed = 0
    for moment in moments(victim):
        assert victim.run(0.5) == 0
        killed += victim.run(1.0, "--overwrite", kill_after=moment) == -signal.SIGKILL
        recover_folders(victim.folder)
        assert victim.stands() in (0.5, 1.0)
        assert victim.run(1.0, "--overwrite") == 0
        assert victim.stands() == 1.0 and left_over(victim.folder) == []
        victim.remove()
    print(f"{killed} of {KILLS} killed")
    assert killed > 0


@pytest.mark.parametrize(
    ("call", "stands"),
    [
        (("replace", 1), 0.5),  # written, nothing renamed
        (("replace", 2), None),  # the old one moved aside, the new one not yet there
        (("rmdir", 1), 1.0),  # the new one in place, the old one half removed
    ],
    ids=["before", "between", "after"],
)
def test_a_kill_about_the_renames_of_a_folder_loses_nothing(
    call: tuple[str, int],
    stands: float | None,
    server: MergeServer,
    adapter_file: Path,
    tiny_sd15: Path,
    tmp_path: Path,
) -> None:
    victim = Victim(server, adapter_file, tiny_sd15, tmp_path, single=False)
    assert victim.run(0.5) == 0
    assert victim.run(1.0, "--overwrite", die_before=call) == -signal.SIGKILL
    assert left_over(tmp_path) and victim.stands() == stands
    # A run that is refused has brought the old one back all the same.
    assert victim.run(1.0) == 2  # with "exists already"
    assert victim.stands() == (stands or 0.5)
    assert victim.run(1.0, "--overwrite") == 0
    assert victim.stands() == 1.0 and left_over(tmp_path) == []


def test_a_killed_lora_file_is_tidied_up_as_well(server: MergeServer, adapter_file: Path, tmp_path: Path) -> None:
    words = ("--models", adapter_file, "--lora_only", "--save_to", tmp_path / "both.safetensors")
    assert server.run(*words, die_before=("replace", 1))[0] == -signal.SIGKILL
    assert len(left_over(tmp_path)) == 1 and not (tmp_path / "both.safetensors").exists()
    assert server.run(*words)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["both.safetensors"]


@pytest.fixture(scope="module")
def large(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file of 190 MB: 40 tensors of the tiny model's VAE have 4 MB each."""
    tensors = ldm_checkpoint(tiny_sd15)
    convolution = re.compile(r"first_stage_model\..*\.block\.\d\.conv\d\.weight")
    names = sorted(filter(convolution.fullmatch, tensors))
    assert len(names) == 40
    for name in names:
        tensors[name] = torch.randn(1024, 1024)
    return save(tensors, tmp_path_factory.mktemp("large") / "large.safetensors")


@pytest.mark.parametrize("options", [(), ("--save_precision", "fp16")], ids=["copied", "cast"])
def test_memory_does_not_grow_with_the_model(
    options: tuple[object, ...], server: MergeServer, adapter_file: Path, large: Path, tmp_path: Path
) -> None:
    words = (
        "--models",
        adapter_file,
        "--pretrained_model_name_or_path",
        large,
        "--save_to",
        tmp_path / "m.safetensors",
    )
    code, grown = server.run(*words, *options)
    size = large.stat().st_size
    assert code == 0 and grown is not None and size > 180e6
    print(f"{grown / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB")
    assert grown < size / 2
