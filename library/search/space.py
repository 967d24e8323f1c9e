"""Search spaces: the parameters that a study varies, and how suggested values become options of the training script.

A space is static: every parameter is suggested in every trial, even where the others leave it without effect, and a
suggested value is never changed afterwards. An option that depends on another one is searched as a factor of it:
text_encoder_lr is the suggested ratio times the learning rate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options.command_line import nearest
from library.options.search import Script
from library.options.training import READ_BY

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str

BORDER = 0.05
"""A best value within this share of the range from either end suggests that the range is too narrow."""


@dataclass(frozen=True)
class Parameter:
    """One value to search: a number between `low` and `high`, or one of `choices`.

    Attributes:
        low, high: both int for whole numbers; None where there are choices.
        log: whether it is sampled evenly in the logarithm.
        step: distance between allowed values, from `low` on.
        option: the script's option that gets the value; "" for a parameter that is only a factor of others.
        times: parameters and options that the value is multiplied with. The own option stands for its fixed value.
        also: further options that get the same value, if they are among the fixed ones.
        extra: choice as text -> options that are set with it.
    """

    name: str
    default: Value
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()
    option: str = ""
    times: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def extremes(self) -> tuple[Value, ...]:
        """All choices, or both ends of the range."""
        if self.choices:
            return self.choices
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def suggest(self, trial: optuna.trial.Trial) -> Value:
        if self.choices:
            value = trial.suggest_categorical(self.name, self.choices)
            assert value is not None
            return value
        assert self.low is not None and self.high is not None
        if self.is_whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(self.name, self.low, self.high, log=self.log, step=self.step)

    def objection(self, value: Any) -> str | None:
        """Why this parameter cannot have `value`, as the end of a sentence; None where it can."""
        if self.choices:
            if any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices):
                return None
            return f"is {value!r}; it must be one of {', '.join(written(choice) for choice in self.choices)}"
        assert self.low is not None and self.high is not None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (self.is_whole and value != int(value)):
            return f"is {value!r}; it must be a {'whole ' if self.is_whole else ''}number"
        if not self.low <= value <= self.high:
            return f"is {value:g}; it must lie between {self.low:g} and {self.high:g}"
        if self.step is not None and not _is_step(value - self.low, self.step):
            return f"is {value:g}; it must be {self.low:g} plus a multiple of {self.step:g}"
        return None

    def border(self, value: Value) -> str | None:
        """At which end of its range `value` lies, in words; None in the middle, and for choices without an order."""
        if isinstance(value, str | bool):
            return None
        if self.choices:
            numbers = [choice for choice in self.choices if isinstance(choice, int | float)]
            if len(numbers) != len(self.choices) or len(numbers) < 3 or value not in (min(numbers), max(numbers)):
                return None
            return f"{self.name} {value:g} is the {'smallest' if value == min(numbers) else 'largest'} choice"
        assert self.low is not None and self.high is not None
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        if BORDER < share < 1 - BORDER:
            return None
        end = "lower" if share <= BORDER else "upper"
        return f"{self.name} {value:g} is at the {end} end of {self.low:g} to {self.high:g}"

    def as_dict(self) -> dict[str, Any]:
        """The parameter as JSON, without its name and without fields that are not given."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("name", "extra")}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        found["extra"] = {choice: dict(options) for choice, options in self.extra.items()}
        return {name: value for name, value in found.items() if value not in (None, [], {}, "", False)} | {
            "default": self.default
        }


