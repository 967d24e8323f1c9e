"""caption.py: captions by a model, tags by a tagger, changes without one; what a person wrote stays, files keep their form."""

from __future__ import annotations

import codecs
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import caption
from library.captioning.edits import Edits
from library.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from library.options.checks import OptionError
from tests.tools.photo_like import scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures; the second has a caption of a person's."""
    folder = tmp_path / "mio"
    folder.mkdir()
    for number in range(3):
        scene(number, (64, 48)).save(folder / f"{number}.png")
    (folder / "1.txt").write_bytes(b"sks dog, in snow\r\n")
    return folder


def edited(line: str, *words: str, separator: str = ",", seed: int = 42) -> str:
    return Edits(words, separator, seed)(line, "a.txt")


def test_operations_are_done_in_their_order() -> None:
    assert edited("a, b, c", "remove:B", "add:d, A", "first:e") == "e, a, c, d"
    assert edited("a dog, A  Dog,a dog", "deduplicate") == "a dog, A  Dog"
    assert edited("a dog on a dogged road", "replace:dog=sks dog") == "a sks dog on a dogged road"
    assert edited("a, b", "first:b") == "b, a"
    assert edited("x; y", "add:z", separator=";") == "x; y; z"
    assert edited("a photo of sks dog", "first:sks") == "a photo of sks dog"
    assert edited("a photo of a dog", "first:sks") == "sks, a photo of a dog"


def test_what_no_operation_changes_stays_to_the_letter() -> None:
    assert edited("a,b ,  c", "remove:x", "deduplicate", "replace:q=r", "add:c") == "a,b ,  c"


def test_shuffling_keeps_the_first_tags_and_depends_on_seed_and_name_alone() -> None:
    tags = ", ".join("abcdefgh")
    once = edited(tags, "shuffle:2")
    assert once != tags and once.startswith("a, b, ") and sorted(once) == sorted(tags)
    assert once == edited(tags, "shuffle:2") != edited(tags, "shuffle:2", seed=43)


@pytest.mark.parametrize(
    "word", ["shuffel", "add", "add: ,", "replace:dog", "replace:=x", "shuffle:x", "deduplicate:1"]
)
def test_what_is_no_operation_is_refused(word: str) -> None:
    with pytest.raises(OptionError, match="edit "):
        Edits([word], ",", 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"dog, red\r\n\r\ncat \r\n", b"sks, dog, red\r\n\r\nsks, cat \r\n"),
        (codecs.BOM_UTF8 + "Bär, 犬".encode(), codecs.BOM_UTF8 + "sks, Bär, 犬".encode()),
        (
            codecs.BOM_UTF16_LE + "dog, x\n".encode("utf-16-le"),
            codecs.BOM_UTF16_LE + "sks, dog, x\n".encode("utf-16-le"),
        ),
        (b"dog, old mac\rcat, y", b"sks, dog, old mac\rsks, cat, y"),
    ],
)
def test_marks_encodings_and_line_ends_stay(folder: Path, before: bytes, after: bytes) -> None:
    (folder / "1.txt").write_bytes(before)
    assert caption.main([str(folder), "--edit", "first:sks"]) == EXIT_OK
    assert (folder / "1.txt").read_bytes() == after and not (folder / "0.txt").exists()


def test_a_dry_run_shows_the_difference_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caption.main([str(folder), "--edit", "replace:dog=cat", "--dry_run"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "- sks dog, in snow\n+ sks cat, in snow\n" in said and "1 caption would change" in said
    assert (folder / "1.txt").read_bytes() == b"sks dog, in snow\r\n"


def test_nothing_is_written_where_one_caption_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "2.txt").write_bytes(b"caf\xe9, dog")
    assert caption.main([str(folder), "--edit", "first:new"]) == EXIT_BAD_INPUT
    assert "2.txt is not UTF-8 text" in capsys.readouterr().err
    assert (folder / "1.txt").read_bytes() == b"sks dog, in snow\r\n"


def test_captions_are_found_in_kohyas_folders_and_beside_images(tmp_path: Path) -> None:
    for inner in ("10_mio/images", "5_other"):
        (tmp_path / inner).mkdir(parents=True)
        scene(1, (32, 32)).save(tmp_path / inner / "a.png")
    (tmp_path / "10_mio" / "captions").mkdir()
    (tmp_path / "10_mio" / "captions" / "a.txt").write_text("one")
    (tmp_path / "5_other" / "a.txt").write_text("two")
    assert caption.main([str(tmp_path), "--edit", "add:x"]) == EXIT_OK
    assert (tmp_path / "10_mio" / "captions" / "a.txt").read_text() == "one, x"
    assert (tmp_path / "5_other" / "a.txt").read_text() == "two, x"


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of one layer with its processor, as transformers saves it; untrained."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "photo", "of", "dog", "cat", "on", "snow", ","]
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {
        **small,
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 32,
        **{"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0},
    }
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor = BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}),
        BertTokenizer(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"]),
    )
    processor.save_pretrained(folder)
    return folder


