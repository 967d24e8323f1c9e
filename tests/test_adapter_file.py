"""Reading adapter files: whatever others write comes into one form, or is refused in a sentence."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from networks import AdapterError, adapter_file
from networks.adapter_export import adapter_tensors
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from networks.families import SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET
from networks.names import Target, kohya_name
from tests.tools.adapters import (
    SPEC,
    assert_same_adapter,
    earlier_spec,
    earlier_weights,
    kohya_module,
    one_module,
    whole_adapter,
    write_tensors,
)
from tests.tools.unets import SD15, small_unet

CONV_IN = Target(UNET, "conv_in")
ONE = torch.ones(1)


@pytest.fixture(scope="module")
def trained() -> Adapter:
    return whole_adapter({UNET: small_unet()})


def alpha_of(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> float:
    return read_adapter(write_tensors(folder, tensors, metadata)).modules[CONV_IN].alpha


# ------------------------------------------------------------------------------------------------ kohya's files


def test_a_kohya_file_without_alpha_acts_with_scale_one(trained: Adapter, tmp_path: Path) -> None:
    tensors = {k: value for k, value in adapter_tensors(trained, "kohya").items() if not k.endswith(".alpha")}
    adapter = read_adapter(write_tensors(tmp_path, tensors))
    assert all(module.alpha == module.rank for module in adapter.modules.values())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1"),
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1"),
        ),
        (
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            Target(TEXT_ENCODER_2, "text_model.encoder.layers.0.mlp.fc1"),
        ),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", Target(UNET, "up_blocks.0.upsamplers.0.conv")),
        ("lora_unet_output_blocks_2_2_conv", Target(UNET, "up_blocks.0.upsamplers.0.conv")),
        ("lora_unet_input_blocks_3_0_op", Target(UNET, "down_blocks.0.downsamplers.0.conv")),
    ],
)
def test_every_spelling_of_kohyas_names_is_known(name: str, target: Target, tmp_path: Path) -> None:
    assert list(read_adapter(write_tensors(tmp_path, kohya_module(name))).modules) == [target]


def test_a_sdxl_file_is_one_whichever_names_it_has(tmp_path: Path) -> None:
    target = Target(UNET, "mid_block.attentions.0.transformer_blocks.9.attn1.to_q")
    for name in (kohya_name(target, SDXL), kohya_name(target)):
        adapter = read_adapter(write_tensors(tmp_path, kohya_module(name)))
        assert list(adapter.modules) == [target] and adapter.family is SDXL


def test_an_alpha_may_be_an_integer_as_diffusers_writes_it(tmp_path: Path) -> None:
    assert alpha_of(tmp_path, kohya_module(alpha=torch.tensor(3))) == 3.0


def test_a_cp_decomposed_convolution_is_read(tmp_path: Path) -> None:
    mid = torch.randn(2, 2, 3, 3)
    sizes = {"lora_down_weight": torch.ones(2, 4, 1, 1), "lora_up_weight": torch.ones(8, 2, 1, 1)}
    module = read_adapter(write_tensors(tmp_path, kohya_module(lora_mid_weight=mid, **sizes))).modules[CONV_IN]
    assert module.mid is not None and torch.equal(module.mid, mid)
    assert module.shape == (8, 4, 3, 3) and module.kernel == 3


CONV = {"lora_down_weight": torch.ones(2, 4, 3, 3), "lora_up_weight": torch.ones(8, 2, 1, 1)}


@pytest.mark.parametrize(
    ("sizes", "found", "kept"),
    [
        ({}, [8, 1], [8, 1]),
        ({}, [1, 4], [1, 4]),
        ({}, [8, 1, 1, 1], [8, 1]),
        (CONV, [8, 1, 1, 1], [8, 1, 1, 1]),
        (CONV, [1, 4, 1, 1], [1, 4, 1, 1]),
        (CONV, [8, 1], [8, 1, 1, 1]),
    ],
)
def test_dora_scales_of_outputs_and_of_inputs_are_read(
    sizes: dict[str, Tensor], found: list[int], kept: list[int], tmp_path: Path
) -> None:
    path = write_tensors(tmp_path, kohya_module(dora_scale=torch.ones(found), **sizes))
    magnitude = read_adapter(path).modules[CONV_IN].magnitude
    assert magnitude is not None and list(magnitude.shape) == kept


# ------------------------------------------------------------------------------------------------ PEFT's and diffusers' files


def test_the_weights_of_a_training_state_of_earlier_versions_are_read(tmp_path: Path) -> None:
    trained = whole_adapter({UNET: small_unet()}, conv_alpha=0.5)
    tensors = {**earlier_weights(trained), "align_heads.mid.proj.0.weight": torch.zeros(2, 2)}
    adapter = read_adapter(write_tensors(tmp_path, tensors, earlier_spec(replace(SPEC, conv_alpha=0.5))))
    assert_same_adapter(adapter, trained)
    assert adapter.left_out == ("align_heads.mid.proj.0.weight",)


def test_diffusers_files_say_their_alpha_in_their_metadata(trained: Adapter, tmp_path: Path) -> None:
    three = [target.path for target, module in trained.modules.items() if module.kernel == 3]
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": dict.fromkeys(three, 1)}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    path = write_tensors(tmp_path, adapter_tensors(trained, "diffusers"), metadata)
    assert_same_adapter(read_adapter(path), trained)


def test_a_file_of_diffusers_itself_is_read(tmp_path: Path) -> None:
    """Written by save_lora_weights from an adapter put on by add_adapter, with nothing of ours in between."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    unet = small_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj_in"], init_lora_weights=False))
    layers, metadata = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(adapter.modules) == len(layers) / 2
    assert {(module.rank, module.alpha) for module in adapter.modules.values()} == {(4, 6.0)}
    path = "mid_block.attentions.0.proj_in"
    assert torch.equal(adapter.modules[Target(UNET, path)].down, layers[f"{path}.lora_A.weight"])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_a_folder_of_peft_itself_adds_what_peft_merges(options: dict[str, bool], tmp_path: Path) -> None:
    """Written by save_pretrained, with other ranks and alphas for some modules, on Linear layers and convolutions."""
    unet = small_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "conv1", "proj_in"],
        rank_pattern={"conv1": 2},
        alpha_pattern={"mid_block.*to_q": 3},
        init_lora_weights=False,
        **options,
    )
    model = get_peft_model(unet, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors")
    merged = model.merge_and_unload().state_dict()
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed == {f"{target.path}.weight" for target in adapter.modules}
    for target, module in adapter.modules.items():
        weight = before[f"{target.path}.weight"]
        torch.testing.assert_close(weight + module.delta(weight), merged[f"{target.path}.weight"], rtol=0, atol=1e-6)


def test_peft_says_its_alpha_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6, "use_rslora": true}')
    assert alpha_of(tmp_path, one_module(rank=4)) == pytest.approx(6 * 4 / 4**0.5)


