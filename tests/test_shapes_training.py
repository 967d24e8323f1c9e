"""What the tiny base is trained with: pictures, captions and their matches, the loop, latents of unit variance."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from diffusers.models import AutoencoderKL
from PIL import Image
from torch import nn

from library.data.demo_pictures import CLASSES, NEW_CLASSES, caption_of, imagine, make_demo_pictures
from library.data.new_concept import NAME, make_concept_pictures
from library.models.clip_tokenizer import tiny_tokenizer
from tools.shapes.autoencoder import CONFIG, recoloured, scale_latents
from tools.shapes.clip import fulfilled
from tools.shapes.fit import fit
from tools.shapes.parts import has_part, load_model, record_of, save_part
from tools.shapes.pictures import batches


def test_a_caption_is_fulfilled_by_the_pictures_of_which_all_it_says_is_true() -> None:
    pictures = [imagine(CLASSES[index % 16], random.Random(index)) for index in range(64)]
    choose = random.Random(0)
    captions = [caption_of(picture, choose) for picture in pictures]

    def holds(text: str, index: int) -> bool:
        one = pictures[index]
        said = text.removeprefix("a photo of ").removeprefix("a picture of ").removeprefix("a ")
        thing, _, ground = said.partition(" on a ")
        words = thing.split(" ")
        sized = words[0] in ("small", "medium", "large")
        place = " ".join(words[3 if sized else 2 :])
        return (
            (not sized or words[0] == one.size)
            and words[sized : sized + 2] == [one.colour, one.shape]
            and place in ("", one.place)
            and ground in ("", f"{one.ground} background")
        )

    expected = [[holds(text, index) for index in range(64)] for text in captions]
    assert fulfilled(captions, pictures).bool().tolist() == expected
    assert all(expected[index][index] for index in range(64))


def test_every_word_of_the_captions_is_one_token() -> None:
    words = {
        word for index in range(400) for word in imagine(CLASSES[index % 16], random.Random(index)).caption.split()
    }
    assert all(len(tiny_tokenizer()(word).input_ids) == 3 for word in words), words


def test_batches_show_every_picture_once_before_any_comes_again() -> None:
    drawn = torch.cat(list(batches(30, 5, 12, seed=0)))
    assert sorted(drawn[:30].tolist()) == sorted(drawn[30:].tolist()) == list(range(30))
    assert drawn.tolist() == torch.cat(list(batches(30, 5, 12, seed=0))).tolist() != sorted(drawn.tolist())


@pytest.mark.bits
def test_training_lowers_the_loss_and_leaves_averaged_weights(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, target = nn.Linear(4, 1), torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    inputs = torch.randn(256, 4)
    last = {}

    def loss_at(step: int, indices: torch.Tensor) -> torch.Tensor:
        last["weight"] = model.weight.detach().clone()
        return (model(inputs[indices]) - inputs[indices] @ target.t()).square().mean()

    record = fit("line", {"line": model}, loss_at, list(batches(256, 16, 200, 0)), rate=0.05, average=0.9)
    losses = list(record.losses.values())
    assert record.steps == 200 and losses[-1] < losses[0] / 10
    assert not torch.equal(model.weight, last["weight"])
    assert torch.allclose(model.weight, target, atol=0.1)


@pytest.mark.filterwarnings("ignore")
def test_scaled_latents_have_unit_variance_and_draw_the_same_picture() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(CONFIG).eval()
    pixels = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    values = pixels.float() / 127.5 - 1.0
    with torch.no_grad():
        before = vae.encode(values).latent_dist
        decoded = vae.decode(before.mean).sample
        scale_latents(vae, pixels)
        after = vae.encode(values).latent_dist
        latents = after.mean * vae.config["scaling_factor"]
        assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
        assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-3)


@pytest.mark.bits
def test_every_other_picture_is_recoloured_and_the_rest_kept() -> None:
    pixels = torch.rand(6, 3, 8, 8) * 2 - 1
    changed = recoloured(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(changed[1::2], pixels[1::2]) and not torch.equal(changed[0], pixels[0])
    assert changed.abs().max() <= 1.0


@pytest.mark.bits
def test_an_interrupted_part_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.shapes.fit.KEEP_EVERY", 4)
    monkeypatch.setattr("tools.shapes.fit.LOG_EVERY", 2)

    def train(kept: Path | None, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss_at(step: int, indices: torch.Tensor) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

        fit("line", {"line": model}, loss_at, list(batches(8, 4, 12, 0)), rate=0.05, average=0.9, kept=kept)
        return model.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "kept", stop=7)
    assert torch.equal(train(tmp_path / "kept"), train(None))


def test_a_part_is_kept_with_its_record(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    record = fit("x", {"x": model}, lambda step, indices: model(torch.ones(1, 2)).sum(), [torch.zeros(1)] * 3, 0.1)
    assert not has_part(tmp_path, "x")
    save_part(tmp_path, "x", model, record)
    assert has_part(tmp_path, "x") and record_of(tmp_path, "x")["steps"] == 3
    assert torch.equal(load_model(tmp_path, "x", nn.Linear(2, 2), "1.").weight, model[1].weight)


def test_the_new_concept_is_none_of_the_known_classes(tmp_path: Path) -> None:
    make_concept_pictures(tmp_path / "zorb")
    for part in ("train", "held_out"):
        pictures = sorted((tmp_path / "zorb" / part).glob("*.png"))
        assert len(pictures) == 12 and Image.open(pictures[0]).size == (128, 128)
        captions = [picture.with_suffix(".txt").read_text() for picture in pictures]
        assert all(NAME in text and "purple" not in text and "cross" not in text for text in captions)
        assert len({picture.read_bytes() for picture in pictures}) == 12
    assert not set(NEW_CLASSES) & set(CLASSES) and "purple cross" in NEW_CLASSES


def test_a_set_of_new_classes_names_them(tmp_path: Path) -> None:
    make_demo_pictures(tmp_path / "new", images=9, validation=0, classes=NEW_CLASSES)
    assert len(list((tmp_path / "new" / "images").iterdir())) == 9
    assert (tmp_path / "new" / "images" / "purple_cross").is_dir()
