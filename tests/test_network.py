"""The network of a training: what is adapted, in what groups it learns, how it starts, and what holds it in bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import AdapterError
from networks.blocks import block_of, block_weights
from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, UNET
from networks.names import Target
from networks.network import Network, add_network
from networks.spec import NetworkSpec
from networks.targets import ADAPTER
from tests.test_names import KOHYA_LISTS
from tests.tools.adapters import model_without_weights
from tests.tools.networks import few, run_models, small_models, small_text_encoder, train, trained_network
from tests.tools.unets import unet_inputs

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def weight(network: Network, path: str, part: str = "A", component: str = UNET) -> nn.Parameter:
    return network.parameters[f"{component}.{path}.lora_{part}.default.weight"]


# ------------------------------------------------------------------------------------------------ what is adapted


@pytest.mark.parametrize(("family", "conv"), sorted(KOHYA_LISTS))
def test_names_and_shapes_at_full_size_are_kohyas(family: str, conv: bool) -> None:
    components = (UNET, *FAMILIES[family].text_encoders)
    models = {component: model_without_weights.__wrapped__(family, component) for component in components}
    network = add_network(models, NetworkSpec(family=family, conv_rank=4 if conv else None), seed=0)
    adapter = network.adapter()
    lines = []
    for target, name in adapter.names().items():
        module: Any = adapter.modules[target]
        lines.append(f"{name}\t{tuple(module.down.shape)}\t{tuple(module.up.shape)}")
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert (len(lines), digest) == KOHYA_LISTS[family, conv]
    assert len(network.parameters) == 2 * len(lines)


@pytest.mark.parametrize(
    ("options", "modules", "parameters"),
    [
        ({"scope": "mid", "targets": "attention"}, 8, 155_648),
        ({"scope": "down_mid", "targets": "attention"}, 56, 731_136),
        ({"targets": "attention"}, 128, 1_594_368),
        ({}, 192, 3_391_488),
        ({"conv_rank": 4}, 278, 6_230_528),
    ],
)
def test_the_unet_of_sd15_gets_the_documented_numbers(options: dict[str, Any], modules: int, parameters: int) -> None:
    unet = model_without_weights.__wrapped__("sd15", UNET)
    network = add_network({UNET: unet}, NetworkSpec(rank=8, **options), seed=0)
    assert len(network.layers) == modules
    assert sum(parameter.numel() for parameter in network.parameters.values()) == parameters


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [NetworkSpec(scope="mid", targets="attention"), NetworkSpec(rank=4, conv_rank=2)])
def test_new_adapters_leave_the_outputs_to_the_bit_and_compute_as_the_base(
    spec: NetworkSpec, dtype: torch.dtype
) -> None:
    models = small_models(dtype)
    base, dtypes = run_models(models, dtype), set()
    network: Any = add_network(models, spec, seed=0)
    for layer in network.layers.values():
        layer.register_forward_hook(lambda layer, inputs, output: dtypes.add((inputs[0].dtype, output.dtype)))
    assert all(torch.equal(output, base[component]) for component, output in run_models(models, dtype).items())
    assert dtypes == {(dtype, dtype)}
    assert {p.dtype for model in models.values() for p in model.parameters() if not p.requires_grad} == {dtype}


def test_parameters_are_named_by_component_whatever_transformers_calls_the_path() -> None:
    network = add_network(small_models(), few(), seed=0)
    assert f"unet.{ATTENTION}.lora_A.default.weight" in network.parameters
    assert "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_B.default.weight" in network.parameters


@pytest.mark.parametrize(
    ("changes", "components"),
    [({"text_encoder": False}, {UNET}), ({"unet": False}, {TEXT_ENCODER}), ({}, {UNET, TEXT_ENCODER})],
)
def test_only_the_wanted_models_are_adapted_and_all_are_frozen(changes: dict[str, Any], components: set[str]) -> None:
    models = small_models()
    for model in models.values():
        model.requires_grad_(True)
    network = add_network(models, NetworkSpec(**changes), seed=0)
    assert {target.component for target in network.layers} == components
    trained = {id(p) for model in models.values() for p in model.parameters() if p.requires_grad}
    assert trained == {id(parameter) for parameter in network.parameters.values()}


@pytest.mark.bits
def test_first_values_follow_from_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = add_network(small_models(), few(), seed=5).parameters
    assert torch.equal(torch.get_rng_state(), before)
    two = add_network(small_models(torch.bfloat16), few(rank=3, conv_rank=0, text_encoder=False), seed=5).parameters
    other = add_network(small_models(), few(), seed=6).parameters
    for name, parameter in two.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, one[name])
        assert torch.equal(parameter, other[name]) == (".lora_B." in name)
        if ".lora_A." in name:
            assert 0 < parameter.abs().max() <= parameter[0].numel() ** -0.5


# ------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("family", "path", "block"),
    [
        (SD15, "down_blocks.0.resnets.0.conv1", 1),
        (SD15, "down_blocks.0.downsamplers.0.conv", 3),
        (SD15, ATTENTION, 4),
        (SD15, "mid_block.resnets.1.conv2", 12),
        (SD15, "up_blocks.0.resnets.0.conv1", 13),
        (SD15, "up_blocks.0.upsamplers.0.conv", 15),
        (SD15, "up_blocks.3.attentions.2.proj_in", 24),
        (SDXL, "down_blocks.0.resnets.0.conv1", 2),
        (SDXL, "down_blocks.1.attentions.0.proj_in", 5),
        (SDXL, "mid_block.resnets.0.conv1", 10),
        (SDXL, "mid_block.attentions.0.proj_in", 11),
        (SDXL, "mid_block.resnets.1.conv1", 12),
        (SDXL, "up_blocks.0.attentions.0.proj_in", 13),
        (SDXL, "up_blocks.2.resnets.2.conv2", 21),
    ],
)
def test_blocks_are_counted_as_kohya_does(family: Any, path: str, block: int) -> None:
    assert block_of(family, path) == block


def test_sections_make_a_whole_list_as_in_kohya() -> None:
    weights = block_weights(SD15, [0.5], [0.0], [0.1] * 14)
    assert weights == (0.5, *(1.0,) * 11, 0.0, *(0.1,) * 12)
    assert block_weights(SDXL, None, [0.2, 0.3, 0.4]) == (*(1.0,) * 10, 0.2, 0.3, 0.4, *(1.0,) * 10)
    assert len(weights) == SD15.block_count and SDXL.block_count == 23


def test_each_block_has_its_rank_and_alpha() -> None:
    dims, alphas = [2] * 25, [1.0] * 25
    dims[4], dims[12], alphas[4] = 5, 0, 2.5
    conv_dims = [1] * 25
    conv_dims[12] = 0
    spec = NetworkSpec(
        rank=3, block_dims=tuple(dims), block_alphas=tuple(alphas), conv_block_dims=tuple(conv_dims), conv_alpha=0.5
    )
    network = add_network(small_models(), spec, seed=0)
    ranks = {target: module.rank for target, module in network.adapter().modules.items()}
    assert not any(target.path.startswith("mid_block") for target in ranks)
    for target, rank in ranks.items():
        if target.component == TEXT_ENCODER:
            assert rank == 3
        else:
            is_conv = weight(network, target.path).shape[2:] == (3, 3)
            assert rank == (1 if is_conv else 5 if block_of(SD15, target.path) == 4 else 2)
    layer = network.layers[Target(UNET, ATTENTION)]
    assert layer.scale == 0.5
    assert network.layers[Target(UNET, "down_blocks.0.resnets.0.conv1")].scale == 0.5


def test_alphas_of_blocks_are_folded_in_a_file() -> None:
    alphas = tuple(float(1 + block % 3) for block in range(25))
    models, network = trained_network(NetworkSpec(rank=2, alpha=2.0, block_alphas=alphas, text_encoder=False))
    found = {float(value) for key, value in network.tensors().items() if key.endswith(".alpha")}
    assert len(found) == 1


def test_blocks_learn_at_their_own_rates_and_those_at_the_threshold_not_at_all() -> None:
    weights = block_weights(SD15, [1.0] * 4 + [0.25] * 8, [0.1], [0.0] * 3 + [2.0] * 9)
    spec = NetworkSpec(block_lr_weights=weights, block_lr_zero_threshold=0.1)
    network = add_network(small_models(), spec, seed=0)
    factors = {group.name: group.factor for group in network.groups()}
    assert factors == {
        **{f"unet block {block}": 1.0 for block in (1, 2)},
        **{f"unet block {block}": 0.25 for block in (4, 5, 7, 8)},
        **{f"unet block {block}": 2.0 for block in range(16, 25)},
        "text_encoder": 1.0,
    }


# ------------------------------------------------------------------------------------------------ groups


def test_loraplus_lets_up_matrices_learn_faster() -> None:
    network = add_network(small_models(), few(), seed=0)
    groups = {group.name: group for group in network.groups({UNET: 16.0})}
    assert {name: (group.component, group.factor) for name, group in groups.items()} == {
        "unet": (UNET, 1.0),
        "unet plus": (UNET, 16.0),
        "text_encoder": (TEXT_ENCODER, 1.0),
    }
    assert all(".lora_B." in name for name in groups["unet plus"].parameters)
    assert all(".lora_A." in name for name in groups["unet"].parameters)
    assert sorted(name for group in groups.values() for name in group.parameters) == sorted(network.parameters)


# ------------------------------------------------------------------------------------------------ switching


@pytest.mark.bits
def test_pefts_and_diffusers_ways_of_switching_work() -> None:
    base = run_models(small_models())[UNET]
    models, network = trained_network(few())
    layers: list[Any] = list(network.layers.values())
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(run_models(models)[UNET], base)
    for layer in layers:
        layer.enable_adapters(True)
    assert not torch.equal(run_models(models)[UNET], base)
    assert all(parameter.requires_grad for parameter in network.parameters.values())
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    assert torch.equal(run_models(models)[UNET], base)


def test_models_with_adapters_are_refused() -> None:
    models, _ = trained_network(few())
    with pytest.raises(AdapterError, match="The unet has adapters already."):
        add_network(models, few(), seed=0)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.bits
def test_text_encoders_learn_alike_with_and_without_checkpointing() -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        models: dict[str, Any] = {TEXT_ENCODER: small_text_encoder()}
        network = add_network(models, NetworkSpec(unet=False), seed=0)
        train(network)
        model = models[TEXT_ENCODER].train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(torch.tensor([[1, 5, 19]])).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad for name, p in network.parameters.items() if p.grad is not None})
        assert gradients[-1].keys() == network.parameters.keys()
    assert all(torch.equal(gradient, gradients[0][name]) for name, gradient in gradients[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_gets_a_float32_gradient(dtype: torch.dtype) -> None:
    models = small_models(dtype)
    network = add_network(models, few(), seed=0)
    train(network)
    models[UNET].train()(**unet_inputs(dtype)).sample.float().square().mean().backward()
    for name, parameter in network.parameters.items():
        if name.startswith(UNET):
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


# ------------------------------------------------------------------------------------------------ dropouts


def dropped(**spec: float) -> Any:
    """A layer of 200 samples of 4 tokens whose adapter gives each rank's value as it is, scale 1."""
    network = add_network(small_models(), few(rank=8, alpha=8.0, **spec), seed=0)  # type: ignore[arg-type]
    layer: Any = network.layers[Target(UNET, ATTENTION)]
    assert layer.base_layer.weight.shape[0] == 16
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.copy_(torch.eye(16, 8))
        layer.base_layer.weight.zero_()
    return layer


