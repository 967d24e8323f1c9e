"""The engine: what a picture depends on, its passes, and adapters that come and go with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import merge_lora
from library.errors import EXIT_OK, RunFailed, UserError
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.find_adapters import constant_weights
from library.inference.lora_tags import LoraWeights, cut_out_tags, lora_weights
from library.inference.picture_request import Hires, LoraUse, PictureRequest, base_steps, fitted_picture
from library.inference.prompt_syntax import parse_negative, parse_prompt, weighted_spans
from library.inference.sampler_names import SAMPLER_NAMES
from library.inference.samplers import SAMPLERS
from library.inference.text_to_image import draw, encode_together, native_size
from library.models.locate import BaseLocation
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from tests.tools.adapters import text_lora

SMALL = PictureRequest("a red square", "blurry", steps=2, cfg_scale=5.0, width=64, height=64)
CPU, FLOAT = "cpu", torch.float32


@pytest.fixture(scope="module")
def base(tiny_sd15: Path) -> BaseLocation:
    return BaseLocation("tiny", tiny_sd15)


@pytest.fixture(scope="module")
def model(base: BaseLocation) -> DrawingModel:
    return load_model(base, dtype=FLOAT, device=CPU)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> DrawingModel:
    return load_model(BaseLocation("tiny", tiny_sdxl), dtype=FLOAT, device=CPU)


@pytest.fixture(scope="module")
def adapter(adapter_file: Path) -> Adapter:
    return read_adapter(adapter_file)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(pixels(one) - pixels(other)).max())


def one(model: DrawingModel, request: PictureRequest = SMALL, seed: int = 7, **more: Any) -> Image.Image:
    return draw(model, request, [seed], **more)[0]


def lora_weights_of(text: str) -> LoraWeights:
    return lora_weights(cut_out_tags(f"<lora:x:{text}>")[1][0])


def with_lora(
    request: PictureRequest, weights: LoraWeights | str | float, path: Path = Path("x.safetensors")
) -> PictureRequest:
    if isinstance(weights, str):
        weights = lora_weights_of(weights)
    if isinstance(weights, float):
        weights = constant_weights(path, weights)
    return replace(request, loras=(LoraUse(path, weights),))


class Asked:
    """Counts the calls of a U-Net while in its context."""

    def __init__(self, model: DrawingModel) -> None:
        self.model, self.shapes = model, []  # type: ignore[var-annotated]

    def __enter__(self) -> Asked:
        self._hook = self.model.unet.register_forward_pre_hook(lambda _, inputs: self.shapes.append(inputs[0].shape))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.bits
@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DPM++ 3M SDE"])
def test_a_picture_does_not_depend_on_its_batch(model: DrawingModel, sampler: str) -> None:
    request = replace(SMALL, sampler=sampler)
    together = draw(model, request, [7, 8, 9])
    for picture, seed in zip(together, (7, 8, 9), strict=True):
        assert difference(picture, one(model, request, seed)) <= 1  # sums of another order, rounded to 8 bits
    assert difference(together[0], together[1]) > 10


@pytest.mark.bits
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_the_same_seed_gives_the_same_picture_with_every_sampler(model: DrawingModel, sampler: str) -> None:
    request = replace(SMALL, sampler=sampler)
    torch.manual_seed(1)
    first = one(model, request)
    torch.manual_seed(2)
    assert np.array_equal(pixels(one(model, request)), pixels(first))


def test_every_name_is_a_sampler() -> None:
    assert set(SAMPLER_NAMES) == set(SAMPLERS)


def test_pictures_have_the_size_asked_for(model: DrawingModel) -> None:
    picture = one(model, replace(SMALL, width=72, height=40, cfg_scale=1.0))
    assert (picture.mode, picture.size) == ("RGB", (72, 40))


def test_the_native_size_is_what_the_unet_was_trained_at(model: DrawingModel) -> None:
    assert native_size(model) == 128


def test_guidance_of_one_asks_the_unet_once_a_step(model: DrawingModel) -> None:
    with Asked(model) as asked:
        one(model, replace(SMALL, cfg_scale=1.0))
        one(model)
    assert [shape[0] for shape in asked.shapes] == [1, 1, 2, 2]


def test_the_end_of_a_long_prompt_counts(model: DrawingModel) -> None:
    long = replace(SMALL, prompt="red, " * 60 + "a circle")
    assert difference(one(model, long), one(model, replace(long, prompt="red, " * 60 + "a square"))) > 0


def test_clip_skip_counts_for_sd15_alone(model: DrawingModel, sdxl: DrawingModel) -> None:
    skipped = replace(SMALL, clip_skip=2)
    assert difference(one(model, skipped), one(model)) > 0
    assert difference(one(sdxl, skipped), one(sdxl)) == 0
    with pytest.raises(UserError, match="clip_skip must lie between 1 and"):
        one(model, replace(SMALL, clip_skip=99))


@pytest.mark.bits
def test_an_empty_negative_prompt_of_sdxl_is_zeros(sdxl: DrawingModel) -> None:
    encoder = sdxl.encoder(1, "original")
    positive = parse_prompt("a red square BREAK blue", 2)
    part, empty = encode_together(encoder, positive, parse_negative("", 2))
    assert (part.length, empty.length) == (154, 77)
    assert not any(values is None or values.any() for values in empty.texts[0])
    filling = encoder.encode_texts([weighted_spans("")]).states
    *_, filled = encode_together(encoder, positive, parse_negative("", 2), filling)
    assert torch.equal(filled.texts[0].states, torch.cat([empty.texts[0].states, filling], dim=1))


def test_numbers_that_overflow_are_told(base: BaseLocation) -> None:
    broken = load_model(base, dtype=FLOAT, device=CPU)
    broken.unet.conv_out.bias.data.fill_(torch.nan)
    said = "values that are not finite: torch.float32 is too narrow. Use --dtype bf16 or float."
    with pytest.raises(RunFailed, match=said):
        one(broken)


# Passes


@pytest.mark.parametrize("upscaler", ["Latent", "Latent (nearest-exact)", "Lanczos"])
def test_the_hires_fix_draws_over_the_enlarged_picture(model: DrawingModel, upscaler: str) -> None:
    request = replace(SMALL, hires=Hires(1.5, upscaler, steps=3, denoising_strength=0.5))
    with Asked(model) as asked:
        picture = one(model, request)
    assert picture.size == (96, 96)
    assert [tuple(shape[2:]) for shape in asked.shapes] == [(8, 8)] * 2 + [(12, 12)] * 3
    assert difference(picture, one(model, request, seed=8)) > 10
    together = draw(model, request, [8, 7])
    assert difference(together[1], picture) <= 2


def test_the_prompt_goes_on_in_the_second_pass(model: DrawingModel) -> None:
    """[a:b:1.5]: b from the middle of the second pass on."""
    hires = replace(SMALL, hires=Hires(1.5, steps=2))
    always = [one(model, replace(hires, prompt=prompt)) for prompt in ("red", "blue", "[red:blue:1.5]")]
    assert all(difference(always[2], other) > 0 for other in always[:2])
    whole = [one(model, replace(SMALL, prompt=prompt)) for prompt in ("red", "[red:blue:1.5]")]
    assert difference(*whole) == 0


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)).resize((160, 80)).save(path)
    return path


def test_a_picture_to_begin_with_decides_by_its_strength(model: DrawingModel, photo: Path) -> None:
    request = replace(SMALL, steps=20, init_image=photo)
    pictures = [one(model, replace(request, denoising_strength=strength)) for strength in (0.01, 0.6)]
    with torch.no_grad():
        pixels_ = (
            torch.from_numpy(np.array(fitted_picture(photo, 64, 64, "init_image"))).permute(2, 0, 1)[None] / 127.5 - 1
        )
        through = model.vae.decode(model.vae.encode(pixels_).latent_dist.mode()).sample[0].permute(1, 2, 0)
    target = ((through / 2 + 0.5).clamp(0, 1) * 255).numpy()
    near, far = (float(np.abs(pixels(picture) - target).mean()) for picture in pictures)
    assert near < 5 and far > 2 * near


def test_a_strength_is_a_number_of_steps(model: DrawingModel, photo: Path) -> None:
    with Asked(model) as asked:
        one(model, replace(SMALL, steps=10, init_image=photo, denoising_strength=0.5))
    assert len(asked.shapes) == 6  # A1111's: int(0.5 * 10) + 1


def test_what_sticks_out_of_the_size_is_cut_off_evenly(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    sides = Image.new("RGB", (40, 20), "red")
    sides.paste("blue", (10, 0, 30, 20))
    sides.save(path)
    assert np.array_equal(
        pixels(fitted_picture(path, 20, 20, "init_image")), pixels(Image.new("RGB", (20, 20), "blue"))
    )
    (tmp_path / "b.png").write_text("no picture")
    for name, said in (("b.png", "cannot be read"), ("c.png", "does not exist")):
        with pytest.raises(UserError, match=f"init_image .*{name} {said}"):
            fitted_picture(tmp_path / name, 8, 8, "init_image")


# Refiners


def test_a_refiner_draws_the_last_steps(base: BaseLocation, model: DrawingModel) -> None:
    other = load_model(base, dtype=FLOAT, device=CPU)
    request = replace(SMALL, steps=5, refiner_switch_at=0.6, prompt="[red:blue:4]")
    with Asked(model) as first, Asked(other) as second:
        refined = one(model, request, refiner=other)
    assert (len(first.shapes), len(second.shapes)) == (3, 2)
    assert difference(refined, one(model, request)) == 0, "the same model, and the prompt goes on where it was"
    other.unet.conv_out.weight.mul_(0.5)
    assert difference(one(model, request, refiner=other), refined) > 0


def test_with_a_hires_fix_the_refiner_acts_in_the_second_pass(base: BaseLocation, model: DrawingModel) -> None:
    other = load_model(base, dtype=FLOAT, device=CPU)
    request = replace(SMALL, refiner_switch_at=0.5, hires=Hires(1.5, steps=4))
    with Asked(model) as first, Asked(other) as second:
        one(model, request, refiner=other)
    assert (len(first.shapes), len(second.shapes)) == (2 + 2, 2)


@pytest.mark.parametrize(("steps", "share", "expected"), [(20, 0.8, 16), (10, 0.7, 7), (3, 0.5, 2), (10, 0.01, 1)])
def test_the_first_step_that_is_not_below_the_share_is_the_refiners(steps: int, share: float, expected: int) -> None:
    assert base_steps(steps, share) == expected


# Adapters


def test_a_lora_folded_in_draws_as_the_merged_folder(
    base: BaseLocation, model: DrawingModel, adapter: Adapter, adapter_file: Path, tmp_path: Path
) -> None:
    words = ["--models", adapter_file, "--ratios", 0.5, "--pretrained_model_name_or_path", base.path]
    assert merge_lora.main([*map(str, words), "--output_dir", str(tmp_path / "m")]) == EXIT_OK
    merged = load_model(BaseLocation("m", tmp_path / "m"), dtype=FLOAT, device=CPU)
    request = with_lora(SMALL, 0.5)
    folded = one(model, request, adapters={Path("x.safetensors"): adapter})
    assert difference(folded, one(merged)) == 0
    assert difference(folded, one(model)) > 10, "and it is taken out again for a picture without"


@pytest.mark.bits
def test_going_back_leaves_no_trace(base: BaseLocation, adapter: Adapter) -> None:
    changed = load_model(base, dtype=torch.bfloat16, device=CPU)
    before = {key: value.clone() for key, value in changed.unet.state_dict().items()}
    changed.folded.set_unet([(adapter, 0.3)])
    changed.folded.set_unet([(adapter, 1.0), (adapter, -1.0)])
    twice = {key: value.clone() for key, value in changed.unet.state_dict().items()}
    changed.folded.set_unet([])
    for key, value in changed.unet.state_dict().items():
        assert torch.equal(value, before[key]) and torch.equal(twice[key], before[key])


def test_without_originals_adapters_go_in_once(base: BaseLocation, adapter: Adapter) -> None:
    changed = load_model(base, dtype=FLOAT, device=CPU)
    changed.folded.keeps_originals = False
    changed.folded.set_unet([(adapter, 0.5)])
    changed.folded.set_unet([(adapter, 0.5)])
    with pytest.raises(ValueError, match="cannot be taken out again"):
        changed.folded.set_unet([])


def strengths_seen(model: DrawingModel, kind: str) -> tuple[list[list[float]], Callable[[], None]]:
    """The ratios that are folded in, one after the other, and what ends the watching."""
    seen: list[list[float]] = []
    original = getattr(model.folded, kind)

    def spy(adapters: Sequence[tuple[Adapter, float]]) -> None:
        seen.append([round(ratio, 4) for _, ratio in adapters])
        original(adapters)

    setattr(model.folded, kind, spy)
    return seen, lambda: delattr(model.folded, kind)


def test_stepwise_weights_change_with_the_steps(model: DrawingModel, adapter: Adapter) -> None:
    request = with_lora(replace(SMALL, steps=5), "1:0@0,1@1")  # text encoder 1, U-Net from 0 to 1
    seen, end = strengths_seen(model, "set_unet")
    stepwise = one(model, request, adapters={Path("x.safetensors"): adapter})
    end()
    assert seen == [[0.0], [0.3333], [0.6667], [1.0], [1.0]]
    constant = one(model, with_lora(request, 1.0), adapters={Path("x.safetensors"): adapter})
    assert difference(stepwise, constant) > 0


def test_the_second_pass_has_weights_of_its_own(model: DrawingModel, adapter: Adapter) -> None:
    request = with_lora(replace(SMALL, hires=Hires(1.5, steps=1)), "0.5:hr=0.25")
    seen, end = strengths_seen(model, "set_unet")
    one(model, request, adapters={Path("x.safetensors"): adapter})
    end()
    assert seen == [[0.5], [0.5], [0.25]]


def test_weights_of_text_encoders_that_change_encode_each_step(model: DrawingModel, adapter: Adapter) -> None:
    request = with_lora(replace(SMALL, steps=3), "0@1,1@2:0")
    seen, end = strengths_seen(model, "set_text")
    one(model, request, adapters={Path("x.safetensors"): adapter})
    end()
    assert seen == [[0.0], [1.0]], "once for each weight: steps 0 and 1, then 2"


def test_text_encoders_are_adapted_before_the_prompt_is_read(model: DrawingModel, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(text_lora(), path)
    adapters = {path: read_adapter(path)}
    pictures = [one(model, with_lora(SMALL, lora_weights_of(text), path), adapters=adapters) for text in ("1:0", "0:1")]
    assert difference(pictures[0], one(model)) > 0 and difference(pictures[1], one(model)) == 0


def test_an_adapter_of_the_other_family_is_told(sdxl: DrawingModel, adapter: Adapter) -> None:
    with pytest.raises(UserError, match="LoRA modules have no place in this checkpoint"):
        sdxl.folded.check([adapter])
