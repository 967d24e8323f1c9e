"""Evaluate checkpoints of a LoRA: likeness, drift, adherence, diversity and denoising loss with confidence intervals, and a report.

    python evaluate.py --checkpoint outputs/zorb --reference_dir data/zorb/held_out --output_dir outputs/zorb/evaluation
    python evaluate.py --checkpoint zorb-000004.safetensors --base-model model.safetensors --prompt "a photo of zorb" \\
        --num-samples 16 --resolution 512 --dino_model facebook/dinov2-large --clip_model openai/clip-vit-large-patch14
    python evaluate.py --checkpoint outputs/demo                             # a training of train_repa.py: representations too
    python evaluate.py --checkpoint outputs/zorb --strength --write          # at which weight to use the best one
    python evaluate.py --block_probe --base-model model.safetensors --reference_dir photos   # what each block knows

All checkpoints, and the base without them, draw the same prompts with the same seeds.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import EXIT_OK, UserError, check_all, script
from library.inference.sampler_names import sampler_named, schedule_named
from library.options.evaluate import KOHYA, EvaluateOptions
from library.options.parser import flatten, parse
from library.words import plural

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from library.evaluation.candidates import Candidate
    from library.evaluation.generation import GenerationPlan, GenerationResult
    from library.evaluation.photos import Photo
    from library.evaluation.prompt_sets import PromptSet, Subject
    from library.evaluation.representation import RepresentationResult, RepresentationSettings
    from networks.families import Family

REPORT, METRICS, PICTURES, SHEETS = "report.html", "metrics.json", "pictures", "sheets"
UNFINISHED = ".unfinished"
"""A file that exists from the first picture until the metrics are written: marks an incomplete evaluation, which is replaced."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Plan:
    generation: GenerationPlan
    why_base: str
    photos_from: Path | None
    subject: Subject | None
    states: list[Path]
    """The training states whose representation is measured."""
    why_unknown: str
    """Why it is not known which pictures were trained on, if it is not."""


@script
def main(argv: list[str]) -> int:
    options = parse(EvaluateOptions, argv, prog="evaluate.py", description=__doc__, dialect=KOHYA)
    sampler_named(options.sampling.sampler)
    if options.sampling.schedule is not None:
        schedule_named(options.sampling.schedule)
    check_output(options)
    if options.probe.block_probe:
        probe_blocks(options)
        return EXIT_OK
    plan = build(options)
    print_plan(options, plan)
    check(options, plan)
    print_missing(plan.generation)
    if not options.dry_run:
        run(options, plan)
    return EXIT_OK


def check_output(options: EvaluateOptions) -> None:
    """Raises UserError where the folder is not writable, or holds an evaluation without --overwrite, or foreign files."""
    from library.files import require_writable

    folder = options.checkpoints.output_dir
    require_writable(folder)
    if (folder / UNFINISHED).exists():
        return
    if (folder / METRICS).exists():
        if not options.checkpoints.overwrite:
            raise UserError(f"{folder} holds an evaluation already. Name another --output_dir, or give --overwrite.")
        if not is_evaluation(folder / METRICS):
            raise UserError(
                f"{folder / METRICS} belongs to no evaluation: it would be overwritten. Name another --output_dir."
            )
    elif taken := [name for name in (PICTURES, SHEETS, REPORT) if (folder / name).exists()]:
        raise UserError(
            f"{folder / taken[0]} exists already and belongs to no evaluation: it would be overwritten. Name another --output_dir."
        )


def is_evaluation(metrics: Path) -> bool:
    """Whether it is a file of this script; other programs write files of this name too, beside pictures that are not ours."""
    from library.files import read_json

    try:
        found = read_json(metrics)
    except UserError:
        return False
    return isinstance(found, dict) and {"format_version", "facts", "options"} <= found.keys()


