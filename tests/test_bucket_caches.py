"""Latents of bucketed pictures: built, continued, kept beside those of other settings, taken from kohya's files."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.caching.by_bucket import BucketCaches, BucketedPicture
from library.caching.latents import prepare_latents
from library.caching.masks import alpha_channel, latent_mask
from library.caching.prompt_cache import PromptCache, prompt_folder, prompt_key
from library.data.buckets import Buckets, Fitted, resize_and_crop
from library.data.image_headers import read_header
from library.data.pixels import UnreadableImage, decode_rgb
from library.errors import UserError
from library.models.encoders import LOG_VARIANCE_FLOOR, MomentsEncoder
from library.models.load import load_vae
from library.models.locate import BaseLocation
from library.processes import Processes
from networks.families import SD15, SDXL
from tests.tools.warm import Run

SIZES = [(64, 64), (70, 66), (96, 64), (100, 66), (64, 96), (200, 130)]
BUCKETS = Buckets((64, 64), min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
SHRINKING = Buckets((64, 64), bucket_no_upscale=True, bucket_reso_steps=16)


def draw(path: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


class LatentSetting:
    """A folder of pictures and the arguments of `prepare_latents`, which tests change one by one."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.images, self.cache_dir = folder / "images", folder / "caches"
        self.said: list[str] = []
        self.last: BucketCaches | None = None
        self.arguments: dict[str, Any] = {
            "base": BaseLocation("tiny", base), "family": SD15, "fit_facts": {"bucket_no_upscale": False},
            "precision": "no", "cache_dir": self.cache_dir, "batch_size": 8, "workers": 0,
        }  # fmt: skip
        if not self.images.exists():
            self.images.mkdir(parents=True)
            for i, size in enumerate(SIZES):
                draw(self.images / f"p{i}.png", size, i)

    def picture(self, path: Path, buckets: Buckets = BUCKETS, flip: bool = False) -> BucketedPicture:
        fitted = buckets.fit(*read_header(path).size)
        return BucketedPicture(f"{buckets.resolution[0]}:{path.name}", path, fitted, None, flip)

    def pictures(self, buckets: Buckets = BUCKETS, flip: bool = False) -> list[BucketedPicture]:
        return [self.picture(path, buckets, flip) for path in sorted(self.images.glob("*.png"))]

    def build(self, pictures: list[BucketedPicture] | None = None, **changes: Any) -> BucketCaches:
        self.said.clear()
        if self.last is not None:
            self.last.close()
        pictures = self.pictures() if pictures is None else pictures
        self.last = prepare_latents(
            pictures, processes=Processes("cpu"), say=self.said.append, **{**self.arguments, **changes}
        )
        return self.last

    def tells(self, words: str) -> bool:
        return any(words in line for line in self.said)

    @property
    def built(self) -> bool:
        return self.tells(" encoded, ")


@pytest.fixture
def setting(tmp_path: Path, tiny_sd15: Path) -> LatentSetting:
    return LatentSetting(tmp_path, tiny_sd15)


def cut_pixels(picture: BucketedPicture) -> np.ndarray:
    return resize_and_crop(decode_rgb(picture.path, name=""), picture.fitted)


def fresh(base: Path, pixels: list[np.ndarray]) -> np.ndarray:
    batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    return MomentsEncoder(load_vae(str(base))).encode(batch).numpy()


def read(caches: BucketCaches, picture: BucketedPicture, *, flipped: bool = False) -> np.ndarray:
    return (caches.flipped if flipped else caches.stores)[picture.fitted.bucket].read(picture.sample_id)


