"""Draw pictures from a prompt, with or without LoRAs.

    python generate.py --pretrained_model_name_or_path outputs/demo/merged --prompt "a photo of a golden retriever"
    python generate.py --prompt "a red square" --lora outputs/demo/demo.safetensors:0.8 --images 1

The sampler is DPM++ 2M Karras. Picture number i has the seed --seed + i and depends on nothing but its own seed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, script
from library.options.checks import positive, require
from library.options.parser import parse
from library.options.precision import TORCH_DTYPES, Precision

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from library.inference.pictures import FoldedLora
    from library.inference.text_to_image import Drawing


@dataclass(frozen=True)
class GenerateOptions:
    prompt: str
    """What to draw."""
    pretrained_model_name_or_path: str = "tiny-sd15"
    """Model: a diffusers folder, a hub id, one .safetensors file, or tiny-sd15, the embedded default."""
    negative_prompt: str = ""
    """What to stay away from."""
    steps: int = 25
    """Denoising steps."""
    cfg_scale: float = 7.5
    """How much the prompt counts (classifier-free guidance); 1 turns guidance off."""
    seed: int = 42
    """Seed of the first picture; the next ones count up from it."""
    width: int | None = None
    """Pixels, a multiple of 8. Default: what the model was trained at."""
    height: int | None = None
    """Pixels, a multiple of 8. Default: what the model was trained at."""
    images: int = 4
    """How many pictures."""
    batch_size: int = 1
    """Pictures drawn at once."""
    lora: tuple[str, ...] = ()
    """LoRA files or training states, each as PATH or PATH:WEIGHT (weight 1 is as trained, below 0 the opposite)."""
    output: Path = Path("outputs/generated.png")
    """PNG to write. Of several pictures it is the grid, and each picture stands beside it with its seed in the name."""
    dtype: Precision | None = None
    """Number format of the model. Default: fp16 on a GPU, float elsewhere."""
    device: str | None = None
    """Device as torch names it (cuda, cuda:1, mps, cpu). Default: the best there is."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        for name in ("steps", "images", "batch_size"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}.")
        require(self.cfg_scale >= 1, "cfg_scale", f"must be at least 1, which is no guidance, got {self.cfg_scale}.")
        require(0 <= self.seed < 2**63 - self.images, "seed", f"must lie between 0 and 2^63, got {self.seed}.")
        for name in ("width", "height"):
            size = getattr(self, name)
            positive(name, size)
            require(size is None or size % 8 == 0, name, f"must be a multiple of 8, got {size}.")
        require(self.output.suffix.lower() == ".png", "output", f"must be a .png file, got {self.output}.")
        for text in self.lora:
            path, _ = split_weight(text)
            require(path.exists(), "lora", f"{path} does not exist.")


def split_weight(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT. What follows the last colon is a weight only if it is a number."""
    path, colon, weight = text.rpartition(":")
    try:
        return (Path(path), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def file_title(path: Path) -> str:
    """What a model is called in a picture's parameters; a folder's name may have a point in it."""
    return path.name.removesuffix(".safetensors")


@script
def main(argv: list[str]) -> int:
    options = parse(GenerateOptions, argv, prog="generate.py", description=__doc__)
    if options.dry_run:
        print_plan(options)
        return EXIT_OK
    run(options)
    return EXIT_OK


def print_plan(options: GenerateOptions) -> None:
    print(f"model      {options.pretrained_model_name_or_path}")
    for text in options.lora:
        print("lora       {}, weight {:g}".format(*split_weight(text)))
    size = f"{options.width or 'native'} x {options.height or 'native'}"
    last = f" to {options.seed + options.images - 1}" if options.images > 1 else ""
    print(f"pictures   {options.images} of {size}, seed {options.seed}{last}")
    print(f"sampler    DPM++ 2M Karras, {options.steps} steps, cfg_scale {options.cfg_scale:g}")
    print(f"output     {options.output}")


def build(options: GenerateOptions) -> tuple[DiffusionPipeline, Drawing, list[FoldedLora]]:
    """The model with adapters folded in, what to draw, and what to write about the adapters."""
    from library.device import choose_device
    from library.inference.pictures import describe_lora
    from library.inference.text_to_image import Drawing, load_pipeline, native_size, words_cut_off
    from library.merging.source import read_source
    from library.models.locate import locate_base

    device = choose_device(options.device)
    wanted = [split_weight(text) for text in options.lora]
    sources = [read_source(path) for path, _ in wanted]
    base = locate_base(options.pretrained_model_name_or_path)
    if base.note:
        print(base.note)
    adapters = [(source.adapter, weight) for source, (_, weight) in zip(sources, wanted, strict=True)]
    pipeline = load_pipeline(base, adapters, dtype=choose_dtype(options.dtype, device), device=device)
    for prompt in (options.prompt, options.negative_prompt):
        if cut_off := words_cut_off(pipeline.tokenizer, prompt):
            print(f'The prompt is too long for the text encoder, which does not see its end: "{cut_off}"')
    native = native_size(pipeline)
    drawing = Drawing(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        width=native if options.width is None else options.width,
        height=native if options.height is None else options.height,
    )
    loras = [describe_lora(file_title(path), w, source.file) for source, (path, w) in zip(sources, wanted, strict=True)]
    return pipeline, drawing, loras


def run(options: GenerateOptions) -> list[Path]:
    """Draw and write everything; returns the files, the grid last."""
    from library.inference.pictures import grid, parameters_text, save_picture
    from library.inference.text_to_image import draw

    print_plan(options)
    pipeline, drawing, loras = build(options)
    model = file_title(Path(options.pretrained_model_name_or_path))
    pictures, files = [], []
    seeds = [options.seed + number for number in range(options.images)]
    for start in range(0, len(seeds), options.batch_size):
        batch = seeds[start : start + options.batch_size]
        before = time.perf_counter()
        drawn = draw(pipeline, drawing, batch)
        seconds = time.perf_counter() - before
        for seed, picture in zip(batch, drawn, strict=True):
            file = options.output
            if len(seeds) > 1:
                file = file.with_name(f"{file.stem}_{seed}.png")
            save_picture(picture, file, parameters_text(drawing, seed, model, loras))
            files.append(file)
            print(f"{file}  {drawing.width} x {drawing.height}, {seconds / len(batch):.1f} s")
        pictures += drawn
    if len(pictures) > 1:
        save_picture(grid(pictures), options.output, parameters_text(drawing, options.seed, model, loras))
        files.append(options.output)
        print(f"{options.output}  all {len(pictures)}")
    return files


def choose_dtype(name: Precision | None, device: torch.device) -> torch.dtype:
    import torch

    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, TORCH_DTYPES[name])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
