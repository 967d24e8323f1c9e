"""Samplers and schedules by the names that A1111, kohya and people write."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.inference.picture_request import PictureRequest, request_of
from library.inference.prompt_file import PromptLine
from library.inference.sampler_names import (
    DEFAULT_SCHEDULES,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    sampler_named,
    schedule_named,
)
from library.inference.sigmas import SCHEDULES
from library.options.generate import SamplingOptions


def request(sampler: str, schedule: str | None = None) -> PictureRequest:
    return PictureRequest("", "", steps=1, cfg_scale=1.0, width=8, height=8, sampler=sampler, schedule=schedule)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_a_name_may_hold_its_schedule(name: str, schedule: str) -> None:
    assert sampler_named(name) == sampler_named(f" {name.lower()} ") == (name, None)
    assert sampler_named(f"{name} {schedule}") == sampler_named(f"{name}  {schedule}".upper()) == (name, schedule)


def test_the_tables_hold_the_same_names() -> None:
    assert set(SCHEDULES) == set(SCHEDULE_NAMES) >= set(DEFAULT_SCHEDULES.values())


KOHYAS = """ddim pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle k_lms k_euler k_euler_a k_dpm_2
k_dpm_2_a"""


@pytest.mark.parametrize("name", KOHYAS.split())
def test_kohyas_names_are_known_with_their_schedules(name: str) -> None:
    sampler, schedule = request(name).sampler_and_schedule
    assert sampler in SAMPLER_NAMES and schedule == ("DDIM" if name in ("ddim", "pndm") else "Normal")


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("DPM++ 2M", None, ("DPM++ 2M", "Karras")),
        ("DPM++ 2M", "exponential", ("DPM++ 2M", "Exponential")),
        ("Euler", None, ("Euler", "Normal")),
        ("Euler a Karras", None, ("Euler a", "Karras")),
        ("Euler a Karras", "karras", ("Euler a", "Karras")),
        ("dpm++ 3m sde", "AYS 32", ("DPM++ 3M SDE", "Align Your Steps 32")),
        ("k_euler_a", None, ("Euler a", "Normal")),
        ("k_euler_a", "Karras", ("Euler a", "Karras")),
    ],
)
def test_a_request_knows_its_sampler_and_schedule(
    sampler: str, schedule: str | None, expected: tuple[str, str]
) -> None:
    assert request(sampler, schedule).sampler_and_schedule == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, ("Euler", "Exponential")),
        ("DPM++ 2M", ("DPM++ 2M", "Exponential")),
        ("DPM++ 2M Karras", ("DPM++ 2M", "Karras")),
        ("euler_a", ("Euler a", "Normal")),
    ],
)
def test_a_lines_sampler_takes_the_schedule_of_the_options_unless_it_has_one(
    own: str | None, expected: tuple[str, str]
) -> None:
    line, sampling = PromptLine("a", sample_sampler=own), SamplingOptions(sampler="Euler", schedule="Exponential")
    assert request_of(line, sampling, width=8, height=8).sampler_and_schedule == expected


def test_a_schedule_said_twice_differently_is_refused() -> None:
    with pytest.raises(UserError, match=r"The sampler Euler Karras names a schedule, and the schedule is Normal."):
        _ = request("Euler Karras", "Normal").sampler_and_schedule


@pytest.mark.parametrize(
    ("text", "near"), [("Eular", "Euler"), ("DPM++ 2MM", "DPM++ 2M"), ("euler_aa", "euler_a"), ("UNIPCC", "UniPC")]
)
def test_unknown_samplers_are_named_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        sampler_named(text)
    assert str(refused.value).startswith(f"{text} is no sampler (did you mean {near}?). Known are Euler, Euler a, DDIM")


def test_unknown_schedules_are_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^karas is no schedule \(did you mean Karras\?\). Known are Normal, Karras,"):
        schedule_named("karas")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dpmpp_2m_karras", ("DPM++ 2M", "Karras")),
        ("dpm++_2m", ("DPM++ 2M", None)),
        ("k_dpmpp_2s_a_karras", ("DPM++ 2S a", "Karras")),
        ("dpmpp_2s_ancestral", ("DPM++ 2S a", None)),
        ("euler_ancestral", ("Euler a", None)),
        ("dpm_2_ancestral", ("DPM2 a", None)),
        ("dpmpp_3m_sde_gpu_exponential", ("DPM++ 3M SDE", "Exponential")),
        ("uni_pc", ("UniPC", None)),
        ("Heun_Karras", ("Heun", "Karras")),
    ],
)
def test_words_of_other_programs_are_understood(word: str, expected: tuple[str, str | None]) -> None:
    assert sampler_named(word) == expected
