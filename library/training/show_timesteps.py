"""--show_timesteps: what a flow training would draw, as a histogram in text or as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from library.diffusion.rectified_flow import FlowPath
from library.errors import UserError
from library.models.base_family import family_of, native_side
from library.models.load import load_scheduler_config
from library.models.locate import locate_base
from library.options.run import RunOptions
from library.training.flow import describe, flow_mode, trained_path
from library.training.inputs import base_components, check_fit

DRAWN, BINS = 100_000, 20
_BAR = 50
_WIDTH, _HEIGHT, _EDGE = 640, 320, 40


def show_timesteps(options: RunOptions) -> None:
    """Print or draw it. Raises UserError where the run trains no flow."""
    name = options.model.pretrained_model_name_or_path
    base = locate_base(name, base_components(options))
    family, scheduler, pixels = family_of(base), load_scheduler_config(base), native_side(base)
    for note in check_fit(options, base, family):
        print(note)
    mode = flow_mode(options, scheduler)
    if mode is None:
        raise UserError(f"show_timesteps is for flows, and {name} is trained on uniform timesteps. Add --flow_model.")
    path, side = trained_path(options, scheduler, family, pixels, mode), pixels // family.vae_factor
    first, end = options.noise.timesteps
    generator = torch.Generator().manual_seed(options.training.seed)
    timesteps = path.draw_timesteps(torch.Size((DRAWN, 4, side, side)), generator, first, min(end, path.timesteps))
    if options.flow.show_timesteps == "console":
        print(as_text(path, timesteps))
    else:
        file = options.output.output_dir / "timesteps.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        as_picture(path, timesteps, f"{name}: {describe(options.flow)}", file)
        print(f"{file}  {DRAWN:,} draws")


def shares_of(path: FlowPath, timesteps: Tensor) -> list[float]:
    """Of the draws, in BINS equal parts of sigma from 0 to 1."""
    alpha, sigma = path.at(timesteps)
    counts = torch.histc((sigma / (alpha + sigma)).flatten(), BINS, 0, 1)
    return (counts / counts.sum()).tolist()


def as_text(path: FlowPath, timesteps: Tensor) -> str:
    shares = shares_of(path, timesteps)
    lines = ["sigma        timestep  share"]
    for number, share in enumerate(shares):
        low, high = number / BINS, (number + 1) / BINS
        bar = "#" * round(share / max(shares) * _BAR)
        lines.append(f"{low:.2f}-{high:.2f}  {path.timestep_of(low + 0.5 / BINS):9.1f}  {share:6.2%}  {bar}".rstrip())
    return "\n".join(lines)


def as_picture(path: FlowPath, timesteps: Tensor, title: str, file: Path) -> None:
    shares = shares_of(path, timesteps)
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen, wide = ImageDraw.Draw(picture), (_WIDTH - 2 * _EDGE) / BINS
    for number, share in enumerate(shares):
        left, top = _EDGE + number * wide, _HEIGHT - _EDGE - share / max(shares) * (_HEIGHT - 2 * _EDGE)
        pen.rectangle((left, top, left + wide - 2, _HEIGHT - _EDGE), fill="#4477aa")
    for tenth in range(0, 11, 2):
        pen.text(
            (_EDGE + tenth / 10 * (_WIDTH - 2 * _EDGE) - 8, _HEIGHT - _EDGE + 6), f"{tenth / 10:.1f}", fill="black"
        )
    pen.text((_EDGE, 12), title, fill="black")
    pen.text((_WIDTH - 2 * _EDGE, _HEIGHT - 16), "sigma (1: noise)", fill="black")
    picture.save(file)
