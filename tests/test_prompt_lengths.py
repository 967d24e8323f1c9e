"""Prompts of unequal length: drawn as A1111 and ComfyUI draw them, and filled only where that is asked for and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.errors import EXIT_OK
from library.inference import text_to_image
from library.inference.denoiser import GuidedDenoiser
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.find_adapters import constant_weights
from library.inference.picture_request import Hires, LoraUse, PictureRequest
from library.inference.prompt_syntax import parse_negative, parse_prompt
from library.inference.text_to_image import draw, encode_together
from library.models.locate import BaseLocation
from networks.adapter_file import read_adapter
from tests.tools.adapters import text_lora
from tests.tools.generating import run
from tests.tools.infotext import read_png

LONG = "a red square BREAK on a blue background"
SMALL = PictureRequest(LONG, "blurry", steps=2, cfg_scale=5.0, width=64, height=64)


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> DrawingModel:
    return load_model(BaseLocation("tiny", tiny_sd15), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> DrawingModel:
    return load_model(BaseLocation("tiny", tiny_sdxl), dtype=torch.float32, device="cpu")


def one(model: DrawingModel, request: PictureRequest, **more: Any) -> Image.Image:
    return draw(model, request, [7], **more)[0]


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


class OnePassEach(GuidedDenoiser):
    """The reference: the U-Net is asked for each prompt by itself, at its own length."""

    def _run_unet(self, x: torch.Tensor, sigma: float, prompts: Any) -> torch.Tensor:
        outputs = []
        for number, prompt in enumerate(prompts):
            sizes = self.negative_size_ids if number == len(self.positive) else self.size_ids
            timesteps = torch.full((len(x),), self.parametrisation.levels.timestep(sigma))
            more = {}
            if sizes is not None:
                ids, pooled = torch.tensor([sizes] * len(x)).float(), prompt.pooled.expand(len(x), -1)
                more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
            states = prompt.states.expand(len(x), -1, -1)
            scaled = x / self.parametrisation.inverse_scale(sigma)
            outputs.append(self.unet(scaled, timesteps, encoder_hidden_states=states, **more).sample)
        return torch.cat(outputs)


CASES = {
    "longer prompt": SMALL,
    "longer negative": replace(SMALL, prompt="a", negative_prompt="b BREAK c BREAK d"),
    "two and three chunks": replace(SMALL, negative_prompt="b BREAK c BREAK d"),
    "AND": replace(SMALL, prompt=f"{LONG} AND a star :0.5"),
    "a longer text from the second step on": replace(SMALL, prompt=f"[a:{LONG}:1]"),
    "no negative prompt": replace(SMALL, negative_prompt=""),
    "hires fix": replace(SMALL, hires=Hires(1.5, steps=1)),
    "img2img": replace(SMALL, steps=4, denoising_strength=0.5),
}


@pytest.mark.bits
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["model", "sdxl"])
def test_a_picture_is_that_of_a_pass_for_each_prompt(
    family: str, case: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = request.getfixturevalue(family), CASES[case]
    if case == "img2img":
        Image.new("RGB", (64, 64), "orange").save(tmp_path / "x.png")
        asked = replace(asked, init_image=tmp_path / "x.png")
    found = draw(base, asked, [7, 8])
    monkeypatch.setattr(text_to_image, "GuidedDenoiser", OnePassEach)
    for picture, expected in zip(found, draw(base, asked, [7, 8]), strict=True):
        assert difference(picture, expected) <= 1


@pytest.mark.bits
def test_parts_of_an_and_repeat_their_last_position(model: DrawingModel) -> None:
    """A1111's stacking of the parts; the negative prompt keeps its own length."""
    encoder = model.encoder(1, "original")
    switched, filled, negative = encode_together(
        encoder, parse_prompt("[a:b BREAK c:1] AND d", 2), parse_negative("e", 2)
    )
    alone, _ = encode_together(encoder, parse_prompt("d", 2), parse_negative("", 2))
    states, last = alone.texts[0].states, alone.texts[0].states[:, -1:]
    assert [text.states.shape[1] for text in switched.texts] == [154, 154] and negative.length == 77
    assert torch.equal(filled.texts[0].states, torch.cat([states, *[last] * 77], dim=1))


