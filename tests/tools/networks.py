"""Small models with a network in them, trained as far as random weights go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from networks.adapters import Adapter
from networks.families import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from networks.network import Network, add_network
from networks.spec import NetworkSpec
from tests.tools.unets import small_unet, unet_inputs

TEXT_WIDTH = 12


def few(algo: str = "lora", rank: int = 3, alpha: float = 2.0, conv_rank: int = 2, **options: Any) -> NetworkSpec:
    """Adapters in the text encoder and three blocks of the U-Net: enough for every kind of layer, and quick."""
    dims, conv_dims = ([size if block in (4, 12, 16) else 0 for block in range(25)] for size in (rank, conv_rank))
    sizes = {"block_dims": tuple(dims), "conv_block_dims": tuple(conv_dims), "conv_alpha": 1.0}
    return NetworkSpec(**{"algo": algo, "rank": rank, "alpha": alpha, **sizes, **options})


def small_text_encoder(*, projected: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """CLIP of 2 layers, 12 wide as `small_unet` reads it, with weights of their own seed."""
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=6,
        eos_token_id=19,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return model.to(dtype).eval().requires_grad_(False)


def small_models(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    return {UNET: small_unet(dtype=dtype), TEXT_ENCODER: small_text_encoder(dtype=dtype)}


def small_text_encoders() -> dict[str, nn.Module]:
    """Those of SDXL."""
    return {TEXT_ENCODER: small_text_encoder(), TEXT_ENCODER_2: small_text_encoder(projected=True)}


def run_models(models: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Outputs of each model by component."""
    tokens = torch.tensor([[1, 5, 7, 19, 0], [1, 2, 19, 0, 0]])
    outputs = {}
    with torch.no_grad():
        for component, model in models.items():
            outputs[component] = (
                model(**unet_inputs(dtype)).sample if component == UNET else model(tokens).last_hidden_state
            )
    return outputs


def train(network: Network, size: float = 0.3, seed: int = 9) -> None:
    """Move every weight a random step from where it is, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def trained_network(spec: NetworkSpec, size: float = 0.3) -> tuple[dict[str, nn.Module], Network]:
    models = small_models()
    network = add_network(models, spec, seed=0)
    train(network, size)
    return models, network


def fold(models: Mapping[str, nn.Module], adapter: Adapter) -> None:
    """Add the adapter to the weights of models without one."""
    with torch.no_grad():
        for target, module in adapter.modules.items():
            layer: Any = models[target.component].get_submodule(target.path)
            assert module.fits(layer.weight.shape)
            layer.weight += module.delta(layer.weight)


def assert_same_outputs(found: dict[str, nn.Module], expected: dict[str, nn.Module], tolerance: float = 1e-5) -> None:
    outputs, base = run_models(expected), run_models(small_models())
    for component, output in run_models(found).items():
        assert (outputs[component] - base[component]).abs().max() > 0.05  # what is compared does something
        torch.testing.assert_close(output, outputs[component], atol=tolerance, rtol=tolerance)
