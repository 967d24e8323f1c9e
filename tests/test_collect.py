"""The pictures of a LoRA training: where they come from, what is made of them, and what is said of bad ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from library.data.collect import TrainingData
from library.models.base_family import native_side
from library.models.locate import locate_base
from library.options.network import parse_network_options
from library.training.facts import samples_digest
from library.training.pictures import collect_pictures, print_data
from library.training.plan import make_order, make_plan
from tests.tools.dataset_files import picture, refusal, text
from tests.tools.network_runs import NetworkSetting, draw_pictures


def collected(setting: NetworkSetting, *words: str, **changes: object) -> TrainingData:
    argv = setting.argv(setting.folder / "unused", *words, **changes)
    options = parse_network_options(argv, prog="train_network.py", description=None)
    return collect_pictures(options, locate_base(str(options.model.pretrained_model_name_or_path)))


def images_in(data: TrainingData) -> list[tuple[str, str, int, float]]:
    """File name, caption, repeats, weight."""
    return [(one.image.path.name, one.image.caption, one.repeats, one.loss_weight) for one in data.training]


def test_kohyas_folders_images_beside_captions_and_metadata_are_all_found(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    for number in range(2):
        picture(tmp_path / "train" / "3_mio girl" / f"{number}.png", (96, 96))
    text(tmp_path / "train" / "3_mio girl" / "0.caption", "a photo")
    picture(tmp_path / "train" / "notes" / "x.png")
    data = collected(network_setting, train_data_dir=tmp_path / "train", resolution=96)
    assert images_in(data) == [("0.png", "a photo", 3, 1.0), ("1.png", "mio girl", 3, 1.0)]
    assert any("left out (notes)" in note for note in data.notes)
    folder = draw_pictures(tmp_path / "two", ((96, 96),))
    data = collected(network_setting, train_data_dir=folder, resolution=96)
    assert images_in(data) == [("p0.png", "mio, a red cat, on grass", 1, 1.0)]
    text(tmp_path / "meta.json", '{"p0.png": {"caption": "a cat", "tags": "grey"}}')
    data = collected(
        network_setting,
        train_data_dir=folder / "images",
        in_json=tmp_path / "meta.json",
        dataset_repeats=2,
        resolution=96,
    )
    assert images_in(data) == [("p0.png", "a cat,grey", 2, 1.0)]


def test_regularisation_pictures_are_as_many_as_the_others_and_weigh_their_own(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    draw_pictures(tmp_path / "reg", ((96, 96),) * 4)
    reg = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'reg'}'\nis_reg = true"
    config = network_setting.dataset("reg", more=reg, subset="num_repeats = 2")
    data = collected(network_setting, dataset_config=config, prior_loss_weight=0.5)
    prior = [one for one in data.training if one.image.subset.is_reg]
    assert [(one.repeats, one.loss_weight) for one in prior] == [(3, 0.5)] * 4, "12 showings of 6 pictures twice"
    assert {one.loss_weight for one in data.training if not one.image.subset.is_reg} == {1.0}


def test_the_resolution_is_the_bases_where_nothing_says_one(
    network_setting: NetworkSetting, tiny_sd15: Path, tmp_path: Path
) -> None:
    side = native_side(locate_base(str(tiny_sd15)))
    data = collected(network_setting, train_data_dir=draw_pictures(tmp_path / "d", ((128, 128),)))
    assert data.datasets[0].resolution == (side, side)


def test_held_out_pictures_are_the_same_at_every_resolution(network_setting: NetworkSetting) -> None:
    folder = draw_pictures(network_setting.folder / "twelve", ((96, 96),) * 12)
    more = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'twelve'"
    config = network_setting.dataset("split", folder=folder, more=more)
    data = collected(network_setting, dataset_config=config, validation_split=0.3)
    held = [one.image.path.name for one in data.validation]
    assert held and held[: len(held) // 2] == held[len(held) // 2 :]
    assert not set(held) & {one.image.path.name for one in data.training} and len(data.every) == 24
    with_seed = collected(network_setting, dataset_config=config, validation_split=0.3, seed=7)
    assert [one.image.path.name for one in with_seed.validation] != held


def test_steps_count_the_short_batches_of_each_bucket(network_setting: NetworkSetting) -> None:
    """3 + 2 + 1 pictures in three buckets are 2 + 1 + 1 batches of 2."""
    argv = network_setting.argv(network_setting.folder / "o", gradient_accumulation_steps=3, lr_warmup_steps="10%")
    options = parse_network_options([*argv, "--lr_scheduler", "cosine"], prog="", description=None)
    data = collect_pictures(options, locate_base(str(network_setting.base)))
    plan = make_plan(make_order(data, options), options.training, options.optimizer)
    assert (plan.samples, plan.steps_per_epoch, plan.last_step, plan.warmup_steps) == (6, 2, 4, 0)
    two = make_plan(make_order(data, options, 0, 2), options.training, options.optimizer)
    assert (two.steps_per_epoch, two.last_step) == (1, 2)


def test_what_is_drawn_decides_the_digest_and_where_it_lies_does_not(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    same = samples_digest(collected(network_setting))
    assert same == samples_digest(collected(network_setting, dataset_config=network_setting.dataset("elsewhere")))
    for subset in ("flip_aug = true", "caption_prefix = 'x'", "caption_dropout_rate = 0.1", "num_repeats = 2"):
        config = network_setting.dataset("changed", subset=subset)
        assert samples_digest(collected(network_setting, dataset_config=config)) != same, subset
    config = network_setting.dataset("changed", dataset="network_multiplier = 0.5")
    assert samples_digest(collected(network_setting, dataset_config=config)) != same


def test_what_was_left_out_is_said(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw_pictures(tmp_path / "d", ((96, 96), (96, 96)))
    (folder / "captions" / "p1.txt").unlink()
    text(folder / "images" / "broken.png", b"no picture")
    config = network_setting.dataset("bad", folder=folder)
    print_data(collected(network_setting, dataset_config=config))
    said = capsys.readouterr().out
    bare = folder / "images" / "p1.png"
    assert f"warning: 1 of 2 pictures have no caption of their own ({bare}). Trained instead: an empty caption." in said
    assert "1 picture is left out:" in said and "broken.png: unreadable" in said
    dropped = collected(network_setting, dataset_config=config, missing_caption="drop")
    assert [name for name, *_ in images_in(dropped)] == ["p0.png"] and len(dropped.dropped) == 2
    assert "images have no caption (" in refusal(
        lambda: collected(network_setting, dataset_config=config, missing_caption="stop")
    )


def bad_data(folder: Path) -> list[tuple[str, dict[str, object], str]]:
    """(lines of the subset, options, words of the refusal)"""
    draw_pictures(folder / "good", ((96, 96),))
    draw_pictures(folder / "latin", ((96, 96),))
    text(folder / "latin" / "captions" / "p0.txt", "Fräulein".encode("latin-1"))
    (folder / "empty").mkdir()
    Image.new("L", (50, 96)).save(folder / "good" / "p0.png")
    (folder / "masks").mkdir()
    (folder / "good" / "p0.png").rename(folder / "masks" / "p0.png")
    good = f"image_dir = '{folder / 'good'}'\n"
    return [
        (f"image_dir = '{folder / 'latin'}'", {}, "not UTF-8 text: "),
        (f"image_dir = '{folder / 'empty'}'", {}, "has no images"),
        (f"image_dir = '{folder / 'nowhere'}'", {}, "nowhere does not exist"),
        (good + f"conditioning_data_dir = '{folder / 'masks'}'", {"masked_loss": ""}, "masks of another shape than their image"),
        (good + f"conditioning_data_dir = '{folder / 'masks'}'", {}, "which need --masked_loss"),
        (good + "color_aug = true", {}, "color_aug needs pictures encoded anew in every step"),
        (good + "random_crop = true", {}, "random_crop needs pictures encoded anew in every step"),
        (good + "face_crop_aug_range = [1.0, 2.0]", {}, "face_crop_aug_range needs pictures encoded anew"),
        (good + "shufle_caption = true", {}, "shufle_caption (did you mean shuffle_caption?)"),
        (good, {"masked_loss": ""}, "masked_loss needs masks, and no data set has any"),
        (good, {"prior_loss_weight": 0.5}, "prior_loss_weight has no effect"),
        (good, {"early_stop": 2}, "early_stop has no effect: no picture is held out"),
        (good + "is_reg = true", {}, "regularisation pictures and no others"),
    ]  # fmt: skip


def test_bad_pictures_are_one_sentence_that_says_where(network_setting: NetworkSetting, tmp_path: Path) -> None:
    for subset, changes, words in bad_data(tmp_path):
        config = tmp_path / "bad.toml"
        config.write_text(f"[[datasets]]\nresolution = 96\n[[datasets.subsets]]\n{subset}\n")
        said = refusal(
            lambda config=config, changes=changes: collected(network_setting, dataset_config=config, **changes)
        )  # type: ignore[misc]
        assert words in said, (words, said)


def test_what_is_trained_without_captions_is_said(network_setting: NetworkSetting, tmp_path: Path) -> None:
    for folder in ("one/a.png", "one/b.png", "10_mio/a.png", "10_mio/b.png", "5_ann/a.png"):
        picture(tmp_path / folder, (96, 96))

    def said(folder: str, **changes: object) -> list[str]:
        data = collected(network_setting, train_data_dir=tmp_path / folder, resolution=96, **changes)
        return [note for note in data.notes if note.startswith("warning: ")]

    looked_for = "Looked for: .caption or .txt files of the same name."
    none = "warning: none of 2 pictures has a caption of its own. Trained instead: an empty caption. "
    assert said("one") == [none + looked_for]
    tags = none.replace("an empty caption", '"p s"') + "Looked for: .tags files of the same name."
    assert said("one", caption_extension="tags", caption_prefix="p", caption_suffix="s") == [tags]
    text(tmp_path / "one" / "a.txt", "a cat")
    assert said("one")[0].startswith("warning: 1 of 2 pictures have no caption of their own (")
    text(tmp_path / "one" / "b.caption", "")
    assert said("one") == []  # an empty file is a caption, and that is said elsewhere
    shutil.rmtree(tmp_path / "one")
    assert said(".") == [
        "warning: none of 3 pictures has a caption of its own. Trained instead: "
        f'"mio"; "ann" (class tokens). {looked_for}'
    ]
    meta = text(tmp_path / "m.json", '{"a": {}, "b": {"caption": ""}}')
    (words,) = said("10_mio", in_json=meta)
    assert words.endswith(f"a.png). Trained instead: an empty caption. Looked for: captions or tags in {meta}.")