@dataclass(frozen=True)
class Space:
    """All parameters of a study.

    Attributes:
        options: of the script, fixed for all trials unless the configuration says otherwise.
    """

    script: Script
    parameters: tuple[Parameter, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Value]:
        """The default configuration, which every trial is compared with."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def neighbours(self) -> Iterator[tuple[str, dict[str, Value]]]:
        """The default configuration with one parameter at each of its extremes, after words such as "network_dim 64"."""
        for parameter in self.parameters:
            for value in parameter.extremes:
                if value != parameter.default or isinstance(value, bool) != isinstance(parameter.default, bool):
                    yield f"{parameter.name} {written(value)}", {**self.defaults, parameter.name: value}

    def suggest(self, trial: optuna.trial.Trial) -> dict[str, Value]:
        return {parameter.name: parameter.suggest(trial) for parameter in self.parameters}

    def objection(self, params: Mapping[str, Any]) -> str | None:
        """Why `params` are not a point of this space, all reasons in one sentence; None where they are."""
        wrong = [f"{name} is unknown{nearest(name, self.defaults)}" for name in params if name not in self.defaults]
        for parameter in self.parameters:
            reason = parameter.objection(params[parameter.name]) if parameter.name in params else "is missing"
            if reason is not None:
                wrong.append(f"{parameter.name} {reason}")
        return "; ".join(wrong) or None

    def resolve(self, params: Mapping[str, Value], fixed: Mapping[str, Any]) -> dict[str, Any]:
        """All options of one trial: the space's, overridden by `fixed`, overridden by what follows from `params`.

        Raises UserError where a factor refers to an option that is neither searched nor fixed.
        """
        base = {**self.options, **fixed}
        for parameter in self.parameters:
            base |= parameter.extra.get(written(params[parameter.name]), {})
        found: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.option:
                found[parameter.option] = self._value(parameter, params, base)
                found |= {name: found[parameter.option] for name in parameter.also if base.get(name) is not None}
        # What is fixed for one schedule is not for trials with another one.
        schedule = found.get("lr_scheduler")
        unread = {name for name, readers in READ_BY.items() if schedule is not None and schedule not in readers}
        return {name: value for name, value in (base | found).items() if name in found or name not in unread}

    def searched(self, params: Mapping[str, Value], fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The options that differ from trial to trial, under the script's names."""
        options = self.resolve(params, fixed)
        names = [parameter.option for parameter in self.parameters if parameter.option]
        return {name: options[name] for name in names}

    def suggested(self, options: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Value]:
        """The params that lead to `options`, given under the script's names or the parameters'; the rest are defaults.

        Raises UserError: names that belong to no parameter, values outside the space.
        """
        known = {parameter.option for parameter in self.parameters} | self.defaults.keys()
        unknown = [f"{name}{nearest(name, known)}" for name in options if name not in known]
        if unknown:
            raise UserError(f"Not in the search space: {'; '.join(unknown)}. It searches {', '.join(self.defaults)}.")
        for parameter in self.parameters:
            if parameter.option != parameter.name and parameter.option in options and parameter.name in options:
                raise UserError(f"{parameter.name} and {parameter.option} set the same value. Keep one of them.")
        params = dict(self.defaults)
        # Factors first: the others are divided by them.
        for parameter in sorted(self.parameters, key=lambda parameter: len(parameter.times)):
            if parameter.name in options and (parameter.name != parameter.option or not parameter.times):
                params[parameter.name] = options[parameter.name]
            elif parameter.option and options.get(parameter.option) is not None:
                self._undo(
                    parameter, _single(parameter.option, options[parameter.option]), params, {**self.options, **fixed}
                )
        if reason := self.objection(params):
            raise UserError(f"These parameters are outside the search space: {reason}.")
        return params

    def as_dict(self) -> dict[str, Any]:
        return {parameter.name: parameter.as_dict() for parameter in self.parameters}

    @property
    def overruled(self) -> frozenset[str]:
        """Options whose fixed value no trial uses: those that are searched themselves, and those that get the same value."""
        plain = [parameter for parameter in self.parameters if parameter.option not in ("", *parameter.times)]
        return frozenset(name for parameter in plain for name in (parameter.option, *parameter.also))

    @property
    def searches_rate(self) -> bool:
        """Whether it searches the learning rate itself; if not, it multiplies one that is given to it."""
        return "learning_rate" in self.overruled

    @property
    def hash(self) -> str:
        """Stable name of the space: 16 hex digits, independent of the order of parameters and of fixed options."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def borders(self, params: Mapping[str, Value]) -> list[str]:
        """Which of `params` lie at an end of their range, in words."""
        found = (parameter.border(params[parameter.name]) for parameter in self.parameters if parameter.name in params)
        return [words for words in found if words is not None]

    def _value(self, parameter: Parameter, params: Mapping[str, Value], base: Mapping[str, Any]) -> Any:
        value: Any = params[parameter.name]
        for name in parameter.times:
            value = value * self._factor(parameter, name, params, base)
        # 3e-4 x 0.666667 is 0.0002000001, where 0.0002 is meant.
        return float(f"{value:.6g}") if parameter.times else value

    def _factor(self, parameter: Parameter, name: str, params: Mapping[str, Value], base: Mapping[str, Any]) -> Any:
        if name in params and not self._parameter(name).option:
            return params[name]
        other = next((other for other in self.parameters if other.option == name and other is not parameter), None)
        if other is not None:
            return self._value(other, params, base)
        if base.get(name) is None:
            raise UserError(
                f"The search space multiplies {parameter.name} by {name}, which is not fixed. Set {name} in the configuration, or "
                "give a study on SDXL the result of one on SD1.5 with --init-params."
            )
        return _number(name, base[name])

    def _undo(self, parameter: Parameter, value: Any, params: dict[str, Value], base: Mapping[str, Any]) -> None:
        """Put into `params` the value that leads to `value` of the option."""
        if not parameter.times:
            params[parameter.name] = value
            return
        value = _number(parameter.option, value)
        switch = next((name for name in parameter.times if isinstance(params.get(name), bool)), None)
        if value == 0 and switch is not None:
            params[switch] = False
            return
        for name in parameter.times:
            factor = _number(name, self._factor(parameter, name, params, base))
            if factor == 0:
                raise UserError(f"{parameter.option} cannot be a multiple of {name}, which is {factor!r}.")
            value = value / factor
        ratio = float(f"{value:.6g}")
        # The ratio of rounded rates may miss an end of the range by a rounding error.
        for end in (parameter.low, parameter.high):
            if end is not None and math.isclose(ratio, end, rel_tol=1e-5):
                ratio = float(end)
        params[parameter.name] = ratio

    def _parameter(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one mapping of values or of mappings (flat options, `Space.as_dict`) to another, in words."""
    words = [f"{name} is gone" for name in old if name not in new]
    words += [f"{name} is new" for name in new if name not in old]
    for name in old:
        if name in new and old[name] != new[name]:
            before, now = old[name], new[name]
            if isinstance(before, dict) and isinstance(now, dict):
                for key in dict.fromkeys((*before, *now)):
                    if before.get(key) != now.get(key):
                        words.append(f"{name}: {key} was {_shown(before.get(key))}, is {_shown(now.get(key))}")
            else:
                words.append(f"{name} was {_shown(before)}, is {_shown(now)}")
    return words


def _is_step(distance: float, step: float) -> bool:
    return math.isclose(distance / step, round(distance / step), abs_tol=1e-6)


def _number(name: str, value: Any) -> Any:
    """`value`, checked to be a number. True and False count as 1 and 0."""
    if not isinstance(value, int | float):
        raise UserError(f"{name} is {value!r}; it must be a number.")
    return value


def _single(option: str, value: Any) -> Any:
    """The value of a list with one value for each text encoder; the space has one for all."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise UserError(f"{option} has {len(value)} different values, but the search space has one for all.")
    return value[0]


def written(value: Value) -> str:
    """A choice as the key of a TOML table."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
