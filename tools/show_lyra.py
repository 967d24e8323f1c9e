"""What a Lyra keeps of CLIP, on tiny-shapes: cosines of decoded states, and pictures drawn from them beside CLIP's own.

    python tools/show_lyra.py

Trains outputs/lyra/lyra.safetensors first where it is not there. The figures are printed; the picture is docs/images/lyra.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import EXIT_OK, script

if TYPE_CHECKING:
    import torch
    from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 8


@script
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusion", type=Path, default=ROOT / "outputs/lyra/lyra.safetensors")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/lyra.png")
    parser.add_argument(
        "--seeds", type=int, default=2, help="pictures of each of the 16 classes, each way (default: 2)"
    )
    options = parser.parse_args(argv)
    if not options.fusion.exists():
        import train_lyra

        name, folder = options.fusion.stem, str(options.fusion.parent)
        if code := train_lyra.main(["--output_dir", folder, "--output_name", name]):
            return code
    show(options.fusion, options.picture, options.seeds)
    return EXIT_OK


def show(fusion: Path, picture: Path, seeds: int) -> None:
    """Print the figures, and write the picture."""
    import torch

    from library.data.caption_lists import demo_captions
    from library.data.demo_pictures import CLASSES
    from library.data.training_images import held_out
    from library.evaluation.picture_encoders import ClipPictures
    from library.files import whole_file
    from library.inference.drawing_model import load_model
    from library.inference.grids import grid
    from library.inference.picture_request import PictureRequest
    from library.inference.text_to_image import draw
    from library.models.conditioning import TextConditioner
    from library.models.embedded import SHAPES, SHAPES_CLIP
    from library.models.locate import locate_base
    from library.models.text_fusion import load_fusion
    from library.options.lyra import LyraDataOptions, LyraTrainingOptions
    from library.options.text_fusion import TextFusionOptions
    from library.progress import doing
    from library.training.lyra_task import mean_cosine

    model = load_model(locate_base(SHAPES), dtype=torch.float32, device="cpu")
    lyra = load_fusion(TextFusionOptions(fusion), model.family, model.parts, dtype=torch.float32, device="cpu")
    held = sorted(held_out(demo_captions(), LyraDataOptions.validation_split, LyraTrainingOptions.seed))
    for words, captions in (("held-out captions", held), ("the empty prompt", [""])):
        with torch.no_grad():
            own, decoded = (
                TextConditioner(model.family, model.parts, fusion=one)(captions).states for one in (None, lyra)
            )
        error = (own - decoded).square().mean() / own.var()
        print(
            f"{words} ({len(captions)}): cosine {mean_cosine(own, decoded):.4f}, squared error {error:.4f} of the variance"
        )

    prompts = [f"a photo of a {name}" for name in CLASSES]
    drawn: dict[str, list[Image.Image]] = {}
    with doing("drawing pictures", 2 * seeds * len(prompts)) as activity:
        for way, one in (("CLIP", None), ("fused", lyra)):
            model.fusion, drawn[way] = one, []
            for prompt in prompts:
                request = PictureRequest(prompt, "", steps=25, cfg_scale=5.0, width=128, height=128)
                drawn[way] += draw(model, request, range(seeds))
                activity.advance(seeds)
    clip = ClipPictures(SHAPES_CLIP, torch.device("cpu"))
    words, labels = clip.prompts(prompts), torch.arange(len(prompts)).repeat_interleave(seeds)
    for way, pictures in drawn.items():
        right = (clip.pictures(pictures) @ words.T).argmax(dim=1) == labels
        print(f"{way}: CLIP finds the class of {100 * right.float().mean():.0f} % of {len(pictures)} pictures among 16")
    one, other = (torch.stack([pixels_of(picture) for picture in drawn[way]]) for way in drawn)
    errors = (one - other).square().flatten(1).mean(dim=1)
    print(f"fused against CLIP, same seeds: PSNR {float((-10 * errors.log10()).median()):.1f} dB (median)")
    chosen = range(0, len(prompts) * seeds, max(1, len(prompts) * seeds // SHOWN))[:SHOWN]
    images = [drawn[way][place] for way in drawn for place in chosen]
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet = grid(
        images,
        columns=len(chosen),
        column_headings=[CLASSES[place // seeds] for place in chosen],
        row_headings=["CLIP's states", "fused"],
    )
    with whole_file(picture) as temporary:
        sheet.save(temporary, "PNG", optimize=True)
    print(f"{picture}: the same prompts and seeds, from CLIP's own states and from fused ones")


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """[H, W, 3] float32 between 0 and 1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