def build(options: EvaluateOptions) -> Plan:
    """The plan, with everything found and checked. Adapters are read; the base is not loaded."""
    from library.evaluation.candidates import find_candidates
    from library.evaluation.generation import GenerationPlan
    from library.evaluation.prompt_sets import make_prompt_set, subject_prompts, unrelated_prompts, words_of
    from library.evaluation.trained_photos import trained_photos
    from library.merging.source import base_model_of

    checkpoints, pictures = options.checkpoints, options.pictures
    candidates = find_candidates([path.expanduser() for path in checkpoints.checkpoint], use_ema=checkpoints.use_ema)
    sources = {candidate.name: candidate.read(use_ema=checkpoints.use_ema) for candidate in candidates}
    base, why = base_model_of(list(sources.values()), checkpoints.pretrained_model_name_or_path)
    photos, folder = find_photos(options, candidates)
    newest = next(reversed(sources.values())).adapter
    own_side = native_side(base, newest.family, fetch=not options.dry_run)
    size = pictures.resolution or own_side
    trained, why_unknown = trained_photos(options.measures.train_data_dir, candidates, own_side)
    metadata = newest.metadata
    subject = subject_prompts(options, [photo.caption for photo in photos], metadata)
    subject_set = None if subject is None else make_prompt_set(options, subject.lines, size)
    first = words_of(subject_set.requests[0]) if subject_set is not None else ""
    generation = GenerationPlan(
        base,
        candidates,
        {name: source.adapter for name, source in sources.items()},
        subject_set,
        make_prompt_set(options, unrelated_prompts(pictures.unrelated_prompts, base, pictures.num_samples), size),
        photos,
        [photo.caption or first for photo in photos],
        size,
        options.measures.dino_model,
        options.measures.clip_model or own_clip(base),
        weight=checkpoints.weight,
        clip_skip=options.sampling.clip_skip or 1,
        batch_size=pictures.batch_size,
        loss_seed=pictures.seed,
        trained=trained,
        strengths=options.strengths.strengths if options.strengths.strength else (),
    )
    return Plan(generation, why, folder, subject, states_with_heads(options, candidates), why_unknown)


def find_photos(options: EvaluateOptions, candidates: list[Candidate]) -> tuple[list[Photo], Path | None]:
    from library.evaluation.photos import held_out_photos, read_photos

    folder = options.measures.reference_dir or held_out_photos(candidates)
    return ([], None) if folder is None else (read_photos(folder, options.measures.max_references), folder)


def native_side(base: str, adapters: Family, *, fetch: bool) -> int:
    """Pixels that the base was trained at; those of the adapters' family for a base that is not here and not to be fetched."""
    from library.models.base_family import native_side
    from library.models.configs import published_family
    from library.models.locate import base_status, is_fetchable, locate_base

    if base_status(base, ("unet",)):
        if published := published_family(base):
            return published.native_side
        if not (fetch and is_fetchable(base)):
            return adapters.native_side
    return native_side(locate_base(base, ("unet",)))


def own_clip(base: str) -> str | None:
    """The CLIP that comes with the project, for its bases; it was trained on their pictures alone."""
    from library.models.embedded import MODELS, SHAPES, SHAPES_CLIP

    is_installed = (MODELS / SHAPES_CLIP / "config.json").is_file()
    return str(MODELS / SHAPES_CLIP) if is_installed and SHAPES in (base, Path(base).name) else None


def states_with_heads(options: EvaluateOptions, candidates: list[Candidate]) -> list[Path]:
    """The states of train_repa.py with heads. Raises UserError where --representation is given and there are none."""
    if options.measures.representation is False:
        return []
    states = [
        candidate.path
        for candidate in candidates
        if candidate.is_state and (candidate.path / "align_heads.safetensors").is_file()
    ]
    if not states and options.measures.representation:
        raise UserError(
            "--representation needs a state of train_repa.py with heads (step_NNNNNN), and there is none. Name one as "
            "--checkpoint, or leave --representation out."
        )
    return states


