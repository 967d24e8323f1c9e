"""Judge checkpoints of a LoRA: likeness, drift, adherence, diversity, denoising loss, each with its spread; a report to look at.

    python evaluate.py --checkpoint outputs/zorb --reference_dir data/zorb/held_out --output_dir outputs/zorb/evaluation
    python evaluate.py --checkpoint zorb-000004.safetensors --base-model model.safetensors --prompt "a photo of zorb" \\
        --num-samples 16 --resolution 512 --dino_model facebook/dinov2-large --clip_model openai/clip-vit-large-patch14
    python evaluate.py --checkpoint outputs/demo                             # a training of train_repa.py: representations too

All checkpoints, and the base without them, draw the same prompts with the same seeds.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import EXIT_OK, UserError, script
from library.inference.sampler_names import sampler_named, schedule_named
from library.options.evaluate import KOHYA, EvaluateOptions
from library.options.parser import flatten, parse

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from library.evaluation.checkpoints import Candidate
    from library.evaluation.generation import GenerationResult, Wanted
    from library.evaluation.photos import Photo
    from library.evaluation.prompts import Subject
    from library.evaluation.representation import RepresentationResult

REPORT, METRICS, PICTURES, SHEETS = "report.html", "metrics.json", "pictures", "sheets"
UNFINISHED = ".unfinished"
"""Stands in the folder from the first picture until the metrics: what lies beside it is an evaluation's, to be drawn again."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Plan:
    wanted: Wanted
    why_base: str
    photos_from: Path | None
    subject: Subject | None
    states: list[Path]
    """The training's states whose representation is measured."""


@script
def main(argv: list[str]) -> int:
    options = parse(EvaluateOptions, argv, prog="evaluate.py", description=__doc__, dialect=KOHYA)
    sampler_named(options.sampling.sampler)
    if options.sampling.schedule is not None:
        schedule_named(options.sampling.schedule)
    check_output(options)
    plan = build(options)
    print_plan(options, plan)
    if not options.dry_run:
        run(options, plan)
    return EXIT_OK


def check_output(options: EvaluateOptions) -> None:
    """Raises UserError where the folder cannot be written to, or holds an evaluation that is to stay, or files of others."""
    from library.files import require_writable

    folder = options.judged.output_dir
    require_writable(folder)
    if (folder / UNFINISHED).exists():
        return
    if (folder / METRICS).exists():
        if not options.judged.overwrite:
            raise UserError(f"{folder} holds an evaluation already. Name another --output_dir, or give --overwrite.")
    elif taken := [name for name in (PICTURES, SHEETS, REPORT) if (folder / name).exists()]:
        raise UserError(
            f"{folder / taken[0]} is there already and no evaluation's: it would be overwritten. Name another --output_dir."
        )


def build(options: EvaluateOptions) -> Plan:
    """Everything that is wanted, found and checked; the adapters are read, the base is not."""
    from library.evaluation.checkpoints import find_candidates
    from library.evaluation.generation import Wanted
    from library.evaluation.prompts import subject_prompts, task_of, unrelated_prompts, words_of
    from library.merging.source import base_model_of

    judged, drawn = options.judged, options.drawn
    candidates = find_candidates([path.expanduser() for path in judged.checkpoint], use_ema=judged.use_ema)
    sources = {one.name: one.read(use_ema=judged.use_ema) for one in candidates}
    base, why = base_model_of(list(sources.values()), judged.pretrained_model_name_or_path)
    photos, folder = find_photos(options, candidates)
    size = drawn.resolution or native_side(base)
    metadata = next(reversed(sources.values())).adapter.metadata
    subject = subject_prompts(options, [photo.caption for photo in photos], metadata)
    task = None if subject is None else task_of(options, subject.lines, size)
    first = words_of(task.requests[0]) if task is not None else ""
    wanted = Wanted(
        base,
        candidates,
        {name: source.adapter for name, source in sources.items()},
        task,
        task_of(options, unrelated_prompts(drawn.unrelated_prompts, base, drawn.num_samples), size),
        photos,
        [photo.caption or first for photo in photos],
        size,
        options.measured.dino_model,
        options.measured.clip_model or own_clip(base),
        weight=judged.weight,
        clip_skip=options.sampling.clip_skip or 1,
        batch_size=drawn.batch_size,
        loss_seed=drawn.seed,
    )
    return Plan(wanted, why, folder, subject, states_with_heads(options, candidates))


