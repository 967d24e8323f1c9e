"""Train the embedded default from nothing: base, CLIP and DINOv2 on generated pictures. Two to three hours on two CPU cores.

    python tools/train_tiny_base.py --out models

Each part is saved when it is trained; run the same command again to go on with the next one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers.models import AutoencoderKL
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from tools.shapes import autoencoder, clip, denoiser, judge, teacher
from tools.shapes.fit import Record
from tools.shapes.parts import has_part, load_model, save_part
from tools.shapes.pictures import Pictures, draw_pictures
from tools.shapes.publish import publish

TRAINED_ON, UNSEEN = 12_000, 512
STEPS = {
    "autoencoder": 5000,
    "clip": 1200,
    "teacher": 2500,
    "denoiser": 2200,
    "denoiser_2": 3600,
    "picture_tower": 1200,
    "judge": 500,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the embedded default from nothing.")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder of the three models (%(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/tiny_base"), help="where parts are kept (%(default)s)"
    )
    parser.add_argument("--parts", nargs="*", choices=sorted(STEPS), default=list(STEPS), help="only these (all)")
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps, to try things (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (all cores)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    steps = {name: max(2, round(count * options.share)) for name, count in STEPS.items()}
    pictures = drawn(options.work / "train.pt", "train", TRAINED_ON)
    for name in STEPS:
        if name in options.parts and not has_part(options.work, name):
            torch.manual_seed(0)
            save_part(options.work, name, *train(name, pictures, options.work, steps[name]))
    if all(has_part(options.work, name) for name in STEPS):
        unseen = drawn(options.work / "unseen.pt", "unseen", UNSEEN)
        print(json.dumps(publish(options.work, options.out, unseen), indent=2))
    return 0


def drawn(file: Path, part: str, count: int) -> Pictures:
    """Pictures of a part, drawn once."""
    if not file.exists():
        torch.save(draw_pictures(part, count), file)
    return torch.load(file, weights_only=False)  # our own, from the line above


def train(name: str, pictures: Pictures, work: Path, steps: int) -> tuple[nn.Module, Record]:
    if name == "autoencoder":
        return autoencoder.train_autoencoder(pictures, steps)
    if name == "clip":
        return clip.train_clip(pictures, steps)
    if name == "teacher":
        return teacher.train_teacher(pictures, steps)
    if name == "judge":
        return judge.train_judge(pictures, steps)
    if name == "picture_tower":
        return clip.train_picture_tower(pictures, load_model(work, "clip", CLIPModel(clip.config())), steps)
    vae = load_model(work, "autoencoder", AutoencoderKL.from_config(autoencoder.CONFIG))
    text_model = load_model(work, "clip", CLIPTextModel(CLIPTextConfig(**clip.text_config())))
    begun = load_model(work, "denoiser", denoiser.new_unet()) if name == "denoiser_2" else None
    return denoiser.train_denoiser(pictures, vae, text_model, steps, begun, work / f"{name}.kept")


if __name__ == "__main__":
    sys.exit(main())
