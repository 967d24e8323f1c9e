"""A DINOv2-shaped teacher: its patch tokens are made to tell what lies in the patch, its CLS token what is on the picture.

DINOv2 itself learns without labels, on 142 million photos; with 12,000 drawings and minutes of time, the drawings' own
labels are what makes tokens mean something. The linear heads that read them are thrown away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from library.models.teachers import IMAGENET_MEAN, IMAGENET_STD
from tools.shapes.autoencoder import recoloured
from tools.shapes.fit import Record, fit
from tools.shapes.pictures import LABELS, Labels, Pictures, batches

HIDDEN, PATCHES = 96, 16
CONFIG = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 14,
    "image_size": 14 * PATCHES,
}
BATCH, RATE = 32, 1e-3


class _Heads(nn.Module):
    """What must be readable, linearly: of a patch, how much of it the shape covers, its colour, and shape or texture."""

    def __init__(self, names: Labels) -> None:
        super().__init__()
        self.patch = nn.Linear(HIDDEN, 4)
        self.kind = nn.Linear(HIDDEN, len(names["shape"]) + len(names["texture"]))
        self.picture = nn.ModuleDict({name: nn.Linear(HIDDEN, len(values)) for name, values in names.items()})


def train_teacher(
    pictures: Pictures, steps: int, names: Labels = LABELS, begun: Dinov2Model | None = None
) -> tuple[Dinov2Model, Record]:
    """names: the labels that `pictures` have. begun: a teacher to go on with."""
    model, heads = (Dinov2Model(Dinov2Config(**CONFIG)) if begun is None else begun).train(), _Heads(names)
    labels = {name: pictures.labels(name, names) for name in names}
    generator = torch.Generator().manual_seed(3)

    def loss_at(step: int, indices: Tensor) -> Tensor:
        pixels = recoloured(pictures.pixels[indices].float() / 127.5 - 1.0, generator)
        hidden = model(pixel_values=_inputs(pixels)).last_hidden_state
        covered = F.adaptive_avg_pool2d(pictures.coverage[indices].float() / 255.0, PATCHES).flatten(1)  # [B, N]
        colours = F.adaptive_avg_pool2d(pixels, PATCHES).flatten(2).transpose(1, 2)  # [B, N, 3]
        patches = torch.cat([covered.unsqueeze(2), colours], dim=2)
        own = {name: values[indices] for name, values in labels.items()}
        kinds = torch.where(covered > 0.5, own["shape"].unsqueeze(1), len(names["shape"]) + own["texture"].unsqueeze(1))
        loss = F.mse_loss(heads.patch(hidden[:, 1:]), patches) * 4.0
        loss = loss + F.cross_entropy(heads.kind(hidden[:, 1:]).flatten(0, 1), kinds.flatten())
        kept = slice(1, None, 2)  # of the others the colours are no longer those of the caption
        for name, head in heads.picture.items():
            of = slice(None) if name in ("shape", "texture") else kept
            loss = loss + 0.5 * F.cross_entropy(head(hidden[of, 0]), own[name][of])
        return loss

    record = fit(
        "teacher", {"dinov2": model, "heads": heads}, loss_at, list(batches(len(pictures), BATCH, steps, 3)), RATE
    )
    return model.eval(), record


def _inputs(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> resized and normalised as the caches' encoder does it."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pictures = F.interpolate((pixels + 1.0) / 2.0, size=(14 * PATCHES,) * 2, mode="bicubic", antialias=True)
    return (pictures.clamp(0.0, 1.0) - mean) / std
