"""What steering by a photo does on the tiny base: likeness to the photo and adherence to the prompt, over strengths.

    python tools/reference_guidance.py

Trains AlignHeads for 250 steps in outputs/reference_guidance, unless it did, and draws things that are asked for by prompts beside
photos of other things. A table, results.json and the picture of docs/generate.md come out; seven minutes of one CPU core.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from demo import run_commands  # noqa: E402
from PIL import Image  # noqa: E402

from library.data.demo_pictures import CLASSES, COLOURS, imagine  # noqa: E402
from library.data.demo_pictures import draw as render  # noqa: E402
from library.evaluation.feature_model import reference_heads  # noqa: E402
from library.evaluation.picture_encoders import ClipPictures  # noqa: E402
from library.evaluation.standard_errors import Estimate, jackknife, mean_of  # noqa: E402
from library.files import write_json  # noqa: E402
from library.inference.drawing_model import load_model  # noqa: E402
from library.inference.grids import grid  # noqa: E402
from library.inference.picture_request import PictureRequest, Reference  # noqa: E402
from library.inference.reference import ReferenceHeads  # noqa: E402
from library.inference.text_to_image import draw  # noqa: E402
from library.models.embedded import MODELS, SHAPES, SHAPES_CLIP  # noqa: E402
from library.models.locate import locate_base  # noqa: E402
from library.options.generate import ReferenceOptions  # noqa: E402
from tools.alignment_study.reader import trained_reader  # noqa: E402

OUTPUT = ROOT / "outputs" / "reference_guidance"
STATE = OUTPUT / "run" / "step_000250"
PICTURE = ROOT / "docs" / "images" / "reference_guidance.jpg"
# At 128 px the map of up_blocks.1 has 8 x 8 places; that of mid, 2 x 2, knows little of where things are.
TRAINING = [
    *(
        "train_repa.py",
        "--dataset_config",
        "demo.toml",
        "--taps",
        "up_blocks.1",
        "--token_grid",
        "8",
        "--align_recipe",
        "irepa",
    ),
    *(
        "--align_film",
        "true",
        "--align_learning_rate",
        "5e-3",
        "--max_train_epochs",
        "10",
        "--save_every_n_steps",
        "250",
    ),
    *("--cache_dir", OUTPUT / "caches", "--output_dir", OUTPUT / "run"),
]
SIDE, STEPS, PHOTOS, SEEDS, SHOWN = 128, 12, 32, (1, 2), 7
FIRST = 8
"""The photos before it are those that the method and its window were chosen on."""
SHEET = 0.8  # of its size, for a page
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.8)
MEASURES = {
    "tokens": "teacher's tokens",
    "clip": "CLIP",
    "pixels": "pixels, RMS",
    "distance": "distance of the thing",
    "right": "as asked",
}


@dataclass(frozen=True)
class Case:
    """A photo, where its thing is (parts of the side), and another thing that is asked for: another colour and another shape."""

    photo: Path
    centre: tuple[float, float]
    asked: str

    @property
    def picture(self) -> Image.Image:
        return Image.open(self.photo).convert("RGB")


def main() -> int:
    if not STATE.is_dir() and (failed := run_commands([TRAINING])):
        return failed
    cases = make_cases()
    heads, model = reference_heads(STATE), load_model(locate_base(SHAPES), dtype=torch.float32, device="cpu")
    drawn: dict[float, list[Image.Image]] = {}
    for strength in STRENGTHS:
        drawn[strength] = []
        for case in cases:
            reference = Reference(case.photo, STATE, strength, ReferenceOptions.align_guidance_window)
            guidance = heads.guidance(reference, SIDE, SIDE, model.device)
            request = PictureRequest(f"a {case.asked}", "", steps=STEPS, cfg_scale=5.0, width=SIDE, height=SIDE)
            drawn[strength] += draw(model, request, SEEDS, guidance=guidance)
        print(f"strength {strength:g}: {len(drawn[strength])} pictures", flush=True)
    judges = Judges(heads, cases)
    found = {strength: judges.measure(pictures) for strength, pictures in drawn.items()}
    rows = {strength: compared(of_photos, found[0.0]) for strength, of_photos in found.items()}
    write_json(
        OUTPUT / "results.json",
        {f"{s:g}": {n: [e.to_json() for e in pair] for n, pair in row.items()} for s, row in rows.items()},
    )
    print_table(rows)
    shown = cases[:SHOWN]
    tiles = [case.picture for case in shown] + [drawn[s][i * len(SEEDS)] for s in STRENGTHS for i in range(SHOWN)]
    sheet = grid(tiles, SHOWN, column_headings=[f"a {case.asked}" for case in shown],
                 row_headings=["photo", *(f"{s:g}" for s in STRENGTHS)])  # fmt: skip
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    smaller = (round(sheet.width * SHEET), round(sheet.height * SHEET))
    sheet.resize(smaller, Image.Resampling.LANCZOS).save(PICTURE, quality=72, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size / 1000:.0f} KB")
    return 0


def make_cases() -> list[Case]:
    """Photos of each class in turn, that no training has seen."""
    cases, folder = [], OUTPUT / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FIRST, FIRST + PHOTOS):
        colour, shape = (kind := CLASSES[(number * 5 + 3) % len(CLASSES)]).split()
        picture = imagine(kind, random.Random(f"photo {number}"))
        render(picture, SIDE).save(folder / f"{number:02d}.png")
        others = [one for one in CLASSES if colour not in one and shape not in one]
        cases.append(Case(folder / f"{number:02d}.png", picture.centre, others[number * 7 % len(others)]))
    return cases


class Judges:
    """tokens: the teacher that the heads learned from. No training has seen the others."""

    def __init__(self, heads: ReferenceHeads, cases: Sequence[Case]) -> None:
        self.heads, self.cases = heads, [case for case in cases for _ in SEEDS]
        self.clip = ClipPictures(str(MODELS / SHAPES_CLIP))
        self.reader, _ = trained_reader(OUTPUT / "reader.pt", 600)
        photos = [case.picture for case in self.cases]
        self.photos = {
            "tokens": self._tokens(photos),
            "clip": self.clip.pictures(photos),
            "pixels": pixels_of(photos) / 255.0,
        }

    def measure(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Each measure [photos], the mean over its seeds."""
        pixels = pixels_of(pictures)
        read = self.reader.read(pixels)
        found = {
            "tokens": (self._tokens(pictures) * self.photos["tokens"]).sum(dim=-1).mean(dim=-1),
            "clip": (self.clip.pictures(pictures) * self.photos["clip"]).sum(dim=-1),
            "pixels": (pixels / 255.0 - self.photos["pixels"]).square().mean(dim=(1, 2, 3)).sqrt(),
            "distance": torch.tensor([
                float(np.hypot(*np.subtract(centre_of(one, case.asked.split()[0]), case.centre)))
                for one, case in zip(pixels.numpy(), self.cases, strict=True)
            ]),
            "right": torch.tensor([float(seen == case.asked) for seen, case in zip(read, self.cases, strict=True)]),
        }  # fmt: skip
        return {name: values.unflatten(0, (-1, len(SEEDS))).mean(dim=1) for name, values in found.items()}

    def _tokens(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[n, N, D] as the heads learned them."""
        return self.heads.target(pixels_of(pictures))


def pixels_of(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 [n, 3, h, w]"""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def centre_of(pixels: np.ndarray, colour: str) -> tuple[float, float]:
    """Where a thing of this colour is, in parts of the side, by the hue of pixels [3, h, w]."""
    hue = pixels / np.maximum(pixels.sum(axis=0), 1)
    wanted = np.array(COLOURS[colour]) / sum(COLOURS[colour])
    weights = np.exp(-(np.square(hue - wanted[:, None, None]).sum(axis=0) / 0.1**2)) + 1e-9
    rows, columns = ((np.arange(side) + 0.5) / side for side in weights.shape)
    total = weights.sum()
    return float((weights.sum(axis=0) * columns).sum() / total), float((weights.sum(axis=1) * rows).sum() / total)


def compared(found: dict[str, torch.Tensor], without: dict[str, torch.Tensor]) -> dict[str, tuple[Estimate, Estimate]]:
    """Of each measure, its mean over the photos and its paired difference to the pictures without guidance."""
    alike = torch.zeros(PHOTOS, dtype=torch.long)
    return {
        name: (jackknife(mean_of(values), alike), jackknife(mean_of(values - without[name]), alike))
        for name, values in found.items()
    }


def print_table(rows: dict[float, dict[str, tuple[Estimate, Estimate]]]) -> None:
    print(f"\n| strength | {' | '.join(MEASURES.values())} |\n|{'---|' * (len(MEASURES) + 1)}")
    for strength, row in rows.items():
        cells = [f"{own}{' *' if gap.is_significant else ''}" for own, gap in (row[name] for name in MEASURES)]
        print(f"| {strength:g} | {' | '.join(cells)} |")
    print("* differs from strength 0 by paired differences over the photos, 95 %\n")


if __name__ == "__main__":
    sys.exit(main())
