"""LoRA, DoRA, LoHa, LoKr and OFT: each starts as the base, and a file of it does what the training model did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from networks import AdapterError
from networks.adapter_alphas import NETWORK_SPEC_KEY
from networks.adapter_export import adapter_metadata, adapter_tensors, form_metadata
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from networks.families import TEXT_ENCODER_2, UNET
from networks.kinds import KINDS
from networks.kinds.oft import OftModule
from networks.kinds.products import LohaModule, LokrModule
from networks.names import Target
from networks.network import Network, add_network
from networks.spec import NetworkSpec
from tests.tools.networks import (
    assert_same_outputs,
    few,
    fold,
    run_models,
    small_models,
    small_text_encoders,
    train,
    trained_network,
)

SPECS: dict[str, NetworkSpec] = {
    **{algo: few(algo) for algo in KINDS},
    "lokr": few("lokr", rank=1),
    "lokr of factor 2, both decomposed": few("lokr", rank=1, alpha=0.5, decompose_both=True, factor=2),
    "lokr not decomposed": few("lokr", rank=100, alpha=50.0, conv_rank=100),
    "oft": few("oft", rank=4),
    "oft with a bound": few("oft", rank=4, constraint=0.05),
}
each_kind = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
PROJ_IN = Target(UNET, "mid_block.attentions.0.proj_in")
DATE = "2026-01-02T03:04:05"


def written(network: Network, folder: Path, dtype: torch.dtype | None = None) -> Adapter:
    tensors = network.tensors(dtype)
    metadata = adapter_metadata(network.spec, tensors, output_name="a", date=DATE, resolution=(64, 64))
    save_file(tensors, folder / "a.safetensors", metadata=metadata)
    return read_adapter(folder / "a.safetensors")


# ------------------------------------------------------------------------------------------------ start, file, fold


@pytest.mark.bits
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_network_leaves_the_outputs_to_the_bit(spec: NetworkSpec, dtype: torch.dtype) -> None:
    models = small_models(dtype)
    base = run_models(models, dtype)
    network = add_network(models, spec, seed=0)
    assert {parameter.dtype for parameter in network.parameters.values()} == {torch.float32}
    assert all(torch.equal(output, base[component]) for component, output in run_models(models, dtype).items())


@pytest.mark.bits
@each_kind
def test_a_written_file_folded_into_the_base_is_the_trained_model(spec: NetworkSpec, tmp_path: Path) -> None:
    models, network = trained_network(spec)
    adapter = written(network, tmp_path)
    assert {type(module) for module in adapter.modules.values()} == {
        type(m) for m in network.adapter().modules.values()
    }
    folded = small_models()
    fold(folded, adapter)
    assert_same_outputs(folded, models)


@pytest.mark.bits
@each_kind
def test_training_goes_on_from_a_file(spec: NetworkSpec, tmp_path: Path) -> None:
    models, network = trained_network(spec)
    adapter = written(network, tmp_path)
    again = small_models()
    add_network(again, spec, seed=1).load(adapter)
    assert_same_outputs(again, models)
    # As --dim_from_weights takes them.
    sizes = {".".join(target): (module.rank, module.alpha) for target, module in adapter.modules.items()}
    from_sizes = small_models()
    add_network(from_sizes, replace(spec, sizes=sizes), seed=1).load(adapter)
    assert_same_outputs(from_sizes, models)


@pytest.mark.parametrize("algo", KINDS)
def test_text_encoders_of_sdxl_are_folded_alike(algo: str, tmp_path: Path) -> None:
    models = small_text_encoders()
    network = add_network(models, NetworkSpec(family="sdxl", algo=algo, rank=2, unet=False), seed=0)
    train(network)
    folded = small_text_encoders()
    adapter = written(network, tmp_path)
    assert {name.partition("_text")[0] for name in adapter.names().values()} == {"lora_te1", "lora_te2"}
    fold(folded, adapter)
    for component, output in run_models(models).items():
        torch.testing.assert_close(run_models(folded)[component], output, atol=1e-5, rtol=1e-5)
    assert any(target.component == TEXT_ENCODER_2 for target in adapter.modules)


@each_kind
def test_every_weight_learns_once_it_is_off_its_start(spec: NetworkSpec) -> None:
    models, network = trained_network(spec)
    for model in models.values():
        model.train()
    tokens = torch.tensor([[1, 5, 19]])
    text = models["text_encoder"](tokens).last_hidden_state
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    models[UNET](latents, torch.tensor([7]), text).sample.square().mean().backward()
    for name, parameter in network.parameters.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert sum(bool(p.grad.any()) for p in network.parameters.values() if p.grad is not None) > 0.95 * len(
        network.parameters
    )


@pytest.mark.bits
@each_kind
def test_switching_off_and_the_multiplier_work(spec: NetworkSpec) -> None:
    base = run_models(small_models())
    models, network = trained_network(spec)
    frozen = next(iter(network.parameters.values())).requires_grad_(False)
    adapted = run_models(models)
    with pytest.raises(RuntimeError, match="interrupted"), network.disabled():
        assert all(torch.equal(output, base[component]) for component, output in run_models(models).items())
        raise RuntimeError("interrupted")
    assert all(torch.equal(output, adapted[component]) for component, output in run_models(models).items())
    assert all(p.requires_grad == (p is not frozen) for p in network.parameters.values())
    network.set_multiplier(0.0)
    torch.testing.assert_close(run_models(models), base)
    network.set_multiplier(1.0)
    assert all(torch.equal(output, adapted[component]) for component, output in run_models(models).items())


@pytest.mark.parametrize("algo", KINDS)
def test_half_the_multiplier_is_half_the_change_of_the_weights(algo: str) -> None:
    _, network = trained_network(few(algo))
    layer: Any = network.layers[PROJ_IN]
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, base = layer(x), layer.base_layer(x)
        network.set_multiplier(0.5)
        torch.testing.assert_close(layer(x), (whole + base) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.bits
@pytest.mark.parametrize("algo", KINDS)
def test_what_is_dropped_is_dropped_in_training_only_and_compiles(algo: str) -> None:
    rank_dropout = 0.3 if "rank_dropout" in KINDS[algo].options else 0.0
    models, network = trained_network(few(algo, module_dropout=0.4, rank_dropout=rank_dropout))
    plain, _ = trained_network(few(algo))
    assert torch.equal(run_models(models)[UNET], run_models(plain)[UNET])
    layer: Any = network.layers[PROJ_IN]
    compiled = torch.compile(layer.train(), backend="eager", fullgraph=True)
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        outputs, base = [compiled(x) for _ in range(40)], layer.base_layer(x)
    left_out = sum(torch.equal(output, base) for output in outputs)
    assert 8 <= left_out <= 25
    kept = [output for output in outputs if not torch.equal(output, base)]
    assert all(torch.equal(output, kept[0]) for output in kept) == (rank_dropout == 0)


# ------------------------------------------------------------------------------------------------ as others compute it


def as_comfyui_and_a1111_compute_it(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """W' from one module's tensors in a file, float64, as far as the two agree (tensors here are not CP-decomposed)."""
    t = {suffix: value.double() for suffix, value in tensors.items()}
    w, alpha = weight.double(), float(t["alpha"])
    if "oft_blocks" in t:
        assert alpha > 2 * t["oft_blocks"].norm()  # neither bounds anything, whatever each takes alpha for
        count, size, _ = t["oft_blocks"].shape
        q = t["oft_blocks"] - t["oft_blocks"].transpose(1, 2)
        r = (torch.eye(size) + q) @ (torch.eye(size) - q).inverse()
        return torch.einsum("knm,kn...->km...", r, w.reshape(count, size, *w.shape[1:])).reshape(w.shape)
    if "hada_w1_a" in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return w + alpha / t["hada_w1_b"].shape[0] * product.reshape(w.shape)
    if any(suffix.startswith("lokr") for suffix in t):
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        rank = next((t[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in t), None)
        product = torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2)
        return w + (1.0 if rank is None else alpha / rank) * product.reshape(w.shape)
    down, up = t["lora_down.weight"], t["lora_up.weight"]
    changed = w + alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(w.shape)
    if "dora_scale" not in t:
        return changed
    assert t["dora_scale"].shape[:2] == (1, w.shape[1])  # on the axis that both normalise alike
    norms = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in w.shape[2:]))
    return changed * t["dora_scale"] / norms


@each_kind
def test_a_live_layer_is_what_comfyui_and_a1111_make_of_the_file(spec: NetworkSpec) -> None:
    _, network = trained_network(spec)
    tensors, names = network.tensors(), network.adapter().names()
    generator = torch.Generator().manual_seed(0)
    for target, layer in network.layers.items():
        prefix = f"{names[target]}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        base = layer.base_layer
        weight = as_comfyui_and_a1111_compute_it(base.weight, own).float()
        with torch.no_grad():
            if isinstance(base, nn.Conv2d):
                x = torch.randn(1, base.in_channels, 5, 5, generator=generator)
                expected = F.conv2d(x, weight, base.bias, base.stride, base.padding)
            else:
                x = torch.randn(3, base.in_features, generator=generator)
                expected = F.linear(x, weight, base.bias)
            torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=1e-4)  # type: ignore[operator]


def test_keys_of_each_kind() -> None:
    suffixes = {}
    for name, spec in SPECS.items():
        tensors = add_network(small_models(), spec, seed=0).tensors()
        suffixes[name] = {key.partition(".")[2] for key in tensors}
        alphas = [value.shape for key, value in tensors.items() if key.endswith(".alpha")]
        assert alphas == [()] * len({key.partition(".")[0] for key in tensors})
    assert suffixes == {
        "lora": {"lora_down.weight", "lora_up.weight", "alpha"},
        "dora": {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"},
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        "lokr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
        "lokr of factor 2, both decomposed": {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
        "lokr not decomposed": {"lokr_w1", "lokr_w2", "alpha"},
        "oft": {"oft_blocks", "alpha"},
        "oft with a bound": {"oft_blocks", "alpha"},
    }


@pytest.mark.bits
@pytest.mark.parametrize("algo", KINDS)
def test_a_file_can_be_of_half_precision(algo: str, tmp_path: Path) -> None:
    models, network = trained_network(few(algo), size=0.2)
    tensors = network.tensors(torch.bfloat16)
    norms = {value.dtype for key, value in tensors.items() if key.endswith("dora_scale")}
    assert norms == ({torch.float32} if algo == "dora" else set())
    assert {value.dtype for key, value in tensors.items() if not key.endswith("dora_scale")} == {torch.bfloat16}
    folded = small_models()
    fold(folded, written(network, tmp_path, torch.bfloat16))
    assert_same_outputs(folded, models, tolerance=0.05)


def test_metadata_says_what_the_file_is_and_who_reads_it() -> None:
    facts: dict[str, Any] = {"output_name": "a", "date": DATE, "resolution": (64, 64)}
    plain = adapter_metadata(NetworkSpec(rank=3, alpha=2.0, conv_rank=2, conv_alpha=1.0), {}, **facts)
    assert (plain["ss_network_dim"], plain["ss_network_alpha"]) == ("3", "2.0")
    assert plain["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "1.0"}'
    assert plain["ss_network_module"] == "networks.lora" and "modelspec.usage_hint" not in plain
    loha = adapter_metadata(SPECS["loha"], {}, **facts)
    assert loha["ss_network_module"] == "lycoris.kohya" and '"algo": "loha"' in loha["ss_network_args"]
    assert "not for diffusers" in loha["modelspec.usage_hint"]
    dora = adapter_metadata(SPECS["dora"], {}, **facts)
    assert dora["ss_network_module"] == "networks.lora"
    assert dora["modelspec.usage_hint"].startswith("DoRA with magnitudes of the inputs")


def test_a_file_converted_keeps_its_kind_and_other_forms_are_refused() -> None:
    _, network = trained_network(SPECS["loha"])
    adapter = network.adapter()
    metadata = form_metadata(adapter, "kohya", adapter_tensors(adapter, "kohya"), output_name="b", date=DATE)
    assert metadata["ss_network_module"] == "lycoris.kohya"
    with pytest.raises(
        AdapterError, match=r"\d+ of \d+ modules are LoHa, and the diffusers form is for LoRA. Merge the adapter into"
    ):
        adapter_tensors(adapter, "diffusers")


@pytest.mark.bits
@pytest.mark.parametrize("algo", ["lora", "dora"])
def test_a_state_of_lora_or_dora_can_be_read_as_an_adapter(algo: str, tmp_path: Path) -> None:
    spec = few(algo, alpha=3.0, conv_alpha=0.5)
    models, network = trained_network(spec)
    weights = {name: parameter.detach() for name, parameter in network.parameters.items()}
    save_file(weights, tmp_path / "network.safetensors", metadata={NETWORK_SPEC_KEY: spec.to_json()})
    folded = small_models()
    fold(folded, read_adapter(tmp_path / "network.safetensors"))
    assert_same_outputs(folded, models)


def test_names_and_scales_of_other_trainers_are_understood(tmp_path: Path) -> None:
    """kohya's networks.oft has a prefix of its own; without alpha LoHa and LoKr act at scale 1."""
    a, b = torch.ones(8, 2), torch.ones(2, 4)
    halves = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    tensors = {
        "oft_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.zeros(4, 2, 2),
        "oft_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(0.001),
        **{f"lora_unet_conv_in.{part}": value for part, value in halves.items()},
        "lora_unet_conv_out.lokr_w1": torch.ones(2, 2),
        "lora_unet_conv_out.lokr_w2": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_out.alpha": torch.tensor(7.0),
    }
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    modules = read_adapter(tmp_path / "a.safetensors").modules
    oft, loha, lokr = (modules[Target(UNET, path)] for path in (PROJ_IN.path, "conv_in", "conv_out"))
    assert (oft.kind.title, oft.rank, oft.alpha) == ("OFT", 4, pytest.approx(0.001))
    assert torch.equal(loha.delta(torch.zeros(8, 4)), torch.full((8, 4), 4.0))
    assert torch.equal(lokr.delta(torch.zeros(4, 8, 3, 3)), torch.ones(4, 8, 3, 3))


