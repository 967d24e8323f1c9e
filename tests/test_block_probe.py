"""The block probe: what is read only because the network was told, what is in the input, clusters, files and the script."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

import evaluate
from library.diffusion.level_accuracy import LevelAccuracy
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.evaluation.block_pictures import generated
from library.evaluation.block_probe import BlockProbe, BlockProbeSettings, LabelledPictures, Prober
from library.evaluation.clusters import chance_information, k_means, normalised_mutual_information
from library.models.sd15_configs import SD15_SCHEDULER
from tests.test_evaluate import write_photos

COUNT, BINS = 72, 5
SETTINGS = BlockProbeSettings(bins=BINS, parts=BINS, prototypes=2, batch_size=400)
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid", "up_blocks.0", "up_blocks.1"]


@functools.cache
def wide_unet() -> UNet2DConditionModel:
    """Two blocks down and up, wide enough to carry its timestep: of eight channels it gets lost."""
    names = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"block_out_channels": (32, 64), "cross_attention_dim": 8, "attention_head_dim": 8, "layers_per_block": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**names, **sizes, norm_num_groups=8).eval().requires_grad_(False)


def pictures(structured: bool) -> LabelledPictures:
    """Smooth ones of two classes, dark and light; or noise, which no noise that is added makes any different."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 2
    if structured:
        small = torch.randn(COUNT, 4, 2, 2, generator=generator) * 0.5
        latents = F.interpolate(small, size=8, mode="bilinear") + (labels * 2.0 - 1)[:, None, None, None]
    else:
        latents = torch.randn(COUNT, 4, 8, 8, generator=generator)
    return LabelledPictures(latents, [f"p{number}" for number in range(COUNT)], labels, "class")


def probed(shown: LabelledPictures) -> BlockProbe:
    prober = Prober(parametrisation_of(SD15_SCHEDULER), shown, SETTINGS)
    return prober.result({"base": prober.probe("base", wide_unet(), predict)})


def predict(noisy: Tensor, timesteps: Tensor) -> object:
    return wide_unet()(noisy, timesteps, torch.zeros(len(noisy), 3, 8))


@pytest.fixture(scope="module")
def of_noise() -> BlockProbe:
    return probed(pictures(structured=False))


@pytest.fixture(scope="module")
def of_pictures() -> BlockProbe:
    return probed(pictures(structured=True))


def mean(found: BlockProbe, control: str, what: str = "accuracy") -> Tensor:
    """By block."""
    return torch.tensor([getattr(reading[control], what).mean for reading in found.models["base"].values()])  # type: ignore[index]


def test_of_noise_only_what_the_network_was_told_is_read(of_noise: BlockProbe) -> None:
    assert of_noise.blocks == BLOCKS and of_noise.chance == 0.2
    told = dict(zip(BLOCKS, mean(of_noise, "fed").tolist(), strict=True))
    assert min(told["mid"], told["up_blocks.1"]) > 2 * of_noise.chance
    # Over five blocks and 135 held-out inputs; of one block the deviation by chance is 0.034.
    assert abs(mean(of_noise, "frozen").mean().item() - of_noise.chance) < 0.05
    assert abs(mean(of_noise, "fed", "label").mean().item() - 0.5) < 0.1, "and noise has no classes"


def test_of_pictures_the_noise_is_seen_in_the_input_too(of_pictures: BlockProbe) -> None:
    assert mean(of_pictures, "fed")[BLOCKS.index("mid")] > 0.5
    assert (mean(of_pictures, "frozen") > 2 * of_pictures.chance).all()
    assert mean(of_pictures, "fed").mean() > mean(of_pictures, "frozen").mean()
    frozen = of_pictures.models["base"]["down_blocks.0"]["frozen"]
    assert frozen.off < 1 and len(frozen.by_bin) == BINS
    torch.testing.assert_close(torch.tensor(frozen.confusion).sum(dim=1), torch.ones(BINS))


def test_classes_are_read_and_found_as_clusters_where_there_is_little_noise(of_pictures: BlockProbe) -> None:
    reading = of_pictures.models["base"]["up_blocks.1"]["fed"]
    assert reading.label is not None and reading.pattern is not None and reading.shuffled is not None
    assert of_pictures.label_chance == pytest.approx(0.5, abs=0.1)
    assert reading.label.values[-1] > 0.95 > reading.label.values[0], "the last part has the least noise"
    assert reading.pattern.values[-1] > reading.pattern.values[0] + 0.1
    assert reading.shuffled.mean < 0.05
    tap = re.match(r"For alignment, tap ([\w.]+): of the 5 blocks", of_pictures.recommendation()[0])
    assert tap is not None and tap[1] == max(BLOCKS, key=lambda block: mean_of(of_pictures, block))


def test_without_labels_there_is_no_recommendation() -> None:
    shown = pictures(structured=True)
    few = LabelledPictures(shown.latents[:12], shown.ids[:12], None, "caption cluster")
    found = probed(few)
    assert found.recommendation()[0].startswith("Nothing can be said of where to tap")
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["models"]["base"]["mid"]["fed"]["label"] is None
    with pytest.raises(UserError, match="at least 12 pictures, and there are 5"):
        LabelledPictures(shown.latents[:5], shown.ids[:5], None, "")


