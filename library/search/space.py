"""Search spaces: what a study may vary, read from TOML, and how suggested values become options of the training script.

A space is static: every parameter is suggested in every trial, whether the others give it an effect or not, and a
suggested value is never changed afterwards. What depends on something else is a factor: text_encoder_lr is the
suggested ratio times the learning rate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.options.parser import nearest
from library.search.messages import Script

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str

BORDER = 0.05
"""Share of a range, at either end, where a best value suggests that the range is too narrow."""


@dataclass(frozen=True)
class Parameter:
    """One value to search: a number between `low` and `high`, or one of `choices`.

    Attributes:
        low, high: both int for whole numbers; None where there are choices.
        log: sampled evenly in the logarithm.
        step: distance of the values from `low` on.
        option: of the script, which gets the value; "" for a mere factor of others.
        times: what the value is multiplied with: factors, and options. The own option stands for its fixed value.
        also: further options that get the same value where they are among the fixed ones.
        extra: choice as text -> options that come along with it.
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

    def distribution(self) -> optuna.distributions.BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

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
        """Why `value` is none of this parameter's, as the end of a sentence."""
        if self.choices:
            if any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices):
                return None
            return f"is {value!r}; it must be one of {', '.join(_written(choice) for choice in self.choices)}"
        assert self.low is not None and self.high is not None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (self.is_whole and value != int(value)):
            return f"is {value!r}; it must be a {'whole ' if self.is_whole else ''}number"
        if not self.low <= value <= self.high:
            return f"is {value:g}; it must lie between {self.low:g} and {self.high:g}"
        if self.step is not None and not _is_step(value - self.low, self.step):
            return f"is {value:g}; from {self.low:g} on it goes in steps of {self.step:g}"
        return None

    def border(self, value: Value) -> str | None:
        """Which end of its range `value` lies at, in words; None in its midst, and for choices without an order."""
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
        """What makes this parameter what it is, as JSON."""
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
        options: of the script, fixed for all trials where nothing else is said.
    """

    script: Script
    parameters: tuple[Parameter, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Value]:
        """The configuration that everything is compared with."""
        return {one.name: one.default for one in self.parameters}

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        return {one.name: one.distribution() for one in self.parameters}

    def suggest(self, trial: optuna.trial.Trial) -> dict[str, Value]:
        return {one.name: one.suggest(trial) for one in self.parameters}

    def objection(self, params: Mapping[str, Any]) -> str | None:
        """Why `params` are no point of this space, all reasons in one sentence; None where they are."""
        wrong = [f"{name} is unknown{nearest(name, self.defaults)}" for name in params if name not in self.defaults]
        for one in self.parameters:
            reason = one.objection(params[one.name]) if one.name in params else "is missing"
            if reason is not None:
                wrong.append(f"{one.name} {reason}")
        return "; ".join(wrong) or None

    def resolve(self, params: Mapping[str, Value], fixed: Mapping[str, Any]) -> dict[str, Any]:
        """All options of one trial: the space's, then `fixed`, then what follows from `params`.

        Raises UserError where a factor refers to an option that neither is searched nor fixed.
        """
        base = {**self.options, **fixed}
        for one in self.parameters:
            base |= one.extra.get(_written(params[one.name]), {})
        found: dict[str, Any] = {}
        for one in self.parameters:
            if one.option:
                found[one.option] = self._value(one, params, base)
                found |= {name: found[one.option] for name in one.also if base.get(name) is not None}
        return base | found

    def searched(self, params: Mapping[str, Value], fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The options that differ from trial to trial, under the script's names."""
        options = self.resolve(params, fixed)
        names = [one.option for one in self.parameters if one.option]
        return {name: options[name] for name in names}

    def suggested(self, options: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Value]:
        """The params that `options`, under the script's names or the parameters' own, stand for; absent ones are defaults.

        Raises UserError: names that belong to no parameter, values outside the space.
        """
        known = {one.option for one in self.parameters} | self.defaults.keys()
        unknown = [f"{name}{nearest(name, known)}" for name in options if name not in known]
        if unknown:
            raise UserError(f"Not in the search space: {'; '.join(unknown)}. It searches {', '.join(self.defaults)}.")
        for one in self.parameters:
            if one.option != one.name and one.option in options and one.name in options:
                raise UserError(f"{one.name} and {one.option} say the same thing twice. Keep one of them.")
        params = dict(self.defaults)
        # A factor is needed before what it is multiplied into.
        for one in sorted(self.parameters, key=lambda one: len(one.times)):
            if one.name in options and (one.name != one.option or not one.times):
                params[one.name] = options[one.name]
            elif one.option and options.get(one.option) is not None:
                self._undo(one, _single(one.option, options[one.option]), params, {**self.options, **fixed})
        if reason := self.objection(params):
            raise UserError(f"These parameters are outside the search space: {reason}.")
        return params

    def as_dict(self) -> dict[str, Any]:
        return {one.name: one.as_dict() for one in self.parameters}

    @property
    def overruled(self) -> frozenset[str]:
        """Options whose fixed value has no part in any trial: what is searched outright, and what gets the same value."""
        plain = [one for one in self.parameters if one.option and one.option not in one.times]
        return frozenset(name for one in plain for name in (one.option, *one.also))

    @property
    def searches_rate(self) -> bool:
        """Whether it finds learning rates by itself; if not, it goes on from one that is given to it."""
        return "learning_rate" in self.overruled

    @property
    def hash(self) -> str:
        """Stable name of the space: 16 hex digits. Order and fixed options have no part in it."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def borders(self, params: Mapping[str, Value]) -> list[str]:
        """Which of `params` lie at an end of their range, in words."""
        found = [one.border(params[one.name]) for one in self.parameters if one.name in params]
        return [words for words in found if words is not None]

    def _value(self, one: Parameter, params: Mapping[str, Value], base: Mapping[str, Any]) -> Any:
        value: Any = params[one.name]
        for name in one.times:
            value = value * self._factor(one, name, params, base)
        # 3e-4 x 0.666667 is 0.0002000001; nobody means that.
        return float(f"{value:.6g}") if one.times else value

    def _factor(self, one: Parameter, name: str, params: Mapping[str, Value], base: Mapping[str, Any]) -> Any:
        if name in params and not self._parameter(name).option:
            return params[name]
        other = next((other for other in self.parameters if other.option == name and other is not one), None)
        if other is not None:
            return self._value(other, params, base)
        if base.get(name) is None:
            raise UserError(
                f"The search space multiplies {one.name} with {name}, which is not fixed. Give the study a {name}, or "
                "--init-params with a study on SD1.5 for one on SDXL."
            )
        return _number(name, base[name])

    def _undo(self, one: Parameter, value: Any, params: dict[str, Value], base: Mapping[str, Any]) -> None:
        """Put into `params` what makes `value` of the option."""
        if not one.times:
            params[one.name] = value
            return
        value = _number(one.option, value)
        switch = next((name for name in one.times if isinstance(params.get(name), bool)), None)
        if value == 0 and switch is not None:
            params[switch] = False
            return
        for name in one.times:
            factor = _number(name, self._factor(one, name, params, base))
            if factor == 0:
                raise UserError(f"{one.option} cannot be a multiple of {name}, which is {factor!r}.")
            value = value / factor
        ratio = float(f"{value:.6g}")
        # A ratio of rounded rates may miss the end of its range by a rounding error.
        for end in (one.low, one.high):
            if end is not None and math.isclose(ratio, end, rel_tol=1e-5):
                ratio = float(end)
        params[one.name] = ratio

    def _parameter(self, name: str) -> Parameter:
        return next(one for one in self.parameters if one.name == name)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What has changed from one mapping of mappings or values (`Space.as_dict`, flat options) to another, in words."""
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
    """`value`, if it can be multiplied with. True and False are 1 and 0."""
    if not isinstance(value, int | float):
        raise UserError(f"{name} is {value!r}; it must be a number.")
    return value


def _single(option: str, value: Any) -> Any:
    """One value for all text encoders, as the space has it."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise UserError(f"{option} has {len(value)} different values, and the search space has one.")
    return value[0]


def _written(value: Value) -> str:
    """As TOML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
