"""The tiny models, built once per session."""

from __future__ import annotations

import fcntl
import gc
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from library import progress

if TYPE_CHECKING:
    from tests.tools.caches import CacheSetting
    from tests.tools.lyra_runs import LyraSetting
    from tests.tools.network_runs import NetworkSetting
    from tests.tools.runs import RepaSetting
    from tests.tools.teacher import TeacherSetting

if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()  # until all tests are collected: of what their imports make, nearly all stays

# Tiny tensors: threads cost more than they bring, above all where several processes share two cores. Said before torch is
# imported, it holds for this process as for those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test depends on how fast the machine is: on a slow one, scripts would say that they still work.
progress.SILENCE = math.inf
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

LONGEST = (
    "test_real_photos", "test_train_repa", "test_train_network", "test_step_on_meta", "test_merge_interruption",
    "test_network_alignment", "test_network_resume", "test_task", "test_search_trainer", "test_resume", "test_on_gpu",
    "test_train_repa_engine", "test_merged_file", "test_flow_training", "test_search_trial", "test_cache_interruption",
    "test_search_faults", "test_merged_folder", "test_search_postgres", "test_optimize", "test_lone_vae", "test_processes",
    "test_earlier_runs", "test_search_export", "test_network_samples", "test_distillation", "test_mistakes",
)  # fmt: skip
"""Files that take ten seconds and more, the longest first: begun last, one process would work and the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, for pytest-xdist with --dist loadfile and --no-loadscope-reorder."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    # Looking for garbage among half a million objects, of what is imported, would take a tenth of the time of the tests.
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without the step that they count for their memory, which takes most of their time."""
    monkeypatch.setattr("library.training.forecast._print_model", lambda *given: None)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Files need not survive a loss of power here: who is killed loses nothing that was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", os.fstat)  # which takes open files alone, too
        yield


def built_once(name: str, build: Callable[[Path], Path], factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of pytest-xdist share: who needs it first builds it."""
    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return shared / name if (shared / name).exists() else build(shared / name)


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in SD1.5's layout with small widths. Read it; copy it before changing anything in it."""
    from library.models.tiny import build_tiny_base
    from networks.families import SD15

    return built_once("tiny-sd15", lambda folder: build_tiny_base(SD15, folder), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in SDXL's layout with small widths. Read it; copy it before changing anything in it."""
    from library.models.tiny import build_tiny_base
    from networks.families import SDXL

    return built_once("tiny-sdxl", lambda folder: build_tiny_base(SDXL, folder), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a three-layer Dinov2Model. Read it; copy it before changing anything in it."""
    from library.models.tiny import build_tiny_dinov2

    return built_once("tiny-dinov2", build_tiny_dinov2, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a two-layer T5EncoderModel. Read it; copy it before changing anything in it."""
    from library.models.tiny import build_tiny_t5

    return built_once("tiny-t5", build_tiny_t5, tmp_path_factory)


@pytest.fixture(scope="session")
def adapter_file(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kohya LoRA file for the tiny SD1.5. Read it only."""
    from tests.tools.adapters import write_lora

    path = tmp_path_factory.mktemp("adapter") / "demo.safetensors"
    write_lora(tiny_sd15, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 12 small pictures with manifests, for one test to change."""
    from tests.tools.caches import write_photos

    return write_photos(tmp_path / "photos")


@pytest.fixture
def cache_setting(tmp_path: Path, photos: Path, tiny_sd15: Path, tiny_dinov2: Path) -> CacheSetting:
    from tests.tools.caches import CacheSetting

    return CacheSetting(tmp_path, photos, tiny_sd15, tiny_dinov2)


@pytest.fixture(scope="session")
def repa_setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_dinov2: Path) -> RepaSetting:
    """Options of U-REPA runs that share one set of caches."""
    from tests.tools.runs import RepaSetting

    return RepaSetting(tmp_path_factory.mktemp("repa") / "data", tiny_sd15, tiny_dinov2)


@pytest.fixture(scope="session")
def finished_run(repa_setting: RepaSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of 4 steps with a state every 2. Read it; copy it before changing anything in it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert repa_setting.train(output, save_every_n_steps=2, validate_every_n_steps=2) == 0
    return output


@pytest.fixture(scope="session")
def network_setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> NetworkSetting:
    """Options of LoRA runs on SD1.5 that share one set of caches. Do not change the pictures."""
    from tests.tools.network_runs import NetworkSetting

    return NetworkSetting(tmp_path_factory.mktemp("network") / "sd15", tiny_sd15)


@pytest.fixture(scope="session")
def drawn_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six latents that tiny-shapes drew of three prompts, 64 px. Read them; copy the folder before changing anything in it."""
    from tests.tools.teacher import draw

    def build(folder: Path) -> Path:
        assert draw(folder / "store") == 0
        return folder

    return built_once("drawn-latents", build, tmp_path_factory) / "store"


@pytest.fixture(scope="session")
def teacher_setting(drawn_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherSetting:
    """Options of runs on these latents."""
    from tests.tools.teacher import TeacherSetting

    return TeacherSetting(tmp_path_factory.mktemp("teacher"), drawn_latents)


@pytest.fixture(scope="session")
def sdxl_setting(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> NetworkSetting:
    """Options of LoRA runs on SDXL, likewise."""
    from tests.tools.network_runs import NetworkSetting

    return NetworkSetting(tmp_path_factory.mktemp("network") / "sdxl", tiny_sdxl)


@pytest.fixture(scope="session")
def finished_network(network_setting: NetworkSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a LoRA run of two epochs of two steps, accumulation 2, with a state after each. Read it; copy it first."""
    from tests.tools.network_runs import EXACT

    output = tmp_path_factory.mktemp("finished_network") / "out"
    assert network_setting.train(output, **EXACT) == 0
    return output


@pytest.fixture(scope="session")
def lyra_setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_t5: Path) -> LyraSetting:
    """Options of runs of train_lyra.py that share one set of caches."""
    from tests.tools.lyra_runs import LyraSetting

    return LyraSetting(tmp_path_factory.mktemp("lyra") / "data", tiny_sd15, tiny_t5)


@pytest.fixture(scope="session")
def fusion_run(lyra_setting: LyraSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of train_lyra.py of 6 steps with a state every 2. Read it; copy it before changing anything in it."""
    output = tmp_path_factory.mktemp("fusion") / "out"
    assert lyra_setting.train(output) == 0
    return output
