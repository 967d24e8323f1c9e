"""The LMDB tensor store: raw bytes, shards, interruption, full disks, locks, stores made elsewhere."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest

from library.data.store import StoreMeta, TensorStore, lock_store, pack_source, shard_folder, unpack_source
from library.data.store_writer import StoreWriter, purge
from library.errors import RunFailed, UserError

META = StoreMeta("latents", "float16", (4, 3, 2), {"weights": "abc"}, complete=True)
SOURCE = pack_source(b"s" * 16, b"c" * 16, b"p" * 16)


def latent(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(4, 3, 2)).astype(np.float16)


def write(folder: Path, ids: range, kind: str = "latents", meta: StoreMeta = META) -> None:
    writer = StoreWriter(folder, kind, expected_bytes=1 << 20)
    for i in ids:
        writer.put(f"n{i}", latent(i), SOURCE)
    writer.commit()
    writer.set_meta(meta)
    writer.close()


def test_a_value_is_nothing_but_the_raw_little_endian_bytes(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert np.array_equal(np.frombuffer(transaction.get(b"n1"), np.float16).reshape(4, 3, 2), latent(1))


def test_token_keys_end_in_mid(tmp_path: Path) -> None:
    write(tmp_path, range(1), "tokens", StoreMeta("tokens", "float16", (4, 3, 2), complete=True))
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert transaction.get(b"n0_mid") is not None


def test_what_is_written_is_read_back_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    store = TensorStore(tmp_path, "latents")
    out = np.empty((4, 4, 3, 2), np.float16)
    store.read_into(["n7", "n0", "n9", "n7"], out)
    assert np.array_equal(out, np.stack([latent(i) for i in (7, 0, 9, 7)]))
    assert sorted(store.sample_ids()) == sorted(f"n{i}" for i in range(10)) and store.meta == META
    assert "n3" in store and "n10" not in store and store.missing(["n3", "x"]) == ["x"]


def test_shards_read_as_one_store(tmp_path: Path) -> None:
    for rank in range(3):
        write(shard_folder(tmp_path, rank), range(rank * 4, rank * 4 + 4))
    store = TensorStore(tmp_path, "latents")
    assert len(list(store.sample_ids())) == 12
    assert np.array_equal(store.read("n11"), latent(11)) and np.array_equal(store.read("n0"), latent(0))


def test_threads_and_pickled_copies_read_alike(tmp_path: Path) -> None:
    write(tmp_path, range(50))
    store = TensorStore(tmp_path, "latents")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(store.read, [f"n{i % 50}" for i in range(400)]))
    assert all(np.array_equal(value, latent(i % 50)) for i, value in enumerate(results))
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read("n5"), latent(5))


def test_int8_entries_carry_a_scale_beside_them(tmp_path: Path) -> None:
    meta = StoreMeta("tokens", "int8", (4, 6), complete=True)
    writer = StoreWriter(tmp_path, "tokens", expected_bytes=1 << 20)
    values, scale = np.arange(24, dtype=np.int8).reshape(4, 6), np.array([1, 2, 3, 4], np.float16)
    writer.put("a", values, SOURCE, scale)
    writer.set_meta(meta)
    writer.close()
    store = TensorStore(tmp_path, "tokens")
    scales = np.empty((1, 4), np.float16)
    store.read_scales_into(["a"], scales)
    assert np.array_equal(store.read("a"), values) and np.array_equal(scales[0], scale)


def test_replacing_an_entry_keeps_one_and_its_file_does_not_grow(tmp_path: Path) -> None:
    write(tmp_path, range(200))
    before = (tmp_path / "data.mdb").stat().st_size
    for _ in range(3):
        write(tmp_path, range(200))
    store = TensorStore(tmp_path, "latents")
    assert len(list(store.sample_ids())) == 200
    assert (tmp_path / "data.mdb").stat().st_size < 3 * before


def test_an_entry_of_another_length_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    writer = StoreWriter(tmp_path, "latents", expected_bytes=0)
    writer.put("n1", np.zeros(3, np.float16), SOURCE)
    writer.commit()
    writer.close()
    with pytest.raises(UserError, match=r"Entry n1 .* has 6 bytes, and \(4, 3, 2\) of float16 are 48"):
        TensorStore(tmp_path, "latents").read("n1")


def test_a_missing_entry_is_named_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    with pytest.raises(UserError, match=r"has no entry n5. prepare_cache.py builds"):
        TensorStore(tmp_path, "latents").read("n5")


def test_no_store_another_kind_and_a_newer_format_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no LMDB store at"):
        TensorStore(tmp_path / "nowhere", "latents")
    write(tmp_path / "a", range(1))
    with pytest.raises(UserError, match="holds latents, not tokens"):
        TensorStore(tmp_path / "a", "tokens")
    write(tmp_path / "b", range(1), meta=StoreMeta("latents", "float16", (4, 3, 2), format_version=99))
    with pytest.raises(UserError, match="format version 99, this program reads up to 1"):
        TensorStore(tmp_path / "b", "latents")


def test_a_store_made_elsewhere_is_read_when_its_shape_is_given(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"n01440764_1", latent(1).tobytes())
    with pytest.raises(UserError, match="has no __meta__.* give latent_shape"):
        TensorStore(tmp_path, "latents")
    store = TensorStore(tmp_path, "latents", made_elsewhere=("float16", (4, 3, 2)))
    assert store.foreign and np.array_equal(store.read("n01440764_1"), latent(1))


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match="could not be opened as an LMDB store"):
        TensorStore(tmp_path, "latents")


def test_purging_removes_just_the_entries_of_another_producer(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    writer = StoreWriter(tmp_path, "latents", expected_bytes=0)
    writer.put("other", latent(9), pack_source(b"s" * 16, b"c" * 16, b"q" * 16))
    writer.commit()
    writer.close()
    assert purge(tmp_path, "latents", b"q" * 16) == 3
    assert list(TensorStore(tmp_path, "latents").sample_ids()) == ["other"]


def test_a_source_record_packs_and_unpacks() -> None:
    assert unpack_source(SOURCE + b"reason") == (b"s" * 16, b"c" * 16, b"p" * 16)


WRITER = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np
from library.data.store import StoreMeta
from library.data.store_writer import StoreWriter
writer = StoreWriter(Path({folder!r}), "latents", expected_bytes=1 << 24, commit_bytes=4096)
writer.set_meta(StoreMeta("latents", "float16", (4, 3, 2), complete=True))
for i in range(10**6):
    writer.put(f"n{{i}}", np.random.default_rng(i).normal(size=(4, 3, 2)).astype(np.float16), b"x" * 48)
    if i == {entries}:
        print("some are written", flush=True)
"""