@pytest.mark.parametrize(
    ("name", "text", "alpha"),
    [
        ("config.json", '{"lora_alpha": 5}', 5.0),
        ("config.json", '{"lora": {"network_alpha": 5.5, "use_rslora": true}}', 5.5 * math.sqrt(2)),
        ("args.json", '{"network_alpha": "7"}', 7.0),
        ("config.toml", "seed = 1\n[network]\nnetwork_alpha = 3\n", 3.0),
    ],
)
def test_the_alpha_is_found_in_the_configuration_of_the_run(name: str, text: str, alpha: float, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    for folder in (tmp_path, tmp_path / "checkpoint-20"):
        (folder / name).write_text(text)
        assert alpha_of(tmp_path / "checkpoint-20", one_module()) == alpha
        (folder / name).unlink()


def test_a_configuration_that_cannot_be_read_or_says_nothing_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "config.toml").write_text("[[[")
    (tmp_path / "args.json").write_text('{"lora_alpha": null, "network_alpha": true}')
    adapter = read_adapter(write_tensors(tmp_path, one_module()))
    assert adapter.modules[CONV_IN].alpha == 2.0 and "does not say its alpha" in adapter.notes[0]


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"ss_network_alpha": "4.0"}, 4.0),
        ({"network_alpha": "3"}, 3.0),
        ({"lora_alpha": "2", "ss_network_args": '{"conv_alpha": "1.5"}'}, 2.0),
        ({"ss_network_alpha": "Dynamic", "lora_adapter_metadata": '{"unet.lora_alpha": 9}'}, 9.0),
    ],
)
def test_the_alpha_is_found_in_the_metadata(metadata: dict[str, str], alpha: float, tmp_path: Path) -> None:
    assert alpha_of(tmp_path, one_module(), metadata) == alpha


def test_an_alpha_that_nothing_says_is_the_rank_of_each_module_and_that_is_said(tmp_path: Path) -> None:
    other = {key.replace("conv_in", "conv_out"): value for key, value in one_module(rank=8).items()}
    path = write_tensors(tmp_path, {**one_module(rank=4), **other}, {"ss_network_alpha": "Dynamic"})
    adapter = read_adapter(path)
    assert [module.alpha / module.rank for module in adapter.modules.values()] == [1.0, 1.0]
    assert adapter.notes == (
        "it does not say its alpha: the rank is taken (scale 1), as ComfyUI does; for another write "
        '{"lora_alpha": 4} to config.json beside',
    )


