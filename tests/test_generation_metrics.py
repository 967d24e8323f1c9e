"""Numbers of pictures: what each measure gives where the answer is known, and when two numbers are told apart."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.evaluation import picture_measures as measures
from library.evaluation.denoising import QUARTERS, denoising_losses, encode_photos, log_ratios, spread_timesteps
from library.evaluation.picture_encoders import ClipPictures, DinoPictures
from library.evaluation.references import References
from library.evaluation.standard_errors import Estimate, difference, jackknife, mean_of, student_quantile
from library.inference.drawing_model import load_model
from library.models.locate import locate_base
from library.models.sd15_configs import SD15_SCHEDULER

ONE_GROUP = torch.zeros(16, dtype=torch.int64)


def rows(count: int, width: int = 8, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double() + shift


def everything(of: Tensor) -> Tensor:
    return torch.ones(len(of), dtype=torch.float64)


# Spread


def test_the_spread_of_a_mean_is_the_textbooks_standard_error():
    values = rows(16, 1)[:, 0]
    found = jackknife(mean_of(values), ONE_GROUP)
    assert found.value == pytest.approx(values.mean().item())
    assert found.error == pytest.approx((values.std() / 4).item())
    assert found.freedom == 15


def test_the_spread_of_a_mean_over_prompts_is_that_of_stratified_samples():
    groups = torch.tensor([0] * 2 + [1] * 3 + [2] * 5)
    values = rows(10, 1)[:, 0] + 10 * groups
    found = jackknife(mean_of(values), groups)
    strata = [values[groups == group] for group in range(3)]
    assert found.error == pytest.approx(math.sqrt(sum(len(one) * one.var().item() for one in strata)) / 10)
    assert found.freedom == 7


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 16), (4, 4), (8, 2)])
def test_the_interval_holds_the_truth_about_nineteen_times_in_twenty(prompts: int, seeds: int):
    groups = torch.arange(prompts).repeat_interleave(seeds)
    estimates = [
        jackknife(mean_of(rows(16, 1, seed=trial)[:, 0] + groups - groups.double().mean()), groups)
        for trial in range(300)
    ]
    held = sum(abs(one.value) <= one.margin for one in estimates) / 300
    assert 0.91 < held < 0.985


@pytest.mark.parametrize("seeds", [2, 4])
def test_the_spread_of_a_distance_between_sets_is_what_it_moves_by_with_other_seeds(seeds: int):
    prompts, photos = 16 // seeds, rows(12, seed=10**6)
    groups = torch.arange(prompts).repeat_interleave(seeds)
    own = rows(prompts, seed=10**6 + 1)[groups]  # what a prompt's pictures have in common
    found = [jackknife(measures.kernel_distance(own + rows(16, seed=trial), photos), groups) for trial in range(150)]
    moved = torch.tensor([one.value for one in found]).std().item()
    assert torch.tensor([one.error for one in found]).mean().item() == pytest.approx(moved, rel=0.25)


def test_prompts_are_no_spread_only_seeds_are():
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    found = jackknife(mean_of(torch.tensor([1.0, 1, 1, 5, 5, 5])), groups)
    assert (found.value, found.error, found.freedom) == (3.0, 0.0, 4)


def test_a_prompt_with_one_picture_has_no_spread_and_is_never_told_apart():
    found = jackknife(mean_of(torch.tensor([9.0, 9.0])), torch.tensor([0, 1]))
    assert found.value == 9 and math.isnan(found.error) and not found.is_significant
    assert found.to_json() == {"value": 9.0, "error": None, "margin": None}


def test_rounding_is_no_difference_and_is_not_shown():
    assert not Estimate(1e-16, 1e-18, 15).is_significant
    assert str(Estimate(-1e-17, 1e-18, 15)) == "0.000"
    assert str(Estimate(0.61234, 0.01, 15)) == "0.612 ± 0.021"
    assert str(Estimate(2e-4, 1e-5, 15)) == "0.00020 ± 0.00002"
    assert str(Estimate(0.5, math.nan, 0)) == "0.500" and str(Estimate(math.nan, 0.1, 3)) == "–"


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (30, 2.0423)])
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float):
    assert student_quantile(freedom) == pytest.approx(expected, rel=2e-3)


def test_what_a_seed_does_to_both_sides_cancels_in_the_difference():
    common = 10 * rows(16, 1)[:, 0]
    better = common + 0.5 + 0.01 * rows(16, 1, seed=1)[:, 0]
    assert not Estimate(0.5, jackknife(mean_of(better), ONE_GROUP).error, 15).is_significant
    assert jackknife(difference(mean_of(better), mean_of(common)), ONE_GROUP).is_significant


def test_equals_are_told_apart_about_once_in_twenty():
    told = 0
    for trial in range(150):
        values = rows(8, 2, seed=trial)
        told += jackknife(difference(mean_of(values[:, 0]), mean_of(values[:, 1])), ONE_GROUP[:8]).is_significant
    assert 0.01 < told / 150 < 0.11


# Measures


def test_a_set_is_as_like_itself_as_can_be_and_unlike_what_is_at_right_angles():
    photos = F.normalize(rows(1).expand(3, -1), dim=1)
    assert measures.likeness(photos, photos).tolist() == pytest.approx([1, 1, 1])
    assert measures.likeness_among(photos) == pytest.approx(1)
    axes = torch.eye(4, dtype=torch.float64)
    assert measures.likeness(axes[:2], axes[2:]).tolist() == [0, 0]
    assert measures.likeness_among(axes) == 0


def test_the_same_pictures_have_not_drifted():
    pixels = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    assert measures.pixel_distances(pixels, pixels).tolist() == [0, 0, 0]
    black, white = torch.zeros_like(pixels), torch.full_like(pixels, 255)
    assert measures.pixel_distances(black, white).tolist() == [1, 1, 1]
    unit = F.normalize(rows(3), dim=1)
    assert measures.distances(unit, unit).abs().max() < 1e-12
    assert measures.distances(unit, -unit).tolist() == pytest.approx([2, 2, 2])


def test_a_planted_copy_is_nearer_to_its_training_picture_than_real_pictures_are_to_each_other():
    trained, held_out, drawn = (F.normalize(rows(count, 16, seed), dim=1) for seed, count in enumerate((40, 40, 400)))
    drawn[3] = F.normalize(trained[7] + 0.05 * drawn[3], dim=0)
    trained = torch.cat([trained, trained[:1]])  # one is there twice, which does not hide copies
    cosines, indices = measures.nearest_photo(drawn, trained)
    real = torch.cat([measures.nearest_photo(held_out, trained)[0], measures.nearest_among(trained)])
    level, by_chance = measures.copying_level(real)
    assert cosines.argmax() == 3 and indices[3] == 7 and cosines[3] > level
    assert 0.02 < float((cosines > level).double().mean()) < by_chance < 0.15, (
        "of the others as many as may be by chance"
    )
    slow = [max(float(trained[i] @ trained[j]) for j in range(41) if j != i) for i in range(41)]
    assert measures.nearest_among(trained).tolist() == pytest.approx(slow)
    assert measures.copying_level(real[:9])[1] == pytest.approx(1 - 0.05 ** (1 / 9)), "the greatest of nine"
    assert not len(measures.nearest_among(trained[:1]))


def test_a_picture_is_identified_where_the_nearest_that_counts_is_its_own():
    axes = torch.eye(4, dtype=torch.float64)
    drawn = F.normalize(torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]]).double(), dim=1)
    own = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    none = torch.zeros_like(own)
    assert measures.finds_own(drawn, axes, own, none).tolist() == [1, 0, 0]
    none[1, 0], none[2, 3] = True, True
    assert measures.finds_own(drawn, axes, own, none).tolist() == [1, 1, 1]


def references(labels: str, captions: list[str]) -> References:
    none = torch.empty(0, 4)
    return References(none, none, (), rows(len(labels), 4), list(labels), captions)


def test_the_others_are_of_other_labels_or_where_there_are_none_what_the_base_draws():
    prompts = ["a cat", "a cat", "a dog"]
    several = references("ccd", ["a  cat", "a cat", "a dog"])
    found = several.identity_of(prompts)
    assert found is not None and found[0].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert found[1][:, 3:].all() and not found[1][:, :3].any()
    assert several.identity_of([*prompts, "some thing"]) is None
    alone = references("cc", ["a cat", "a cat at home"]).identity_of(prompts)
    assert alone is not None and alone[0][:, :2].all() and torch.equal(alone[1][:, 2:], torch.eye(3).bool())


def test_diversity_is_the_mean_over_pairs_of_a_prompt():
    pictures, groups = F.normalize(rows(6), dim=1), torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    slow = sum(1 - float(pictures[i] @ pictures[j]) for i, j in pairs) / 6
    found = measures.diversity(pictures, groups)
    assert found(everything(pictures)) == pytest.approx(slow)
    assert measures.ratio(found, found)(everything(pictures)) == 1
    same = measures.diversity(pictures[:1].expand(6, -1), groups)
    assert same(everything(pictures)) == pytest.approx(0, abs=1e-12)
    assert math.isnan(measures.ratio(found, lambda kept: 0.0)(everything(pictures)))


def told_apart_by_diversity(seeds: int, trial: int) -> bool:
    groups = torch.arange(4).repeat_interleave(seeds)
    a, b = (measures.diversity(F.normalize(rows(4 * seeds, seed=2 * trial + side), dim=1), groups) for side in (0, 1))
    return jackknife(difference(measures.ratio(a, b), measures.ratio(b, b)), groups).is_significant


def test_two_seeds_of_a_prompt_say_nothing_of_the_spread_of_their_diversity_and_four_do():
    assert not any(told_apart_by_diversity(2, trial) for trial in range(20))
    assert sum(told_apart_by_diversity(4, trial) for trial in range(100)) < 12


def slow_mmd(x: Tensor, y: Tensor, kernel) -> float:
    n, m = len(x), len(y)
    of = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    to = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return of + to - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_papers_sum_over_pairs():
    x, y = rows(5), rows(4, seed=1, shift=0.3)
    slow = slow_mmd(x, y, lambda a, b: (float(a @ b) / 8 + 1) ** 3)
    assert measures.kernel_distance(x, y)(everything(x)) == pytest.approx(slow)


def test_cmmd_is_the_sum_over_pairs():
    x, y = F.normalize(rows(5), dim=1), F.normalize(rows(4, seed=1, shift=0.3), dim=1)
    slow = 1000 * slow_mmd(x, y, lambda a, b: math.exp(-float((a - b) @ (a - b)) / 200))
    assert measures.clip_distance(x, y)(everything(x)) == pytest.approx(slow)


@pytest.mark.parametrize("distance", [measures.kernel_distance, measures.clip_distance])
def test_sets_of_one_kind_have_no_distance_on_average_however_few(distance):
    found = [distance(rows(6, seed=2 * i), rows(6, seed=2 * i + 1))(torch.ones(6).double()) for i in range(150)]
    mean, deviation = torch.tensor(found).mean(), torch.tensor(found).std()
    assert abs(mean) < 3 * deviation / 150**0.5
    assert distance(rows(64, shift=1.0), rows(64, seed=1))(torch.ones(64).double()) > deviation


def test_losses_are_paired_with_the_bases_by_photo_and_timestep():
    base = rows(3, 12).exp()
    assert log_ratios(base, base).abs().max() == 0
    assert log_ratios(0.9 * base, base) == pytest.approx(torch.full((3, QUARTERS), math.log(0.9)).numpy())
    only_last = base.clone()
    only_last[:, 9:] *= 2
    assert log_ratios(only_last, base).mean(dim=0).tolist() == pytest.approx([0, 0, 0, math.log(2)])


def test_timesteps_are_in_their_quarters():
    timesteps = spread_timesteps(parametrisation_of(SD15_SCHEDULER))
    assert (timesteps * QUARTERS // 1000).tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert timesteps[0] >= 0 and timesteps[-1] < 1000


@pytest.mark.parametrize("name", ["tiny_sd15", "tiny_sdxl"])
def test_denoising_losses_are_of_the_photo_alone_and_below_those_of_predicting_nothing(
    name: str, request: pytest.FixtureRequest
):
    base: Path = request.getfixturevalue(name)
    model = load_model(locate_base(str(base)), dtype=torch.float32, device="cpu")
    photos = [Image.effect_noise((64, 48), 50).convert("RGB"), Image.new("RGB", (48, 64), "red")]
    both = denoising_losses(model, encode_photos(model, photos, ["a cat", "a dog"], ["a", "b"], 64), seed=0)
    alone = denoising_losses(model, encode_photos(model, photos[1:], ["a dog"], ["b"], 64), seed=0)
    assert both.shape == (2, 12) and torch.allclose(both[1], alone[0], rtol=1e-4)
    assert both.min() > 0 and both[1].mean() < 1  # noise of unit variance, predicted as 0, costs 1
    other = denoising_losses(model, encode_photos(model, photos[1:], ["a dog"], ["b"], 64), seed=1)
    assert not torch.allclose(other, alone, rtol=1e-3)


# Encoders


def noise(width: int, height: int, seed: int) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy())


def test_an_embedding_is_of_the_picture_alone(tiny_dinov2: Path):
    dino = DinoPictures(str(tiny_dinov2))
    pictures = [noise(40, 40, seed) for seed in range(3)]
    together = dino(pictures)
    assert together.shape == (3, 64) and together.dtype == torch.float32
    assert torch.allclose(together[2], dino(pictures[2:])[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_of_a_wide_picture_the_middle_counts(tiny_dinov2: Path):
    dino = DinoPictures(str(tiny_dinov2))
    wide = noise(80, 40, 0)
    assert torch.allclose(dino([wide]), dino([wide.crop((20, 0, 60, 40))]), atol=1e-4)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from library.models.clip_tokenizer import tiny_merges, write_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder, tiny_merges())
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def test_clips_embeddings_are_of_unit_length_and_compare(tiny_clip: Path):
    clip = ClipPictures(str(tiny_clip))
    pictures, prompts = clip.pictures([noise(50, 40, 0), noise(32, 32, 1)]), clip.prompts(["a cat", "a dog", "a cat"])
    assert pictures.shape == (2, 8) and prompts.shape == (3, 8)
    for found in (pictures, prompts):
        assert found.norm(dim=1).tolist() == pytest.approx([1] * len(found), abs=1e-5)
    assert torch.allclose(prompts[0], prompts[2], atol=1e-5) and not torch.allclose(prompts[0], prompts[1], atol=1e-3)


def test_what_is_no_clip_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="clip_model .* cannot be used: .* Give a folder or hub id of a CLIPModel"):
        ClipPictures(str(tmp_path))


def test_a_clip_without_all_of_its_weights_is_refused(tiny_clip: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if "visual_projection" not in key}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match=r"1 of its weights are missing .* visual_projection\.weight\. Give a folder"):
        ClipPictures(str(folder))
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be used"):
        ClipPictures(str(folder))
