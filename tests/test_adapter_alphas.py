"""Whose alpha an adapter file takes that has none of its own: only that of a configuration which is this file's."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import networks
from networks import AdapterError
from networks.adapter_file import read_adapter
from tests.tools.adapters import one_module, write_tensors

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def two_modules(conv_rank: int = 2, rank: int = 4) -> dict[str, Tensor]:
    inner = {f"base_model.model.{TO_Q}.lora_A.weight": torch.ones(rank, 4)}
    inner[f"base_model.model.{TO_Q}.lora_B.weight"] = torch.ones(8, rank)
    return {**one_module(conv_rank, "base_model.model."), **inner}


def scales(folder: Path, config: Mapping[str, object], tensors: dict[str, Tensor] | None = None) -> set[float | None]:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(write_tensors(folder, tensors or two_modules()))
    return {module.scale for module in adapter.modules.values()}


FITTING = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {"conv_in": 2},
    "alpha_pattern": {"conv_in": 4},
}


@pytest.mark.parametrize(
    "config",
    [
        {**FITTING, "target_modules": ["conv_in", "to_q"]},
        {**FITTING, "target_modules": r"conv_in|.*\.attn\d\.to_[qkv]"},
        {**FITTING, "target_modules": ["to_k", TO_Q, "conv_in"], "task_type": None},
        {**FITTING, "task_type": "FEATURE_EXTRACTION"},
        {**FITTING, "target_modules": "all-linear"},
        {**FITTING, "auto_mapping": {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models"}},
        FITTING,
    ],
)
def test_a_configuration_that_fits_says_the_alpha(config: dict[str, object], tmp_path: Path) -> None:
    assert scales(tmp_path, config) == {2.0}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"r": 16}, "it is of rank 16 where the file has 4"),
        ({"rank_pattern": {}}, "it is of rank 4 where the file has 2"),
        ({"rank_pattern": {"conv_in": 3}}, "it is of rank 3 where the file has 2"),
        ({"target_modules": ["q_proj", "v_proj"]}, "it is of other modules than "),
        ({"target_modules": ["to_q"]}, "it is of other modules than conv_in"),
        ({"target_modules": r".*\.q_proj"}, "it is of other modules than "),
        ({"task_type": "CAUSAL_LM"}, "it is of a language model (CAUSAL_LM)"),
        ({"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}}, "it is of a Qwen2ForCausalLM"),
        ({"auto_mapping": {"base_model_class": "FluxTransformer2DModel"}}, "it is of a FluxTransformer2DModel"),
        ({"peft_type": "LOHA"}, "it is of LOHA"),
        ({"use_dora": True}, "it is of a DoRA"),
        ({"rank_pattern": [1]}, "its patterns are no tables of patterns and numbers"),
    ],
)
def test_one_of_another_adapter_is_passed_over_and_that_is_said(
    changes: dict[str, object], why: str, tmp_path: Path
) -> None:
    assert scales(tmp_path, {**FITTING, "target_modules": ["conv_in", "to_q"], **changes}) == {1.0}
    said = read_adapter(tmp_path / "a.safetensors").notes[0]
    assert said.startswith(f"the alpha in {tmp_path / 'adapter_config.json'} is not taken: {why}")


def test_a_configuration_beside_pefts_own_file_is_of_that_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    assert scales(tmp_path, FITTING) == {1.0}
    assert "it belongs to adapter_model.safetensors" in read_adapter(tmp_path / "a.safetensors").notes[0]
    (tmp_path / "a.safetensors").rename(tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path / "adapter_model.safetensors")
    assert {module.scale for module in adapter.modules.values()} == {2.0} and adapter.notes == ()


def test_it_is_not_even_read_where_the_file_says_its_alphas(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    alphas = {f"{name}.alpha": torch.tensor(3.0) for name in ("base_model.model.conv_in", f"base_model.model.{TO_Q}")}
    adapter = read_adapter(write_tensors(tmp_path, {**two_modules(), **alphas}))
    assert {module.alpha for module in adapter.modules.values()} == {3.0}


def test_one_that_cannot_be_read_is_an_error_beside_pefts_own_file_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    path = write_tensors(tmp_path, two_modules())
    assert "adapter_config.json is not valid JSON" in read_adapter(path).notes[0]
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not valid JSON"):
        read_adapter(path.rename(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["lora_rank", "network_dim", "rank", "r"])
def test_a_runs_configuration_of_another_rank_is_passed_over(name: str, tmp_path: Path) -> None:
    path = write_tensors(tmp_path, one_module(rank=2))
    (tmp_path / "config.json").write_text(json.dumps({"lora_alpha": 5, name: 2}))
    assert [module.alpha for module in read_adapter(path).modules.values()] == [5.0]
    (tmp_path / "config.json").write_text(json.dumps({"lora_alpha": 5, name: 16}))
    adapter = read_adapter(path)
    assert [module.alpha for module in adapter.modules.values()] == [2.0]
    assert "it is of a run of rank 16, and the file is of 2" in adapter.notes[0]


def test_what_every_script_may_say_of_a_file_names_the_script_that_has_the_option() -> None:
    """Reading knows of no script: an option that one of them lacks would send its user astray."""
    sentences = []
    for file in sorted(Path(networks.__file__).parent.rglob("*.py")):
        if file.name.startswith(("adapter_", "foreign_")) or file.name in ("names.py", "adapters.py"):
            nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.expr)]
            texts = [ast.unparse(node) for node in nodes if isinstance(node, (ast.JoinedStr, ast.Constant))]
            sentences += [text for text in texts if re.search(r"--[a-z]", text)]
    assert sentences and all(re.search(r"\w+\.py\b", sentence) for sentence in sentences)
