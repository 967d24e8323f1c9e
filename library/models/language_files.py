"""Where a text encoder beside a base's own lies: a transformers folder, a hub id, or the tiny T5. Light: no torch."""

from __future__ import annotations

from pathlib import Path

from library.errors import UserError
from library.files import read_json
from library.models.embedded import TINY_T5
from library.models.locate import LANGUAGE, BaseLocation, base_status, check_base, locate_base, missing_parts

T5, CLIP = "T5EncoderModel", "CLIPTextModel"
# model_type of a config.json -> what is made of it. A whole T5 or CLIPModel has its text encoder in it.
_KINDS = {"t5": T5, "clip": CLIP, "clip_text_model": CLIP}
# What each kind's tokenizer is read from: any of these.
_WORDS = {T5: ("tokenizer.json",), CLIP: ("tokenizer.json", "vocab.json")}


def locate_language(name: str) -> BaseLocation:
    """Find a text encoder: `tiny-t5`, a transformers folder with its tokenizer, or a hub id. Raises UserError."""
    if name == TINY_T5:
        from library.models.tiny import ensure_tiny

        return BaseLocation(name, ensure_tiny(name))
    return _local(name) or locate_base(name, (LANGUAGE,))


def check_language(name: str) -> None:
    """Raise UserError where `locate_language` would, or what is there is no text encoder, without fetching anything."""
    if name != TINY_T5 and (found := _local(name)) is None:
        check_base(name, (LANGUAGE,))
    elif name != TINY_T5:
        assert found is not None
        language_kind(found.path)


def language_status(name: str) -> str | None:
    """None when `locate_language(name)` needs no network, else a sentence saying what is missing."""
    return None if name == TINY_T5 or _local(name) else base_status(name, (LANGUAGE,))


def language_kind(folder: Path) -> str:
    """T5 or CLIP, by its configuration. Raises UserError for another model, and where its tokenizer is missing."""
    model_type = read_json(folder / "config.json").get("model_type")
    kind = _KINDS.get(str(model_type))
    if kind is None:
        raise UserError(
            f"{folder / 'config.json'} describes a {model_type}. A T5 or a CLIP is needed here, which transformers calls t5, clip "
            "or clip_text_model."
        )
    if not any((folder / name).is_file() for name in _WORDS[kind]):
        raise UserError(f"{folder} has no tokenizer: {' or '.join(_WORDS[kind])} is looked for, beside the weights.")
    return kind


def _local(name: str) -> BaseLocation | None:
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(
            f"{name} is a file: a text encoder is a transformers folder (config.json, model.safetensors) or a hub id."
        )
    if not path.is_dir():
        return None
    if missing := missing_parts(path, (LANGUAGE,)):
        raise UserError(f"{name} is not a folder of a text encoder: {', '.join(missing)} missing.")
    return BaseLocation(name, path)
