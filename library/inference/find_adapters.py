"""Finds the adapter file of a prompt's `<lora:name:weight>`, by its name in folders, or else in its metadata. No torch.

A1111 looks for models/Lora/**/name.safetensors, and for the name that kohya's metadata gives a file, which the file may have lost;
here "folder/name" distinguishes files of the same name.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from library.errors import UserError
from library.inference.lora_tags import LoraWeights, StepWeights, cut_out_tags, lora_weights
from library.inference.picture_request import LoraUse
from library.models.header import with_safetensors

_KINDS = ("lora", "lyco")  # lyco: the tag of LyCORIS files before A1111 1.5
_SUFFIX = ".safetensors"  # Windows' users have it in capitals, too
# Folders of these names hold parts of models and of training states, not adapters.
_NO_ADAPTERS = ("unet", "vae", "text_encoder", "text_encoder_2")
_LISTED = 8


class AdapterFolders:
    """Finds adapter files by name, in folders and all below them. files: take precedence over files of the same name."""

    def __init__(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        self.folders = list(dict.fromkeys([*folders, *(file.parent for file in files)]))
        self.files = list(files)
        self._own_names: dict[Path, str | None] = {}

    def find(self, name: str, tag: object, notes: list[str] | None = None) -> Path:
        """The one file of that name, else the one whose metadata names it so (kohya's ss_output_name), as in A1111.

        notes: gets a sentence where other files have the name too, or the name is only in the metadata. Raises UserError, with
        the tag and the nearest name, unless there is exactly one.
        """
        there = [*self.files, *self.known]
        named = _each_once(path for path in there if _is_named(path, name))
        given = [path for path in named if path in self.files]
        nearest = [path for path in named if path.parent in self.folders]
        matches = given or nearest or named or _each_once(path for path in there if self._own_name(path) == name)
        if len(matches) > 1:
            places = ", ".join(map(str, matches[:_LISTED]))
            raise UserError(
                f"{tag} of the prompt could be {len(matches)} files: {places}{' ...' if len(matches) > _LISTED else ''}. Write "
                f"{'more of the path before the name' if named else 'the name of the file'}, as in "
                f"<lora:{unique_names(matches)[matches[0]]}:1>."
            )
        if not matches:
            raise self._nothing(name, tag, there)
        if notes is not None and not given and (others := [path for path in named if path not in matches]):
            many = f"{len(others)} other files, such as {others[0]}, have" if len(others) > 1 else f"{others[0]} has"
            notes.append(f"{tag} of the prompt is {matches[0]}; {many} the same name.")
        elif notes is not None and not named:
            notes.append(f"{tag} of the prompt is {matches[0]}, which its metadata names {name} (ss_output_name).")
        return matches[0]

    def _nothing(self, name: str, tag: object, there: Sequence[Path]) -> UserError:
        titles = sorted({title_of(path) for path in there})
        own = {found for path in there if (found := self._own_name(path))}
        near = difflib.get_close_matches(name, [*titles, *sorted(own)], n=1, cutoff=0.6)
        where = " or ".join(map(str, self.folders)) or "any folder"
        known = f"There are {', '.join(titles[:_LISTED])}" if titles else "There are no adapters"
        return UserError(
            f"{tag} of the prompt has no adapter: no {title_of(Path(name))}{_SUFFIX} in {where}"
            f"{f' (did you mean {near[0]}?)' if near else ''}. {known}{' ...' if len(titles) > _LISTED else ''}. "
            "Name its folder with --lora_dir."
        )

    @cached_property
    def known(self) -> list[Path]:
        found = {path for folder in self.folders for path in _adapters_below(folder)}
        return sorted(found, key=lambda path: (len(path.parts), str(path)))

    def _own_name(self, path: Path) -> str | None:
        """What kohya's metadata calls the adapter; None where it has no name, or is no whole file."""
        if path not in self._own_names:
            try:
                metadata = with_safetensors(path, lambda file: file.metadata() or {}, "numpy")
            except UserError:
                metadata = {}
            self._own_names[path] = metadata.get("ss_output_name")
        return self._own_names[path]


def loras_of(
    prompt: str, folders: AdapterFolders, given: Mapping[Path, float], notes: list[str] | None = None
) -> tuple[LoraUse, ...]:
    """The adapters of a prompt's tags, then the `given` files (path -> weight) that no tag names. A given file is named by its
    title, preceded by as many of its folders as make the name unique.

    notes: gets a sentence where a tag overrides the weight of a given file, and those of `AdapterFolders.find`. Raises UserError
    for a tag that is neither lora nor lyco, or whose adapter is missing.
    """
    uses = []
    for tag in cut_out_tags(prompt)[1]:
        if tag.kind not in _KINDS:
            raise UserError(
                f"{tag} of the prompt is not supported. Known are <lora:name:weight> and <lyco:name:weight>."
            )
        weights = lora_weights(tag)
        path = folders.find(weights.name, tag, notes)
        if path in given and notes is not None:
            notes.append(f"{tag} of the prompt takes the place of --lora {path}:{given[path]:g}.")
        uses.append(LoraUse(path, weights))
    named = {use.path for use in uses}
    names = unique_names(list(named | given.keys()))
    uses += [
        LoraUse(path, replace(constant_weights(path, weight), name=names[path]))
        for path, weight in given.items()
        if path not in named
    ]
    return tuple(uses)


def constant_weights(path: Path, weight: float) -> LoraWeights:
    same = StepWeights((1.0,), (weight,))
    return LoraWeights(title_of(path), same, same, same, same)


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The title of each path, preceded by as many of its folders as make it unique: folder/title."""
    tails = {path: _parts(path) for path in paths}
    names = {}
    for path, parts in tails.items():
        others = [tail for other, tail in tails.items() if other != path and tail != parts]
        depth = next(n for n in range(1, len(parts) + 1) if all(tail[-n:] != parts[-n:] for tail in others))
        names[path] = "/".join(parts[-depth:])
    return names


def title_of(path: Path) -> str:
    """The name of a model: its file's without .safetensors. Other suffixes stay: a folder's name may contain a dot."""
    return path.name[: -len(_SUFFIX)] if path.name.lower().endswith(_SUFFIX) else path.name


def _is_named(path: Path, name: str) -> bool:
    """`name` or `folder/name`, with the suffix or without."""
    wanted = (*Path(name).parts[:-1], title_of(Path(name))) if name else ()
    return wanted == _parts(path)[-len(wanted) :] if wanted else False


def _parts(path: Path) -> tuple[str, ...]:
    """The parts of the absolute path, the last one being the title."""
    return (*path.absolute().parts[:-1], title_of(path))


def _adapters_below(folder: Path) -> Iterator[Path]:
    """The adapters in a folder and all below it, through links too, the nearest first.

    Links make no endless way: those that lead up are not followed, and of each folder every name is followed once.
    """
    waiting, seen = deque([folder]), set()
    while waiting:
        here = waiting.popleft()
        try:
            status, entries = here.stat(), list(here.iterdir())
        except OSError:  # not there, or not to be read
            continue
        identity = (status.st_dev, status.st_ino, here.name)
        if identity in seen:
            continue
        seen.add(identity)
        for entry in entries:
            if entry.is_dir():
                if not (entry.is_symlink() and here.resolve().is_relative_to(entry.resolve())):
                    waiting.append(entry)
            elif entry.suffix.lower() == _SUFFIX and entry.is_file() and _may_be_adapter(entry):
                yield entry


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """The first path of each file: where links lead to a file, it has several."""
    found: dict[Path, Path] = {}
    for path in paths:
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _may_be_adapter(path: Path) -> bool:
    if path.name.startswith(".") or path.parent.name in _NO_ADAPTERS:
        return False
    return not (path.parent / "state.json").exists()
