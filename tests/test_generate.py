"""Pictures from prompts: what a picture depends on, what its file says, and what is refused."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save, save_file

import generate
import merge_lora
from library.errors import EXIT_BAD_INPUT, EXIT_OK, RunFailed
from library.inference.pictures import FoldedLora, describe_lora, grid, parameters_text, save_picture
from library.inference.text_to_image import (
    Drawing,
    draw,
    initial_noise,
    load_pipeline,
    make_sampler,
    native_size,
    words_cut_off,
)
from library.models.load import load_unet
from library.models.locate import BaseLocation
from library.models.sd15_configs import SD15_SCHEDULER
from networks.adapter_export import to_kohya
from networks.adapter_file import read_adapter
from networks.lora import LoraSpec, add_lora

CPU, FLOAT = "cpu", torch.float32
DRAWING = Drawing("a red square", "blurry", steps=2, cfg_scale=5.0, width=64, height=64)


@pytest.fixture(scope="module")
def base(tiny_sd15: Path) -> BaseLocation:
    return BaseLocation("tiny", tiny_sd15)


@pytest.fixture(scope="module")
def pipeline(base: BaseLocation) -> StableDiffusionPipeline:
    return load_pipeline(base, [], dtype=FLOAT, device=CPU)


@pytest.fixture(scope="module")
def lora(base: BaseLocation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec, generator = LoraSpec(scope="all"), torch.Generator().manual_seed(1)
    params = add_lora(load_unet(base), spec, seed=0)
    weights = {name: 0.1 * torch.randn(parameter.shape, generator=generator) for name, parameter in params.items()}
    path = tmp_path_factory.mktemp("lora") / "red.safetensors"
    save_file(to_kohya(weights, spec), path)
    return path


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def run(*arguments: object) -> int:
    return generate.main(
        ["--prompt", "a red square", "--steps", "1", "--width", "64", "--height", "64", *map(str, arguments)]
    )


def test_noise_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = initial_noise(7, 4, 8, 8)
    torch.manual_seed(2)
    assert torch.equal(initial_noise(7, 4, 8, 8), one)
    assert not torch.equal(initial_noise(8, 4, 8, 8), one)
    assert one.dtype == torch.float32 and one.device.type == "cpu"


def test_a_picture_does_not_depend_on_its_batch(pipeline: StableDiffusionPipeline) -> None:
    together = draw(pipeline, DRAWING, [7, 8])
    alone = [draw(pipeline, DRAWING, [seed])[0] for seed in (7, 8)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1  # sums of another order, rounded to 8 bits
    assert np.abs(pixels(alone[0]) - pixels(alone[1])).mean() > 1


def test_the_same_seed_gives_the_same_picture_to_the_bit(pipeline: StableDiffusionPipeline) -> None:
    assert np.array_equal(pixels(draw(pipeline, DRAWING, [7])[0]), pixels(draw(pipeline, DRAWING, [7])[0]))


def test_pictures_have_the_size_asked_for(pipeline: StableDiffusionPipeline) -> None:
    (picture,) = draw(pipeline, Drawing("", "", steps=1, cfg_scale=1.0, width=72, height=40), [0])
    assert (picture.mode, picture.size) == ("RGB", (72, 40))


def test_the_native_size_is_what_the_unet_was_trained_at(pipeline: StableDiffusionPipeline) -> None:
    assert native_size(pipeline) == 128


def test_the_sampler_keeps_the_schedule_of_the_base() -> None:
    sampler = make_sampler({**SD15_SCHEDULER, "prediction_type": "v_prediction"})
    assert sampler.config["beta_schedule"] == "scaled_linear" and sampler.config["beta_end"] == 0.012
    assert sampler.config["prediction_type"] == "v_prediction"
    sampler.set_timesteps(20)
    # Karras et al., equation 5 with rho 7, between SD1.5's smallest and largest noise level.
    low, high = 0.0292, 14.6146
    expected = [(high ** (1 / 7) + i / 19 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(20)]
    np.testing.assert_allclose(sampler.sigmas[:-1].numpy(), expected, rtol=1e-2)


def test_a_lora_folded_in_draws_as_the_merged_folder(base: BaseLocation, lora: Path, tmp_path: Path) -> None:
    adapter = read_adapter(lora)
    arguments = [
        "--models",
        lora,
        "--ratios",
        0.5,
        "--pretrained_model_name_or_path",
        base.path,
        "--output_dir",
        tmp_path / "m",
    ]
    assert merge_lora.main(list(map(str, arguments))) == EXIT_OK
    merged = load_pipeline(BaseLocation("m", tmp_path / "m"), [], dtype=FLOAT, device=CPU)
    folded = load_pipeline(base, [(adapter, 0.5)], dtype=FLOAT, device=CPU)
    plain = load_pipeline(base, [], dtype=FLOAT, device=CPU)
    of_merged, of_folded, of_plain = (pixels(draw(each, DRAWING, [7])[0]) for each in (merged, folded, plain))
    assert np.array_equal(of_folded, of_merged)
    assert np.abs(of_folded - of_plain).mean() > 1


def test_weights_are_rounded_after_all_loras_are_folded_in(base: BaseLocation, lora: Path) -> None:
    adapter = read_adapter(lora)
    undone = load_pipeline(base, [(adapter, 1.0), (adapter, -1.0)], dtype=torch.bfloat16, device=CPU).unet
    plain = load_unet(base, dtype=torch.bfloat16)
    pairs = list(zip(undone.parameters(), plain.parameters(), strict=True))
    assert all(one.dtype == torch.bfloat16 for one, _ in pairs)
    # Sums in bfloat16 would leave thousands of weights changed.
    assert sum(int((one != other).sum()) for one, other in pairs) < 100


def test_the_end_of_a_long_prompt_is_told(pipeline: StableDiffusionPipeline) -> None:
    assert words_cut_off(pipeline.tokenizer, "red " * 75) is None
    assert words_cut_off(pipeline.tokenizer, "red " * 75 + "blue circle") == "blue circle"


def test_numbers_that_overflow_are_told(base: BaseLocation) -> None:
    broken = load_pipeline(base, [], dtype=FLOAT, device=CPU)
    broken.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(
        RunFailed, match="values that are not finite: torch.float32 is too narrow. Use --dtype bf16 or float."
    ):
        draw(broken, DRAWING, [0])


def test_parameters_are_a1111s() -> None:
    drawing = Drawing("a cat, sitting", "dog", steps=25, cfg_scale=7.5, width=512, height=768)
    loras = [FoldedLora("red", 0.8, "0123456789ab"), FoldedLora("blue", 1.0, "ba9876543210")]
    assert parameters_text(drawing, 42, "tiny-sd15", loras) == (
        "a cat, sitting <lora:red:0.8> <lora:blue:1>\n"
        "Negative prompt: dog\n"
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, Model: tiny-sd15, "
        'Lora hashes: "red: 0123456789ab, blue: ba9876543210"'
    )


def test_parameters_without_negative_prompt_and_lora() -> None:
    drawing = Drawing("", "", steps=1, cfg_scale=1.0, width=8, height=8)
    assert parameters_text(drawing, 0, "m, x", []) == (
        '\nSteps: 1, Sampler: DPM++ 2M Karras, CFG scale: 1, Seed: 0, Size: 8x8, Model: "m, x"'
    )


def test_the_hash_of_a_lora_does_not_depend_on_its_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1000.0)}
    for name, metadata in (("one", {"a": "b"}), ("two", {"c": "much longer than that"})):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=metadata)
    one, two = (describe_lora(name, 1.0, tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    data = save(tensors)
    assert one.hash == two.hash == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]


@pytest.mark.parametrize("parameters", ["plain\nSteps: 1", "雪, été"])
def test_a_picture_carries_its_parameters(parameters: str, tmp_path: Path) -> None:
    save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", parameters)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["parameters"] == parameters
        assert np.asarray(picture)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("count", "size"), [(1, (10, 8)), (2, (20, 8)), (3, (20, 16)), (4, (20, 16)), (5, (30, 16))])
def test_a_grid_is_as_square_as_can_be(count: int, size: tuple[int, int]) -> None:
    sheet = grid([Image.new("RGB", (10, 8), (number + 1, 0, 0)) for number in range(count)])
    assert sheet.size == size
    columns = size[0] // 10
    for number in range(count):
        assert sheet.getpixel((number % columns * 10, number // columns * 8)) == (number + 1, 0, 0)


def test_the_script_writes_pictures_and_their_grid(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run("--images", 3, "--seed", 5, "--batch_size", 2, "--lora", f"{lora}:0.5", "--output", tmp_path / "x.png")
        == EXIT_OK
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.png", "x_5.png", "x_6.png", "x_7.png"]
    with Image.open(tmp_path / "x_6.png") as picture:
        assert picture.text["parameters"].startswith("a red square <lora:red:0.5>\nSteps: 1, Sampler: DPM++ 2M Karras,")
        assert re.search(
            r"Seed: 6, Size: 64x64, Model: tiny-sd15, Lora hashes: \"red: [0-9a-f]{12}\"", picture.text["parameters"]
        )
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (128, 128)
    assert "pictures   3 of 64 x 64, seed 5 to 7" in capsys.readouterr().out


def test_one_picture_is_the_output_itself(tmp_path: Path) -> None:
    assert run("--images", 1, "--output", tmp_path / "x.png") == EXIT_OK
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", (Path("a.safetensors"), 1.0)),
        ("a.safetensors:0.5", (Path("a.safetensors"), 0.5)),
        ("a.safetensors:-1", (Path("a.safetensors"), -1.0)),
        ("C:/a.safetensors", (Path("C:/a.safetensors"), 1.0)),
    ],
)
def test_a_lora_may_have_a_weight(text: str, expected: tuple[Path, float]) -> None:
    assert generate.split_weight(text) == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--width", "100"], "width must be a multiple of 8, got 100."),
        (["--height", "-8"], "height must be positive, got -8."),
        (["--steps", "0"], "steps must be at least 1, got 0."),
        (["--images", "0"], "images must be at least 1, got 0."),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0."),
        (["--cfg_scale", "0.5"], "cfg_scale must be at least 1, which is no guidance, got 0.5."),
        (["--seed", "-1"], "seed must lie between 0 and 2^63, got -1."),
        (["--output", "a.jpg"], "output must be a .png file, got a.jpg."),
        (["--lora", "absent.safetensors:0.5"], "lora absent.safetensors does not exist."),
        (["--device", "tpu9"], "device tpu9 cannot be used: "),
        (["--pretrained_model_name_or_path", "absent"], "absent does not exist (looked in "),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(8, 2)},
        tmp_path / "xl.safetensors",
    )
    assert run("--lora", tmp_path / "xl.safetensors", "--output", tmp_path / "x.png") == EXIT_BAD_INPUT
    assert "It looks like an SDXL LoRA on an SD1.5 model." in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_dry_run_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", tmp_path / "x.png", "--dry_run") == EXIT_OK
    assert "sampler    DPM++ 2M Karras, 1 steps, cfg_scale 7.5" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
