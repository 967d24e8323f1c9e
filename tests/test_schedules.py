"""Learning rates over the steps against their formulas; what is refused; that nothing but the step decides."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError
from library.options.training import OptimizerOptions, TrainingOptions
from library.training.optimizers import ParameterGroup
from library.training.plan import Plan, make_plan
from library.training.schedules import check_schedule, learning_rates_of
from tests.tools.orders import whole_steps

STEPS, WARMUP = 100, 10


def plan_of(options: OptimizerOptions) -> Plan:
    return make_plan(whole_steps(1000, 10), TrainingOptions(max_train_steps=STEPS), options)


def rates(lr_scheduler: str = "cosine", **changes: object) -> list[float]:
    options = OptimizerOptions(lr_scheduler=lr_scheduler, lr_warmup_steps=WARMUP, **changes)  # type: ignore[arg-type]
    function = learning_rates_of(options, plan_of(options), [ParameterGroup("x", [], options.learning_rate)])
    return [function(step)[0] / options.learning_rate for step in range(STEPS)]


def rates_of_groups(peaks: list[float], *arguments: str, **changes: object) -> list[list[float]]:
    options = OptimizerOptions(lr_scheduler_args=arguments, **changes)  # type: ignore[arg-type]
    groups = [ParameterGroup(f"group {number}", [], peak) for number, peak in enumerate(peaks)]
    function = learning_rates_of(options, plan_of(options), groups)
    return [function(step) for step in range(STEPS)]


def progress(step: int) -> float:
    return (step - WARMUP) / (STEPS - WARMUP)


def half_wave(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


FORMULAS = [
    ("constant", {}, lambda t: 1.0, False),
    ("constant_with_warmup", {}, lambda t: 1.0, True),
    ("linear", {}, lambda t: 1 - progress(t), True),
    ("cosine", {}, lambda t: half_wave(progress(t)), True),
    ("cosine_with_restarts", {"lr_scheduler_num_cycles": 3}, lambda t: half_wave(3 * progress(t) % 1.0), True),
    # lr_end is 1e-7, of a learning rate of 1e-4.
    ("polynomial", {"lr_scheduler_power": 2.0}, lambda t: (1 - 1e-3) * (1 - progress(t)) ** 2 + 1e-3, True),
    ("inverse_sqrt", {"lr_scheduler_timescale": 50}, lambda t: 1 / math.sqrt((t + 50 - WARMUP) / 50), True),
    ("cosine_with_min_lr", {"lr_scheduler_min_lr_ratio": 0.2}, lambda t: 0.2 + 0.8 * half_wave(progress(t)), True),
    ("cosine_with_min_lr", {"lr_scheduler_args": ("min_lr=2e-5",)}, lambda t: 0.2 + 0.8 * half_wave(progress(t)), True),
    ("warmup_stable_decay", {"lr_decay_steps": 0.3}, lambda t: 1.0 if t < 70 else half_wave((t - 70) / 30), True),
    ("warmup_stable_decay", {"lr_decay_steps": 20, "lr_scheduler_args": ("decay_type=linear",)},
     lambda t: 1.0 if t < 80 else 1 - (t - 80) / 20, True),
    ("piecewise_constant", {"lr_scheduler_args": ("step_rules=1:20,0.5:60,0.1",)},
     lambda t: 1.0 if t < 20 else 0.5 if t < 60 else 0.1, False),
    ("adafactor", {"optimizer_type": "Adafactor"}, lambda t: 1.0, False),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "changes", "formula", "warms_up"), FORMULAS)
def test_every_schedule_is_its_formula(schedule, changes, formula, warms_up) -> None:  # type: ignore[no-untyped-def]
    expected = [t / WARMUP if warms_up and t < WARMUP else formula(t) for t in range(STEPS)]
    assert rates(schedule, **changes) == pytest.approx(expected, abs=1e-9)


def test_the_minimum_rate_is_also_the_floor_of_stable_decay() -> None:
    last = rates("warmup_stable_decay", lr_decay_steps=50, lr_scheduler_min_lr_ratio=0.25)
    assert last[50] == 1.0 and last[99] == pytest.approx(0.25, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "make"),
    [
        ("CosineAnnealingLR", ("T_max=100", "eta_min=1e-5"), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, 1e-5)),
        ("steplr", ("step_size=30", "gamma=0.1"), lambda o: torch.optim.lr_scheduler.StepLR(o, 30, 0.1)),
        ("torch.optim.lr_scheduler.OneCycleLR", ("max_lr=1e-3", "total_steps=100", "cycle_momentum=False"),
         lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, 100, cycle_momentum=False)),
        ("MultiStepLR", ("milestones=[10, 50]",), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 50])),
    ],
)  # fmt: skip
def test_any_torch_scheduler_gives_the_rates_it_gives_by_itself(name, arguments, make) -> None:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = make(optimizer)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"] / 1e-4)
        optimizer.step()
        if len(expected) < STEPS:
            scheduler.step()
    assert rates(lr_scheduler_type=name, lr_scheduler_args=arguments) == pytest.approx(expected, rel=1e-12)


def by_itself(peaks: list[float], make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[list[float]]:
    """The rates that torch's class gives the groups of a real optimizer."""
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks])
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if len(found) < STEPS:
            scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "arguments", "make"),
    [
        ("CosineAnnealingLR", ("T_max=100", "eta_min=0.1"), lambda o: schedulers.CosineAnnealingLR(o, 100, 0.1)),
        ("OneCycleLR", ("max_lr=5e-4", "total_steps=100", "cycle_momentum=False"),
         lambda o: schedulers.OneCycleLR(o, 5e-4, 100, cycle_momentum=False)),
        ("OneCycleLR", ("max_lr=[5e-4, 1e-5]", "total_steps=100", "cycle_momentum=False"),
         lambda o: schedulers.OneCycleLR(o, [5e-4, 1e-5], 100, cycle_momentum=False)),
        ("CyclicLR", ("base_lr=[1e-5,2e-5]", "max_lr=1e-3", "step_size_up=20", "cycle_momentum=False"),
         lambda o: schedulers.CyclicLR(o, [1e-5, 2e-5], 1e-3, 20, cycle_momentum=False)),
        ("CosineAnnealingWarmRestarts", ("T_0=30", "eta_min=1e-6"), 
         lambda o: schedulers.CosineAnnealingWarmRestarts(o, 30, eta_min=1e-6)),
        ("ExponentialLR", ("gamma=0.9",), lambda o: schedulers.ExponentialLR(o, 0.9)),
    ],
)  # fmt: skip
def test_every_group_gets_what_torch_gives_it(name, arguments, make) -> None:  # type: ignore[no-untyped-def]
    peaks = [1.0, 5e-5]
    assert rates_of_groups(peaks, *arguments, lr_scheduler_type=name) == by_itself(peaks, make)