@pytest.mark.bits
def test_ranks_are_dropped_by_sample_and_the_rest_makes_up_for_it() -> None:
    layer, x = dropped(rank_dropout=0.25), torch.full((200, 4, 16), 0.5)
    torch.manual_seed(0)
    values = layer.train()(x)[..., :8]
    assert values.unique().tolist() == pytest.approx([0.0, 8 / 0.75])
    assert torch.equal(values, values[:, :1].expand_as(values))  # the same for all tokens of a sample
    share = (values[:, 0] == 0).float().mean()
    assert 0.2 < share < 0.3
    assert torch.equal(layer.eval()(x)[..., :8], torch.full((200, 4, 8), 8.0))


@pytest.mark.bits
def test_dropout_drops_single_values_of_the_down_matrix() -> None:
    layer, x = dropped(dropout=0.25), torch.full((200, 4, 16), 0.5)
    torch.manual_seed(0)
    values = layer.train()(x)[..., :8]
    assert values.unique().tolist() == pytest.approx([0.0, 8 / 0.75])
    assert 0.22 < (values == 0).float().mean() < 0.28
    assert not torch.equal(values, values[:, :1].expand_as(values))
    assert torch.equal(layer.eval()(x)[..., :8], torch.full((200, 4, 8), 8.0))


