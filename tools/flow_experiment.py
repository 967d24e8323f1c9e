"""Four ways from one base to a rectified flow, after equal steps on the same latents: which one draws what it is asked for?

    python tools/flow_experiment.py

A bridge and three native students, on tiny-shapes. The project's own scripts draw latents and train in outputs/flow_experiment; run
again, it goes on. results.json, a table and a sheet of pictures come out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import EXIT_OK, RunFailed, script
from library.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from library.evaluation.denoising import EncodedPhotos
    from library.inference.drawing_model import DrawingModel

ROOT = Path(__file__).resolve().parents[1]
SIDE, RENDERS, SIGMAS = 128, 2, 12
MEASURED = "measured.json"
LORA = ("--network_dim", "16", "--network_alpha", "16", "--network_train_unet_only")
PARTS = ("--train_parts", "time_embedding", "conv_in", "conv_out")


@dataclass(frozen=True)
class Arm:
    """One training. words: of train_network.py, beside what all have."""

    name: str
    title: str
    words: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        return "native" in self.words


ARMS = (
    Arm("bridge", "bridge, LoRA", ("--flow_model",)),
    Arm("native", "native, LoRA", ("--flow_mode", "native")),
    Arm("native_parts", "native, LoRA and train_parts", ("--flow_mode", "native", *PARTS)),
    Arm("native_kd", "native, LoRA and train_parts, kd", ("--flow_mode", "native", *PARTS, "--flow_target", "kd")),
)


@script
def main(argv: list[str]) -> int:
    options = parsed(argv)
    out = options.out.resolve()
    prompts = out / "prompts.txt"
    from library.data.demo_pictures import CLASSES

    write_text(prompts, "".join(f"a {kind}\n" for kind in CLASSES))
    call(draw_command(options, out, prompts), out / "teacher.log")
    for arm in ARMS:
        if not (out / arm.name / "student.safetensors").exists():
            print(f"training   {arm.title}", flush=True)
            call(train_command(arm, options, out), out / f"{arm.name}.log")
    results = measure_all(options, out, CLASSES)
    write_json(out / "results.json", results)
    print(table(results))
    print(f"numbers    {out / 'results.json'}\npictures   {out / 'pictures.png'}")
    return EXIT_OK


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flow_experiment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="tiny-shapes", help="teacher and student (%(default)s)")
    parser.add_argument("--latents", type=int, default=8, help="drawn of each of the 16 prompts (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each training (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="(%(default)s)")
    parser.add_argument(
        "--cfg_scale", type=float, default=3.0, help="of teacher and students when drawing (%(default)s)"
    )
    parser.add_argument("--sampling_steps", type=int, default=15, help="of teacher and students (%(default)s)")
    parser.add_argument("--drawn", type=int, default=2, help="pictures of each prompt (%(default)s)")
    parser.add_argument(
        "--reader_steps", type=int, default=400, help="steps of the classifier's training (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of training (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "flow_experiment", help="everything is kept here"
    )
    return parser.parse_args(argv)


def draw_command(options: argparse.Namespace, out: Path, prompts: Path) -> list[str]:
    return [
        *(
            sys.executable,
            "prepare_cache.py",
            "--pretrained_model_name_or_path",
            options.base,
            "--mixed_precision",
            "no",
        ),
        *(
            "--teacher_latents",
            str(out / "teacher"),
            "--teacher_prompts",
            str(prompts),
            "--cache_dir",
            str(out / "caches"),
        ),
        *("--teacher_images", str(options.latents), "--teacher_steps", str(options.sampling_steps)),
        *("--teacher_cfg", str(options.cfg_scale), "--teacher_sampler", "Euler", "--verify"),
    ]


def train_command(arm: Arm, options: argparse.Namespace, out: Path) -> list[str]:
    return [
        *(
            sys.executable,
            "train_network.py",
            "--pretrained_model_name_or_path",
            options.base,
            "--mixed_precision",
            "no",
        ),
        *("--teacher_latents", str(out / "teacher"), "--cache_dir", str(out / "caches"), *LORA, *arm.words),
        *("--max_train_steps", str(options.steps), "--train_batch_size", str(options.batch_size)),
        *("--learning_rate", str(options.learning_rate), "--lr_scheduler", "cosine", "--caption_dropout_rate", "0.1"),
        *("--seed", str(options.seed), "--output_dir", str(out / arm.name), "--output_name", "student"),
    ]


def call(command: Sequence[str], log: Path) -> None:
    """Run one of the project's scripts. Raises RunFailed with its last words where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = " ".join(log.read_text(encoding="utf-8").splitlines()[-2:])
        raise RunFailed(f"{command[1]} ended with exit code {code}: {last} All it said is in {log}.")


