"""What trials would be refused for, found before the first one, in a dry run as in a real one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from library.errors import UserError, check_all
from library.options.parser import flatten
from library.options.run import RunOptions
from library.options.scripts import network_options_of, repa_options_of
from library.search.constraints import clip_of
from library.search.judging import read_judging
from library.search.run.plan import StudyPlan
from library.search.study.study import check_study
from library.search.terms import DECIDED_BY_TRIALS
from library.words import plural

if TYPE_CHECKING:
    from library.data.collect import TrainingData
    from library.models.locate import BaseLocation
    from library.processes import Processes
    from networks.families import Family

Item = TypeVar("Item")

TOLD_AFTER = 4.0
"""Seconds without a line."""
DEFAULTS = "The default configuration of the search"


def check_place(plan: StudyPlan, base_hash: Callable[[], str]) -> None:
    """Raises UserError where the study cannot be opened, continued or written.

    base_hash: of the base's weights; it takes seconds, and is asked for only where a study is there to be continued.
    """
    from library.files import require_writable

    require_writable(plan.output_dir)
    terms = plan.terms

    def complete() -> Any:
        return terms if terms.base else dataclasses.replace(terms, base=base_hash())

    check_study(plan.name, plan.storage, plan.output_dir, complete)


def check_trials(
    plan: StudyPlan, device: str | None, now: Mapping[str, Any], say: Callable[[str], None] = print
) -> None:
    """Raises UserError for what a trial would be refused for: device, base, options, optimizer, adapter, models that judge.

    Tried are the default configuration, the parameters to begin with, and the default with one parameter at a time at each of
    its choices or at the ends of its range. Several faults: a line each. Imports torch and loads no weights.

    now: see `Setup`.
    """
    from library.processes import Processes, has_accelerator, usable_device

    if device is not None:
        usable_device(device)
    variants = [(words, {**flat, **now}) for words, flat in _variants(plan)]
    say(f"checking   {plural(len(variants), 'configuration')}: each choice and both ends of each range, one at a time")
    faults = _Faults()
    told = _told(variants, "options", say)
    read = [(words, options) for words, flat in told if (options := faults.of(words, _parsed, plan, flat))]
    faults.raise_any()

    first = read[0][1]
    device = first.model.device  # the configuration may name it
    on_cpu = device.startswith("cpu") if device is not None else not has_accelerator()
    if device is not None:
        usable_device(device)
    machine = Machine.of(first, Processes("cpu"), on_cpu=on_cpu)
    _check_judging(plan, first)
    tried: set[str] = set()
    for words, options in _told(read, "optimizers, schedules, adapters", say):
        for check, facts in machine.checks(options):
            if (key := f"{check.__name__} {facts}") not in tried:
                tried.add(key)
                faults.of(words, check, options)
    faults.raise_any()


def _told(items: Sequence[Item], what: str, say: Callable[[str], None]) -> Iterator[Item]:
    """The items, with a line where they take long."""
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said > TOLD_AFTER:
            said = time.monotonic()
            say(f"checking   {what}: {number} of {len(items)}")
        yield item


class _Faults:
    """Errors, each once, after what led to it."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def of(self, words: str, work: Callable[..., Any], *given: Any) -> Any:
        """What `work(*given)` returns; None where it raises UserError, which is kept."""
        try:
            return work(*given)
        except UserError as error:
            self._said.setdefault(str(error), words)
            return None

    def raise_any(self) -> None:
        if self._said:
            raise UserError("\n".join(f"{words}: {error}" for error, words in self._said.items()))


