"""Latents that a base draws from prompts: what their seeds give, whole after a kill, and refused where they mislead."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_cache
from library.data.batches import Prefetcher
from library.data.cached_samples import CachedSamples, requests_in_order
from library.data.store import TensorStore
from library.data.store_writer import StoreWriter
from library.data.teacher_latents import Drawn, Spread, open_teacher_latents
from library.errors import UserError
from library.inference.drawing_model import load_model
from library.inference.picture_request import PictureRequest
from library.inference.sampler_noise import initial_noise
from library.inference.text_to_image import TextToImage
from library.models.conditioning import TextConditioner
from library.models.locate import locate_base
from library.training.teacher_latents import Teacher, draw_latents
from tests.tools.adapters import write_lora
from tests.tools.teacher import BASE, PROMPTS, TeacherSetting, draw, words


def values(path: Path) -> dict[str, bytes]:
    store = TensorStore(path, "latents")
    found = {name: store.read(name).tobytes() for name in store.sample_ids()}
    store.close()
    return found


def test_a_store_knows_prompts_seeds_teacher_and_spread(drawn_latents: Path) -> None:
    latents = open_teacher_latents(drawn_latents)
    assert list(latents.drawn.values()) == [
        Drawn("a red square", "", 1), Drawn("a red square", "", 2), Drawn("a blue circle", "red", 3),
        Drawn("a blue circle", "red", 4), Drawn("a green triangle", "", 7), Drawn("a green triangle", "", 8),
    ]  # fmt: skip
    made = latents.producer
    assert (made["sampler"], made["steps"], made["cfg_scale"], made["scaled"]) == ("Euler", 3, 1.5, True)
    assert made["family"] == "sd15" and len(made["weights"]["unet"]) == 64 and latents.store.meta.shape == (4, 8, 8)
    every = np.stack([latents.store.read(name) for name in latents.drawn]).astype(np.float64)
    assert made["statistics"]["std"] == pytest.approx(every.std(axis=(0, 2, 3)).tolist(), abs=1e-4)
    latents.close()


def test_what_is_stored_is_what_seed_and_prompt_give(
    drawn_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_cache.main(words(drawn_latents, drawn_latents.parent / "prompts.txt", "--verify")) == 0
    said = capsys.readouterr().out
    assert "6 of 6 latents present" in said and "6 drawn again: least cosine 1.0" in said


@pytest.mark.bits
def test_a_killed_drawing_goes_on_and_leaves_the_same_bytes(
    drawn_latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = iter(range(100)), Teacher.draw

    def killed(self: Teacher, drawn: list[Drawn]) -> np.ndarray:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(self, drawn)

    with monkeypatch.context() as patched:
        patched.setattr(Teacher, "draw", killed)
        assert draw(tmp_path / "store") == 75
    assert 0 < len(values(tmp_path / "store")) < 6
    with pytest.raises(UserError, match="is not complete"):
        open_teacher_latents(tmp_path / "store")
    assert draw(tmp_path / "store") == 0
    assert values(tmp_path / "store") == values(drawn_latents)


def test_prompts_that_came_or_went_are_drawn_or_taken_out_and_the_rest_stays(
    drawn_latents: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(drawn_latents, store)
    before = values(store)
    assert draw(store, "a red square\na yellow ring\n") == 0
    after = values(store)
    assert len(after) == 4 and [name for name in after if after[name] == before[name]] == ["000000000", "000000001"]
    assert open_teacher_latents(store).drawn["000000002"].prompt == "a yellow ring"


def test_another_way_to_draw_does_not_replace_a_store(drawn_latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = values(drawn_latents)
    assert draw(drawn_latents, PROMPTS, "--teacher_steps", "4") == 2
    assert "was drawn differently: steps 3 there, 4 here" in capsys.readouterr().err
    assert values(drawn_latents) == before


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (5.49, "not multiplied with the autoencoder's scaling factor"),
        (0.18215, "multiplied with .* scaling factor twice"),
    ],
)
def test_wrongly_scaled_latents_stop_drawing_and_training(
    scale: float, said: str, drawn_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, teacher_setting: TeacherSetting,
) -> None:  # fmt: skip
    original = Teacher.draw
    monkeypatch.setattr(
        Teacher, "draw", lambda self, drawn: (original(self, drawn) * np.float32(scale)).astype(np.float16)
    )
    assert draw(tmp_path / "store") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(rf"The latents that {BASE} draws have a standard deviation of .*{said}", error), error
    before, store = values(drawn_latents), tmp_path / "wrong"
    shutil.copytree(drawn_latents, store)
    writer = StoreWriter(store, "latents", expected_bytes=0)
    for name, data in before.items():
        writer.put_raw(
            writer.key(name), (np.frombuffer(data, np.float16) * np.float32(scale)).astype(np.float16).tobytes()
        )
    writer.commit()
    writer.close()
    assert teacher_setting.train(tmp_path / "out", teacher_latents=store, flow_model="") == 2
    assert re.search(said, capsys.readouterr().err)


def test_several_threads_read_latents_prompts_and_the_noise_of_their_seeds(
    drawn_latents: Path, teacher_setting: TeacherSetting
) -> None:
    built = teacher_setting.build(flow_model="", flow_target="reflow")
    samples, seen = built.task.training, 0
    assert isinstance(samples, CachedSamples)
    drawn = built.prepared.data.drawn
    assert drawn is not None
    for batch in Prefetcher(samples, requests_in_order(samples), torch.device("cpu"), workers=2):
        for row, name in enumerate(samples.ids_of(batch)):
            assert batch.captions[row] == drawn[name].prompt
            assert torch.equal(batch.noise[row], initial_noise(drawn[name].seed, (4, 8, 8))[0])
            assert batch.latents[row].numpy().tobytes() == values(drawn_latents)[name]
            seen += 1
    assert seen == 6
    built.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--teacher_steps", "5"), "teacher_steps has no effect without teacher_latents"),
        (("--teacher_latents", "STORE"), "teacher_prompts is missing"),
        (("--teacher_latents", "STORE", "--teacher_prompts", "no.txt"), "no.txt does not exist"),
        (("--teacher_latents", "STORE", "--teacher_prompts", "P", "--teacher_cfg", "0.5"), "teacher_cfg must be at least 1"),
        (("--teacher_latents", "STORE", "--teacher_prompts", "P", "--teacher_sampler", "Eular"), "Eular"),
        (("--teacher_latents", "STORE", "--teacher_prompts", "P", "--teacher_size", "100"), "must be multiples of 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_sentence(
    given: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a red square\n")
    names = {"STORE": str(tmp_path / "store"), "P": str(tmp_path / "p.txt")}
    assert prepare_cache.main([names.get(word, word) for word in given]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_a_prompt_with_settings_of_its_own_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tmp_path / "store", "a red square --s 5 --d 1\n") == 2
    assert "The prompt 'a red square' of" in (said := capsys.readouterr().err) and "sets sample_steps" in said


def test_entries_are_noted_as_json(drawn_latents: Path) -> None:
    store = TensorStore(drawn_latents, "latents")
    note = json.loads(bytes(store.get_raw(b"000000002#drawn")))
    assert note == {"prompt": "a blue circle", "negative_prompt": "red", "seed": 3}
    store.close()


@pytest.mark.bits
def test_the_gain_of_the_teacher_itself_is_one_and_of_weaker_latents_less(
    drawn_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.flow_latent_gain import gain, main

    words = [str(drawn_latents), "--model", BASE, "--count", "3", "--output", str(tmp_path / "gain.json")]
    assert main(words) == 0
    assert "--latent_multiplier 1.000 makes up for" in capsys.readouterr().out
    found = json.loads((tmp_path / "gain.json").read_text())
    assert found["gain_by_channel"] == pytest.approx([1.0] * 4, abs=2e-3) and found["latents"] == 3
    write_lora(locate_base(BASE).path, tmp_path / "strong.safetensors")
    assert main([*words, "--lora", str(tmp_path / "strong.safetensors")]) == 0
    assert json.loads((tmp_path / "gain.json").read_text())["k"] != pytest.approx(found["k"], abs=1e-4), (
        "the adapter counts"
    )
    teacher, student = Spread(2), Spread(2)
    latents = np.random.default_rng(0).normal(size=(4, 2, 8, 8))
    teacher.add(latents)
    student.add(latents * [[[[2.0]], [[2.0]]]])
    assert gain(teacher, student)["gain"] == pytest.approx(0.5) and gain(teacher, student)["shift"] == pytest.approx(
        0.5
    )
    assert main([*words, "--count", "0"]) == 2


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("family", ["tiny_sd15", "tiny_sdxl"])
def test_a_plain_prompt_gives_the_latents_that_generate_draws(
    family: str, negative: str, request: pytest.FixtureRequest
) -> None:
    """Each in a batch with another prompt, and of SDXL with zeros for no negative prompt."""
    base = locate_base(str(request.getfixturevalue(family)))
    model = load_model(base, dtype=torch.float32, device="cpu")
    settings = PictureRequest("", "", steps=2, cfg_scale=3.0, width=64, height=64, sampler="Euler")
    drawn = [Drawn("a cat", negative, 3), Drawn("a red square", "", 4)]
    found = draw_latents(model, settings, TextConditioner(model.family, model.parts), drawn)
    for one, latents in zip(drawn, found, strict=True):
        asked = replace(settings, prompt=one.prompt, negative_prompt=one.negative_prompt)
        with torch.no_grad():
            alone = TextToImage(model, asked, [one.seed], {}, None).latents()[0]
        assert torch.allclose(latents, alone, atol=5e-3), "of deviation 6: kernels round batches otherwise"
