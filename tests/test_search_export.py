"""The files of an export: they say what the rules say, train_network.py reads them so, and what cannot be is refused."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_network
from library.data.collect import TrainingData
from library.data.dataset_config import read_dataset_config
from library.errors import UserError
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import fields_of, flatten
from library.options.search import SdxlOptions
from library.options.toml_file import PROJECT_ROOT, read_options
from library.search.best_params import BaseModel, BestParams
from library.search.held_out_pictures import EVALUATION_SEED
from library.search.run.study_data import network_data
from library.search.to_sdxl.export import Exported, export, find_training
from library.search.to_sdxl.exported_files import _NOT_OF_KOHYA
from library.search.to_sdxl.rules import written_options
from tests.tools.sdxl_export import best_params

# Of three subsets, with values on every level.
DATASETS = """
[general]
shuffle_caption = false
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true
resolution = 64

[[datasets]]
batch_size = 4
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32
keep_tokens = 2

[[datasets.subsets]]
image_dir = "mio"
num_repeats = 3

[[datasets.subsets]]
image_dir = "other"
keep_tokens = 0
class_tokens = "it's \\"her\\""
flip_aug = true

[[datasets]]
resolution = [96, 64]
batch_size = 2
enable_bucket = false

[[datasets.subsets]]
image_dir = "mio"
caption_prefix = "large"
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two folders of pictures and a dataset file."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("mio", 20), ("other", 4)):
        draw(tmp_path / name, count)
    (tmp_path / "set.toml").write_text(DATASETS)
    return tmp_path


def draw(folder: Path, count: int, size: tuple[int, int] = (96, 64)) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text("mio, a cat")


def of_file(**config: object) -> BestParams:
    return best_params({"dataset_config": "set.toml", **config})


def of_folder(**config: object) -> BestParams:
    given = {"train_data_dir": "train", "resolution": [64, 64], "train_batch_size": 2, "enable_bucket": True}
    return best_params({**given, "bucket_reso_steps": 32, **config})


def exported(best: BestParams, base: Path | str = "tiny-sdxl", **options: object) -> Exported:
    return export(best, sdxl_base=str(base), output_dir="sdxl", **options)  # type: ignore[arg-type]


# --- round trip ---


def test_train_network_reads_the_values_that_were_meant(data: Path) -> None:
    result = exported(of_file(), wishes=SdxlOptions(sdxl_dim=96, rate_factor=0.7))
    parsed = parse_network_options(["--config_file", str(result.config)], prog="", description=None)
    read, meant = flatten(parsed), written_options(result.training)
    assert {name: read[name] for name in meant} == meant
    assert meant["learning_rate"] == pytest.approx(2.1e-4) and meant["network_dim"] == 96
    assert (read["pretrained_model_name_or_path"], read["output_name"]) == ("tiny-sdxl", "sdxl_lora")
    assert read["dataset_config"] == str(result.dataset)


def test_datasets_keep_what_they_inherited(data: Path) -> None:
    result = exported(of_file())
    first, second = read_dataset_config(result.dataset, {})
    assert (first.resolution, first.batch_size, first.min_bucket_reso, first.max_bucket_reso) == (
        (128, 128),
        2,
        64,
        256,
    )
    assert (second.resolution, second.batch_size, second.enable_bucket) == ((192, 128), 1, False)
    assert [one.keep_tokens for one in (*first.subsets, *second.subsets)] == [2, 0, 1]
    mio, other = first.subsets
    assert (mio.num_repeats, other.class_tokens, other.flip_aug, mio.flip_aug) == (3, 'it\'s "her"', True, False)
    assert second.subsets[0].caption_prefix == "large" and mio.caption_prefix is None
    assert {one.caption_extension for one in (*first.subsets, *second.subsets)} == {".txt"}
    assert [one.name for one in first.subsets] == ["mio", "other"], "the same pictures are held out as in the study"


