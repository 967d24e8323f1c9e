"""Options of generate.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from library.options.checks import OptionError, finite, not_negative, positive, require
from library.options.given import Needed, Verbatim
from library.options.model import ModelOptions
from library.options.text_fusion import TextFusionOptions
from library.precision import Precision

PROMPT_FILES = (".txt", ".toml", ".json")
IMAGES = 4
"""Pictures of a single prompt, by default."""
GUIDANCE = 0.2
"""Of a reference, by default: measured, see docs/generate.md."""


@dataclass(frozen=True)
class PictureOptions:
    """What is drawn, how large and how often, and where it goes."""

    prompt: Verbatim | None = None
    """What to draw, in A1111's prompt language: (x:1.2), [a:b:0.5], [a|b], AND, BREAK, <lora:name:0.8>."""
    negative_prompt: Verbatim = ""
    """What the pictures should not show."""
    prompt_file: Path | None = None
    """Instead of --prompt: a file of prompts in kohya's syntax (.txt, .toml, .json). Options fill in what a line leaves out."""
    width: int | None = None
    """Pixels, a multiple of 8. Default: the size that the model was trained at, or that of --init_image."""
    height: int | None = None
    """Pixels, a multiple of 8. Default: like the width."""
    seed: int = 42
    """Seed of the first picture; the next ones count up from it."""
    images: int | None = None
    """Number of pictures of each prompt. Default: 4; 1 with --prompt_file or axes."""
    batch_size: int = 1
    """Pictures drawn at once. It does not change the pictures."""
    output: Path = Path("outputs/generated.png")
    """PNG to write. With several pictures or axes it is the sheet, and each picture is written beside it under a longer name."""

    def __post_init__(self) -> None:
        require(
            (self.prompt is None) != (self.prompt_file is None),
            "prompt",
            "is missing: say what to draw, or name a --prompt_file."
            if self.prompt is None
            else "and prompt_file exclude each other.",
        )
        if self.prompt_file is not None:
            require(
                self.prompt_file.suffix.lower() in PROMPT_FILES,
                "prompt_file",
                f"must be a {', '.join(PROMPT_FILES)} file, got {self.prompt_file}.",
            )
            require(self.prompt_file.is_file(), "prompt_file", f"{self.prompt_file} does not exist.")
        for name in ("images", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, f"must be at least 1, got {value}.")
        require(
            0 <= self.seed < 2**63 - (self.images or IMAGES), "seed", f"must lie between 0 and 2^63, got {self.seed}."
        )
        for name in ("width", "height"):
            size = getattr(self, name)
            positive(name, size)
            require(size is None or size % 8 == 0, name, f"must be a multiple of 8, got {size}.")
        require(self.output.suffix.lower() == ".png", "output", f"must be a .png file, got {self.output}.")