def test_a_rate_among_a_named_schedules_arguments_is_a_rate_of_each_group() -> None:
    floors = rates_of_groups([1.0, 1e-4], "min_lr=1e-5", lr_scheduler="cosine_with_min_lr", lr_warmup_steps=0)
    assert floors[-1] == pytest.approx([1e-5 + (peak - 1e-5) * half_wave(0.99) for peak in (1.0, 1e-4)], rel=1e-9)


def test_a_list_that_does_not_fit_the_groups_names_them() -> None:
    with pytest.raises(UserError, match=r"does not suit OneCycleLR and its 2 groups of weights \(group 0, group 1\): "):
        rates_of_groups(
            [1.0, 1.0], "max_lr=[1,2,3]", "total_steps=100", "cycle_momentum=False", lr_scheduler_type="OneCycleLR"
        )


def test_a_rate_depends_on_the_step_alone() -> None:
    options = OptimizerOptions(lr_scheduler_type="ExponentialLR", lr_scheduler_args=("gamma=0.9",))
    function = learning_rates_of(options, plan_of(options), [ParameterGroup("x", [], 1.0)])
    assert function(70) == function(70) == pytest.approx([0.9**70]) and function(3) == pytest.approx([0.9**3])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "lr_scheduler_type ReduceLROnPlateau follows a metric"),
        ({"lr_scheduler_type": "CosineAnealingLR"}, "is no scheduler of torch (did you mean CosineAnnealingLR?)."),
        *(({"lr_scheduler_type": name}, f"lr_scheduler_type {name} is made of functions or of other schedulers")
          for name in ("LambdaLR", "MultiplicativeLR", "SequentialLR", "torch.optim.lr_scheduler.ChainedScheduler")),
        ({"lr_scheduler_type": "transformers.optimization.AdafactorSchedule"},
         "AdafactorSchedule sets the rate 0.0 at every step."),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=5", "gamma=-1")}, "StepLR sets the rate -0.0001."),
        ({"lr_scheduler_type": "torch.optim.AdamW"}, "torch.optim.AdamW is not a torch scheduler class."),
        ({"lr_scheduler_type": "StepLR"}, "lr_scheduler_args does not suit StepLR: "),
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=100")},
         "lr_scheduler_args lacks cycle_momentum=False: OneCycleLR would change the momentum too"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step=3",)}, "gives StepLR what it does not take: step"),
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=5", "cycle_momentum=False")},
         "lr_scheduler_args does not suit OneCycleLR: Tried to step 6 times"),
        ({"lr_scheduler_args": ("power=2",)}, "lr_scheduler_args gives the schedule cosine what it does not take: power."),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 95}, "lr_decay_steps 95 and 10 steps of warm-up are more than"),
        ({"lr_scheduler": "warmup_stable_decay"}, "lr_decay_steps is missing, and lr_scheduler is warmup_stable_decay."),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio is missing, and lr_scheduler is cosine_with_min_lr."),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler_args lacks step_rules, and lr_scheduler is piecewise_constant."),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=x:1,2",)},
         "lr_scheduler_args does not suit piecewise_constant: could not convert string to float"),
        ({"lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles has no effect with the schedule cosine; it is for "),
        ({"lr_scheduler_power": 2.0}, "lr_scheduler_power has no effect with the schedule cosine; it is for polynomial."),
        ({"lr_scheduler_timescale": 5}, "lr_scheduler_timescale has no effect with the schedule cosine; it is for inverse_sqrt."),
        ({"lr_decay_steps": 0.1}, "lr_decay_steps has no effect with the schedule cosine; it is for warmup_stable_decay."),
        ({"lr_decay_steps": 2.5}, "lr_decay_steps must be a whole number of steps or a share below 1, got 2.5."),
        ({"lr_scheduler": "adafactor"}, "adafactor is for optimizer_type Adafactor with relative steps; this is AdamW."),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        rates(**changes)  # type: ignore[arg-type]
    assert sentence in str(error.value)


class WarmCosine(schedulers.SequentialLR):
    """A nesting of other schedulers, as people write it."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, floor: float) -> None:
        parts = [
            schedulers.LinearLR(optimizer, 0.1, total_iters=warmup),
            schedulers.CosineAnnealingLR(optimizer, 100 - warmup, floor),
        ]
        super().__init__(optimizer, parts, [warmup])


def test_a_class_made_of_other_schedulers_gives_every_group_what_torch_gives_it() -> None:
    name = f"{WarmCosine.__module__}.WarmCosine"
    found = rates_of_groups([1.0, 1e-4], "warmup=10", "floor=1e-5", lr_scheduler_type=name)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in (1.0, 1e-4)], lr=1.0)
    scheduler = WarmCosine(optimizer, 10, 1e-5)
    for rates_now in found:
        assert rates_now == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("milestones=[10,50]", "gama=0.1"), "gives MultiStepLR what it does not take: gama (did you mean gamma?)."),
        (("milestones=[10,50]", "gamma=x"), "lr_scheduler_args does not suit MultiStepLR"),
        (("milestones=[10,50]", "gamma=0.1"), ""),
    ],
)
def test_arguments_beside_a_list_are_checked_before_models_are_loaded(
    arguments: tuple[str, ...], sentence: str
) -> None:
    options = OptimizerOptions(lr_scheduler_type="MultiStepLR", lr_scheduler_args=arguments)
    said = ""
    try:
        check_schedule(options, plan_of(options))
    except UserError as error:
        said = str(error)
    assert sentence in said and bool(sentence) == bool(said)


def test_a_list_of_rates_passes_before_the_groups_are_known() -> None:
    arguments = ("max_lr=[1,2,3]", "total_steps=100", "cycle_momentum=False")
    options = OptimizerOptions(lr_scheduler_type="OneCycleLR", lr_scheduler_args=arguments)
    check_schedule(options, plan_of(options))
