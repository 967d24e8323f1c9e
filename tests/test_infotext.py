"""The parameters text of a picture: written as A1111 does, read whoever wrote it, and the PNG around it."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from library.errors import RunFailed, UserError
from library.inference.infotext import (
    Infotext,
    lora_hash,
    model_hash,
    model_title,
    parameters,
    parse_parameters,
    read_png,
    save_png,
)

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
    assert parse_parameters(FULL_TEXT) == FULL
    assert parse_parameters(FULL_TEXT.replace("\n", "\r\n") + "\r\n") == FULL, "as Windows' editors save it"


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
    assert parse_parameters(text).other == {"Note": value}


@pytest.mark.parametrize("name", ["", " a", "a:b", "a,b", "a\nb"])
def test_a_name_that_could_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a name"):
        parameters(Infotext(steps=1, other={name: "x"}))


# No "\r": a line that ends in one is a line of Windows. No surrogates: a file cannot hold them.
_texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r")) | st.text(
    'ab ,:"\\\n(){}[]<>é猫', max_size=40
)
_words = _texts.filter(lambda text: text != "")
_prompts = _texts.filter(
    lambda text: not any(line.lstrip().startswith("Negative prompt:") for line in text.split("\n"))
)
_names = st.text("abcXYZ -/0é", min_size=1).filter(lambda name: name == name.strip())
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_whole = st.integers(-1, 2**64)
_hash_names = _words.map(lambda text: "".join(text.replace(":", "").replace(",", "").split())).filter(bool)
_infos = st.builds(
    Infotext,
    prompt=_prompts,
    negative_prompt=_texts,
    steps=_whole,
    # One that ends in a schedule is split where no schedule is given: tested by itself.
    sampler=st.none() | _words.filter(lambda name: not name.endswith(("Karras", "Exponential"))),
    schedule=st.none() | _words,
    cfg_scale=st.none() | _numbers,
    seed=st.none() | _whole,
    size=st.none() | st.tuples(st.integers(0, 99999), st.integers(0, 99999)),
    model_hash=st.none() | _words,
    model=st.none() | _words,
    vae=st.none() | _words,
    denoising_strength=st.none() | _numbers,
    clip_skip=st.none() | _whole,
    rng=st.none() | _words,
    hires_upscale=st.none() | _numbers,
    hires_steps=st.none() | _whole,
    hires_upscaler=st.none() | _words,
    refiner=st.none() | _words,
    refiner_switch_at=st.none() | _numbers,
    lora_hashes=st.dictionaries(_hash_names, st.text("0123456789abcdef", min_size=1), max_size=3),
    other=st.dictionaries(_names, _texts, max_size=4),
)


@given(_infos)
@settings(max_examples=300)
def test_any_settings_come_back_as_they_were(info: Infotext) -> None:
    text = parameters(info)
    assert parse_parameters(text) == info
    assert parameters(parse_parameters(text)) == text


@given(_texts | st.text('Steps: 1,aCFG scale\nSeed"{[]}', max_size=80))
@settings(max_examples=300)
def test_no_text_makes_reading_fail_and_what_was_read_can_be_written(text: str) -> None:
    parameters(parse_parameters(text))


def test_what_only_wears_the_reader_out_is_read_in_no_time() -> None:
    nested = "Steps: 1, a: " + "[" * 100_000
    assert parse_parameters(nested).other["a"] == "[" * 100_000
    assert parse_parameters("Steps: " + "9" * 10_000).other["Steps"] == "9" * 10_000
    assert parse_parameters("Steps: 1, " + 'a: ",' * 50_000).steps == 1


def test_a_text_without_settings_is_all_prompt() -> None:
    for text in ("a cat", "", "a (cat:1.2), (dog:1.1), (bird:0.9)", "ratio: 3, mood: dark, light: soft", "Model: a, b"):
        assert parse_parameters(text) == Infotext(text)
    assert parse_parameters("a\nNegative prompt: b") == Infotext("a", "b")


def test_the_last_line_wins_over_a_prompt_that_looks_like_settings() -> None:
    info = Infotext("Steps: 1, Sampler: x, Seed: 2\nmore", "Negative prompt: twice", steps=5, seed=3)
    assert parse_parameters(parameters(info)) == info


def test_unknown_names_and_values_of_other_types_are_kept() -> None:
    text = (
        "a\nSteps: 20, Seed: random, Size: big, CFG scale: nan, ENSD: 31337, Hires resize: 1024x1536, Tiling, NGMS: 0.2"
    )
    info = parse_parameters(text)
    assert info == Infotext(
        "a",
        steps=20,
        other={
            "Seed": "random",
            "Size": "big",
            "CFG scale": "nan",
            "ENSD": "31337",
            "Hires resize": "1024x1536",
            "Tiling": "Tiling",
            "NGMS": "0.2",
        },
    )
    assert parse_parameters(parameters(info)) == info


def test_samplers_of_older_versions_hold_their_schedule() -> None:
    old = "a\nSteps: 28, Sampler: DPM++ 2M SDE Karras, CFG scale: 7, Seed: 1, Size: 512x512"
    assert parse_parameters(old).sampler == "DPM++ 2M SDE" and parse_parameters(old).schedule == "Karras"
    new = parse_parameters(old + ", Schedule type: Automatic")
    assert new.sampler == "DPM++ 2M SDE Karras" and new.schedule == "Automatic", "said, so not guessed"
    assert parse_parameters("Steps: 1, Sampler: Karras").sampler == "Karras"


def test_texts_of_other_programs_are_read() -> None:
    """Forge with ADetailer and ControlNet; CivitAI's generator; Fooocus; Dynamic Prompts below the settings."""
    forge = parse_parameters(
        "a\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, Size: 896x1152, "
        'Model: flux1-dev, ControlNet 0: "Module: canny, Model: control [d14c], Weight: 1", ADetailer model 2nd: hand.pt, '
        "Version: f2.0.1v1.10.1-previous-317"
    )
    assert forge.other["ControlNet 0"] == "Module: canny, Model: control [d14c], Weight: 1"
    assert forge.other["Distilled CFG Scale"] == "3.5" and forge.version == "f2.0.1v1.10.1-previous-317"
    resources = [{"type": "lora", "weight": 0.8, "modelName": "a, b: c"}]
    civitai = parse_parameters(
        "a\nNegative prompt: b\nSteps: 25, Sampler: DPM++ 2M Karras, CFG scale: 5.5, Seed: 7, Size: 832x1216, Clip skip: 2, "
        f'Civitai resources: {json.dumps(resources)}, Civitai metadata: {{}}, Hashes: {{"model": "e1441589a6", "vae": "7c"}}'
    )
    assert json.loads(civitai.other["Civitai resources"]) == resources and civitai.other["Civitai metadata"] == "{}"
    assert json.loads(civitai.other["Hashes"])["vae"] == "7c" and civitai.clip_skip == 2
    assert parse_parameters(parameters(civitai)) == civitai
    fooocus = parse_parameters(
        "a\nSteps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 42, Size: 1152x896, CFG scale: 4, Sharpness: 2, "
        'ADM Guidance: "(1.5, 0.8, 0.3)", Base model: juggernaut, Lora hashes: "offset: abcdef012345", Version: Fooocus v2.3'
    )
    assert fooocus.other["ADM Guidance"] == "(1.5, 0.8, 0.3)" and fooocus.lora_hashes == {"offset": "abcdef012345"}
    dynamic = parse_parameters(
        "red\nSteps: 20, Sampler: Euler a, Seed: 1\nTemplate: {red|blue},\na: b\nNegative Template: x"
    )
    assert dynamic.prompt == "red" and dynamic.seed == 1 and dynamic.other["Template"] == "{red|blue},"
    assert dynamic.other["Negative Template"] == "x"


