"""Adapter files: what we write is kohya's format, and what others write is read into one form."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from networks import AdapterError
from networks.adapter_file import Adapter, adapter_metadata, read_adapter, to_kohya
from networks.lora import LoraSpec, add_lora
from networks.names import kohya_name
from tests.tools.unets import sd15_unet_without_weights, small_unet

SPEC = LoraSpec(rank=4, alpha=2.0, scope="all", targets="kohya", conv_rank=2, conv_alpha=1.0)


@pytest.fixture(scope="module")
def params() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = add_lora(small_unet(), SPEC, seed=0)
    return {name: torch.randn(parameter.shape, generator=generator) for name, parameter in names.items()}


def modules_of(params: dict[str, Tensor]) -> list[str]:
    return sorted({name.split(".lora_")[0] for name in params})


def assert_same_as(adapter: Adapter, params: dict[str, Tensor], spec: LoraSpec = SPEC) -> None:
    paths = modules_of(params)
    assert sorted(adapter.modules) == sorted(map(kohya_name, paths))
    for path in paths:
        module = adapter.modules[kohya_name(path)]
        assert torch.equal(module.down, params[f"{path}.lora_A.default.weight"])
        assert torch.equal(module.up, params[f"{path}.lora_B.default.weight"])
        assert module.alpha == (1.0 if module.kernel == 3 else spec.alpha), path
        assert module.rank == (2 if module.kernel == 3 else 4), path


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, name: str = "a") -> Path:
    save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
    return folder / f"{name}.safetensors"


def one_module(rank: int = 2) -> dict[str, Tensor]:
    return {"unet.conv_in.lora_A.weight": torch.ones(rank, 4), "unet.conv_in.lora_B.weight": torch.ones(8, rank)}


def test_every_module_has_down_up_and_a_scalar_alpha(params: dict[str, Tensor]) -> None:
    tensors = to_kohya(params, SPEC)
    assert len(tensors) == 3 * len(modules_of(params))
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(value.shape == () for key, value in tensors.items() if key.endswith(".alpha"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_save_precision_holds_for_every_tensor(params: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert {value.dtype for value in to_kohya(params, SPEC, dtype=dtype).values()} == {dtype}


def test_shapes_of_sd15_are_kohyas() -> None:
    spec = LoraSpec(scope="all", targets="kohya", conv_rank=4)
    params = add_lora(sd15_unet_without_weights(), spec, seed=0)
    tensors = to_kohya({name: torch.empty(parameter.shape) for name, parameter in params.items()}, spec)
    shapes = {key.removeprefix("lora_unet_"): list(value.shape) for key, value in tensors.items()}
    assert shapes["mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"] == [8, 768]
    assert shapes["mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight"] == [1280, 8]
    assert shapes["mid_block_attentions_0_proj_in.lora_down.weight"] == [8, 1280, 1, 1]
    assert shapes["mid_block_attentions_0_proj_in.lora_up.weight"] == [1280, 8, 1, 1]
    assert shapes["down_blocks_1_resnets_0_conv1.lora_down.weight"] == [4, 320, 3, 3]
    assert shapes["down_blocks_1_resnets_0_conv1.lora_up.weight"] == [640, 4, 1, 1]
    assert shapes["down_blocks_1_resnets_0_conv_shortcut.lora_down.weight"] == [8, 320, 1, 1]
    assert shapes["down_blocks_1_resnets_0_time_emb_proj.lora_down.weight"] == [8, 1280]


def test_a_name_that_is_no_lora_weight_is_refused() -> None:
    with pytest.raises(AdapterError, match="align_heads.mid.proj.0.weight is not the name of a LoRA weight"):
        to_kohya({"align_heads.mid.proj.0.weight": torch.zeros(1)}, SPEC)


def test_what_is_written_is_read_back(params: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = to_kohya(params, SPEC)
    metadata = adapter_metadata(SPEC, tensors, output_name="a", date="2026-01-02T03:04:05", resolution=(512, 512))
    adapter = read_adapter(write(tmp_path, tensors, metadata))
    assert_same_as(adapter, params)
    assert adapter.metadata == metadata


def test_metadata_says_what_readers_look_for(params: dict[str, Tensor]) -> None:
    metadata = adapter_metadata(
        SPEC,
        to_kohya(params, SPEC),
        output_name="cat",
        date="2026-01-02T03:04:05",
        resolution=(512, 768),
        base_model="models/tiny-sd15",
        extra={"ss_steps": "20", "modelspec.title": "Cat"},
    )
    assert {key: metadata[key] for key in sorted(metadata) if not key.startswith("sshs_")} == {
        "lora_spec": SPEC.to_json(),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.date": "2026-01-02T03:04:05",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x768",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "Cat",
        "repa_base_model": "models/tiny-sd15",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "2.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1.0"}',
        "ss_network_dim": "4",
        "ss_network_dropout": "None",
        "ss_network_module": "networks.lora",
        "ss_output_name": "cat",
        "ss_sd_model_name": "tiny-sd15",
        "ss_steps": "20",
        "ss_v2": "False",
    }


def test_hashes_are_kohyas(params: dict[str, Tensor]) -> None:
    """train_util.precalculate_safetensors_hashes, done over: the file with ss_ metadata only, without its header."""
    tensors = {**to_kohya(params, SPEC), "padding": torch.arange(400_000, dtype=torch.float32)}  # beyond 1 MiB
    metadata = adapter_metadata(SPEC, tensors, output_name="a", date="d", resolution=(512, 512))
    file = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = file[8 + int.from_bytes(file[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]


def test_the_name_of_the_home_folder_is_not_published(params: dict[str, Tensor]) -> None:
    base = Path.home() / "models" / "mine.safetensors"
    metadata = adapter_metadata(SPEC, {}, output_name="a", date="d", resolution=(8, 8), base_model=str(base))
    assert Path(metadata["repa_base_model"]) == Path("~/models/mine.safetensors")


def test_a_kohya_file_without_alpha_acts_with_scale_one(params: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {key: value for key, value in to_kohya(params, SPEC).items() if not key.endswith(".alpha")}
    adapter = read_adapter(write(tmp_path, tensors))
    assert all(module.alpha == module.rank for module in adapter.modules.values())


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_both_prefixes_of_the_text_encoder_are_known(prefix: str, tmp_path: Path) -> None:
    name = f"{prefix}_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 4), f"{name}.lora_up.weight": torch.ones(8, 1)}
    assert list(read_adapter(write(tmp_path, tensors)).modules) == ["lora_te_text_model_encoder_layers_0_mlp_fc1"]


def test_the_weights_of_a_training_state_are_read(params: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {**params, "align_heads.mid.proj.0.weight": torch.zeros(2, 2)}
    adapter = read_adapter(write(tmp_path, tensors, {"lora_spec": SPEC.to_json()}))
    assert_same_as(adapter, params)
    assert adapter.left_out == ("align_heads.mid.proj.0.weight",)


def test_diffusers_files_say_their_alpha_in_their_metadata(params: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {f"unet.{key.replace('.default', '')}": value for key, value in params.items()}
    three = [path for path in modules_of(params) if params[f"{path}.lora_A.default.weight"].shape[2:] == (3, 3)]
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": dict.fromkeys(three, 1)}
    assert_same_as(read_adapter(write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})), params)


def test_a_file_of_diffusers_itself_is_read(tmp_path: Path) -> None:
    """Written by save_lora_weights from an adapter put on by add_adapter, with nothing of ours in between."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = small_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj_in"], init_lora_weights=False))
    layers, metadata = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(adapter.modules) == len(layers) / 2
    assert {(module.rank, module.alpha) for module in adapter.modules.values()} == {(4, 6.0)}
    name = "lora_unet_mid_block_attentions_0_proj_in"
    assert torch.equal(adapter.modules[name].down, layers["mid_block.attentions.0.proj_in.lora_A.weight"])