@pytest.mark.bits
def test_every_entry_equals_a_fresh_encoding_of_its_crop_and_of_its_mirror_image(
    setting: LatentSetting, tiny_sd15: Path
) -> None:
    pictures = setting.pictures(flip=True)
    caches = setting.build(pictures)
    assert set(caches.stores) == set(caches.flipped) == {(64, 64), (80, 48), (48, 80)}
    assert setting.tells("latents: 6 encoded, 0 unchanged, 0 unreadable")
    for bucket, store in caches.stores.items():
        assert store.meta.shape == (8, bucket[1] // 8, bucket[0] // 8) and store.meta.complete
        members = [one for one in pictures if one.fitted.bucket == bucket]
        # The same batches as in the build.
        pixels = [cut_pixels(one) for one in members]
        straight = fresh(tiny_sd15, pixels)
        mirrored = fresh(tiny_sd15, [np.ascontiguousarray(part[:, ::-1]) for part in pixels])
        for row, one in enumerate(members):
            assert np.array_equal(read(caches, one), straight[row])
            assert np.array_equal(read(caches, one, flipped=True), mirrored[row])
    setting.build(pictures)
    assert not setting.built and not setting.tells("missing")


def test_an_edited_picture_is_encoded_again_and_said_and_a_touched_one_is_not(setting: LatentSetting) -> None:
    first = setting.pictures()[0]
    old = read(setting.build(), first)
    draw(first.path, SIZES[0], 99)
    os.utime(setting.images / "p2.png", ns=(1, 1))
    caches = setting.build()
    assert setting.tells("1 encoded, 1 unchanged, 0 unreadable")
    assert setting.tells("1 picture changed since being cached, read again (first: 64:p0.png)")
    assert not np.array_equal(read(caches, first), old)
    setting.build()
    assert not setting.built


def test_one_picture_at_two_resolutions_has_two_entries(
    setting: LatentSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.caching.pipeline.MOST_OPEN", 1)
    larger = Buckets((128, 128), min_bucket_reso=32, max_bucket_reso=256, bucket_reso_steps=16)
    pictures = [*setting.pictures(), *setting.pictures(larger)]
    caches = setting.build(pictures)
    assert {(64, 64), (128, 128)} <= set(caches.stores)
    assert all(
        read(caches, one).shape[1:] == (one.fitted.bucket[1] // 8, one.fitted.bucket[0] // 8) for one in pictures
    )


def test_other_bucket_settings_make_anew_only_what_they_cut_differently(setting: LatentSetting) -> None:
    buckets = {one.sample_id: one.fitted.bucket for one in setting.pictures()}
    setting.build()
    pictures = setting.pictures(SHRINKING)
    elsewhere = [one for one in pictures if one.fitted.bucket != buckets[one.sample_id]]
    assert elsewhere == pictures[1:]
    facts = {"bucket_no_upscale": True}
    setting.build(pictures, fit_facts=facts)
    assert setting.tells("1 of 6 present, 5 missing") and setting.tells("5 encoded")
    pictures[5] = replace(pictures[5], fitted=pictures[5].fitted.cropped_at(0, 0))
    setting.build(pictures, fit_facts=facts | {"random_crop": True})
    assert setting.tells("cut differently or imported (random_crop None there, True here)")
    assert setting.tells("5 of 6 present, 1 outdated") and setting.tells("1 encoded")
    # What the first settings asked for is still there.
    setting.build()
    assert not setting.built


def test_caches_of_another_precision_or_vae_stay_beside_each_other(
    setting: LatentSetting, tiny_sd15: Path, tmp_path: Path
) -> None:
    setting.build()
    setting.build(precision="bf16")
    assert setting.tells("6 encoded") and setting.tells("has those of another VAE or precision, which stay: latents_")
    other = tmp_path / "other"
    shutil.copytree(tiny_sd15, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.9 for name, tensor in load_file(weights).items()}, weights)
    setting.build(vae=BaseLocation("other", other))
    assert setting.tells("6 encoded")
    for changes in ({}, {"precision": "bf16"}, {"vae": BaseLocation("other", other)}):
        setting.build(**changes)
        assert not setting.built


def test_the_vae_of_sdxl_never_runs_in_fp16(tmp_path: Path, tiny_sdxl: Path) -> None:
    setting = LatentSetting(tmp_path, tiny_sdxl)
    caches = setting.build(family=SDXL, precision="fp16")
    assert setting.tells("the VAE of SDXL overflows in fp16, so it runs in float32")
    assert caches.stores[64, 64].meta.producer["precision"] == "no"


def test_unreadable_pictures_are_listed_once_and_left_out(setting: LatentSetting) -> None:
    pictures = setting.pictures(flip=True)
    pictures[0].path.write_bytes(b"no picture")
    (setting.images / "p1.png").unlink()
    caches = setting.build(pictures)
    assert set(caches.dropped) == {"64:p0.png", "64:p1.png"} and setting.tells("4 encoded, 0 unchanged, 2 unreadable")
    assert (64, 64) not in caches.stores
    listed = (setting.cache_dir / "latents_unreadable.tsv").read_text()
    assert "64:p0.png" in listed and "not a PNG" in listed and "No such file" in listed
    draw(pictures[0].path, (80, 64), 0)
    assert "80 x 64 pixels, not the 64 x 64 of its header" in setting.build(pictures).dropped["64:p0.png"]
    with pytest.raises(UserError, match="No usable images in the training images: 2 seen, 1 .*, 1 "):
        setting.build(pictures[:2])


def kohya_file(picture: BucketedPicture, draws: dict[str, np.ndarray], *, legacy: bool = False) -> Path:
    width, height = picture.fitted.original
    name = f"{picture.path.stem}.npz" if legacy else f"{picture.path.stem}_{width:04d}x{height:04d}_sd.npz"
    np.savez(picture.path.with_name(name), original_size=np.array([width, height]), crop_ltrb=np.zeros(4), **draws)
    return picture.path.with_name(name)


def draw_of(picture: BucketedPicture, seed: int = 0) -> np.ndarray:
    width, height = picture.fitted.bucket
    return np.random.default_rng(seed).normal(size=(4, height // 8, width // 8)).astype(np.float32)


def test_kohyas_latents_are_taken_for_means_until_they_are_not_wanted(setting: LatentSetting) -> None:
    pictures = setting.pictures(flip=True)
    small, wide, tall = pictures[0], pictures[2], pictures[4]
    kohya_file(small, {"latents": draw_of(small), "latents_flipped": draw_of(small, 1)}, legacy=True)
    kohya_file(
        wide, {"latents_6x10": draw_of(wide), "latents": draw_of(small), "latents_flipped_6x10": draw_of(wide, 1)}
    )
    kohya_file(tall, {"latents": draw_of(tall)})
    caches = setting.build(pictures, kohya_caches=True, workers=1)
    assert setting.tells("4 encoded") and setting.tells("2 taken from kohya's .npz caches; 1 without flipped latents")
    for one in (small, wide):
        for flipped in (False, True):
            found = read(caches, one, flipped=flipped)
            assert np.array_equal(found[:4], draw_of(one, int(flipped)).astype(np.float16))
            assert (found[4:] == LOG_VARIANCE_FLOOR).all()
    os.utime(small.path, ns=(1, 1))  # still the same picture
    setting.build(pictures, kohya_caches=True)
    assert setting.tells("0 encoded, 1 unchanged")
    setting.build(pictures)
    assert setting.tells("cut differently or imported") and setting.tells("2 encoded")


@pytest.mark.parametrize(
    ("contents", "after", "reason"),
    [
        ({"latents": np.zeros((4, 8, 10), np.float32)}, None, "of another shape than the bucket"),
        ({"latents": np.zeros((4, 900, 900), np.float32)}, None, "of another shape than the bucket"),
        ({"latents": np.zeros((4, 8, 8), np.int64)}, None, "of another shape than the bucket"),
        ({"latents": np.full((4, 8, 8), np.nan)}, None, "not finite"),
        ({"latents": np.array([{}] * 256)}, None, "damaged, or of a kind that is not read"),
        ({"else": np.zeros(3)}, None, "without latents of this bucket"),
        ({"latents": np.zeros((4, 8, 8))}, lambda path: os.utime(path, ns=(1, 1)), "older than the image"),
        ({"latents": np.zeros((4, 8, 8))}, lambda path: path.write_bytes(b"PK"), "damaged, or of a kind"),
    ],
)
def test_kohyas_latents_that_do_not_fit_are_counted_and_encoded(
    setting: LatentSetting, contents: dict[str, np.ndarray], after: Callable[[Path], Any] | None, reason: str
) -> None:
    one = setting.pictures()[0]
    path = kohya_file(one, contents)
    if after is not None:
        after(path)
    setting.build([one], kohya_caches=True)
    assert setting.tells("1 encoded") and setting.tells(f"0 taken from kohya's .npz caches; 1 {reason}")


def test_kohyas_latents_of_another_image_size_or_crop_are_not_taken(setting: LatentSetting) -> None:
    one = setting.pictures()[5]
    shifted = replace(one, fitted=one.fitted.cropped_at(0, 0))
    assert shifted.fitted != one.fitted
    path = kohya_file(one, {"latents": draw_of(one)})
    setting.build([shifted], kohya_caches=True)
    assert setting.tells("1 of the centre of an image that is cut elsewhere")
    shutil.rmtree(setting.cache_dir)
    np.savez(path, latents=draw_of(one), original_size=np.array([130, 200]))
    setting.build([one], kohya_caches=True)
    assert setting.tells("1 of an image of another size")


CAPTIONS = ["one", "two", "three"]
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import library.data.store_writer as writer
from library.caching import latents
from library.processes import Processes
from tests.test_bucket_caches import LatentSetting
folder, base, batches = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
setting = LatentSetting(folder, base)
if batches:
    writer.COMMIT_BYTES = 1
    encode = latents.MomentsEncoder.encode
    def limited(self, pixels):
        global batches
        batches -= 1
        if batches < 0:
            time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, pixels)
    latents.MomentsEncoder.encode = limited
processes = Processes("cpu")
latents.prepare_latents(setting.pictures(flip=True), processes=processes, say=processes.say,
    **setting.arguments | {{"batch_size": 1}})

from library.caching.prompt_cache import prepare_prompts
from library.models.conditioning import TextConditioner
from library.models.load import load_text_encoders
from networks.families import SD15
prompts = prepare_prompts({captions!r}, conditioner=lambda: TextConditioner(SD15, load_text_encoders(str(base))),
    facts={{}}, cache_dir=folder, processes=processes, say=processes.say)
print("found", processes.rank, float(prompts.read(prompts.rows({captions!r})).states.abs().sum()))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(captions=CAPTIONS))
    return path


def test_sigkill_in_the_middle_keeps_what_was_committed(setting: LatentSetting, script: Path, tiny_sd15: Path) -> None:
    Run(script, [str(setting.images.parent), str(tiny_sd15), "5"]).end(-signal.SIGKILL)
    pictures = setting.pictures(flip=True)
    caches = setting.build(pictures)
    assert setting.tells("4 of 12 present, 8 missing"), setting.said
    whole = LatentSetting(setting.images.parent, tiny_sd15).build(pictures, cache_dir=setting.cache_dir / "whole")
    for one in pictures:
        for flipped in (False, True):
            a, b = (read(part, one, flipped=flipped).astype(np.float32) for part in (caches, whole))
            np.testing.assert_allclose(a, b, atol=2e-2)


def test_two_processes_share_pictures_and_captions(setting: LatentSetting, script: Path, tiny_sd15: Path) -> None:
    folder = setting.images.parent
    output = Run(script, [str(folder), str(tiny_sd15), "0"], processes=2).end()
    assert "latents: 6 encoded" in output, output[-2000:]
    assert list(setting.cache_dir.glob("latents_*/*/shard-001/data.mdb"))
    caches = setting.build(setting.pictures(flip=True))
    assert not setting.built and sum(len(list(store.sample_ids())) for store in caches.stores.values()) == 6
    # Both read what both wrote.
    found = {line.split()[2] for line in output.splitlines() if line.startswith("found")}
    assert len(found) == 1 and list(folder.glob("prompts_*/states/shard-001/data.mdb"))
    prompts = PromptCache(prompt_folder(folder, {}), [*CAPTIONS, ""])
    assert sorted(prompts.states.sample_ids()) == sorted(prompt_key(caption) for caption in prompts.captions)


def test_a_mask_is_the_mean_over_the_pixels_of_each_latent(tmp_path: Path) -> None:
    fitted = Fitted((40, 16), (32, 16), (40, 16), (6, 0, 38, 16))
    values = np.random.default_rng(0).integers(0, 256, (16, 40), dtype=np.uint8)
    expected = values[:, 6:38].reshape(2, 8, 4, 8).mean((1, 3), dtype=np.float64) / 255
    np.testing.assert_allclose(latent_mask(values, fitted, (2, 4)), expected, atol=1e-6)
    np.testing.assert_allclose(latent_mask(values, fitted, (2, 4), flipped=True), expected[:, ::-1], atol=1e-6)
    # A file: its red channel, here at twice the size of the picture.
    red = np.zeros((32, 80, 3), np.uint8)
    red[..., 0] = values.repeat(2, 0).repeat(2, 1)
    Image.fromarray(red).save(tmp_path / "mask.png")
    found = latent_mask(tmp_path / "mask.png", fitted, (2, 4))
    assert found.dtype == np.float32 and found.shape == (2, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_alpha_channel_is_upright_and_opaque_where_there_is_none(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (9, 9, 9, 0))
    image.putpixel((0, 0), (9, 9, 9, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    alpha = alpha_channel(tmp_path / "a.png")
    assert alpha.shape == (4, 2) and alpha[0, 1] == 200 and alpha.sum() == 200
    Image.new("RGB", (4, 2)).save(tmp_path / "b.png")
    assert (alpha_channel(tmp_path / "b.png") == 255).all()


def test_masks_that_do_not_fit_or_cannot_be_read_are_refused(tmp_path: Path) -> None:
    fitted = Fitted((40, 16), (32, 16), (40, 16), (4, 0, 36, 16))
    Image.new("L", (40, 40)).save(tmp_path / "square.png")
    with pytest.raises(UserError, match=r"square.png is 40 x 40, another shape than its image of 40 x 16"):
        latent_mask(tmp_path / "square.png", fitted, (2, 4))
    (tmp_path / "none.png").write_bytes(b"no picture")
    for read_it in (lambda path: latent_mask(path, fitted, (2, 4)), alpha_channel):
        with pytest.raises(UnreadableImage, match="none.png: not an image|none.png: not a PNG"):
            read_it(tmp_path / "none.png")
