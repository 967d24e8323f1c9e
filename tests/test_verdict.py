"""Which checkpoint to use and at which weight, in a sentence; what is noise; and what is written beside the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.evaluation.generation_result import (
    BASE,
    Best,
    CheckpointPictures,
    GenerationResult,
    Strength,
    copies,
    to_use,
)
from library.evaluation.html_report import report_page
from library.evaluation.prompt_sets import PromptSet
from library.evaluation.recommendation import WEIGHT_KEY, Card, check_recommendation, write_card
from library.evaluation.standard_errors import Estimate
from library.evaluation.verdict import is_noise, strength_words, verdict
from library.inference.infotext import Infotext
from library.inference.picture_request import PictureRequest
from networks.families import SD15
from tests.test_page import Outline

SURE, NOISY = 0.01, 1.0
"""Standard errors: of what is told apart, and of what is not."""


def estimate(value: float, error: float = SURE) -> Estimate:
    return Estimate(value, error, 15)


def result_of(
    likeness: dict[str, float], drift: dict[str, float], error: float = SURE, adherence: dict[str, float] | None = None
) -> GenerationResult:
    """Of numbers for the base and each checkpoint, whose differences have the standard error `error`."""
    names = [name for name in likeness if name != BASE]
    columns = {"likeness": likeness, "drift": drift} | ({"adherence": adherence} if adherence else {})
    estimates = {name: {m: estimate(values[name]) for m, values in columns.items()} for name in likeness}

    def gap(measure: str, name: str, other: str) -> Estimate:
        return estimate(columns[measure][name] - columns[measure][other], error)

    best = {}
    for measure, sign in (("likeness", 1), ("drift", -1)):
        first = max(names, key=lambda name: sign * columns[measure][name])
        alike = [n for n in names if n != first and not gap(measure, n, first).is_significant]
        best[measure] = Best(first, alike)
    against = {n: {m: gap(m, n, BASE) for m in columns if m != "drift"} for n in names}
    last = {n: {m: gap(m, n, names[-1]) for m in columns} for n in names[:-1]}
    return GenerationResult(dict.fromkeys(names), {}, estimates, against, last, best, {"drift": 0.31}, [])


def test_as_like_as_the_last_with_half_the_drift_is_what_to_use() -> None:
    result = result_of({BASE: 0.2, "a": 0.3, "b": 0.4, "c": 0.401}, {BASE: 0, "a": 0.05, "b": 0.1, "c": 0.2})
    assert to_use(result) == "b" and verdict(result) == "b: as like as the last, half the drift. Use it."
    result.strength = Strength(
        "b", (0.5, 1.0), result_of({BASE: 0.2, "0.5": 0.4, "1": 0.401}, {BASE: 0, "0.5": 0.1, "1": 0.2})
    )
    assert verdict(result).endswith("Use it at 0.5.")


@pytest.mark.parametrize(
    ("likeness", "drift", "words"),
    [
        ((0.3, 0.4), (0.1, 0.2), "c: the last, and none is significantly more like or, as like as it, drifts significantly less."),
        ((0.5, 0.4), (0.05, 0.2), "b: more like than the last, 25% of its drift. Use it."),
        ((0.5, 0.4), (0.2, 0.2), "b: more like than the last, and as much drift. Use it."),
        ((0.1, 0.2), (0.1, 0.2), "No checkpoint is significantly more like the subject than the base (0.200 ± 0.021, the"),
    ],
)  # fmt: skip
def test_each_outcome_has_its_sentence(likeness: tuple[float, float], drift: tuple[float, float], words: str) -> None:
    b, c = likeness
    assert verdict(result_of({BASE: 0.2, "b": b, "c": c}, {BASE: 0, "b": drift[0], "c": drift[1]})).startswith(words)


def test_one_checkpoint_is_compared_with_the_base() -> None:
    words = verdict(result_of({BASE: 0.2, "zorb": 0.4}, {BASE: 0, "zorb": 0.2}))
    assert words == "zorb: likeness 0.400 ± 0.021, the base's 0.200, drift 0.200 ± 0.021, another seed's 0.310. Use it."


def test_one_that_no_longer_follows_prompts_is_not_chosen_unless_all_are_so() -> None:
    likeness, drift = {BASE: 0.2, "a": 0.4, "b": 0.4}, {BASE: 0.0, "a": 0.1, "b": 0.2}
    result = result_of(likeness, drift, adherence={BASE: 0.3, "a": 0.2, "b": 0.3})
    assert to_use(result) == "b"
    result = result_of(likeness, drift, adherence={BASE: 0.3, "a": 0.3, "b": 0.2})
    assert (
        verdict(result)
        == "a: as like as the last, half the drift. Use it. The last follows prompts less than the base does."
    )
    result = result_of(likeness, drift, adherence={BASE: 0.3, "a": 0.2, "b": 0.2})
    assert to_use(result) == "a" and verdict(result).endswith("a follows prompts less than the base does.")


def test_one_that_copies_training_pictures_is_not_chosen_unless_all_do_and_that_is_said() -> None:
    result = result_of({BASE: 0.2, "a": 0.4, "b": 0.4}, {BASE: 0.0, "a": 0.1, "b": 0.2})
    result.anchors["copies"] = 0.05
    for name, share in ((BASE, 0.0), ("a", 0.5), ("b", 0.05)):
        result.estimates[name]["copies"] = estimate(share)
    result.against_base["a"]["copies"], result.against_base["b"]["copies"] = estimate(0.5), estimate(0.05)
    assert copies(result, "a") and not copies(result, "b"), "so many are by chance"
    assert to_use(result) == "b" and "copies" not in verdict(result) and not is_noise(result, "b", "copies")
    result.estimates["b"]["copies"] = result.against_base["b"]["copies"] = estimate(0.5)
    assert to_use(result) == "a" and "The last copies training pictures: 50% of its pictures are nearer" in verdict(
        result
    )
    assert "a copies training pictures" in verdict(result)


def test_without_photos_nothing_is_advised_but_what_drifts_least() -> None:
    result = result_of({BASE: 0.2, "a": 0.4, "b": 0.4}, {BASE: 0.0, "a": 0.1, "b": 0.2})
    del result.best["likeness"]
    assert to_use(result) == "b" and verdict(result).endswith("(--reference_dir). a drifts least: 0.100 ± 0.021.")


def sweep(*likeness: float, error: float = SURE) -> Strength:
    weights = [round(0.2 * (place + 1), 1) for place in range(len(likeness))]
    values = {BASE: 0.2, **{f"{w:g}": value for w, value in zip(weights, likeness, strict=True)}}
    return Strength("dog", weights, result_of(values, {BASE: 0.0, **{f"{w:g}": w / 10 for w in weights}}, error))


def test_the_weight_is_the_one_from_which_likeness_no_longer_rises_beyond_its_interval() -> None:
    found = sweep(0.22, 0.3, 0.4, 0.4005, 0.401)
    assert found.recommended == 0.6 and found.alike == [0.6, 0.8, 1.0]
    assert "From 0.6 on likeness no longer rises" in (words := strength_words(found))
    assert "drift goes from 0.060 to 0.100" in words
    assert sweep(0.22, 0.3, 0.4, 0.5).recommended == 0.8, "the highest, where nothing is alike"
    assert sweep(0.3, 0.4, 0.3, 0.4005).alike == [0.8], "what is beyond a gap is not counted"
    assert found.to_json()["interval"] == [0.6, 1.0]


def test_where_no_weight_is_more_like_than_the_base_none_is_recommended() -> None:
    found = sweep(0.21, 0.22, error=NOISY)
    assert found.recommended is None and "at none is likeness significantly above" in strength_words(found)


def test_a_number_within_its_interval_is_noise() -> None:
    result = result_of({BASE: 0.2, "a": 0.4}, {BASE: 0.0, "a": 0.1}, NOISY)
    assert is_noise(result, "a", "likeness") and not is_noise(result, "a", "drift")
    result.estimates["a"]["drift"] = estimate(0.1, NOISY)
    assert is_noise(result, "a", "drift")


def test_no_prompt_and_no_name_becomes_markup_on_the_page() -> None:
    hostile = "<script>alert(1)</script><b>\"'&"
    result = result_of({BASE: 0.2, hostile: 0.4, "c": 0.5}, {BASE: 0, hostile: 0.1, "c": 0.2})
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    result.drawn = dict.fromkeys((BASE, hostile, "c"), CheckpointPictures(pictures, pictures, None))
    result.notes = [hostile]
    swept = result_of({BASE: 0.2, "0.5": 0.4, "1": 0.5}, {BASE: 0, "0.5": 0.1, "1": 0.2})
    swept.drawn = dict.fromkeys((BASE, "0.5", "1"), result.drawn[BASE])
    result.strength = Strength(hostile, (0.5, 1.0), swept)
    prompts = PromptSet((PictureRequest(hostile, "", 1, 1.0, 64, 64),), (42, 43))
    plan = SimpleNamespace(subject=prompts, unrelated=prompts, photos=[])
    outline = Outline(report_page(plan, result, {hostile: hostile}, {hostile: hostile}).html())  # type: ignore[arg-type]
    assert outline.open == [] and not {"script", "b"} & set(outline.names())
    assert outline.text.count("<script>alert(1)") > 10


# What is written


def write_adapter(folder: Path) -> Path:
    path = folder / "dög 'x'.safetensors"
    save_file({"b": torch.randn(3, 5), "a": torch.randn(7).half()}, path, metadata={"ss_steps": "10", "other": "ü"})
    return path


def card(weight: float = 0.8) -> Card:
    picture = Image.new("RGB", (8, 8), "red")
    info = Infotext(prompt="a dog", steps=3, seed=1, version="repa-scripts 1")
    return Card(weight, "a dog", SD15, (picture, info))


def test_the_weight_goes_into_the_adapter_whose_tensors_stay_byte_by_byte(tmp_path: Path) -> None:
    path = write_adapter(tmp_path)
    before, times, content = load_file(path), path.stat().st_mtime_ns, path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    write_card(path, card(), lambda text: None)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"ss_steps": "10", "other": "ü", WEIGHT_KEY: "0.8"}
    after = path.read_bytes()
    assert after[8 + int.from_bytes(after[:8], "little") :] == content[8 + length :]
    assert all(torch.equal(before[name], value) for name, value in load_file(path).items())
    assert path.stat().st_mtime_ns == times, "by which checkpoints are put in order"
    write_card(path, card(1.2), lambda text: None)
    with safe_open(path, "pt") as file:
        assert file.metadata()[WEIGHT_KEY] == "1.2"


def test_the_card_beside_it_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    path = write_adapter(tmp_path)
    write_card(path, card(), lambda text: None)
    beside = path.with_suffix(".json")
    assert json.loads(beside.read_text()) == {"activation text": "a dog", "sd version": "SD1", "preferred weight": 0.8}
    beside.write_text(
        json.dumps({"activation text": "dög", "notes": "mine", "sd version": "", "preferred weight": 0.3})
    )
    write_card(path, card(), lambda text: None)
    expected = {"activation text": "dög", "notes": "mine", "sd version": "SD1", "preferred weight": 0.8}
    assert json.loads(beside.read_text()) == expected


def test_a_preview_of_ours_is_renewed_and_another_one_kept(tmp_path: Path) -> None:
    path, said = write_adapter(tmp_path), list[str]()
    preview = path.with_suffix(".png")
    write_card(path, card(), said.append)
    first = preview.read_bytes()
    Image.open(preview).verify()
    preview.write_bytes(first)
    write_card(path, card(), said.append)
    assert not any("kept" in words for words in said)
    Image.new("RGB", (4, 4)).save(preview)
    own = preview.read_bytes()
    write_card(path, card(), said.append)
    assert preview.read_bytes() == own and said[-1].startswith("kept ")


def test_what_cannot_be_written_is_found_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--write writes into an adapter file, and .* is a training state"):
        check_recommendation(tmp_path)
    path = write_adapter(tmp_path)
    check_recommendation(path)
    path.with_suffix(".json").write_text("[1, 2]")
    with pytest.raises(UserError, match="is not the card of an adapter"):
        check_recommendation(path)
    path.with_suffix(".json").write_text("{broken")
    with pytest.raises(UserError):
        check_recommendation(path)