def test_peft_files_say_their_alpha_beside_them(tmp_path: Path) -> None:
    path = write(tmp_path, one_module(rank=4), name="adapter_model")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6, "use_rslora": true}')
    module = read_adapter(path).modules["lora_unet_conv_in"]
    assert module.alpha / module.rank == 6 / 4**0.5


def test_an_alpha_that_no_file_says_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, one_module())
    with pytest.raises(
        AdapterError, match="a.safetensors does not say its alpha: .* Give the alpha .* --network_alpha"
    ):
        read_adapter(path)
    assert read_adapter(path, alpha=3.0).modules["lora_unet_conv_in"].alpha == 3.0


ONE = torch.ones(1)


def kohya_module(up: Tensor | None = None, alpha: Tensor = ONE, **others: Tensor) -> dict[str, Tensor]:
    parts = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(8, 2) if up is None else up}
    return {f"lora_unet_x.{part}": value for part, value in {**parts, "alpha": alpha, **others}.items()}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "has no LoRA weights in it."),
        ({"conv_in.weight": ONE}, "keys .* are not of a LoRA (first: conv_in.weight). It is probably not a LoRA file."),
        (
            kohya_module(dora_scale=torch.ones(1)),
            "1 of 4 keys .* (first: lora_unet_x.dora_scale). It is a DoRA, which is not",
        ),
        ({"lora_unet_x.hada_w1_a": ONE}, "It is a LoHa, which is not supported."),
        ({"lora_unet_x.lora_down.weight": ONE}, "has no up weight for lora_unet_x: it is incomplete."),
        (kohya_module(up=torch.ones(8, 3)), "lora_unet_x has down [2, 4] and up [8, 3], whose ranks differ."),
        (kohya_module(up=torch.full((8, 2), torch.nan)), "up of lora_unet_x has values that are not finite"),
        (kohya_module(alpha=torch.tensor(torch.inf)), "alpha of lora_unet_x has values that are not finite"),
    ],
)
def test_a_file_that_is_no_whole_lora_is_refused(tensors: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path, tensors)
    with pytest.raises(AdapterError, match=re.escape(sentence).replace(r"\.\*", ".*")):
        read_adapter(path)


def test_dora_of_diffusers_is_refused(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.use_dora": True})}
    with pytest.raises(AdapterError, match="is a DoRA, which is not supported. Merge it with the tool that made it."):
        read_adapter(write(tmp_path, one_module(), metadata))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no.safetensors does not exist."):
        read_adapter(tmp_path / "no.safetensors")
    with pytest.raises(AdapterError, match="a.ckpt is not a .safetensors file; adapters in other formats can run code"):
        read_adapter(tmp_path / "a.ckpt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(AdapterError, match="torn.safetensors is not a whole safetensors file"):
        read_adapter(tmp_path / "torn.safetensors")
    with pytest.raises(AdapterError, match="lora_adapter_metadata in .* is not valid JSON"):
        read_adapter(write(tmp_path, one_module(), {"lora_adapter_metadata": "{"}))
