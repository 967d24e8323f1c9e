"""Drawing that is steered towards a photo by AlignHeads: its step, what leaves pictures alone, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from library.diffusion.bridge import along_flow
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import FLOW
from library.diffusion.rectified_flow import RectifiedFlow
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import EXIT_BAD_INPUT, EXIT_OK
from library.evaluation.feature_model import reference_heads
from library.files import read_json, write_json
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.picture_request import Hires, PictureRequest, Reference
from library.inference.reference import ReferenceHeads
from library.inference.sampler_names import SAMPLER_NAMES
from library.inference.text_to_image import TextToImage
from library.inference.token_guidance import TokenGuidance
from library.models.locate import BaseLocation
from networks.align_head import AlignHeads
from networks.features import capture
from networks.taps import last_tap
from tests.tools.generating import run
from tests.tools.infotext import read_png
from tests.tools.pictures import draw_picture

SMALL = PictureRequest("a red square", "blurry", steps=2, cfg_scale=5.0, width=64, height=64)
ALWAYS = (0.0, 1.0)
TAPS, WIDTH, TIME_WIDTH = {"up_blocks.0": 96, "mid": 96}, 64, 128
OPTIONS = {"dino_resolution": 56, "token_grid": 2, "align_head": "mlp", "taps": list(TAPS), "cache_dir": "."}


def write_state(folder: Path, base: Path, teacher: Path, *, family: str = "sd15", **options: object) -> Path:
    """What a training of AlignHeads leaves behind of them; their weights are random, and their FiLM says something."""
    folder.mkdir()
    heads = AlignHeads(TAPS, {"teacher": WIDTH}, grid=2, time_width=TIME_WIDTH)
    for number, tap in enumerate(heads):
        film = heads[tap].film
        film.weight.data = 0.1 * torch.randn(film.weight.shape, generator=torch.Generator().manual_seed(number))
    save_file(
        {f"align_heads.{name}": value for name, value in heads.state_dict().items()}, folder / "align_heads.safetensors"
    )
    given = {**OPTIONS, "dino_model": str(teacher), "cache_dir": str(folder), **options}
    facts = {"format_version": 1, "base_model": str(base), "family": family, "caches": {}, "options": given}
    write_json(folder / "state.json", facts)
    return folder


@pytest.fixture(scope="module")
def state(tiny_sd15: Path, tiny_dinov2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_state(tmp_path_factory.mktemp("states") / "step_000004", tiny_sd15, tiny_dinov2)


@pytest.fixture(scope="module")
def heads(state: Path) -> ReferenceHeads:
    return reference_heads(state)


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> DrawingModel:
    return load_model(BaseLocation("tiny", tiny_sd15), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> DrawingModel:
    return load_model(BaseLocation("tiny", tiny_sdxl), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    draw_picture(path, 5, 96)
    return path


def guided(heads: ReferenceHeads, photo: Path, strength: float, window: tuple[float, float] = ALWAYS) -> TokenGuidance:
    return heads.guidance(Reference(photo, heads.state, strength, window), 64, 64, torch.device("cpu"))


def latents(
    model: DrawingModel, request: PictureRequest, guidance: TokenGuidance | None, seeds: tuple[int, ...] = (7,)
) -> torch.Tensor:
    with torch.no_grad():
        return TextToImage(model, request, seeds, {}, None, guidance).latents()


# The step


def likeness(model: DrawingModel, guidance: TokenGuidance, x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Mean cosine of the heads' tokens to the photo's, [B], by a whole pass."""
    text = torch.zeros(len(x), 77, model.unet.config.cross_attention_dim, dtype=x.dtype)
    with torch.no_grad(), capture(model.unet, guidance.heads.captured) as features:
        model.unet(x, torch.tensor(timestep), text)
    found = [guidance.heads.tokens(tap, features, guidance.grid) for tap in guidance.heads]
    return torch.stack([F.cosine_similarity(tokens, guidance.target, dim=-1).mean(dim=1) for tokens in found]).mean(0)


