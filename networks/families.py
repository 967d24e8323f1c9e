"""The families of base models as tables of facts: names, sizes, conditioning, what files call them. A third one is a third table.

What one published model's configuration files say beyond that is in `library.models.configs`.
"""

from __future__ import annotations

from dataclasses import dataclass

UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "vae", "text_encoder", "text_encoder_2"
TOKENIZERS = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}
"""Folder of each text encoder's tokenizer."""


@dataclass(frozen=True)
class Family:
    """What code asks instead of which family it is."""

    key: str
    title: str
    hub_id: str
    """Where its first model is published."""

    # Names of tensors and modules.
    up_attention: tuple[bool, ...]
    """Per level of the U-Net's way up, deepest first: whether it has attention. An upsampler's place depends on it."""
    original: dict[str, str]
    """Component -> what its tensors begin with in an original single file."""
    kohya: dict[str, str]
    """Component -> what its modules begin with in a kohya file."""
    sgm_adapters: bool
    """Whether kohya's adapters name U-Net modules as the original code does, not as diffusers."""
    sections: tuple[int, int, int]
    """How many down, mid and up blocks a list of learning-rate weights has."""
    outer_blocks: int
    """Blocks before these, and as many after them, which never have adapters."""

    widths: tuple[int, ...]
    """Channels of the U-Net's levels, on the way down."""
    transformers_in_a_row: int
    """Transformer blocks of its deepest attention."""
    text_width: int
    """Numbers to a token of the prompt, which its cross attention takes."""

    # What files call it.
    base_version: str
    """ss_base_model_version of kohya's adapters."""
    version_tells_prediction: bool
    """Whether that ends in what the base predicts, where this is no noise."""
    architecture: str
    """modelspec.architecture; of an adapter with "/lora"."""
    implementation: str
    """modelspec.implementation of a single file."""
    npz_suffix: str
    """What the names of kohya's cached latents end in."""

    # Sizes.
    native_side: int
    """Side in pixels of what it was trained on."""
    latent_channels: int
    vae_factor: int
    """Pixels to a latent, along one side."""
    scaling_factor: float
    """What the U-Net's latents are of the VAE's."""
    vae_overflows: bool
    """Whether the VAE's activations overflow float16 (madebyollin/sdxl-vae-fp16-fix tells why)."""

    # Conditioning.
    text_layer: int | None
    """The layer of the text encoders, counted from the end, that it takes without their final norm; None: the last one, with
    the norm, or the one that clip_skip asks for."""
    has_size_conditions: bool
    """Whether the U-Net is given the picture's sizes and the pooled prompt of the last text encoder."""
    zeros_for_no_prompt: bool
    """Whether an empty negative prompt is zeros instead of what the encoders say of it."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in (TEXT_ENCODER, TEXT_ENCODER_2) if name in self.original)

    @property
    def resolution(self) -> str:
        """modelspec.resolution where nothing else is known."""
        return f"{self.native_side}x{self.native_side}"

    @property
    def block_count(self) -> int:
        """Length of a list with a value for each block."""
        return sum(self.sections) + 2 * self.outer_blocks

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the latents of a picture in pixels."""
        return height // self.vae_factor, width // self.vae_factor


SD15 = Family(
    key="sd15",
    title="SD1.5",
    hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
    up_attention=(False, True, True, True),
    original={
        UNET: "model.diffusion_model.",
        VAE: "first_stage_model.",
        TEXT_ENCODER: "cond_stage_model.transformer.",
    },
    kohya={UNET: "lora_unet", TEXT_ENCODER: "lora_te"},
    sgm_adapters=False,
    sections=(12, 1, 12),
    outer_blocks=0,
    widths=(320, 640, 1280, 1280),
    transformers_in_a_row=1,
    text_width=768,
    base_version="sd_v1",
    version_tells_prediction=True,
    architecture="stable-diffusion-v1",
    implementation="https://github.com/CompVis/stable-diffusion",
    npz_suffix="sd",
    native_side=512,
    latent_channels=4,
    vae_factor=8,
    scaling_factor=0.18215,  # keeps latents near unit variance (LDM paper, appendix D.1)
    vae_overflows=False,
    text_layer=None,
    has_size_conditions=False,
    zeros_for_no_prompt=False,
)
SDXL = Family(
    key="sdxl",
    title="SDXL",
    hub_id="stabilityai/stable-diffusion-xl-base-1.0",
    up_attention=(True, True, False),
    original={
        UNET: "model.diffusion_model.",
        VAE: "first_stage_model.",
        TEXT_ENCODER: "conditioner.embedders.0.transformer.",
        TEXT_ENCODER_2: "conditioner.embedders.1.model.",
    },
    kohya={UNET: "lora_unet", TEXT_ENCODER: "lora_te1", TEXT_ENCODER_2: "lora_te2"},
    sgm_adapters=True,
    sections=(9, 3, 9),
    outer_blocks=1,
    widths=(320, 640, 1280),
    transformers_in_a_row=10,
    text_width=2048,
    base_version="sdxl_base_v1-0",
    version_tells_prediction=False,
    architecture="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    npz_suffix="sdxl",
    native_side=1024,
    latent_channels=4,
    vae_factor=8,
    scaling_factor=0.13025,
    vae_overflows=True,
    text_layer=2,
    has_size_conditions=True,
    zeros_for_no_prompt=True,
)
FAMILIES = {family.key: family for family in (SD15, SDXL)}
