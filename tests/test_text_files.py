"""Text files as editors and shells write them: byte order marks, UTF-16, what is no text; and TOML with Windows paths in it."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

import pytest

from library.data.caption_files import read_captions, read_metadata
from library.data.dataset_config import read_dataset_config
from library.data.sources import load_class_names, open_source
from library.errors import UserError
from library.files import read_json
from library.inference.prompt_file import read_prompt_file
from library.options.toml_file import read_options, read_toml
from library.text_files import NotText, decoded, read_text
from tests.test_network_options import config, parsed
from tests.tools.dataset_files import picture

MARKED = {
    "UTF-8": "ä b\n".encode("utf-8-sig"),
    "UTF-16 LE": codecs.BOM_UTF16_LE + "ä b\n".encode("utf-16-le"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + "ä b\n".encode("utf-16-be"),
    "none": "ä b\n".encode(),
}


@pytest.mark.parametrize("kind", MARKED)
def test_byte_order_marks_are_read_and_left_out(kind: str, tmp_path: Path) -> None:
    assert decoded(MARKED[kind]) == "ä b\n"
    (tmp_path / "a.txt").write_bytes(MARKED[kind])
    assert read_text(tmp_path / "a.txt") == "ä b\n"
    assert [caption.lines for caption in read_captions([tmp_path / "a.txt"])] == [["ä b"]]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("a cat\na dog\n".encode("utf-16-le"), "UTF-16 text without a byte order mark (line 1)"),
        ("a cat".encode("utf-16-be"), "UTF-16 text without a byte order mark (line 1)"),
        (b"a cat\nand \0 nothing of the kind of text", "no text, for it has NUL bytes (line 2)"),
        (b"a\ncaf\xe9", "not UTF-8 text (line 2)"),
        (codecs.BOM_UTF16_LE + b"a\0b", "not UTF-16 text (line 1)"),
        (b"", None),
    ],
)
def test_what_is_no_text_is_said_with_its_line(data: bytes, sentence: str | None) -> None:
    if sentence is None:
        assert decoded(data) == ""
        return
    with pytest.raises(NotText, match=re.escape(sentence)):
        decoded(data)


def test_captions_of_utf16_without_a_mark_are_named(tmp_path: Path) -> None:
    for name, encoding in (("1.txt", "utf-16-le"), ("2.txt", "utf-8"), ("3.txt", "utf-16-be"), ("4.txt", "latin-1")):
        (tmp_path / name).write_bytes("a café".encode(encoding))
    with pytest.raises(UserError) as caught:
        read_captions(sorted(tmp_path.iterdir()))
    assert str(caught.value) == (
        f"Caption files that are UTF-16 text without a byte order mark: {tmp_path}/1.txt, line 1; {tmp_path}/3.txt, line 1. "
        f"Save them as UTF-8. Caption files that are not UTF-8 text: {tmp_path}/4.txt, line 1. Save them as UTF-8."
    )


def test_every_file_that_people_write_may_begin_with_a_mark(tmp_path: Path) -> None:
    def marked(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        return tmp_path / name

    assert parsed("--config_file", str(marked("my.toml", "seed = 7"))).training.seed == 7
    assert read_options(marked("base.toml", "seed = 7"))["seed"].line == 1
    (tmp_path / "pics").mkdir()
    dataset = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = ' {tmp_path}/pics '\n"
    (found,) = read_dataset_config(marked("set.toml", dataset), {})
    assert found.subsets[0].image_dir == tmp_path / "pics"
    as_json = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "pics")}]}]}
    assert read_dataset_config(marked("set.json", json.dumps(as_json)), {})[0].resolution == (64, 64)
    for name, text in (
        ("p.txt", "a cat"),
        ("p.toml", "[prompt]\n[[prompt.subset]]\nprompt = 'a cat'"),
        ("p.json", '[{"prompt": "a cat"}]'),
    ):
        assert read_prompt_file(marked(name, text))[0].prompt == "a cat"
    assert read_metadata(marked("meta.json", '{"a": {"caption": "x"}}'))[0].key == "a"
    assert read_metadata(marked("meta.jsonl", '{"image_path": "a", "caption": "x"}'))[0].key == "a"
    assert read_json(marked("any.json", "[1]")) == [1]
    assert load_class_names(marked("names.json", '["tench"]')) == {0: "tench"}
    picture(tmp_path / "m" / "p0.png")
    assert len(open_source(marked("m.csv", "sample_id,path,class_id\na,m/p0.png,0\n")).samples) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'output_dir = "C:\train\new"', r"""Write 'C:\train\new' in single quotes, or "C:/train/new"."""),
        (r'output_dir = "C:\data\sets"', r"""Write 'C:\data\sets' in single quotes, or "C:/data/sets"."""),
        (r'train_data_dir = "D:\users\me\"', r"""Write 'D:\users\me' in single quotes, or "D:/users/me/"."""),
        (r'base_weights = ["a.safetensors", "e:\b\n.safetensors"]', r"""Write 'e:\b\n.safetensors' in single quotes"""),
        (
            r'pretrained_model_name_or_path = "\\nas\train\x.safetensors"',
            r"""Write '\\nas\train\x.safetensors' in single""",
        ),
        (r'output_dir = "data\new"', r"""Write 'data\new' in single quotes, or "data/new"."""),
        (r'logging_dir = "runs\today"', r"""Write 'runs\today' in single quotes, or "runs/today"."""),
    ],
)
def test_a_windows_path_in_double_quotes_is_explained(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parsed("--config_file", config(tmp_path, f"seed = 1\n{line}\n"))
    assert said in str(caught.value) and "line 2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        r"output_dir = 'C:\train\new'",
        r'output_dir = "C:\\train\\new"',
        'output_dir = "C:/train/new"',
        r'training_comment = "first\nsecond: \"quoted\""',
        r'seed = 1 # was "C:\train"',
        "output_dir = '''C:\\train'''",
    ],
)
def test_other_backslashes_are_left_alone(line: str, tmp_path: Path) -> None:
    assert len(read_toml(Path(config(tmp_path, line)))) == 1
    parsed("--config_file", config(tmp_path, line))
