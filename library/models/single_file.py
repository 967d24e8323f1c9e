"""Stable Diffusion 1.x and XL in one .safetensors file, in the names of the original code.

Such a file carries no configuration: widths are read off tensor shapes, what leaves no trace in a shape is as published.
Format: SD1.5 has 686 + 248 + 196 tensors of U-Net, VAE and text encoder; SDXL 1680 + 248 + 196, and 389 of the second text
encoder, which stacks queries, keys and values. EMA copies (`model_ema.`), schedule buffers and position_ids are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from library.errors import UserError
from library.models.configs import configs_of
from library.models.header import NESTING, Shapes, read_metadata, read_shapes
from library.models.quantised import unscaled
from library.models.weights import read_tensors
from networks.families import TEXT_ENCODER_2, UNET, VAE, Family
from networks.original_names import Form, Place, diffusers_keys, is_dropped, original_place
from networks.prediction_names import FLOW_NAME, flow_scheduler, shift_in_file, type_in_file


def file_unet_config(path: Path, family: Family) -> dict[str, Any]:
    """UNet2DConditionModel's configuration. Raises UserError when the file is not laid out like the family's."""
    sizes = Sizes(path, family, UNET)
    config = configs_of(family).unet
    levels = range(len(config["block_out_channels"]))
    attention = min(level for level in levels if "CrossAttn" in config["down_block_types"][level])
    words = f"down_blocks.{attention}.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    found: dict[str, Any] = {
        "in_channels": sizes["conv_in.weight", 1],
        "out_channels": sizes["conv_out.weight", 0],
        "block_out_channels": [sizes[f"down_blocks.{level}.resnets.0.conv2.weight", 0] for level in levels],
        "cross_attention_dim": sizes[words, 1],
    }
    if sizes.count("time_embedding.cond_proj."):  # of a model distilled with its guidance (LCM)
        found["time_cond_proj_dim"] = sizes["time_embedding.cond_proj.weight", 1]
    if family.has_size_conditions:
        # Heads leave no trace in the shapes: they are 64 wide, and a tiny model has one.
        found["attention_head_dim"] = [max(1, width // 64) for width in found["block_out_channels"]]
        found["transformer_layers_per_block"] = [
            max(1, sizes.count(f"down_blocks.{level}.attentions.0.transformer_blocks.")) for level in levels
        ]
        conditions = sizes["add_embedding.linear_1.weight", 1]
        pooled = Sizes(path, family, TEXT_ENCODER_2)["text_projection.weight", 1]
        found["projection_class_embeddings_input_dim"] = conditions
        found["addition_time_embed_dim"] = (conditions - pooled) // 6  # six numbers say sizes and crop
    return {**config, **found}


def file_vae_config(path: Path, family: Family) -> dict[str, Any]:
    """AutoencoderKL's configuration."""
    return vae_config(Sizes(path, family, VAE), family)


def vae_config(sizes: Sizes, family: Family) -> dict[str, Any]:
    """The same, from the sizes of its tensors."""
    widths = [sizes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight", 0] for level in range(4)]
    return {
        **configs_of(family).vae,
        "block_out_channels": widths,
        "latent_channels": sizes["post_quant_conv.weight", 0],
        # Leaves no trace in the shapes. SD has 32 groups over 128 channels, and the tiny model keeps the proportion.
        "norm_num_groups": widths[0] // 4,
    }


def file_text_config(path: Path, family: Family, component: str) -> dict[str, Any]:
    """CLIPTextConfig's fields. CLIP's heads are 64 wide at every size (Radford et al. 2021, table 20; OpenCLIP's too)."""
    sizes = Sizes(path, family, component)
    published = configs_of(family).text_encoders[component]
    vocabulary = sizes["text_model.embeddings.token_embedding.weight", 0]
    hidden = sizes["text_model.embeddings.token_embedding.weight", 1]
    return {
        **published,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "projection_dim": sizes["text_projection.weight", 1] if component == TEXT_ENCODER_2 else hidden,
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": sizes["text_model.encoder.layers.0.mlp.fc1.weight", 0],
        "num_hidden_layers": sizes.count("text_model.encoder.layers."),
        "max_position_embeddings": sizes["text_model.embeddings.position_embedding.weight", 0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if published["pad_token_id"] == 0 else vocabulary - 1,
    }


def file_scheduler_config(path: Path, family: Family) -> dict[str, Any]:
    """The family's schedule, and what the file's marks and metadata say."""
    shapes = read_shapes(path)
    metadata = read_metadata(path)
    config = {**configs_of(family).scheduler, "prediction_type": type_in_file(shapes, metadata)}
    if config["prediction_type"] == FLOW_NAME.scheduler:
        return flow_scheduler(shift_in_file(metadata))
    if "ztsnr" in shapes:
        config["rescale_betas_zero_snr"] = True
    return config


def file_tensors(path: Path, family: Family, component: str) -> dict[str, Tensor]:
    """A component's tensors, named and shaped as in the diffusers model.

    Raises UserError for tensors that have no place there: a leftover of training (LoRA, heads) means an unfinished merge.
    """
    tensors: dict[str, Tensor] = {}
    prefix = family.original[component]
    found = read_tensors(path, (prefix, NESTING + prefix))
    stored = unscaled({name.removeprefix(NESTING): value for name, value in found.items()})
    strangers = []
    for name, value in stored.items():
        keys = [key for _, key in diffusers_keys(family, name)]
        for key in keys:
            tensors[key] = as_in_diffusers(value, original_place(family, component, key))
        if not keys and not is_dropped(family, name):
            strangers.append(name)
    if strangers:
        raise UserError(
            f"{len(strangers)} of {len(stored)} tensors in {path} have no place in {family.title} (first: "
            f"{min(strangers)}). Merge or remove what training left there."
        )
    return tensors


def as_in_diffusers(value: Tensor, place: Place) -> Tensor:
    if place.form is Form.CONVOLUTION:
        return value.flatten(1)  # some files hold it as a matrix already
    if place.form is Form.TRANSPOSED:
        return value.t()
    if place.form is Form.STACKED:
        return value.chunk(3)[place.part]
    return value


class Sizes:
    """Sizes of one component's tensors, asked for by (key in the diffusers model, axis in the file).

    Raises UserError when the file does not hold the component at all, or not the tensor asked for.
    """

    def __init__(self, path: Path, family: Family, component: str, known: Shapes | None = None) -> None:
        """known: the component's shapes by their keys in the diffusers model, where they need not be read."""
        self._path, self._family, self._component = path, family, component
        self._shapes: Shapes = known or {}
        if self._shapes:
            return
        prefix = family.original[component]
        every = read_shapes(path)
        for name, shape in every.items():
            if name.startswith(prefix):
                self._shapes |= {key: shape for _, key in diffusers_keys(family, name)}
        if not self._shapes:
            first = min(every, default="none at all")
            raise UserError(
                f"{path} has no {component}: none of its {len(every)} tensors (first: {first}) begins with {prefix}. A "
                f"complete {family.title} checkpoint or a diffusers folder is needed."
            )

    def __getitem__(self, key_and_axis: tuple[str, int]) -> int:
        key, axis = key_and_axis
        shape = self._shapes.get(key, ())
        if axis >= len(shape):
            name = original_place(self._family, self._component, key).key
            raise UserError(f"{self._path} is not laid out like {self._family.title}: the tensor {name} is missing.")
        return shape[axis]

    def count(self, beginning: str) -> int:
        """How many different numbers follow `beginning` in the keys."""
        return len({key.removeprefix(beginning).split(".")[0] for key in self._shapes if key.startswith(beginning)})