@pytest.mark.bits
@pytest.mark.parametrize(
    ("prompt", "negative"), [("a BREAK b", "c"), ("a", "b BREAK c BREAK d"), ("a BREAK b AND c", "d")]
)
def test_filling_is_an_option_and_another_picture(model: DrawingModel, prompt: str, negative: str) -> None:
    """By hand: empty chunks written into the shorter side, as the BREAKs after its last word."""
    plain = replace(SMALL, prompt=prompt, negative_prompt=negative)
    filled = replace(plain, pad_cond_uncond=True)
    assert difference(one(model, plain), one(model, filled)) > 0
    if "AND" not in prompt:
        missing = negative.count("BREAK") - prompt.count("BREAK")
        ends = [" BREAK" * (count + 1) if count > 0 else "" for count in (missing, -missing)]
        by_hand = replace(plain, prompt=prompt + ends[0], negative_prompt=negative + ends[1])
        assert difference(one(model, filled), one(model, by_hand)) <= 1
    unguided = replace(filled, cfg_scale=1.0)
    if not unguided.is_guided:
        assert difference(one(model, unguided), one(model, replace(plain, cfg_scale=1.0))) == 0


@pytest.mark.bits
def test_the_filling_is_encoded_without_adapters(model: DrawingModel, tmp_path: Path) -> None:
    """As in A1111, which encodes it when it loads a base: in the second pass too, when adapters are in the encoders."""
    path = tmp_path / "x.safetensors"
    save_file(text_lora(), path)
    hires = replace(SMALL, prompt="a BREAK b", pad_cond_uncond=True, hires=Hires(1.5, steps=1))
    asked = replace(hires, loras=(LoraUse(path, constant_weights(path, 1.0)),))
    encoded: list[torch.Tensor] = []
    hook = model.parts[0].model.register_forward_hook(lambda _, __, output: encoded.append(output.last_hidden_state))
    try:
        one(model, asked, adapters={path: read_adapter(path)})
        with_adapter, encoded[:] = list(encoded), []
        one(model, hires)
    finally:
        hook.remove()
    texts = len(encoded) // 2  # of a pass: the filling, two chunks of the prompt, and the negative prompt
    for number, (found, plain) in enumerate(zip(with_adapter, encoded, strict=True)):
        assert torch.equal(found, plain) == (number % texts == 0)


def test_the_png_says_that_a_picture_is_filled_and_is_drawn_again_from_it(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--pretrained_model_name_or_path", tiny_sd15, "--images", 1, "--output"]
    options: dict[str, list[str]] = {"plain": [], "filled": ["--pad_cond_uncond"]}
    for name, given in options.items():
        assert run(*base, f"{name}.png", "--negative_prompt", "blurry", *given, prompt=LONG) == EXIT_OK
        info = read_png(tmp_path / f"{name}.png")
        assert info.other.get("Pad conds") == ("True" if name == "filled" else None)
        again = ["--pad_cond_uncond"] if info.other.get("Pad conds") == "True" else []
        words = ["--negative_prompt", info.negative_prompt, "--seed", info.seed, "--cfg_scale", info.cfg_scale, *again]
        assert run(*base, "again.png", *words, prompt=info.prompt) == EXIT_OK
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "filled.png") as filled:
        assert difference(plain, filled) > 0


def test_without_guidance_nothing_is_filled_and_nothing_said(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--pretrained_model_name_or_path", tiny_sd15, "--images", 1, "--cfg_scale", 1, "--pad_cond_uncond"]
    assert run(*words, "--output", "x.png", prompt=LONG) == EXIT_OK
    assert "Pad conds" not in read_png(tmp_path / "x.png").other


@pytest.mark.bits
def test_prompts_of_a_file_do_not_lengthen_each_other(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--pretrained_model_name_or_path", tiny_sd15, "--images", 1, "--batch_size", 4, "--output"]
    Path("both.txt").write_text(f"a star --d 3\n{LONG} --n blurry --d 3\n")
    Path("short.txt").write_text("a star --d 3\n")
    for name in ("both", "short"):
        assert run(*base, f"{name}.png", "--prompt_file", f"{name}.txt", prompt=None) == EXIT_OK
    assert Path("both_00_3.png").read_bytes() == Path("short.png").read_bytes()