def test_the_emitted_line_runs_as_it_is(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = exported(of_file())
    words = shlex.split(result.command)
    script = words.index(str(PROJECT_ROOT / "train_network.py"))
    assert words[:script] == ["python"]
    assert train_network.main([*words[script + 1 :], "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "base             tiny-sdxl, SDXL" in said and "(15 epochs)" in said.replace("15.0", "15")
    assert "held out for validation" in said and "up to 2 x 4 accumulated" in said
    assert "text_encoder_2" in said


def test_the_shell_script_is_one_and_hands_options_on(data: Path) -> None:
    result = export(of_file(), sdxl_base="tiny-sdxl", output_dir="two words")
    assert subprocess.run(["sh", "-n", result.script], check=False).returncode == 0
    shell = f'python() {{ pwd; printf "%s\\n" "$@"; }}; . "./{result.script}"'
    words = ["sh", "-c", shell, "sh", "--dry_run"]
    said = subprocess.run(words, cwd=data, capture_output=True, text=True, check=True).stdout.splitlines()
    assert (said[0], said[-2:]) == (str(data), ["two words/sdxl_config.toml", "--dry_run"])


def test_data_given_by_options_become_a_dataset_file(data: Path) -> None:
    draw(data / "train" / "5_mio girl", 12)
    draw(data / "train" / "1_cat", 12)
    result = exported(of_folder(flip_aug=True, caption_extension=".txt", validation_split=0.2))
    (dataset,) = read_dataset_config(result.dataset, {})
    assert (dataset.resolution, dataset.batch_size, dataset.validation_split) == ((128, 128), 1, 0.2)
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (64, 256), "limits that nobody set double too"
    assert {(one.class_tokens, one.num_repeats, one.flip_aug) for one in dataset.subsets} == {
        ("mio girl", 5, True),
        ("cat", 1, True),
    }
    config = result.config.read_text()
    assert not [name for name in ("train_data_dir", "flip_aug", "resolution", "train_batch_size") if name in config]


def test_metadata_files_are_carried_over(data: Path) -> None:
    (data / "meta.json").write_text(json.dumps({f"p{n}": {"caption": "a cat"} for n in range(20)}))
    result = exported(of_folder(train_data_dir="mio", in_json="meta.json", dataset_repeats=3))
    (subset,) = read_dataset_config(result.dataset, {})[0].subsets
    assert (subset.image_dir, subset.metadata_file, subset.num_repeats) == (Path("mio"), Path("meta.json"), 3)


def test_pictures_beside_the_dataset_file_are_found_from_where_it_was_made(data: Path) -> None:
    draw(data / "far" / "pictures", 8)
    (data / "far" / "set.toml").write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pictures'\n"
    )
    result = exported(of_file(dataset_config="far/set.toml"))
    assert read_dataset_config(result.dataset, {})[0].subsets[0].image_dir == Path("far/pictures")


def test_a_dataset_file_that_moved_can_be_named(data: Path) -> None:
    best = of_file(dataset_config="gone.toml")
    with pytest.raises(UserError, match=r"gone\.toml could not be read"):
        exported(best)
    assert len(exported(best, dataset_config="set.toml").training.datasets) == 2
    assert len(exported(of_folder(train_data_dir="mio"), dataset_config="set.toml").training.datasets) == 2


def test_exporting_twice_gives_the_same_files(data: Path) -> None:
    first = exported(of_file())
    texts = [path.read_text() for path in (first.config, first.dataset, first.script)]
    assert exported(of_file()) == first
    assert [path.read_text() for path in (first.config, first.dataset, first.script)] == texts


def test_the_demo_pictures_of_a_study_without_data_are_exported_too(data: Path) -> None:
    (dataset,) = read_dataset_config(exported(best_params()).dataset, {})
    assert dataset.resolution == (256, 256) and len(dataset.subsets) == 16 and dataset.validation_split == 0.1


def test_what_changed_is_told_and_written_beside_it(data: Path) -> None:
    result = exported(of_file(network_dim=16))
    assert {"network_dim 16 -> 64", "resolution 64 64 -> 128 128 (64x64)", "max_train_epochs 12 -> 15"} <= set(
        result.changes
    )
    assert "network_dim = 64  # 16 on SD1.5" in result.config.read_text()
    assert result.report().endswith(result.command) and "note: network_dim 16 -> 64 is weak" in result.report()


# --- what is held out ---


def test_few_pictures_are_held_out_with_a_larger_share(data: Path, no_forecast: None) -> None:
    draw(data / "five", 5)
    (data / "five.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'five'\n")
    found = find_training(of_file(dataset_config="five.toml"))
    assert found.validation_share is not None and 0.1 <= found.validation_share <= 0.5
    draw(data / "three", 3)
    (data / "three.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'three'\n")
    assert find_training(of_file(dataset_config="three.toml")).validation_share == 0.0
    assert (
        train_network.main(["--config_file", str(exported(of_file(dataset_config="three.toml")).config), "--dry_run"])
        == 0
    )


@pytest.mark.parametrize("given", ["file", "split", "folder", "beside"])
def test_the_same_pictures_are_held_out_as_in_the_study(data: Path, given: str) -> None:
    from library.models.locate import locate_base
    from library.options.scripts import network_options_of
    from library.training.pictures import collect_pictures

    draw(data / "train" / "2_mio", 20)
    draw(data / "far" / "pictures", 20)
    (data / "far" / "set.toml").write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pictures'\n"
    )
    config = {
        "file": {"dataset_config": "set.toml"},
        "split": {"dataset_config": "set.toml", "validation_split": 0.3},
        "folder": {"train_data_dir": "train", "resolution": [64, 64]},
        "beside": {"dataset_config": "far/set.toml"},
    }[given]
    options = {**best_params(config).train_config, "seed": 42}
    found = network_data(options)
    assert bool(found.split) == (given != "split")
    options |= found.split
    # As a trial does, whose seed of the choice is the evaluation's.
    trial = network_options_of({**options, "seed": EVALUATION_SEED}, "test")
    chosen = collect_pictures(trial, locate_base("tiny-sd15"))
    result = exported(best_params(options))
    parsed = parse_network_options(["--config_file", str(result.config)], prog="", description=None)
    there = collect_pictures(parsed, locate_base("tiny-sdxl"))

    def paths(data: TrainingData) -> set[Path]:
        return {one.image.path.resolve() for one in data.validation}

    assert len(paths(chosen)) >= 2 and paths(there) == paths(chosen)
    assert "validation_seed = 1234" in result.dataset.read_text()
    assert "validation_seed = 1234" in result.config.read_text()


def test_a_file_that_holds_none_out_by_itself_is_refused(data: Path) -> None:
    (data / "none.toml").write_text(DATASETS.replace("[general]", "[general]\nvalidation_split = 0.0"))
    with pytest.raises(UserError, match="holds out none of 24 pictures, .* Remove it from the file"):
        network_data(best_params({"dataset_config": "none.toml"}).train_config)


def test_a_batch_is_the_files_only_where_the_file_says_it(data: Path) -> None:
    config = best_params({"dataset_config": "set.toml", "train_batch_size": 4}).train_config
    assert network_data(config).batch == 4
    (data / "none.toml").write_text(DATASETS.replace("batch_size = 4", "").replace("batch_size = 2", ""))
    assert network_data({**config, "dataset_config": "none.toml"}).batch is None


def test_areas_and_counts_are_measured(data: Path) -> None:
    first, second = find_training(of_file()).pictures
    assert (first.count, second.count) == (24, 20) and first.median_area == 96 * 64


# --- refused ---


def test_studies_that_need_no_export_are_refused(data: Path) -> None:
    with pytest.raises(UserError, match="ran on SDXL .* need no export"):
        exported(replace(of_file(), base_model=BaseModel("sdxl", "sd_xl_base_1.0.safetensors")))
    with pytest.raises(UserError, match="Only studies of train_network.py can be exported"):
        exported(replace(of_file(), script="train_repa"))


def test_a_base_that_is_not_there_or_no_sdxl_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match=r"sd_xl\.safetensors does not exist"):
        exported(of_file(), "sd_xl.safetensors")
    with pytest.raises(UserError, match=r"tiny-sd15 .*SD1\.5"):
        exported(of_file(), "tiny-sd15")
    assert not (data / "sdxl").exists()


