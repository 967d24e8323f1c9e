"""--network_weights: a training starts from a file's weights, or says why they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from networks import AdapterError
from networks.adapters import Adapter
from networks.families import UNET
from networks.kinds.lora import LoraModule
from networks.names import Target
from networks.network import add_network
from networks.spec import NetworkSpec
from tests.tools.networks import assert_same_outputs, few, small_models, small_text_encoders, trained_network

PROJ_IN = Target(UNET, "mid_block.attentions.0.proj_in")


@pytest.mark.parametrize(
    ("made", "wanted", "sentence"),
    [
        (
            {"rank": 8},
            {},
            r"54 of 54 modules of the adapter are of rank 8 where 3 is to be trained \(first: unet.down_blocks.1.attentions"
            r".0.proj_in, .*\). --dim_from_weights takes over its ranks and alphas.",
        ),
        ({"algo": "loha"}, {}, "54 of 54 modules are LoHa, not LoRA .* Give its algo in --network_args."),
        (
            {"conv_rank": 2},
            {},
            "8 of 62 modules of the adapter are not trained here .* It has convolutions: add conv_dim",
        ),
        ({}, {"conv_rank": 2}, "8 of 62 modules to train are not in the adapter .* --dim_from_weights trains just"),
        (
            {"text_encoder": False},
            {},
            r"12 of 54 modules to train are not in the adapter \(first: text_encoder.text_model.encoder.layers.0.self_attn"
            r".* It has nothing for the text_encoder: add --network_train_unet_only",
        ),
        (
            {},
            {"text_encoder": False},
            "12 of 54 modules of the adapter are not trained here .* They are of text encoders",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(made: dict[str, Any], wanted: dict[str, Any], sentence: str) -> None:
    source = add_network(small_models(), few(**{"conv_rank": 0, **made}), seed=0).adapter()
    network = add_network(small_models(), few(**{"conv_rank": 0, **wanted}), seed=0)
    before = {name: parameter.clone() for name, parameter in network.parameters.items()}
    with pytest.raises(AdapterError, match=sentence):
        network.load(source)
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.parameters.items())


def test_weights_of_another_family_or_width_are_refused() -> None:
    network = add_network(small_models(), few(), seed=0)
    sdxl = add_network(small_text_encoders(), NetworkSpec(family="sdxl", unet=False), seed=0).adapter()
    with pytest.raises(AdapterError, match="It is for SDXL, and the base model is SD1.5."):
        network.load(sdxl)
    wide = network.adapter()
    modules = {**wide.modules, PROJ_IN: LoraModule(torch.ones(4, 9), torch.ones(16, 4), 1.0)}
    with pytest.raises(AdapterError, match=r"1 of 62 modules are of other shapes than the model's"):
        network.load(Adapter(modules, wide.metadata))


@pytest.mark.bits
def test_another_alpha_is_made_up_for() -> None:
    models, source = trained_network(few(alpha=8.0))
    again = small_models()
    add_network(again, few(alpha=1.0), seed=0).load(source.adapter())
    assert_same_outputs(again, models)
