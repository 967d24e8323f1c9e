"""What an adapter's table says, and the same as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.merging.inspect import WIDTH, describe, inspect
from networks.adapter_module import AdapterModule
from networks.adapters import Adapter
from networks.kinds.lora import LoraModule
from networks.kinds.oft import OftModule
from networks.kinds.products import LohaModule, LokrModule
from networks.names import TEXT_ENCODER, UNET, Target
from tests.tools.adapters import cp_module, random_module

IN = Target(UNET, "down_blocks.0.attentions.0.proj_in")
MID = Target(UNET, "mid_block.attentions.0.proj_in")
OUT = Target(UNET, "up_blocks.3.attentions.2.proj_in")
CONV = Target(UNET, "up_blocks.3.resnets.2.conv1")
TIME = Target(UNET, "time_embedding.linear_1")
TEXT = Target(TEXT_ENCODER, "text_model.encoder.layers.3.mlp.fc1")


@pytest.fixture
def adapter() -> Adapter:
    modules = {
        TEXT: random_module(16, 12, rank=2, alpha=2.0),
        MID: random_module(8, 8, 1, 1, rank=4, alpha=1.0),
        OUT: replace(random_module(8, 6, rank=4, alpha=2.0), magnitude=torch.ones(8, 1)),
        CONV: cp_module(8, 8, alpha=1.0),
        IN: LoraModule(torch.zeros(4, 6).half(), torch.zeros(8, 4).half(), 4.0),
        TIME: random_module(8, 8, rank=4, alpha=4.0),
    }
    return Adapter(modules, {"ss_steps": "100", "ss_tag_frequency": '{"a": 1}\n' * 99, "x": "1"}, ("align_heads.a",))


def test_norms_are_those_of_the_full_products(adapter: Adapter) -> None:
    found = inspect(adapter)
    for facts, module in zip(found.modules, adapter.modules.values(), strict=True):
        assert facts.norm == pytest.approx(float(module.product().norm()), rel=1e-5, abs=1e-12)
    out = [adapter.modules[target].product().norm().square() for target in (OUT, CONV)]
    blocks = {(one["component"], one["block"]): one["norm"] for one in found.as_json()["blocks"]}
    assert blocks[UNET, "OUT11"] == pytest.approx(float(torch.stack(out).sum().sqrt()), rel=1e-5)


def test_modules_are_grouped_by_the_blocks_that_users_name(adapter: Adapter) -> None:
    groups = {place: [one.target for one in modules] for place, modules in inspect(adapter).by_block().items()}
    assert groups == {
        (UNET, "BASE"): [TIME],
        (UNET, "IN01"): [IN],
        (UNET, "MID"): [MID],
        (UNET, "OUT11"): [OUT, CONV],
        (TEXT_ENCODER, "BASE"): [TEXT],
    }


def test_the_table_says_what_is_in_the_file(adapter: Adapter) -> None:
    text = describe(adapter, Path("mine.safetensors"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:2] == ["mine.safetensors", "SD1.5, 6 modules: 4 LoRA, 1 DoRA LoRA, 1 CP"]
    assert "unet IN01 1 LoRA 4 4 1 float16 0" in lines
    assert any(line.startswith("unet OUT11 2 DoRA LoRA+CP 3-4 1-2 0.3333-0.5 float32 ") for line in lines)
    assert any(line.startswith("text_encoder all 1 LoRA 2 2 1 float32 ") for line in lines)
    assert "DoRA: the norm leaves out what its magnitudes do, which only the base would tell." in lines
    assert "Keys that are no part of the adapter: 1 (first: align_heads.a)." in lines
    assert lines[-4:-2] == ["metadata", "ss_steps 100"]
    assert lines[-2].startswith('ss_tag_frequency {"a": 1} {"a": 1}') and lines[-2].endswith("...")
    assert lines[-1] == "and 1 other entry"
    assert max(map(len, text.splitlines())) <= WIDTH


def test_other_kinds_than_lora_are_shown() -> None:
    """LoHa, LoKr: what they add. OFT: the base decides."""
    a, b = torch.ones(8, 2).half(), torch.ones(2, 6).half()
    loha, lokr = LohaModule((a, b), (a, b), 1.0), LokrModule((torch.ones(2, 2),), (torch.ones(4, 3),), 4.0)
    modules: dict[Target, AdapterModule] = {IN: loha, MID: lokr, OUT: OftModule(torch.zeros(2, 4, 4), 1000.0)}
    text = describe(Adapter({IN: loha, MID: lokr}), Path("a.safetensors"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "unet IN01 1 LoHa 2 1 0.5 float16 13.9" in lines  # 0.5 * 2 * 2 * sqrt(48)
    assert "unet MID 1 LoKr 4 4 1 float32 6.93" in lines
    text = describe(Adapter(modules), Path("a.safetensors"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1] == "SD1.5, 3 modules: 1 LoHa, 1 LoKr, 1 OFT"
    assert "unet OUT11 1 OFT 2 1000 - float32 -" in lines
    assert "OFT: rank is the number of blocks, alpha a bound; what it adds only the base would tell." in lines
    assert max(map(len, text.splitlines())) <= WIDTH
    data = json.loads(json.dumps(inspect(Adapter(modules)).as_json(), allow_nan=False))
    assert data["norm"] is None and data["modules"][2]["scale"] is None


def test_an_adapter_that_does_nothing_is_called_so(adapter: Adapter) -> None:
    text = describe(Adapter({IN: adapter.modules[IN]}), Path("empty.safetensors"))
    assert "Every module is zero: the adapter does nothing." in text
    assert text.endswith("no metadata")


def test_the_data_is_json(adapter: Adapter) -> None:
    data = json.loads(json.dumps(inspect(adapter).as_json()))
    assert data["family"] == "SD1.5"
    first = data["modules"][1]
    assert (first["component"], first["path"], first["block"], first["kind"]) == (*MID, "MID", "LoRA")
    assert (first["rank"], first["alpha"], first["scale"], first["dtype"]) == (4, 1.0, 0.25, "float32")
    assert data["metadata"]["x"] == "1"
