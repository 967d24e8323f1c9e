"""Caches from pictures: built, continued, noticed when they no longer fit, verified, read when made elsewhere."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from library.caching.picture_sets import choose_samples, open_pictures
from library.caching.prepare import Caches, Preparation
from library.caching.verify import verify
from library.data.sources import Sample
from library.data.store import TensorStore
from library.errors import RunFailed, UserError
from library.models.encoders import dequantize_tokens
from library.options.parser import parse
from library.options.repa import PrepareCacheOptions
from library.options.toml_file import PROJECT_ROOT
from library.processes import Processes
from tests.tools.runs import launch

SIZE = 64


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((SIZE + seed % 3, SIZE), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 pictures with a manifest, 4 of them for validation; classes 0 and 5."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    for name, ids in (("train", range(8)), ("val", range(8, 12))):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["sample_id", "path", "class_id"])
            for i in ids:
                draw(folder / "images" / f"p{i}.png", i)
                rows.writerow([f"p{i}", f"images/p{i}.png", 5 * (i % 2)])
    (folder / "names.json").write_text(json.dumps({"0": "cat", "5": "dog"}))
    return folder


class Setting:
    """The options of a cache build that tests change one by one."""

    def __init__(self, tmp_path: Path, photos: Path, base: Path, dino: Path) -> None:
        self.said: list[str] = []
        self.last: Caches | None = None
        self.argv = {
            "train_data": photos / "train.csv", "val_data": photos / "val.csv", "class_names": photos / "names.json",
            "cache_dir": tmp_path / "caches", "pretrained_model_name_or_path": base, "dino_model": dino,
            "resolution": 64, "dino_resolution": 56, "token_grid": 4, "mixed_precision": "no",
            "max_data_loader_n_workers": 0, "cache_batch_size": 3,
        }  # fmt: skip

    def arguments(self, **changes: object) -> list[str]:
        return [word for name, value in {**self.argv, **changes}.items() for word in (f"--{name}", *str(value).split())]

    def preparation(self, **changes: object) -> tuple[Preparation, PrepareCacheOptions]:
        options = parse(PrepareCacheOptions, self.arguments(**changes), prog="x", description="")
        preparation = Preparation(
            options.model, options.data, options.cache, Processes("cpu"), workers=options.max_data_loader_n_workers,
            tokens=options.alignment,
        )  # fmt: skip
        return preparation, options

    def build(self, *, rebuild: bool = True, **changes: object) -> Caches:
        self.said.clear()
        # A process that still reads a store cannot write to it. A closed store opens again when it is read.
        for cached in [] if self.last is None else [self.last.train, self.last.val]:
            for store in cached.stores.values() if cached is not None else ():
                store.close()
        preparation, options = self.preparation(**changes)
        self.last = preparation.prepare(open_pictures(options.data), rebuild=rebuild, say=self.said.append)
        return self.last

    @property
    def counts(self) -> list[tuple[int, int, int]]:
        """(encoded, unchanged, unreadable) of each set that had work to do."""
        found = [re.match(r"\w+: (\d+) encoded, (\d+) unchanged, (\d+) unreadable", line) for line in self.said]
        return [tuple(map(int, match.groups())) for match in found if match]


@pytest.fixture
def setting(tmp_path: Path, photos: Path, tiny_sd15: Path, tiny_dinov2: Path) -> Setting:
    return Setting(tmp_path, photos, tiny_sd15, tiny_dinov2)


def test_a_cached_entry_equals_a_fresh_encoding(setting: Setting, photos: Path) -> None:
    caches = setting.build()
    assert setting.counts == [(8, 0, 0), (4, 0, 0)]
    preparation, _ = setting.preparation()
    for kind, shape in (("latents", (4, 8, 8)), ("tokens", (16, 64))):
        store = caches.train.stores[kind]
        assert store.meta.shape == shape and store.meta.complete
        # The same batch as in the build: three pictures at once.
        from library.data.pixels import decode_rgb, square_crop

        crops = [square_crop(decode_rgb(photos / "images" / f"p{i}.png", name=""), 64) for i in range(3)]
        fresh = preparation.encoder(kind).encode(torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy()))
        for i in range(3):
            assert np.array_equal(store.read(f"p{i}"), fresh[i].half().numpy())


def test_finished_caches_are_left_alone(setting: Setting) -> None:
    setting.build()
    before = {p: p.stat().st_mtime_ns for p in Path(setting.argv["cache_dir"]).rglob("data.mdb")}
    setting.build()
    assert setting.counts == []
    assert before == {p: p.stat().st_mtime_ns for p in Path(setting.argv["cache_dir"]).rglob("data.mdb")}


def test_a_changed_picture_is_encoded_again_and_a_touched_one_is_not(setting: Setting, photos: Path) -> None:
    old = setting.build().train.stores["latents"].read("p1")
    draw(photos / "images" / "p1.png", 99)
    os.utime(photos / "images" / "p2.png", ns=(1, 1))
    caches = setting.build()
    assert setting.counts == [(1, 1, 0)]
    assert not np.array_equal(caches.train.stores["latents"].read("p1"), old)
    setting.build()
    assert setting.counts == []


def test_a_new_row_is_added_and_a_removed_row_stays_in_the_store(setting: Setting, photos: Path) -> None:
    setting.build()
    rows = (photos / "train.csv").read_text().splitlines()
    draw(photos / "images" / "new.png", 50)
    (photos / "train.csv").write_text("\n".join([rows[0], *rows[2:], "new,images/new.png,0"]))
    caches = setting.build()
    assert setting.counts == [(1, 0, 0)]
    assert len(caches.train.samples) == 8 and "p0" in caches.train.stores["latents"]


def test_a_picture_that_is_gone_keeps_its_entry(setting: Setting, photos: Path) -> None:
    setting.build()
    (photos / "images" / "p3.png").unlink()
    assert len(setting.build().train.samples) == 8 and setting.counts == []


@pytest.mark.parametrize(
    ("change", "kinds", "words"),
    [
        ({"dino_resolution": 112}, ["tokens"], "dino_resolution 56 there, 112 here"),
        ({"token_grid": 2}, ["tokens"], "shape [16, 64] there, [4, 64] here"),
        ({"token_dtype": "int8"}, ["tokens"], "dtype float16 there, int8 here"),
        ({"encoder_precision": "bf16"}, ["latents", "tokens"], "precision no there, bf16 here"),
        ({"resolution": 128}, ["latents", "tokens"], "resolution 64 there, 128 here"),
    ],
)
def test_another_option_is_refused_in_training_and_rebuilt_by_prepare_cache(
    setting: Setting, change: dict[str, object], kinds: list[str], words: str
) -> None:
    setting.build()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        setting.build(rebuild=False, **change)
    assert "let prepare_cache.py rebuild it" in str(caught.value)
    caches = setting.build(**change)
    assert setting.counts == [(8, 0, 0), (4, 0, 0)]
    rebuilt = {
        kind for kind in ("latents", "tokens") if any(f"train_{kind} was made differently" in s for s in setting.said)
    }
    assert rebuilt == set(kinds)
    assert all(store.meta.complete for store in caches.train.stores.values())
    setting.build(**change)
    assert setting.counts == []


def test_another_teacher_is_noticed_by_its_weights(setting: Setting, tmp_path: Path) -> None:
    from library.models.tiny import build_tiny_dinov2

    setting.build()
    other = tmp_path / "other-dinov2"
    build_tiny_dinov2(other, seed=1)
    with pytest.raises(UserError, match=r"train_tokens was made differently: weights \w+\.\.\. there"):
        setting.build(rebuild=False, dino_model=other)
    setting.build(dino_model=other)
    assert setting.counts == [(8, 0, 0), (4, 0, 0)]


def test_int8_tokens_are_half_the_size_and_almost_the_same(setting: Setting, tmp_path: Path) -> None:
    plain = setting.build().train.stores["tokens"]
    small = setting.build(cache_dir=tmp_path / "int8", token_dtype="int8").train.stores["tokens"]
    assert small.meta.value_bytes * 2 == plain.meta.value_bytes
    for i in range(8):
        scale = np.empty((1, 16), np.float16)
        small.read_scales_into([f"p{i}"], scale)
        again = dequantize_tokens(torch.from_numpy(small.read(f"p{i}")), torch.from_numpy(scale[0]))
        cosine = torch.nn.functional.cosine_similarity(
            again.float(), torch.from_numpy(plain.read(f"p{i}")).float(), dim=-1
        )
        assert cosine.min() >= 0.999


def test_unreadable_pictures_are_listed_once_and_left_out(setting: Setting, photos: Path) -> None:
    (photos / "images" / "p1.png").write_bytes(b"no picture")
    caches = setting.build()
    assert setting.counts == [(7, 0, 1), (4, 0, 0)]
    assert [s.sample_id for s in caches.train.samples] == [f"p{i}" for i in (0, 2, 3, 4, 5, 6, 7)]
    listed = (Path(setting.argv["cache_dir"]) / "train_unreadable.tsv").read_text()
    assert "p1\t" in listed and "p1.png" in listed
    setting.build()
    assert setting.counts == []
    draw(photos / "images" / "p1.png", 1)
    assert len(setting.build().train.samples) == 8 and setting.counts == [(1, 0, 0)]


def test_a_damaged_member_of_a_zip_is_noted_once(setting: Setting, photos: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(photos / "train.csv", "manifest.csv")
        for i in range(8):
            file.write(photos / "images" / f"p{i}.png", f"images/p{i}.png")
        offset = file.getinfo("images/p2.png").header_offset
    data = bytearray(archive.read_bytes())
    data[offset + 200] ^= 0xFF
    archive.write_bytes(data)
    assert len(setting.build(train_data=archive).train.samples) == 7 and setting.counts == [(7, 0, 1), (4, 0, 0)]
    assert len(setting.build(train_data=archive).train.samples) == 7 and setting.counts == []


def test_a_store_cut_off_while_copying_is_refused_and_not_read(setting: Setting) -> None:
    setting.build()
    path = Path(setting.argv["cache_dir"]) / "train_tokens" / "data.mdb"
    for cached in (setting.last.train, setting.last.val):
        for store in cached.stores.values():
            store.close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train_tokens is cut off: \d+ of \d+ bytes are there"):
        setting.build()


def test_prompt_embeddings_of_another_width_are_refused(tmp_path: Path) -> None:
    from library.caching.prepare import Caches
    from library.data.text_embeddings import TextEmbeddings
    from library.training.repa_run import _check_text

    text = TextEmbeddings(torch.zeros(3, 77, 768).half(), {0: 0, 1: 1})
    with pytest.raises(UserError, match=r"holds prompt embeddings \(77, 768\), and the U-Net wants 64 wide ones"):
        _check_text(Caches(None, None, text, tmp_path / "clip.pt"), 64)


def test_no_usable_picture_says_how_many_were_seen_and_why(setting: Setting, photos: Path) -> None:
    for i in range(8):
        (photos / "images" / f"p{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"No usable images in .*train.csv: 8 seen, 8 "):
        setting.build()


def test_rows_without_files_are_counted_before_anything_is_written(setting: Setting, photos: Path) -> None:
    (photos / "images" / "p2.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 8 rows of .*train.csv name files that are not there \(first: .*p2.png\)"
    ):
        setting.build()
    assert not list(Path(setting.argv["cache_dir"]).rglob("data.mdb"))


def test_a_class_without_a_name_is_refused(setting: Setting, photos: Path) -> None:
    (photos / "names.json").write_text('{"0": "cat"}')
    with pytest.raises(UserError, match="5"):
        setting.build()


def test_a_disk_too_small_is_found_before_the_first_write(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.files.free_bytes", lambda path: 1000)
    with pytest.raises(
        UserError, match=r"Building train_latents and train_tokens needs .* \(\d+ bytes\) in .* \(1000 bytes\)"
    ):
        setting.build()
    assert not list(Path(setting.argv["cache_dir"]).rglob("data.mdb"))


def test_prompts_are_encoded_again_when_names_change(setting: Setting, photos: Path) -> None:
    first = setting.build().text
    assert first.prompts == ["a photo of a cat", "a photo of a dog", ""] and first.embeddings.shape == (3, 77, 64)
    assert first.rows == {0: 0, 5: 1} and first.empty_row == 2
    (photos / "names.json").write_text(json.dumps({"0": "cat", "5": "wolf " * 80}))
    setting.build()
    assert any(line.startswith("text: 1 prompts are longer than 77 tokens and were cut") for line in setting.said)
    (photos / "names.json").write_text('{"0": "cat", "5": "wolf"}')
    second = setting.build().text
    assert torch.equal(first.embeddings[0], second.embeddings[0])
    assert not torch.equal(first.embeddings[1], second.embeddings[1])


def test_a_plain_pt_file_of_embeddings_is_read_and_a_pickle_of_more_is_not(setting: Setting, tmp_path: Path) -> None:
    torch.save(torch.randn(7, 77, 64), tmp_path / "clip.pt")
    text = setting.build(text_embeddings=tmp_path / "clip.pt").text
    assert text.rows[5] == 5 and text.empty_row == 6

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"embeddings": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="is a pickle that holds more than tensors"):
        setting.build(text_embeddings=tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_verify_passes_what_was_built_and_finds_what_was_changed(setting: Setting) -> None:
    caches = setting.build()
    preparation, options = setting.preparation()
    said: list[str] = []
    pictures = open_pictures(options.data)
    verify(preparation, pictures, caches, say=said.append)
    assert any("8 entries of (4, 8, 8) float16, all finite" in line for line in said)
    assert any("8 encoded again: least cosine 1.0000" in line for line in said)
    path = caches.train.stores["latents"].path
    caches.train.stores["latents"].close()
    for value, message in (
        (np.full((4, 8, 8), np.nan, np.float16), "not finite"),
        (np.ones((4, 8, 8), np.float16), "not what"),
    ):
        with lmdb.open(str(path), map_size=1 << 27) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"p4", value.tobytes())
        with pytest.raises(RunFailed, match=message):
            verify(preparation, pictures, caches, say=said.append)
        caches.train.stores["latents"].close()


def foreign_store(path: Path, ids: list[str], shape: tuple[int, ...], suffix: str = "") -> None:
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, sample_id in enumerate(ids):
            transaction.put(f"{sample_id}{suffix}".encode(), np.full(shape, i, np.float16).tobytes())


def test_stores_made_elsewhere_are_used_as_they_are(setting: Setting, tmp_path: Path) -> None:
    for name, ids in (("train", range(8)), ("val", range(8, 12))):
        foreign_store(tmp_path / f"{name}_l", [f"p{i}" for i in ids], (4, 8, 8))
        foreign_store(tmp_path / f"{name}_t", [f"p{i}" for i in ids], (16, 99), "_mid")
    places = {f"{n}_{k}": tmp_path / f"{n}_{k[0]}" for n in ("train", "val") for k in ("latents", "tokens")}
    caches = setting.build(latent_shape="4 8 8", token_shape="16 99", **places)
    assert caches.train.stores["tokens"].foreign and caches.train.stores["tokens"].meta.shape == (16, 99)
    assert (caches.train.stores["latents"].read("p3") == 3).all() and setting.counts == []


def test_a_store_made_elsewhere_that_lacks_samples_or_has_another_shape_is_refused(
    setting: Setting, tmp_path: Path
) -> None:
    foreign_store(tmp_path / "l", [f"p{i}" for i in range(5)], (4, 8, 8))
    with pytest.raises(
        UserError, match=r"3 of 8 samples of the manifest are not in the store .* \(first: p5, p6, p7\)"
    ):
        setting.build(latent_shape="4 8 8", train_latents=tmp_path / "l")
    with pytest.raises(UserError, match=r"latent_shape \(4, 16, 16\) .* is not what this run needs, \(4, 8, 8\)"):
        setting.build(latent_shape="4 16 16", train_latents=tmp_path / "l")
    with pytest.raises(UserError, match="has no __meta__. If it was made elsewhere .* give latent_shape"):
        setting.build(train_latents=tmp_path / "l")


def test_the_chosen_subset_does_not_depend_on_what_else_there_is() -> None:
    samples = [Sample(f"n{i}", "", 0) for i in range(100)]
    few = choose_samples(samples, 20)
    assert len(few) == 20 and [s for s in samples if s in few] == few
    more = choose_samples(samples, 40)
    assert set(few) < set(more)
    assert choose_samples(samples[:50], 20) != samples[:20] and choose_samples(samples, None) == samples


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


def test_sigkill_in_the_middle_loses_and_doubles_nothing(setting: Setting, photos: Path) -> None:
    with open(photos / "train.csv", "a") as file:
        for i in range(200):
            draw(photos / "images" / f"q{i}.png", i)
            file.write(f"q{i},images/q{i}.png,0\n")
    # Small commits, so that the kill falls between them; forked workers, which inherit the locks.
    code = (
        "import sys, library.data.store_writer as s; s.COMMIT_BYTES = 2000\n"
        "import prepare_cache; prepare_cache.main(sys.argv[1:])"
    )
    arguments = setting.arguments(cache_batch_size=1, max_data_loader_n_workers=2)
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=PROJECT_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    folder = Path(setting.argv["cache_dir"]) / "train_tokens"
    while child.poll() is None and not committed(folder) > 20:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    present = committed(folder)
    assert 20 < present < 208
    time.sleep(0.3)  # the workers' copies of the locks are gone long before the workers are
    caches = setting.build(cache_batch_size=16)
    assert len(caches.train.samples) == 208 and setting.counts[0][0] in range(1, 208)
    for store in caches.train.stores.values():
        assert sorted(store.sample_ids()) == sorted(s.sample_id for s in caches.train.samples)
    reference = setting.build(cache_batch_size=16, cache_dir=Path(setting.argv["cache_dir"]) / "whole")
    for kind, store in caches.train.stores.items():
        for sample in caches.train.samples:
            a, b = store.read(sample.sample_id), reference.train.stores[kind].read(sample.sample_id)
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=2e-2)


def test_two_processes_share_the_work_and_their_shards_open_as_one_store(setting: Setting) -> None:
    child = launch("prepare_cache.py", setting.arguments(), processes=2)
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0, output[-2000:]
    folder = Path(setting.argv["cache_dir"]) / "train_latents"
    assert (folder / "data.mdb").is_file() and (folder / "shard-001" / "data.mdb").is_file()
    assert "8 encoded" in output and "All caches are complete" in output
    store = TensorStore(folder, "latents")
    assert sorted(store.sample_ids()) == [f"p{i}" for i in range(8)] and store.meta.complete
    store.close()
    assert len(setting.build().train.samples) == 8 and setting.counts == []


def test_two_processes_rebuild_a_store_of_one_without_doubling_an_entry(setting: Setting) -> None:
    setting.build()
    for cached in (setting.last.train, setting.last.val):
        for store in cached.stores.values():
            store.close()
    child = launch("prepare_cache.py", setting.arguments(dino_resolution=112, cache_batch_size=1), processes=2)
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 0 and "train: 8 encoded, 0 unchanged" in output, output[-2000:]
    store = TensorStore(Path(setting.argv["cache_dir"]) / "train_tokens", "tokens")
    assert sorted(store.sample_ids()) == [f"p{i}" for i in range(8)] and store.meta.complete
    assert store.meta.producer["dino_resolution"] == 112
    store.close()
    assert len(setting.build(dino_resolution=112).train.samples) == 8 and setting.counts == []
