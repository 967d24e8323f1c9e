"""Every form an adapter comes in merges into the same model to the bit; so do several, in any order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.files import read_json
from library.models.load import load_unet
from networks.adapter_file import read_adapter
from networks.families import UNET
from networks.kinds.lora import LoraModule
from networks.names import Target, peft_key
from networks.network import Network
from networks.spec import NetworkSpec
from tests.tools.adapters import earlier_weights, train_lora, write_adapter
from tests.tools.merging import assert_same_tensors, merging_of, payload, run_merge, save, write_state, write_wrapped

# As train_repa.py and the conversion report have it: the attention's four projections, 128 modules.
SPEC = NetworkSpec(rank=8, alpha=16.0, targets="attention")

Form = Callable[[Network, Path, Path], list[object]]


@pytest.fixture(scope="module")
def network(tiny_sd15: Path) -> Network:
    return train_lora(load_unet(str(tiny_sd15)), SPEC)


@pytest.fixture(scope="module")
def expected(network: Network, tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    return merge(folder / "expected.safetensors", tiny_sd15, *kohya(network, folder, tiny_sd15))


def merge(output: Path, base: Path, *words: object) -> Path:
    assert run_merge(*words, "--pretrained_model_name_or_path", base, "--save_to", output) == 0
    return output


def kohya(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--models", save(network.tensors(), folder / "kohya.safetensors")]


def diffusers(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--models", write_adapter(network.adapter(), "diffusers", folder)]


def peft(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--models", write_adapter(network.adapter(), "peft", folder)]


def peft_without_alpha(network: Network, folder: Path, base: Path) -> list[object]:
    weights = earlier_weights(network.adapter(), "base_model.model.")
    tensors = {name.replace(".default.", "."): value for name, value in weights.items()}
    return ["--models", save(tensors, folder / "bare.safetensors"), "--network_alpha", 16]


def old_diffusers(network: Network, folder: Path, base: Path) -> list[object]:
    """`X.processor.to_q_lora.down.weight`, diffusers 0.17."""

    def renamed(name: str) -> str:
        name = name.replace(".to_out.0.", ".to_out.")
        name = re.sub(r"\.(to_\w+)\.lora_A\.default\.", r".processor.\1_lora.down.", name)
        return re.sub(r"\.(to_\w+)\.lora_B\.default\.", r".processor.\1_lora.up.", name)

    weights = earlier_weights(network.adapter(), "unet.")
    file = save({renamed(name): value for name, value in weights.items()}, folder / "old.safetensors")
    return ["--models", file, "--network_alpha", 16]


def state(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--models", write_state(folder / "step_000150", network)]


def earlier_state(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--models", write_state(folder / "step_000150", network, earlier=True)]


def states_file(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--models", write_state(folder / "step_000150", network) / "lora.safetensors"]


def average(network: Network, folder: Path, base: Path) -> list[object]:
    """Halved in both factors by the state."""
    return ["--models", write_state(folder / "step_000150", network), "--use_ema", "--ratios", 4]


def wrapped(network: Network, folder: Path, base: Path) -> list[object]:
    return ["--checkpoint", write_wrapped(folder / "unet_adapted.safetensors", base, network)]


def with_dora_that_keeps_every_norm(network: Network, folder: Path, base: Path) -> list[object]:
    """|| W + dW || as magnitude: DoRA is then LoRA, up to rounding."""
    merging = merging_of(base, (network.adapter(), 1.0))
    tensors = {}
    for key, ((module, _),) in merging.folds[UNET].items():
        target = Target(UNET, key.removesuffix(".weight"))
        whole = merging.base.read(UNET, key) + module.product()
        magnitude = whole.flatten(1).norm(dim=1)
        parts = {"down": module.down, "up": module.up, "magnitude": magnitude}
        tensors |= {peft_key(target, part): value for part, value in parts.items()}
    return ["--models", save(tensors, folder / "dora.safetensors"), "--network_alpha", 16]


FORMS: list[Form] = [
    *(diffusers, peft, peft_without_alpha, old_diffusers, state, earlier_state, states_file, average, wrapped),
]


@pytest.mark.bits
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_file_to_the_bit(
    form: Form, network: Network, expected: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    output = merge(tmp_path / "merged.safetensors", tiny_sd15, *form(network, tmp_path, tiny_sd15))
    assert_same_tensors(output, expected)
    if form is not wrapped:  # in which U-Net's tensors lie in another order
        assert payload(output) == payload(expected)


def test_a_dora_that_keeps_every_norm_is_a_lora(
    network: Network, expected: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    words = with_dora_that_keeps_every_norm(network, tmp_path, tiny_sd15)
    found, plain = (load_file(file) for file in (merge(tmp_path / "a.safetensors", tiny_sd15, *words), expected))
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


def test_a_wrapped_checkpoint_is_counted_as_the_conversion_report_does(
    network: Network, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_wrapped(tmp_path / "run" / "checkpoint.safetensors", tiny_sd15, network)
    words = ("--checkpoint", file, "--pretrained_model_name_or_path", tiny_sd15, "--output_dir", tmp_path / "m")
    assert run_merge(*words, "--save_single_file") == 0
    said = capsys.readouterr().out
    assert f"adapter    {file}: 128 modules, rank 8, alpha 16\n" in said
    assert "           with 686 frozen weights of its own, which take the base's place\n" in said
    assert "           left out: 3 tensors of AlignHeads, which only training needs\n" in said
    assert "checkpoint.safetensors: 945 keys = 686 frozen + 256 merged + 3 dropped\n" in said
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["adapters"][0]["keys"] == {"frozen": 686, "merged": 256, "dropped": 3}
    assert report["components"][0] == {"name": "unet", "keys_before": 686, "keys_after": 686, "changed": 128}
    assert set(map(Path, report["sha256"])) == {
        file,
        tiny_sd15 / "vae" / "diffusion_pytorch_model.safetensors",
        tiny_sd15 / "text_encoder" / "model.safetensors",
    }


def test_frozen_weights_come_from_the_checkpoint_and_not_from_the_base(
    network: Network, expected: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    """A run that trained on another U-Net: what it froze is what it adapted."""
    file = write_wrapped(tmp_path / "checkpoint.safetensors", tiny_sd15, network)
    changed = {n: v + 1 if n.endswith("conv_norm_out.weight") else v for n, v in load_file(file).items()}
    output = merge(tmp_path / "a.safetensors", tiny_sd15, "--checkpoint", save(changed, file))
    key = "model.diffusion_model.out.0.weight"
    assert torch.equal(load_file(output)[key], load_file(expected)[key] + 1)


def test_a_checkpoint_of_another_size_than_the_base_is_refused(
    network: Network, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_wrapped(tmp_path / "checkpoint.safetensors", tiny_sd15, network)
    short = {name: value for name, value in load_file(file).items() if not name.endswith("conv_out.bias")}
    words = ("--checkpoint", save(short, file), "--save_to", tmp_path / "a.safetensors")
    assert run_merge(*words, "--pretrained_model_name_or_path", tiny_sd15) == 2
    said = f"{file} holds a unet of 685 tensors, the base {tiny_sd15} one of 686, and 1 do not agree (first: conv_out.bias)."
    assert said in capsys.readouterr().err
    assert run_merge(*words, "--pretrained_model_name_or_path", tiny_sdxl) == 2
    assert f"holds a unet of 685 tensors, the base {tiny_sdxl} one of 840, and" in capsys.readouterr().err


def test_two_checkpoints_of_whole_models_are_refused(
    network: Network, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_wrapped(tmp_path / "checkpoint.safetensors", tiny_sd15, network)
    assert run_merge("--models", file, file, "--save_to", tmp_path / "a.safetensors") == 2
    assert "Merge such checkpoints one at a time." in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ several


@pytest.mark.bits
def test_several_adapters_add_up_whatever_their_order(
    network: Network, adapter_file: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    (other,) = kohya(network, tmp_path, tiny_sd15)[1:]
    one = merge(tmp_path / "1.safetensors", tiny_sd15, "--models", adapter_file, other, "--ratios", 0.7, 0.3)
    two = merge(tmp_path / "2.safetensors", tiny_sd15, "--models", other, adapter_file, "--ratios", 0.3, 0.7)
    assert_same_tensors(one, two)
    parts = merging_of(tiny_sd15, (read_adapter(adapter_file), 0.7), (read_adapter(str(other)), 0.3))
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    modules: list[tuple[LoraModule, float]] = parts.folds[UNET][f"{key}.weight"]
    added = sum(ratio * module.product().double() for module, ratio in modules)
    expected = parts.base.read(UNET, f"{key}.weight").double() + added
    torch.testing.assert_close(load_file(one)[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.bits
def test_one_adapter_twice_is_twice_its_ratio(network: Network, tiny_sd15: Path, tmp_path: Path) -> None:
    (file,) = kohya(network, tmp_path, tiny_sd15)[1:]
    twice = load_file(merge(tmp_path / "1.safetensors", tiny_sd15, "--models", file, file))
    double = load_file(merge(tmp_path / "2.safetensors", tiny_sd15, "--models", file, "--ratios", 2))
    none = merge(tmp_path / "3.safetensors", tiny_sd15, "--models", file, file, "--ratios", 1, -1)
    base = merge(tmp_path / "4.safetensors", tiny_sd15, "--models", file, "--ratios", 0)
    for name, value in twice.items():
        torch.testing.assert_close(value, double[name], rtol=1e-6, atol=1e-7)
    assert_same_tensors(none, base)


# ------------------------------------------------------------------------------------------------ other kinds


@pytest.fixture
def loha(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    parts = {"hada_w1_a": (96, 2), "hada_w1_b": (2, 96), "hada_w2_a": (96, 2), "hada_w2_b": (2, 96)}
    tensors = {part: 0.1 * torch.randn(shape, generator=generator) for part, shape in parts.items()}
    named = {f"lora_unet_mid_block_attentions_0_proj_in.{part}": value for part, value in tensors.items()}
    return save(
        named | {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)}, tmp_path / "l.safetensors"
    )


def test_a_loha_is_merged_by_its_own_formula(
    loha: Path, tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = merge(tmp_path / "a.safetensors", tiny_sd15, "--models", loha, "--ratios", 0.5)
    assert f"adapter    {loha}: 1 module, rank 2, alpha 1, LoHa\n" in capsys.readouterr().out
    w1_a, w1_b, w2_a, w2_b = (load_file(loha)[f"lora_unet_mid_block_attentions_0_proj_in.hada_{n}"] for n in
                              ("w1_a", "w1_b", "w2_a", "w2_b"))  # fmt: skip
    before = merging_of(tiny_sd15).base.read(UNET, "mid_block.attentions.0.proj_in.weight")
    added = 0.5 * 1 / 2 * (w1_a @ w1_b) * (w2_a @ w2_b)
    found = load_file(output)["model.diffusion_model.middle_block.1.proj_in.weight"]
    torch.testing.assert_close(found, before + added.reshape(before.shape))


def test_a_loha_has_no_place_in_a_sum_of_loras(loha: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--models", loha, "--lora_only", "--save_to", tmp_path / "sum.safetensors")
    assert run_merge(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 1 of 1 modules are LoHa") and "Merge the adapter into a base model instead." in said
    assert not (tmp_path / "sum.safetensors").exists()
