"""What a Lyra keeps of CLIP, on tiny-shapes: cosines of decoded states, and pictures drawn from them beside CLIP's own.

    python tools/show_lyra.py

Trains outputs/lyra/lyra.safetensors first where it is not there. The figures are printed; the picture is docs/images/lyra.jpg.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import EXIT_OK, script

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from library.inference.drawing_model import DrawingModel
    from library.models.text_fusion import TextFusion

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("CLIP's states", "fused states")
COLUMNS = 8


@script
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusion", type=Path, default=ROOT / "outputs/lyra/lyra.safetensors")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/lyra.jpg")
    parser.add_argument(
        "--seeds", type=int, default=2, help="pictures of each of the 16 classes, each way (default: 2)"
    )
    options = parser.parse_args(argv)
    if not options.fusion.exists():
        import train_lyra

        name, folder = options.fusion.stem, str(options.fusion.parent)
        if code := train_lyra.main(["--output_dir", folder, "--output_name", name]):
            return code
    import torch

    from library.data.demo_pictures import CLASSES
    from library.inference.drawing_model import load_model
    from library.models.embedded import SHAPES
    from library.models.locate import locate_base
    from library.models.text_fusion import load_fusion
    from library.options.text_fusion import TextFusionOptions

    model = load_model(locate_base(SHAPES), dtype=torch.float32, device="cpu")
    named = TextFusionOptions(options.fusion)
    lyra = load_fusion(named, model.family, model.parts, dtype=torch.float32, device="cpu")
    assert lyra is not None
    print_cosines(model, lyra)
    drawn = draw_both(model, lyra, [f"a photo of a {name}" for name in CLASSES], options.seeds)
    print_judgement(drawn, options.seeds)
    write_sheet(drawn, options.seeds, options.picture)
    return EXIT_OK


def print_cosines(model: DrawingModel, lyra: TextFusion) -> None:
    """How near decoded states come to CLIP's, on captions that the training held out, and of the empty prompt."""
    import torch

    from library.data.caption_lists import demo_captions
    from library.data.training_images import held_out
    from library.models.conditioning import TextConditioner
    from library.options.lyra import LyraDataOptions, LyraTrainingOptions
    from library.training.lyra_task import mean_cosine

    held = sorted(held_out(demo_captions(), LyraDataOptions.validation_split, LyraTrainingOptions.seed))
    for what, captions in ((f"{len(held)} held-out captions", held), ("the empty prompt", [""])):
        with torch.no_grad():
            own = TextConditioner(model.family, model.parts)(captions).states
            decoded = TextConditioner(model.family, model.parts, fusion=lyra)(captions).states
        error = (own - decoded).square().mean() / own.var()
        print(f"{what}: cosine {mean_cosine(own, decoded):.4f}, squared error {error:.4f} of the variance")


def draw_both(model: DrawingModel, lyra: TextFusion, prompts: list[str], seeds: int) -> list[list[Image.Image]]:
    """The same prompts and seeds, by CLIP's states and by fused ones; of each prompt all seeds together."""
    from library.inference.picture_request import PictureRequest
    from library.inference.text_to_image import draw
    from library.progress import doing

    drawn: list[list[Image.Image]] = []
    with doing("drawing pictures", len(WAYS) * seeds * len(prompts)) as activity:
        for fusion in (None, lyra):
            model.fusion = fusion
            drawn.append([])
            for prompt in prompts:
                drawn[-1] += draw(model, PictureRequest(prompt, "", 25, 5.0, 128, 128), range(seeds))
                activity.advance(seeds)
    return drawn


def print_judgement(drawn: list[list[Image.Image]], seeds: int) -> None:
    """In how many pictures tiny-shapes' CLIP finds the class, and how alike the pictures of both ways are."""
    import torch

    from library.data.demo_pictures import CLASSES
    from library.evaluation.picture_encoders import ClipPictures
    from library.models.embedded import SHAPES_CLIP

    clip = ClipPictures(SHAPES_CLIP, torch.device("cpu"))
    words = clip.prompts([f"a photo of a {name}" for name in CLASSES])
    labels = torch.arange(len(CLASSES)).repeat_interleave(seeds)
    for way, pictures in zip(WAYS, drawn, strict=True):
        right = (clip.pictures(pictures) @ words.T).argmax(dim=1) == labels
        print(f"{way}: CLIP finds the class of {int(right.sum())} of {len(pictures)} pictures among {len(CLASSES)}")
    one, other = (torch.stack([pixels_of(picture) for picture in pictures]) for pictures in drawn)
    errors = (one - other).square().flatten(1).mean(dim=1)
    print(f"the same prompts and seeds, both ways: PSNR {float((-10 * errors.log10()).median()):.1f} dB (median)")


def write_sheet(drawn: list[list[Image.Image]], seeds: int, path: Path) -> None:
    """Every other class both ways, the first seed of each."""
    from library.data.demo_pictures import CLASSES
    from library.files import whole_file
    from library.inference.grids import grid

    chosen = range(0, len(CLASSES), len(CLASSES) // COLUMNS)
    sheet = grid(
        [pictures[place * seeds] for pictures in drawn for place in chosen],
        columns=len(chosen),
        column_headings=[CLASSES[place] for place in chosen],
        row_headings=WAYS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        sheet.save(temporary, "JPEG", quality=90)
    print(path)


def pixels_of(picture: Image.Image) -> Tensor:
    """[H, W, 3] float32 between 0 and 1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
