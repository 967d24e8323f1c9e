"""What a dataset file may say: its keys with their types and defaults, where each may stand, and on which line it does.

The keys, their meaning and their defaults are those of kohya's sd-scripts. `Subset` and `Dataset` are the only place
where a key is written down: the tables that a file is checked against are made from their fields.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from library.data.key_lines import KeyPath, key_lines
from library.errors import UserError
from library.options.command_line import nearest
from library.options.toml_file import parse_toml
from library.text_files import read_text


def _pair(value: Any) -> Any:
    """(width, height) from 512, "512", "512,768" or [512, 768]."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    whole = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in parts]
    if len(whole) not in (1, 2) or not all(type(part) is int and part > 0 for part in whole):
        raise PydanticCustomError("resolution", "input should be a side in pixels, such as 512, or [width, height]")
    return whole[0], whole[-1]


def _range(value: Any) -> Any:
    """(least, most) from [1.0, 3.0] or "1.0,3.0"."""
    try:
        least, most = (float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        raise PydanticCustomError("range", "input should be two numbers, such as [1.0, 3.0]") from None
    if not 0 < least <= most:
        raise PydanticCustomError("range", "input should be two positive numbers, the smaller one first")
    return least, most


def _path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not (value := value.strip()):
        return None  # not given
    return Path.home() / value[2:] if value.startswith("~/") else Path(value)


def _extension(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip(". ") or "/" in value or "\\" in value):
        raise PydanticCustomError("extension", "input should be the ending of a file name, such as .txt")
    return f".{value}" if isinstance(value, str) and not value.startswith(".") else value


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Separator = Annotated[str, Field(min_length=1)]
FilePath = Annotated[Path | None, BeforeValidator(_path)]
Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


@dataclass(frozen=True)
class Subset:
    """One folder or metadata file, with every value resolved. Fields are kohya's keys, but for the last two.

    An empty text switches off what a level above it gives, and is None here.
    """

    image_dir: FilePath = None
    num_repeats: Natural = 1
    """How often an epoch shows each image. 0 leaves the subset out."""
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: Annotated[str, BeforeValidator(_extension)] = ".caption"
    shuffle_caption: bool = False
    caption_separator: Separator = ","
    keep_tokens: Natural = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: Share = 0.0
    caption_dropout_every_n_epochs: Natural = 0
    caption_tag_dropout_rate: Share = 0.0
    token_warmup_min: Count = 1
    token_warmup_step: Annotated[float, Field(ge=0)] = 0.0
    """Steps until all tags are seen; below 1 a share of all steps."""
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: Annotated[tuple[float, float], BeforeValidator(_range)] | None = None
    alpha_mask: bool = False
    conditioning_data_dir: FilePath = None
    metadata_file: FilePath = None
    custom_attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    resize_interpolation: Interpolation | None = None
    cache_info: bool = False
    name: str = ""
    """What the ids of its images start with: image_dir as the user wrote it, so that moved data keep relative ids."""
    place: str = field(default="", compare=False)
    """Where the subset was described: `set.toml, line 7`."""


@dataclass(frozen=True)
class Dataset:
    """Subsets that share batches and buckets, with every value resolved. Fields are kohya's keys, but for the last three.

    The bucket limits are as the user gave them; `library.data.buckets.Buckets.of` takes a Dataset and rounds them.
    """

    resolution: Annotated[tuple[int, int], BeforeValidator(_pair)]
    """(width, height) in pixels."""
    batch_size: Count = 1
    enable_bucket: bool = False
    min_bucket_reso: Count = 256
    max_bucket_reso: Count = 1024
    bucket_reso_steps: Count = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    validation_split: Share = 0.0
    validation_seed: int | None = None
    resize_interpolation: Interpolation | None = None
    subsets: tuple[Subset, ...] = ()
    name: str = ""
    """Unique in a run: `512x512`, and `512x512#2` for the second dataset of that resolution."""
    notes: tuple[str, ...] = ()
    """What the user should hear about how the dataset came together."""


SUBSET_ONLY = frozenset({"image_dir", "is_reg", "alpha_mask", "metadata_file", "conditioning_data_dir"})
SUBSET_KEYS = frozenset(f.name for f in dataclasses.fields(Subset)) - {"name", "place"}
DATASET_KEYS = frozenset(f.name for f in dataclasses.fields(Dataset)) - {"subsets", "name", "notes"}
UPPER_KEYS = DATASET_KEYS | (SUBSET_KEYS - SUBSET_ONLY)  # of [general] and [[datasets]]
CLI_KEYS = UPPER_KEYS | {"alpha_mask", "conditioning_data_dir"}
CLI_NAMES = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",  # kohya keeps the old spelling
}
_CLI_ONLY = ("prior_loss_weight", "max_token_length", "debug_dataset", "masked_loss")
_TYPES = typing.get_type_hints(Subset, include_extras=True) | typing.get_type_hints(Dataset, include_extras=True)