# ------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.kind.adds and spec.algo != "dora"])
def test_norms_are_clamped_as_the_plain_products_say(name: str) -> None:
    _, network = trained_network(SPECS[name])
    shapes = {target: layer.base_layer.weight.shape for target, layer in network.layers.items()}

    def deltas() -> dict[Target, Tensor]:
        return {t: m.delta(torch.zeros(shapes[t])).clone() for t, m in network.adapter().modules.items()}

    before = deltas()
    norms = {target: float(delta.norm()) for target, delta in before.items()}
    bound = float(torch.tensor(list(norms.values())).median())
    found = network.clamp_norms(bound)
    assert all(value.shape == () for value in found.values())
    for target, delta in deltas().items():
        torch.testing.assert_close(delta, before[target] * min(1.0, bound / norms[target]), atol=1e-5, rtol=1e-4)
    assert found["keys_scaled"] == sum(norm > bound for norm in norms.values())
    clamped = [min(norm, bound) for norm in norms.values()]
    assert float(found["mean_norm"]) == pytest.approx(sum(clamped) / len(clamped), rel=1e-5)
    assert float(found["max_norm"]) == pytest.approx(max(clamped), rel=1e-5)
    assert network.clamp_norms(bound)["keys_scaled"] == 0


def test_oft_has_no_norm_to_clamp() -> None:
    _, network = trained_network(SPECS["oft"])
    with pytest.raises(AdapterError, match="OFT adds nothing to a weight whose norm could be bound."):
        network.clamp_norms(1.0)


