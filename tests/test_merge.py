"""Adapters folded into a base: the formula, that nothing is left over or changed beside it, and what is refused."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merge_lora
from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.merging.diffusers_folder import check_output, write_merged_folder
from library.merging.merge import fold, fold_into_modules, merge_adapter, place
from library.merging.source import base_model_of, read_source
from library.models.load import load_text_encoder, load_unet
from library.models.locate import TINY_SD15, BaseLocation
from library.models.tiny import ensure_tiny
from networks.adapter_file import Adapter, LoraModule, adapter_metadata, read_adapter, to_kohya
from networks.lora import LoraSpec, add_lora, target_modules
from networks.names import kohya_name
from tests.tools.unets import small_unet, unet_inputs

SPEC = LoraSpec(rank=4, alpha=2.0, scope="all", targets="kohya", conv_rank=2, conv_alpha=1.0)
TEXT_LAYER = "text_model.encoder.layers.3.mlp.fc1"


def trained(unet: nn.Module, spec: LoraSpec = SPEC, size: float = 0.05) -> dict[str, Tensor]:
    """Put an adapter on `unet` and give it weights as training would; returns them by name."""
    generator = torch.Generator().manual_seed(1)
    params = add_lora(unet, spec, seed=0)
    for name, parameter in params.items():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach().clone() for name, parameter in params.items()}


def text_adapter(prefix: str = "lora_te", layer: str = TEXT_LAYER) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    name = f"{prefix}_{layer.replace('.', '_')}"
    down, up = torch.randn(2, 64, generator=generator), torch.randn(256, 2, generator=generator)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": 0.05 * up, f"{name}.alpha": torch.tensor(1.0)}


@pytest.fixture(scope="module")
def tiny() -> Path:
    return ensure_tiny(TINY_SD15)


@pytest.fixture(scope="module")
def base(tiny: Path) -> BaseLocation:
    return BaseLocation(TINY_SD15, tiny)


@pytest.fixture(scope="module")
def params(base: BaseLocation) -> dict[str, Tensor]:
    return trained(load_unet(base))


@pytest.fixture(scope="module")
def adapter_file(params: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = to_kohya(params, SPEC)
    metadata = adapter_metadata(
        SPEC, tensors, output_name="demo", date="2026-01-02T03:04:05", resolution=(128, 128), base_model=TINY_SD15
    )
    path = tmp_path_factory.mktemp("adapter") / "demo.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def merged(base: BaseLocation, adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "model"
    write_merged_folder(base, read_adapter(adapter_file), output)
    return output


def random_module(*shape: int, rank: int = 3, alpha: float = 2.0) -> LoraModule:
    generator = torch.Generator().manual_seed(sum(shape))
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    return LoraModule(down, up, alpha)


def tiny_run(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 64, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([321]), text).sample


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1, 1), (5, 7, 3, 3)])
def test_a_merged_weight_is_the_formula(shape: tuple[int, ...]) -> None:
    """W + ratio * alpha / rank * sum over r of up[o, r] * down[r, i, y, x], one weight at a time, in float64."""
    module = random_module(*shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up, down, expected = (value.double().numpy().copy() for value in (module.up, module.down, weight))
    for place_ in np.ndindex(*shape):
        for r in range(module.rank):
            up_value = up[(place_[0], r) + (0,) * (len(shape) - 2)]
            expected[place_] += 0.7 * (2.0 / 3) * up_value * down[(r, *place_[1:])]
    np.testing.assert_allclose(fold(weight, module, 0.7).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_is_rounded_once() -> None:
    """From bfloat16 through float32 to float16, not through bfloat16 again."""
    weight, module = torch.randn(5, 7).bfloat16(), random_module(5, 7)
    weights = {"x.weight": weight}
    merge_adapter(weights, {"x.weight": module}, 1.0, torch.float16)
    assert torch.equal(weights["x.weight"], fold(weight.float(), module, 1.0).half())


def test_ratio_zero_is_the_base_to_the_bit() -> None:
    weights = {name: value.clone() for name, value in small_unet().state_dict().items()}
    before = {name: value.clone() for name, value in weights.items()}
    modules = {
        f"{path}.weight": random_module(*layer.weight.shape) for path, layer in target_modules(small_unet(), SPEC).items()
    }
    changes = merge_adapter(weights, modules, 0.0)
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert {change.relative for change in changes} == {0.0}


def test_changes_are_relative_to_the_weight() -> None:
    weight, module = torch.randn(5, 7), random_module(5, 7)
    (change,) = merge_adapter({"x.weight": weight}, {"x.weight": module}, 1.0)
    assert change.relative == pytest.approx(float((fold(weight, module, 1.0) - weight).norm() / weight.norm()), rel=1e-5)


def test_folded_modules_compute_as_adapters_do_at_run_time() -> None:
    adapted, folded = small_unet(), small_unet()
    params = trained(adapted, size=0.3)
    modules = {}
    for name in params:
        if ".lora_A." in name:
            down, up = params[name], params[name.replace("lora_A", "lora_B")]
            modules[kohya_name(name.split(".lora_A.")[0])] = LoraModule(down, up, 1.0 if down.shape[2:] == (3, 3) else 2.0)
    with torch.no_grad():
        base, expected = (unet(**unet_inputs()).sample for unet in (folded, adapted))
        changes = fold_into_modules(folded, None, Adapter(modules), 1.0)
        assert len(changes) == len(modules)
        torch.testing.assert_close(folded(**unet_inputs()).sample, expected, atol=2e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01


def test_folding_with_minus_one_undoes_it(adapter_file: Path, base: BaseLocation) -> None:
    unet, adapter = load_unet(base), read_adapter(adapter_file)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for ratio in (1.0, -1.0):
        fold_into_modules(unet, None, adapter, ratio)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def test_the_merged_folder_computes_as_the_adapter_does(merged: Path, base: BaseLocation) -> None:
    adapted = load_unet(base)
    trained(adapted)
    expected = tiny_run(adapted)
    torch.testing.assert_close(tiny_run(load_unet(str(merged))), expected, atol=1e-4, rtol=1e-4)
    assert (tiny_run(load_unet(base)) - expected).abs().max() > 1e-2


def test_diffusers_loads_our_file_whole_and_agrees_with_the_merge(
    merged: Path, adapter_file: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    pipeline = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.INFO, "diffusers"):
        pipeline.load_lora_weights(adapter_file.parent, weight_name=adapter_file.name)
    assert not [record.message for record in caplog.records if re.search(r"unexpected|missing|not found", record.message)]
    adapted = [name for name, _ in pipeline.unet.named_modules() if name.endswith(".lora_A.default_0")]
    assert len(adapted) == len(read_adapter(adapter_file).modules)
    again = StableDiffusionPipeline.from_pretrained(merged, local_files_only=True)
    torch.testing.assert_close(tiny_run(again.unet), tiny_run(pipeline.unet), atol=1e-4, rtol=1e-4)


def test_what_the_adapter_does_not_touch_keeps_its_bytes(merged: Path, tiny: Path) -> None:
    expected = {file.relative_to(tiny) for file in tiny.rglob("*") if file.is_file()} - {Path("tiny.json")}
    assert {file.relative_to(merged) for file in merged.rglob("*") if file.is_file()} == expected
    changed = [file for file in expected if not filecmp.cmp(tiny / file, merged / file, shallow=False)]
    assert changed == [Path("unet/diffusion_pytorch_model.safetensors")]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_every_file_can_be_read_by_whoever_the_umask_allows(merged: Path) -> None:
    os.umask(mask := os.umask(0))
    assert {file.stat().st_mode & 0o777 for file in merged.rglob("*") if file.is_file()} == {0o666 & ~mask}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_save_precision_holds_for_the_unet(
    dtype: torch.dtype, base: BaseLocation, adapter_file: Path, merged: Path, tmp_path: Path
) -> None:
    write_merged_folder(base, read_adapter(adapter_file), tmp_path / "m", dtype=dtype)
    narrow, wide = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "m", merged))
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(value, wide[name].to(dtype)) for name, value in narrow.items())


def test_a_base_in_half_precision_stays_so(base: BaseLocation, adapter_file: Path, tmp_path: Path) -> None:
    write_merged_folder(base, read_adapter(adapter_file), tmp_path / "half", dtype=torch.float16)
    write_merged_folder(BaseLocation("half", tmp_path / "half"), read_adapter(adapter_file), tmp_path / "again")
    weights = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_the_text_encoder_is_merged_under_its_full_names(prefix: str, base: BaseLocation, tmp_path: Path) -> None:
    save_file(text_adapter(prefix), tmp_path / "te.safetensors")
    adapter = read_adapter(tmp_path / "te.safetensors")
    report = write_merged_folder(base, adapter, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "text_encoder" / "model.safetensors")
    before = load_text_encoder(base)[1].state_dict()
    assert weights.keys() == before.keys() and all(name.startswith("text_model.") for name in weights)
    changed = [name for name in weights if not torch.equal(weights[name], before[name])]
    assert changed == [f"{TEXT_LAYER}.weight"]
    (module,) = adapter.modules.values()
    torch.testing.assert_close(weights[changed[0]], fold(before[changed[0]], module, 1.0))
    assert [part.copied for part in report.components] == [False, False]


def test_a_text_encoder_without_text_model_in_its_names_gets_it(
    tiny: Path, adapter_file: Path, tmp_path: Path, base: BaseLocation
) -> None:
    """As transformers >= 5.6 writes it, which 5.5 and before would fill with random weights."""
    import shutil

    shutil.copytree(tiny, tmp_path / "flat")
    file = tmp_path / "flat" / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({name.removeprefix("text_model."): value for name, value in weights.items()}, file, metadata={"format": "pt"})
    write_merged_folder(BaseLocation("flat", tmp_path / "flat"), read_adapter(adapter_file), tmp_path / "m")
    again = load_file(tmp_path / "m" / "text_encoder" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_parts_that_the_base_names_but_lacks_become_null_and_are_told(tiny: Path, adapter_file: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny, tmp_path / "base")
    index = json.loads((tiny / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    report = write_merged_folder(BaseLocation("b", tmp_path / "base"), read_adapter(adapter_file), tmp_path / "m")
    assert report.absent == ["safety_checker"]
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["safety_checker"] == [None, None]


def shapes_of(unet: nn.Module) -> Mapping[str, Any]:
    return {"unet": {name: value.shape for name, value in unet.state_dict().items()}}


def adapter_with(**modules: LoraModule) -> Adapter:
    return Adapter(modules)


PROJ_IN = "lora_unet_mid_block_attentions_0_proj_in"
TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (
            adapter_with(**{PROJ_IN: random_module(16, 16), "lora_te2_text_model_x": random_module(2, 2)}),
            "1 of 2 LoRA modules have no place in this checkpoint (first: lora_te2_text_model_x). "
            "It looks like an SDXL LoRA on an SD1.5 model.",
        ),
        (adapter_with(**{TO_K: random_module(16, 2048)}), "It looks like an SDXL LoRA on an SD1.5 model."),
        (adapter_with(**{TO_K: random_module(16, 1024)}), "It looks like an SD2 LoRA on an SD1.5 model."),
        (
            adapter_with(lora_te_text_model_x=random_module(2, 2)),
            "1 of 1 LoRA modules have no place in this checkpoint (first: lora_te_text_model_x). "
            "They are of a text encoder that this base does not have.",
        ),
        (
            adapter_with(**{PROJ_IN: random_module(1280, 1280, 1, 1)}),
            f"{PROJ_IN} is for a weight [1280, 1280, 1, 1], the base has [16, 16, 1, 1]: it was trained on a model of another size.",
        ),
        (
            adapter_with(**{f"lora_unet_blocks_{i}": random_module(2, 2) for i in range(4)}),
            "4 of 4 LoRA modules have no place in this checkpoint (first: lora_unet_blocks_0, lora_unet_blocks_1, "
            "lora_unet_blocks_2). It was made for another kind of model, or for layers this base does not have.",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_a_guess_why(adapter: Adapter, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        place(adapter, shapes_of(small_unet()))


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    unet = small_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    adapter = adapter_with(**{PROJ_IN: random_module(16, 16, 1, 1), "lora_unet_x": random_module(2, 2)})
    with pytest.raises(UserError, match="1 of 2 LoRA modules have no place"):
        fold_into_modules(unet, None, adapter, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_matrix_fits_a_1x1_convolution() -> None:
    """SD2-style files keep proj_in as Linear; kohya's merge squeezes the same way."""
    assert place(adapter_with(**{PROJ_IN: random_module(16, 16)}), shapes_of(small_unet()))["unet"]


