"""Dataset files say what kohya's say, each value comes from the right level, and errors name key, file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.data.dataset_config import Dataset, Subset, read_dataset_config
from library.data.dataset_schema import DATASET_KEYS, SUBSET_KEYS, SUBSET_ONLY
from tests.tools.dataset_files import picture, refusal

LEAST = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'pics'\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an image folder `pics`."""
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "pics" / "a.png")
    return tmp_path


def read(content: str | Mapping[str, Any], **given: Any) -> list[Dataset]:
    path = Path("set.toml" if isinstance(content, str) else "set.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_dataset_config(path, given)


def test_the_least_file_has_kohyas_defaults() -> None:
    [dataset] = read(LEAST)
    [subset] = dataset.subsets
    assert dataset == Dataset(resolution=(512, 512), subsets=(subset,), name="512x512")
    assert subset == Subset(image_dir=Path("pics"), name="pics")
    assert (dataset.batch_size, dataset.enable_bucket, dataset.min_bucket_reso, dataset.max_bucket_reso) == (
        1,
        False,
        256,
        1024,
    )
    assert (subset.num_repeats, subset.caption_extension, subset.caption_separator) == (1, ".caption", ",")
    assert subset.place == "set.toml, line 4"


def test_every_key_of_kohya_is_taken() -> None:
    everywhere = """
        shuffle_caption = true
        caption_separator = ";"
        keep_tokens = 2
        keep_tokens_separator = "|||"
        secondary_separator = ";;;"
        enable_wildcard = true
        caption_prefix = "photo of"
        caption_suffix = "film grain"
        color_aug = true
        flip_aug = true
        random_crop = true
        face_crop_aug_range = [1, 3]
        token_warmup_min = 3
        token_warmup_step = 100
        caption_dropout_rate = 0.1
        caption_tag_dropout_rate = 1
        caption_dropout_every_n_epochs = 5
        caption_extension = "txt"
        class_tokens = "cat"
        cache_info = true
        num_repeats = 10
        custom_attributes = { diff_output_preservation = true }
        resize_interpolation = "area"
    """
    whole = """
        batch_size = 4
        resolution = [768, 512]
        enable_bucket = true
        min_bucket_reso = 320
        max_bucket_reso = 1280
        bucket_reso_steps = 32
        bucket_no_upscale = true
        network_multiplier = 1
        validation_split = 0
        validation_seed = 7
    """
    own = "[[datasets.subsets]]\nimage_dir = 'pics'\nis_reg = true\nalpha_mask = true\n"
    [in_general] = read(f"[general]\n{everywhere}{whole}[[datasets]]\n{own}")
    [in_dataset] = read(f"[[datasets]]\n{everywhere}{whole}{own}")
    [split] = read(f"[[datasets]]\n{whole}resize_interpolation = 'area'\n{own}{everywhere}")
    assert in_general == in_dataset == split
    subset = split.subsets[0]
    set_keys = {key for key in SUBSET_KEYS if getattr(subset, key) != getattr(Subset(), key)}
    assert SUBSET_KEYS - set_keys == {"metadata_file", "conditioning_data_dir"}
    assert (subset.face_crop_aug_range, subset.caption_extension, subset.token_warmup_step) == ((1.0, 3.0), ".txt", 100)
    assert (split.resolution, split.network_multiplier, split.validation_split) == ((768, 512), 1.0, 0.0)


INHERITED = {
    "num_repeats": st.integers(0, 50),
    "keep_tokens": st.integers(0, 9),
    "flip_aug": st.booleans(),
    "caption_prefix": st.text("abc ", min_size=1, max_size=5),
    "caption_dropout_rate": st.floats(0, 1),
    "batch_size": st.integers(1, 64),
    "bucket_no_upscale": st.booleans(),
    "resize_interpolation": st.sampled_from(["area", "lanczos", "box"]),
}
LEVELS = ["subset", "dataset", "general", "given"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({level: st.fixed_dictionaries({}, optional=INHERITED) for level in LEVELS}))
def test_the_innermost_level_that_has_a_key_decides(levels: dict[str, dict[str, Any]]) -> None:
    subset = {key: value for key, value in levels["subset"].items() if key in SUBSET_KEYS}
    file = {
        "general": levels["general"],
        "datasets": [{"resolution": 512, **levels["dataset"], "subsets": [{"image_dir": "pics", **subset}]}],
    }
    names = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
    [dataset] = read(file, **{names.get(key, key): value for key, value in levels["given"].items()})
    for key in INHERITED:
        order = [levels["dataset"], levels["general"], levels["given"]]
        if key in DATASET_KEYS:
            default = getattr(Dataset((512, 512)), key)
            assert getattr(dataset, key) == next((level[key] for level in order if key in level), default)
        if key in SUBSET_KEYS:
            found = next((level[key] for level in [subset, *order] if key in level), getattr(Subset(), key))
            assert getattr(dataset.subsets[0], key) == found


@pytest.mark.parametrize("written", ["512", '"512"', '"512,512"', "[512, 512]", '" 512 , 512 "'])
def test_a_resolution_may_be_written_in_any_usual_way(written: str) -> None:
    assert read(LEAST.replace("512", written))[0].resolution == (512, 512)
    assert read(LEAST.replace("resolution = 512", ""), resolution=written.strip('"[]'))[0].resolution == (512, 512)


def test_the_command_line_counts_where_the_file_says_nothing() -> None:
    [dataset] = read(LEAST, resolution="768,512", train_batch_size=8, dataset_repeats=3, caption_extention="txt")
    assert (dataset.resolution, dataset.batch_size) == ((512, 512), 8)
    assert (dataset.subsets[0].num_repeats, dataset.subsets[0].caption_extension) == (3, ".txt")
    assert read(LEAST, alpha_mask=True)[0].subsets[0].alpha_mask
    assert read(LEAST, face_crop_aug_range="2.0,4.0")[0].subsets[0].face_crop_aug_range == (2.0, 4.0)
    assert read(LEAST, learning_rate=1e-4, keep_tokens=None) == read(LEAST)
    assert refusal(lambda: read(LEAST, train_batch_size=0, keep_tokens="x")) == (
        "--train_batch_size is 0: input should be greater than or equal to 1; "
        "--keep_tokens is 'x': input should be a valid integer."
    )


def test_an_empty_text_switches_off_what_a_level_above_gives() -> None:
    text = "[general]\nkeep_tokens_separator = '|||'\nclass_tokens = 'cat'\n" + LEAST
    assert read(text)[0].subsets[0].keep_tokens_separator == "|||"
    off = read(text + "keep_tokens_separator = ''\nclass_tokens = ''\n")[0].subsets[0]
    assert (off.keep_tokens_separator, off.class_tokens) == (None, None)
    assert read(LEAST, keep_tokens_separator="")[0].subsets[0].keep_tokens_separator is None


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_path_is_not_given(empty: str) -> None:
    paths = f"conditioning_data_dir = '{empty}'\nmetadata_file = '{empty}'\n"
    (dataset,) = read(f"{LEAST}{paths}")
    assert dataset.subsets[0].conditioning_data_dir is None and dataset.subsets[0].metadata_file is None
    empty_folder = LEAST.replace("'pics'", f"'{empty}'")
    assert "line 3 has neither image_dir nor metadata_file" in refusal(lambda: read(empty_folder))


def test_toml_and_json_say_the_same(here: Path) -> None:
    content = {"general": {"flip_aug": True}, "datasets": [{"resolution": 512, "subsets": [{"image_dir": "pics"}]}]}
    assert read(content) == read("[general]\nflip_aug = true\n" + LEAST)
    (here / "bom.toml").write_bytes(b"\xef\xbb\xbf" + LEAST.encode())
    assert read_dataset_config(here / "bom.toml", {}) == read(LEAST)
    assert read({"general": {"class_tokens": None}, **content}) == read({"general": {}, **content})


def test_several_resolutions_over_one_folder_have_names_of_their_own() -> None:
    text = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = 'pics'\n"
    datasets = read("".join(text.format(side) for side in (512, 768, 512)))
    assert [dataset.name for dataset in datasets] == ["512x512", "768x768", "512x512#2"]


def test_paths_start_in_the_working_folder_and_else_beside_the_file(here: Path) -> None:
    config = here / "configs" / "set.toml"
    picture(config.parent / "pics" / "b.png")
    picture(config.parent / "only" / "c.png")
    config.write_text(LEAST + "[[datasets.subsets]]\nimage_dir = 'only'\n")
    first, second = read_dataset_config(config, {})[0].subsets
    assert (first.image_dir, first.name) == (Path("pics"), "pics")
    assert (second.image_dir, second.name) == (config.parent / "only", "only")


def test_all_unknown_keys_are_named_with_line_and_nearest_key() -> None:
    text = (
        "lerning_rate = 1\n"
        "[general]\nshufle_caption = true\n"
        "[[datasets]]\nresolutoin = 512\n"
        "\n[[datasets.subsets]]\nimage_dir = 'pics' # resolution = 1\nnum_repeat = 2\n"
        "[[datasets.subsets]]\nimagedir = 'pics'\n"
        "[datasets.subsets.custom_attributes]\nanything = 1\n"
    )
    assert refusal(lambda: read(text)) == (
        "Unknown keys: lerning_rate in set.toml, line 1; shufle_caption (did you mean shuffle_caption?) in set.toml, line 3; "
        "resolutoin (did you mean resolution?) in set.toml, line 5; "
        "num_repeat (did you mean num_repeats?) in set.toml, line 9; "
        "imagedir (did you mean image_dir?) in set.toml, line 11."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            LEAST + "validation_split = 0.1",
            "validation_split holds for a whole dataset: it belongs in [[datasets]] or [general], "
            "not in [[datasets.subsets]] (set.toml, line 5).",
        ),
        ("[general]\nimage_dir = 'pics'\n" + LEAST, "image_dir belongs in [[datasets.subsets]], not in [general] (se"),
        (LEAST.replace("[[datasets.subsets]]\n", ""), "image_dir belongs in [[datasets.subsets]], not in [[datasets]] (s"),
        ("batch_size = 2\n" + LEAST, "batch_size belongs in [general], [[datasets]], not in the top level (set.toml, line 1)."),
        ("[general]\nprior_loss_weight = 1\n" + LEAST, "Unknown key: prior_loss_weight (an option of the command line) in"),
        ("[datasets]\nresolution = 512\n", "datasets must be a list (set.toml, line 1): in TOML its heading is [[datasets]]."),
        ("[[datasets]]\n[datasets.subsets]\n", "subsets must be a list (set.toml, line 2): in TOML its heading is [[datase"),
        (LEAST.replace("512", "'big'"), "resolution is 'big' in set.toml, line 2: input should be a side in pixels, such"),
        (LEAST.replace("512", "[512, 0]"), "resolution is [512, 0] in set.toml, line 2: input should be a side in pixels"),
        (LEAST.replace("512", "true"), "resolution is True in set.toml, line 2: input should be a side in pixels"),
        (LEAST + "num_repeats = '4'", "num_repeats is '4' in set.toml, line 5: input should be a valid integer."),
        (LEAST + "num_repeats = -1", "num_repeats is -1 in set.toml, line 5: input should be greater than or equal to 0."),
        (LEAST + "num_repeats = 1.0", "num_repeats is 1.0 in set.toml, line 5: input should be a valid integer."),
        (LEAST + "flip_aug = 1", "flip_aug is 1 in set.toml, line 5: input should be a valid boolean."),
        (LEAST + "caption_dropout_rate = 1.5", "caption_dropout_rate is 1.5 in set.toml, line 5: input should be less th"),
        (LEAST + "caption_dropout_rate = nan", "caption_dropout_rate is nan in set.toml, line 5: input should be a finit"),
        (LEAST + "face_crop_aug_range = [3, 1]", "face_crop_aug_range is [3, 1] in set.toml, line 5: input should be two"),
        (LEAST + "face_crop_aug_range = 2", "face_crop_aug_range is 2 in set.toml, line 5: input should be two numbers"),
        (LEAST + "caption_extension = '../x'", "caption_extension is '../x' in set.toml, line 5: input should be the end"),
        (LEAST + "caption_separator = ''", "caption_separator is '' in set.toml, line 5: string should have at least 1"),
        (LEAST + "resize_interpolation = 'best'", "resize_interpolation is 'best' in set.toml, line 5: input should be 'l"),
        (LEAST.replace("512", "512\nbatch_size = 0"), "batch_size is 0 in set.toml, line 3: input should be greater than"),
        (LEAST + "x = 1\nkeep_tokens = 'y'", "Unknown key: x in set.toml, line 5. keep_tokens is 'y' in set.toml, line 6:"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_type_is_one_sentence(text: str, expected: str) -> None:
    assert refusal(lambda: read(text)).startswith(expected)


BUCKETS = "[[datasets]]\nresolution = 512\nenable_bucket = true\n{}\n[[datasets.subsets]]\nimage_dir = 'pics'\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "set.toml is empty. Write a [[datasets]] with a resolution, and in it a [[datasets.subsets]] with an image_"),
        ("# nothing\n", "set.toml is empty."),
        ("[general]\nflip_aug = true\n", "set.toml has no [[datasets]]. Write one, and in it a [[datasets.subsets]] with"),
        ("datasets = []", "set.toml has no [[datasets]]."),
        ("\n[[datasets]]\nresolution = 512\n", "The dataset in set.toml, line 2 has no [[datasets.subsets]]."),
        ("datasets = ", "set.toml is not valid TOML: "),
        ('[[datasets]]\nimage_dir = "C:\\pics"', "set.toml is not valid TOML: "),
        (LEAST.replace("resolution = 512\n", ""), "resolution is missing for the dataset in set.toml, line 1. Write reso"),
        (LEAST.replace("image_dir = 'pics'", "flip_aug = true"), "The subset in set.toml, line 3 has neither image_dir no"),
        (LEAST.replace("pics", "pics/a.png"), "image_dir pics/a.png is no folder (set.toml, line 4)."),
        (LEAST.replace("512", "500"), "resolution must be a positive multiple of 8 on both sides, got 500 x 500 (set.to"),
        (BUCKETS.format("min_bucket_reso = 768"), "min_bucket_reso must not exceed resolution, got 768 for 512 x 512. S"),
        (BUCKETS.format("max_bucket_reso = 448"), "max_bucket_reso must not be below resolution, got 448 for 512 x 512."),
        (BUCKETS.format("bucket_reso_steps = 12"), "bucket_reso_steps must be a positive multiple of 8, got 12 (set.toml"),
        (LEAST + "alpha_mask = true\nconditioning_data_dir = 'pics'", "alpha_mask and conditioning_data_dir pics both giv"),
        (
            LEAST + "[[datasets.subsets]]\nmetadata_file = 'm.json'",
            "The dataset in set.toml, line 1 mixes subsets with and without metadata_file (set.toml, line 6). "
            "Give each kind a [[datasets]] of its own.",
        ),
        (
            LEAST + "metadata_file = 'm.json'\ncaption_extension = '.txt'",
            "caption_extension has no meaning beside metadata_file, where the captions are: leave it out (set.toml, line 6)",
        ),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_one_sentence(here: Path, text: str, expected: str) -> None:
    (here / "m.json").write_text("{}")
    assert refusal(lambda: read(text)).startswith(expected)


def test_the_place_of_a_bad_value_is_the_level_it_came_from() -> None:
    text = "[general]\nmin_bucket_reso = 768\n" + BUCKETS.format("")
    assert refusal(lambda: read(text)).endswith("(set.toml, line 2).")
    assert refusal(lambda: read(BUCKETS.format(""), min_bucket_reso=768)).endswith("(--min_bucket_reso).")
    read(BUCKETS.format("bucket_no_upscale = true\nmin_bucket_reso = 768"))  # which ignores both limits


def test_bucket_limits_that_nobody_set_follow_the_resolution() -> None:
    limits = {
        side: (dataset.min_bucket_reso, dataset.max_bucket_reso)
        for side in (128, 512, 1024)
        for dataset in read(BUCKETS.format("").replace("512", str(side)))
    }
    assert limits == {128: (64, 256), 512: (256, 1024), 1024: (256, 2048)}


def test_a_folder_that_is_not_there_names_both_places(here: Path) -> None:
    expected = f"image_dir gone does not exist, neither in {here} nor beside set.toml (set.toml, line 4)."
    assert refusal(lambda: read(LEAST.replace("pics", "gone"))) == expected
    assert refusal(lambda: read(LEAST.replace("pics", "/gone"))) == "image_dir /gone does not exist (set.toml, line 4)."
    assert refusal(lambda: read(LEAST, conditioning_data_dir=Path("gone"))).endswith("(--conditioning_data_dir).")


def test_a_file_of_training_options_is_recognised() -> None:
    message = refusal(lambda: read("[training]\nlearning_rate = 1\n[model]\nv2 = true\n"))
    assert message.startswith("Unknown keys: training in set.toml, line 1; model in set.toml, line 3. ")
    assert message.endswith("set.toml has no [[datasets]]: a file of training options goes to --config_file.")


def test_json_errors_name_the_line_too(here: Path) -> None:
    file = here / "set.json"
    text = '{\n "general": {"shuffle": true},\n "datasets": [\n  {"resolution": "x",\n   "subsets": [{\n    "a": 1}]}]}'
    file.write_text(text)
    message = refusal(lambda: read_dataset_config(file, {}))
    assert "shuffle (did you mean shuffle_caption?) in set.json, line 2; a in set.json, line 6." in message
    assert "resolution is 'x' in set.json, line 4" in message
    for content, expected in [
        ("[]", f"{file} holds a list. "),
        ("", f"{file} is empty. "),
        ('{"general": 1, "general": 2}', f"{file} is not valid JSON: general given twice in one object."),
        ("{", f"{file} is not valid JSON: "),
        ("[" * 100_000, f"{file} is nested too deeply"),
    ]:
        file.write_text(content)
        assert refusal(lambda: read_dataset_config(file, {})).startswith(expected)


def test_a_file_that_is_none_is_refused(here: Path) -> None:
    assert refusal(lambda: read_dataset_config(here / "no.toml", {})).endswith(
        "could not be read: No such file or directory."
    )
    assert "must end in .toml or .json" in refusal(lambda: read_dataset_config(here / "set.yaml", {}))
    (here / "latin.toml").write_bytes(LEAST.encode() + b"class_tokens = 'caf\xe9'")
    assert refusal(lambda: read_dataset_config(here / "latin.toml", {})).endswith(
        "is not UTF-8 text (line 5). Save it as UTF-8."
    )


def test_keys_that_only_a_subset_has_are_not_keys_of_datasets() -> None:
    assert SUBSET_ONLY < SUBSET_KEYS and not SUBSET_ONLY & DATASET_KEYS
    assert {"resize_interpolation"} == DATASET_KEYS & SUBSET_KEYS
