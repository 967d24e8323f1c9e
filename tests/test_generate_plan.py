"""generate.py before it draws: its plan, and what it refuses in a sentence."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import generate
from library.errors import EXIT_BAD_INPUT, EXIT_OK
from library.options.generate import split_weight
from tests.tools.generating import run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an outputs folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(tiny_sd15: Path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(tiny_sd15)]


def test_a_dry_run_draws_nothing_and_takes_no_torch(base: list[str], tmp_path: Path) -> None:
    code = "import sys, generate; code = generate.main(sys.argv[1:]); assert 'torch' not in sys.modules, 'torch'; sys.exit(code)"
    words = ["--prompt", "a (b", "--sampler", "UniPC", "--y_axis", "cfg: 1-3", "--dry_run", *base]
    root = Path(generate.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_OK, "")
    assert "sampler    UniPC Normal, 25 steps, cfg_scale 2\n" in done.stdout
    assert "note       1 '(' of the prompt stays open and weighs everything up to the end.\n" in done.stdout
    assert "pictures   3 at the base's own size, seed 42\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_will_be_drawn(
    base: list[str], adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a <lora:demo:0.3> --w 128 --h 100 --d 1\nb\nc <lora:demo:0.5:1>\n")
    words = [*base, "--prompt_file", "p.txt", "--lora", f"{adapter_file}:0.5", "--dry_run"]
    assert generate.main(words) == EXIT_OK
    said = capsys.readouterr().out
    assert "pictures   3: 1 of 128 x 96 pixels, 2 at the base's own size, seeds 1, 43, 44\n" in said
    assert f"lora       {adapter_file}, weight 0.3, 0.5, 0.5:1\n" in said
    assert "note       height 100 is rounded down to 96, a multiple of 8 (p.txt, line 1).\n" in said
    words = [*base, "--prompt", "a", "--hires_scale", "2", "--x_axis", "denoising: 0.3, 0.6", "--dry_run"]
    assert generate.main(words) == EXIT_OK
    said = capsys.readouterr().out
    assert [line.rpartition(" ")[2] for line in said.splitlines() if line.startswith("hires")] == ["0.3", "0.6"]
    assert "pictures   2 at the base's own size, seed 42\n" in said


def test_a_plan_lists_every_model_that_is_to_be_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--x_axis", "checkpoint: my/one | my/two", "--vae", "my/three", "--refiner", "my/four", "--dry_run"]
    assert run(*words) == EXIT_OK
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert [line.split()[1] for line in said] == ["my/one", "my/two", "my/three", "my/four"]


def both(words: list[object], capsys: pytest.CaptureFixture[str], prompt: str = "a") -> str:
    """What the dry run refuses to do, and the real run in the same words."""
    said = []
    for more in (["--dry_run"], []):
        assert run(*words, *more, prompt=prompt) == EXIT_BAD_INPUT
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and said[0].startswith("error: ")
    return re.sub("^error: ", "", said[0], flags=re.MULTILINE)


def test_a_dry_run_refuses_what_the_run_would(
    base: list[str], adapter_file: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdxl = ["--pretrained_model_name_or_path", tiny_sdxl]
    words = ["--x_axis", "checkpoint: one | two", "--vae", "three", "--refiner", "four"]
    assert [line.split()[0] for line in both(words, capsys).splitlines()] == ["one", "two", "three", "four"]
    said = both([*sdxl, "--lora", adapter_file], capsys)
    assert said.startswith(f"{adapter_file} is not for {tiny_sdxl}: ") and "looks like an SD1.5 LoRA on an SDXL" in said
    assert both([*sdxl, "--lora_dir", adapter_file.parent], capsys, f"a <lora:{adapter_file.stem}>") == said
    assert "--refiner" not in both([*base, "--refiner", tiny_sdxl], capsys)
    assert "device cuda:7 cannot be used" in both([*base, "--device", "cuda:7"], capsys)
    assert "clip_skip must lie between 1 and 12" in both([*base, "--clip_skip", 99], capsys)
    (tmp_path / "file").touch()
    assert "cannot be written to" in both([*base, "--output", tmp_path / "file" / "x.png"], capsys)
    (tmp_path / "x.safetensors").write_bytes(b"torn")
    assert "not a whole safetensors file" in both(["--pretrained_model_name_or_path", "x.safetensors"], capsys)
    both([*base, "--lora", tmp_path / "x.safetensors"], capsys)
    torn = shutil.copytree(base[1], tmp_path / "torn")
    next((torn / "vae").glob("*.safetensors")).write_bytes(b"torn")
    for more in ([], ["--lora", adapter_file]):
        assert "not a whole safetensors file" in both(["--pretrained_model_name_or_path", torn, *more], capsys)
    assert "not a whole safetensors file" in both([*base, "--vae", torn], capsys)
    assert run("--pretrained_model_name_or_path", torn, "--vae", base[1], "--dry_run") == EXIT_OK, "it has another one"
    (torn / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "sample"}')
    assert "prediction_type 'sample'" in both(["--pretrained_model_name_or_path", torn], capsys)
    assert (
        run("--pretrained_model_name_or_path", "my/base", "--lora", tmp_path / "x.safetensors", "--dry_run")
        == EXIT_BAD_INPUT
    )


def test_switches_in_a_prompt_are_noted(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*base, "--dry_run", prompt="a cat --shift 3 --w 512") == EXIT_OK
    assert "note       --shift and --w of the prompt are drawn as words, as A1111 does:" in capsys.readouterr().out


def test_without_the_hub_a_dry_run_refuses_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in both(["--pretrained_model_name_or_path", "my/base"], capsys)


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
    assert split_weight(text) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--width", "100"], "width must be a multiple of 8, got 100."),
        (["--height", "-8"], "height must be positive, got -8."),
        (["--steps", "0"], "steps must be at least 1, got 0."),
        (["--images", "0"], "images must be at least 1, got 0."),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0."),
        (["--cfg_scale", "0.5"], "cfg_scale must be at least 1, which is no guidance, got 0.5."),
        (["--cfg_scale", "inf"], "cfg_scale must be a finite number, got inf."),
        (["--cfg_scale", "nan"], "cfg_scale must be a finite number, got nan."),
        (["--lora", ".:nan"], "lora . needs a finite number as its weight, got nan."),
        (["--hires_scale", "inf"], "An upscaler's scale must be above 0"),
        (["--clip_skip", "0"], "clip_skip must be positive, got 0."),
        (["--seed", "-1"], "seed must lie between 0 and 2^63, got -1."),
        (["--output", "a.jpg"], "output must be a .png file, got a.jpg."),
        (["--lora", "absent.safetensors:0.5"], "lora absent.safetensors does not exist."),
        (["--lora", ".", ".:0.5"], "lora . is given twice;"),
        (["--lora_dir", "absent"], "lora_dir absent is no folder."),
        (["--device", "tpu9"], "device tpu9 cannot be used: "),
        (["--pretrained_model_name_or_path", "absent"], "absent does not exist (looked in "),
        (["--sampler", "Eular"], "Eular is no sampler (did you mean Euler?)."),
        (["--sampler", "Euler Karras", "--schedule", "Normal"], "The sampler Euler Karras names a schedule, and"),
        (["--schedule", "karas"], "karas is no schedule (did you mean Karras?)."),
        (["--hires_scale", "2", "--hires_upscaler", "latnet"], "latnet is no upscaler"),
        (["--hires_scale", "-1"], "An upscaler's scale must be above 0"),
        (["--hires_scale", "2", "--hires_steps", "0"], "hires_steps must be at least 1, got 0."),
        (["--hires_steps", "3"], "hires_steps has no effect without hires_scale."),
        (["--denoising_strength", "0.3"], "denoising_strength has no effect without init_image;"),
        (["--init_image", "absent.png"], "init_image absent.png does not exist."),
        (["--refiner_switch_at", "0.5"], "refiner_switch_at has no effect without refiner."),
        (["--prompt_file", "p.txt"], "prompt and prompt_file exclude each other."),
        (["--x_axis", "colour: red"], "colour is no axis of a grid"),
        (["--x_axis", "cfg: 3, 4", "--images", "2"], "images must be 1 with axes."),
        (["--x_axis", "weight: 0, 1"], "An axis of adapter weights needs an adapter:"),
        (["--x_axis", "denoising: 0.5"], "The axis denoising needs the hires fix or a picture to begin with;"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_something_to_draw_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(prompt=None) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: prompt is missing: say what to draw, or name a --prompt_file.")


def test_a_missing_adapter_of_the_prompt_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--output", tmp_path / "x.png", prompt="a <lora:mio:0.8> cat") == EXIT_BAD_INPUT
    assert "<lora:mio:0.8> of the prompt has no adapter: no mio.safetensors in" in capsys.readouterr().err


def test_a_slip_in_a_file_of_prompts_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat --ss eular")
    assert run("--prompt_file", "p.txt", prompt=None) == EXIT_BAD_INPUT
    assert "eular is no sampler (did you mean Euler?)" in capsys.readouterr().err


@pytest.mark.parametrize(("prompt", "has_effect"), [("a", False), ("a:1.5", True), ("a AND b", True)])
def test_a_negative_prompt_without_guidance_has_an_effect_where_parts_are_weighed(
    prompt: str, has_effect: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--negative_prompt", "b", "--cfg_scale", 1, "--dry_run", prompt=prompt) == EXIT_OK
    assert ("The negative prompt has no effect without guidance" not in capsys.readouterr().out) == has_effect
