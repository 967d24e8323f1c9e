"""Lyra: its mathematics against slow references, and train_lyra.py: exactness, refusals, what it reads."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.data.caption_lists import demo_captions
from library.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, UserError
from library.models.language import load_language
from library.models.language_files import locate_language
from library.models.text_fusion import (
    read_fusion,
)
from library.options.lyra import parse_lyra_options
from library.training.lyra_inputs import read_captions
from library.training.lyra_task import LyraTask
from networks.families import SD15
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
from tests.tools.lyra_runs import CAPTIONS, LyraSetting
from tests.tools.network_runs import CAPTIONS as PICTURES
from tests.tools.network_runs import NetworkSetting
from tests.tools.runs import assert_equal_states, copy_until, metric_rows

SPEC = LyraSpec((6, 5, 4), latent=8, hidden=12, depth=3, heads=2)


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


def test_captions_come_from_data_sets_a_file_or_the_generated_pictures(network_setting: NetworkSetting) -> None:
    sets = network_setting.dataset(more="[lyra]\nkl_weight = 0.5")

    def read(*argv: str) -> tuple[float, list[str]]:
        options = parse_lyra_options(list(argv), prog="train_lyra.py", description=None)
        return options.lyra.kl_weight, read_captions(options)

    assert read("--dataset_config", str(sets)) == (0.5, list(PICTURES))
    assert read("--dataset_config", str(sets), "--captions", "demo") == (0.5, demo_captions())
    assert read() == (0.001, demo_captions()) and len(set(demo_captions())) > 1000


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