def test_an_alpha_that_is_given_is_that_of_every_module_whatever_its_rank_as_of_kohyas_block_dims(
    tmp_path: Path,
) -> None:
    other = {key.replace("conv_in", "conv_out"): value for key, value in one_module(rank=8).items()}
    adapter = read_adapter(write_tensors(tmp_path, {**one_module(rank=4), **other}), alpha=4.0)
    assert sorted((module.rank, module.scale) for module in adapter.modules.values()) == [(4, 1.0), (8, 0.5)]
    said = "alpha 4, as given, is that of every module, so its scales differ: 1 at rank 4, 0.5 at rank 8"
    assert adapter.notes == (said,)
    assert read_adapter(write_tensors(tmp_path, one_module()), alpha=3.0).notes == ()


def test_what_the_file_says_of_its_alpha_wins_and_then_the_argument(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lora_alpha": 5}')
    path = write_tensors(tmp_path, one_module(), {"ss_network_alpha": "4"})
    assert read_adapter(path, alpha=3.0).modules[CONV_IN].alpha == 4.0
    assert read_adapter(write_tensors(tmp_path, one_module()), alpha=3.0).modules[CONV_IN].alpha == 3.0


# ------------------------------------------------------------------------------------------------ wrapped checkpoints


class WholeModel(nn.Module):
    """As a trainer saves it that wraps the U-Net by PEFT and hangs heads beside it."""

    def __init__(self) -> None:
        super().__init__()
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
        # Three widths, as the real one has: with fewer, a shortcut and its two tensors are missing.
        narrow = {"block_out_channels": (4, 8, 12, 12), "cross_attention_dim": 6, "norm_num_groups": 2}
        self.unet = get_peft_model(UNet2DConditionModel(**{**SD15, **narrow, "attention_head_dim": 2}), config)
        self.align_heads = nn.ParameterDict({name: torch.zeros(2) for name in ("down", "mid", "up")})


@pytest.fixture(scope="module")
def wrapped() -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in WholeModel().state_dict().items()}


@pytest.mark.parametrize("prefix", ["unet.base_model.model.", "unet.", "base_model.model.", ""])
def test_the_adapter_in_a_wrapped_checkpoint_is_read(prefix: str, wrapped: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {key.replace("unet.base_model.model.", prefix): value for key, value in wrapped.items()}
    adapter = read_adapter(write_tensors(tmp_path, tensors), alpha=8.0)
    assert (len(tensors), len(adapter.frozen), len(adapter.modules), len(adapter.left_out)) == (945, 686, 128, 3)
    assert {module.alpha / module.rank for module in adapter.modules.values()} == {2.0}
    target = next(iter(adapter.modules))
    assert torch.equal(adapter.modules[target].up, tensors[f"{prefix}{target.path}.lora_B.default.weight"])


def test_the_alpha_of_a_whole_model_is_asked_for(wrapped: dict[str, Tensor], tmp_path: Path) -> None:
    expected = "a.safetensors does not say its alpha: .* Give the alpha .* to merge_lora.py as --network_alpha"
    with pytest.raises(AdapterError, match=expected):
        read_adapter(write_tensors(tmp_path, wrapped))


def test_no_frozen_weight_is_loaded(
    wrapped: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tensors(tmp_path, wrapped)
    read = []

    class Watched:
        def __init__(self, *args: object, **options: object) -> None:
            self._file = safe_open(*args, **options)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, key: str) -> Tensor:
            read.append(key)
            return self._file.get_tensor(key)

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

    monkeypatch.setattr(adapter_file, "safe_open", Watched)
    read_adapter(path, alpha=8.0)
    assert len(read) == 256 and all(".lora_" in key for key in read)


def test_adapters_on_both_parts_of_a_wrapped_checkpoint_are_read(wrapped: dict[str, Tensor], tmp_path: Path) -> None:
    name = "text_encoder.base_model.model.text_model.encoder.layers.0.mlp.fc1"
    text = {
        f"{name}.base_layer.weight": torch.ones(8, 4),
        f"{name}.lora_A.default.weight": torch.ones(2, 4),
        f"{name}.lora_B.default.weight": torch.ones(8, 2),
        "text_encoder.base_model.model.text_model.embeddings.position_ids": torch.arange(77),
    }
    adapter = read_adapter(write_tensors(tmp_path, {**wrapped, **text}), alpha=8.0)
    assert Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1") in adapter.modules
    assert f"{name}.base_layer.weight" in adapter.frozen
    assert len(adapter.left_out) == 4


def test_a_wrapped_checkpoint_with_keys_of_something_else_is_refused(
    wrapped: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_tensors(tmp_path, {**wrapped, "optimizer.step": ONE})
    with pytest.raises(AdapterError, match=re.escape("1 of 946 keys in ") + ".*first: optimizer.step"):
        read_adapter(path, alpha=8.0)
