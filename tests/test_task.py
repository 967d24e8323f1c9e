"""What one batch of a LoRA training teaches: adapters, masks, weights, captions and objective reach the loss."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.diffusion.predictions import EPSILON, VELOCITY
from library.models.frozen import EncodedConv2d, EncodedLinear
from library.models.load import load_scheduler_config, load_unet
from library.models.locate import locate_base
from library.options.kohya.training import NetworkModelOptions
from library.processes import Processes
from library.training.models import (
    base_weights_facts,
    build_network,
    load_frozen_text,
    load_frozen_unet,
    meta_models,
    parameter_groups,
)
from library.training.run import make_objective
from library.training.text import CachedText, EncodedText
from networks.families import FAMILIES, UNET
from tests.tools.adapters import write_lora
from tests.tools.network_runs import Built, NetworkSetting

UNET_ONLY = {"network_train_unet_only": ""}


@pytest.fixture(scope="module")
def stirred(network_setting: NetworkSetting) -> Built:
    """A run whose adapters have an effect."""
    return network_setting.build().stir()


def test_fresh_adapters_leave_the_bases_loss_to_the_bit(
    network_setting: NetworkSetting, sdxl_setting: NetworkSetting
) -> None:
    for setting in (network_setting, sdxl_setting):
        built = setting.build()
        adapted = built.loss()
        with built.task.network.disabled():
            assert built.loss() == adapted
        built.stir()
        assert built.loss() != adapted


def test_network_multiplier_is_the_strength_of_the_adapters(stirred: Built) -> None:
    batch = stirred.batch()
    with stirred.task.network.disabled():
        base = stirred.loss(batch)
    losses = [stirred.loss(replace(batch, multiplier=strength)) for strength in (0.0, 0.5, 1.0)]
    assert losses[0] == base and len(set(losses)) == 3
    assert stirred.loss(replace(batch, multiplier=1.0)) == losses[2]


@pytest.mark.bits
def test_preserved_outputs_are_what_the_base_says(network_setting: NetworkSetting, stirred: Built) -> None:
    """Adapters that do nothing have nothing to learn from such pictures."""
    config = network_setting.dataset("kept", subset="custom_attributes = { diff_output_preservation = true }")
    fresh = network_setting.build(dataset_config=config)
    batch = fresh.batch()
    assert batch.preserve is not None and batch.preserve.all() and fresh.loss(batch) == 0.0
    assert fresh.stir().loss(batch) > 0.0
    some = torch.arange(len(batch)) == 0
    plain = stirred.task.each(batch := stirred.batch(), *drawn(stirred, batch))
    mixed = stirred.task.each(replace(batch, preserve=some), *drawn(stirred, batch))
    assert mixed[0] != plain[0] and torch.equal(mixed[1:], plain[1:])


def drawn(built: Built, batch):  # type: ignore[no-untyped-def]
    from library.diffusion.noise import Draw

    latents = built.task.latents(batch)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return latents, Draw(noise, noise, torch.arange(len(batch)) * 200 + 100)


@pytest.mark.bits
def test_a_mask_takes_its_pixels_out_of_the_loss(stirred: Built) -> None:
    batch = stirred.batch()
    whole = stirred.task.each(batch, *drawn(stirred, batch))
    ones = torch.ones(len(batch), 1, *batch.latents.shape[-2:])
    assert torch.equal(stirred.task.each(replace(batch, mask=ones), *drawn(stirred, batch)), whole)
    left, right = ones.clone(), ones.clone()
    left[..., : ones.shape[-1] // 2] = 0
    right[..., ones.shape[-1] // 2 :] = 0
    parts = [stirred.task.each(replace(batch, mask=mask), *drawn(stirred, batch)) for mask in (left, right)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert all((part > 0).all() for part in parts)
    assert (stirred.task.each(replace(batch, mask=ones * 0), *drawn(stirred, batch)) == 0).all()


def test_regularisation_pictures_count_their_weight_and_fillers_nothing(stirred: Built) -> None:
    batch = stirred.batch()
    each = stirred.task.each(batch, *drawn(stirred, batch))

    def loss(weights: list[float], real: list[float]) -> float:
        one = replace(batch, weights=torch.tensor(weights), real=torch.tensor(real))
        stirred.task.each, original = (lambda *_: each), stirred.task.each  # type: ignore[method-assign]
        try:
            return stirred.task.losses(one, torch.Generator(), 0)["loss"].item()
        finally:
            stirred.task.each = original  # type: ignore[method-assign]

    a, b = each.tolist()[:2]
    assert loss([1.0, 0.25], [1.0, 1.0]) == pytest.approx((a + 0.25 * b) / 2)
    assert loss([1.0, 0.0], [1.0, 0.0]) == pytest.approx(a)
    assert loss([0.0, 0.0], [0.0, 0.0]) == 0.0


@pytest.mark.parametrize("setting", ["network_setting", "sdxl_setting"])
def test_cached_captions_give_the_losses_of_live_ones(setting: str, request: pytest.FixtureRequest) -> None:
    """Up to float16, in which they are kept."""
    owner: NetworkSetting = request.getfixturevalue(setting)
    skip = {} if setting == "sdxl_setting" else {"clip_skip": 2}
    live = owner.build(**UNET_ONLY, **skip, max_token_length=150).stir()
    kept = owner.build(**UNET_ONLY, **skip, max_token_length=150, cache_text_encoder_outputs="").stir()
    assert isinstance(kept.task.text, CachedText) and isinstance(live.task.text, EncodedText)
    assert live.batch().captions == kept.batch().captions
    assert kept.loss() == pytest.approx(live.loss(), rel=1e-4)
    if skip:
        assert owner.build(**UNET_ONLY, max_token_length=150).stir().loss() != pytest.approx(live.loss(), rel=1e-4)


def test_options_reach_the_objective_and_the_noise(network_setting: NetworkSetting) -> None:
    from library.options.network import parse_network_options

    def objective(words: str):  # type: ignore[no-untyped-def]
        options = parse_network_options(
            [*network_setting.argv(network_setting.folder / "o"), *words.split()], prog="", description=None
        )
        base = locate_base(str(network_setting.base))
        return make_objective(options, load_scheduler_config(base), FAMILIES["sd15"], 64, Processes("cpu"))

    plain = objective("")
    assert (plain.parametrisation.output, plain.compared, plain.min_snr_gamma) == (EPSILON, EPSILON, None)
    velocity = objective("--v_parameterization --scale_v_pred_loss_like_noise_pred --zero_terminal_snr")
    assert velocity.parametrisation.output is velocity.compared is VELOCITY
    assert velocity.scale_v_pred_loss_like_noise_pred
    last = torch.tensor([999])
    assert plain.parametrisation.snr(last) > 0 and velocity.parametrisation.snr(last) == 0
    weighted = objective("--min_snr_gamma 5 --debiased_estimation_loss --v_pred_like_loss 0.5")
    assert (weighted.min_snr_gamma, weighted.debiased_estimation_loss, weighted.v_pred_like_loss) == (5, True, 0.5)
    huber = objective("--loss_type smooth_l1 --huber_schedule exponential --huber_c 0.2 --huber_scale 2").pointwise
    assert huber == type(huber)("smooth_l1", "exponential", 0.2, 2.0)
    built = network_setting.build(
        **UNET_ONLY, noise_offset=0.05, adaptive_noise_scale=0.1, ip_noise_gamma=0.1, min_timestep=10, max_timestep=20
    )
    recipe = built.task.recipe
    assert (recipe.noise_offset, recipe.adaptive_noise_scale, recipe.ip_noise_gamma) == (0.05, 0.1, 0.1)
    assert (recipe.min_timestep, recipe.max_timestep) == (10, 20)


@pytest.mark.parametrize(
    ("family", "words", "expected"),
    [
        ("sd15", "", {"unet": 1e-4, "text_encoder": 1e-4}),
        ("sd15", "--unet_lr 0 --text_encoder_lr 1e-5", {"text_encoder": 1e-5}),
        ("sd15", "--network_train_text_encoder_only", {"text_encoder": 1e-4}),
        ("sdxl", "--text_encoder_lr 1e-5 2e-5", {"unet": 1e-4, "text_encoder": 1e-5, "text_encoder_2": 2e-5}),
        ("sdxl", "--text_encoder_lr 1e-5 0", {"unet": 1e-4, "text_encoder": 1e-5}),
        ("sdxl", "--network_train_unet_only", {"unet": 1e-4}),
        (
            "sd15",
            "--network_args loraplus_lr_ratio=4 loraplus_text_encoder_lr_ratio=2",
            {"unet": 1e-4, "unet plus": 4e-4, "text_encoder": 1e-4, "text_encoder plus": 2e-4},
        ),
        (
            "sd15",
            f"--network_train_unet_only --network_args down_lr_weight={','.join('0' * 12)} mid_lr_weight=0.5 up_lr_weight=zeros+2",
            {"unet block 12": 5e-5, **{f"unet block {i}": 2e-4 for i in range(16, 25)}},
        ),
    ],
)  # fmt: skip
def test_every_part_learns_at_its_rate(
    family: str, words: str, expected: dict[str, float], request: pytest.FixtureRequest
) -> None:
    from library.options.network import parse_network_options

    base: Path = request.getfixturevalue(f"tiny_{family}")
    argv = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", "demo", *words.split()]
    options = parse_network_options(argv, prog="", description=None)
    kind = FAMILIES[family]
    network = build_network(meta_models(options, locate_base(str(base)), kind), options, kind, None)
    rates = {group.name: group.learning_rate for group in parameter_groups(network, options, kind)}
    assert rates == pytest.approx(
        {name: rate for name, rate in expected.items() if name in rates or "block" not in name}
    )
    assert all(any(name == f"unet block {i}" for name in rates) for i in (12, 24) if "block" in words)


def test_ranks_by_block(network_setting: NetworkSetting) -> None:
    dims = ",".join(["0"] * 12 + ["8"] + ["2"] * 12)
    built = network_setting.build(**UNET_ONLY, network_args=f"block_dims={dims} conv_block_dims={dims}")
    ranks = {target.path: layer.to_module().rank for target, layer in built.task.network.layers.items()}
    assert not any(path.startswith("down_blocks") for path in ranks)
    assert {rank for path, rank in ranks.items() if path.startswith("mid_block")} == {8}
    assert {rank for path, rank in ranks.items() if path.startswith("up_blocks")} == {2}


def test_a_rate_of_zero_trains_and_keeps_nothing(sdxl_setting: NetworkSetting) -> None:
    from library.training.run import make_trained

    built = sdxl_setting.build(text_encoder_lr="1e-3 0")
    trained = make_trained(built.options, built.task)
    assert sorted(trained.parts) == ["lora_text_encoder", "lora_unet"]
    built.task.losses(built.batch(), torch.Generator(), 0)["loss"].backward()
    learnt = {name.split(".")[0] for name, p in built.task.network.parameters.items() if p.grad is not None}
    assert learnt == {"unet", "text_encoder"}


def test_base_weights_are_folded_in_with_their_strengths(
    network_setting: NetworkSetting, adapter_file: Path, tmp_path: Path
) -> None:
    whole = network_setting.build().stir()
    save_file(whole.task.network.tensors(), tmp_path / "start.safetensors", {"ss_base_model_version": "sd_v1"})
    with_adapter = whole.loss()
    folded = network_setting.build(base_weights=tmp_path / "start.safetensors")
    assert folded.loss() == pytest.approx(with_adapter, rel=1e-4)
    # The captions' encodings are those of the encoders with the adapter, too.
    kept = network_setting.build(
        **UNET_ONLY, base_weights=tmp_path / "start.safetensors", cache_text_encoder_outputs=""
    )
    assert kept.loss() == pytest.approx(with_adapter, rel=1e-3)
    weaker = network_setting.build(base_weights=tmp_path / "start.safetensors", base_weights_multiplier=0.5)
    assert weaker.loss() == pytest.approx(whole.loss(replace(whole.batch(), multiplier=0.5)), rel=1e-4)
    facts = [base_weights_facts(built.options, built.prepared.base, (UNET,)) for built in (whole, folded, weaker)]
    assert "folded_in" not in facts[0] and len({str(one) for one in facts}) == 3


def test_training_goes_on_from_network_weights(
    network_setting: NetworkSetting, tiny_sd15: Path, tmp_path: Path
) -> None:
    whole = network_setting.build(network_alpha=2).stir()
    save_file(whole.task.network.tensors(), tmp_path / "start.safetensors", {"ss_base_model_version": "sd_v1"})
    again = network_setting.build(network_weights=tmp_path / "start.safetensors", network_alpha=1)
    assert again.loss() == pytest.approx(whole.loss(), rel=1e-5), "another alpha is made up for"
    write_lora(tiny_sd15, tmp_path / "other.safetensors")
    taken = network_setting.build(
        **UNET_ONLY, network_weights=tmp_path / "other.safetensors", dim_from_weights="", network_dim=None
    )
    from networks.adapter_file import read_adapter

    modules = read_adapter(tmp_path / "other.safetensors").modules
    ranks = {target: layer.to_module().rank for target, layer in taken.task.network.layers.items()}
    assert ranks == {target: module.rank for target, module in modules.items()}


@pytest.mark.bits
@pytest.mark.parametrize("name", ["fp8", "int8", "nf4"])
def test_a_quantised_base_computes_what_its_decoded_weights_do(network_setting: NetworkSetting, name: str) -> None:
    """Losses and gradients of adapters, against a base whose weights were rounded so beforehand."""
    plain = network_setting.build(mixed_precision="bf16").stir()
    kept = network_setting.build(mixed_precision="bf16", base_quantization=name).stir()
    rounded = 0
    for component, model in kept.task.models.items():
        other = dict(plain.task.models[component].named_modules())
        for path, module in model.named_modules():
            if isinstance(module, EncodedConv2d | EncodedLinear):
                other[path].weight.data = module.weight
                rounded += 1
    assert rounded > 100
    results = []
    for built in (plain, kept):
        torch.manual_seed(0)
        loss = built.task.losses(built.batch(), torch.Generator().manual_seed(0), 0)["loss"]
        loss.backward()
        results.append((loss, {name: p.grad for name, p in built.task.network.parameters.items()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=2e-2, atol=1e-5)
    assert kept.task.models[UNET].dtype == torch.bfloat16


def test_kohyas_names_say_what_base_quantization_says() -> None:
    def formats(**values: Any) -> list[str | None]:
        return [NetworkModelOptions(**values).format_at_rest(component) for component in (UNET, "text_encoder")]

    assert formats(fp8_base=True) == formats(base_quantization="fp8") == ["fp8", "fp8"]
    assert formats(fp8_base_unet=True) == ["fp8", None] and formats() == [None, None]


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "oft"])
def test_a_fresh_adapter_is_the_quantised_base_to_the_bit_and_learns_on_it(
    network_setting: NetworkSetting, kind: str
) -> None:
    built = network_setting.build(base_quantization="nf4", network_args=f"algo={kind}", **UNET_ONLY)
    fresh = built.loss()
    with built.task.network.disabled():
        assert built.loss() == fresh
    built.task.losses(built.batch(), torch.Generator().manual_seed(0), 0)["loss"].backward()
    gradients = [parameter.grad for parameter in built.task.network.parameters.values()]
    assert any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.bits
def test_a_base_kept_as_its_file_has_it_is_the_base_to_the_bit(network_setting: NetworkSetting, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(network_setting.base, half)
    for file in half.glob("*/*.safetensors"):
        tensors = {name: value.half() for name, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    given = {"pretrained_model_name_or_path": half, "network_dropout": None}
    plain, kept = (
        network_setting.build(**given).stir(),
        network_setting.build(**given, base_quantization="stored").stir(),
    )
    short = [layer for layer in kept.task.unet.modules() if isinstance(layer, EncodedConv2d | EncodedLinear)]
    assert len(short) > 100 and all(layer.numbers.dtype == torch.float16 for layer in short)
    results = []
    for built in (plain, kept):
        loss = built.task.losses(built.batch(), torch.Generator().manual_seed(0), 0)["loss"]
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in built.task.network.parameters.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.bits
def test_the_frozen_unet_is_the_bases(network_setting: NetworkSetting) -> None:
    built = network_setting.build(**UNET_ONLY)
    base, family, device = built.prepared.base, built.prepared.family, torch.device("cpu")
    loaded, plain = load_frozen_unet(built.options, base, family, device).state_dict(), load_unet(base).state_dict()
    assert loaded.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in loaded.items())
    assert [part.component for part in load_frozen_text(built.options, base, family, device)] == ["text_encoder"]