def step_of(model: DrawingModel, guidance: TokenGuidance, x: torch.Tensor, level: float) -> torch.Tensor:
    process = model.parametrisation
    text = torch.zeros(len(x), 77, model.unet.config.cross_attention_dim)
    scale, timestep = process.inverse_scale(level), torch.tensor(process.levels.timestep(level))
    return guidance.step(model.unet, lambda near: model.unet(near / scale, timestep, text), x, level, process)


def test_the_step_goes_where_likeness_rises_most(model: DrawingModel, heads: ReferenceHeads, photo: Path) -> None:
    """Along any direction likeness rises by the share of the step in it: central differences, of a pass to the end."""
    generator, level, near = torch.Generator().manual_seed(1), 2.0, 0.05
    guidance, process = guided(heads, photo, 1.0), model.parametrisation
    x = torch.randn(2, 4, 8, 8, generator=generator) * process.inverse_scale(level)
    way = F.normalize(step_of(model, guidance, x, level).flatten(1), dim=1).view_as(x)

    def rise(direction: torch.Tensor) -> torch.Tensor:
        scale, timestep = process.inverse_scale(level), process.levels.timestep(level)
        ends = [likeness(model, guidance, (x + sign * near * direction) / scale, timestep) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * near)

    steepest = rise(way)
    assert (steepest > 0).all()
    for _ in range(3):
        other = F.normalize(torch.randn(x.shape, generator=generator).flatten(1), dim=1).view_as(x)
        share = (other * way).flatten(1).sum(dim=1)
        assert torch.allclose(rise(other), share * steepest, rtol=0.05, atol=0.05 * steepest.max().item())


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROCESSES: dict[str, Callable[[], Parametrisation]] = {
    "epsilon": lambda: parametrisation_of(SCHEDULE),
    "v": lambda: parametrisation_of({**SCHEDULE, "prediction_type": "v_prediction"}),
    "flow": lambda: RectifiedFlow(FLOW),
    "bridge": lambda: along_flow(parametrisation_of(SCHEDULE)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_strength_turns_the_noise_by_the_same_share_at_every_level(
    model: DrawingModel, heads: ReferenceHeads, photo: Path, name: str
) -> None:
    """The noise that clean latents leave of x, whose numbers have variance 1, moves by 0.3 of its length."""
    process, guidance = PROCESSES[name](), guided(heads, photo, 0.3)
    text = torch.zeros(1, 77, model.unet.config.cross_attention_dim)
    x, clean = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for time in (0.1, 0.5, 0.9):
        level = time if name in ("flow", "bridge") else time / (1 - time)
        assert process.time(level) == pytest.approx(time)
        step = guidance.step(model.unet, lambda near: model.unet(near, 300, text), x, level, process)
        before, after = ((x - process.signal(level) * found) / level for found in (clean, clean + step))
        assert float((after - before).norm()) == pytest.approx(0.3 * x.numel() ** 0.5, rel=1e-4)


def test_of_noise_alone_nothing_is_read(heads: ReferenceHeads, photo: Path) -> None:
    process, guidance = RectifiedFlow(FLOW), guided(heads, photo, 0.3)
    assert guidance.acts_at(0.999, process) and not guidance.acts_at(1.0, process)


def test_the_last_tap_of_a_pass_is_known_by_any_name() -> None:
    assert last_tap(["dec_first", "mid", "down_blocks.2"], 4) == "dec_first"
    assert last_tap(["down_blocks.2", "enc_last"], 4) == "enc_last"
    assert last_tap(["up_blocks.1", "dec_first"], 3) == "up_blocks.1"


def test_likeness_rises_with_strength(model: DrawingModel, heads: ReferenceHeads, photo: Path) -> None:
    request, timestep = replace(SMALL, steps=6), 20
    found = []
    for strength in (0.0, 0.2, 0.6):
        drawn = latents(model, request, guided(heads, photo, strength), (1, 2, 3))
        found.append(float(likeness(model, guided(heads, photo, 1.0), drawn, timestep).mean()))
    assert found[0] + 0.01 < found[1] and found[1] + 0.01 < found[2], found


# With everything that draws


@pytest.mark.bits
def test_without_strength_or_outside_of_its_window_nothing_changes(
    model: DrawingModel, heads: ReferenceHeads, photo: Path
) -> None:
    plain = latents(model, SMALL, None)
    passes = []
    hook = model.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    for strength, window in ((0.0, ALWAYS), (0.5, (0.97, 0.98))):
        assert torch.equal(latents(model, SMALL, guided(heads, photo, strength, window)), plain)
    hook.remove()
    assert len(passes) == 2 * SMALL.steps, "and nothing is computed for it"


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_is_steered(model: DrawingModel, heads: ReferenceHeads, photo: Path, sampler: str) -> None:
    request = replace(SMALL, sampler=sampler)
    steered = latents(model, request, guided(heads, photo, 0.5))
    assert torch.isfinite(steered).all() and (steered - latents(model, request, None)).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg_scale": 1.0},
        {"prompt": "a red square :0.7 AND blue :0.5"},
        {"flow_shift": 2.0},
        {"hires": Hires(1.5, steps=2)},
        {"height": 96},
        {"init_image": True},
    ],
    ids=str,
)
def test_every_way_to_draw_is_steered(
    model: DrawingModel, heads: ReferenceHeads, photo: Path, changes: dict[str, Any]
) -> None:
    request = replace(SMALL, steps=3, **(changes if "init_image" not in changes else {"init_image": photo}))
    guidance = heads.guidance(
        Reference(photo, heads.state, 0.5, ALWAYS), request.width, request.height, torch.device("cpu")
    )
    steered = latents(model, request, guidance)
    assert torch.isfinite(steered).all() and (steered - latents(model, request, None)).abs().max() > 0.1


