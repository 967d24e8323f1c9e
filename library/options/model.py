"""Which pretrained models a run stands on, and in what form they compute."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from library.options.checks import require
from library.options.given import Needed, OptionalCount

Precision = Literal["bf16", "no"]

MOST_ON_DEVICE = 2
"""Of the blocks of blocks_to_swap: the one that computes and the one that is to come."""


@dataclass(frozen=True)
class ModelOptions:
    """The base model, and the number formats it computes in."""

    pretrained_model_name_or_path: Needed = "tiny-shapes"
    """Base model: a hub id, a diffusers folder, one .safetensors file, or tiny-shapes, the embedded default."""
    dino_model: tuple[Needed, ...] = ("tiny-shapes-dinov2",)
    """Teacher: hub id or folder of a DINOv2 (facebook/dinov2-large), DINOv3, SigLIP, SigLIP 2, CLIP or MAE, Meta's
    dinov2_vit*14*.pth, or tiny-shapes-dinov2. Of several, each gets an AlignHead of its own."""
    mixed_precision: Precision = "bf16"
    """Number format in which frozen weights are kept and everything but losses and trained weights is computed."""
    device: str | None = None
    """Device to compute on, as torch names it (cuda, cuda:1, cpu). Default: what accelerate finds."""

    def __post_init__(self) -> None:
        require(bool(self.pretrained_model_name_or_path), "pretrained_model_name_or_path", "is empty.")
        require(bool(self.dino_model) and all(self.dino_model), "dino_model", "is empty.")
        twice = [name for name in self.teachers if [teacher_name(one) for one in self.dino_model].count(name) > 1]
        require(
            not twice,
            "dino_model",
            f"has {' '.join(twice)} twice. Stores, heads and metrics are called by the last part of a teacher's name: give each "
            "once, and folders of the same name another one.",
        )

    @property
    def teachers(self) -> dict[str, str]:
        """What each teacher is called in this run -> hub id, folder or file."""
        return {teacher_name(one): one for one in self.dino_model}


def teacher_name(model: str) -> str:
    """What is called by a teacher has the last part of its name, with signs that names of files and modules may have."""
    return re.sub(r"[^\w-]+", "_", re.sub(r"\.(pth|safetensors)$", "", PurePath(model).name)) or "teacher"


def token_kinds(teachers: Iterable[str]) -> dict[str, str]:
    """Teacher -> what its tokens are called among the stores of class pictures: those of the first as where there is no other."""
    return {teacher: f"tokens_{teacher}" if number else "tokens" for number, teacher in enumerate(teachers)}


@dataclass(frozen=True)
class SpeedOptions:
    """Memory and speed; the result stays the same."""

    sdpa: bool = True
    """Attention by torch's fused scaled_dot_product_attention; --no_sdpa computes the attention matrix step by step."""
    xformers: bool = False
    """Attention by xformers instead, which has to be installed (pip install '.[xformers]')."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about half the memory for a third more time."""
    blocks_to_swap: OptionalCount = None
    """Keep the frozen weights of so many blocks of the U-Net (residual and transformer blocks) in the host's memory, and bring each
    to the GPU ahead of its turn. At most two of them are there at a time."""
    compile: Literal["none", "regional", "whole", "graphs"] = "none"
    """torch.compile the U-Net: its repeated blocks (regional, seconds to compile) or all of it (whole, minutes); graphs: no
    compiler, but each pass as one CUDA graph, for small batches on a GPU."""
    channels_last: bool | None = None
    """Keep feature maps channels-last. Default: on CUDA, whose tensor cores want it; on a CPU it made a step 8 % slower."""
    deterministic: bool = True
    """Use only kernels that give the same bits every time, so that a resumed run is the uninterrupted one."""
    max_data_loader_n_workers: int = 8
    """Threads that read caches during training, and decode images while caches are built (there at most one a core)."""

    def __post_init__(self) -> None:
        require(self.max_data_loader_n_workers >= 0, "max_data_loader_n_workers", "must not be negative.")
        require(
            self.compile != "graphs" or not self.gradient_checkpointing,
            "compile",
            "graphs cannot be used with gradient_checkpointing, which puts random states back in the middle of a pass. Leave "
            "one of them out.",
        )
        require(
            self.blocks_to_swap is None or self.blocks_to_swap > MOST_ON_DEVICE,
            "blocks_to_swap",
            f"{self.blocks_to_swap} saves nothing: {MOST_ON_DEVICE} swapped blocks are on the GPU at a time. Give more, or 0.",
        )
        require(
            self.blocks_to_swap is None or self.compile == "none",
            "blocks_to_swap",
            f"moves weights between kernels, which compile {self.compile} joins. Leave one of them out.",
        )