def test_sigkill_leaves_only_whole_entries(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    for entries in (500, 900):
        code = WRITER.format(root=root, folder=str(tmp_path), entries=entries)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline()
            child.kill()
        store = TensorStore(tmp_path, "latents")
        ids = list(store.sample_ids())
        assert ids and all(np.array_equal(store.read(i), latent(int(i[1:]))) for i in ids[:50])
        store.close()


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_leaves_a_store_that_continues(small_disk: Path) -> None:
    writer = StoreWriter(small_disk / "s", "latents", expected_bytes=1 << 30, commit_bytes=1 << 18)
    big = np.zeros((64, 1024), np.float16)
    with pytest.raises(RunFailed, match=r"failed: .*[Nn]o space left.*What was committed before is whole"):
        for i in range(100):
            writer.put(f"n{i}", big, SOURCE)
    writer.close()
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    writer = StoreWriter(small_disk / "s", "latents", expected_bytes=1 << 30)
    for i in range(100):
        writer.put(f"n{i}", big, SOURCE)
    writer.commit()
    writer.set_meta(StoreMeta("latents", "float16", (64, 1024), complete=True))
    writer.close()
    assert len(list(TensorStore(small_disk / "s", "latents").sample_ids())) == 100


def test_a_builder_and_a_reader_exclude_each_other_and_readers_do_not(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    write(tmp_path, range(1))
    first, second = TensorStore(tmp_path, "latents"), TensorStore(tmp_path, "latents")
    with pytest.raises(UserError, match="is in use by another process"):
        lock_store(tmp_path, exclusive=True)
    first.close(), second.close()
    lock = lock_store(tmp_path, exclusive=True)
    with pytest.raises(UserError, match="is being written by another process"):
        TensorStore(tmp_path, "latents")
    lock.close()
    TensorStore(tmp_path, "latents")