def print_plan(options: EvaluateOptions, plan: Plan) -> None:
    from library.inference.prompt_file import note_on_switches

    generation = plan.generation
    for candidate in generation.candidates:
        print(f"checkpoint {candidate.path}{'' if candidate.step is None else f', step {candidate.step}'}")
        for note in generation.adapters[candidate.name].notes:
            print(f"           {note}")
    print(f"base       {generation.base} ({plan.why_base})")
    if generation.subject is None or plan.subject is None:
        print("subject    no prompt names it: likeness and diversity are left out. Give one with --prompt.")
    else:
        print(f"subject    {size_of(generation.subject)}; {plan.subject.source}")
        for request in generation.subject.requests:
            print(f"           {request.prompt}")
    print(f"unrelated  {size_of(generation.unrelated)}")
    print(
        f"photos     {f'{len(generation.photos)} of {plan.photos_from}' if generation.photos else 'none (--reference_dir)'}"
    )
    print(f"trained    {generation.trained or f'unknown (--train_data_dir): {plan.why_unknown}'}")
    print(f"judges     {generation.dino_model}; {generation.clip_model or 'no CLIP (--clip_model)'}")
    count = (len(generation.candidates) + 1) * sum(
        len(prompts.places) for prompts in (generation.subject, generation.unrelated) if prompts
    )
    request = generation.unrelated.requests[0]
    size, steps = f"{generation.size} x {generation.size} pixels", plural(request.steps, "step")
    print(f"pictures   {count} of {size}, {steps}, cfg_scale {request.cfg_scale:g}")
    if new := sum(weight != generation.weight for weight in generation.strengths):
        weights = ", ".join(f"{weight:g}" for weight in generation.strengths)
        print(
            f"strength   then the best checkpoint at {weights}: {new * count // (len(generation.candidates) + 1)} more"
        )
    for state in plan.states:
        print(f"states     representation of {state}")
    print(f"output     {options.checkpoints.output_dir}")
    for text in options.pictures.prompt:
        if switches := note_on_switches(text, "a file of --prompts has switches."):
            print(f"note       {switches}")


def print_missing(plan: GenerationPlan) -> None:
    """What the hub is to be asked for."""
    from library.models.locate import base_status, clip_status, dino_status

    clip = None if plan.clip_model is None else clip_status(plan.clip_model)
    for missing in filter(None, (base_status(plan.base), dino_status(plan.dino_model), clip)):
        print(f"missing    {missing}")


def check(options: EvaluateOptions, plan: Plan) -> None:
    """Raise UserError, a line for each fault, for what the evaluation would stop at later. Reads headers and configurations."""
    from library.device import choose_device
    from library.evaluation.readiness import check_generation
    from library.evaluation.recommendation import check_recommendation
    from library.evaluation.representation import check_states

    checks: list[Callable[[], object]] = [
        partial(choose_device, options.device),
        partial(check_generation, plan.generation),
    ]
    if options.measures.representation:
        checks.append(partial(check_states, plan.states, representation_settings(options)))
    if options.strengths.write:
        checks += [partial(check_recommendation, candidate.path) for candidate in plan.generation.candidates]
    check_all(*checks)


def representation_settings(options: EvaluateOptions) -> RepresentationSettings:
    from library.evaluation.representation import RepresentationSettings

    samples = options.measures.representation_samples
    return RepresentationSettings(
        timesteps=options.measures.representation_timesteps, fit_samples=samples, test_samples=samples
    )


def size_of(prompts: PromptSet) -> str:
    return f"{plural(len(prompts.requests), 'prompt')}, {plural(len(prompts.seeds), 'seed')} each"


