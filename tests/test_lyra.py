"""Lyra: its mathematics against slow references, train_lyra.py to the bit, and --text_fusion in drawing and training."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_lyra
from library.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, UserError
from library.inference.prompt_encoding import PromptEncoder
from library.inference.prompt_syntax import parse_prompt
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
from library.options.text_fusion import TextFusionOptions
from library.training.lyra_task import LyraTask
from networks import AdapterError
from networks.families import SD15, SDXL, Family
from networks.lyra import (
    Lyra,
    LyraSpec,
    Posterior,
    TokenFusion,
    cantor_neighbours,
    lyra_losses,
    neighbour_mask,
    new_lyra,
)
from tests.tools import generating
from tests.tools.network_runs import NetworkSetting, metadata
from tests.tools.runs import assert_equal_states, copy_until, metric_rows

SPEC = LyraSpec((6, 5, 4), latent=8, hidden=12, depth=3, heads=2)
CAPTIONS = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue", "Pink, dark") for shape in ("circle", "cat", "ring")
]


def some_states(widths: Sequence[int] = SPEC.widths, batch: int = 2, length: int = 5) -> list[Tensor]:
    """Of each encoder; all but the first have no text from the third position of the first sample on."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(batch, length, width, generator=generator) for width in widths]
    for own in states[1:]:
        own[0, 2:] = 0
    return states


def settled(spec: LyraSpec = SPEC) -> Lyra:
    lyra = new_lyra(spec, 0)
    generator = torch.Generator().manual_seed(1)
    lyra.measure(
        [torch.randn(width, generator=generator) for width in spec.widths],
        [torch.rand(width, generator=generator) + 0.5 for width in spec.widths],
    )
    return lyra


# ----------------------------------------------------------------------------------------------------- mathematics


def test_the_losses_are_those_of_a_slow_reference() -> None:
    lyra, states = settled(), some_states()
    posterior = lyra.encode(states)
    latents = posterior.sample(torch.Generator().manual_seed(2))
    found = lyra_losses(lyra, states, posterior, latents)

    decoded = lyra.decode(latents)
    per_encoder: list[list[float]] = [[] for _ in states]
    divergences, distances = [], {}
    for b in range(2):
        for t in range(5):
            for mean, log_variance in zip(
                posterior.mean[b, t].tolist(), posterior.log_variance[b, t].tolist(), strict=True
            ):
                one, other = (
                    torch.distributions.Normal(mean, math.exp(log_variance / 2)),
                    torch.distributions.Normal(0.0, 1.0),
                )
                divergences.append(torch.distributions.kl_divergence(one, other).item())
            said = {}
            for number, side in enumerate(lyra.each):
                if not states[number][b, t].any():
                    continue
                scaled = (decoded[number][b, t] - states[number][b, t]) / side.deviation
                per_encoder[number].append((scaled @ scaled).item() / len(scaled))
                vector = side.project((decoded[number][b, t] - side.mean) / side.deviation)
                said[number] = vector / vector.norm()
            for i in said:
                for j in range(i):
                    distances.setdefault((i, j), []).append(2 - 2 * (said[i] @ said[j]).item())
    mean_of = lambda values: sum(values) / len(values)  # noqa: E731
    assert found.reconstruction.item() == pytest.approx(mean_of([mean_of(errors) for errors in per_encoder]), rel=1e-4)
    assert found.kl.item() == pytest.approx(mean_of(divergences), rel=1e-4)
    assert found.cross.item() == pytest.approx(mean_of([mean_of(distances[pair]) for pair in distances]), rel=1e-4)
    assert [len(errors) for errors in per_encoder] == [10, 7, 7] and len(distances) == 3


def test_fusion_is_attention_over_the_encoders_that_have_text() -> None:
    torch.manual_seed(0)
    fusion = TokenFusion(SPEC)
    tokens, present = torch.randn(1, 4, 3, 8), torch.ones(1, 4, 3, dtype=torch.bool)
    present[0, 1, 1] = present[0, 2, 1:] = False
    found = fusion(tokens, present)
    for t in range(4):
        there = [m for m in range(3) if present[0, t, m]]
        q, k, v = fusion.to_qkv(fusion.norm(tokens[0, t])).chunk(3, dim=-1)
        fused = []
        for m in there:
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = torch.stack([q[m, head] @ k[n, head] / 2 for n in there]).softmax(0)
                heads.append(sum(w * v[n, head] for w, n in zip(weights, there, strict=True)))
            fused.append(tokens[0, t, m] + fusion.to_out(torch.cat(heads)))
        torch.testing.assert_close(found[0, t], torch.stack(fused).mean(0))