def _table(name: str, keys: Iterable[str], **more: Any) -> type[BaseModel]:
    """A pydantic model of `keys`, none of them required. Strict: "4" is no number, though 1 is a legal float."""
    fields: dict[str, Any] = {key: (_TYPES[key] | None, None) for key in sorted(keys)}
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model(name, __config__=config, **fields, **more)


_SubsetTable = _table("SubsetTable", SUBSET_KEYS)
_DatasetTable = _table("DatasetTable", UPPER_KEYS, subsets=(list[_SubsetTable], []))  # type: ignore[valid-type]
_GeneralTable = _table("GeneralTable", UPPER_KEYS)
_CliTable = _table("CliTable", CLI_KEYS)
_FileTable = _table("FileTable", (), general=(_GeneralTable, None), datasets=(list[_DatasetTable], []))  # type: ignore[valid-type]


@dataclass(frozen=True)
class Document:
    """A dataset file whose keys and types are right."""

    file: Path
    general: dict[str, Any]
    datasets: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    """The values of each [[datasets]] itself, and those of each of its [[datasets.subsets]]."""
    lines: dict[KeyPath, int]

    def place(self, *path: str | int) -> str:
        return _place(self.file, self.lines, path)


def read_document(file: Path, *, beside_options: bool = False) -> Document:
    """Read a `.toml` or `.json` dataset file and check its keys and types. beside_options: other tables are not looked at.

    Raises UserError: not readable, neither TOML nor JSON, empty; or one naming all unknown keys (with the nearest
    known ones), keys in a wrong place and values of a wrong type, each with its line.
    """
    content, lines = _parse(file)
    if beside_options:
        content = {name: content[name] for name in ("general", "datasets") if name in content}
    if not content:
        raise UserError(
            f"{file} is empty. Write a [[datasets]] with a resolution, and in it a [[datasets.subsets]] with an image_dir."
        )
    try:
        tables: Any = _FileTable.model_validate(content)
    except ValidationError as error:
        raise UserError(_complaint(file, lines, error, "datasets" not in content)) from None
    if not tables.datasets:
        raise UserError(f"{file} has no [[datasets]]. Write one, and in it a [[datasets.subsets]] with an image_dir.")
    return Document(
        file,
        _values(tables.general),
        [(_values(table), [_values(subset) for subset in table.subsets]) for table in tables.datasets],
        lines,
    )