def _variants(plan: StudyPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to call a configuration, and its options."""
    space, fixed = plan.terms.space, plan.terms.options
    yield DEFAULTS, space.resolve(space.defaults, fixed)
    for point in plan.initial:
        yield "The parameters to begin with", space.resolve(point, fixed)
    for words, params in space.neighbours():
        yield f"A trial with {words} would be refused", space.resolve(params, fixed)


def _parsed(plan: StudyPlan, flat: Mapping[str, Any]) -> RunOptions:
    kept = {name: value for name, value in flat.items() if name not in DECIDED_BY_TRIALS}
    return repa_options_of(kept) if plan.terms.script == "train_repa" else network_options_of(kept)


def _check_judging(plan: StudyPlan, options: RunOptions) -> None:
    """The models that judge pictures are where they should be."""
    from library.models.locate import check_dino, locate_clip

    if plan.terms.objective != "image":
        return
    judging = read_judging(plan.terms.judging)
    check_dino(judging.dino_model or options.model.dino_model[0])
    clip = clip_of(judging.clip_model, options.model.pretrained_model_name_or_path)
    if clip is not None:
        locate_clip(clip)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What checks of a trial's options need: the base, and whether trials compute on the CPU, as the checks do."""

    processes: Processes
    base: BaseLocation
    family: Family
    on_cpu: bool
    _data: dict[str, TrainingData] = dataclasses.field(default_factory=dict)
    """Pictures, by the options that decide which there are."""

    @classmethod
    def of(cls, options: RunOptions, processes: Processes, *, on_cpu: bool) -> Machine:
        """Raises UserError for a base that cannot be read."""
        from library.files import require_writable
        from library.models.base_family import family_of
        from library.models.locate import locate_base
        from library.training.inputs import base_components, input_checks

        check_all(*input_checks(options))  # where a trial writes is the study's
        require_writable(options.cache.cache_dir)
        base = locate_base(options.model.pretrained_model_name_or_path, base_components(options))
        family = family_of(base)
        _read_headers(base, family)
        return cls(processes, base, family, on_cpu)

    def checks(self, options: RunOptions) -> list[tuple[Callable[[RunOptions], None], Any]]:
        """Each check with the options that it depends on, so that it is made once for the same ones."""
        network = flatten(options.network)
        if not (args := getattr(options.network, "args", None)) or args.kind.is_lora:
            network = {name: value for name, value in network.items() if name not in ("network_dim", "network_alpha")}
        return [
            (self.check_optimizer, flatten(options.optimizer)),
            (self.check_schedule, [flatten(options.optimizer), flatten(options.training), self._data_facts(options)]),
            (self.check_objective, [flatten(options.objective), flatten(options.noise)]),
            (self.check_network, [network, flatten(options.text), options.trains_text_encoders]),
        ]

    def check_optimizer(self, options: RunOptions) -> None:
        import torch

        from library.training.optimizers import ParameterGroup, check_optimizer, make_optimizer

        if self.on_cpu:
            check_optimizer(options.optimizer, torch.device("cpu"))
            return
        # A step may need the GPU, which is left to the trials.
        group = ParameterGroup("trial", [torch.nn.Parameter(torch.zeros(8, 4))], options.optimizer.learning_rate)
        make_optimizer([group], options.optimizer)

    def check_schedule(self, options: RunOptions) -> None:
        from library.training.pictures import collect_pictures
        from library.training.plan import make_order, make_plan
        from library.training.schedules import check_schedule

        facts = repr(self._data_facts(options))
        if facts not in self._data:
            self._data[facts] = collect_pictures(options, self.base)
        order = make_order(self._data[facts], options)
        check_schedule(options.optimizer, make_plan(order, options.training, options.optimizer))

    @staticmethod
    def _data_facts(options: RunOptions) -> list[Any]:
        of_data = (options.data, options.captions, options.cache, options.validation, options.class_pictures)
        return [*(flatten(group) for group in of_data if group is not None), options.training.train_batch_size]

    def check_objective(self, options: RunOptions) -> None:
        from library.models.base_family import family_of, native_side
        from library.models.load import load_scheduler_config
        from library.training.run import make_objective

        make_objective(
            options, load_scheduler_config(self.base), family_of(self.base), native_side(self.base), self.processes
        )

    def check_network(self, options: RunOptions) -> None:
        from library.training.inputs import check_fit
        from library.training.models import build_network, meta_models, start_weights

        check_fit(options, self.base, self.family)
        models = meta_models(options, self.base, self.family, text=options.trains_text_encoders)
        build_network(models, options, self.family, start_weights(options))


def _read_headers(base: BaseLocation, family: Family) -> None:
    """Raises UserError for a file of the base that is not whole."""
    from library.models.header import read_shapes
    from library.models.locate import weight_files
    from networks.families import UNET

    if base.is_file:
        read_shapes(base.path)
        return
    for component in (UNET, "vae", *family.text_encoders):
        if (base.path / component).is_dir():
            for file in weight_files(base.path, component):
                if file.suffix == ".safetensors":
                    read_shapes(file)
