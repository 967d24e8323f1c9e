"""The parameters text of a picture, read back by A1111's own rules, and the PNG around it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from library.errors import RunFailed
from library.inference.infotext import (
    Infotext,
    lora_hash,
    model_hash,
    model_title,
    parameters,
    save_png,
)
from tests.tools.infotext import read_parameters, read_png

FULL = Infotext(
    prompt="a photo of (a cat:1.2), <lora:mio:0.8>\nBREAK 100% sharp",
    negative_prompt="blurry, [bad]\nlow quality",
    steps=20,
    sampler="DPM++ 2M",
    schedule="Karras",
    cfg_scale=7.0,
    seed=2**53 + 1,
    size=(512, 768),
    model_hash="6ce0161689",
    model="v1-5-pruned",
    vae="vae-ft-mse-840000-ema-pruned.safetensors",
    denoising_strength=0.45,
    clip_skip=2,
    rng="CPU",
    hires_upscale=1.5,
    hires_steps=10,
    hires_upscaler="Latent (nearest-exact)",
    refiner="sd_xl_refiner_1.0 [7440042bbd]",
    refiner_switch_at=0.8,
    lora_hashes={"mio": "0123456789ab", "style": "ba9876543210"},
    version="v1.10.1",
)
FULL_TEXT = """\
a photo of (a cat:1.2), <lora:mio:0.8>
BREAK 100% sharp
Negative prompt: blurry, [bad]
low quality
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 9007199254740993, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned, VAE: vae-ft-mse-840000-ema-pruned.safetensors, Denoising strength: 0.45, \
Clip skip: 2, RNG: CPU, Hires upscale: 1.5, Hires steps: 10, Hires upscaler: Latent (nearest-exact), \
Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.8, \
Lora hashes: "mio: 0123456789ab, style: ba9876543210", Version: v1.10.1"""


def test_the_text_is_that_of_a1111_and_reads_back() -> None:
    assert parameters(FULL) == FULL_TEXT
    assert read_parameters(FULL_TEXT) == FULL


def test_what_is_not_said_is_not_written() -> None:
    assert parameters(Infotext("a", steps=1)) == "a\nSteps: 1"
    assert parameters(Infotext(negative_prompt="b", steps=1)) == "Negative prompt: b\nSteps: 1"
    assert parameters(Infotext(steps=1, refiner_switch_at=0.0)) == "Steps: 1, Refiner switch at: 0", "zero is a value"
    assert parameters(Infotext("a\nb")) == "a\nb" and parameters(Infotext()) == ""


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain words", "plain words"),
        ("a, b", '"a, b"'),
        ("C: x", '"C: x"'),
        ("two\nlines", '"two\\nlines"'),
        ('say "x"', '"say \\"x\\""'),
        ("back\\slash", "back\\slash"),
        ("кот", "кот"),
        (" padded ", '" padded "'),
        ("", '""'),
    ],
)
def test_values_are_quoted_where_they_have_to_be(value: str, written: str) -> None:
    text = parameters(Infotext(steps=1, other={"Note": value}))
    assert text == f"Steps: 1, Note: {written}"


@pytest.mark.parametrize("name", ["", " a", "a:b", "a,b", "a\nb"])
def test_a_name_that_could_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a name"):
        parameters(Infotext(steps=1, other={name: "x"}))


# What A1111 can read: it strips lines, wants two characters in a name, and takes "" for two quotes.
_texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r")) | st.text(
    'ab ,:"\\\n(){}[]<>é猫', max_size=40
)
_words = _texts.filter(bool)
_prompts = _texts.map(lambda text: "\n".join(map(str.strip, text.split("\n"))).strip()).filter(
    lambda text: "Negative prompt:" not in text
)
_numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
_whole = st.integers(-1, 2**64)
_hash_names = _words.map(lambda text: "".join(text.replace(":", "").replace(",", "").split())).filter(bool)


@given(
    st.builds(
        Infotext,
        prompt=_prompts,
        negative_prompt=_prompts,
        steps=_whole,
        sampler=_words,
        schedule=st.none() | _words,
        cfg_scale=_numbers,
        seed=_whole,
        size=st.none() | st.tuples(st.integers(0, 99999), st.integers(0, 99999)),
        model=st.none() | _words,
        denoising_strength=_numbers,
        lora_hashes=st.dictionaries(_hash_names, st.text("0123456789abcdef", min_size=1), max_size=3),
        other=st.dictionaries(
            st.text("abcXYZ -/0é", min_size=2).filter(lambda name: name == name.strip(" -/") and len(name) > 1),
            _words,
            max_size=4,
        ),
    )
)
@settings(max_examples=300)
def test_a1111_reads_any_settings_as_they_were(info: Infotext) -> None:
    # A name that is its own value is written as a word alone, which A1111 does not read.
    other = {name: value for name, value in info.other.items() if name != value}
    assert read_parameters(parameters(replace(info, other=other))) == replace(info, other=other)


def test_names_of_loras_lose_what_would_break_their_list() -> None:
    text = parameters(Infotext(steps=1, lora_hashes={"a:b,c": "00"}))
    assert text == 'Steps: 1, Lora hashes: "abc: 00"'


@pytest.mark.parametrize(("prompt", "chunk"), [("café", b"tEXt"), ("猫\nnéko, Łódź", b"iTXt")])
def test_a_png_carries_its_parameters(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    info, path = replace(FULL, prompt=prompt), tmp_path / "new" / "a.png"
    picture = Image.linear_gradient("L").convert("RGB")
    save_png(picture, path, info)
    assert read_png(path) == info
    assert chunk + b"parameters\0" in path.read_bytes()
    assert Image.open(path).tobytes() == picture.tobytes(), "and nothing changes in the picture"


def test_a_prompt_of_broken_bytes_is_still_saved(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", Infotext("caf\udce9"))
    assert read_png(tmp_path / "a.png").prompt == "caf�"


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 8)), path, Infotext("old"))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(RunFailed, match="No space left"):
        save_png(Image.new("RGB", (8, 8)), path, Infotext("new", steps=1))
    assert read_png(path).prompt == "old" and list(tmp_path.iterdir()) == [path]


def test_hashes_are_those_a1111_shows(tmp_path: Path) -> None:
    tensors, path = {"a": torch.arange(4.0)}, tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"ss_tag": "x"})
    assert (
        model_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:10] == model_hash(path, tmp_path / "h.json")
    )
    assert model_hash(tmp_path) is None, "a diffusers folder"
    assert model_title("refiner", model_hash(path)) == f"refiner [{model_hash(path)}]" and model_title("b", None) == "b"
    before = lora_hash(path)
    save_file(tensors, path, metadata={"ss_tag": "another"})
    assert lora_hash(path) == before == hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()[:12]
    (tmp_path / "a.pt").write_bytes(b"\xff" * 20)
    assert lora_hash(tmp_path / "a.pt") == hashlib.sha256(b"\xff" * 20).hexdigest()[:12]