def test_names_of_loras_lose_what_would_break_their_list() -> None:
    text = parameters(Infotext(steps=1, lora_hashes={"a:b,c": "00"}))
    assert text == 'Steps: 1, Lora hashes: "abc: 00"'
    broken = parse_parameters('Steps: 1, Lora hashes: "a: b: c"')
    assert broken.lora_hashes == {} and broken.other == {"Lora hashes": "a: b: c"}


@pytest.mark.parametrize(("prompt", "chunk"), [("café", b"tEXt"), ("猫\nnéko, Łódź", b"iTXt")])
def test_a_png_carries_its_parameters(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    info, path = replace(FULL, prompt=prompt), tmp_path / "new" / "a.png"
    picture = Image.linear_gradient("L").convert("RGB")
    save_png(picture, path, info)
    assert read_png(path) == info
    assert chunk + b"parameters\0" in path.read_bytes()
    assert Image.open(path).tobytes() == picture.tobytes(), "and nothing changes in the picture"


def test_a_prompt_of_broken_bytes_is_still_saved(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", Infotext("caf\udce9", steps=1))
    assert read_png(tmp_path / "a.png").prompt == "caf�"


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 8)), path, Infotext("old", steps=1))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(RunFailed, match="No space left"):
        save_png(Image.new("RGB", (8, 8)), path, Infotext("new", steps=1))
    assert read_png(path).prompt == "old" and list(tmp_path.iterdir()) == [path]


def _png(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as error:
            read_png(path)
        return str(error.value)

    assert refusal(tmp_path / "none.png").endswith("none.png does not exist.")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert "a.jpg is not a PNG picture" in refusal(tmp_path / "a.jpg")
    assert "no text named parameters, as A1111 writes it." in refusal(_png(tmp_path / "b.png"))
    comfy = _png(tmp_path / "c.png", workflow="{}", prompt="{}")
    assert refusal(comfy).endswith("It has other texts: prompt, workflow.")
    assert "are JSON (SwarmUI writes them so)" in refusal(
        _png(tmp_path / "d.png", parameters='{"sui_image_params": {}}')
    )
    whole = _png(tmp_path / "e.png", parameters="a" * 50).read_bytes()
    (tmp_path / "e.png").write_bytes(whole[:60])
    assert "e.png cannot be read: " in refusal(tmp_path / "e.png")
    assert "cannot be read: " in refusal(tmp_path), "a folder"


def test_compressed_text_is_read(tmp_path: Path) -> None:
    path = _png(tmp_path / "a.png")
    body = b"zTXtparameters\0\0" + zlib.compress(b"a dog\nSteps: 3, Seed: 4, Size: 8x8")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk + whole[33:])  # after the signature and IHDR
    assert read_png(path) == Infotext("a dog", steps=3, seed=4, size=(8, 8))


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
