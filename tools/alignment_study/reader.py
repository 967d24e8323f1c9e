"""A classifier that reads shape and colour off a picture, of old and new things: a judge that no run has learned from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from library.data.demo_pictures import draw, imagine
from library.evaluation.generated_pictures import pixels_of
from library.files import whole_file
from tools.shapes.fit import fit
from tools.shapes.judge import Judge
from tools.shapes.pictures import ALL_LABELS, batches

KNOWN = {name: ALL_LABELS[name] for name in ("shape", "colour")}
KINDS = tuple(f"{colour} {shape}" for colour in KNOWN["colour"] for shape in KNOWN["shape"])
PICTURES, UNSEEN, SIDE = 3000, 500, 64
BATCH, RATE = 64, 2e-3


class Reader(Judge):
    """The tiny base's judge with one more shape and one more colour."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(64, len(values)) for name, values in KNOWN.items()})

    @torch.no_grad()
    def read(self, pixels: Tensor) -> list[str]:
        """uint8 [B, 3, H, W] -> what is on each, as "purple cross"."""
        found = {name: logits.argmax(1).tolist() for name, logits in self(pixels).items()}
        pairs = zip(found["colour"], found["shape"], strict=True)
        return [f"{KNOWN['colour'][colour]} {KNOWN['shape'][shape]}" for colour, shape in pairs]


def trained_reader(file: Path, steps: int) -> tuple[Reader, float]:
    """The reader in `file`, trained first where there is none, and the share of unseen renders that it reads right."""
    reader = Reader()
    if not file.exists():
        torch.manual_seed(0)
        trained = _train(reader, steps)
        with whole_file(file) as temporary:
            torch.save({"weights": reader.state_dict(), "right": trained}, temporary)
    kept = torch.load(file, weights_only=True)
    reader.load_state_dict(kept["weights"])
    return reader.eval(), kept["right"]


def _train(reader: Reader, steps: int) -> float:
    pixels, kinds = _renders("reader", PICTURES)
    labels = {
        name: torch.tensor([values.index(kind.split(" ")[name == "shape"]) for kind in kinds])
        for name, values in KNOWN.items()
    }

    def loss_at(step: int, indices: Tensor) -> Tensor:
        seen = pixels[indices]
        if step % 2:  # the base's autoencoder blurs, and that is not the question here
            seen = F.avg_pool2d(seen.float(), 3, 1, 1).round().to(torch.uint8)
        logits = reader(seen)
        return torch.stack([F.cross_entropy(logits[name], values[indices]) for name, values in labels.items()]).sum()

    reader.train()
    fit("reader", {"reader": reader}, loss_at, list(batches(PICTURES, BATCH, steps, 6)), RATE, 0.98)
    unseen, kinds = _renders("reader unseen", UNSEEN)
    return _share(reader.eval(), unseen, kinds)


def share_right(reader: Reader, pictures: Sequence[Image.Image], wanted: Sequence[str]) -> float:
    """Share of the pictures on which the reader sees what was wanted, each as "purple cross"."""
    return _share(reader, pixels_of(pictures), wanted)


def _share(reader: Reader, pixels: Tensor, wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(reader.read(pixels), wanted, strict=True)) / len(wanted)


def _renders(seed: str, count: int) -> tuple[Tensor, list[str]]:
    """Pictures uint8 [count, 3, 64, 64] with what is on them, the kinds in turn."""
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    drawn = [draw(imagine(kind, random.Random(f"{seed} {index}")), SIDE) for index, kind in enumerate(kinds)]
    return torch.from_numpy(np.stack([np.asarray(one) for one in drawn])).permute(0, 3, 1, 2), kinds