def find_photos(options: EvaluateOptions, candidates: list[Candidate]) -> tuple[list[Photo], Path | None]:
    from library.evaluation.photos import held_out_photos, read_photos

    folder = options.measured.reference_dir or held_out_photos(candidates)
    return ([], None) if folder is None else (read_photos(folder, options.measured.max_references), folder)


def native_side(base: str) -> int:
    """Pixels that the base was trained at."""
    from library.models.base_family import native_side
    from library.models.configs import published_family
    from library.models.locate import base_status, locate_base

    published = published_family(base) if base_status(base, ("unet",)) else None
    return native_side(locate_base(base, ("unet",))) if published is None else published.native_side


def own_clip(base: str) -> str | None:
    """The CLIP that comes with the project, for bases that do; it knows nothing else."""
    from library.models.embedded import MODELS, SHAPES, SHAPES_CLIP

    there = (MODELS / SHAPES_CLIP / "config.json").is_file()
    return str(MODELS / SHAPES_CLIP) if there and SHAPES in (base, Path(base).name) else None


def states_with_heads(options: EvaluateOptions, candidates: list[Candidate]) -> list[Path]:
    """Those of train_repa.py. Raises UserError where --representation asks for them and there are none."""
    if options.measured.representation is False:
        return []
    states = [one.path for one in candidates if one.is_state and (one.path / "align_heads.safetensors").is_file()]
    if not states and options.measured.representation:
        raise UserError(
            "--representation is for states of train_repa.py with heads (step_NNNNNN), and none was named. Name one as "
            "--checkpoint, or leave --representation out."
        )
    return states


def print_plan(options: EvaluateOptions, plan: Plan) -> None:
    from library.models.locate import base_status, clip_status, dino_status

    wanted = plan.wanted
    for one in wanted.candidates:
        print(f"checkpoint {one.path}{'' if one.step is None else f', step {one.step}'}")
    print(f"base       {wanted.base} ({plan.why_base})")
    if wanted.subject is None or plan.subject is None:
        print("subject    no prompt for it: likeness and diversity are left out. Name it with --prompt.")
    else:
        print(
            f"subject    {len(wanted.subject.requests)} prompts ({plan.subject.why}), {len(wanted.subject.seeds)} seeds each"
        )
        for request in wanted.subject.requests:
            print(f"           {request.prompt}")
    print(f"unrelated  {len(wanted.unrelated.requests)} prompts, {len(wanted.unrelated.seeds)} seeds each")
    print(f"photos     {f'{len(wanted.photos)} of {plan.photos_from}' if wanted.photos else 'none (--reference_dir)'}")
    print(f"judges     {wanted.dino_model}; {wanted.clip_model or 'no CLIP (--clip_model)'}")
    count = (len(wanted.candidates) + 1) * sum(len(task.places) for task in (wanted.subject, wanted.unrelated) if task)
    request = wanted.unrelated.requests[0]
    print(
        f"pictures   {count} of {wanted.size} x {wanted.size}, {request.steps} steps, cfg_scale {request.cfg_scale:g}"
    )
    for state in plan.states:
        print(f"states     representation of {state}")
    print(f"output     {options.judged.output_dir}")
    clip = None if wanted.clip_model is None else clip_status(wanted.clip_model)
    for missing in filter(None, (base_status(wanted.base), dino_status(wanted.dino_model), clip)):
        print(f"missing    {missing}")