def test_a_module_is_left_out_of_whole_passes() -> None:
    layer, x = dropped(module_dropout=0.25), torch.full((1, 1, 16), 0.5)
    torch.manual_seed(0)
    outputs = torch.stack([layer.train()(x)[0, 0, 0] for _ in range(400)])
    assert set(outputs.tolist()) == {0.0, 8.0}
    assert 0.18 < (outputs == 0).float().mean() < 0.32
    assert layer.eval()(x)[0, 0, 0] == 8.0


@pytest.mark.bits
def test_ranks_of_convolutions_are_dropped_by_channel() -> None:
    network = add_network(small_models(), few(conv_rank=4, rank_dropout=0.5), seed=0)
    layer: Any = network.layers[Target(UNET, "mid_block.resnets.0.conv1")]
    torch.nn.init.dirac_(layer.lora_B[ADAPTER].weight)  # ranks are outputs
    layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
    torch.manual_seed(0)
    values = layer.train()(torch.ones(50, 16, 6, 6))[:, :4]
    zeros = (values == 0).flatten(2)
    assert torch.equal(zeros.all(-1), zeros.any(-1))
    assert 0.35 < zeros.all(-1).float().mean() < 0.65


# ------------------------------------------------------------------------------------------------ specification


def test_a_specification_survives_json() -> None:
    spec = NetworkSpec(algo="lokr", block_dims=(2,) * 25, sizes={"unet.a": (2, 1.5)}, factor=4)
    assert NetworkSpec.from_json(spec.to_json()) == spec


