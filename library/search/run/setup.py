"""From the options of optimize.py to the plan of a study. Everything that can be checked is checked before the first trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from library.errors import UserError
from library.models.embedded import TINY_BASES, TINY_SDXL
from library.models.locate import base_status, locate_base
from library.options.arguments import parse_arguments
from library.options.network import KOHYA, parse_network_options
from library.options.repa import parse_repa_options
from library.options.scripts import network_options_of, option_default, repa_options_of
from library.options.search import N_TRIALS, ObjectiveName, OptimizeOptions, Script, without_password
from library.options.toml_file import PROJECT_ROOT, find_config, read_options
from library.options.training import READ_BY
from library.search.best_params import BaseModel
from library.search.constraints import constraints_measured
from library.search.judging import read_judging
from library.search.results.best_trial import Facts
from library.search.run import sdxl_study
from library.search.run.checks import check_place
from library.search.run.gpus import gpus_of
from library.search.run.init_params import read_init_params
from library.search.run.plan import StudyPlan
from library.search.run.sdxl_study import BASE
from library.search.run.study_data import base_hash, network_data, repa_data
from library.search.space import Space, Value
from library.search.space_file import DEFAULT_SPACES, find_space, read_space
from library.search.terms import DECIDED_BY_TRIALS, Terms
from library.search.to_sdxl.export import DATASET, require_sdxl

Family = Literal["sd15", "sdxl"]
TINY_SPACE = "tiny"
# A dozen pictures of something new, at the size of the tiny bases. The whole demo set would take an hour for 8 trials.
TINY_OPTIONS: dict[str, Any] = {"resolution": "128,128", "train_batch_size": 4, "max_data_loader_n_workers": 2}
TINY_REPA_CONFIG = "demo.toml"
_DATA = ("dataset_config", "train_data_dir", "train_data")


@dataclass(frozen=True)
class Setup:
    """A study that is ready to start.

    Attributes:
        notes: messages for the user before it starts.
        now: options that differ from the trials' while they are checked: the export of a dry run lies in a folder that is deleted.
    """

    plan: StudyPlan
    base: BaseModel
    notes: tuple[str, ...] = ()
    now: Mapping[str, Any] = field(default_factory=dict)
    _kept: object = None

    @property
    def is_tiny(self) -> bool:
        return self.base.path in TINY_BASES


@dataclass(frozen=True)
class _Start:
    """What a study searches, which options are fixed, and which parameters it tries first.

    Attributes:
        n_trials: default of --n-trials.
        is_exported: whether `fixed` names a dataset file that was exported for this study.
    """

    space: Space
    fixed: dict[str, Any]
    initial: tuple[dict[str, Value], ...] = ()
    notes: tuple[str, ...] = ()
    n_trials: int = N_TRIALS
    is_exported: bool = False


def set_up(options: OptimizeOptions, command: str = "") -> Setup:
    """The plan of a study, after all checks that need no training. It may generate pictures and download a model of the hub.

    A dry run writes and downloads nothing, and hashes the base only where a study is there.

    command: what starts the study again, for `status`.

    Raises UserError: a base, dataset or configuration that does not exist or does not fit, a wrong space, initial parameters
    outside the space, an existing study with other terms.
    """
    trained, search, script = options.trained, options.search, options.trained.script
    fixed = _fixed_of_file(script, trained.config_file, trained.dataset_config, trained.base_model)
    base = trained.base_model or fixed.get(BASE) or option_default(script, BASE)
    fixed[BASE] = base
    if trained.device is not None:
        fixed["device"] = trained.device
    family = _family(base, options.dry_run)
    judging = parse_arguments("objective_args", search.objective_args)
    _check_repa(script, search.objective)
    scales = _scales(search.objective, judging)
    # A study that continues one on SD1.5 writes an export; that of a dry run is deleted with its Setup.
    temporary = TemporaryDirectory()
    start = _start(options, fixed, family, Path(temporary.name) if options.dry_run else options.place.folder)
    defaults = start.space.resolve(start.space.defaults, start.fixed)
    where = "The default configuration of the search"
    if script == "train_repa":
        repa = repa_options_of(defaults, where)
        cache_dir, data = repa.cache.cache_dir, repa_data(repa)
    else:
        cache_dir, data = network_options_of(defaults, where).cache.cache_dir, network_data(defaults)
    fixed = {**start.fixed, **data.split}
    now = {}
    if start.is_exported:
        now = {"dataset_config": fixed["dataset_config"]}
        fixed["dataset_config"] = str(options.place.folder / DATASET)
    digest = None if options.dry_run else base_hash(base, cache_dir)
    gpus_of(search.workers, trained.device)
    if options.outcome.export and options.outcome.sdxl_base is not None:
        require_sdxl(options.outcome.sdxl_base)
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
        command=without_password(command),
    )
    check_place(plan, lambda: base_hash(base, cache_dir))
    notes = (*start.notes, *data.notes)
    if search.objective == "image" and not constraints_measured(terms):
        notes += ("no clip_model in --objective_args, so it is not measured whether pictures follow their prompts",)
    return Setup(plan, known_base, notes, now, temporary)


def _start(options: OptimizeOptions, fixed: dict[str, Any], family: Family, folder: Path) -> _Start:
    """folder: for the files of an export."""
    search, script, base = options.search, options.trained.script, fixed[BASE]
    has_data = any(name in fixed for name in _DATA)
    notes: list[str] = []
    if script == "train_network" and family == "sdxl" and search.init_params is not None:
        space = read_space(find_space(search.space or sdxl_study.SDXL_SPACE), script)
        if sdxl_study.continues_sd15(search.init_params, space, is_named=search.space is not None):
            return _start_from_sd15(options, space, fixed, folder)
    space_name = search.space
    if not has_data:
        if base not in TINY_BASES:
            raise UserError(f"--dataset-config is missing, so there is nothing to train {base} on.")
        fixed = {**_tiny_options(script), **fixed}
        space_name = space_name or (TINY_SPACE if script == "train_network" else None)
        notes.append("no --dataset-config: a small study on generated pictures, done in minutes")
    fixed = {name: value for name, value in fixed.items() if value is not None}
    space = read_space(find_space(space_name or DEFAULT_SPACES[script]), script)
    notes += _overruled(space, fixed)
    initial = () if search.init_params is None else (read_init_params(search.init_params, space, fixed),)
    return _Start(space, fixed, initial, tuple(notes))


def _start_from_sd15(options: OptimizeOptions, space: Space, given: Mapping[str, Any], folder: Path) -> _Start:
    """The start of the small study on SDXL that continues a result on SD1.5."""
    trained, path = options.trained, options.search.init_params
    assert path is not None
    if trained.config_file is not None:
        raise UserError(
            "--config_file cannot be used in a study on SDXL that --init-params starts: all options are fixed to the export. Leave "
            "it out, or name a --space that searches learning_rate."
        )
    data = {name: given[name] for name in _DATA if name in given}
    if not data and given[BASE] in TINY_BASES:
        data = _tiny_options("train_network")
    start = sdxl_study.start_from_sd15(
        path, space, base=given[BASE], folder=folder, dataset_config=trained.dataset_config, data=data
    )
    device = {} if trained.device is None else {"device": trained.device}
    return _Start(space, {**start.fixed, **device}, start.initial, start.notes, sdxl_study.TRIALS, True)


def batch_of(setup: Setup) -> int:
    """Pictures of one micro-batch in the default configuration."""
    facts, terms = setup.plan.facts, setup.plan.terms
    assert facts is not None
    options = terms.space.resolve(terms.space.defaults, terms.options)
    return facts.batch or int(options.get("train_batch_size") or option_default(terms.script, "train_batch_size"))


# Options that hold for all trials.


def _fixed_of_file(
    script: Script, config_file: str | None, dataset_config: str | None, base: str | None
) -> dict[str, Any]:
    """The script's options that the user gave, under the script's names, after a check with its own parser."""
    given = {"dataset_config": dataset_config, BASE: base}
    if script == "train_repa":
        if config_file is not None and dataset_config is not None:
            raise UserError("For train_repa, --dataset-config names the file of options too. Leave --config_file out.")
        file = dataset_config or config_file
        if file is None:
            return {BASE: base} if base is not None else {}
        words = ["--dataset_config", file, *([f"--{BASE}", base] if base is not None else [])]
        parse_repa_options(words, prog="train_repa.py", description=None)
        values = {name: option.value for name, option in read_options(find_config(file)).items()}
        return {**values, **({BASE: base} if base is not None else {})}
    values = {}
    if config_file is not None:
        named = {"config_file": config_file, **{name: value for name, value in given.items() if value is not None}}
        words = [word for name, value in named.items() for word in (f"--{name}", value)]
        parse_network_options(words, prog="train_network.py", description=None)
        read, _ = KOHYA.values(read_options(find_config(config_file), later_section_wins=True))
        values = {name: option.value for name, option in read.items() if option.value != ""}
    return values | {name: value for name, value in given.items() if value is not None}


def _tiny_options(script: Script) -> dict[str, Any]:
    """Options of a study that takes minutes on two CPU cores."""
    if script == "train_repa":
        values = read_options(find_config(TINY_REPA_CONFIG))
        small = {"max_train_samples": 64, "max_train_epochs": 4}
        return {name: option.value for name, option in values.items()} | small
    from library.data.new_concept import NAME, make_concept_pictures

    folder = PROJECT_ROOT / "data" / NAME
    if not folder.is_dir():
        make_concept_pictures(folder)
    here = Path("data") / NAME
    is_here = here.exists() and here.samefile(folder)
    return {"train_data_dir": str((here if is_here else folder) / "train"), **TINY_OPTIONS}


def _overruled(space: Space, fixed: Mapping[str, Any]) -> list[str]:
    """Messages about options that are given and have no effect, or none in some trials."""
    notes = []
    given = [name for name in fixed if name in space.overruled]
    if given:
        notes.append(f"searched, so not taken from the configuration: {', '.join(given)}")
    for parameter in space.parameters:
        for choice, options in parameter.extra.items():
            if others := [name for name, value in options.items() if name in fixed and fixed[name] != value]:
                words = f"set by {parameter.name} {choice}, so not taken from the configuration there"
                notes.append(f"{words}: {', '.join(others)}")
    searches_schedule = "lr_scheduler" in space.overruled
    for name in [name for name in fixed if name in READ_BY and searches_schedule]:
        notes.append(f"{name} is for lr_scheduler {' and '.join(READ_BY[name])}, and left out of trials with another")
    if "seed" in fixed:
        notes.append("seed is the study's (--seed), not the configuration's")
    decided = DECIDED_BY_TRIALS - {"seed"}
    if own := [name for name, value in fixed.items() if name in decided and value not in (None, False, "")]:
        notes.append(f"set by each trial itself, so not taken from the configuration: {', '.join(own)}")
    return notes


def _check_repa(script: Script, objective: ObjectiveName) -> None:
    if script == "train_repa" and objective == "image":
        raise UserError("The objective image draws captions, but train_repa.py has classes. Use the objective loss.")


def _scales(objective: ObjectiveName, judging: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each component in the value. Raises UserError for wrong settings of the objective image."""
    if objective == "loss":
        # The value is the mean over all timesteps, and each band has a third of them.
        return dict.fromkeys(("low", "mid", "high"), 1 / 3)
    return {"drift": read_judging(judging).drift_weight, "likeness_gain": -1.0}


# The base.


def _family(base: str, dry_run: bool) -> Family:
    """The base's family. A base on the hub is downloaded, but not for a dry run."""
    from library.models.base_family import family_of
    from networks.families import SDXL

    if base in TINY_BASES:
        return "sdxl" if base == TINY_SDXL else "sd15"
    if dry_run and (missing := base_status(base)):
        raise UserError(missing)
    return "sdxl" if family_of(locate_base(base)) == SDXL else "sd15"
