"""generate.py: what it writes, what the files say, and what does not go together (its plan: test_generate_plan.py)."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import generate
from library import project_version
from library.errors import EXIT_BAD_INPUT, EXIT_OK
from library.files import read_json, write_json
from library.inference import drawing_session
from library.inference.infotext import lora_hash, model_hash
from tests.tools.generating import run
from tests.tools.infotext import read_png
from tests.tools.ldm_layout import ldm_checkpoint


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an outputs folder, unless a test makes one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(tiny_sd15: Path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(tiny_sd15)]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


def test_pictures_and_their_grid(
    base: list[str], adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", 3, "--seed", 5, "--batch_size", 2, "--lora", f"{adapter_file}:0.5"]
    assert run(*base, *words, "--output", tmp_path / "x.png") == EXIT_OK
    assert names(tmp_path) == ["x.png", "x_5.png", "x_6.png", "x_7.png"]
    info = read_png(tmp_path / "x_6.png")
    assert info.prompt == "a red square <lora:demo:0.5>" and info.lora_hashes == {"demo": lora_hash(adapter_file)}
    assert (info.sampler, info.schedule, info.steps, info.seed, info.size) == ("DPM++ 2M", "Karras", 1, 6, (64, 64))
    assert info.model == "tiny-sd15" and info.clip_skip is None and info.hires_upscale is None
    assert info.model_hash is None, "of a folder"
    assert info.version == f"repa-scripts {project_version()}"
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (128, 128)
    said = capsys.readouterr().out
    assert "pictures   3 of 64 x 64 pixels, seed 5 to 7" in said and f"lora       {adapter_file}, weight 0.5" in said


def test_one_picture_is_the_output_itself(base: list[str], tmp_path: Path) -> None:
    assert run(*base, "--images", 1, "--output", tmp_path / "x.png") == EXIT_OK
    assert names(tmp_path) == ["x.png"]


def test_one_line_of_a_file_is_one_picture(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# a comment\na red square\n")
    assert run(*base, "--prompt_file", "p.txt", "--output", tmp_path / "x.png", prompt=None) == EXIT_OK
    assert names(tmp_path) == ["x.png"]


def test_an_axis_of_one_value_has_its_sheet(base: list[str], tmp_path: Path) -> None:
    assert run(*base, "--x_axis", "cfg: 3", "--output", tmp_path / "x.png") == EXIT_OK
    assert names(tmp_path) == ["x.png", "x_x1_y1.png"]
    assert pixels(tmp_path / "x.png").shape[0] > 64, "with its heading"


def test_a_picture_says_what_draws_it_again(base: list[str], adapter_file: Path, tmp_path: Path) -> None:
    prompt = "a (red:1.2) square <lora:demo:0.4>"
    words = [
        "--sampler",
        "euler a karras",
        "--cfg_scale",
        3,
        "--negative_prompt",
        "blue",
        "--clip_skip",
        2,
        "--images",
        1,
    ]
    words += ["--hires_scale", 1.5, "--hires_upscaler", "Lanczos", "--hires_steps", 2, "--seed", 9]
    words += ["--refiner", base[1], "--refiner_switch_at", 0.5, "--lora_dir", adapter_file.parent, "--vae", base[1]]
    assert run(*base, *words, "--output", tmp_path / "x.png", prompt=prompt) == EXIT_OK
    info = read_png(tmp_path / "x.png")
    assert (info.prompt, info.negative_prompt, info.sampler, info.schedule) == (prompt, "blue", "Euler a", "Karras")
    assert (info.cfg_scale, info.clip_skip, info.seed, info.size) == (3, 2, 9, (64, 64))
    assert (info.vae, info.rng) == ("tiny-sd15", "CPU")
    assert (info.hires_upscale, info.hires_upscaler, info.hires_steps) == (1.5, "Lanczos", 2)
    assert (info.denoising_strength, info.refiner, info.refiner_switch_at) == (0.7, "tiny-sd15", 0.5)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (96, 96)


@pytest.mark.bits
def test_a_tag_is_as_good_as_an_option(base: list[str], adapter_file: Path, tmp_path: Path) -> None:
    words = [*base, "--images", 1]
    assert run(*words, "--lora", f"{adapter_file}:0.5", "--output", tmp_path / "a.png") == EXIT_OK
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "demo.safetensors").symlink_to(adapter_file)
    assert run(*words, "--output", tmp_path / "b.png", prompt="a red square <lora:demo:0.5>") == EXIT_OK
    assert run(*words, "--output", tmp_path / "c.png") == EXIT_OK
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert read_png(tmp_path / "a.png") == read_png(tmp_path / "b.png")


@pytest.mark.bits
def test_a_file_of_prompts_is_drawn_with_one_load(
    base: list[str], adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    original = drawing_session.load_model

    def counted(*args: object, **more: object) -> object:
        loads.append(args)
        return original(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(drawing_session, "load_model", counted)
    prompts = tmp_path / "p.txt"
    prompts.write_text(
        "# two of them\na cat <lora:demo:1> --n dog --w 72 --h 40 --d 3 --s 2 --l 2 --ss euler_a\na red square\n"
    )
    words = [*base, "--prompt_file", prompts, "--lora_dir", adapter_file.parent, "--negative_prompt", "bad"]
    assert run(*words, "--output", tmp_path / "x.png", prompt=None) == EXIT_OK
    assert names(tmp_path) == ["x.png", "x_00_3.png", "x_01_43.png"] and len(loads) == 1
    first, second = read_png(tmp_path / "x_00_3.png"), read_png(tmp_path / "x_01_43.png")
    assert (first.negative_prompt, first.steps, first.cfg_scale, first.size) == ("dog", 2, 2, (72, 40))
    assert (first.sampler, first.schedule) == ("Euler a", "Normal")
    assert (second.negative_prompt, second.size, second.lora_hashes) == ("bad", (64, 64), {})
    assert (
        run(*base, "--images", 1, "--seed", 43, "--negative_prompt", "bad", "--output", tmp_path / "y.png") == EXIT_OK
    )
    assert np.array_equal(pixels(tmp_path / "y.png"), pixels(tmp_path / "x_01_43.png")), (
        "the adapter was taken out again"
    )


@pytest.mark.bits
def test_axes_make_a_sheet_of_pictures(base: list[str], adapter_file: Path, tmp_path: Path) -> None:
    axes = ["--x_axis", "weight: 0, 0.5, 1", "--y_axis", "sampler: Euler, DPM++ 2M Karras"]
    assert run(*base, *axes, "--lora", adapter_file, "--output", tmp_path / "x.png") == EXIT_OK
    cells = [f"x_x{column}_y{row}.png" for column in (1, 2, 3) for row in (1, 2)]
    assert names(tmp_path) == ["x.png", *cells]
    info = read_png(tmp_path / "x_x2_y1.png")
    assert (info.prompt, info.sampler, info.schedule) == ("a red square <lora:demo:0.5>", "Euler", "Normal")
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 2 * 64
    assert run(*base, "--images", 1, "--output", tmp_path / "plain.png") == EXIT_OK
    assert np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "x_x1_y2.png"))


@pytest.mark.bits
def test_an_axis_of_checkpoints_loads_each_once(base: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(base[1], target_is_directory=True)
    axes = ["--x_axis", f"checkpoint: {base[1]} | {other}", "--y_axis", "seed: 1-2"]
    assert run(*base, *axes, "--batch_size", 2, "--output", tmp_path / "x.png") == EXIT_OK
    assert read_png(tmp_path / "x_x2_y1.png").model == "other"
    assert np.array_equal(pixels(tmp_path / "x_x1_y2.png"), pixels(tmp_path / "x_x2_y2.png"))


def write_sdxl_lora(path: Path) -> Path:
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(8, 2)}, path)
    return path


def test_models_of_a_sheet_are_checked_before_the_first_is_drawn(
    base: list[str], tiny_sdxl: Path, adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    cases: list[tuple[object, list[object], str]] = [
        ("nothere", [], "nothere does not exist (looked in "),
        (tmp_path / "notes.txt", [], "notes.txt is not a base model"),
        (tiny_sdxl, ["--lora", adapter_file], f"{adapter_file} is not for {tiny_sdxl}: "),
        (tiny_sdxl, ["--refiner", base[1]], "is for SD1.5, and the base is SDXL"),
        (tiny_sdxl, ["--vae", "nothere"], "nothere does not exist (looked in "),
    ]
    for other, words, sentence in cases:
        axis = f"checkpoint: {base[1]} | {other}"
        assert run(*base, "--x_axis", axis, *words, "--output", tmp_path / "x.png") == EXIT_BAD_INPUT
        assert sentence in capsys.readouterr().err and names(tmp_path) == []


def test_the_size_of_a_sheet_is_the_first_models_and_that_is_said(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(base[1], tmp_path / "larger"))
    config = read_json(other / "unet" / "config.json")
    write_json(other / "unet" / "config.json", {**config, "sample_size": 32})
    words = ["--prompt", "a", "--steps", "1", "--x_axis", f"checkpoint: {base[1]} | {other}"]
    assert generate.main([*words, "--output", str(tmp_path / "x.png")]) == EXIT_OK
    assert (
        f"note       {other} was trained at 256 pixels, but is drawn at the 128 of {base[1]}" in capsys.readouterr().out
    )
    assert pixels(tmp_path / "x_x2_y1.png").shape == (128, 128, 3)
    assert run("--x_axis", f"checkpoint: {base[1]} | {other}", "--output", tmp_path / "x.png") == EXIT_OK
    assert "was trained at" not in capsys.readouterr().out, "64 x 64 is asked for"


def test_a_picture_to_begin_with_gives_its_size(base: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (77, 50), "red").save(tmp_path / "red.png")
    words = [
        *base,
        "--prompt",
        "a",
        "--steps",
        "2",
        "--init_image",
        str(tmp_path / "red.png"),
        "--denoising_strength",
        "0.5",
    ]
    assert generate.main([*words, "--images", "1", "--output", str(tmp_path / "x.png")]) == EXIT_OK
    info = read_png(tmp_path / "x.png")
    assert (info.size, info.denoising_strength) == ((72, 48), 0.5)


def test_the_base_gives_the_size_where_nothing_else_does(base: list[str], tmp_path: Path) -> None:
    words = [*base, "--prompt", "a", "--steps", "1", "--images", "1", "--output", str(tmp_path / "x.png")]
    assert generate.main(words) == EXIT_OK
    assert pixels(tmp_path / "x.png").shape == (128, 128, 3)


def test_a_base_that_is_a_file_is_named_with_a1111s_hash(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(drawing_session, "model_hash", lambda path: hashed.append(path) or model_hash(path))
    file = tmp_path / "mine.safetensors"
    save_file({key: value.contiguous() for key, value in ldm_checkpoint(tiny_sd15).items()}, file)
    words = ["--pretrained_model_name_or_path", file, "--refiner", file, "--images", 2, "--steps", 2]
    assert run(*words, "--output", tmp_path / "x.png") == EXIT_OK
    short = hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    for name in ("x_42.png", "x_43.png", "x.png"):
        info = read_png(tmp_path / name)
        assert (info.model, info.model_hash, info.refiner) == ("mine", short, f"mine [{short}]")
    assert hashed == [file], "once in a run"


def test_sdxl_draws_with_its_own_refiner(tiny_sdxl: Path, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", tiny_sdxl, "--refiner", tiny_sdxl, "--images", 1, "--steps", 2]
    assert run(*words, "--output", tmp_path / "x.png") == EXIT_OK


def test_two_adapters_of_one_name_are_both_told(base: list[str], adapter_file: Path, tmp_path: Path) -> None:
    files = [tmp_path / folder / "x.safetensors" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.symlink_to(adapter_file)
    words = ["--lora", *(f"{file}:{weight}" for file, weight in zip(files, (1, 0.5), strict=True)), "--images", 1]
    assert run(*base, *words, "--output", tmp_path / "x.png") == EXIT_OK
    info, digest = read_png(tmp_path / "x.png"), lora_hash(adapter_file)
    assert info.prompt == "a red square <lora:a/x:1> <lora:b/x:0.5>" and info.lora_hashes == {
        "a/x": digest,
        "b/x": digest,
    }


def test_a_lora_that_does_not_fit_is_refused(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sdxl_lora(tmp_path / "xl.safetensors")
    assert run(*base, "--lora", file, "--output", tmp_path / "x.png") == EXIT_BAD_INPUT
    assert "It looks like an SDXL LoRA on an SD1.5 model." in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_refiner_of_the_other_family_is_refused(
    base: list[str], tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*base, "--refiner", tiny_sdxl, "--output", tmp_path / "x.png") == EXIT_BAD_INPUT
    assert re.search(r"refiner .* is for SDXL, and the base is SD1.5", capsys.readouterr().err)


def test_what_has_no_effect_is_said(
    base: list[str], adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--negative_prompt", "bad) <lora:demo:1>", "--images", 1, "--lora", adapter_file]
    assert run(*base, *words, "--output", tmp_path / "x.png", prompt="cat <lora:demo:0.5>") == EXIT_OK
    said = capsys.readouterr().out
    assert "note       A ')' of the negative prompt closes no bracket and is taken literally." in said
    assert "note       <lora:demo:1> of the negative prompt is left out" in said
    assert f"note       <lora:demo:0.5> of the prompt takes the place of --lora {adapter_file}:1." in said