def test_a_model_captions_what_has_no_caption(
    folder: Path, tiny_blip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--model", str(tiny_blip), "--max_new_tokens", "6", "--device", "cpu", "--prefix", "sks"]
    assert caption.main([*words, "--dry_run"]) == EXIT_OK and not (folder / "0.txt").exists()
    assert "2 pictures to caption; 1 caption stays" in capsys.readouterr().out
    assert caption.main(words) == EXIT_OK
    assert (folder / "1.txt").read_bytes() == b"sks dog, in snow\r\n"
    written = (folder / "0.txt").read_text()
    assert written.startswith("sks, ") and len(written) > 6 and (folder / "2.txt").is_file()
    assert caption.main([*words, "--overwrite", "--prompt", "a photo of"]) == EXIT_OK
    assert (folder / "0.txt").read_text().startswith("sks, a photo of")
    replaced = (folder / "1.txt").read_bytes()
    assert replaced.startswith(b"sks, a photo of") and replaced.endswith(b"\r\n")


def test_what_is_no_image_to_text_model_is_refused(
    folder: Path, tiny_dinov2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, said in (
        (tiny_dinov2, "describes a dinov2"),
        (folder, "has no config.json"),
        ("nowhere", "neither a folder"),
    ):
        assert caption.main([str(folder), "--model", str(model)]) == EXIT_BAD_INPUT
        assert said in capsys.readouterr().err


TAGS = ("general", "1girl", "long_hair", ">_<", "mio_(maker)", "simple_background")


class StandIn:
    """onnxruntime's session of a tagger that says how blue, green and red a picture is."""

    def __init__(self, path: str, providers: Any) -> None:
        assert Path(path).name == "model.onnx"

    def get_inputs(self) -> list[Any]:
        return [types.SimpleNamespace(name="input", shape=["batch", 8, 8, 3])]

    def get_outputs(self) -> list[Any]:
        return [types.SimpleNamespace(name="output", shape=["batch", len(TAGS)])]

    def run(self, names: None, given: dict[str, Any]) -> list[Any]:
        pixels = given["input"]
        assert pixels.dtype == np.float32 and pixels.shape[1:] == (8, 8, 3)
        blue, green, red = (pixels[:, 4, 4, channel] / 255 for channel in range(3))
        ones = np.ones_like(blue)
        return [np.stack([ones, blue, green, red, 0.8 * ones, 0.9 * ones], axis=1)]


@pytest.fixture
def tagger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tagger's folder, run by a stand-in for onnxruntime, which is an extra and is not installed for the tests."""
    runtime = types.ModuleType("onnxruntime")
    runtime.InferenceSession = StandIn  # type: ignore[attr-defined]
    runtime.get_available_providers = lambda: ["CPUExecutionProvider"]  # type: ignore[attr-defined]
    runtime.__spec__ = importlib.util.spec_from_loader("onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    folder = tmp_path / "tagger"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    categories = (9, 0, 0, 0, 4, 0)
    rows = [f"{number},{name},{kind},1" for number, (name, kind) in enumerate(zip(TAGS, categories, strict=True))]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]))
    return folder


def colour(folder: Path, *values: int) -> None:
    for file in folder.iterdir():
        file.unlink()
    Image.new("RGB", (40, 30), values).save(folder / "0.png")


def test_a_tagger_sees_blue_green_red_and_keeps_what_is_likely(folder: Path, tagger: Path) -> None:
    colour(folder, 30, 120, 250)
    words = [str(folder), "--tagger", str(tagger), "--prefix", "mio"]
    assert caption.main(words) == EXIT_OK
    assert (folder / "0.txt").read_text() == "mio, 1girl, simple background, long hair"
    assert caption.main([*words, "--overwrite", "--threshold", "0.1", "--character_threshold", "0.8"]) == EXIT_OK
    assert (folder / "0.txt").read_text() == "mio, 1girl, simple background, mio (maker), long hair, >_<"
    assert caption.main([*words, "--overwrite", "--blacklist", "simple_background", "Long Hair"]) == EXIT_OK
    assert (folder / "0.txt").read_text() == "mio, 1girl"


def test_appended_tags_stand_once_behind_what_a_person_wrote(folder: Path, tagger: Path) -> None:
    colour(folder, 250, 0, 250)
    (folder / "0.txt").write_bytes(b"my own words, 1girl\r\nsecond line\r\n")
    assert caption.main([str(folder), "--tagger", str(tagger), "--append"]) == EXIT_OK
    assert (folder / "0.txt").read_bytes() == b"my own words, 1girl, >_<, simple background\r\nsecond line\r\n"


def test_a_tagger_whose_files_do_not_fit_is_refused(
    folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tagger / "selected_tags.csv"
    csv.write_text(csv.read_text().rpartition("\n")[0])
    assert caption.main([str(folder), "--tagger", str(tagger)]) == EXIT_BAD_INPUT
    assert "names 5 tags" in capsys.readouterr().err
    csv.unlink()
    assert caption.main([str(folder), "--tagger", str(tagger)]) == EXIT_BAD_INPUT
    assert "has no selected_tags.csv" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_does_not_keep_the_others_from_theirs(
    folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    assert caption.main([str(folder), "--tagger", str(tagger)]) == EXIT_FAILED
    assert "1 picture could not be read" in capsys.readouterr().err and (folder / "2.txt").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "folder is missing"),
        (["HERE"], "name a --model or a --tagger"),
        (["HERE", "--edit", "shuffle", "--overwrite"], "overwrite has no effect"),
        (["HERE", "--edit", "shuffle", "--threshold", "0.5"], "threshold has no effect without tagger"),
        (["HERE", "--model", "a/b", "--tagger", "a/b"], "exclude each other"),
        (["HERE", "--tagger", "a/b", "--overwrite", "--append"], "exclude each other"),
        (["HERE/none", "--edit", "shuffle"], "has no pictures"),
        (["HERE/nowhere", "--edit", "shuffle"], "is no folder"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "none").mkdir()
    assert caption.main([word.replace("HERE", str(folder)) for word in words]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
