"""Finds the adapter file of a prompt's `<lora:name:weight>`, by its name in folders. No torch.

A1111 looks for models/Lora/**/name.safetensors; here "folder/name" distinguishes files of the same name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from library.errors import UserError
from library.inference.lora_tags import LoraWeights, StepWeights, cut_out_tags, lora_weights
from library.inference.picture_request import LoraUse

_KINDS = ("lora", "lyco")  # lyco: the tag of LyCORIS files before A1111 1.5
_SUFFIX = ".safetensors"  # Windows' users have it in capitals, too
_FILES = "*." + "".join(f"[{letter}{letter.upper()}]" for letter in _SUFFIX[1:])
# Folders of these names hold parts of models and of training states, not adapters.
_NO_ADAPTERS = ("unet", "vae", "text_encoder", "text_encoder_2")
_LISTED = 8


class AdapterFolders:
    """Finds adapter files by name, in folders and all below them. files: take precedence over files of the same name."""

    def __init__(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        self.folders = list(dict.fromkeys([*folders, *(file.parent for file in files)]))
        self.files = list(files)

    def find(self, name: str, tag: object) -> Path:
        """The one file of that name. Raises UserError, with the tag and the nearest name, unless there is exactly one."""
        matches = [path for path in self.files if _is_named(path, name)]
        if not matches:
            found = [path for path in self.known if _is_named(path, name)]
            matches = [path for path in found if path.parent in self.folders] or found
        if len(matches) == 1:
            return matches[0]
        if matches:
            places = ", ".join(map(str, matches[:_LISTED]))
            raise UserError(
                f"{tag} of the prompt could be {len(matches)} files: {places}. Write more of the path before the name, as in "
                f"<lora:{unique_names(matches)[matches[0]]}:1>."
            )
        titles = sorted({title_of(path) for path in [*self.known, *self.files]})
        near = difflib.get_close_matches(name, titles, n=1, cutoff=0.6)
        where = " or ".join(map(str, self.folders)) or "any folder"
        there = f"There are {', '.join(titles[:_LISTED])}" if titles else "There are no adapters"
        raise UserError(
            f"{tag} of the prompt has no adapter: no {name}{_SUFFIX} in {where}"
            f"{f' (did you mean {near[0]}?)' if near else ''}. {there}{' ...' if len(titles) > _LISTED else ''}. "
            "Name its folder with --lora_dir."
        )

    @cached_property
    def known(self) -> list[Path]:
        found = {path for folder in self.folders for path in folder.rglob(_FILES) if _may_be_adapter(path)}
        return sorted(found, key=lambda path: (len(path.parts), str(path)))


def loras_of(
    prompt: str, folders: AdapterFolders, given: Mapping[Path, float], notes: list[str] | None = None
) -> tuple[LoraUse, ...]:
    """The adapters of a prompt's tags, then the `given` files (path -> weight) that no tag names. A given file is named by its
    title, preceded by as many of its folders as make the name unique.

    notes: gets a sentence where a tag overrides the weight of a given file. Raises UserError for a tag that is neither lora nor
    lyco, or whose adapter is missing.
    """
    uses = []
    for tag in cut_out_tags(prompt)[1]:
        if tag.kind not in _KINDS:
            raise UserError(
                f"{tag} of the prompt is not supported. Known are <lora:name:weight> and <lyco:name:weight>."
            )
        weights = lora_weights(tag)
        path = folders.find(weights.name, tag)
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
    return _without_suffix(path.name)


def _is_named(path: Path, name: str) -> bool:
    """`name` or `folder/name`, with the suffix or without."""
    wanted = Path(_without_suffix(name)).parts
    return wanted == _parts(path)[-len(wanted) :] if wanted else False


def _without_suffix(name: str) -> str:
    return name[: -len(_SUFFIX)] if name.lower().endswith(_SUFFIX) else name


def _parts(path: Path) -> tuple[str, ...]:
    """The parts of the absolute path, the last one being the title."""
    return (*path.absolute().parts[:-1], title_of(path))


def _may_be_adapter(path: Path) -> bool:
    if path.name.startswith(".") or path.parent.name in _NO_ADAPTERS:
        return False
    return not (path.parent / "state.json").exists()
