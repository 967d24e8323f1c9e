"""Classes of other libraries by the name a user gives, and calls of them whose errors are sentences."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from library.options.checks import OptionError
from library.quiet import let_in

Made = TypeVar("Made")
Kind = TypeVar("Kind")


def find_module(option: str, name: str) -> ModuleType:
    """Raises OptionError where it cannot be imported."""
    package = name.partition(".")[0]
    let_in(package)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            option, f"needs {name}, which cannot be imported ({error}). Is it installed (pip install {package})?"
        ) from None


def find_dotted(option: str, path: str) -> Any:
    """What `package.module.Name` names. Raises OptionError where there is no such module or no such name in it."""
    module_name, _, name = path.rpartition(".")
    module = find_module(option, module_name)
    if not hasattr(module, name):
        raise OptionError(option, f"{path} does not exist: {module_name} has no {name}{nearest(name, dir(module))}.")
    return getattr(module, name)


def classes_of(module: ModuleType, base: type[Kind]) -> dict[str, type[Kind]]:
    """Classes in `module` that derive from `base`, by their names in lower case."""
    found = {name.lower(): value for name, value in vars(module).items() if inspect.isclass(value)}
    return {name: kind for name, kind in found.items() if issubclass(kind, base) and kind is not base}


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" or the empty string, whatever the case."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


def argument_names(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that `function` declares; what **kwargs would swallow is none."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds}


def needs_more(function: Callable[..., Any]) -> list[str]:
    """Arguments without which the bound `function` cannot be called."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def check_arguments(option: str, function: Callable[..., Any], what: str, arguments: Mapping[str, Any]) -> None:
    """Raise OptionError where `what` declares no such argument: **kwargs would swallow it without effect."""
    known = argument_names(function)
    unknown = [f"{name}{nearest(name, known)}" for name in arguments if name not in known]
    if unknown:
        raise OptionError(option, f"gives {what} what it does not take: {', '.join(unknown)}.")


def call(option: str, what: str, function: Callable[[], Made]) -> Made:
    """`function()`, its error turned into an OptionError: what a library raises at a bad value can be anything."""
    try:
        return function()
    except OptionError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OptionError(option, f"does not suit {what}: {reason}.") from error