def test_arguments_are_kohyas() -> None:
    assert NetworkSpec(conv_rank=2, conv_alpha=1.0).arguments() == {"conv_dim": "2", "conv_alpha": "1.0"}
    assert NetworkSpec(algo="dora", block_dims=(2,) * 25).arguments()["block_dims"] == ",".join("2" * 25)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NetworkSpec(rank=0), "Network rank must be positive, got 0."),
        (lambda: NetworkSpec(alpha=float("nan")), "Network alpha must be positive, got nan."),
        (lambda: NetworkSpec(conv_rank=-1), "Network conv_rank must be positive, got -1."),
        (lambda: NetworkSpec(scope="up"), "Network scope must be one of mid, down_mid, all, got 'up'."),  # type: ignore[arg-type]
        (lambda: NetworkSpec(targets="ff"), "Network targets must be one of attention, kohya, got 'ff'."),  # type: ignore[arg-type]
        (lambda: NetworkSpec(algo="boft"), "Network algo must be one of lora, dora, loha, lokr, oft, got 'boft'."),  # type: ignore[arg-type]
        (lambda: NetworkSpec(family="sd3"), "Network family must be one of sd15, sdxl, got 'sd3'."),
        (lambda: NetworkSpec(dropout=1.0), "Network dropout must be at least 0 and below 1, got 1.0."),
        (lambda: NetworkSpec(algo="loha", dropout=0.1), "Network dropout has no effect with algo=loha."),
        (lambda: NetworkSpec(unet=False, text_encoder=False), "is of neither the U-Net nor the text encoders."),
        (
            lambda: NetworkSpec(block_dims=(1, 2)),
            r"Network block_dims needs 25 numbers for SD1.5 \(12 down, 1 mid, 12 up\), got 2.",
        ),
        (
            lambda: NetworkSpec(family="sdxl", block_lr_weights=(1.0,) * 21),
            r"block_lr_weights needs 23 numbers for SDXL \(9 down, 3 mid, 9 up, one before and one after\), got 21.",
        ),
        (lambda: NetworkSpec.from_json('{"rnk": 4}'), "Network specification has unknown entries: rnk."),
        (lambda: NetworkSpec.from_json("{"), "Network specification is not valid JSON: "),
        (
            lambda: add_network(small_models(), NetworkSpec(block_dims=(0,) * 25, text_encoder=False), seed=0),
            "The network finds no module in the unet: is every rank 0, or every block weight?",
        ),
        (
            lambda: add_network(small_models(), NetworkSpec(sizes={"unet.down_blocks.1.x": (1, 1.0)}), seed=0),
            r"1 of 1 modules of the adapter have no place in this model \(first: unet.down_blocks.1.x\). It is for another",
        ),
        (
            lambda: add_network(small_models(), NetworkSpec(sizes={"unet.conv_in": (1, 1.0)}), seed=0),
            r"1 of 1 modules of the adapter are on layers that are not trained here \(first: unet.conv_in\). Fold the file",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(AdapterError, match=sentence):
        make()
