"""Which pictures are held out for validation: enough to see something, and the same ones again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.class_pictures import numbered_pictures
from library.data.collect import TrainingData, collect, collect_classes
from library.data.dataset_config import Dataset, Subset, datasets_from_folders
from library.data.training_images import TrainingImage, split_place, split_validation
from library.options.data import ClassPictureOptions
from tests.tools.dataset_files import picture


def image_named(name: str, dataset: str = "512x512", is_reg: bool = False) -> TrainingImage:
    return TrainingImage(f"{dataset}:{name}", Path(name), (8, 8), "", "none", None, Subset(is_reg=is_reg))


@given(st.sets(st.text(min_size=1, max_size=8), max_size=30), st.floats(0, 1), st.none() | st.integers(), st.data())
def test_no_image_below_the_share_changes_sides_when_others_come_or_go(
    names: set[str], share: float, seed: int | None, data: st.DataObject
) -> None:
    images = [image_named(name) for name in sorted(names)]
    training, validation = split_validation(images, share, seed)
    assert sorted(i.sample_id for i in training + validation) == sorted(i.sample_id for i in images)
    fewer = [image for image in images if data.draw(st.booleans())]
    some_training, some_validation = split_validation(reversed(fewer), share, seed)
    kept = {i.sample_id for i in fewer}
    below = {i.sample_id for i in images if split_place(i.identity, seed) < share * 2**64}
    assert {i.sample_id for i in validation} >= below and {i.sample_id for i in some_validation} >= below & kept
    # What is trained stays trained, unless there are so many more that two have to be held out.
    if (len(fewer) < 20) == (len(images) < 20) and len(fewer) > 1:
        assert {i.sample_id for i in some_training} <= {i.sample_id for i in training}
    if len(below & kept) >= 2:
        assert {i.sample_id for i in some_validation} == {i.sample_id for i in validation} & kept


@pytest.mark.parametrize("count", [2, 3, 10, 19, 20, 40])
def test_a_small_share_of_few_pictures_holds_out_one_and_of_twenty_two(count: int) -> None:
    images = [image_named(f"mio/{number}.png") for number in range(count)]
    least = 1 if count < 20 else 2
    for seed in range(50):
        for share in (1e-9, 0.01, 0.1):
            training, validation = split_validation(images, share, seed)
            assert len(validation) >= least and training
            assert split_validation(reversed(images), share, seed)[1] == validation[::-1]
        assert split_validation(images, 0.0, seed) == (images, [])
    assert split_validation(images[:1], 0.1, 1) == (images[:1], [])
    regularisation = [image_named(f"{n}.png", is_reg=True) for n in range(99)]
    assert len(split_validation([*regularisation, *images], 1e-9, 1)[1]) == least


def test_the_share_is_met_and_the_seed_matters() -> None:
    images = [image_named(f"mio/{number}.png") for number in range(2000)]
    assert split_validation(images, 0.0, 1) == (images, []) and split_validation(images, 1.0, 1) == ([], images)
    first, second = (split_validation(images, 0.2, seed)[1] for seed in (1, 2))
    assert 340 < len(first) < 460 and first != second  # 4 sigma are 72
    assert {i.path for i in first}.isdisjoint({i.path for i in split_validation(images, 0.2, 1)[0]})


def test_all_resolutions_of_an_image_are_on_one_side_and_regularisation_is_never_held_out() -> None:
    small, large = ([image_named(f"{n}.png", side) for n in range(99)] for side in ("512x512", "768x768#2"))
    held_out = [{i.identity for i in split_validation(images, 0.3, 5)[1]} for images in (small, large)]
    assert held_out[0] == held_out[1] != set()
    regularisation = [image_named(f"{n}.png", is_reg=True) for n in range(99)]
    assert split_validation(regularisation, 1.0, 5) == (regularisation, [])


def collected(datasets: list[Dataset], seed: int) -> TrainingData:
    return collect(datasets, missing_caption="class_tokens", prior_loss_weight=1.0, seed=seed)


def test_a_data_set_of_ten_pictures_is_validated_whatever_the_seed(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / f"{number}.png")
    datasets = datasets_from_folders(tmp_path, None, {"resolution": 64, "validation_split": 0.1})
    for seed in range(20):
        data = collected(datasets, seed)
        assert len(data.validation) >= 1 and len(data.training) + len(data.validation) == 10
        assert not any("is none" in note for note in data.notes)


def test_data_sets_of_one_share_and_seed_choose_together(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / "a" / f"{number}.png")
        picture(tmp_path / "b" / f"{number}.png")
    a, b = (Subset(image_dir=tmp_path / name, name=name) for name in "ab")
    settings = {"validation_split": 1e-9, "batch_size": 1}
    datasets = [
        Dataset((64, 64), subsets=(a,), name="64x64", **settings),
        Dataset((96, 96), subsets=(a, b), name="96x96", **settings),
    ]
    for seed in range(20):
        data = collected(datasets, seed)
        names = {image.image.identity for image in data.validation}
        assert len(names) == 2 and not names & {image.image.identity for image in data.training}


def test_class_pictures_are_held_out_likewise() -> None:
    for count, least in ((2, 1), (10, 1), (20, 2)):
        for seed in range(20):
            pictures = numbered_pictures(count, ["cat", "dog"])
            data = collect_classes(
                pictures, ClassPictureOptions(), side=64, batch_size=1, validation_split=0.01, seed=seed
            )
            assert least <= len(data.validation) < count and len(data.training) + len(data.validation) == count