def test_a_weight_that_overflows_its_format_is_refused() -> None:
    weights = {"x.weight": torch.full((2, 2), 6e4)}
    module = LoraModule(torch.full((1, 2), 100.0), torch.full((2, 1), 100.0), 1.0)
    with pytest.raises(UserError, match="x.weight has values that are not finite as torch.float16. Try --save_precision float."):
        merge_adapter(weights, {"x.weight": module}, 1.0, torch.float16)


def write_state(folder: Path, params: dict[str, Tensor], *, ema: bool = True, base_model: str | None = TINY_SD15) -> Path:
    """A training state as train_repa.py leaves it."""
    metadata = {"format": "pt", "lora_spec": SPEC.to_json()}
    folder.mkdir(parents=True)
    save_file(params, folder / "lora.safetensors", metadata=metadata)
    if ema:
        heads = {"align_heads.mid.proj.0.weight": torch.zeros(2, 2)}
        halved = {name: value / 2 for name, value in params.items()}
        save_file({**halved, **heads}, folder / "ema.safetensors", metadata=metadata)
    (folder / "state.json").write_text(json.dumps({"step": 150} | ({"base_model": base_model} if base_model else {})))
    return folder


def test_a_training_state_is_read_with_its_base(params: dict[str, Tensor], adapter_file: Path, tmp_path: Path) -> None:
    source = read_source(write_state(tmp_path / "step_000150", params))
    expected = read_adapter(adapter_file)
    assert (source.base_model, source.named_in) == (TINY_SD15, "state.json")
    assert source.adapter.modules.keys() == expected.modules.keys()
    for name, module in source.adapter.modules.items():
        assert torch.equal(module.down, expected.modules[name].down)
        assert module.alpha == expected.modules[name].alpha


