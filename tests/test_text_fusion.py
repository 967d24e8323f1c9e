"""--text_fusion: what prompts are conditioned by, in drawing and training; files that do not fit are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.files import file_hash
from library.inference.prompt_encoding import PromptEncoder
from library.inference.prompt_syntax import parse_prompt
from library.merging.source import read_source
from library.models.conditioning import TextConditioner
from library.models.language import load_language
from library.models.language_files import locate_language
from library.models.load import load_text_encoders
from library.models.text_fusion import (
    FusedEncoder,
    FusionHeader,
    TextFusion,
    check_fusion,
    fusion_tensors,
    load_fusion,
    probe_states,
    read_fusion,
)
from library.options.repa import parse_repa_options
from library.options.text_fusion import TextFusionOptions
from library.processes import Processes
from library.training.caches import class_preparation
from networks import AdapterError
from networks.families import SD15, SDXL, Family
from networks.lyra import (
    Lyra,
    LyraSpec,
    new_lyra,
)
from tests.tools import generating
from tests.tools.network_runs import NetworkSetting, metadata
from tests.tools.runs import RepaSetting


@pytest.fixture
def fusion_file(fusion_run: Path) -> Path:
    return fusion_run / "lyra.safetensors"


def options_of(file: Path, *encoders: Path) -> TextFusionOptions:
    return TextFusionOptions(file, tuple(map(str, encoders)))


def fused(family: Family, base: Path, options: TextFusionOptions) -> TextConditioner:
    parts = load_text_encoders(str(base))
    fusion = load_fusion(options, family, parts, dtype=torch.float32, device="cpu")
    return TextConditioner(family, parts, fusion=fusion)


def test_prompts_are_conditioned_by_what_the_fusion_decodes(fusion_file: Path, tiny_sd15: Path, tiny_t5: Path) -> None:
    conditioner = fused(SD15, tiny_sd15, options_of(fusion_file, tiny_t5))
    prompts = ["A Red circle, large", ""]
    plain = TextConditioner(SD15, conditioner.parts)(prompts).states
    t5 = load_language(locate_language(str(tiny_t5)), dtype=torch.float32, device="cpu")
    lyra = Lyra(read_fusion(fusion_file).spec)
    tensors = {name: value for name, value in load_file(fusion_file).items() if not name.startswith("probe.")}
    lyra.load_state_dict(tensors, strict=True)
    expected = lyra([plain, t5.states(t5.ids(["a red circle , large", ""]))])[0]
    found = conditioner(prompts).states
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain, atol=1e-2)
    encoder = PromptEncoder(SD15, conditioner.parts, fusion=conditioner.fusion)
    for row, prompt in enumerate(prompts):
        (part,) = encoder.encode(parse_prompt(prompt, 1))
        torch.testing.assert_close(part.texts[0].states[0], found[row], rtol=1e-4, atol=1e-5)


def test_sdxl_fuses_both_clips_and_any_number_of_others(
    tiny_sdxl: Path, tiny_t5: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    parts = load_text_encoders(str(tiny_sdxl))
    clip = tmp_path / "clip"
    shutil.copytree(tiny_sd15 / "text_encoder", clip)
    for file in (tiny_sd15 / "tokenizer").iterdir():
        shutil.copy(file, clip)
    others = [load_language(locate_language(str(path)), dtype=torch.float32, device="cpu") for path in (tiny_t5, clip)]
    probes = probe_states(SDXL, parts, others, 1)
    spec = LyraSpec(tuple(probe.shape[-1] for probe in probes), 16, 16, 2, 2, "cantor")
    assert spec.widths == (32, 48, 48, 64)
    encoders = [FusedEncoder(name, "", True) for name in SDXL.text_encoders]
    encoders += [FusedEncoder("t5", "", False), FusedEncoder("clip", "", False)]
    file = tmp_path / "xl.safetensors"
    lyra = new_lyra(spec, 0)
    save_file(
        fusion_tensors(lyra, probes, torch.float32), file, FusionHeader(file, SDXL, 1, tuple(encoders), spec).metadata()
    )
    conditioner = fused(SDXL, tiny_sdxl, options_of(file, tiny_t5, clip))
    plain, found = TextConditioner(SDXL, parts)(["a cat"]), conditioner(["a cat"])
    assert found.states.shape == plain.states.shape and not torch.allclose(found.states, plain.states)
    assert found.pooled is not None and plain.pooled is not None and torch.equal(found.pooled, plain.pooled)
    states = [*plain.states.split(spec.widths[:2], dim=-1), *(o.states(o.ids(["a cat"])) for o in others)]
    assert [own.shape for own in lyra(states)] == [own.shape for own in states]


def test_another_family_layer_encoder_or_weights_are_refused_by_name(
    fusion_file: Path, tiny_sd15: Path, tiny_sdxl: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    options = options_of(fusion_file, tiny_t5)
    with pytest.raises(UserError, match="is a text fusion for SD1.5, and the base is SDXL"):
        check_fusion(options, SDXL, 1)
    with pytest.raises(UserError, match="on the states of clip_skip 1, and clip_skip is 2 here"):
        check_fusion(options, SD15, 2)
    with pytest.raises(UserError, match="names 2, and .* was trained with 1 beside the base's own: tiny-t5"):
        check_fusion(options_of(fusion_file, tiny_t5, tiny_t5), SD15, 1)
    with pytest.raises(UserError, match="with the text encoder tiny-t5. nowhere does not exist"):
        check_fusion(options_of(fusion_file, Path("nowhere")), SD15, 1)
    parts = load_text_encoders(str(tiny_sd15))
    with torch.no_grad():
        for parameter in parts[0].model.parameters():
            parameter *= 1.3
    with pytest.raises(UserError, match="other weights of the base's text encoder"):
        load_fusion(options, SD15, parts, dtype=torch.float32, device="cpu")
    other = shutil.copytree(tiny_t5, tmp_path / "t5")
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    mixed = {name: value[torch.randperm(len(value), generator=generator)] for name, value in weights.items()}
    save_file(mixed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other weights of the text encoder tiny-t5"):
        fused(SD15, tiny_sd15, options_of(fusion_file, other))


def test_half_precision_is_no_other_encoder(fusion_file: Path, tiny_sd15: Path, tiny_t5: Path) -> None:
    parts = load_text_encoders(str(tiny_sd15), dtype=torch.bfloat16)
    fusion = load_fusion(options_of(fusion_file, tiny_t5), SD15, parts, dtype=torch.bfloat16, device="cpu")
    states = TextConditioner(SD15, parts, fusion=fusion)(["a cat"]).states
    assert isinstance(fusion, TextFusion) and states.dtype == torch.bfloat16


def test_files_that_are_no_fusion_or_damaged_are_refused(
    fusion_file: Path, adapter_file: Path, tiny_sd15: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    tensors, said = load_file(fusion_file), metadata(fusion_file)
    described = json.loads(said["lyra"])
    file = tmp_path / "bad.safetensors"

    def refused(match: str, tensors: dict[str, Tensor] = tensors, **changes: object) -> None:
        save_file(tensors, file, {"lyra": json.dumps({**described, **changes})})
        with pytest.raises(UserError, match=match):
            fused(SD15, tiny_sd15, options_of(file, tiny_t5))

    with pytest.raises(UserError, match="It looks like a text fusion of train_lyra.py"):
        read_source(fusion_file)
    with pytest.raises(UserError, match="is no text fusion: its metadata has no entry lyra"):
        read_fusion(adapter_file)
    file.write_bytes(fusion_file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_fusion(file)
    refused("damaged text fusion: it is of format 9", format_version=9)
    refused("damaged text fusion: KeyError", family="sd3")
    refused("damaged text fusion", encoders=[{}])
    refused("do not belong together", encoders=[*described["encoders"], described["encoders"][1]])
    spec = json.loads(described["spec"])
    refused("whole numbers from 1 to 65536", spec=json.dumps(spec | {"hidden": 10**9}))
    refused("at most 32 layers", spec=json.dumps(spec | {"depth": 60000}))
    refused("it describes no Lyra", spec=json.dumps(spec | {"shell": "rm"}))
    refused("does not fit a Lyra", {k: v for k, v in tensors.items() if k != "encoder.0.bias"})
    refused("values that are not finite", {**tensors, "encoder.0.bias": tensors["encoder.0.bias"] * math.nan})
    refused("said of the probe is missing", {k: v for k, v in tensors.items() if k != "probe.0"})
    with pytest.raises(AdapterError, match="2 to 16 text encoders"):
        LyraSpec((4,), 8, 8)


def test_generate_draws_with_the_fusion_and_says_so(
    fusion_file: Path, tiny_sd15: Path, tiny_t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrained_model_name_or_path", tiny_sd15, "--device", "cpu", "--images", "1"]
    fusion = ["--text_fusion", fusion_file, "--text_fusion_encoders", tiny_t5]
    assert generating.run(*words, "--output", tmp_path / "plain.png") == EXIT_OK
    assert generating.run(*words, *fusion, "--output", tmp_path / "fused.png") == EXIT_OK
    plain, drawn = (Image.open(tmp_path / name) for name in ("plain.png", "fused.png"))
    assert plain.tobytes() != drawn.tobytes()
    assert "Text fusion: lyra.safetensors" in drawn.info["parameters"]
    assert f"fusion     {fusion_file}" in capsys.readouterr().out
    assert generating.run(*words, *fusion, "--clip_skip", "2", "--output", tmp_path / "x.png") == EXIT_BAD_INPUT
    assert "trained on the states of clip_skip 1" in capsys.readouterr().err
    assert generating.run(*words, "--text_fusion", tmp_path / "no.safetensors") == EXIT_BAD_INPUT
    assert "does not exist" in capsys.readouterr().err


def test_training_takes_fused_states_and_caches_them_apart(
    fusion_file: Path,
    network_setting: NetworkSetting,
    tiny_t5: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {**network_setting.quick, "text_fusion": fusion_file, "text_fusion_encoders": tiny_t5}
    plain, built = network_setting.build(**network_setting.quick), network_setting.build(**changes)
    one, other = plain.prepared.text, built.prepared.text
    assert one.states.path != other.states.path  # type: ignore[union-attr]
    encoded = network_setting.build(**{**changes, "cache_text_encoder_outputs": None})
    batch, cached = encoded.batch(), built.batch()
    in_step = encoded.task.text.condition(batch, None).states
    torch.testing.assert_close(in_step, built.task.text.condition(cached, None).states.float(), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(in_step, plain.task.text.condition(plain.batch(), None).states.float(), atol=1e-2)
    for run in (plain, built, encoded):
        run.close()
    assert network_setting.train(tmp_path / "out", **{**changes, "network_train_unet_only": None}) == EXIT_BAD_INPUT
    assert "Add --network_train_unet_only" in capsys.readouterr().err
    assert network_setting.train(tmp_path / "out", **{**changes, "clip_skip": 2}) == EXIT_BAD_INPUT
    assert "trained on the states of clip_skip 1" in capsys.readouterr().err


def test_prompts_of_classes_are_fused_and_their_file_knows_by_what(
    fusion_file: Path, repa_setting: RepaSetting, tiny_t5: Path, tmp_path: Path
) -> None:
    fusion = {"text_fusion": fusion_file, "text_fusion_encoders": tiny_t5}
    prompts = {}
    for name, changes in (("plain", {}), ("fused", fusion)):
        options = parse_repa_options(repa_setting.argv(tmp_path, **changes), prog="x", description=None)
        preparation = class_preparation(options, Processes("cpu"), SD15)
        prompts[name] = preparation.encoder("text")(["a cat"]).states, preparation._text_producer()
    assert not torch.allclose(prompts["plain"][0], prompts["fused"][0], atol=1e-2)
    assert prompts["fused"][1] == prompts["plain"][1] | {"text_fusion": file_hash(fusion_file)}
