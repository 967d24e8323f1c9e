"""Adapters that prompts name: `<lora:name:weight>` to a file, by its name in some folders. No torch.

Source: A1111 looks for models/Lora/**/name.safetensors; "folder/name" tells two of one name apart here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from library.errors import UserError
from library.inference.prompt_networks import LoraWeights, StepWeights, cut_out_networks, lora_weights
from library.inference.request import LoraUse

_KINDS = ("lora", "lyco")  # the latter is how LyCORIS files were called before A1111 1.5
_SUFFIX = ".safetensors"
# Parts of whole models and of training states lie in folders of these names; no prompt means them.
_NO_ADAPTERS = ("unet", "vae", "text_encoder", "text_encoder_2")
_LISTED = 8


class AdapterFolders:
    """Finds adapter files by name in folders and all below them. files: known by their names whatever else there is."""

    def __init__(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        self.folders = list(dict.fromkeys([*folders, *(file.parent for file in files)]))
        self.files = list(files)

    def find(self, name: str, tag: object) -> Path:
        """Raises UserError, naming the tag and what is near, unless there is exactly one."""
        nearer = [path for path in self.files if _is_called(path, name)]
        if not nearer:
            found = [path for path in self.known if _is_called(path, name)]
            nearer = [path for path in found if path.parent in self.folders] or found
        if len(nearer) == 1:
            return nearer[0]
        if nearer:
            places = ", ".join(map(str, nearer[:_LISTED]))
            raise UserError(
                f"{tag} of the prompt could be {len(nearer)} files: {places}. Write more of the path before the name, as in "
                f"<lora:{names_apart(nearer)[nearer[0]]}:1>."
            )
        titles = sorted({title_of(path) for path in [*self.known, *self.files]})
        near = difflib.get_close_matches(name, titles, n=1, cutoff=0.6)
        where = " or ".join(map(str, self.folders)) or "any folder"
        there = f"There are {', '.join(titles[:_LISTED])}" if titles else "There is no adapter at all"
        raise UserError(
            f"{tag} of the prompt has no adapter: no {name}{_SUFFIX} in {where}"
            f"{f' (did you mean {near[0]}?)' if near else ''}. {there}{' ...' if len(titles) > _LISTED else ''}. "
            "Name its folder with --lora_dir."
        )

    @cached_property
    def known(self) -> list[Path]:
        found = {path for folder in self.folders for path in folder.rglob(f"*{_SUFFIX}") if _may_be(path)}
        return sorted(found, key=lambda path: (len(path.parts), str(path)))


def loras_of(
    prompt: str, folders: AdapterFolders, given: Mapping[Path, float], notes: list[str] | None = None
) -> tuple[LoraUse, ...]:
    """What the tags of a prompt ask for, then the `given` files (path -> weight) that no tag names, called by their titles, or
    where two would be called the same, by so much of their paths that they are not.

    notes: gets a sentence where a tag overrules the weight of a given file. Raises UserError for a tag that is not lora or
    lyco, or whose adapter is not there.
    """
    uses = []
    for tag in cut_out_networks(prompt)[1]:
        if tag.kind not in _KINDS:
            raise UserError(f"{tag} of the prompt is not offered. Known are <lora:name:weight> and <lyco:name:weight>.")
        weights = lora_weights(tag)
        path = folders.find(weights.name, tag)
        if path in given and notes is not None:
            notes.append(f"{tag} of the prompt takes the place of --lora {path}:{given[path]:g}.")
        uses.append(LoraUse(path, weights))
    named = {use.path for use in uses}
    names = names_apart(list(named | given.keys()))
    uses += [
        LoraUse(path, replace(constant_weights(path, weight), name=names[path]))
        for path, weight in given.items()
        if path not in named
    ]
    return tuple(uses)


def constant_weights(path: Path, weight: float) -> LoraWeights:
    same = StepWeights((1.0,), (weight,))
    return LoraWeights(title_of(path), same, same, same, same)


def names_apart(paths: Sequence[Path]) -> dict[Path, str]:
    """The title of each, with as many folders before it as it takes to tell it from the others: folder/title."""
    tails = {path: _parts(path) for path in paths}
    names = {}
    for path, parts in tails.items():
        others = [tail for other, tail in tails.items() if other != path and tail != parts]
        depth = next(n for n in range(1, len(parts) + 1) if all(tail[-n:] != parts[-n:] for tail in others))
        names[path] = "/".join(parts[-depth:])
    return names


def title_of(path: Path) -> str:
    """What a model is called; a folder's name may have a point in it."""
    return path.name.removesuffix(_SUFFIX)


def _is_called(path: Path, name: str) -> bool:
    """`name` or `folder/name`, with the suffix or without."""
    wanted = Path(name.removesuffix(_SUFFIX)).parts
    return wanted == _parts(path)[-len(wanted) :] if wanted else False


def _parts(path: Path) -> tuple[str, ...]:
    """Of the absolute path, with the title as the last one."""
    return (*path.absolute().parts[:-1], title_of(path))


def _may_be(path: Path) -> bool:
    if path.name.startswith(".") or path.parent.name in _NO_ADAPTERS:
        return False
    return not (path.parent / "state.json").exists()
