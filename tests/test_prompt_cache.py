"""Embeddings of captions: encoded once, found again, shared by processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from library.caching.prompt_cache import PromptCache, prepare_prompts, prompt_folder
from library.errors import RunFailed, UserError
from library.models.conditioning import Conditioning, TextConditioner
from library.models.load import load_text_encoders
from library.processes import Processes
from networks.families import SD15, SDXL

CAPTIONS = ["a red circle", "blue square on a green background", "a red circle", "1girl, solo"]


class PromptSetting:
    """The arguments of `prepare_prompts`; `loads` counts how often the text encoders were needed."""

    def __init__(self, folder: Path, load: Callable[[], TextConditioner]) -> None:
        self.cache_dir, self.load, self.loads = folder, load, 0
        self.facts = {"weights": ["abc"], "clip_skip": 1, "chunks": 1, "precision": "no"}
        self.said: list[str] = []
        self.last: PromptCache | None = None

    def conditioner(self) -> TextConditioner:
        self.loads += 1
        return self.load()

    def build(self, captions: list[str], **facts: object) -> PromptCache:
        if self.last is not None:
            self.last.close()
        self.said.clear()
        self.last = prepare_prompts(
            captions, conditioner=self.conditioner, facts=self.facts | facts, cache_dir=self.cache_dir,
            processes=Processes("cpu"), say=self.said.append,
        )  # fmt: skip
        return self.last


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> TextConditioner:
    return TextConditioner(SD15, load_text_encoders(str(tiny_sd15)))


@pytest.fixture
def setting(tmp_path: Path, sd15: TextConditioner) -> PromptSetting:
    return PromptSetting(tmp_path, lambda: sd15)


@pytest.mark.bits
@torch.no_grad()
def test_cached_states_are_those_of_the_conditioner(setting: PromptSetting, sd15: TextConditioner) -> None:
    cache = setting.build(CAPTIONS)
    assert setting.said == [f"prompts: 0 of 4 present, 4 missing in {prompt_folder(setting.cache_dir, setting.facts)}"]
    rows = cache.rows([*CAPTIONS, ""])
    assert rows.tolist() == [0, 1, 0, 2, 3] and cache.empty_row == 3
    # The same batch as in the build.
    expected = sd15([*dict.fromkeys(CAPTIONS), ""]).states.half()
    found = pickle.loads(pickle.dumps(cache)).read(rows)
    assert torch.equal(found.states, expected[torch.from_numpy(rows)]) and found.pooled is None


@pytest.mark.bits
@torch.no_grad()
def test_sdxl_has_the_states_of_both_encoders_and_the_pooled_one(tmp_path: Path, tiny_sdxl: Path) -> None:
    conditioner = TextConditioner(SDXL, load_text_encoders(str(tiny_sdxl)), chunks=2)
    setting = PromptSetting(tmp_path, lambda: conditioner)
    cache = setting.build(CAPTIONS[:2])
    expected = conditioner([*CAPTIONS[:2], ""])
    found = cache.read(cache.rows([*CAPTIONS[:2], ""]))
    assert found.states.shape[1] == 152 and torch.equal(found.states, expected.states.half())
    assert expected.pooled is not None and found.pooled is not None
    assert torch.equal(found.pooled, expected.pooled.half())
    # Without the pooled ones the states are of no use.
    cache.close()
    (prompt_folder(tmp_path, setting.facts) / "pooled" / "data.mdb").unlink()
    assert torch.equal(setting.build(CAPTIONS[:2]).read([2]).pooled, expected.pooled[2:].half()) and setting.loads == 2


@pytest.mark.bits
def test_only_what_is_missing_is_encoded_and_else_no_encoder_is_loaded(setting: PromptSetting) -> None:
    old = setting.build(CAPTIONS).read([0]).states
    setting.build(CAPTIONS)
    assert setting.loads == 1 and not setting.said
    cache = setting.build(["a red circle, edited", *CAPTIONS])
    assert setting.loads == 2 and "4 of 5 present, 1 missing" in setting.said[0]
    assert torch.equal(cache.read(cache.rows(CAPTIONS[:1])).states, old)
    assert not torch.equal(cache.read(cache.rows(["a red circle, edited"])).states, old)


def test_other_facts_have_a_cache_of_their_own_and_the_old_one_stays(setting: PromptSetting) -> None:
    setting.build(CAPTIONS)
    setting.build(CAPTIONS, clip_skip=2)
    assert setting.loads == 2
    setting.build(CAPTIONS)
    setting.build(CAPTIONS, clip_skip=2)
    assert setting.loads == 2


def test_entries_of_old_captions_stay(setting: PromptSetting) -> None:
    setting.build(CAPTIONS)
    cache = setting.build(CAPTIONS[:1])
    assert len(list(cache.states.sample_ids())) == 4
    assert setting.loads == 1


def test_captions_that_are_cut_are_counted(setting: PromptSetting) -> None:
    setting.build(["red " * 80, *CAPTIONS])
    assert (
        setting.said[1]
        == f"prompts: 1 caption is longer than the text encoders' room and cut off (first: {'red ' * 80!r})"
    )


def test_a_caption_that_was_not_prepared_is_named(setting: PromptSetting) -> None:
    with pytest.raises(UserError, match="The caption 'something else' has no cached embedding"):
        setting.build(CAPTIONS).rows(["a red circle", "something else"])


def test_an_embedding_that_float16_cannot_hold_is_refused(setting: PromptSetting, sd15: TextConditioner) -> None:
    class Overflowing(TextConditioner):
        def __call__(self, prompts: object) -> Conditioning:
            return Conditioning(torch.full((1, 77, 64), 1e6), None)

    setting.load = lambda: Overflowing(SD15, sd15.parts)
    with pytest.raises(RunFailed, match="embedding of the caption 'x' is not finite in float16"):
        setting.build(["x"])
    setting.load = lambda: sd15
    assert np.isfinite(setting.build(["x"]).read([0]).states.numpy()).all()