def test_the_average_of_a_training_state_is_read_without_heads(params: dict[str, Tensor], tmp_path: Path) -> None:
    source = read_source(write_state(tmp_path / "step_000150", params), use_ema=True)
    assert source.file.name == "ema.safetensors"
    assert source.adapter.left_out == ("align_heads.mid.proj.0.weight",)
    name = next(name for name in params if ".lora_A." in name)
    assert torch.equal(source.adapter.modules[kohya_name(name.split(".lora_A.")[0])].down, params[name] / 2)


def refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert sentence in str(caught.value)


def test_what_cannot_be_read_is_named(params: dict[str, Tensor], adapter_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    state = write_state(tmp_path / "step_000150", params, ema=False)
    refused(lambda: read_source(tmp_path / "empty"), "empty is no training state: there is no state.json in it.")
    refused(lambda: read_source(state, use_ema=True), "has no ema.safetensors. The run kept no moving average")
    refused(lambda: read_source(adapter_file, use_ema=True), "--use_ema picks the averaged weights of a training state, but")
    refused(lambda: read_source(tmp_path / "no.safetensors"), "no.safetensors does not exist.")
    broken = dict(params) | {next(iter(params)): torch.full_like(next(iter(params.values())), torch.nan)}
    refused(lambda: read_source(write_state(tmp_path / "step_2", broken)), "has values that are not finite")


def test_the_base_is_the_given_one_else_the_one_the_adapter_names(adapter_file: Path) -> None:
    source = read_source(adapter_file)
    assert base_model_of(source, "other") == "other"
    assert base_model_of(source, None) == TINY_SD15
    unnamed = replace(source, base_model=None, adapter=replace(source.adapter, metadata={"ss_sd_model_name": "v1-5.ckpt"}))
    refused(lambda: base_model_of(unnamed, None), "only says that its base was called v1-5.ckpt. Name the base with")
    unnamed = replace(unnamed, adapter=replace(source.adapter, metadata={}))
    refused(lambda: base_model_of(unnamed, None), "does not say which base model it belongs to. Name the base with")


def test_only_an_earlier_merge_is_replaced(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    refused(lambda: check_output(merged, [], overwrite=False), "exists already. Name another --output_dir, or replace it")
    refused(lambda: check_output(tmp_path / "photos", [], overwrite=True), "photos is no diffusers folder, so --overwrite")
    refused(lambda: check_output(merged, [merged], overwrite=True), "which is to be read. Name another --output_dir.")
    refused(lambda: check_output(merged, [merged / "unet"], overwrite=True), "which is to be read.")
    check_output(merged, [tmp_path], overwrite=True)
    check_output(tmp_path / "new", [], overwrite=False)


def test_the_script_merges_reports_and_replaces(
    adapter_file: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(adapter_file), "--output_dir", str(tmp_path / "m")]
    assert merge_lora.main(arguments) == EXIT_OK
    said = capsys.readouterr().out
    assert "base       tiny-sd15 (named in the adapter's metadata)" in said
    assert re.search(r"unet +686 +686 +278 +\d\.\d\de[+-]\d\d  \S+\.weight\n", said)
    assert re.search(r"text_encoder +196 +196 +0 +copied as it is\n", said)
    file = Path("unet/diffusion_pytorch_model.safetensors")
    assert filecmp.cmp(tmp_path / "m" / file, merged / file, shallow=False)
    assert merge_lora.main(arguments) == EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    assert merge_lora.main([*arguments, "--overwrite", "--ratio", "0"]) == EXIT_OK
    assert "Nothing has changed: the adapter is zero (was it trained?) or the ratio is." in capsys.readouterr().out


def test_a_dry_run_writes_nothing(adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge_lora.main(["--model", str(adapter_file), "--output_dir", str(tmp_path / "m"), "--dry-run"]) == EXIT_OK
    assert "278 modules, rank 2 to 4, alpha 1 to 2" in capsys.readouterr().out
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "absent.safetensors"], "model absent.safetensors does not exist."),
        (["--model", ".", "--ratio", "11"], "ratio must lie between -10 and 10, got 11.0."),
        (["--model", ".", "--network_alpha", "0"], "network_alpha must be positive, got 0.0."),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_lora.main([*arguments, "--output_dir", str(tmp_path / "m")]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {sentence}\n"
