"""From options of optimize.py to the plan of a study, with everything that can be wrong said before the first trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.files import write_text
from library.models.locate import TINY_BASES, TINY_SDXL, base_status, locate_base
from library.options.arguments import parse_arguments
from library.options.search import N_TRIALS, OptimizeOptions
from library.options.toml_file import PROJECT_ROOT, find_config, read_options
from library.search.best_params import BaseModel
from library.search.constraints import constraints_measured
from library.search.messages import OWN, ObjectiveName, Script
from library.search.results.best_trial import Facts
from library.search.run import sdxl_study
from library.search.run.driver import StudyPlan
from library.search.run.init_params import BASE, read_init_params
from library.search.run.study_data import StudyData, base_hash, network_data, repa_data
from library.search.space import Space, Value
from library.search.space_file import DEFAULT_SPACES, find_space, option_default, read_space
from library.search.study.study import Terms, compare_with_stored
from library.search.to_sdxl.export import DATASET

if TYPE_CHECKING:
    from library.options.network import TrainNetworkOptions
    from library.options.repa import TrainRepaOptions

Family = Literal["sd15", "sdxl"]
TINY_SPACE = "tiny"
# A dozen pictures of something new at the size that the tiny bases know. All of the demo set would be an hour for 8 trials.
TINY_OPTIONS: dict[str, Any] = {"resolution": "128,128", "train_batch_size": 4, "max_data_loader_n_workers": 2}
TINY_REPA_CONFIG = "demo.toml"
_DATA = ("dataset_config", "train_data_dir", "train_data")


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


@dataclass(frozen=True)
class _Start:
    """What a study searches, with what fixed, beginning where.

    Attributes:
        n_trials: where the user does not say.
        is_carried: whether `fixed` names a dataset file that was exported for this study.
    """

    space: Space
    fixed: dict[str, Any]
    initial: tuple[dict[str, Value], ...] = ()
    notes: tuple[str, ...] = ()
    n_trials: int = N_TRIALS
    is_carried: bool = False


def set_up(options: OptimizeOptions) -> Setup:
    """Check everything that can be checked without training. Pictures and, of a hub model, its files are fetched or made.

    For a dry run nothing is written or fetched, and the base is not hashed.

    Raises UserError: a base, a dataset or a configuration that is not there or does not fit, a space that is wrong,
    parameters to begin with that are none of it, a study that is there and was made with other terms.
    """
    trained, search, script = options.trained, options.search, options.trained.script
    fixed = _fixed_of_file(script, trained.config_file, trained.dataset_config, trained.base_model)
    base = trained.base_model or fixed.get(BASE) or _default_base(script)
    fixed[BASE] = base
    if trained.device is not None:
        fixed["device"] = trained.device
    family = _family(base, options.dry_run)
    judging = parse_arguments("objective_args", search.objective_args)
    _check_repa(script, search.objective, base, family)
    scales = _scales(search.objective, judging)
    with TemporaryDirectory() as nowhere:
        # The files of a study that goes on from SD1.5; of a dry run nothing stays.
        start = _start(options, fixed, family, Path(nowhere) if options.dry_run else options.place.folder)
        first = _checked(script, start.space, start.fixed)
        data = _data(first, start)
    fixed = {**start.fixed, **data.split}
    if start.is_carried:
        fixed["dataset_config"] = str(options.place.folder / DATASET)
    digest = None if options.dry_run else base_hash(base, first.cache.cache_dir)
    terms = Terms(
        script,
        search.objective,
        start.space,
        fixed,
        search.seed,
        judging,
        dataset=data.pictures,
        settings=data.settings,
        base=digest or "",
    )
    if options.dry_run:
        compare_with_stored(options.place.study_name, options.place.url, terms)
    known_base = BaseModel(family, base, digest)
    n_trials = search.n_trials or start.n_trials
    plan = StudyPlan(
        name=options.place.study_name,
        storage=options.place.url,
        output_dir=options.place.folder,
        terms=terms,
        n_trials=n_trials,
        workers=search.workers,
        sampler=search.sampler,
        initial=start.initial,
        facts=Facts(known_base, data.pictures, data.batch, scales),
        prunes=search.prune,
        confirm=search.confirmed(n_trials),
        stop_on_convergence=search.stop_on_convergence,
        keep=search.keep,
    )
    notes = (*start.notes, *data.notes)
    if search.objective == "image" and not constraints_measured(terms):
        notes += ("no clip_model in --objective_args: nobody looks whether trials follow their prompts",)
    return Setup(plan, known_base, notes)


def _start(options: OptimizeOptions, fixed: dict[str, Any], family: Family, folder: Path) -> _Start:
    """folder: for an export."""
    search, script, base = options.search, options.trained.script, fixed[BASE]
    has_data = any(name in fixed for name in _DATA)
    notes: list[str] = []
    carries_into = search.space or sdxl_study.SDXL_SPACE
    if script == "train_network" and family == "sdxl" and search.init_params is not None:
        space = read_space(find_space(carries_into), script)
        if sdxl_study.goes_on_from_sd15(search.init_params, space, is_asked=search.space is not None):
            return _carried(options, space, fixed, folder)
    space_name = search.space
    if not has_data:
        if base not in TINY_BASES:
            raise UserError(f"--dataset-config is missing: there is nothing to train {base} on.")
        fixed = {**_tiny_options(script), **fixed}
        space_name = space_name or (TINY_SPACE if script == "train_network" else None)
        notes.append("no --dataset-config: training on generated pictures, at a size of minutes")
    fixed = {name: value for name, value in fixed.items() if value is not None}
    space = read_space(find_space(space_name or DEFAULT_SPACES[script]), script)
    notes += _overruled(space, fixed)
    initial = () if search.init_params is None else (read_init_params(search.init_params, space, fixed),)
    return _Start(space, fixed, initial, tuple(notes))


def _carried(options: OptimizeOptions, space: Space, given: Mapping[str, Any], folder: Path) -> _Start:
    """The small study on SDXL, from one on SD1.5."""
    trained, path = options.trained, options.search.init_params
    assert path is not None
    if trained.config_file is not None:
        raise UserError(
            "--config_file has no place in a study on SDXL from --init-params: the export is what is fixed. Leave it out, or "
            "name a --space that searches learning_rate by itself."
        )
    data = {name: given[name] for name in _DATA if name in given}
    if not data and given[BASE] in TINY_BASES:
        data = _tiny_options("train_network")
    found = sdxl_study.carry_over(
        path, space, base=given[BASE], folder=folder, dataset_config=trained.dataset_config, data=data
    )
    device = {} if trained.device is None else {"device": trained.device}
    return _Start(space, {**found.fixed, **device}, found.initial, (found.note,), sdxl_study.TRIALS, True)


def batch_of(setup: Setup) -> int:
    """Pictures of one micro-batch, of the default configuration."""
    facts, terms = setup.plan.facts, setup.plan.terms
    assert facts is not None
    options = terms.space.resolve(terms.space.defaults, terms.options)
    return facts.batch or int(options.get("train_batch_size") or option_default(terms.script, "train_batch_size"))


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
    """What is fixed and has no effect, or not in all trials, in words."""
    notes = []
    given = [name for name in fixed if name in space.overruled]
    if given:
        notes.append(f"searched, so not taken from the configuration: {', '.join(given)}")
    for one in space.parameters:
        for choice, options in one.extra.items():
            if others := [name for name, value in options.items() if name in fixed and fixed[name] != value]:
                notes.append(
                    f"comes with {one.name} {choice}, so not taken from the configuration there: {', '.join(others)}"
                )
    if "seed" in fixed:
        notes.append("seed is that of the study (--seed), not that of the configuration")
    if own := [name for name, value in fixed.items() if name in OWN - {"seed"} and value not in (None, False, "")]:
        notes.append(f"trials decide these themselves, so not taken from the configuration: {', '.join(own)}")
    return notes


def _checked(script: Script, space: Space, fixed: Mapping[str, Any]) -> TrainNetworkOptions | TrainRepaOptions:
    """The options of the default configuration as the script reads them."""
    options = space.resolve(space.defaults, fixed)
    if script == "train_network":
        from library.search.to_sdxl.exported_files import options_of

        return options_of(options, None, "The default configuration of the search")
    import toml

    from library.options.parser import parse
    from library.options.repa import TrainRepaOptions

    with TemporaryDirectory() as folder:
        path = Path(folder) / "search.toml"
        write_text(path, toml.dumps({name: value for name, value in options.items() if name != "dataset_config"}))
        return parse(TrainRepaOptions, ["--dataset_config", str(path)], prog="train_repa.py", description=None)


def _data(first: TrainNetworkOptions | TrainRepaOptions, start: _Start) -> StudyData:
    from library.options.repa import TrainRepaOptions

    if isinstance(first, TrainRepaOptions):
        return repa_data(first)
    return network_data(start.space.resolve(start.space.defaults, start.fixed))


def _check_repa(script: Script, objective: ObjectiveName, base: str, family: Family) -> None:
    if script != "train_repa":
        return
    if family == "sdxl":
        raise UserError(
            f"train_repa.py trains SD1.5 alone, and {base} is SDXL. Name an SD1.5 base, or tune train_network."
        )
    if objective == "image":
        raise UserError(
            "The objective image draws with captions, and train_repa.py has classes. Use the objective loss."
        )


def _scales(objective: ObjectiveName, judging: Mapping[str, Any]) -> dict[str, float]:
    """Of each component that the value is a sum of. Raises UserError for settings that cannot be."""
    if objective == "loss":
        # The mean over all timesteps, of which each band has as many.
        return dict.fromkeys(("low", "mid", "high"), 1 / 3)
    from library.search.trainer.judge_by_pictures import read_judging

    return {"drift": read_judging(dict(judging)).drift_weight, "likeness_gain": -1.0}


# The base.


def _family(base: str, dry_run: bool) -> Family:
    """Of the base, which is fetched from the hub where it is not here, but not for a plan."""
    from library.models.family import family_of
    from networks.original_names import SDXL

    if base in TINY_BASES:
        return "sdxl" if base == TINY_SDXL else "sd15"
    if dry_run and (missing := base_status(base)):
        raise UserError(missing)
    return "sdxl" if family_of(locate_base(base)) == SDXL else "sd15"
