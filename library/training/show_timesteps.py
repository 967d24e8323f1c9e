"""--show_timesteps: what a training along a flow or by bins would draw, as a histogram in text or as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from library.diffusion.bridge import along_flow
from library.diffusion.noise import draw_timesteps
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.errors import UserError
from library.models.base_family import family_of, native_side
from library.models.load import load_scheduler_config
from library.models.locate import locate_base
from library.options.run import RunOptions
from library.processes import Processes
from library.training.bins import make_bins
from library.training.flow import describe
from library.training.inputs import base_components, check_fit
from library.training.run import make_objective
from library.training.saving import saving_of
from library.training.state import load_bins

DRAWN, BINS = 100_000, 20
_BAR = 50
_WIDTH, _HEIGHT, _EDGE = 640, 320, 40


def show_timesteps(options: RunOptions) -> None:
    """Print or draw it. Raises UserError where the run draws uniform timesteps of no flow.

    Bins that learn are drawn from as the newest state in output_dir has them, or else as they begin.
    """
    name = options.model.pretrained_model_name_or_path
    base = locate_base(name, base_components(options))
    family, pixels = family_of(base), native_side(base)
    for note in check_fit(options, base, family):
        print(note)
    processes = Processes("cpu")
    process = make_objective(options, load_scheduler_config(base), family, pixels, processes).parametrisation
    bins = make_bins(options, process, processes.device)
    if bins is None and not isinstance(process, FlowPath):
        raise UserError(f"show_timesteps is for flows, and {name} is trained on uniform timesteps. Add --flow_model.")
    if bins is not None and bins.learns:
        states = saving_of(options.output).states_there()
        if states:
            load_bins(states[-1], bins)
        print(f"bins as {states[-1]} left them" if states else "bins as they begin: all alike, until losses are known")
    generator, side = torch.Generator().manual_seed(options.training.seed), pixels // family.vae_factor
    shape = torch.Size((DRAWN, family.latent_channels, side, side))
    timesteps, _ = draw_timesteps(shape, generator, options.noise, process, bins)
    if options.flow.show_timesteps == "console":
        print(as_text(process, timesteps))
    else:
        file = options.output.output_dir / "timesteps.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        as_picture(process, timesteps, f"{name}: {describe(options.flow)}", file)
        print(f"{file}  {DRAWN:,} draws")


def shares_of(process: Parametrisation, timesteps: Tensor) -> list[float]:
    """Of the draws, in BINS equal parts of sigma from 0 to 1."""
    alpha, sigma = process.at(timesteps)
    counts = torch.histc((sigma / (alpha + sigma)).flatten(), BINS, 0, 1)
    return (counts / counts.sum()).tolist()


def as_text(process: Parametrisation, timesteps: Tensor) -> str:
    shares, path = shares_of(process, timesteps), along_flow(process)
    lines = ["sigma        timestep  share"]
    for number, share in enumerate(shares):
        low, high = number / BINS, (number + 1) / BINS
        bar = "#" * round(share / max(shares) * _BAR)
        lines.append(f"{low:.2f}-{high:.2f}  {path.timestep_of(low + 0.5 / BINS):9.1f}  {share:6.2%}  {bar}".rstrip())
    return "\n".join(lines)


def as_picture(process: Parametrisation, timesteps: Tensor, title: str, file: Path) -> None:
    shares = shares_of(process, timesteps)
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