def test_an_encoder_without_text_at_a_position_says_nothing_there() -> None:
    lyra, states = settled(), some_states()
    before = lyra.encode(states).mean
    with torch.no_grad():
        for side in lyra.each[1:]:
            side.modality += 1.0
    changed = (lyra.encode(states).mean != before).any(dim=-1)
    assert changed.tolist() == [[True, True, False, False, False], [True] * 5]


def test_every_encoder_gets_states_of_its_own_width_and_scale_back() -> None:
    lyra, states = settled(), some_states()
    assert [own.shape for own in lyra(states)] == [own.shape for own in states]
    assert Posterior(torch.zeros(3), torch.full((3,), -80.0)).sample(torch.Generator()).abs().max() < 1e-12
    with torch.no_grad():
        for side in lyra.each:
            side.decoder[-1].weight.zero_(), side.decoder[-1].bias.zero_()  # type: ignore[operator]
    for own, side in zip(lyra(states), lyra.each, strict=True):
        assert torch.equal(own[1, 3], side.mean)


def test_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    one = new_lyra(SPEC, 3).state_dict()
    state = torch.get_rng_state()
    two = new_lyra(LyraSpec((6, 9, 4), 8, 12, 3, 2), 3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    same = [name for name in one if one[name].shape == two[name].shape]
    assert all(torch.equal(one[name], two[name]) for name in same) and len(same) > 20
    assert not torch.equal(one["encoder.0.weight"], new_lyra(SPEC, 4).state_dict()["encoder.0.weight"])


# ----------------------------------------------------------------------- what of the card is prose: docs/flow.md


def test_cantor_neighbours_of_a_sequence_are_one_window() -> None:
    pairing = [(i + 0) * (i + 0 + 1) // 2 + 0 for i in range(512)]  # Cantor's pi(i, 0)
    windows = cantor_neighbours(512, 64).sort(dim=1).values
    assert int((windows[:, -1] - windows[:, 0] == 63).sum()) == 512
    for place in (0, 1, 100, 511):
        nearest = sorted(range(512), key=lambda other: abs(pairing[place] - pairing[other]))[:64]
        assert sorted(nearest) == windows[place].tolist()


def test_cantor_routing_over_two_or_three_encoders_is_dense_attention() -> None:
    for count in (2, 3):
        assert bool(neighbour_mask(cantor_neighbours(count, min(3, count))).all())
        widths = SPEC.widths[:count]
        dense, routed = (new_lyra(LyraSpec(widths, 8, 12, 2, 2, kind), 0) for kind in ("attention", "cantor"))
        states = some_states(widths)
        assert torch.equal(dense.encode(states).mean, routed.encode(states).mean)
    four = SPEC.widths + (3,)
    dense, routed = (new_lyra(LyraSpec(four, 8, 12, 2, 2, kind), 0) for kind in ("attention", "cantor"))
    assert not torch.equal(dense.encode(some_states(four)).mean, routed.encode(some_states(four)).mean)


# ------------------------------------------------------------------------------------------------------- train_lyra


class LyraSetting:
    def __init__(self, folder: Path, base: Path, t5: Path) -> None:
        folder.mkdir()
        self.captions = folder / "captions.txt"
        self.captions.write_text("\n".join(CAPTIONS) + "\n\n" + CAPTIONS[0])
        self.options: dict[str, object] = {
            "captions": self.captions, "pretrained_model_name_or_path": base, "encoders": t5, "cache_dir": folder / "cache",
            "device": "cpu", "hidden_dim": 32, "depth": 2, "train_batch_size": 4, "max_train_steps": 6, "ema_decay": 0.5,
            "save_every_n_steps": 2, "validate_every_n_steps": 2, "log_every_n_steps": 1, "validation_split": 0.2,
            "learning_rate": 1e-2, "cross_weight": 0.05, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        }  # fmt: skip

    def train(self, output: Path, *extra: str, **changes: object) -> int:
        options = {**self.options, "output_dir": output, **changes}
        given = {name: value for name, value in options.items() if value is not None}
        return train_lyra.main(
            [word for name, value in given.items() for word in (f"--{name}", *str(value).split())] + [*extra]
        )


@pytest.fixture(scope="module")
def lyra_setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_t5: Path) -> LyraSetting:
    return LyraSetting(tmp_path_factory.mktemp("lyra") / "data", tiny_sd15, tiny_t5)


@pytest.fixture(scope="module")
def fusion_run(lyra_setting: LyraSetting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a whole run. Read it only."""
    output = tmp_path_factory.mktemp("fusion") / "out"
    assert lyra_setting.train(output) == EXIT_OK
    return output


@pytest.fixture(scope="module")
def fusion_file(fusion_run: Path) -> Path:
    return fusion_run / "lyra.safetensors"


@pytest.mark.bits
def test_ctrl_c_and_the_same_command_again_give_the_bits_of_the_uninterrupted_run(
    lyra_setting: LyraSetting, fusion_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    losses = LyraTask.losses

    def interrupted(self: LyraTask, batch: Any, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(self, batch, generator, step)

    with monkeypatch.context() as patched:
        patched.setattr(LyraTask, "losses", interrupted)
        assert lyra_setting.train(tmp_path / "out") == EXIT_STOPPED == 75
    assert "Stopped at step 3 of 6 by SIGINT" in capsys.readouterr().err
    assert lyra_setting.train(tmp_path / "out") == EXIT_OK
    assert "resuming from" in capsys.readouterr().out
    assert_equal_states(fusion_run / "step_000006", tmp_path / "out" / "step_000006")
    for name in ("lyra.safetensors", "lyra-ema.safetensors"):
        one, other = (load_file(folder / name) for folder in (fusion_run, tmp_path / "out"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert lyra_setting.train(tmp_path / "out") == EXIT_OK
    assert "Nothing is left to do" in capsys.readouterr().out


def test_it_learns_and_says_what(fusion_run: Path) -> None:
    losses = [row["train/loss"] for row in metric_rows(fusion_run)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    last = metric_rows(fusion_run, "val/loss")[-1]
    assert {"val/reconstruction", "val/kl", "val/cross", "val/cosine_text_encoder", "val/cosine_tiny-t5"} <= last.keys()
    header = read_fusion(fusion_run / "lyra.safetensors")
    assert header.family is SD15 and header.clip_skip == 1 and header.others == ["tiny-t5"]
    assert header.spec.widths == (64, 48) and header.spec.latent == 64


def test_other_captions_and_other_options_are_another_run(
    lyra_setting: LyraSetting, fusion_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_until(fusion_run, tmp_path / "out", 2)
    assert lyra_setting.train(tmp_path / "out", kl_weight=0.5) == EXIT_BAD_INPUT
    assert "kl_weight was 0.001, is 0.5" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("\n".join(CAPTIONS[:-1]))
    assert lyra_setting.train(tmp_path / "out", captions=other) == EXIT_BAD_INPUT
    assert "cannot be continued exactly: the training samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"captions": "nowhere.txt"}, "captions nowhere.txt does not exist"),
        ({"encoders": "nowhere"}, "nowhere does not exist"),
        ({"fusion_heads": 7}, "7 heads do not divide 64 latent channels"),
        ({"encoders": "a/b a/b"}, "encoders names a/b twice"),
        ({"empty_share": 1}, "empty_share must be at least 0 and below 1"),
        ({"train_batch_size": 99}, "Lower train_batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(
    lyra_setting: LyraSetting, tmp_path: Path, capsys: Any, changes: dict[str, object], said: str
) -> None:
    assert lyra_setting.train(tmp_path / "out", **changes) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_what_is_no_text_encoder_is_refused(tiny_dinov2: Path, tiny_t5: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="describes a dinov2. A T5 or a CLIP is needed"):
        load_language(locate_language(str(tiny_dinov2)), dtype=torch.float32, device="cpu")
    broken = shutil.copytree(tiny_t5, tmp_path / "t5")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is no readable tokenizer"):
        load_language(locate_language(str(broken)), dtype=torch.float32, device="cpu")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_language(locate_language(str(broken)), dtype=torch.float32, device="cpu")


def test_the_plan_needs_no_models(
    lyra_setting: LyraSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lyra_setting.train(tmp_path / "out", "--dry_run", encoders="google-t5/t5-base") == EXIT_OK
    said = capsys.readouterr().out
    assert "steps            6 (" in said and "missing          google-t5/t5-base is not on this machine" in said
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- other encoders


def test_t5_states_are_those_of_the_text_alone_and_zeros_behind_it(tiny_t5: Path) -> None:
    t5 = load_language(locate_language(str(tiny_t5)), dtype=torch.float32, device="cpu")
    ids = t5.ids(["a red circle", ""])
    assert ids.shape == (2, 77) and (ids != 0).sum(dim=1).tolist() == [4, 1]
    states = t5.states(ids)
    alone = t5.model(input_ids=ids[:1, :4]).last_hidden_state
    torch.testing.assert_close(states[:1, :4], alone, rtol=1e-4, atol=1e-5)
    assert not states[0, 4:].any() and t5.overlong(["a " * 76, "a " * 77]) == [1]


# ----------------------------------------------------------------------------------------------------- text fusion


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
        LyraSpec((4,), 8)


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
