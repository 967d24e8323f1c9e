"""Optimizers by name: what they are, what is refused, and that every one of them resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.options.training import OptimizerOptions
from library.training.ema import ExponentialAverage
from library.training.optimizers import (
    NAMES,
    ParameterGroup,
    check_optimizer,
    find_optimizer,
    learning_rates,
    make_optimizer,
    optimizer_notes,
    optimizer_text,
    set_rates,
)
from library.training.state import Trained, load_state, save_state
from tests.tools.runs import state_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

CPU = torch.device("cpu")

# Beyond kohya's names: other classes of the libraries, in any case, and dotted paths.
OTHERS = [
    "CAME", "adabelief", "SOAP", "radam", "NAdam", "RMSprop", "AdEMAMix8bit", "PagedLion", "StableAdamW", "Adan", "FTRL",
    "torch.optim.Adagrad", "bitsandbytes.optim.LAMB8bit", "pytorch_optimizer.AdaFactor", "torch.optim.Adam",
]  # fmt: skip


def options_of(name: str, *arguments: str, rate: float | None = None) -> OptimizerOptions:
    free = "schedulefree" in name.lower()
    rate = rate or (1.0 if name.lower().startswith(("prodigy", "dadapt")) else 1e-2)
    return OptimizerOptions(
        optimizer_type=name,
        optimizer_args=arguments,
        learning_rate=rate,
        lr_scheduler="constant" if free else "cosine",
        ema_decay=0.0,
    )


class Tiny:
    """A weight large enough to be quantised, one that is not, and a channels-last kernel, in two groups."""

    def __init__(self, options: OptimizerOptions) -> None:
        generator = torch.Generator().manual_seed(0)
        large, small = torch.randn(64, 80, generator=generator), torch.randn(5, generator=generator)
        kernel = torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
        a, b, c = (torch.nn.Parameter(t) for t in (large, small, kernel))
        self.groups = [
            ParameterGroup("unet", [a, c], options.learning_rate),
            ParameterGroup("te", [b], options.learning_rate),
        ]
        self.trained = Trained({"lora": {"a": a, "b": b, "c": c}}, make_optimizer(self.groups, options), None, {})

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            set_rates(self.trained.optimizer, [g.learning_rate * (0.5 + step / 10) for g in self.groups])
            for weight in self.trained.parameters.values():
                noise = torch.randn(weight.shape)
                weight.grad = torch.empty_like(weight).copy_(weight.detach() * 0.3 + noise)
            self.trained.optimizer.step()
            self.trained.optimizer.zero_grad()


@pytest.mark.bits
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_training_on_from_a_saved_state_gives_the_bits_of_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    options = options_of(name)
    whole, first, second = Tiny(options), Tiny(options), Tiny(options)
    start = {n: p.detach().clone() for n, p in whole.trained.parameters.items()}
    whole.train(0, 6)
    first.train(0, 3)
    save_state(tmp_path / "step_000003", first.trained, {"step": 3})
    load_state(tmp_path / "step_000003", second.trained)
    second.train(3, 6)
    # Saving leaves no trace in the run that saves.
    first.train(3, 6)
    for number, run in enumerate((whole, first, second)):
        save_state(tmp_path / str(number), run.trained, {"step": 6})
    ends = [state_tensors(tmp_path / str(number)) for number in range(3)]
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        assert [key for key in end if not torch.equal(end[key], ends[0][key])] == []
    assert (tmp_path / "0" / "state.json").read_text() == (tmp_path / "2" / "state.json").read_text()
    weights = whole.trained.parameters
    assert all(torch.isfinite(w).all() and not torch.equal(w, start[n]) for n, w in weights.items())


@pytest.mark.parametrize("name", [name for name in NAMES if "8bit" in name])
def test_eight_bit_moments_are_saved_as_bytes(name: str, tmp_path: Path) -> None:
    tiny = Tiny(options_of(name))
    tiny.train(0, 1)
    save_state(tmp_path / "state", tiny.trained, {"step": 1})
    moments = load_file(tmp_path / "state" / "optimizer.safetensors")
    assert moments["state1.a"].dtype == torch.uint8 and moments["state1.b"].dtype == torch.float32
    again = Tiny(options_of(name))
    load_state(tmp_path / "state", again.trained)
    (loaded,) = (again.trained.optimizer.state[p] for n, p in again.trained.parameters.items() if n == "a")
    assert loaded["state1"].dtype == torch.uint8


@pytest.mark.bits
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_a_schedule_free_state_holds_the_averaged_weights_and_trains_on_from_the_others(
    name: str, tmp_path: Path
) -> None:
    tiny = Tiny(options_of(name))
    # RAdam's first five steps move nothing.
    tiny.train(0, 8)
    trained_on = {n: p.detach().clone() for n, p in tiny.trained.parameters.items()}
    with tiny.trained.judged():
        judged = {n: p.detach().clone() for n, p in tiny.trained.parameters.items()}
    assert all(torch.equal(p, trained_on[n]) for n, p in tiny.trained.parameters.items())
    save_state(tmp_path / "state", tiny.trained, {"step": 8})
    adapter = load_file(tmp_path / "state" / "lora.safetensors")
    assert all(torch.equal(adapter[n], judged[n]) and not torch.equal(judged[n], trained_on[n]) for n in judged)
    z, x = tiny.trained.optimizer.state[tiny.trained.parameters["a"]]["z"], judged["a"]
    torch.testing.assert_close(trained_on["a"], 0.1 * z + 0.9 * x, rtol=1e-4, atol=1e-5)
    again = Tiny(options_of(name))
    load_state(tmp_path / "state", again.trained)
    assert all(torch.equal(p, trained_on[n]) for n, p in again.trained.parameters.items())


@pytest.mark.bits
def test_what_is_judged_is_the_average_where_there_is_one_and_else_the_weights() -> None:
    tiny = Tiny(options_of("AdamW"))
    plain = tiny.trained.parameters["a"].detach().clone()
    tiny.trained.average = ExponentialAverage(tiny.trained.parameters, 0.5)
    tiny.train(0, 1)
    with tiny.trained.judged():
        assert torch.equal(tiny.trained.parameters["a"], plain)
    tiny.trained.average = None
    after = tiny.trained.parameters["a"].detach().clone()
    with tiny.trained.judged():
        assert torch.equal(tiny.trained.parameters["a"], after)


def test_names_are_those_of_kohya_in_any_case_and_of_the_libraries() -> None:
    import bitsandbytes
    import pytorch_optimizer
    import transformers

    assert (
        find_optimizer(OptimizerOptions(optimizer_type="").optimizer_name)
        is find_optimizer("ADAMW")
        is torch.optim.AdamW
    )
    assert find_optimizer("adamw8BIT") is bitsandbytes.optim.AdamW8bit
    assert find_optimizer("adafactor") is transformers.optimization.Adafactor
    assert find_optimizer("came") is pytorch_optimizer.CAME
    assert find_optimizer("SGD") is torch.optim.SGD
    assert find_optimizer("pytorch_optimizer.Lion") is pytorch_optimizer.Lion


def test_the_sgd_of_kohya_has_nesterov_momentum_unless_told_otherwise() -> None:
    parameters = [ParameterGroup("x", [torch.nn.Parameter(torch.zeros(2, 2))], 0.1)]
    group = make_optimizer(parameters, options_of("SGDNesterov")).param_groups[0]
    assert group["momentum"] == 0.9 and group["nesterov"]
    assert make_optimizer(parameters, options_of("sgdnesterov", "momentum=0.5")).param_groups[0]["momentum"] == 0.5


def test_arguments_reach_the_optimizer_as_kohya_writes_them() -> None:
    parameters = [ParameterGroup("x", [torch.nn.Parameter(torch.zeros(2, 2))], 1.0)]
    arguments = (
        "decouple=True",
        "use_bias_correction=True",
        "d_coef=2",
        "betas=0.9,0.99",
        "weight_decay=0.01",
        "growth_rate=inf",
    )
    group = make_optimizer(parameters, options_of("Prodigy", *arguments)).param_groups[0]
    assert group["weight_decouple"] and group["bias_correction"] and group["d_coef"] == 2
    assert group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0.01 and group["growth_rate"] == float("inf")
    assert OptimizerOptions(optimizer_args=("a=b=c", "n=None")).optimizer_arguments == {"a": "b=c", "n": None}


def test_adafactor_sets_its_own_rate_unless_relative_step_is_off_and_the_options_stay_as_they_are() -> None:
    parameters = [ParameterGroup("x", [torch.nn.Parameter(torch.full((4, 4), 2.0))], 1e-3)]
    options = options_of("Adafactor", "warmup_init=True")
    optimizer = make_optimizer(parameters, options)
    set_rates(optimizer, [1e-3])
    assert optimizer.param_groups[0]["lr"] is None and learning_rates(optimizer) == {"lr/x": 0.0}
    parameters[0].parameters[0].grad = torch.ones(4, 4)
    optimizer.step()
    # min(1e-6 * step, 1 / sqrt(step)) times the weight's root mean square.
    assert learning_rates(optimizer) == {"lr/x": pytest.approx(2e-6)}
    assert "relative_step=False goes by them" in " ".join(optimizer_notes(options, parameters))
    fixed = make_optimizer(parameters, options_of("Adafactor", "relative_step=False", "scale_parameter=False"))
    set_rates(fixed, [5e-4])
    assert learning_rates(fixed) == {"lr/x": 5e-4}
    assert options == options_of("Adafactor", "warmup_init=True")


def test_prodigy_reports_the_rate_it_found_and_a_small_learning_rate_is_remarked() -> None:
    tiny = Tiny(options_of("Prodigy"))
    tiny.train(0, 3)
    rates = learning_rates(tiny.trained.optimizer)
    assert rates.keys() == {"lr/unet", "d*lr/unet", "lr/te", "d*lr/te"} and 0 < rates["d*lr/unet"] < rates["lr/unet"]
    slow = [ParameterGroup("a", [], 1e-4), ParameterGroup("b", [], 1e-3)]
    notes = optimizer_notes(options_of("Prodigy"), slow)
    assert (
        len(notes) == 2 and "0.0001 slows it down, 1.0 is meant" in notes[0] and "one rate for all groups" in notes[1]
    )
    assert optimizer_notes(options_of("AdamW"), slow) == []


def test_weight_decay_comes_from_the_group_or_the_arguments_or_the_optimizer() -> None:
    weight = [torch.nn.Parameter(torch.zeros(2))]
    decay = [
        make_optimizer([ParameterGroup("x", weight, 0.1, of_group)], options_of("AdamW", *given)).param_groups[0]["weight_decay"]
        for of_group, given in ((0.3, ()), (None, ("weight_decay=0.2",)), (None, ()), (0.2, ("weight_decay=0.2",)))
    ]  # fmt: skip
    assert decay == [0.3, 0.2, 0.01, 0.2]
    with pytest.raises(UserError, match="gives weight_decay 0.2, and that of x is 0.0 by an option of its own"):
        make_optimizer([ParameterGroup("x", weight, 0.1, 0.0)], options_of("AdamW", "weight_decay=0.2"))
    with pytest.raises(UserError, match="weight_decay has no effect: Rprop knows none."):
        make_optimizer([ParameterGroup("x", weight, 0.1, 0.1)], options_of("Rprop"))


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("AdamW9bit", (), "optimizer_type AdamW9bit is unknown (did you mean AdamW8bit?)"),
        ("DAdaptAdanIP", (), "pip install dadaptation, and name dadaptation.experimental.DAdaptAdanIP"),
        ("no_such_package.Adam", (), "needs no_such_package, which cannot be imported"),
        ("torch.optim.AdamV", (), "torch.optim.AdamV does not exist: torch.optim has no AdamV (did you mean Adam"),
        ("torch.nn.Linear", (), "torch.nn.Linear is not an optimizer class of torch's kind"),
        ("AdamW", ("weight_decy=0.1",), "gives AdamW what it does not take: weight_decy (did you mean weight_decay?)."),
        ("Prodigy", ("decoupled=True",), "gives Prodigy what it does not take: decoupled"),
        ("AdamW", ("betas=0.9",), "optimizer_args does not suit torch's AdamW:"),
        ("CAME", ("betas=2,2,2",), "optimizer_args does not suit pytorch_optimizer's CAME:"),
        ("LBFGS", (), "LBFGS wants a closure at each step"),
        ("SAM", (), "optimizer_args does not suit pytorch_optimizer's SAM:"),
        ("SparseAdam", (), "optimizer_type does not suit a step of SparseAdam: SparseAdam does not support dense gradients"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_a_sentence_before_anything_is_loaded(
    name: str, arguments: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        check_optimizer(options_of(name, *arguments), CPU)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer_args": ("weight_decay",)}, "optimizer_args takes key=value, got 'weight_decay'."),
        ({"optimizer_args": ("=1",)}, "optimizer_args takes key=value, got '=1'."),
        ({"optimizer_args": ("a=1", "a=2")}, "optimizer_args gives a twice."),
        ({"optimizer_args": ("a=",)}, "optimizer_args gives a no value."),
        ({"optimizer_args": ("decouple=true",)}, "optimizer_args gives decouple the value true; Python spells it True."),
        ({"optimizer_args": ("lr=1",)}, "optimizer_args gives lr. The rate is learning_rate."),
        ({"optimizer_type": "Lion", "adam_beta1": 0.8}, "adam_beta1 is AdamW's. Give Lion its betas by optimizer_args."),
        ({"optimizer_args": ("eps=1e-6",), "adam_epsilon": 1e-7}, "adam_epsilon and eps in optimizer_args say the same thing."),
        ({"optimizer_type": "AdamWScheduleFree"}, "it wants lr_scheduler constant (or constant_with_warmup) and ema_decay 0."),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        OptimizerOptions(**changes)  # type: ignore[arg-type]
    assert sentence in str(error.value)


def test_the_memory_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    tiny = Tiny(options_of("AdamW"))
    tiny.train(0, 1)
    save_state(tmp_path / "state", tiny.trained, {"step": 1})
    with pytest.raises(UserError, match=r"is the memory of torch.optim.adamw.AdamW, and this run uses .*Lion"):
        load_state(tmp_path / "state", Tiny(options_of("Lion")).trained)


class Keeper(torch.optim.SGD):
    """An optimizer with memory in every form that a library may choose."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["history"] = [*group.get("history", []), torch.tensor(float(len(group.get("history", []))))]
            for p in group["params"]:
                state = self.state[p]
                state["pair"] = (state.get("pair", (0, None))[0] + 1, torch.ones(2, dtype=torch.int64))
                state["table"] = {"mask": torch.tensor([True, False]), 3: [0.1, None, "x"]}
                state["half"] = p.detach().to(torch.float16)
                # Laid out as their weight is not; a file keeps no layout.
                state["turned"] = p.detach().t().contiguous().t()
                state["basis"] = [torch.arange(6.0).reshape(2, 3).t()]
                p.data.add_(0.1)


