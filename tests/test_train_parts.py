"""Parts of a U-Net whose weights are trained whole beside adapters: in files, states and averages like all others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.merging.merge import fold_into_modules
from library.models.base_schedule import check_schedule
from library.training.stop import STOP
from networks import AdapterError
from networks.adapter_export import adapter_tensors
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from networks.families import SD15, SDXL, UNET
from networks.kinds.full import FullModule
from networks.names import Target
from networks.network import Network, add_network
from networks.spec import PARTS, NetworkSpec
from tests.test_network_resume import assert_same_end
from tests.tools.network_runs import NetworkSetting, adapter, asked, losses
from tests.tools.networks import few
from tests.tools.unets import small_unet, unet_inputs

ALL = ("time_embedding", "conv_in", "conv_out")


def with_parts(dtype: torch.dtype = torch.float32, algo: str = "lora") -> tuple[nn.Module, Network]:
    unet = small_unet(dtype=dtype)
    return unet, add_network({UNET: unet}, few(algo, parts=ALL), 0)


def output(unet: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return unet(**unet_inputs(dtype)).sample


def stir(network: Network) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(network.parameters.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_and_disabled_parts_leave_the_base_to_the_bit(dtype: torch.dtype) -> None:
    before = output(small_unet(dtype=dtype), dtype)
    unet, network = with_parts(dtype)
    assert torch.equal(output(unet, dtype), before)
    stir(network)
    assert not torch.equal(output(unet, dtype), before)
    with network.disabled():
        assert torch.equal(output(unet, dtype), before)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters.values())


def test_what_is_folded_into_the_base_computes_what_was_trained(tmp_path: Path) -> None:
    """By way of the file, whose keys ComfyUI and A1111 know."""
    unet, network = with_parts()
    stir(network)
    tensors = network.tensors()
    assert {
        "lora_unet_conv_in.diff",
        "lora_unet_conv_in.diff_b",
        "lora_unet_time_embedding_linear_2.diff",
    } <= tensors.keys()
    assert tensors["lora_unet_conv_in.diff"].shape == (8, 4, 3, 3) and "lora_unet_conv_in.alpha" not in tensors
    save_file(tensors, tmp_path / "a.safetensors")
    plain = small_unet()
    fold_into_modules({UNET: plain}, SD15, read_adapter(tmp_path / "a.safetensors"), 1.0)
    assert torch.allclose(output(plain), output(unet), atol=2e-5)
    network.set_multiplier(0.5)
    half = small_unet()
    fold_into_modules({UNET: half}, SD15, read_adapter(tmp_path / "a.safetensors"), 0.5)
    assert torch.allclose(output(half), output(unet), atol=2e-5)


def test_a_network_starts_from_its_file_and_from_no_other(tmp_path: Path) -> None:
    _, network = with_parts()
    stir(network)
    save_file(network.tensors(), tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    _, other = with_parts()
    other.load(found)
    assert all(torch.equal(other.parameters[name], value) for name, value in network.parameters.items())
    without = add_network({UNET: small_unet()}, few(), 0)
    with pytest.raises(AdapterError, match="whole differences, which --train_parts trains of time_embedding"):
        without.load(found)
    with pytest.raises(AdapterError, match="It was trained without these --train_parts"):
        with_parts()[1].load(without.adapter())


def test_parts_are_a_group_of_their_own_beside_bound_norms() -> None:
    unet, network = with_parts(algo="loha")
    stir(network)
    groups = {group.name: group for group in network.groups()}
    assert groups["unet parts"].parameters == (
        "unet.time_embedding.linear_1.diff", "unet.time_embedding.linear_1.bias.diff", "unet.time_embedding.linear_2.diff",
        "unet.time_embedding.linear_2.bias.diff", "unet.conv_in.diff", "unet.conv_in.bias.diff", "unet.conv_out.diff",
        "unet.conv_out.bias.diff",
    )  # fmt: skip
    assert not set(groups["unet"].parameters) & set(groups["unet parts"].parameters)
    before = copy.deepcopy(network.parameters["unet.conv_in.diff"])
    assert network.clamp_norms(1e-3)["keys_scaled"] == len(network.adapters)
    assert torch.equal(network.parameters["unet.conv_in.diff"], before)


def test_blocks_are_trained_whole_where_no_adapter_is(tmp_path: Path) -> None:
    unet = small_unet()
    network = add_network({UNET: unet}, few(parts=("down_blocks", "mid_block", "up_blocks")), 0)
    whole = {target for target in network.layers if target not in network.adapters}
    inside = {target.module for target in whole}
    assert not inside & {target.path for target in network.adapters}
    plain = small_unet()
    every = {
        path
        for path, module in plain.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and path.startswith(("down_blocks.", "mid_block.", "up_blocks."))
    }
    assert inside | {target.path for target in network.adapters} == every
    stir(network)
    save_file(network.tensors(), tmp_path / "a.safetensors")
    fold_into_modules({UNET: plain}, SD15, read_adapter(tmp_path / "a.safetensors"), 1.0)
    assert torch.allclose(output(plain), output(unet), atol=1e-3, rtol=1e-3)


def test_sdxls_names_of_parts_are_read_back() -> None:
    modules = {
        Target(UNET, path): FullModule(torch.randn(4, 4))
        for path in ("time_embedding.linear_1", "add_embedding.linear_2", "conv_in", "conv_out", "conv_out.bias")
    }
    told = Adapter(modules, told=SDXL)
    tensors = adapter_tensors(told, "kohya")
    assert "lora_unet_label_emb_0_2.diff" in tensors and "lora_unet_out_2.diff_b" in tensors
    assert "lora_unet_input_blocks_0_0.diff" in tensors


def test_a_specification_says_its_parts_and_older_ones_none() -> None:
    spec = few(parts=ALL)
    assert NetworkSpec.from_json(spec.to_json()) == spec and "parts" not in few().to_json()
    assert NetworkSpec.from_json(few().to_json()) == few()
    with pytest.raises(AdapterError, match=f"parts must be of {', '.join(PARTS)}, got conv_norm_out"):
        few(parts=("conv_norm_out",))
    with pytest.raises(AdapterError, match=r"SD1.5 has no add_embedding to train \(train_parts\)"):
        add_network({UNET: small_unet()}, few(parts=("add_embedding",)), 0)


@pytest.mark.bits
def test_parts_are_trained_averaged_saved_resumed_and_merged(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import merge_lora

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {
        **network_setting.quick,
        "flow_mode": "native",
        "train_parts_lr": 1e-3,
        "ema_decay": 0.5,
        "save_state": "",
    }
    words = ("--train_parts", *ALL)
    assert network_setting.train(whole, *words, **options) == 0
    assert "of unet parts at 0.001" in capsys.readouterr().out
    parts.mkdir()
    with asked(1, STOP, parts):
        assert network_setting.train(parts, *words, **options) == 75
    assert network_setting.train(parts, *words, **options) == 0
    assert_same_end(whole, parts)
    assert torch.tensor(losses(whole)).isfinite().all()
    trained, averaged = (adapter(whole / f"mio{ending}.safetensors") for ending in ("", "-ema"))
    for key in ("lora_unet_conv_in.diff", "lora_unet_conv_out.diff_b", "lora_unet_time_embedding_linear_1.diff"):
        assert trained[key].abs().max() > 0 and not torch.equal(trained[key], averaged[key])
    out = tmp_path / "student"
    base = ["--pretrained_model_name_or_path", str(network_setting.base), "--output_dir", str(out)]
    more = ["--models", str(whole / "mio.safetensors"), "--prediction_type", "flow_prediction", "--save_single_file"]
    assert merge_lora.main([*base, *more]) == 0
    from library.models.load import load_unet

    before, after = (load_unet(str(folder)).state_dict() for folder in (network_setting.base, out))
    added = (after["conv_in.weight"] - before["conv_in.weight"]).float()
    assert torch.allclose(added, trained["lora_unet_conv_in.diff"], atol=1e-6)
    check_schedule(out / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--train_parts", "conv_in", "--network_train_text_encoder_only"),
            "train_parts are of the U-Net, and the U-Net is not",
        ),
        (("--train_parts_lr", "0.1"), "train_parts_lr has no effect without train_parts"),
        (("--train_parts", "conv_norm_out"), "conv_norm_out"),
    ],
)
def test_parts_that_cannot_be_are_refused(
    words: tuple[str, ...],
    said: str,
    network_setting: NetworkSetting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = network_setting.quick | {"network_train_unet_only": None, "cache_text_encoder_outputs": None}
    assert network_setting.train(tmp_path / "out", *words, **options) == 2
    assert said in capsys.readouterr().err