def check_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the command line's values that are dataset keys, under their names in a file.

    Raises UserError naming the options whose value cannot be.
    """
    named = {CLI_NAMES.get(key, key): value for key, value in given.items() if value is not None}
    options = {CLI_NAMES.get(key, key): key for key in given}
    try:
        return _values(_CliTable.model_validate({key: value for key, value in named.items() if key in CLI_KEYS}))
    except ValidationError as error:
        found = [
            f"--{options[str(e['loc'][0])]} is {e['input']!r}: {_lower(e['msg'])}"
            for e in error.errors(include_url=False)
        ]
        raise UserError(f"{'; '.join(found)}.") from None


def _values(table: BaseModel | None) -> dict[str, Any]:
    """The keys that were written, with their values."""
    given = {key: getattr(table, key) for key in table.model_fields_set} if table is not None else {}
    return {key: value for key, value in given.items() if value is not None and key != "subsets"}


def _parse(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    kind = file.suffix.lower()
    if kind not in (".toml", ".json"):
        raise UserError(f"{file} is no dataset file: its name must end in .toml or .json.")
    text = read_text(file)
    try:
        if kind == ".toml":
            content = parse_toml(text, file)
        else:
            content = json.loads(text, object_pairs_hook=_no_key_twice) if text.strip() else {}
            if not isinstance(content, dict):
                raise UserError(f'{file} holds a {type(content).__name__}. Expected {{"datasets": [...]}}.')
        return content, key_lines(text, json_text=kind == ".json")
    except RecursionError:
        raise UserError(f"{file} is nested too deeply to be a dataset file.") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(twice)} given twice in one object")
    return dict(pairs)


def _place(file: Path, lines: Mapping[KeyPath, int], path: KeyPath) -> str:
    """`set.toml, line 7`: the line of the key, else of the innermost table around it that has one."""
    known = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    return f"{file.name}, line {known}" if known else file.name


def _complaint(file: Path, lines: Mapping[KeyPath, int], error: ValidationError, is_flat: bool) -> str:
    unknown, wrong = [], []
    for one in sorted(error.errors(include_url=False), key=lambda one: lines.get(one["loc"], 0)):
        path, place = one["loc"], _place(file, lines, one["loc"])
        if one["type"] == "extra_forbidden":
            misplaced = _misplaced(path)
            if misplaced:
                wrong.append(f"{misplaced} ({place}).")
            else:
                unknown.append(f"{path[-1]}{_meant(path)} in {place}")
        elif one["type"] == "list_type" and path[-1] in ("datasets", "subsets"):
            table = ".".join(part for part in path if isinstance(part, str))
            wrong.append(f"{path[-1]} must be a list ({place}): in TOML its heading is [[{table}]].")
        else:
            name = next((part for part in reversed(path) if isinstance(part, str)), path[-1])
            wrong.append(f"{name} is {one['input']!r} in {place}: {_lower(one['msg'])}.")
    if unknown:
        wrong.insert(0, f"Unknown {'key' if len(unknown) == 1 else 'keys'}: {'; '.join(unknown)}.")
        if is_flat:
            wrong.append(f"{file.name} has no [[datasets]]: a file of training options goes to --config_file.")
    return " ".join(wrong)


def _misplaced(path: KeyPath) -> str:
    """The sentence for a known key in a table where it may not stand, or nothing."""
    key = str(path[-1])
    table = "[[datasets.subsets]]" if "subsets" in path[:-1] else "[[datasets]]" if len(path) > 2 else f"[{path[0]}]"
    where = "the top level" if len(path) == 1 else table
    if key in SUBSET_ONLY:
        return f"{key} belongs in [[datasets.subsets]], not in {where}"
    if key in DATASET_KEYS and "subsets" in path[:-1]:
        return f"{key} holds for a whole dataset: it belongs in [[datasets]] or [general], not in {where}"
    if key in UPPER_KEYS and len(path) == 1:
        return f"{key} belongs in [general], [[datasets]]{' or [[datasets.subsets]]' * (key in SUBSET_KEYS)}, not in {where}"
    if key == "subsets":
        return f"subsets belongs in [[datasets]] as [[datasets.subsets]], not in {where}"
    return ""


def _meant(path: KeyPath) -> str:
    if path[-1] in _CLI_ONLY:
        return " (an option of the command line)"
    if len(path) == 1:
        return nearest(str(path[0]), ["general", "datasets"])
    return nearest(str(path[-1]), sorted(SUBSET_KEYS if "subsets" in path[:-1] else UPPER_KEYS | {"subsets"}))


def _lower(message: str) -> str:
    return f"{message[:1].lower()}{message[1:]}"
