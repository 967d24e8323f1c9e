"""Checks before a run begins and before hours of caching: inputs, base, optimizer, output. Only check_start imports torch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from library.errors import UserError, check_all
from library.options.checks import OptionError
from library.options.kohya.watching import SampleOptions
from library.options.run import RunOptions
from networks.families import SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, Family

if TYPE_CHECKING:
    from library.models.locate import BaseLocation
    from library.processes import Processes


def check_inputs(options: RunOptions) -> None:
    """Look at what a training needs and will write, as far as files and folders tell, which takes no second.

    Raises UserError with a line for each thing that will not do.
    """
    check_all(*input_checks(options), *output_checks(options))


def input_checks(options: RunOptions, *, planning: bool = False) -> list[Callable[[], object]]:
    """Whether base, teacher and pictures are where they should be.

    planning: without class pictures whose number is known, which a plan can do without.
    """
    from library.data.class_pictures import check_pictures
    from library.data.collect import read_datasets
    from library.data.teacher_latents import open_teacher_latents
    from library.diffusion.level_accuracy import LevelAccuracy
    from library.models.locate import check_base, check_dino
    from library.models.lone_vae import check_vae_name
    from library.options.kohya.dataset import DEMO_DATA

    model, classes = options.model, options.class_pictures
    checks: list[Callable[[], object]] = [
        lambda: check_sampler(options.samples),
        lambda: check_base(model.pretrained_model_name_or_path, base_components(options)),
    ]
    if (vae := model.vae) is not None:
        checks.append(lambda: check_vae_name(vae))
    if (file := options.bins.timestep_bin_file) is not None:
        checks.append(partial(LevelAccuracy.read, file, options.bins.timestep_bin_min_acc))
    if options.alignment.needs_teacher:
        checks += [partial(check_dino, name) for name in model.dino_model]
    if (teacher := options.teacher) is not None:
        checks.append(lambda: open_teacher_latents(cast(Path, teacher.teacher_latents)).close())
    elif classes is None and not options.uses_demo:
        checks.append(lambda: read_datasets(options, native_side=SD15.native_side))
    elif classes is not None and classes.train_data != DEMO_DATA and not (planning and classes.max_train_samples):
        checks.append(lambda: check_pictures(classes))
    return checks


def output_checks(options: RunOptions) -> list[Callable[[], object]]:
    """Whether all that the run leaves can be written, and replaces nothing of another run."""
    from library.files import require_writable
    from library.training.earlier import check_earlier

    output, folders = options.output, [options.output.output_dir, options.cache.cache_dir]
    if output.logging_dir is not None or output.output_dir.is_dir():
        folders.append(options.metrics_folder(datetime.now()))
    checks: list[Callable[[], object]] = [partial(require_writable, folder) for folder in dict.fromkeys(folders)]
    return [*checks, lambda: check_names(options), lambda: check_earlier(options)]


def check_names(options: RunOptions) -> None:
    """Raise UserError where the file system does not take the longest name of the run, or a folder has that of a file."""
    from library.files import require_file_name, require_writable
    from library.training.saving import sample_name, saving_of

    output, saving = options.output, saving_of(options.output)
    others = (output.output_dir / name for name in (".lock", "metrics.jsonl", "options.toml"))
    for path in (*saving.adapters_there(), *others):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file of the run is to be called so. Move it away.")
    require_file_name(output.output_dir / saving.longest_name(options.optimizer.ema_decay > 0))
    logs = options.metrics_folder(datetime.now())
    for folder in (logs, logs.parent):
        require_file_name(folder)
    if options.samples.sample_prompts is not None:
        samples = output.output_dir / "sample"
        if samples.exists():
            require_writable(samples)
        require_file_name(samples / sample_name(output.output_name, "e000000", 0, 2**63 - 1))


def family_note(options: RunOptions, family: Family) -> str | None:
    """What to say where --sdxl means another family than the base's own, by which it is trained."""
    said, name = options.model.sdxl, options.model.pretrained_model_name_or_path
    if said is None or said == (family is SDXL):
        return None
    return f"note: sdxl is {str(said).lower()}, and {name} is {family.title}. It is trained as what it is."


