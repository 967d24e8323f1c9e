"""Pictures while training: when, where, with which weights, and that a failing one costs nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import library.training.sample_images as samples
from library.diffusion.predictions import EPSILON, VELOCITY
from library.inference.drawing_model import DrawingModel
from library.inference.picture_request import PictureRequest
from library.inference.prompt_syntax import parse_prompt
from library.inference.text_to_image import draw
from library.models.conditioning import TextConditioner
from tests.tools.network_runs import Built, NetworkSetting, adapter, losses

PROMPTS = {
    "p.txt": "a cat --w 64 --h 64 --s 2 --d 7\na dog --w 64 --h 128 --s 1 --ss ddim",
    "p.json": json.dumps([{"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 2, "seed": 7}]),
}


def pictures(output: Path) -> list[str]:
    """Names without the moment they were drawn at."""
    return sorted(re.sub(r"_\d{14}", "", path.name) for path in (output / "sample").glob("*.png"))


@pytest.mark.bits
def test_prompts_are_drawn_when_it_is_their_turn_and_change_no_bit(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    """Before the first step, after each epoch and at the end; the training is that of a run without."""
    for name, text in PROMPTS.items():
        (tmp_path / name).write_text(text)
    options = {**network_setting.quick, "network_dropout": 0.1}
    assert network_setting.train(tmp_path / "none", **options) == 0
    output = tmp_path / "txt"
    words = {"sample_prompts": tmp_path / "p.txt", "sample_every_n_epochs": 1, "sample_at_first": ""}
    assert network_setting.train(output, **options, **words) == 0
    assert pictures(output) == [
        f"mio_e{epoch:06d}_{name}.png" for epoch in (0, 1, 2) for name in ("00_7", "01_43")
    ]  # fmt: skip
    a, b = adapter(output / "mio.safetensors"), adapter(tmp_path / "none" / "mio.safetensors")
    assert losses(output) == losses(tmp_path / "none") and all(torch.equal(a[name], b[name]) for name in a)
    first, last = (np.asarray(Image.open(next((output / "sample").glob(f"*e00000{n}_00_*")))) for n in (0, 2))
    assert first.shape == (64, 64, 3) and not np.array_equal(first, last)
    changed = {**options, "sample_prompts": tmp_path / "p.json", "sample_every_n_steps": 3}
    assert network_setting.train(tmp_path / "json", **changed) == 0
    assert pictures(tmp_path / "json") == ["mio_000003_00_7.png", "mio_e000002_00_7.png"]
    same = np.asarray(Image.open(next((tmp_path / "json" / "sample").glob("*e000002*"))))
    assert np.array_equal(same, last), "the same prompt in another form, from the same weights"


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("network_setting", {"mixed_precision": "fp16"}),
        ("sdxl_setting", {"mixed_precision": "bf16", "max_token_length": 150, "fp8_base": ""}),
    ],
    ids=["sd15-fp16", "sdxl-bf16-fp8"],
)
def test_prompts_are_drawn_in_every_precision(
    setting: str, changes: dict[str, object], request: pytest.FixtureRequest, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    owner: NetworkSetting = request.getfixturevalue(setting)
    (tmp_path / "p.json").write_text(PROMPTS["p.json"])
    options = {**owner.quick, "network_train_unet_only": None, "cache_text_encoder_outputs": None, **changes}
    options |= {"max_train_steps": 1, "max_train_epochs": None, "sample_prompts": tmp_path / "p.json"}
    assert owner.train(tmp_path / "out", **options) == 0
    assert "drew 1 sample in" in capsys.readouterr().out and pictures(tmp_path / "out") == ["mio_000001_00_7.png"]


def test_a_failing_sample_is_a_warning(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text(PROMPTS["p.txt"])

    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel\nwith a second line")

    monkeypatch.setattr(samples, "draw", fail)
    options = {**network_setting.quick, "max_train_epochs": 1, "sample_prompts": tmp_path / "p.txt"}
    assert network_setting.train(tmp_path / "out", **options) == 0
    assert "warning: samples at step 2 could not be drawn: no such kernel\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "mio.safetensors").exists()
    # And so is a file that was spoilt meanwhile.
    monkeypatch.setattr(samples, "check_prompts", lambda *_: None)
    (tmp_path / "p.txt").write_text("a cat --ar 3")
    assert network_setting.train(tmp_path / "other", **options) == 0
    assert "could not be drawn: --ar is no switch of a prompt" in capsys.readouterr().out


def test_the_prompts_are_read_by_the_encoders_of_the_run(network_setting: NetworkSetting) -> None:
    """With clip_skip, and adapters at full strength whatever the last batch was trained at; long prompts in A1111's chunks."""
    built = network_setting.build(clip_skip=2, max_token_length=150).stir()
    built.task.losses(replace(built.batch(), multiplier=0.0), torch.Generator(), 0)
    told: list[Any] = []

    def spy(model: DrawingModel, request: PictureRequest, seeds: list[int]) -> list[Image.Image]:
        encoder = model.encoder(request.clip_skip, request.emphasis)
        (part,) = encoder.encode(parse_prompt(request.prompt, request.steps))
        told.append((part.texts[0].states, next(iter(built.task.network.layers.values())).multiplier))
        return draw(model, request, seeds)

    sampler = sampler_of(built)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(samples, "draw", spy)
        patch.setattr(samples, "save_png", lambda *_: None)
        long = f"a cat, {'red ' * 80}"
        lines = [samples.PromptLine(text, width=64, height=64, sample_steps=1) for text in ("a cat", long)]
        sampler._draw(lines, 0)
        (short, multiplier), (of_long, _) = told
        assert multiplier == 1.0 and of_long.shape[1] == 154
        assert built.task.text.conditioner is not None
        alone = TextConditioner(built.prepared.family, built.task.text.conditioner.parts, clip_skip=2)
        torch.testing.assert_close(short, alone(["a cat"]).states)
    assert all(model.training for model in built.task.models.values())


@pytest.mark.bits
def test_what_is_drawn_is_what_is_trained(network_setting: NetworkSetting) -> None:
    """The run's process, and velocities where kohya's option says that the network predicts them."""
    for words, velocities in (({}, False), ({"v_parameterization": "", "zero_terminal_snr": ""}, True)):
        built = network_setting.build(**words)
        drawn = sampler_of(built)._model().parametrisation
        assert drawn is built.task.objective.parametrisation
        assert drawn.output is (VELOCITY if velocities else EPSILON) and drawn.ends_in_noise is velocities
        built.close()


def test_tags_of_other_adapters_are_left_out(
    network_setting: NetworkSetting, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = sampler_of(network_setting.build())
    request = sampler._request(samples.PromptLine("a cat <lora:x:1>", sample_sampler="euler_a"), 64)
    assert (request.prompt, request.sampler_and_schedule) == ("a cat ", ("Euler a", "Normal"))
    assert "samples: <lora:x:1> left out" in capsys.readouterr().out


def sampler_of(built: Built) -> samples.Sampler:
    from types import SimpleNamespace

    from library.training.run import make_trained

    run: Any = SimpleNamespace(
        plan=built.plan, processes=built.task.processes, trained=make_trained(built.options, built.task), log=None
    )
    return samples.Sampler(built.options, built.prepared, run, built.task, 0, resumed=False)
