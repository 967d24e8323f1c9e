"""How strong a model's latents are beside those that its teacher drew: whether it learned from wrongly scaled ones.

    python tools/flow_latent_gain.py data/drawn --model student --prediction_type flow_prediction

The model draws the prompts and seeds of a store of prepare_cache.py --teacher_latents. Where its latents are k times the teacher's,
it is as if its shift had been divided by k, and generate.py --latent_multiplier 1/k makes up for the rest (docs/flow.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import EXIT_OK, script
from library.files import write_json
from library.options.checks import positive

if TYPE_CHECKING:
    from library.data.teacher_latents import Spread

BATCH = 4


@script
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flow_latent_gain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="of prepare_cache.py --teacher_latents")
    parser.add_argument("--model", required=True, help="base model, as --pretrained_model_name_or_path")
    parser.add_argument("--lora", type=Path, help="an adapter that is folded into it")
    parser.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction", "flow_prediction"), help="of the model"
    )
    parser.add_argument("--flow_shift", type=float, help="of the levels; default: the model's own")
    parser.add_argument("--sampler", default="Euler", help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="default: as many as the teacher had")
    parser.add_argument("--count", type=int, default=16, help="latents to draw (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args(argv)
    for name in ("flow_shift", "steps", "count"):
        positive(name, getattr(options, name))
    teacher, student = drawn_by_both(options)
    found = gain(teacher, student)
    print("channel  teacher  student  gain")
    for channel, (one, other) in enumerate(zip(teacher.deviations, student.deviations, strict=True)):
        print(f"{channel:7}  {one:7.3f}  {other:7.3f}  {one / other:.3f}")
    print(f"all      {teacher.deviation:7.3f}  {student.deviation:7.3f}  {found['gain']:.3f}")
    print(
        f"The latents of {options.model} are {found['k']:.3f} times the teacher's: --latent_multiplier {found['gain']:.3f} makes "
        f"up for that when drawing, and their scale is a shift of {found['shift']:.3f}, over the one it was trained with."
    )
    if options.output is not None:
        write_json(options.output, found)
    return EXIT_OK


def drawn_by_both(options: argparse.Namespace) -> tuple[Spread, Spread]:
    """Spread of the teacher's latents and of the model's, of the same prompts and seeds. Raises UserError for what does not fit."""
    import numpy as np
    import torch

    from library.data.teacher_latents import Spread, open_teacher_latents, spread_of
    from library.inference.drawing_model import load_model
    from library.inference.picture_request import PictureRequest
    from library.merging.merge import fold_into_modules
    from library.merging.source import read_source
    from library.models.conditioning import TextConditioner
    from library.models.locate import locate_base
    from library.progress import doing
    from library.training.teacher_latents import draw_latents
    from networks.families import UNET

    latents = open_teacher_latents(options.store)
    names = list(latents.drawn)
    names = [
        names[place] for place in np.unique(np.linspace(0, len(names) - 1, min(options.count, len(names))).astype(int))
    ]
    made = latents.producer
    with doing("loading the model"):
        model = load_model(
            locate_base(options.model), dtype=torch.float32, device="cpu", prediction_type=options.prediction_type
        )
        if options.lora is not None:
            models = {UNET: model.unet, **{part.component: part.model for part in model.parts}}
            fold_into_modules(models, model.family, read_source(options.lora).adapter, 1.0)
    channels, rows, columns = latents.store.meta.shape
    request = PictureRequest(
        *("", "", options.steps or made["steps"], made["cfg_scale"], columns * model.factor, rows * model.factor),
        sampler=options.sampler,
        flow_shift=options.flow_shift,
    )
    request.sampler_and_schedule  # noqa: B018
    conditioner = TextConditioner(model.family, model.parts, clip_skip=made["clip_skip"], chunks=made["chunks"])
    teacher, student = spread_of(latents.store, names), Spread(channels)
    with doing("drawing latents", len(names)) as activity:
        for start in range(0, len(names), BATCH):
            drawn = [latents.drawn[name] for name in names[start : start + BATCH]]
            student.add(draw_latents(model, request, conditioner, drawn).cpu().numpy())
            activity.advance(len(drawn))
    latents.close()
    return teacher, student


def gain(teacher: Spread, student: Spread) -> dict[str, object]:
    """k, how many times the teacher's latents the student's are; the gain 1 / k that undoes it; and the shift that k acts like.

    A model trained on k-scaled latents is at the noise level sigma / (1 - sigma) what one of unscaled ones is at 1 / k of it.
    """
    k = student.deviation / teacher.deviation
    channels = (teacher.deviations / student.deviations).tolist()
    return {"k": k, "gain": 1 / k, "shift": 1 / k, "gain_by_channel": channels, "latents": student.entries}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