@pytest.mark.bits
def test_memory_in_containers_and_other_dtypes_comes_back_as_it_was(tmp_path: Path) -> None:
    def trained() -> Trained:
        weight = torch.nn.Parameter(torch.ones(2, 3))
        return Trained({"lora": {"w.x": weight}}, Keeper([weight], lr=0.1), None, {})

    saved, loaded = trained(), trained()
    for _ in range(3):
        saved.optimizer.step()
    save_state(tmp_path / "state", saved, {"step": 3})
    load_state(tmp_path / "state", loaded)
    (kept,), (state,) = saved.optimizer.state.values(), loaded.optimizer.state.values()
    assert state["pair"][0] == 3 and state["pair"][1].dtype == torch.int64 and type(state["pair"]) is tuple
    assert state["table"]["mask"].dtype == torch.bool and state["table"][3] == [0.1, None, "x"]
    assert state["half"].dtype == torch.float16
    for before, after in ((kept["turned"], state["turned"]), (kept["basis"][0], state["basis"][0])):
        assert torch.equal(before, after) and before.stride() == after.stride() and not after.is_contiguous()
    assert [h.item() for h in loaded.optimizer.param_groups[0]["history"]] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (options_of("AdamW8bit"), "bitsandbytes.optim.adamw.AdamW8bit"),
        (options_of("Lion", "weight_decay=0.1", "betas=0.9,0.98"),
         "pytorch_optimizer.optimizer.lion.Lion(weight_decay=0.1,betas=(0.9, 0.98))"),
    ],
)  # fmt: skip
def test_metadata_names_the_optimizer_as_kohya_does(options: OptimizerOptions, text: str) -> None:
    assert optimizer_text(options) == text