def test_a_published_base_need_not_be_there_yet(data: Path) -> None:
    result = exported(of_file(), "stabilityai/stable-diffusion-xl-base-1.0")
    assert 'pretrained_model_name_or_path = "stabilityai/stable-diffusion-xl-base-1.0"' in result.config.read_text()


def test_options_that_a_script_has_not_are_named(data: Path) -> None:
    with pytest.raises(
        UserError, match=r"train_config of the study mio: Unknown key: network_dims \(did you mean network_dim"
    ):
        exported(of_file(network_dims=8))
    with pytest.raises(UserError, match="train_config of the study mio: network_dim is 'many'"):
        exported(of_file(network_dim="many"))


# --- kohya's own script ---


def kohya_table() -> dict[str, str]:
    """Option -> type, of kohya's script."""
    with (PROJECT_ROOT / "tests" / "data" / "kohya_options.tsv").open(encoding="utf-8", newline="") as file:
        return {row["option"][2:]: row["type"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


def test_the_options_that_kohya_does_not_know_are_those_of_the_table() -> None:
    assert fields_of(TrainNetworkOptions).keys() - kohya_table().keys() == _NOT_OF_KOHYA


def test_kohyas_script_is_told_what_it_has_no_default_for(data: Path, no_forecast: None) -> None:
    result = exported(of_file())
    text = result.config.read_text(encoding="utf-8")
    written = {name: option.value for name, option in read_options(result.config).items()}
    assert written["network_module"] == "networks.lora" and written["sdpa"] is True and written["seed"] == 7
    assert written.keys() <= kohya_table().keys() and "sdxl_train_network.py takes this file too." in text
    assert train_network.main(["--config_file", str(result.config), "--dry_run"]) == 0
    kinds = {"int": int, "float": (int, float), "str": str, "flag": bool}
    for name, value in written.items():
        kind = kohya_table()[name]
        wanted = list if "nargs" in kind else kinds.get(kind.split()[0], object)
        assert isinstance(value, wanted), (name, value)


def test_what_kohyas_script_would_ignore_is_named(data: Path) -> None:
    result = exported(of_file(network_args=["algo=loha"], ema_decay=0.99, network_alpha=8.0))
    text = result.config.read_text(encoding="utf-8")
    assert "but ignores ema_decay, network_args algo=loha (it would train a LoRA)." in text


def test_captions_in_txt_files_are_named_for_kohyas_script(data: Path) -> None:
    (data / "set.toml").write_text(DATASETS.replace('caption_extension = ".txt"\n', ""))
    assert 'caption_extension = ".txt"' in exported(of_file()).dataset.read_text(encoding="utf-8")
    (data / "mio" / "p0.caption").write_text("mio")
    subsets = [subset for one in read_dataset_config(exported(of_file()).dataset, {}) for subset in one.subsets]
    assert [subset.caption_extension for subset in subsets] == [".caption", ".txt", ".caption"]