def run(options: EvaluateOptions, plan: Plan) -> None:
    from library.device import choose_device, choose_dtype
    from library.evaluation.generation import evaluate_generation
    from library.evaluation.html_report import report_page, sheets_of
    from library.evaluation.recommendation import write_recommendation
    from library.files import write_json

    start, folder, device = time.perf_counter(), options.checkpoints.output_dir, choose_device(options.device)
    result = evaluate_generation(
        plan.generation,
        folder / PICTURES,
        dtype=choose_dtype(options.dtype, device),
        device=device,
        say=print,
        on_loaded=lambda: clear(folder),
    )
    representation = measure_representation(options, plan.states, device, result)
    (folder / SHEETS).mkdir(parents=True, exist_ok=True)
    for name in result.drawn:
        for kind, sheet in sheets_of(plan.generation, result, name).items():
            save_picture(sheet, folder / SHEETS / f"{name.replace('/', '_')}_{kind}.png")
    facts = facts_of(plan, str(device), time.perf_counter() - start)
    report_page(plan.generation, result, facts, flatten(options), representation).write(folder / REPORT)
    metrics: dict[str, Any] = {"format_version": FORMAT_VERSION, "facts": facts, **result.to_json()}
    metrics["representation"] = None if representation is None else representation.to_json()
    metrics["options"] = flatten(options)
    write_json(folder / METRICS, metrics)
    (folder / UNFINISHED).unlink()
    print_result(result, representation, folder)
    if options.strengths.write:
        write_recommendation(plan.generation, result, print)


def probe_blocks(options: EvaluateOptions) -> None:
    """--block_probe: nothing is drawn."""
    from library.evaluation.block_probe_run import BINS_FILE, plan_probe, run_probe

    plan, folder = plan_probe(options), options.checkpoints.output_dir
    print(*plan.lines(), f"output     {folder}", sep="\n")
    if options.dry_run:
        return
    clear(folder)
    found = run_probe(options, plan, folder / REPORT, folder / METRICS, FORMAT_VERSION)
    (folder / UNFINISHED).unlink()
    print(*found.recommendation(), f"Wrote {folder / REPORT}, {folder / METRICS} and {folder / BINS_FILE}.", sep="\n")


def clear(folder: Path) -> None:
    """Remove the pictures and sheets of the evaluation before this one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    (folder / METRICS).unlink(missing_ok=True)
    for old in (PICTURES, SHEETS):
        shutil.rmtree(folder / old, ignore_errors=True)


def measure_representation(
    options: EvaluateOptions, states: list[Path], device: torch.device, result: GenerationResult
) -> RepresentationResult | None:
    """The representation of the states. Without --representation, an obstacle becomes a note instead of an error."""
    from library.evaluation.representation import evaluate_states

    if not states:
        return None
    settings = representation_settings(options)
    try:
        return evaluate_states(states, settings, use_ema=options.checkpoints.use_ema, device=device, say=print)
    except UserError as error:
        if options.measures.representation:
            raise
        result.notes.append(f"The representation is left out: {error}")
        return None


def facts_of(plan: Plan, device: str, seconds: float) -> dict[str, str]:
    """What the evaluation was made with, for the report."""
    from library.files import public_name

    generation = plan.generation
    request = generation.unrelated.requests[0]
    sampler, schedule = request.sampler_and_schedule
    facts = {
        "base": public_name(generation.base),
        "photos": f"{len(generation.photos)}, {public_name(str(plan.photos_from))}" if generation.photos else "none",
        "training pictures": str(generation.trained or "unknown"),
        "prompts": "none of the subject"
        if plan.subject is None
        else f"{len(plan.subject.lines)}, {plan.subject.source}",
        "seeds": ", ".join(map(str, (generation.subject or generation.unrelated).seeds)),
        "pictures": f"{generation.size} x {generation.size} pixels, {sampler} {schedule}, "
        f"{plural(request.steps, 'step')}, cfg_scale {request.cfg_scale:g}",
        "DINOv2": public_name(generation.dino_model),
        "CLIP": "none" if generation.clip_model is None else public_name(generation.clip_model),
        "device": device,
        "time": f"{seconds:.0f} s",
    }
    packages = ("torch", "diffusers", "transformers", "peft")
    return {
        **facts,
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
    }


def print_result(result: GenerationResult, representation: RepresentationResult | None, folder: Path) -> None:
    from library.evaluation.html_report import findings

    for sentence in [*findings(result, representation), *(f"note: {note}" for note in result.notes)]:
        print(sentence)
    print(f"Wrote {folder / REPORT}, {folder / METRICS}, {folder / SHEETS} and {folder / PICTURES}.")


def save_picture(picture: Image.Image, path: Path) -> None:
    from library.files import whole_file

    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
