"""From options of optimize.py to the plan of a study, with everything that can be wrong said before the first trial."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.files import write_text
from library.models.locate import TINY_BASES, TINY_SDXL, base_status, locate_base
from library.options.arguments import parse_arguments
from library.options.search import OptimizeOptions
from library.options.toml_file import PROJECT_ROOT, find_config, read_options
from library.search.best_params import BaseModel, BestParams, is_best_params, read_best_params
from library.search.driver import StudyPlan
from library.search.init_params import read_init_params, sdxl_first_trials, sdxl_fixed_options
from library.search.jobs import Script
from library.search.record import Facts
from library.search.space import Space, Value
from library.search.space_file import DEFAULT_SPACES, find_space, option_default, read_space
from library.search.study import Terms

if TYPE_CHECKING:
    from library.options.network import TrainNetworkOptions

Family = Literal["sd15", "sdxl"]
SDXL_SPACE, TINY_SPACE = "sdxl", "tiny"
# A dozen pictures of something new at the size that the tiny bases know. All of the demo set would be an hour for 8 trials.
TINY_OPTIONS: dict[str, Any] = {"resolution": "128,128", "train_batch_size": 4, "max_data_loader_n_workers": 2}
TINY_REPA_CONFIG = "demo.toml"
BASE = "pretrained_model_name_or_path"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class Setup:
    """A study that is ready to begin.

    Attributes:
        notes: what a user should hear of before it begins.
    """

    plan: StudyPlan
    base: BaseModel
    notes: tuple[str, ...] = ()

    @property
    def is_tiny(self) -> bool:
        return self.base.path in TINY_BASES


def set_up(options: OptimizeOptions) -> Setup:
    """Check everything that can be checked without training. Pictures and, of a hub model, its files are fetched or made.

    Raises UserError: a base, a dataset or a configuration that is not there or does not fit, a space that is wrong,
    parameters to begin with that are none of it.
    """
    trained, search, script = options.trained, options.search, options.trained.script
    fixed = _fixed_of_file(script, trained.config_file, trained.dataset_config, trained.base_model)
    base = trained.base_model or fixed.get(BASE) or _default_base(script)
    fixed[BASE] = base
    if trained.device is not None:
        fixed["device"] = trained.device
    family = _family(base, options.dry_run)
    has_data = "dataset_config" in fixed or "train_data_dir" in fixed or "train_data" in fixed
    best = _carried(search.init_params, family, search.space, script)
    notes: list[str] = []
    space_name = search.space
    if best is not None:
        fixed = _carried_options(best, base, options) | {"device": trained.device}
        space_name = space_name or SDXL_SPACE
        notes.append(
            f"the study {best.study} is carried to SDXL; its export is fixed but for what {space_name} searches"
        )
    elif not has_data:
        if base not in TINY_BASES:
            raise UserError(f"--dataset-config is missing: there is nothing to train {base} on.")
        fixed = {**_tiny_options(script), **fixed}
        space_name = space_name or (TINY_SPACE if script == "train_network" else None)
        notes.append("no --dataset-config: training on generated pictures, at a size of minutes")
    fixed = {name: value for name, value in fixed.items() if value is not None}
    space = read_space(find_space(space_name or DEFAULT_SPACES[script]), script)
    notes += _overruled(space, fixed)
    first = _checked(script, space, fixed)
    initial: tuple[dict[str, Value], ...] = ()
    if best is not None:
        initial = tuple(sdxl_first_trials(best))
    elif search.init_params is not None:
        initial = (read_init_params(search.init_params, space, fixed),)
    data, batch = _data_facts(first, base)
    judging = parse_arguments("objective_args", search.objective_args)
    if search.objective == "image":
        from library.search.image_objective import read_judging

        read_judging(judging)
    terms = Terms(script, search.objective, space, fixed, search.seed, judging, data)
    plan = StudyPlan(
        name=options.place.study_name,
        storage=options.place.url,
        output_dir=options.place.folder,
        terms=terms,
        n_trials=search.n_trials,
        workers=search.workers,
        sampler=search.sampler,
        initial=initial,
        facts=Facts(BaseModel(family, base), data, batch),
        prunes=search.prune,
        confirm=search.confirmed,
        stop_on_convergence=search.stop_on_convergence,
        keep=search.keep,
    )
    return Setup(plan, BaseModel(family, base), tuple(notes))


def default_sdxl_base(sd15_base: str) -> str:
    return TINY_SDXL if sd15_base in TINY_BASES else SDXL_BASE


# Options that hold for all trials.


def _fixed_of_file(
    script: Script, config_file: str | None, dataset_config: str | None, base: str | None
) -> dict[str, Any]:
    """What is said about the script's options, checked together with its own parser, under its own names."""
    given = {"dataset_config": dataset_config, BASE: base}
    if script == "train_repa":
        from library.options.parser import parse
        from library.options.repa import TrainRepaOptions

        if config_file is not None and dataset_config is not None:
            raise UserError("For train_repa, --dataset-config is the file of options too. Leave --config_file out.")
        file = dataset_config or config_file
        if file is None:
            return {BASE: base} if base is not None else {}
        words = ["--dataset_config", file, *([f"--{BASE}", base] if base is not None else [])]
        parse(TrainRepaOptions, words, prog="train_repa.py", description=None)
        values = {name: one.value for name, one in read_options(find_config(file)).items()}
        return {**values, **({BASE: base} if base is not None else {})}
    from library.options.network import KOHYA, parse_network_options

    values = {}
    if config_file is not None:
        said = {name: value for name, value in given.items() if value is not None}
        words = [word for name, value in {"config_file": config_file, **said}.items() for word in (f"--{name}", value)]
        parse_network_options(words, prog="train_network.py", description=None)
        read, _ = KOHYA.values(read_options(find_config(config_file), later_section_wins=True))
        values = {name: one.value for name, one in read.items() if one.value != ""}
    return values | {name: value for name, value in given.items() if value is not None}


