"""Caches from pictures: built, continued, noticed when they no longer fit, verified."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from library.caching.verify import verify
from library.data.class_pictures import choose_samples, open_pictures
from library.data.sources import Sample
from library.errors import RunFailed, UserError
from library.models.encoders import dequantize_tokens
from tests.tools.caches import CacheSetting
from tests.tools.pictures import draw_picture


@pytest.mark.bits
def test_a_cached_entry_equals_a_fresh_encoding(cache_setting: CacheSetting, photos: Path) -> None:
    caches = cache_setting.build()
    assert cache_setting.counts == [(8, 0, 0), (4, 0, 0)]
    preparation, _ = cache_setting.preparation()
    for kind, shape in (("latents", (4, 8, 8)), ("tokens", (16, 64))):
        store = caches.train.stores[kind]
        assert store.meta.shape == shape and store.meta.complete
        # The same batch as in the build: three pictures at once.
        from library.data.pixels import decode_rgb, square_crop

        crops = [square_crop(decode_rgb(photos / "images" / f"p{i}.png", name=""), 64) for i in range(3)]
        fresh = preparation.encoder(kind).encode(torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy()))
        for i in range(3):
            assert np.array_equal(store.read(f"p{i}"), fresh[i].half().numpy())


def test_finished_caches_are_left_alone(cache_setting: CacheSetting) -> None:
    cache_setting.build()
    before = {p: p.stat().st_mtime_ns for p in Path(cache_setting.argv["cache_dir"]).rglob("data.mdb")}
    cache_setting.build()
    assert cache_setting.counts == []
    assert before == {p: p.stat().st_mtime_ns for p in Path(cache_setting.argv["cache_dir"]).rglob("data.mdb")}


def test_a_changed_picture_is_encoded_again_and_a_touched_one_is_not(cache_setting: CacheSetting, photos: Path) -> None:
    old = cache_setting.build().train.stores["latents"].read("p1")
    draw_picture(photos / "images" / "p1.png", 99)
    os.utime(photos / "images" / "p2.png", ns=(1, 1))
    caches = cache_setting.build()
    assert cache_setting.counts == [(1, 1, 0)]
    assert not np.array_equal(caches.train.stores["latents"].read("p1"), old)
    cache_setting.build()
    assert cache_setting.counts == []


def test_a_new_row_is_added_and_a_removed_row_stays_in_the_store(cache_setting: CacheSetting, photos: Path) -> None:
    cache_setting.build()
    rows = (photos / "train.csv").read_text().splitlines()
    draw_picture(photos / "images" / "new.png", 50)
    (photos / "train.csv").write_text("\n".join([rows[0], *rows[2:], "new,images/new.png,0"]))
    caches = cache_setting.build()
    assert cache_setting.counts == [(1, 0, 0)]
    assert len(caches.train.samples) == 8 and "p0" in caches.train.stores["latents"]


def test_a_picture_that_is_gone_keeps_its_entry(cache_setting: CacheSetting, photos: Path) -> None:
    cache_setting.build()
    (photos / "images" / "p3.png").unlink()
    assert len(cache_setting.build().train.samples) == 8 and cache_setting.counts == []


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
    cache_setting: CacheSetting, change: dict[str, object], kinds: list[str], words: str
) -> None:
    cache_setting.build()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        cache_setting.build(rebuild=False, **change)
    assert "let prepare_cache.py rebuild it" in str(caught.value)
    caches = cache_setting.build(**change)
    assert cache_setting.counts == [(8, 0, 0), (4, 0, 0)]
    rebuilt = {
        kind
        for kind in ("latents", "tokens")
        if any(f"train_{kind} was made differently" in s for s in cache_setting.said)
    }
    assert rebuilt == set(kinds)
    assert all(store.meta.complete for store in caches.train.stores.values())
    cache_setting.build(**change)
    assert cache_setting.counts == []


def test_another_teacher_is_noticed_by_its_weights(cache_setting: CacheSetting, tmp_path: Path) -> None:
    from library.models.tiny import build_tiny_dinov2

    cache_setting.build()
    other = tmp_path / "other-dinov2"
    build_tiny_dinov2(other, seed=1)
    with pytest.raises(UserError, match=r"train_tokens was made differently: weights \w+\.\.\. there"):
        cache_setting.build(rebuild=False, dino_model=other)
    cache_setting.build(dino_model=other)
    assert cache_setting.counts == [(8, 0, 0), (4, 0, 0)]


def test_int8_tokens_are_half_the_size_and_almost_the_same(cache_setting: CacheSetting, tmp_path: Path) -> None:
    plain = cache_setting.build().train.stores["tokens"]
    small = cache_setting.build(cache_dir=tmp_path / "int8", token_dtype="int8").train.stores["tokens"]
    assert small.meta.value_bytes * 2 == plain.meta.value_bytes
    for i in range(8):
        scale = np.empty((1, 16), np.float16)
        small.read_scales_into([f"p{i}"], scale)
        again = dequantize_tokens(torch.from_numpy(small.read(f"p{i}")), torch.from_numpy(scale[0]))
        cosine = torch.nn.functional.cosine_similarity(
            again.float(), torch.from_numpy(plain.read(f"p{i}")).float(), dim=-1
        )
        assert cosine.min() >= 0.999


def test_unreadable_pictures_are_listed_once_and_left_out(cache_setting: CacheSetting, photos: Path) -> None:
    (photos / "images" / "p1.png").write_bytes(b"no picture")
    caches = cache_setting.build()
    assert cache_setting.counts == [(7, 0, 1), (4, 0, 0)]
    assert [s.sample_id for s in caches.train.samples] == [f"p{i}" for i in (0, 2, 3, 4, 5, 6, 7)]
    listed = (Path(cache_setting.argv["cache_dir"]) / "train_unreadable.tsv").read_text()
    assert "p1\t" in listed and "p1.png" in listed
    cache_setting.build()
    assert cache_setting.counts == []
    draw_picture(photos / "images" / "p1.png", 1)
    assert len(cache_setting.build().train.samples) == 8 and cache_setting.counts == [(1, 0, 0)]


def test_a_damaged_member_of_a_zip_is_noted_once(cache_setting: CacheSetting, photos: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(photos / "train.csv", "manifest.csv")
        for i in range(8):
            file.write(photos / "images" / f"p{i}.png", f"images/p{i}.png")
        offset = file.getinfo("images/p2.png").header_offset
    data = bytearray(archive.read_bytes())
    data[offset + 200] ^= 0xFF
    archive.write_bytes(data)
    assert len(cache_setting.build(train_data=archive).train.samples) == 7 and cache_setting.counts == [
        (7, 0, 1),
        (4, 0, 0),
    ]
    assert len(cache_setting.build(train_data=archive).train.samples) == 7 and cache_setting.counts == []


def test_a_store_cut_off_while_copying_is_refused_and_not_read(cache_setting: CacheSetting) -> None:
    cache_setting.build()
    path = Path(cache_setting.argv["cache_dir"]) / "train_tokens" / "data.mdb"
    for cached in (cache_setting.last.train, cache_setting.last.val):
        for store in cached.stores.values():
            store.close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train_tokens is cut off: \d+ of \d+ bytes are there"):
        cache_setting.build()


def test_no_usable_picture_says_how_many_were_seen_and_why(cache_setting: CacheSetting, photos: Path) -> None:
    for i in range(8):
        (photos / "images" / f"p{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"No usable images in .*train.csv: 8 seen, 8 "):
        cache_setting.build()


def test_rows_without_files_are_counted_before_anything_is_written(cache_setting: CacheSetting, photos: Path) -> None:
    (photos / "images" / "p2.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 8 rows of .*train.csv name files that are not there \(first: .*p2.png\)"
    ):
        cache_setting.build()
    assert not list(Path(cache_setting.argv["cache_dir"]).rglob("data.mdb"))


def test_a_class_without_a_name_is_refused(cache_setting: CacheSetting, photos: Path) -> None:
    (photos / "names.json").write_text('{"0": "cat"}')
    with pytest.raises(UserError, match="5"):
        cache_setting.build()


def test_a_disk_too_small_is_found_before_the_first_write(
    cache_setting: CacheSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.files.free_bytes", lambda path: 1000)
    with pytest.raises(
        UserError, match=r"Building train_latents and train_tokens needs .* \(\d+ bytes\) in .* \(1000 bytes\)"
    ):
        cache_setting.build()
    assert not list(Path(cache_setting.argv["cache_dir"]).rglob("data.mdb"))


@pytest.mark.bits
def test_prompts_are_encoded_again_when_names_change(cache_setting: CacheSetting, photos: Path) -> None:
    first = cache_setting.build().text
    assert first.prompts == ["a photo of a cat", "a photo of a dog", ""] and first.embeddings.shape == (3, 77, 64)
    assert first.rows == {0: 0, 5: 1} and first.empty_row == 2
    (photos / "names.json").write_text(json.dumps({"0": "cat", "5": "wolf " * 80}))
    cache_setting.build()
    assert any(line.startswith("text: 1 prompt is longer than 77 tokens and cut off") for line in cache_setting.said)
    (photos / "names.json").write_text('{"0": "cat", "5": "wolf"}')
    second = cache_setting.build().text
    assert torch.equal(first.embeddings[0], second.embeddings[0])
    assert not torch.equal(first.embeddings[1], second.embeddings[1])


def test_a_plain_pt_file_of_embeddings_is_read_and_a_pickle_of_more_is_not(
    cache_setting: CacheSetting, tmp_path: Path
) -> None:
    torch.save(torch.randn(7, 77, 64), tmp_path / "clip.pt")
    text = cache_setting.build(text_embeddings=tmp_path / "clip.pt").text
    assert text.rows[5] == 5 and text.empty_row == 6

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"embeddings": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="is a pickle that holds more than tensors"):
        cache_setting.build(text_embeddings=tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_verify_passes_what_was_built_and_finds_what_was_changed(cache_setting: CacheSetting) -> None:
    caches = cache_setting.build()
    preparation, options = cache_setting.preparation()
    said: list[str] = []
    pictures = open_pictures(options.classes)
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


def test_the_chosen_subset_does_not_depend_on_what_else_there_is() -> None:
    samples = [Sample(f"n{i}", "", 0) for i in range(100)]
    few = choose_samples(samples, 20)
    assert len(few) == 20 and [s for s in samples if s in few] == few
    more = choose_samples(samples, 40)
    assert set(few) < set(more)
    assert choose_samples(samples[:50], 20) != samples[:20] and choose_samples(samples, None) == samples