@dataclass(frozen=True)
class ModelsOptions:
    """Base model, adapters and refiner."""

    pretrained_model_name_or_path: Needed = ModelOptions.pretrained_model_name_or_path
    """Model: a diffusers folder, a hub id, one .safetensors file, or one of the project's own (the default is)."""
    vae: str | None = None
    """Another autoencoder: that of this model, or one alone (a folder, a hub id, a .safetensors file). Default: the base's own."""
    lora: tuple[str, ...] = ()
    """Adapters (kohya, diffusers, PEFT) or training states, each as PATH or PATH:WEIGHT (1: as trained; below 0: the opposite)."""
    lora_dir: tuple[Path, ...] = ()
    """Folders that are searched for name.safetensors of <lora:name:weight>, at any depth. Default: outputs, and those of --lora."""
    refiner: str | None = None
    """A second model of the base's family, or SDXL's refiner, that draws the last steps."""
    refiner_switch_at: float = 0.8
    """Share of the steps after which the refiner takes over; of the second pass, with a hires fix."""
    prediction_type: Literal["epsilon", "v_prediction", "flow_prediction"] | None = None
    """What the base predicts. Default: as its files say; needed only where they do not, as those of flow models often do not."""
    zero_terminal_snr: bool = False
    """The base was trained on a schedule that ends in pure noise. Needed only where its files do not say so."""
    dtype: Precision | None = None
    """Number format of the model. Default: fp16 on a GPU, float elsewhere."""
    device: str | None = None
    """Device as torch names it (cuda, cuda:1, mps, cpu). Default: the best there is."""

    def __post_init__(self) -> None:
        require(bool(self.pretrained_model_name_or_path), "pretrained_model_name_or_path", "is empty.")
        given = [split_weight(text) for text in self.lora]
        paths = [path for path, _ in given]
        for place, (path, weight) in enumerate(given):
            require(math.isfinite(weight), "lora", f"{path} needs a finite number as its weight, got {weight}.")
            require(path.exists(), "lora", f"{path} does not exist.")
            require(path not in paths[:place], "lora", f"{path} is given twice; give it once with the weight you mean.")
        for folder in self.lora_dir:
            require(folder.is_dir(), "lora_dir", f"{folder} is no folder.")
        require(
            0 < self.refiner_switch_at < 1,
            "refiner_switch_at",
            f"must lie between 0 and 1, got {self.refiner_switch_at}.",
        )
        require(
            self.refiner is not None or self.refiner_switch_at == ModelsOptions.refiner_switch_at,
            "refiner_switch_at",
            "has no effect without refiner.",
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How noise becomes a picture."""

    sampler: str = "DPM++ 2M"
    """Euler, Euler a, DDIM, LMS, DPM++ 2M, DPM++ 2S a, DPM++ 2M SDE, DPM++ 3M SDE, UniPC, ... in A1111's spelling or kohya's;
    "DPM++ 2M Karras" names the schedule too."""
    schedule: str | None = None
    """Noise levels of the steps: Normal, Karras, Exponential, Align Your Steps 11 or 32, DDIM. Default: the sampler's own."""
    steps: int = 25
    """Denoising steps."""
    cfg_scale: float = 7.5
    """Strength of the prompt (classifier-free guidance); 1 turns guidance off."""
    clip_skip: int | None = None
    """Layer of SD1.5's text encoder, from its end: 1 is the last (default), 2 is for many anime models. SDXL's is fixed."""
    emphasis: Literal["original", "no norm"] = "original"
    """Whether a weighted text's embedding is scaled back to its mean before weighting (original, A1111's default) or not."""
    pad_cond_uncond: bool = False
    """Fill the shorter of prompt and negative prompt with empty chunks: another picture, as A1111's option of that name makes."""
    prompt_syntax: Literal["a1111", "reforge"] = "a1111"
    """reforge: (text:x2.5) repeats the text; a1111: it is plain text."""
    flow_shift: float | None = None
    """Shift of the noise levels along a rectified flow, as ComfyUI's ModelSamplingSD3 has it; 2 to 3 is usual. Other bases are
    drawn along a flow with it, exactly. Default: what a flow base's files say, else 1."""
    latent_multiplier: float = 1.0
    """Multiply the finished latents before they become a picture: for models trained on wrongly scaled latents, as Lune was."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", f"must be at least 1, got {self.steps}.")
        finite("cfg_scale", self.cfg_scale)
        require(self.cfg_scale >= 1, "cfg_scale", f"must be at least 1, which is no guidance, got {self.cfg_scale}.")
        positive("clip_skip", self.clip_skip)
        for name in ("flow_shift", "latent_multiplier"):
            finite(name, getattr(self, name))
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class PassOptions:
    """A second pass in a larger size (hires fix), or a picture to start from (img2img)."""

    hires_scale: float | None = None
    """Factor by which the picture is enlarged and drawn again in a second pass (hires fix). Default: one pass."""
    hires_upscaler: str = "Latent"
    """How it is enlarged: Latent, Latent (bicubic), Latent (nearest-exact), ... for latents; Lanczos, Nearest for pixels."""
    hires_steps: int | None = None
    """Steps of the second pass. Default: those of the first."""
    hires_denoising_strength: float = 0.7
    """How much the second pass may change the picture, above 0 and at most 1."""
    init_image: Path | None = None
    """Start from this picture instead of noise (img2img). It is scaled and cropped to the size."""
    denoising_strength: float = 0.75
    """How much --init_image may change, above 0 and at most 1: that share of the steps is done."""

    def __post_init__(self) -> None:
        for name in ("hires_denoising_strength", "denoising_strength"):
            value = getattr(self, name)
            require(0 < value <= 1, name, f"must be above 0 and at most 1, got {value}.")
        require(
            self.hires_steps is None or self.hires_steps >= 1,
            "hires_steps",
            f"must be at least 1, got {self.hires_steps}.",
        )
        for name in ("hires_upscaler", "hires_steps", "hires_denoising_strength"):
            given = getattr(self, name) != getattr(PassOptions, name)
            require(not given or self.hires_scale is not None, name, "has no effect without hires_scale.")
        require(
            self.init_image is not None or self.denoising_strength == PassOptions.denoising_strength,
            "denoising_strength",
            "has no effect without init_image; that of the hires fix is hires_denoising_strength.",
        )
        require(
            self.init_image is None or self.init_image.is_file(), "init_image", f"{self.init_image} does not exist."
        )


@dataclass(frozen=True)
class ReferenceOptions:
    """A photo that pictures are steered towards, as the AlignHeads of a training see it."""

    align_reference: Path | None = None
    """Photo whose content and layout the pictures take over. It is scaled and cropped to their size."""
    align_state: Path | None = None
    """Training state whose AlignHeads steer: step_NNNNNN of train_repa.py, NAME-state of train_network.py."""
    align_guidance: float | None = None
    """How strongly: the share of itself by which predicted noise is turned towards the photo. Default: 0.2; 0 is without."""
    align_guidance_window: tuple[float, float] = (0.3, 0.95)
    """Lowest and highest noise at which pictures are steered, as t of train_repa.py's align_window: 0 without, 1 noise alone."""
    dino_model: str | None = None
    """Where the state's teacher is. Default: where it was in training."""

    def __post_init__(self) -> None:
        photo, state = self.align_reference, self.align_state
        not_negative("align_guidance", self.align_guidance)
        finite("align_guidance", self.align_guidance)
        for name in ("align_state", "align_guidance", "align_guidance_window", "dino_model"):
            given = getattr(self, name) != getattr(ReferenceOptions, name)
            require(not given or photo is not None, name, "has no effect without align_reference.")
        if photo is None:
            return
        require(photo.is_file(), "align_reference", f"{photo} does not exist.")
        if state is None:
            raise OptionError(
                "align_state", "is missing: the training state whose AlignHeads read the photo of align_reference."
            )
        require(
            (state / "state.json").is_file(),
            "align_state",
            f"{state} is no training state: there is no state.json in it. Name a folder step_NNNNNN or NAME-state.",
        )
        require(
            (state / "align_heads.safetensors").is_file(),
            "align_state",
            f"{state} has no AlignHeads: its run trained without alignment. Name a state of a run with them.",
        )
        low, high = self.align_guidance_window
        require(
            0 <= low < high <= 1,
            "align_guidance_window",
            f"wants two numbers from 0 to 1, the lower one first, got {low:g} {high:g}.",
        )


@dataclass(frozen=True)
class SheetOptions:
    """A sheet of pictures that differ along one or two axes."""

    x_axis: str | None = None
    """What differs between columns, as "sampler: Euler, DPM++ 2M", "cfg: 3, 5, 7" or "steps: 10-30 [3]"."""
    y_axis: str | None = None
    """What differs between rows, likewise."""


@dataclass(frozen=True)
class GenerateOptions:
    most_used: ClassVar[tuple[str, ...]] = (
        *(
            "prompt",
            "negative_prompt",
            "prompt_file",
            "pretrained_model_name_or_path",
            "lora",
            "lora_dir",
            "width",
            "height",
        ),
        *("seed", "images", "output", "sampler", "steps", "cfg_scale", "clip_skip", "hires_scale", "init_image"),
        *("x_axis", "y_axis", "dry_run"),
    )

    pictures: PictureOptions
    models: ModelsOptions
    sampling: SamplingOptions
    passes: PassOptions
    reference: ReferenceOptions
    sheet: SheetOptions
    fusion: TextFusionOptions = field(default_factory=TextFusionOptions)
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        require(
            self.fusion.text_fusion is None or self.models.refiner is None,
            "text_fusion",
            "is for one model, and a refiner has text encoders of its own. Leave one of them out.",
        )


def split_weight(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT. What follows the last colon is a weight only if it is a number."""
    path, colon, weight = text.rpartition(":")
    try:
        return (Path(path), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