def test_sdxl_is_steered(sdxl: DrawingModel, tiny_sdxl: Path, photo: Path, heads: ReferenceHeads) -> None:
    channels = {"mid": sdxl.unet.config.block_out_channels[-1]}
    guidance = replace(guided(heads, photo, 0.5), heads=AlignHeads(channels, {"teacher": WIDTH}, grid=2))
    steered = latents(sdxl, SMALL, guidance)
    assert torch.isfinite(steered).all() and (steered - latents(sdxl, SMALL, None)).abs().max() > 0.1


def test_a_steered_picture_does_not_depend_on_its_batch(
    model: DrawingModel, heads: ReferenceHeads, photo: Path
) -> None:
    together = latents(model, SMALL, guided(heads, photo, 0.5), (7, 8))
    torch.testing.assert_close(
        together[1:], latents(model, SMALL, guided(heads, photo, 0.5), (8,)), rtol=1e-3, atol=1e-3
    )


# The script


@pytest.fixture
def words(tiny_sd15: Path, state: Path, photo: Path) -> list[str]:
    return [
        "--pretrained_model_name_or_path",
        str(tiny_sd15),
        "--align_reference",
        str(photo),
        "--align_state",
        str(state),
    ]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.mark.bits
def test_a_picture_says_what_steered_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--align_guidance_window", 0.1, 0.94, "--x_axis", "align guidance: 0, 0.2", "--output", tmp_path / "x.png"]
    assert run(*words, *more) == EXIT_OK
    assert "strength 0.2 where noise is 0.1 to 0.94" in capsys.readouterr().out
    info = read_png(tmp_path / "x_x2_y1.png").other
    named = {name: info[f"Align {name}"] for name in ("guidance", "reference", "window")}
    assert named == {"guidance": "0.2", "reference": "photo.png", "window": "0.1 0.94"}
    assert info["Align state"].endswith("/step_000004")
    assert not {name for name in read_png(tmp_path / "x_x1_y1.png").other if name.startswith("Align")}
    monkeypatch.setattr("library.inference.reference.load_teacher", None)
    assert run(*words, "--align_guidance", 0, "--images", 1, "--output", tmp_path / "zero.png") == EXIT_OK, (
        "takes no teacher"
    )
    assert run(*words[:2], "--images", 1, "--output", tmp_path / "plain.png") == EXIT_OK
    for name in ("x_x1_y1.png", "zero.png"):
        assert np.array_equal(pixels(tmp_path / name), pixels(tmp_path / "plain.png"))
    assert np.abs(pixels(tmp_path / "x_x2_y1.png") - pixels(tmp_path / "plain.png")).max() > 10


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--align_reference", "no.png"], "align_reference no.png does not exist."),
        (["--align_guidance", "-0.5"], "align_guidance must not be negative, got -0.5."),
        (["--align_guidance", "nan"], "align_guidance must not be negative, got nan."),
        (["--align_guidance_window", "0.8", "0.2"], "wants two numbers from 0 to 1, the lower one first, got 0.8 0.2."),
        (["--align_state", "nowhere"], "align_state nowhere is no training state: there is no state.json in it."),
        (["--dino_model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_steer_is_refused_in_a_sentence(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, *more) == EXIT_BAD_INPUT
    assert said in (err := capsys.readouterr().err) and "Traceback" not in err


def test_each_option_needs_a_photo_and_a_photo_needs_a_state(
    state: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"align_state": [state], "align_guidance": [0.5], "align_guidance_window": [0, 0.5], "dino_model": ["x"]}
    for name, values in given.items():
        assert run(f"--{name}", *values) == EXIT_BAD_INPUT
        assert f"{name} has no effect without align_reference." in capsys.readouterr().err
    assert run("--align_reference", photo) == EXIT_BAD_INPUT
    assert "align_state is missing: the training state whose AlignHeads read the photo" in capsys.readouterr().err
    assert run("--x_axis", "align guidance: 0, 1") == EXIT_BAD_INPUT
    assert "needs a photo to steer towards. Name one with --align_reference." in capsys.readouterr().err


def changed_facts(state: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "align_heads.safetensors").hardlink_to(state / "align_heads.safetensors")
    facts = read_json(state / "state.json")
    options = {**facts["options"], **changes.pop("options", {})}  # type: ignore[dict-item]
    write_json(folder / "state.json", {**facts, **changes, "options": options})
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "sdxl"}, "tiny-sd15 is of SD1.5. Name the base that they were trained on"),
        ({"options": {"taps": ["up_blocks.0", "up_blocks.9"]}}, "This U-Net has no up_blocks.9"),
        ({"options": {"token_weight": 0.0}}, "(token_weight 0): they cannot compare a picture with a photo."),
        ({"caches": {"tokens 64x64": {"weights": "another"}}}, "is not the teacher that the AlignHeads of"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_heads_of_something_else_are_refused_before_anything_is_loaded(
    words: list[str],
    state: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
    dry: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("library.inference.drawing_session.load_model", None)
    other = changed_facts(state, tmp_path / "state", **changes)
    if "up_blocks.9" in str(changes):
        tensors = AlignHeads(
            dict.fromkeys(("up_blocks.0", "up_blocks.9"), 96), {"teacher": WIDTH}, grid=2, time_width=TIME_WIDTH
        ).state_dict()
        (other / "align_heads.safetensors").unlink()
        save_file({f"align_heads.{name}": value for name, value in tensors.items()}, other / "align_heads.safetensors")
    assert run(*words[:-1], other, *dry) == EXIT_BAD_INPUT
    assert said in (err := capsys.readouterr().err) and "Traceback" not in err


def test_a_state_without_heads_is_refused(
    words: list[str], state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed_facts(state, tmp_path / "state")
    (other / "align_heads.safetensors").unlink()
    assert run(*words[:-1], other) == EXIT_BAD_INPUT
    assert "has no AlignHeads: its run trained without alignment." in capsys.readouterr().err
