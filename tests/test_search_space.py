"""Search spaces: what the shipped ones say, how values become options and back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.search.space import Space, difference
from library.search.space_file import find_space, read_space
from tests.tools.search import SPACE

SHIPPED = ("alignment", "default", "repa", "sdxl")
GOOD = "[parameters.learning_rate]\nlow = 1e-5\nhigh = 1e-3\nlog = true\ndefault = 1e-4\n"


def space_of(tmp_path: Path, text: str) -> Space:
    (tmp_path / "mine.toml").write_text(text)
    return read_space(tmp_path / "mine.toml")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_space_has_its_defaults_in_range(name: str) -> None:
    space = read_space(find_space(name))
    assert space.objection(space.defaults) is None


def test_the_default_space_stands_for_the_guides_configuration() -> None:
    space = read_space(find_space("default"))
    options = space.resolve(space.defaults, {})
    wanted = {
        "learning_rate": 3e-4,
        "text_encoder_lr": 2e-4,
        "network_dim": 64,
        "network_alpha": 32,
        "optimizer_type": "AdamW8bit",
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 3,
        "gradient_accumulation_steps": 2,
        "max_train_epochs": 12,
    }
    assert {name: options[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["alignment", "default", "repa"])
def test_every_choice_makes_options_that_the_script_takes(name: str, tmp_path: Path) -> None:
    import toml

    from library.options.network import parse_network_options
    from library.options.repa import parse_repa_options

    space = read_space(find_space(name))
    for one in space.parameters:
        for value in one.choices or (one.low, one.high):
            options = space.resolve({**space.defaults, one.name: value}, {})
            file = tmp_path / "options.toml"
            file.write_text(toml.dumps(options))
            if name == "default":
                parse_network_options(["--config_file", str(file)], prog="x", description=None)
            else:
                parse_repa_options(["--dataset_config", str(file)], prog="x", description=None)


def test_sdxl_multiplies_what_was_carried_over_and_turns_text_encoders_off() -> None:
    space = read_space(find_space("sdxl"))
    fixed = {"learning_rate": 2e-4, "unet_lr": 2e-4, "max_train_epochs": 15}
    params = {**space.defaults, "learning_rate_multiplier": 0.5, "text_encoder_ratio": 0.5}
    options = space.resolve(params, fixed)
    assert (options["learning_rate"], options["unet_lr"], options["text_encoder_lr"]) == (1e-4, 1e-4, 5e-5)
    assert options["max_train_epochs"] == 15
    assert space.resolve({**params, "train_text_encoders": False}, fixed)["text_encoder_lr"] == 0
    assert space.suggested({"learning_rate": 1e-4, "text_encoder_lr": 0}, fixed)["train_text_encoders"] is False
    with pytest.raises(UserError, match="multiplies learning_rate_multiplier by learning_rate, which is not fixed"):
        space.resolve(params, {})


@given(st.data())
@settings(max_examples=40)
def test_options_go_back_to_the_params_they_came_from(data: st.DataObject) -> None:
    space = read_space(find_space("default"))
    params = {
        one.name: data.draw(
            st.sampled_from(one.choices)
            if one.choices
            else st.sampled_from(range(int(one.low), int(one.high) + 1, int(one.step or 1)))  # type: ignore[arg-type]
            if one.is_whole
            else st.floats(one.low, one.high)  # type: ignore[arg-type]
        )
        for one in space.parameters
    }
    back = space.suggested(space.searched(params, {}), {})
    for name, value in params.items():
        assert back[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_resolving_leaves_the_suggested_values_alone() -> None:
    params = dict(SPACE.defaults)
    options = SPACE.resolve(params, {})
    assert params == SPACE.defaults and options["text_encoder_lr"] == 1.5e-4
    assert list(SPACE.searched(params, {})) == ["learning_rate", "text_encoder_lr", "network_dim"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"mine.toml has no \[parameters.NAME\]"),
        ("scrpt = 1\n" + GOOD, r"mine.toml: scrpt is not a key .*did you mean script\?"),
        ('script = "train_lora"\n' + GOOD, "script is 'train_lora'; it must be one of train_network, train_repa"),
        (GOOD.replace("high", "hihg"), r"\[parameters.learning_rate\] hihg is unknown \(did you mean high\?\)"),
        (
            GOOD.replace("learning_rate", "learnig_rate"),
            r"learnig_rate is not an option .*did you mean learning_rate\?",
        ),
        (GOOD.replace("default = 1e-4", ""), "default is missing"),
        (GOOD.replace("1e-4", "1.0"), "default is 1; it must lie between 1e-05 and 0.001"),
        (GOOD.replace("low = 1e-5", "low = 0.0"), "log needs a low above 0"),
        (GOOD.replace("low = 1e-5", "low = 1.0"), "low must be below high"),
        (GOOD.replace("low = 1e-5", 'low = "1e-5"'), "low is '1e-5'"),
        (GOOD + "choices = [1.0, 2.0]\n", "has both choices and a range"),
        (GOOD + 'times = ["nothing"]\n', "times nothing is neither an option nor a parameter"),
        (
            GOOD + 'times = ["kind"]\n[parameters.kind]\noption = ""\nchoices = ["a", "b"]\ndefault = "a"\n',
            "times kind multiplies by strings, such as 'a'",
        ),
        (GOOD + "[options]\nepochs = 3\n", r"\[options\] epochs is not an option"),
        ("[parameters.network_dim]\nchoices = [8, 16]\ndefault = 12\n", "default is 12; it must be one of 8, 16"),
        ("[parameters.max_train_epochs]\nlow = 8\nhigh = 16\nstep = 3\ndefault = 8\n", "whole steps"),
        (
            GOOD + '[parameters.rate]\noption = "learning_rate"\nchoices = [1, 2]\ndefault = 1\n',
            "which learning_rate sets too",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_file_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        space_of(tmp_path, text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"learning_rate": 0, "text_encoder_lr": 1e-4},
            "text_encoder_lr cannot be a multiple of learning_rate, which is 0",
        ),
        ({"learning_rate": 3e-4, "text_encoder_lr": "abc"}, "text_encoder_lr is 'abc'; it must be a number"),
        ({"learning_rate": "x", "text_encoder_lr": 1e-4}, "learning_rate is 'x'; it must be a number"),
        (
            {"text_encoder_ratio": 0.5, "text_encoder_lr": 1e-4},
            "text_encoder_ratio and text_encoder_lr set the same value",
        ),
    ],
)
def test_values_that_make_no_factor_are_one_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SPACE.suggested(options, {})


def test_a_space_of_the_other_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    with pytest.raises(UserError, match="is a search space of train_network, but this study tunes train_repa"):
        read_space(tmp_path / "mine.toml", "train_repa")
    with pytest.raises(
        UserError, match="There is no search space nothing, .* which has alignment, default, flow, repa, sdxl"
    ):
        find_space("nothing")


def test_the_hash_is_of_the_content_and_not_of_the_order(tmp_path: Path) -> None:
    other = "[parameters.network_dim]\nchoices = [8, 16]\ndefault = 8\n"
    assert space_of(tmp_path, GOOD + other).hash == space_of(tmp_path, "# a word\n" + other + GOOD).hash
    assert space_of(tmp_path, GOOD).hash != space_of(tmp_path, GOOD.replace("1e-3", "2e-3")).hash
    # A study's stored hash must hold in the next version too.
    assert space_of(tmp_path, GOOD).hash == "6ca5fc503622388b"


def test_a_difference_is_said_in_words(tmp_path: Path) -> None:
    old = space_of(tmp_path, GOOD + "[parameters.network_dim]\nchoices = [8, 16]\ndefault = 8\n")
    new = space_of(
        tmp_path, GOOD.replace("1e-3", "2e-3") + "[parameters.network_alpha]\nchoices = [1, 2]\ndefault = 1\n"
    )
    assert difference(old.as_dict(), new.as_dict()) == [
        "network_dim is gone",
        "network_alpha is new",
        "learning_rate: high was 0.001, is 0.002",
    ]


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"learning_rate": 1.0}, "learning_rate is 1; it must lie between 1e-05 and 0.01"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4'; it must be a number"),
        ({"network_dim": 12}, "network_dim is 12; it must be one of 8, 16, 32"),
        ({"network_dimm": 8}, r"network_dimm is unknown \(did you mean network_dim\?\)"),
    ],
)
def test_params_outside_the_space_are_named(params: dict[str, object], reason: str) -> None:
    import re

    assert re.search(reason, SPACE.objection({**SPACE.defaults, **params}) or "")
    with pytest.raises(UserError, match="."):
        SPACE.suggested(params, {})


def test_a_value_at_a_border_is_noticed_on_the_scale_it_is_searched_on() -> None:
    assert SPACE.borders({"learning_rate": 9.5e-3}) == ["learning_rate 0.0095 is at the upper end of 1e-05 to 0.01"]
    assert SPACE.borders({"learning_rate": 1e-3, "text_encoder_ratio": 0.5, "network_dim": 16}) == []
    assert SPACE.borders({"network_dim": 32}) == ["network_dim 32 is the largest choice"]
