"""Does the tiny base draw what it is asked for? A small classifier reads shape and colour off its pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from library.data.demo_pictures import CLASSES
from tools.shapes.fit import Record, fit
from tools.shapes.pictures import LABELS, Pictures, batches

BATCH, RATE = 64, 2e-3
READ = ("shape", "colour")


class Judge(nn.Module):
    """Shape and colour of the thing on a picture, from 64 x 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], len(LABELS[name])) for name in READ})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> {"shape": [B, 4], "colour": [B, 4]} logits."""
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 64], what the answers are read off."""
        values = F.interpolate(pixels.float() / 127.5 - 1.0, size=(64, 64), mode="bilinear", antialias=True)
        found: Tensor = self.body(values).amax(dim=(2, 3))
        return found

    @torch.no_grad()
    def read(self, pixels: Tensor) -> list[str]:
        """What is on each picture, as "red circle"."""
        found = {name: logits.argmax(1).tolist() for name, logits in self(pixels).items()}
        pairs = zip(found["colour"], found["shape"], strict=True)
        return [f"{LABELS['colour'][colour]} {LABELS['shape'][shape]}" for colour, shape in pairs]


def train_judge(pictures: Pictures, steps: int) -> tuple[Judge, Record]:
    """On real renders, some of them blurred: the base's autoencoder blurs too, and that is not the question here."""
    judge = Judge().train()
    labels = {name: pictures.labels(name) for name in READ}

    def loss_at(step: int, indices: Tensor) -> Tensor:
        pixels = pictures.pixels[indices]
        if step % 2:
            pixels = F.avg_pool2d(pixels.float(), 3, 1, 1).round().to(torch.uint8)
        logits = judge(pixels)
        return torch.stack([F.cross_entropy(logits[name], values[indices]) for name, values in labels.items()]).sum()

    record = fit("judge", {"judge": judge}, loss_at, list(batches(len(pictures), BATCH, steps, 5)), RATE, 0.98)
    return judge.eval(), record


def prompts_to_judge(count: int) -> list[tuple[str, str]]:
    """(prompt, class) with the classes in turn, worded in several ways."""
    choose = random.Random("judge")
    forms = ("a photo of a {}", "a {}", "a large {} in the middle", "a {} on a plain white background", "a medium {}")
    wanted = [CLASSES[index % len(CLASSES)] for index in range(count)]
    return [(choose.choice(forms).format(name), name) for name in wanted]


def share_right(judge: Judge, images: Sequence[Image.Image], wanted: Sequence[str]) -> float:
    """Part of the pictures on which the judge reads the class that was asked for."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return sum(a == b for a, b in zip(judge.read(pixels), wanted, strict=True)) / len(wanted)
