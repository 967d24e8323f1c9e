"""Ways to compute the same thing faster or in less memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.activations import get_activation
from diffusers.models.attention_processor import AttnProcessor

from library.errors import UserError
from library.options.model import SpeedOptions
from library.words import wrapped

# Blocks that occur many times in a Stable Diffusion U-Net: compiled once each, used everywhere.
REPEATED_BLOCKS = frozenset({"ResnetBlock2D", "BasicTransformerBlock"})


def resolved_speed(options: SpeedOptions, device: torch.device, say: Callable[[str], None]) -> Any:
    """The options as this device has them: the memory format that pays there, and torch's own attention, which computes the
    same as fast, where xformers cannot be used, which is said."""
    if options.channels_last is None:
        options = replace(options, channels_last=device.type == "cuda")
    problem = xformers_problem(options)
    if problem is None:
        return options
    say(
        wrapped(f"--xformers: {problem} torch's scaled_dot_product_attention is used instead, which computes the same.")
    )
    return replace(options, xformers=False, sdpa=True)


def xformers_problem(options: SpeedOptions) -> str | None:
    """Why xformers, which was asked for, cannot be used; imported only then."""
    if not options.xformers:
        return None
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a broken build raises all kinds of errors
        reason = str(error).splitlines()[0]
        return (
            f"xformers cannot be used here ({type(error).__name__}: {reason}; pip install '.[xformers]' installs it)."
        )
    return None if torch.cuda.is_available() else "its kernels need a CUDA device and there is none."


def prepare_environment(options: SpeedOptions) -> None:
    """What has to be said before CUDA is used at all: cuBLAS reads its workspace setting once."""
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def set_up_determinism(options: SpeedOptions, device: torch.device) -> None:
    """Choose kernels. On the CPU torch's are deterministic as they are."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not options.deterministic
    torch.backends.cudnn.deterministic = options.deterministic
    if options.deterministic:
        # Not warn_only: attention's backward pass would then stay as it is and only say so.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def explained_kernels(device: torch.device) -> Iterator[None]:
    """Turn torch's objection to a kernel without a deterministic form into a UserError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"A step of this run has no deterministic kernel on {device} ({str(error).splitlines()[0]}). "
            "--no_deterministic allows any kernel; a resumed run is then close to the uninterrupted one, not equal."
        ) from None


class _One:
    """Divides without an operation, and to the bit as 1.0 does."""

    def __rtruediv__(self, dividend: Any) -> Any:
        return dividend


def leave_divisions_by_one_out(unet: Any) -> None:
    """diffusers divides what every residual block and attention gives by a factor that SD1.5 and SDXL leave at 1."""
    for module in unet.modules():
        for name in ("output_scale_factor", "rescale_output_factor"):
            if getattr(module, name, None) == 1.0:
                setattr(module, name, _One())


def activate_time_once(unet: Any) -> None:
    """All residual blocks are given the same embedding of the time step, and each would activate it anew."""
    blocks = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    if unet.time_embed_act is None and not any(block.skip_time_act for block in blocks):
        unet.time_embed_act = get_activation(unet.config["act_fn"])
        for block in blocks:
            block.skip_time_act = True


def set_up_speed(unet: Any, options: SpeedOptions) -> None:
    """Attention, memory format, checkpointing and compilation of a U-Net that has its adapters already."""
    if options.channels_last:
        unet.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if not options.sdpa and not options.xformers:
        unet.set_attn_processor(AttnProcessor())
    if options.xformers:
        unet.enable_xformers_memory_efficient_attention()
    activate_time_once(unet)
    if options.compile in ("none", "graphs"):  # a compiler leaves them out by itself, and wants numbers
        leave_divisions_by_one_out(unet)
    if options.compile == "whole":
        unet.compile()
    elif options.compile == "regional":
        # One piece of code serves all blocks of a class, and SD1.5's residual blocks come in more shapes than the default 8.
        torch._dynamo.config.recompile_limit = 64
        for module in unet.modules():
            if type(module).__name__ in REPEATED_BLOCKS:
                module.compile()