@pytest.mark.bits
def test_it_is_the_same_each_time_and_models_are_compared_in_pairs(
    of_pictures: BlockProbe, of_noise: BlockProbe
) -> None:
    prober = Prober(parametrisation_of(SD15_SCHEDULER), pictures(structured=True), SETTINGS)
    again = prober.read(prober.features(wide_unet(), predict, "frozen")["mid"])
    assert again == of_pictures.models["base"]["mid"]["frozen"]
    both = replace(of_pictures, models={"base": of_noise.models["base"], "other": of_pictures.models["base"]})
    nothing, more = (
        both.change("base", "up_blocks.1", "fed", "label"),
        both.change("other", "up_blocks.1", "fed", "label"),
    )
    assert nothing is not None and nothing.value == 0 and not nothing.is_significant
    assert more is not None and more.value > 0.3 and more.is_significant


def test_the_file_of_bins_is_what_is_read_with_the_timestep_frozen(of_pictures: BlockProbe, tmp_path: Path) -> None:
    of_pictures.level_accuracy("base").write(tmp_path / "timestep_bins.json")
    found = LevelAccuracy.read(tmp_path / "timestep_bins.json")
    assert len(found.accuracy) == BINS and found.facts["model"] == "base"
    assert found.log_snr[0] == pytest.approx(-5.36, abs=0.02) and found.log_snr[-1] == pytest.approx(7.07, abs=0.02)
    rows = [reading["frozen"].by_bin for reading in of_pictures.models["base"].values()]
    assert found.accuracy[3] == pytest.approx(sum(row[3] for row in rows) / len(rows))


def test_clusters_are_found_and_information_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(60) % 3
    centres = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    found = k_means(centres[true] + torch.randn(60, 2, generator=generator), 3, seed=1)
    assert normalised_mutual_information(found, true) == pytest.approx(1)
    assert normalised_mutual_information(torch.zeros(60, dtype=torch.int64), true) == 0
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert normalised_mutual_information(a, b) == pytest.approx(0, abs=1e-12)
    assert normalised_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])) == pytest.approx(0.8)
    assert 0 < chance_information(found, true, seed=0) < 0.1


def mean_of(found: BlockProbe, block: str) -> float:
    label = found.models["base"][block]["fed"].label
    assert label is not None
    return label.mean


# ------------------------------------------------------------------------------------------------------ the script


def test_the_script_probes_a_base_alone_and_beside_a_checkpoint(
    adapter_file: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos", 12)
    for number in range(12):
        (photos / f"p{number}.txt").write_text(("a red cat", "a dog at sea", "x")[number % 3])
    words = [
        "--block_probe",
        "--reference_dir",
        photos,
        "--resolution",
        64,
        "--block_probe_bins",
        10,
        "--device",
        "cpu",
    ]
    alone = [*words, "--base-model", tiny_sd15, "--output_dir", tmp_path / "alone"]
    assert evaluate.main([*map(str, alone), "--dry_run"]) == EXIT_OK
    said = capsys.readouterr().out
    assert (
        f"pictures   12, {photos}, 64 x 64 pixels, each at 10 noise levels" in said
        and not (tmp_path / "alone").exists()
    )
    both = [*words, "--checkpoint", adapter_file, "--output_dir", tmp_path / "both"]
    assert evaluate.main([*map(str, both)]) == EXIT_OK
    found = json.loads((tmp_path / "both" / "metrics.json").read_text())
    probe = found["block_probe"]
    assert list(probe["models"]) == ["base", adapter_file.stem] and probe["labels"] == "caption cluster"
    assert len(LevelAccuracy.read(tmp_path / "both" / "timestep_bins.json").accuracy) == 10
    html = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "What bins of timesteps read" in html and "For alignment, tap" in html
    assert evaluate.main([*map(str, both)]) == EXIT_BAD_INPUT
    assert "holds an evaluation already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--checkpoint FEW --block_probe_bins 20", "block_probe_bins has no effect without block_probe"),
        ("--block_probe --block_probe_bins 5", "block_probe_bins must lie between 10 and 1000, got 5"),
        ("--block_probe --base-model BASE", "needs pictures to show .*Name a folder of at least 12 with --reference_dir"),
        ("--block_probe --base-model BASE --reference_dir FEW", "needs at least 12 pictures, and .* holds 2"),
        ("--dry_run", "checkpoint is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_one_sentence(
    words: str, said: str, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base, few = tmp_path / "base", write_photos(tmp_path / "few")
    base.symlink_to(tiny_sd15)
    given = words.replace("BASE", str(base)).replace("FEW", str(few)).split()
    assert evaluate.main([*given, "--output_dir", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_generated_pictures_are_of_all_classes_and_the_same_each_time() -> None:
    one, other = generated(32, 32), generated(32, 32)
    assert len({photo.name.split("/")[0] for photo in one}) == 16
    assert all(a.picture.tobytes() == b.picture.tobytes() and a.name == b.name for a, b in zip(one, other, strict=True))
