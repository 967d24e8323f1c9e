"""best_params.json: the best trial of a study, with all that is needed to train it again or to transfer it to another base."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from library.errors import UserError
from library.files import read_json, write_json
from library.options.command_line import nearest
from library.options.search import Script

SCHEMA_VERSION = 1

Scalar = bool | int | float | str
Params = dict[str, Scalar]
"""Values of one trial, under the names of the search space's parameters."""

# Strict: "4" is not a number, an unknown key is an error, NaN is not a value.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class BaseModel:
    """The base that a study trained on."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    family: Literal["sd15", "sdxl"]
    path: str
    """As the user named it: a file, a folder, a hub id, tiny-shapes."""
    sha256: str | None = None
    """Hash of the U-Net's weights; None where they were not hashed."""


@dataclass(frozen=True)
class ObjectiveFacts:
    """The objective, and what the best trial's value is made of."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    components: dict[str, float] = field(default_factory=dict)
    """Of the best trial."""
    scales: dict[str, float] = field(default_factory=dict)
    """The weights with which the components add up to the value."""


@dataclass(frozen=True)
class Confirmed:
    """The same parameters trained again with other seeds."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    mean: float
    sd: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class RateReference:
    """What the learning rate was found with: without these numbers it means little."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    alpha: float
    dim: int
    effective_batch: int
    """Pictures per optimizer step: the largest batch x accumulation x processes. 0 where a table of parameters does not say."""
    steps: int
    """Optimizer steps of the whole run."""
    batch: int | None = None
    """Pictures of a batch, where the study's dataset file gives them; None where train_batch_size does."""


@dataclass(frozen=True)
class TopTrial:
    """One of the five best trials."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    trial: int
    value: float
    params: Params
    confirmed: Confirmed | None = None


@dataclass(frozen=True)
class BestParams:
    """The best trial of a study.

    Attributes:
        created: local time, ISO.
        dataset: fingerprint of the pictures and captions that were trained on.
        value: of the objective in that trial; lower is better.
        params: as the sampler suggested them, under the names of the search space.
        train_config: every option of that trial's training that has a value, flat, under the script's names.
        confirmed: None where nothing was trained again.
        search_space: hash of the space.
        is_winner: whether it is better than the default configuration by more than the noise, or a person picked it; None in
            files of versions that did not say.
        verdict: the study's conclusion, in words.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    created: str
    study: str
    base_model: BaseModel
    dataset: str
    objective: ObjectiveFacts
    value: float
    trial: int
    params: Params
    train_config: dict[str, Any]
    lr_reference: RateReference
    search_space: str
    script: Script = "train_network"
    confirmed: Confirmed | None = None
    top5: tuple[TopTrial, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    is_winner: bool | None = None
    verdict: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def origin(self) -> str:
        """Where the parameters come from, in words. Trial 0: from a file of parameters and not from a study."""
        return f"trial {self.trial} of the study {self.study}" if self.trial else self.study

    @property
    def config_origin(self) -> str:
        return f"train_config of the study {self.study}" if self.trial else self.study


_ADAPTER = TypeAdapter(BestParams)


def write_best_params(path: Path | str, best: BestParams) -> None:
    """Write the whole file or leave what was there. Raises RunFailed where the disk refuses."""
    content = dataclasses.asdict(best)
    _ADAPTER.validate_json(json.dumps(content))  # a file that cannot be read back is not written
    write_json(path, content)


def read_best_params(path: Path | str) -> BestParams:
    """Read what `write_best_params` wrote.

    Raises UserError: not there, not JSON, of a newer version, an unknown or missing key, a value of a wrong type.
    """
    return parse_best_params(read_json(path), path)


def is_best_params(content: Any) -> bool:
    """Whether parsed JSON is a best_params.json, of whatever version, and not a bare table of parameters."""
    return isinstance(content, dict) and "schema_version" in content


def parse_best_params(content: Any, path: Path | str) -> BestParams:
    """Parsed JSON as BestParams. `path`: where it was read, for the sentence of a UserError (see `read_best_params`)."""
    if not is_best_params(content):
        raise UserError(
            f"{path} is not a best_params.json: it has no schema_version. A study writes one into its output folder; a bare "
            "params.json can be given to --init-params."
        )
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version!r}, but this program reads {SCHEMA_VERSION}. Write it again with the study, "
            "or use the version of this project that wrote it."
        )
    try:
        return _ADAPTER.validate_json(json.dumps(content))
    except ValidationError as error:
        # A value that has none of several allowed types is one problem, not one for each type.
        problems = list(dict.fromkeys(_problem(dict(found)) for found in error.errors(include_url=False)))
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{path} is damaged: {'; '.join(problems[:3])}{more}.") from None


def _problem(error: dict[str, Any]) -> str:
    place = list(error["loc"])
    if "params" in place[:-1]:
        end = place.index("params") + 2
        return (
            f"{'.'.join(map(str, place[:end]))} is {error['input']!r}: it should be a number, a string, true or false"
        )
    name = ".".join(map(str, place))
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(BestParams)]
        return f"{name} is unknown{nearest(name, known) if len(place) == 1 else ''}"
    return f"{name} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"
