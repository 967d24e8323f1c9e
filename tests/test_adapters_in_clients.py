"""Written adapter files at work in diffusers and PEFT: the right modules, each adding what it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from networks.adapter_export import Form
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from networks.families import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from networks.names import Target
from tests.tools.adapters import whole_adapter, with_many_alphas, write_adapter
from tests.tools.unets import small_unet

SDXL_FILE = {"ss_base_model_version": "sdxl_base_v1-0"}


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_sd15)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    names = (UNET, TEXT_ENCODER, TEXT_ENCODER_2)
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def draw(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 3.0}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red square", generator=generator, **options).images


@contextmanager
def loaded(pipeline: Any, path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """With the file as diffusers loads it, and not one complaint."""
    diffusers.utils.logging.enable_propagation()
    caplog.clear()
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        complaints = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
        # It says of a text encoder without an adapter that this is safe to ignore.
        assert [text for text in complaints if "No LoRA keys associated to CLIPTextModel" not in text] == []
        yield
    finally:
        pipeline.unload_lora_weights()
        diffusers.utils.logging.disable_propagation()


def assert_at_work(pipeline: Any, adapter: Adapter) -> None:
    """On exactly the adapter's modules, each adding exactly what it should."""
    found = {
        Target(component, path): layer
        for component, model in components_of(pipeline).items()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert sorted(found) == sorted(adapter.modules)
    for target, layer in found.items():
        (name,) = layer.lora_A.keys()
        delta = layer.get_delta_weight(name).detach()
        torch.testing.assert_close(delta, adapter.modules[target].product().reshape(delta.shape), rtol=1e-4, atol=1e-6)


@contextmanager
def merged(pipeline: Any, adapter: Adapter) -> Iterator[None]:
    models = components_of(pipeline)
    weights = {target: models[target.component].get_submodule(target.path).weight for target in adapter.modules}
    before = {target: weight.detach().clone() for target, weight in weights.items()}
    for target, weight in weights.items():
        weight.data += adapter.modules[target].delta(weight.data)
    yield
    for target, weight in weights.items():
        weight.data = before[target]


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_draws_with_the_file_what_merged_weights_draw(
    family: str, form: Form, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = request.getfixturevalue(family)
    adapter = whole_adapter(components_of(pipeline), metadata=SDXL_FILE if family == "sdxl" else None)
    kernels = Counter((target.component, module.kernel) for target, module in adapter.modules.items())
    assert len(kernels) == (4 if family == "sdxl" else 3), "U-Net with 1x1 and 3x3, and the text encoders"
    plain = draw(pipeline)
    with merged(pipeline, adapter):
        expected = draw(pipeline)
    with loaded(pipeline, write_adapter(adapter, form, tmp_path), caplog):
        assert_at_work(pipeline, adapter)
        torch.testing.assert_close(draw(pipeline), expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(draw(pipeline), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_gives_every_module_its_alpha_and_rank(
    family: str, form: Form, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after adding and resizing adapters: ranks and alphas of all sizes."""
    pipeline = request.getfixturevalue(family)
    whole = whole_adapter(components_of(pipeline), metadata=SDXL_FILE if family == "sdxl" else None)
    modules = {
        target: replace(module, down=module.down[: 1 + number % 2], up=module.up[:, : 1 + number % 2])
        for number, (target, module) in enumerate(whole.modules.items())
    }
    adapter = with_many_alphas(replace(whole, modules=modules))
    with loaded(pipeline, write_adapter(adapter, form, tmp_path), caplog):
        assert_at_work(pipeline, adapter)


@pytest.mark.parametrize("pattern", ["resnets", "to_k", "mid_block", "conv"])
def test_diffusers_gives_a_part_of_the_unet_its_alphas(
    pattern: str, sd15: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where 3x3 convolutions are the more, diffusers takes their alpha for the attention's as well."""
    whole = whole_adapter({UNET: sd15.unet}, alpha=8.0, conv_alpha=1.0)
    few = [target for target in whole.modules if "attn1.to_q" in target.path][:2]
    modules = {t: module for t, module in whole.modules.items() if pattern in t.path or t in few}
    adapter = replace(whole, modules=modules)
    with loaded(sd15, write_adapter(adapter, "kohya", tmp_path), caplog):
        assert_at_work(sd15, adapter)


def test_a_file_of_a_training_works_in_diffusers(
    adapter_file: Path, sd15: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with loaded(sd15, adapter_file, caplog):
        assert_at_work(sd15, read_adapter(adapter_file))


def test_peft_loads_its_own_form(tmp_path: Path) -> None:
    unet = small_unet()
    assert isinstance(unet, UNet2DConditionModel)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    adapter = with_many_alphas(whole_adapter({UNET: unet}))
    write_adapter(adapter, "peft", tmp_path)
    after = PeftModel.from_pretrained(unet, str(tmp_path)).merge_and_unload().state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{target.path}.weight" for target in adapter.modules}
    for target, module in adapter.modules.items():
        name = f"{target.path}.weight"
        torch.testing.assert_close(after[name] - before[name], module.delta(before[name]), rtol=1e-4, atol=1e-6)
