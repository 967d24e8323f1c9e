r"""Captions or tags for a folder of pictures, by a model; or changes to those that are there, without one.

    python caption.py data/mio --model Salesforce/blip-image-captioning-large --prefix mio
    python caption.py data/mio --tagger SmilingWolf/wd-vit-tagger-v3 --threshold 0.4 --prefix mio --blacklist "simple background"
    python caption.py data/mio --edit first:mio "replace:a dog=mio dog" --dry_run

A caption that is there stays, unless --overwrite or --append is given. Each file is written whole, in the form it had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, RunFailed, script
from library.options.caption import CaptionModelOptions, CaptionScriptOptions
from library.options.parser import parse
from library.words import plural

if TYPE_CHECKING:
    from PIL import Image

    from library.captioning.caption_files import CaptionFile

SHOWN = 40
"""Changed captions that a dry run shows."""

Write = Callable[[Sequence["Image.Image"]], list[str]]


@script
def main(argv: list[str]) -> int:
    words = ["--folder", *argv] if argv and not argv[0].startswith("-") else argv
    options = parse(CaptionScriptOptions, words, prog="caption.py", description=__doc__)
    from library.captioning.caption_files import caption_files
    from library.files import require_writable

    assert options.files.folder is not None
    files = caption_files(options.files.folder, options.files.caption_extension)
    if options.edits.edit:
        return edit(options, files)
    asked = to_caption(options, files)
    check_model(options.models)
    for folder in sorted({one.path.parent for one in asked}):
        require_writable(folder)
    if asked and not options.files.dry_run:
        write_captions(options, asked, model_of(options))
    return EXIT_OK


def edit(options: CaptionScriptOptions, files: Sequence[CaptionFile]) -> int:
    """Change captions that are there. All of them are made before the first is written."""
    from library.captioning.edits import Edits
    from library.files import require_writable

    change = Edits(options.edits.edit, options.files.caption_separator, options.edits.seed)
    there = [one for one in files if not one.is_empty]
    made = [(one, one.line_by_line(lambda line, one=one: change(line, one.path.name))) for one in there]  # type: ignore[misc]
    changed = [(one, text) for one, text in made if text != one.text]
    for one, text in changed[:SHOWN] if options.files.dry_run else []:
        print(f"{one.path}\n- {shown(one.text or '')}\n+ {shown(text)}")
    if options.files.dry_run and len(changed) > SHOWN:
        print(f"... and {len(changed) - SHOWN:,} more")
    if not options.files.dry_run:
        for folder in sorted({one.path.parent for one, _ in changed}):
            require_writable(folder)
        for one, text in changed:
            one.write(text)
    verb = "would change" if options.files.dry_run else "changed"
    print(f"{plural(len(changed), 'caption')} {verb}, {len(there) - len(changed):,} as before.")
    if bare := len(files) - len(there):
        print(f"{plural(bare, 'picture has', 'pictures have')} no caption to change.")
    return EXIT_OK


def shown(text: str) -> str:
    return "\n  ".join(text.splitlines())


def to_caption(options: CaptionScriptOptions, files: Sequence[CaptionFile]) -> list[CaptionFile]:
    """The pictures that get a caption; says what becomes of the captions that are there."""
    bare = [one for one in files if one.is_empty]
    own = len(files) - len(bare)
    every = options.files.append or options.files.overwrite
    if options.files.overwrite:
        others = plural(own, "caption is replaced", "captions are replaced")
    elif options.files.append:
        others = plural(own, "caption is added to", "captions are added to")
    else:
        others = plural(own, "caption stays", "captions stay") + " (--overwrite replaces, --append adds to them)"
    print(f"{plural(len(files if every else bare), 'picture')} to caption{f'; {others}' if own else ''}.")
    return list(files) if every else bare


def check_model(models: CaptionModelOptions) -> None:
    """Raises UserError for a model that will not do, before it is loaded."""
    from library.captioning.checks import check_describer, check_tagger

    if models.tagger is not None:
        check_tagger(models.tagger)
    elif models.model is not None:
        check_describer(models.model)


def model_of(options: CaptionScriptOptions) -> Write:
    """What makes captions of pictures, each without the prefix."""
    from library.captioning.edits import join_tags
    from library.progress import doing

    with doing("loading the model"):
        if options.models.tagger is not None:
            from library.captioning.tagger import Tagger

            tagger = Tagger(options.models)
            return lambda pictures: [join_tags(tags, options.files.caption_separator) for tags in tagger(pictures)]
        from library.captioning.describe import Describer

        return Describer(options.models)


def write_captions(options: CaptionScriptOptions, asked: Sequence[CaptionFile], write: Write) -> None:
    """Caption by caption, each file whole: an interrupted run goes on with the pictures that have none yet."""
    from library.data.pixels import UnreadableImage, decode_rgb
    from library.progress import doing

    unreadable, size = [], options.models.batch_size
    with doing("captioning", len(asked)) as activity:
        for start in range(0, len(asked), size):
            batch, pictures = [], []
            for one in asked[start : start + size]:
                try:
                    pictures.append(decode_rgb(one.picture, name=str(one.picture)))
                    batch.append(one)
                except UnreadableImage as error:
                    unreadable.append(str(error))
            for one, said in zip(batch, write(pictures) if pictures else [], strict=True):
                one.write(text_for(one, said, options))
            activity.advance(len(asked[start : start + size]))
    print(f"{plural(len(asked) - len(unreadable), 'caption')} written in {options.files.folder}.")
    if unreadable:
        raise RunFailed(f"{plural(len(unreadable), 'picture')} could not be read: {'; '.join(unreadable[:3])}.")


def text_for(one: CaptionFile, said: str, options: CaptionScriptOptions) -> str:
    """The file's new text: prefix and what the model said, or these behind what was there."""
    from library.captioning.edits import join_tags, split_tags

    separator, prefix = options.files.caption_separator, options.models.prefix.strip()
    if one.is_empty or options.files.overwrite:
        begins = said.casefold() == prefix.casefold() or said.casefold().startswith(f"{prefix.casefold()}{separator}")
        return one.replaced(
            said if not prefix or begins else join_tags([prefix, said] if said else [prefix], separator)
        )
    # Behind the first line, which is the one that is trained.
    there = {tag.casefold() for line in (one.text or "").splitlines() for tag in split_tags(line, separator)}
    new = [tag for tag in split_tags(said, separator) if tag.casefold() not in there]
    lines = iter([new])
    return one.line_by_line(lambda line: join_tags([line, *next(lines, [])], separator))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
