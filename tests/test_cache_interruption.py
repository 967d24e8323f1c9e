"""Cache builds that are killed, and builds by several processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np

from library.data.store import TensorStore
from library.options.toml_file import PROJECT_ROOT
from tests.tools.caches import CacheSetting
from tests.tools.pictures import draw_picture
from tests.tools.warm import Run


def committed(folder: Path) -> int:
    """Entries on disk, seen as another process sees them."""
    if not (folder / "data.mdb").exists():
        return 0
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
            return sum(key.endswith(b"_mid") for key in keys)
    except lmdb.Error:
        return 0


def test_sigkill_in_the_middle_loses_and_doubles_nothing(cache_setting: CacheSetting, photos: Path) -> None:
    with open(photos / "train.csv", "a") as file:
        for i in range(100):
            draw_picture(photos / "images" / f"q{i}.png", i)
            file.write(f"q{i},images/q{i}.png,0\n")
    # Small commits, so that the kill falls between them.
    code = (
        "import os, signal, sys, library.data.store_writer as s; s.COMMIT_BYTES = 2000\n"
        "put, left = s.StoreWriter.put, [60]\n"
        "def counted(writer, *entry, **scale):\n"
        "    left[0] -= writer.suffix == '_mid'\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    put(writer, *entry, **scale)\n"
        "s.StoreWriter.put = counted\n"
        "import prepare_cache; prepare_cache.main(sys.argv[1:])"
    )
    arguments = cache_setting.arguments(cache_batch_size=1, max_data_loader_n_workers=2)
    Run("-c", [code, *arguments]).end(-signal.SIGKILL)
    present = committed(Path(cache_setting.argv["cache_dir"]) / "train_tokens")
    assert 20 < present < 108
    caches = cache_setting.build(cache_batch_size=16)
    assert len(caches.train.samples) == 108 and cache_setting.counts[0][0] in range(1, 108)
    for store in caches.train.stores.values():
        assert sorted(store.sample_ids()) == sorted(s.sample_id for s in caches.train.samples)
    reference = cache_setting.build(cache_batch_size=16, cache_dir=Path(cache_setting.argv["cache_dir"]) / "whole")
    for kind, store in caches.train.stores.items():
        for sample in caches.train.samples:
            a, b = store.read(sample.sample_id), reference.train.stores[kind].read(sample.sample_id)
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=2e-2)


def test_two_processes_share_the_work_and_their_shards_open_as_one_store(cache_setting: CacheSetting) -> None:
    """Here as the guide starts them; elsewhere the tests fork them."""
    launcher = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, *launcher.split(), "prepare_cache.py", *cache_setting.arguments()]
    child = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=1200)
    output = child.stdout + child.stderr
    assert child.returncode == 0, output[-2000:]
    folder = Path(cache_setting.argv["cache_dir"]) / "train_latents"
    assert (folder / "data.mdb").is_file() and (folder / "shard-001" / "data.mdb").is_file()
    assert "8 encoded" in output and "All caches are complete" in output
    store = TensorStore(folder, "latents")
    assert sorted(store.sample_ids()) == [f"p{i}" for i in range(8)] and store.meta.complete
    store.close()
    assert len(cache_setting.build().train.samples) == 8 and cache_setting.counts == []


def test_two_processes_rebuild_a_store_of_one_without_doubling_an_entry(cache_setting: CacheSetting) -> None:
    cache_setting.build()
    for cached in (cache_setting.last.train, cache_setting.last.val):
        for store in cached.stores.values():
            store.close()
    arguments = cache_setting.arguments(dino_resolution=112, cache_batch_size=1)
    output = Run("prepare_cache.py", arguments, processes=2).end()
    assert "train: 8 encoded, 0 unchanged" in output, output[-2000:]
    store = TensorStore(Path(cache_setting.argv["cache_dir"]) / "train_tokens", "tokens")
    assert sorted(store.sample_ids()) == [f"p{i}" for i in range(8)] and store.meta.complete
    assert store.meta.producer["dino_resolution"] == 112
    store.close()
    assert len(cache_setting.build(dino_resolution=112).train.samples) == 8 and cache_setting.counts == []
