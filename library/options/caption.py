"""Options of caption.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.checks import not_negative, positive, require, share
from library.options.given import Verbatim


@dataclass(frozen=True)
class CaptionFileOptions:
    """Which captions are written or changed, and how."""

    folder: Path | None = None
    """Folder of pictures, or of folders of pictures. It may stand first, without --folder."""
    caption_extension: str = ".txt"
    """Ending of the caption files. They lie beside the pictures, or in captions/ beside images/."""
    caption_separator: Verbatim = ","
    """What stands between the tags of a caption, and between its prefix and the rest."""
    append: bool = False
    """Put what the model says behind captions that are there already. Default: these pictures are left out."""
    overwrite: bool = False
    """Replace captions that are there already."""
    dry_run: bool = False
    """Show what would be done, with --edit every changed caption before and after, and stop."""

    def __post_init__(self) -> None:
        require(self.folder is not None, "folder", "is missing: name the folder of the pictures.")
        require(
            self.folder is None or self.folder.is_dir(), "folder", f"{self.folder} does not exist, or is no folder."
        )
        require(bool(self.caption_separator), "caption_separator", "is empty; tags are usually separated by commas.")
        require(
            self.caption_extension.startswith(".") and len(self.caption_extension) > 1,
            "caption_extension",
            f"must be an ending such as .txt, got {self.caption_extension!r}.",
        )
        require(not (self.append and self.overwrite), "append", "and overwrite exclude each other.")


@dataclass(frozen=True)
class CaptionModelOptions:
    """The model that writes captions or tags, and what is kept of them."""

    model: str | None = None
    """Image-to-text model of transformers: a hub id (Salesforce/blip-image-captioning-large) or a folder."""
    prompt: Verbatim = ""
    """What the model is asked, or how its captions begin. Default: nothing; chat models are asked for one sentence."""
    max_new_tokens: int = 60
    """Longest caption in tokens of the model."""
    num_beams: int = 3
    """Captions that the model weighs against each other; 1 takes the likeliest word each time."""
    tagger: str | None = None
    """ONNX tagger in WD's form (model.onnx, selected_tags.csv): a hub id (SmilingWolf/wd-vit-tagger-v3) or a folder. Needs
    pip install '.[tagger]'."""
    threshold: float = 0.35
    """Least probability of a tag that is kept."""
    character_threshold: float = 0.85
    """The same for names of characters, which are wrong more often."""
    blacklist: tuple[str, ...] = ()
    """Tags that are never written; put those with blanks in quotes."""
    prefix: Verbatim = ""
    """Put before every caption that is written, with a separator: the trigger word."""
    batch_size: int = 4
    """Pictures at once."""
    device: str | None = None
    """Device to compute on, as torch names it (cuda, cuda:1, cpu). Default: the best there is. Taggers use onnxruntime's own."""

    def __post_init__(self) -> None:
        share("threshold", self.threshold)
        share("character_threshold", self.character_threshold)
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            positive(name, getattr(self, name))
        require(self.model is None or self.tagger is None, "model", "and tagger exclude each other.")
        given = self.model if self.model is not None else self.tagger
        for name in ("prompt", "max_new_tokens", "num_beams", "device"):
            self._of(name, self.model, "model")
        for name in ("threshold", "character_threshold", "blacklist"):
            self._of(name, self.tagger, "tagger")
        for name in ("prefix", "batch_size"):
            self._of(name, given, "model or tagger")

    def _of(self, name: str, needed: object, what: str) -> None:
        is_default = getattr(self, name) == getattr(CaptionModelOptions, name)
        require(is_default or needed is not None, name, f"has no effect without {what}.")


@dataclass(frozen=True)
class EditOptions:
    """Changes to captions without a model."""

    edit: tuple[str, ...] = ()
    """Operations, done in this order on each line: add:TAG, first:TAG, remove:TAG, replace:OLD=NEW, deduplicate, shuffle or
    shuffle:N (the first N tags stay). Tags stand apart by the separator; replace is of whole words anywhere."""
    seed: int = 42
    """Decides how shuffle shuffles."""

    def __post_init__(self) -> None:
        not_negative("seed", self.seed)


@dataclass(frozen=True)
class CaptionScriptOptions:
    files: CaptionFileOptions
    models: CaptionModelOptions
    edits: EditOptions

    def __post_init__(self) -> None:
        by_model = self.models.model is not None or self.models.tagger is not None
        require(
            by_model or bool(self.edits.edit),
            "model",
            "is missing: name a --model or a --tagger that writes captions, or say what to --edit.",
        )
        require(
            not (by_model and self.edits.edit),
            "edit",
            "works without a model: leave one of them out, and run it afterwards.",
        )
        for name in ("append", "overwrite"):
            given = getattr(self.files, name)
            require(by_model or not given, name, "has no effect without model or tagger: edit changes what there is.")