def _default_base(script: Script) -> str:
    if script == "train_network":
        from library.options.kohya_training import NetworkModelOptions

        return NetworkModelOptions.pretrained_model_name_or_path
    from library.options.model import ModelOptions

    return ModelOptions.pretrained_model_name_or_path


def _tiny_options(script: Script) -> dict[str, Any]:
    """Options of a study that is done in minutes on two CPU cores."""
    if script == "train_repa":
        values = read_options(find_config(TINY_REPA_CONFIG))
        small = {"max_train_samples": 64, "max_train_epochs": 4}
        return {name: one.value for name, one in values.items()} | small
    from library.data.new_concept import NAME, make_concept_pictures

    folder = PROJECT_ROOT / "data" / NAME
    if not folder.is_dir():
        make_concept_pictures(folder)
    here = Path("data") / NAME
    is_here = here.exists() and here.samefile(folder)
    return {"train_data_dir": str((here if is_here else folder) / "train"), **TINY_OPTIONS}


def _overruled(space: Space, fixed: Mapping[str, Any]) -> list[str]:
    """What is fixed and searched too, in words."""
    searched = [one.option for one in space.parameters if one.option in fixed and one.option not in one.times]
    return [f"searched, so not taken from the configuration: {', '.join(searched)}"] if searched else []


def _checked(script: Script, space: Space, fixed: Mapping[str, Any]) -> TrainNetworkOptions | None:
    """The options of the default configuration as the script reads them; None for train_repa."""
    options = space.resolve(space.defaults, fixed)
    if script == "train_network":
        from library.search.exported_files import options_of

        return options_of(options, None, "The default configuration of the search")
    import toml

    from library.options.parser import parse
    from library.options.repa import TrainRepaOptions

    with TemporaryDirectory() as folder:
        path = Path(folder) / "search.toml"
        write_text(path, toml.dumps({name: value for name, value in options.items() if name != "dataset_config"}))
        parse(TrainRepaOptions, ["--dataset_config", str(path)], prog="train_repa.py", description=None)
    return None


# The base and the pictures.


def _family(base: str, dry_run: bool) -> Family:
    """Of the base, which is fetched from the hub where it is not here, but not for a plan."""
    from library.models.family import family_of
    from networks.original_names import SDXL

    if base in TINY_BASES:
        return "sdxl" if base == TINY_SDXL else "sd15"
    if dry_run and (missing := base_status(base)):
        raise UserError(missing)
    return "sdxl" if family_of(locate_base(base)) == SDXL else "sd15"


def _data_facts(options: TrainNetworkOptions | None, base: str) -> tuple[str, int | None]:
    """Fingerprint of the pictures and captions, and the batch size that a dataset file gives; unknown for train_repa.

    The fingerprint is of names, sizes of files and captions, so that it is the same on another machine.
    """
    if options is None:
        return "", None
    from library.data.network_data import read_datasets
    from library.data.training_images import collect_images
    from library.training.network_plan import native_side

    datasets = read_datasets(options, native_side(locate_base(base)))
    digest, pictures = hashlib.sha256(), 0
    for dataset in datasets:
        for image in sorted(collect_images(dataset).images, key=lambda one: one.sample_id):
            facts = [image.path.parent.name, image.path.name, image.path.stat().st_size, str(image.caption)]
            digest.update(repr(facts).encode())
            pictures += 1
    if pictures < 3:
        raise UserError(
            f"A study needs at least three pictures, two of them to judge its trials by, and there are {pictures}. Add pictures."
        )
    return digest.hexdigest()[:32], max(dataset.batch_size for dataset in datasets)


# From a study on SD1.5 to one on SDXL.


def _carried(path: Path | None, family: Family, space: str | None, script: Script) -> BestParams | None:
    """The SD1.5 study that a study on SDXL goes on from, if it does."""
    if path is None or family != "sdxl" or script != "train_network" or space not in (None, SDXL_SPACE):
        return None
    from library.files import read_json

    if not is_best_params(read_json(path)):
        return None
    best = read_best_params(path)
    return best if best.base_model.family == "sd15" else None


def _carried_options(best: BestParams, base: str, options: OptimizeOptions) -> dict[str, Any]:
    """The export of `best`, written into the study's folder, as options that hold for all of its trials."""
    from library.search.export import export
    from library.search.rules import written_options

    if options.trained.config_file is not None:
        raise UserError(
            "--config_file has no place in a study on SDXL from --init-params: the export is what is fixed."
        )
    exported = export(
        best, sdxl_base=base, output_dir=options.place.folder, dataset_config=options.trained.dataset_config
    )
    values = {BASE: base, "dataset_config": str(exported.dataset), **written_options(exported.recipe)}
    return sdxl_fixed_options(values)


def batch_of(setup: Setup) -> int:
    """Pictures of one micro-batch."""
    facts, terms = setup.plan.facts, setup.plan.terms
    assert facts is not None
    return facts.batch or int(terms.options.get("train_batch_size") or option_default(terms.script, "train_batch_size"))