def measure_all(options: argparse.Namespace, out: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Of the untouched base along its bridge and of each arm: the share of pictures that show what was asked for, and the loss.

    What was measured before is not measured again.
    """
    from PIL import Image

    from library.data.teacher_latents import open_teacher_latents
    from library.inference.grids import grid
    from tools.alignment_study.reader import share_right, trained_reader

    reader, right = trained_reader(out / "reader.pt", options.reader_steps)
    teacher = open_teacher_latents(out / "teacher")
    statistics = teacher.producer["statistics"]
    teacher.close()
    rows: dict[str, Any] = {}
    sheet = []
    for name, title, native in measured():
        if not (out / name / MEASURED).exists():
            print(f"measuring  {title}", flush=True)
            measure(options, kinds, out / name, native=native)
        drawn = [
            Image.open(picture_file(out / name, kind, seed)).convert("RGB") for kind in kinds for seed in seeds(options)
        ]
        shown = [kind for kind in kinds for _ in seeds(options)]
        rows[name] = {"title": title, "right": share_right(reader, drawn, shown), **read_json(out / name / MEASURED)}
        sheet += drawn[:: 2 * options.drawn]
    titles = [row["title"] for row in rows.values()]
    columns = len(kinds[::2])
    grid(sheet, columns, column_headings=list(kinds[::2]), row_headings=titles).save(
        out / "pictures.png", optimize=True
    )
    facts = {key: value for key, value in vars(options).items() if key != "out"}
    return {"settings": facts, "reader_right": right, "chance": 1 / len(kinds), "teacher": statistics, "arms": rows}


def measured() -> list[tuple[str, str, bool]]:
    """Folder, title, and whether it is drawn as a native flow, of the arms and of the base before any of them."""
    untouched = [("base", "the base, by its bridge", False), ("base_native", "the base, as if it were native", True)]
    return [*untouched, *((arm.name, arm.title, arm.is_native) for arm in ARMS)]


def measure(options: argparse.Namespace, kinds: Sequence[str], folder: Path, *, native: bool) -> None:
    """Draw pictures into the folder, with the adapter that is there, if one is, and write the loss there, last."""
    import torch

    from library.evaluation.denoising import encode_photos
    from library.inference.drawing_model import load_model
    from library.merging.merge import fold_into_modules
    from library.merging.source import read_source
    from library.models.locate import locate_base
    from networks.families import UNET

    prediction_type = "flow_prediction" if native else None
    model = load_model(locate_base(options.base), dtype=torch.float32, device="cpu", prediction_type=prediction_type)
    photos = encode_photos(model, *renders(kinds), SIDE)
    if (file := folder / "student.safetensors").exists():
        fold_into_modules({UNET: model.unet}, model.family, read_source(file).adapter, 1.0)
    draw_all(model, options, kinds, folder)
    write_json(folder / MEASURED, {"loss": flow_loss(model, photos)})


def renders(kinds: Sequence[str]) -> tuple[list[Any], list[str], list[str]]:
    """Pictures that no arm has seen, their captions and their names."""
    import random

    from library.data.demo_pictures import draw, imagine

    names = [f"{kind} {number}" for kind in kinds for number in range(RENDERS)]
    pictures = [draw(imagine(name.rpartition(" ")[0], random.Random(f"flow {name}")), SIDE) for name in names]
    return pictures, [f"a {name.rpartition(' ')[0]}" for name in names], names


def draw_all(model: DrawingModel, options: argparse.Namespace, kinds: Sequence[str], folder: Path) -> None:
    """Pictures of each kind, by Euler's steps along the flow."""
    from library.inference.picture_request import PictureRequest
    from library.inference.text_to_image import draw

    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        if all(picture_file(folder, kind, seed).exists() for seed in seeds(options)):
            continue
        request = PictureRequest(
            f"a {kind}", "", options.sampling_steps, options.cfg_scale, SIDE, SIDE, sampler="Euler", flow_shift=1.0
        )
        for seed, picture in zip(seeds(options), draw(model, request, seeds(options)), strict=True):
            picture.save(picture_file(folder, kind, seed))


def seeds(options: argparse.Namespace) -> list[int]:
    """Of the drawn pictures of each kind: others than the teacher's."""
    return list(range(1000, 1000 + options.drawn))


def picture_file(folder: Path, kind: str, seed: int) -> Path:
    return folder / f"{kind.replace(' ', '_')}_{seed}.png"


def flow_loss(model: DrawingModel, photos: EncodedPhotos) -> float:
    """Mean squared error of the velocity at sigmas that every arm knows, evenly spread, with noise by picture."""
    import torch

    from library.diffusion.bridge import Bridge, along_flow
    from library.models.conditioning import TextConditioner
    from library.training.randomness import sample_noise

    path, total = along_flow(model.parametrisation), 0.0
    texts, highest = TextConditioner(model.family, model.parts), 0.93
    sigmas = (torch.arange(SIGMAS) + 0.5) / SIGMAS * highest
    for latents, prompt, name in zip(photos.latents, photos.prompts, photos.ids, strict=True):
        with torch.no_grad():
            states = texts([prompt]).states.expand(SIGMAS, -1, -1)
            noise = sample_noise(0, [f"{name}/{number}" for number in range(SIGMAS)], tuple(latents.shape))
            x = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
            seen, timesteps = path.seen(x, sigmas) if isinstance(path, Bridge) else (x, path.timesteps_of(sigmas))
            output = model.unet(seen, timesteps, encoder_hidden_states=states).sample
            velocity = path.velocity(output, x, sigmas) if isinstance(path, Bridge) else output
            total += float((velocity - (noise - latents)).square().mean())
    return total / len(photos.ids)


def table(results: Mapping[str, Any]) -> str:
    lines = ["| | drawn right | velocity loss |", "|---|---|---|"]
    lines += [f"| {row['title']} | {row['right']:.0%} | {row['loss']:.3f} |" for row in results["arms"].values()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