def run(options: EvaluateOptions, plan: Plan) -> None:
    from library.device import choose_device, choose_dtype
    from library.evaluation.generation import evaluate_generation
    from library.evaluation.html_report import report_page, sheets_of
    from library.files import write_json

    start, folder, device = time.perf_counter(), options.judged.output_dir, choose_device(options.device)
    result = evaluate_generation(
        plan.wanted,
        folder / PICTURES,
        dtype=choose_dtype(options.dtype, device),
        device=device,
        say=print,
        on_loaded=lambda: clear(folder),
    )
    representation = measure_representation(options, plan.states, device, result)
    (folder / SHEETS).mkdir(parents=True, exist_ok=True)
    for name in result.drawn:
        for kind, sheet in sheets_of(plan.wanted, result, name).items():
            save_picture(sheet, folder / SHEETS / f"{name.replace('/', '_')}_{kind}.png")
    facts = facts_of(plan, str(device), time.perf_counter() - start)
    report_page(plan.wanted, result, facts, flatten(options), representation).write(folder / REPORT)
    metrics: dict[str, Any] = {"format_version": FORMAT_VERSION, "facts": facts, **result.to_json()}
    metrics["representation"] = None if representation is None else representation.to_json()
    metrics["options"] = flatten(options)
    write_json(folder / METRICS, metrics)
    (folder / UNFINISHED).unlink()
    print_result(result, folder)


def clear(folder: Path) -> None:
    """Take away what an evaluation left in the folder, before another begins there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    (folder / METRICS).unlink(missing_ok=True)
    for old in (PICTURES, SHEETS):
        shutil.rmtree(folder / old, ignore_errors=True)


def measure_representation(
    options: EvaluateOptions, states: list[Path], device: torch.device, result: GenerationResult
) -> RepresentationResult | None:
    """Where it was not asked for, what stands in its way is noted instead of ending the run."""
    from library.evaluation.representation import RepresentationSettings, evaluate_states

    if not states:
        return None
    samples = options.measured.representation_samples
    settings = RepresentationSettings(
        timesteps=options.measured.representation_timesteps, fit_samples=samples, test_samples=samples
    )
    try:
        return evaluate_states(states, settings, use_ema=options.judged.use_ema, device=device, say=print)
    except UserError as error:
        if options.measured.representation:
            raise
        result.notes.append(f"The representation is left out: {error}")
        return None


def facts_of(plan: Plan, device: str, seconds: float) -> dict[str, str]:
    """What is to be known of how the numbers came about."""
    from library.files import public_name

    wanted = plan.wanted
    request = wanted.unrelated.requests[0]
    sampler, schedule = request.sampler_and_schedule
    facts = {
        "base": public_name(wanted.base),
        "photos": f"{len(wanted.photos)}, {public_name(str(plan.photos_from))}" if wanted.photos else "none",
        "prompts": "none of the subject" if plan.subject is None else f"{len(plan.subject.lines)}, {plan.subject.why}",
        "seeds": ", ".join(map(str, (wanted.subject or wanted.unrelated).seeds)),
        "pictures": f"{wanted.size} x {wanted.size}, {sampler} {schedule}, {request.steps} steps, cfg_scale {request.cfg_scale:g}",
        "DINOv2": public_name(wanted.dino_model),
        "CLIP": "none" if wanted.clip_model is None else public_name(wanted.clip_model),
        "device": device,
        "time": f"{seconds:.0f} s",
    }
    packages = ("torch", "diffusers", "transformers", "peft")
    return {
        **facts,
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
    }


def print_result(result: GenerationResult, folder: Path) -> None:
    from library.evaluation.html_report import findings

    for sentence in [*findings(result), *(f"note: {note}" for note in result.notes)]:
        print(sentence)
    print(f"Wrote {folder / REPORT}, {folder / METRICS}, {folder / SHEETS} and {folder / PICTURES}.")


def save_picture(picture: Image.Image, path: Path) -> None:
    from library.files import whole_file

    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