# ------------------------------------------------------------------------------------------------ modules


def test_cp_decomposed_modules_of_lycoris_are_folded() -> None:
    """Against sums over every index, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = torch.zeros(6, 4, 3, 3)
    w1, w2 = ((draw(2, 6), draw(2, 4), draw(2, 2, 3, 3)) for _ in range(2))
    loha = LohaModule(w1, w2, alpha=1.0)
    parts = [torch.einsum("ijhw,io,jc->ochw", t.double(), a.double(), b.double()) for a, b, t in (w1, w2)]
    assert loha.fits(weight.shape) and loha.kernel == 3
    torch.testing.assert_close(loha.delta(weight).double(), 0.5 * parts[0] * parts[1], atol=1e-5, rtol=1e-5)
    lokr = LokrModule((draw(2, 2),), (draw(2, 3), draw(2, 2), draw(2, 2, 3, 3)), alpha=1.0)
    a, b, t = (part.double() for part in lokr.w2)
    inner = torch.einsum("ijhw,ip,jr->prhw", t, a, b)
    expected = 0.5 * torch.einsum("ac,bdhw->abcdhw", lokr.w1[0].double(), inner).reshape(6, 4, 3, 3)
    assert lokr.fits(weight.shape)
    torch.testing.assert_close(lokr.delta(weight).double(), expected, atol=1e-5, rtol=1e-5)


def test_oft_of_other_trainers_is_bounded_and_rescaled() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks, weight = torch.randn(2, 3, 3, generator=generator), torch.randn(6, 4, generator=generator)
    rescale = torch.rand(6, 1, generator=generator)
    q = blocks.double() - blocks.double().transpose(1, 2)
    q = q * (0.1 * 6 / q.norm())
    r = torch.block_diag(*((torch.eye(3) + q) @ (torch.eye(3) - q).inverse()))
    expected = rescale.double() * (r.T @ weight.double()) - weight.double()
    delta = OftModule(blocks, alpha=0.1, rescale=rescale).delta(weight)
    torch.testing.assert_close(delta.double(), expected, atol=1e-5, rtol=1e-5)