def check_sampler(samples: SampleOptions) -> None:
    """Raises OptionError where the option names no sampler."""
    from library.inference.sampler_names import sampler_named

    if samples.sample_sampler is not None:
        try:
            sampler_named(samples.sample_sampler)
        except UserError as error:
            raise OptionError("sample_sampler", str(error)) from None


def base_components(options: RunOptions) -> tuple[str, ...] | None:
    """Components of the base that a run needs; None is all. With class pictures, caches from elsewhere replace the encoders."""
    return ("unet", "scheduler") if options.class_pictures is not None else None


def begin_hashing(options: RunOptions) -> None:
    """Hash the base's weights while the libraries are imported."""
    from library.models.fingerprint import hash_ahead

    components = (UNET,) if options.class_pictures is not None else (UNET, TEXT_ENCODER, TEXT_ENCODER_2, VAE)
    hash_ahead(options.model.pretrained_model_name_or_path, components, options.cache.cache_dir)


def check_start(options: RunOptions, processes: Processes) -> tuple[BaseLocation, Family]:
    """Find the base, and see that optimizer, prompts and output will work. Raises UserError for what will not."""
    from library.files import require_writable
    from library.models.base_family import family_of
    from library.models.locate import locate_base, locate_dino
    from library.models.lone_vae import locate_vae
    from library.training.graphs import check_graphs
    from library.training.optimizers import check_optimizer
    from library.training.sample_images import check_prompts
    from library.training.speed import prepare_environment

    prepare_environment(options.speed)
    require_writable(options.output.output_dir)
    require_writable(options.cache.cache_dir)
    check_optimizer(options.optimizer, processes.device)
    check_graphs(options, processes)
    with processes.main_first():
        base = locate_base(options.model.pretrained_model_name_or_path, base_components(options))
        for name in options.model.dino_model if options.alignment.needs_teacher else ():
            locate_dino(name)
        if options.model.vae is not None:
            locate_vae(options.model.vae)
    if base.note:
        processes.say(base.note)
    family = family_of(base)
    if note := family_note(options, family):
        processes.say(note)
    check_prompts(options.samples, processes.say)
    for note in check_fit(options, base, family):
        processes.say(note)
    return base, family


def check_fit(options: RunOptions, base: BaseLocation, family: Family) -> list[str]:
    """See that options and adapters to start from fit the base; what to say of those. Raises UserError for what does not."""
    from library.models.conditioning import clip_skip
    from library.models.text_fusion import check_fusion
    from library.training.alignment_checks import check_alignment
    from library.training.bins import describe_bins
    from library.training.distillation import check_teacher
    from library.training.flow import check_flow
    from library.training.models import check_swapped, check_weights

    if family.text_layer is not None and options.text.clip_skip not in (None, family.text_layer):
        raise UserError(
            f"clip_skip {options.text.clip_skip} cannot be used: {family.title} was trained on layer {family.text_layer} of its "
            "text encoders, counted from the end."
        )
    options.optimizer.text_encoder_rates(len(family.text_encoders))
    check_vae_fits(options, family)
    check_fusion(options.fusion, family, clip_skip(options.text, family))
    check_swapped(options, base, family)
    return [
        *check_flow(options, base),
        *check_alignment(options, base, family),
        *describe_bins(options),
        *check_teacher(options, base, family),
        *check_weights(options, base, family),
    ]


def check_vae_fits(options: RunOptions, family: Family) -> None:
    """Raise UserError where another VAE than the base's, if it is on this machine, does not serve the base."""
    from library.inference.base_check import check_vae
    from library.models.lone_vae import locate_vae, vae_status

    if (vae := options.model.vae) is not None and vae_status(vae) is None:
        check_vae(locate_vae(vae), family)
