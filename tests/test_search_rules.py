"""The rules from SD1.5 to SDXL: what each of them promises, for every training that can be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import Buckets
from library.data.dataset_schema import Dataset, Subset
from library.errors import UserError
from library.options.search import SdxlOptions
from library.options.toml_file import PROJECT_ROOT
from library.search.to_sdxl.network_rules import TEXT_BAND
from library.search.to_sdxl.rules import RULES, apply_rules, rules_table, written_options
from library.search.to_sdxl.size_rules import split_batches
from library.search.to_sdxl.trainings import SdxlTraining
from tests.tools.sdxl_export import GUIDE_DATASET, found_training

ADAM_LIKE = st.sampled_from(["AdamW", "AdamW8bit", "Lion"])
RATES = st.floats(1e-6, 1e-2)
SIDES = st.integers(1, 24).map(lambda steps: 64 * steps)


def carried(*wishes: SdxlOptions, **given: object) -> SdxlTraining:
    return apply_rules(found_training(**given), *(wishes or (SdxlOptions(),)))  # type: ignore[arg-type]


def text(recipe: SdxlTraining) -> str:
    return "\n".join(recipe.warnings)


# --- the table ---


def test_the_page_shows_the_table_of_rules() -> None:
    page = (PROJECT_ROOT / "docs" / "optimize.md").read_text(encoding="utf-8")
    section = page.split("## From SD1.5 to SDXL\n")[1].split("\n## ")[0]
    assert rules_table() in section, "run python -m library.search.to_sdxl.rules"


def test_every_rule_has_a_reason_and_a_source() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert (
            rule.reason and rule.source and rule.does and "|" not in rule.does + rule.reason + rule.source + rule.doubt
        )


# --- the guide's own example ---


def test_the_guides_training_becomes_the_guides_sdxl_training() -> None:
    recipe = carried()
    (dataset,), options = recipe.datasets, written_options(recipe)
    assert (dataset.resolution, dataset.batch_size) == ((1024, 1024), 4)
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps) == (768, 1536, 64)
    expected = {
        "learning_rate": 3e-4, "unet_lr": 3e-4, "text_encoder_lr": [2e-4, 2e-4], "network_dim": 64, "network_alpha": 32.0,
        "gradient_accumulation_steps": 4, "max_train_epochs": 15, "max_token_length": 225, "mixed_precision": "bf16",
        "gradient_checkpointing": True, "cache_latents": True, "optimizer_type": "AdamW8bit", "min_snr_gamma": 5.0,
        "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "noise_offset": 0.05, "seed": 7,
        "lr_warmup_steps": 0.08333, "save_precision": "fp16", "save_every_n_epochs": 2, "validate_every_n_epochs": 2,
        "validation_seed": 1234,
    }  # fmt: skip
    assert options == expected
    assert "clip_skip" not in options
    assert dataset.validation_split == 0.1


# --- pictures ---


@given(st.tuples(SIDES, SIDES), st.booleans())
def test_no_resolution_grows_beyond_twice_or_beyond_sdxls_own(size: tuple[int, int], no_upscale: bool) -> None:
    low, high = min(size), max(size)
    before = replace(
        GUIDE_DATASET, resolution=size, min_bucket_reso=low, max_bucket_reso=high, bucket_no_upscale=no_upscale
    )
    (after,) = carried(datasets=(before,)).datasets
    (width, height), (old_width, old_height) = after.resolution, size
    if width * height > 1024**2:
        assert after.resolution == size, "more than SDXL's area stays as it is"
    elif 4 * old_width * old_height <= 1024**2:
        assert after.resolution == (2 * old_width, 2 * old_height)
    assert old_width <= width <= 2 * old_width and old_height <= height <= 2 * old_height
    assert Buckets.of(after).enable_bucket


@given(st.integers(4, 8), st.integers(8, 16))
def test_every_bucket_of_sd15_is_there_at_twice_the_size(low: int, high: int) -> None:
    before = replace(GUIDE_DATASET, min_bucket_reso=64 * low, max_bucket_reso=64 * high)
    (after,) = carried(datasets=(before,)).datasets
    there = Buckets.of(after)
    for width, height in Buckets.of(before).resolutions:
        found = there.fit(width, height).bucket
        assert math.isclose(math.log(found[0] / found[1]), math.log(width / height), abs_tol=0.15)
        assert math.prod(found) <= 1024**2 and max(found) <= 2 * 64 * high and min(found) >= 2 * 64 * low


@pytest.mark.parametrize(("steps", "becomes"), [(64, 64), (32, 32), (96, 96), (8, 64), (16, 64), (48, 64)])
def test_bucket_steps_are_multiples_of_32(steps: int, becomes: int) -> None:
    before = replace(GUIDE_DATASET, bucket_reso_steps=steps, min_bucket_reso=2 * steps)
    assert carried(datasets=(before,)).datasets[0].bucket_reso_steps == becomes


@pytest.mark.parametrize(
    ("size", "steps", "becomes"),
    [((512, 768), 64, (832, 1216)), ((640, 640), 96, (960, 960)), ((1000, 1024), 64, (1000, 1024))],
)
def test_sides_that_are_not_doubled_are_rounded_down_to_the_step(
    size: tuple[int, int], steps: int, becomes: tuple[int, int]
) -> None:
    before = replace(GUIDE_DATASET, resolution=size, bucket_reso_steps=steps, min_bucket_reso=480, max_bucket_reso=1056)
    assert carried(datasets=(before,)).datasets[0].resolution == becomes


def test_a_resolution_that_cannot_be_doubled_is_said() -> None:
    recipe = carried(datasets=(replace(GUIDE_DATASET, resolution=(768, 768)),))
    assert recipe.datasets[0].resolution == (1024, 1024)
    assert "768x768 becomes 1024x1024: doubled it would be larger than SDXL's" in text(recipe)
    assert "details will be coarse" in text(carried(datasets=(replace(GUIDE_DATASET, resolution=(256, 256)),)))


@pytest.mark.parametrize(("no_upscale", "side", "warns"), [(True, 512, True), (True, 800, False), (False, 512, False)])
def test_small_pictures_are_warned_of_only_where_they_stay_small(no_upscale: bool, side: int, warns: bool) -> None:
    recipe = carried(datasets=(replace(GUIDE_DATASET, bucket_no_upscale=no_upscale),), side=side)
    assert ("bucket_no_upscale keeps pictures at their own size, half of them at 512x512" in text(recipe)) == warns


# --- batches ---


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_one_batch_is_split_exactly(batch: int, accumulation: int, most: int) -> None:
    (size,), steps = split_batches([batch], accumulation, most)
    assert size * steps == batch * accumulation
    assert 1 <= size <= max(1, min(most, batch // 2))


@pytest.mark.parametrize(("before", "after"), [((8, 1), (4, 2)), ((8, 3), (4, 6)), ((4, 2), (2, 4)), ((16, 1), (4, 4))])
def test_powers_of_two_are_split_as_the_guide_does(before: tuple[int, int], after: tuple[int, int]) -> None:
    assert split_batches([before[0]], before[1], 4) == ([after[0]], after[1])


@given(st.lists(st.integers(1, 32), min_size=1, max_size=4), st.integers(1, 8))
def test_the_rate_follows_where_batches_cannot_be_split_alike(batches: list[int], accumulation: int) -> None:
    datasets = tuple(replace(GUIDE_DATASET, batch_size=size, name=str(size)) for size in batches)
    recipe = carried(datasets=datasets, gradient_accumulation_steps=accumulation)
    after = sum(one.batch_size for one in recipe.datasets) * recipe.options["gradient_accumulation_steps"]
    ratio = after / (sum(batches) * accumulation)
    assert recipe.options["unet_lr"] == pytest.approx(3e-4 * math.sqrt(ratio), rel=1e-8)
    assert ("have different batch sizes" in text(recipe)) == (ratio != 1)


# --- rank, alpha, rates ---


@given(st.integers(1, 512), st.booleans(), st.sampled_from(["lora", "dora"]))
def test_the_rank_is_always_one_of_the_set_and_alpha_and_rate_stay(dim: int, small: bool, algorithm: str) -> None:
    recipe = carried(SdxlOptions(allow_small_dim=small), network_dim=dim, network_args=(f"algo={algorithm}",))
    after = recipe.options["network_dim"]
    assert after in ((16, 32, 64, 96, 128) if small else (64, 96, 128))
    assert after >= min(dim, 128)
    assert (recipe.options["network_alpha"], recipe.options["unet_lr"]) == (32.0, 3e-4)


def test_an_alpha_of_nothing_is_the_old_rank_not_the_new_one() -> None:
    assert carried(network_dim=16, network_alpha=0.0).options["network_alpha"] == 16.0


@given(st.floats(1, 256), st.floats(1, 256), RATES, ADAM_LIKE)
def test_rates_follow_the_root_of_alpha(before: float, after: float, rate: float, optimizer: str) -> None:
    recipe = carried(
        SdxlOptions(sdxl_alpha=after), network_alpha=before, unet_lr=rate, learning_rate=rate, optimizer_type=optimizer
    )
    assert recipe.options["unet_lr"] == pytest.approx(rate * math.sqrt(before / after), rel=1e-8)
    assert recipe.options["network_alpha"] == after


@given(RATES, RATES.map(lambda rate: rate * 10), st.floats(0.1, 2))
def test_both_text_encoders_get_a_rate_in_the_band(unet: float, encoder: float, factor: float) -> None:
    recipe = carried(SdxlOptions(rate_factor=factor), unet_lr=unet, text_encoder_lr=encoder)
    low, high = TEXT_BAND
    assert len(recipe.options["text_encoder_lr"]) == 2
    for rate in recipe.options["text_encoder_lr"]:
        share = rate / recipe.options["unet_lr"]
        assert low * (1 - 1e-7) <= share <= high * (1 + 1e-7)
        if low < encoder / unet < high:
            assert share == pytest.approx(encoder / unet, rel=1e-7), "a ratio in the band is kept"


@pytest.mark.parametrize("optimizer", ["Prodigy", "DAdaptAdam", "pytorch_optimizer.Prodigy"])
def test_an_optimizer_that_finds_its_rate_keeps_one_for_all(optimizer: str) -> None:
    recipe = carried(SdxlOptions(sdxl_alpha=8.0), optimizer_type=optimizer, unet_lr=1.0, text_encoder_lr=0.3)
    assert (recipe.options["unet_lr"], recipe.options["text_encoder_lr"]) == (1.0, [1.0, 1.0])


@pytest.mark.parametrize("off", [{"text_encoder_lr": 0.0}, {"network_train_unet_only": True, "text_encoder_lr": None}])
def test_text_encoders_that_were_not_trained_are_not_trained(off: dict[str, object]) -> None:
    recipe = carried(**off)
    assert recipe.options["network_train_unet_only"] and "text_encoder_lr" not in recipe.options
    assert recipe.options["cache_text_encoder_outputs"] is True
    assert "text_encoder_lr" not in text(recipe)


def test_captions_that_change_are_not_cached() -> None:
    shuffled = replace(
        GUIDE_DATASET, subsets=(Subset(image_dir=Path("a")), Subset(image_dir=Path("b"), shuffle_caption=True))
    )
    recipe = carried(SdxlOptions(train_text_encoders=False), datasets=(shuffled,))
    assert "cache_text_encoder_outputs" not in recipe.options
    assert "because captions change each time (shuffle_caption)" in text(recipe)
    dropped = replace(GUIDE_DATASET, subsets=(Subset(image_dir=Path("a"), caption_dropout_rate=0.1),))
    recipe = carried(SdxlOptions(train_text_encoders=False), datasets=(dropped,))
    assert recipe.options["cache_text_encoder_outputs"], "a dropped caption is the empty one, which is kept too"


def test_a_study_of_the_text_encoders_alone_keeps_its_rate() -> None:
    recipe = carried(network_train_text_encoder_only=True, unet_lr=None)
    assert recipe.options["text_encoder_lr"] == [2e-4, 2e-4] and "unet_lr" not in recipe.options
    with pytest.raises(UserError, match="train_text_encoders cannot be switched off: the study trained nothing else"):
        carried(SdxlOptions(train_text_encoders=False), network_train_text_encoder_only=True, unet_lr=None)


# --- length ---


@given(st.integers(1, 200), st.booleans())
def test_length_is_a_fifth_more_rounded_up(length: int, by_steps: bool) -> None:
    name = "max_train_steps" if by_steps else "max_train_epochs"
    recipe = carried(max_train_epochs=None if by_steps else length, max_train_steps=length if by_steps else None)
    after = recipe.options[name]
    assert 5 * after >= 6 * length > 5 * (after - 1)
    every = recipe.options["save_every_n_steps" if by_steps else "save_every_n_epochs"]
    assert recipe.options["validate_every_n_steps" if by_steps else "validate_every_n_epochs"] == every
    assert after / every <= 10


def test_nothing_is_validated_where_nothing_can_be_held_out() -> None:
    recipe = apply_rules(
        replace(found_training(early_stop=3, dataset_config=Path("mio.toml")), validation_share=0.0), SdxlOptions()
    )
    assert not [name for name in recipe.options if "validat" in name or name == "early_stop"]
    assert recipe.datasets[0].validation_split == 0 and "too few pictures to hold any out" in text(recipe)


def test_a_study_that_held_pictures_out_keeps_them_out() -> None:
    split = replace(GUIDE_DATASET, validation_split=0.25, validation_seed=3)
    (after,) = apply_rules(replace(found_training((split,)), validation_share=None), SdxlOptions()).datasets
    assert (after.validation_split, after.validation_seed) == (0.25, 3)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_warm_up_becomes_a_share_of_the_run(warm_up: int, steps: int) -> None:
    recipe = carried(lr_warmup_steps=warm_up, steps=steps)
    after = recipe.options["lr_warmup_steps"]
    if warm_up < steps:
        assert after < 1 and after == pytest.approx(warm_up / steps, rel=1e-3)
    else:
        assert after == warm_up and "lr_warmup_steps" in text(recipe)
    assert carried(lr_warmup_steps=0.07).options["lr_warmup_steps"] == 0.07


# --- what is left out ---


def test_clip_skip_is_written_only_where_it_is_asked_for() -> None:
    assert "clip_skip" not in text(carried(clip_skip=2))
    assert "clip_skip 3 was left out" in text(carried(clip_skip=3))
    assert carried(SdxlOptions(sdxl_clip_skip=2)).options["clip_skip"] == 2


def test_what_fits_sd15_alone_is_left_out_with_a_warning() -> None:
    words = ("block_dims=" + ",".join(["4"] * 25), "conv_dim=8", "down_lr_weight=1,1,1", "block_lr_zero_threshold=0.5")
    recipe = carried(vae="other-vae", zero_terminal_snr=True, network_args=words)
    assert recipe.options["network_args"] == ["conv_dim=8"]
    assert not {"vae", "zero_terminal_snr"} & recipe.options.keys()
    assert "vae, zero_terminal_snr, block_dims, down_lr_weight, block_lr_zero_threshold" in text(recipe)
    kept = carried(network_args=("down_lr_weight=sine", "block_lr_zero_threshold=0.5"))
    assert kept.options["network_args"] == ["down_lr_weight=sine", "block_lr_zero_threshold=0.5"]


def test_the_rank_of_other_kinds_of_adapters_is_kept_with_a_warning() -> None:
    recipe = carried(network_dim=8, network_args=("algo=lokr",))
    assert recipe.options["network_dim"] == 8 and "network_dim 8 was kept" in text(recipe)


def test_weak_rules_are_said_where_they_apply_and_only_there() -> None:
    assert "weak" not in text(carried(network_dim=64, text_encoder_lr=0.0)).replace(
        "max_train_epochs 12 x 1.2 is weak", ""
    )
    assert "network_dim 16 -> 64 is weak" in text(carried(network_dim=16))


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"sdxl_dim": 32}, "sdxl_dim must be one of 64, 96, 128, got 32; --allow_small_dim adds 16 and 32."),
        ({"sdxl_dim": 48, "allow_small_dim": True}, "sdxl_dim must be one of 16, 32, 64, 96, 128, got 48."),
        ({"sdxl_alpha": 0.0}, "sdxl_alpha must be positive"),
        ({"max_batch": 0}, "max_batch must be positive"),
        ({"rate_factor": -1.0}, "rate_factor must be positive"),
        ({"sdxl_clip_skip": 1}, "sdxl_clip_skip must be 2"),
    ],
)
def test_wishes_that_cannot_be_are_refused(wish: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match="^" + sentence.replace(".", r"\.")):
        SdxlOptions(**wish)  # type: ignore[arg-type]


def test_datasets_are_carried_over_but_for_what_the_rules_change() -> None:
    subset = Subset(
        image_dir=Path("a"), num_repeats=7, class_tokens="mio", flip_aug=True, keep_tokens=2, caption_dropout_rate=0.1
    )
    before: Dataset = replace(GUIDE_DATASET, subsets=(subset,), network_multiplier=0.5, resize_interpolation="area")
    (after,) = carried(datasets=(before,)).datasets
    assert after.subsets == (subset,) and (after.network_multiplier, after.resize_interpolation) == (0.5, "area")
