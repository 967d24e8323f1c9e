"""From the caption on disk to the text that is trained at one showing of one picture, in the order of kohya's sd-scripts.

1. One line of a caption of several (with enable_wildcard any of them, else the first), between prefix and suffix.
2. Dropout of the whole caption.
3. Wildcards: `{a|b|c}` becomes one of the three; `{{` and `}}` are braces.
4. Tags: those kept in place, token warm-up, shuffling, tag dropout, and all joined again.
5. The secondary separator becomes the separator: `a;;;b` is one tag up to here, and then `a,b`.

Where this differs from kohya, on purpose:
- Every choice is drawn from (seed, epoch, picture, repeat), each kind of choice from a stream of its own. Workers,
  processes and a resumed run see the same captions, and one option does not change what another draws.
- Prefix and suffix are added to the line that was chosen. There they go to the first and last line before the choice.
- Tags are joined with the separator they were split at, and a blank: `a; b` of caption_separator ";" stays `a; b`. There
  they are always joined with ", ".
- keep_tokens_separator never reaches the model. There it stays in the caption unless something is shuffled or dropped.
- Empty tags (`a,,b`, a comma at the end) vanish when tags are split, and do not count as kept.
- `{{{a|b}}}` is a choice in braces.
- Captions whose encodings are cached go through the same steps. There they are cached as they lie on disk.
- The replacements of textual inversion do not exist here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from random import Random
from typing import Protocol

_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class CaptionSettings(Protocol):
    """What is read of a subset's options, under kohya's names."""

    @property
    def caption_prefix(self) -> str | None: ...
    @property
    def caption_suffix(self) -> str | None: ...
    @property
    def caption_dropout_rate(self) -> float: ...
    @property
    def caption_dropout_every_n_epochs(self) -> int: ...
    @property
    def enable_wildcard(self) -> bool: ...
    @property
    def shuffle_caption(self) -> bool: ...
    @property
    def caption_separator(self) -> str: ...
    @property
    def keep_tokens(self) -> int: ...
    @property
    def keep_tokens_separator(self) -> str | None: ...
    @property
    def secondary_separator(self) -> str | None: ...
    @property
    def caption_tag_dropout_rate(self) -> float: ...
    @property
    def token_warmup_min(self) -> int: ...
    @property
    def token_warmup_step(self) -> float: ...


def sample_random(seed: int, epoch: int, sample_id: int | str, repeat: int, what: str) -> Random:
    """A stream of randomness for one showing of one picture: of an epoch's `repeat`-th (from 0), for the purpose `what`.

    Crops ("crop") and mirroring ("flip") draw from it as captions do.
    """
    place = f"{what}/{seed}/{epoch}/{repeat}/{sample_id}"  # the only part that may hold a slash comes last
    return Random(hashlib.blake2b(place.encode(), digest_size=8).digest())


def make_caption(
    text: str,
    settings: CaptionSettings,
    *,
    seed: int,
    epoch: int,
    sample_id: int | str,
    step: int,
    repeat: int = 0,
    last_step: int | None = None,
) -> str:
    """The caption of one showing of one picture.

    Args:
        text: as it lies on disk, of one or several lines.
        epoch: from 0. With caption_dropout_every_n_epochs = 3 the third has no captions, as in kohya.
        sample_id: names the picture in the data set, whatever its place in a batch.
        step: optimizer steps done in the whole run; only token warm-up depends on it.
        repeat: which of the picture's showings in the epoch it is, from 0.
        last_step: of the run, needed where token_warmup_step is a share of it.
    """

    def drawn(what: str) -> Random:
        return sample_random(seed, epoch, sample_id, repeat, f"caption {what}")

    return "" if _dropped(settings, epoch, drawn) else _written(text, settings, drawn, step, last_step)


def variations(settings: CaptionSettings, text: str | None = None) -> list[str]:
    """The options that make a caption change from showing to showing; with `text`, those that change this caption.

    For sentences such as "cache_text_encoder_outputs needs captions that stay the same: turn off shuffle_caption".
    """
    found = []
    if settings.enable_wildcard and (text is None or _has_choice(text, settings)):
        found.append("enable_wildcard")
    for option in (
        "caption_dropout_rate",
        "caption_dropout_every_n_epochs",
        "shuffle_caption",
        "caption_tag_dropout_rate",
        "token_warmup_step",
    ):
        if getattr(settings, option) > 0:
            found.append(option)
    return found


def is_static(settings: CaptionSettings, text: str | None = None) -> bool:
    """Whether captions never change, so that what a text encoder makes of them can be kept."""
    return not variations(settings, text)


def cacheable_captions(text: str, settings: CaptionSettings) -> list[str] | None:
    """All captions that `make_caption` gives for a text, where those are few: itself, and "" with caption dropout.

    None where tags are shuffled, dropped or warmed up, or wildcards are chosen.
    """
    varying = set(variations(settings, text))
    dropout = {"caption_dropout_rate", "caption_dropout_every_n_epochs"}
    if varying - dropout:
        return None

    caption = _written(text, settings, lambda what: Random(0), 0, None)  # no choice is left to draw
    return [caption, ""] if varying and caption else [caption]


def _written(
    text: str, settings: CaptionSettings, drawn: Callable[[str], Random], step: int, last_step: int | None
) -> str:
    """A caption that is not dropped."""
    caption = _line(text, settings, drawn)
    if settings.enable_wildcard:
        caption = _without_wildcards(caption, drawn)
    caption = _with_tags_changed(caption, settings, drawn, step, last_step)
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.caption_separator)
    return caption


def _line(text: str, settings: CaptionSettings, drawn: Callable[[str], Random]) -> str:
    lines = _lines(text)
    line = drawn("line").choice(lines) if settings.enable_wildcard and len(lines) > 1 else lines[0]
    return " ".join(part for part in (settings.caption_prefix, line, settings.caption_suffix) if part)


def _lines(text: str) -> list[str]:
    """The lines that say something; one empty line where none does."""
    return [line.strip() for line in text.split("\n") if line.strip()] or [""]


def _dropped(settings: CaptionSettings, epoch: int, drawn: Callable[[str], Random]) -> bool:
    every = settings.caption_dropout_every_n_epochs
    if every > 0 and (epoch + 1) % every == 0:
        return True
    return settings.caption_dropout_rate > 0 and drawn("dropout").random() < settings.caption_dropout_rate


def _without_wildcards(caption: str, drawn: Callable[[str], Random]) -> str:
    if "{" not in caption and "}" not in caption:
        return caption
    random = drawn("wildcards")

    def chosen(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else random.choice(match[1].split("|"))

    return _WILDCARD.sub(chosen, caption)


def _has_choice(text: str, settings: CaptionSettings) -> bool:
    affixes = f"{settings.caption_prefix or ''} {settings.caption_suffix or ''}"
    return len(_lines(text)) > 1 or any("|" in (match[1] or "") for match in _WILDCARD.finditer(f"{text} {affixes}"))


def _with_tags_changed(
    caption: str, settings: CaptionSettings, drawn: Callable[[str], Random], step: int, last_step: int | None
) -> str:
    """Split into tags, change those that may be, and join. Untouched where there is nothing to do."""
    keep = settings.keep_tokens_separator
    parted = bool(keep) and str(keep) in caption
    rate = settings.caption_tag_dropout_rate
    if not parted and not changes_tags(settings):
        return caption
    if parted:  # fixed ||| flexible ||| fixed
        first, middle, *last = caption.split(keep)
        front, flexible = _tags(first, settings), _tags(middle, settings)
        back = [tag for part in last for tag in _tags(part, settings)]
    else:
        tags = _tags(caption, settings)
        front, flexible, back = tags[: settings.keep_tokens], tags[settings.keep_tokens :], []
    flexible = flexible[: _warmed_up(len(flexible), settings, step, last_step)]
    if settings.shuffle_caption:
        drawn("shuffle").shuffle(flexible)
    if rate > 0:
        random = drawn("tag dropout")
        flexible = [tag for tag in flexible if random.random() >= rate]
    return tag_joint(settings).join(front + flexible + back)


def changes_tags(settings: CaptionSettings) -> bool:
    """Whether every caption is split into tags and joined again; a keep_tokens_separator in one splits it in any case."""
    return settings.shuffle_caption or settings.token_warmup_step > 0 or settings.caption_tag_dropout_rate > 0


def tag_joint(settings: CaptionSettings) -> str:
    """What stands between tags that were split and joined again."""
    separator = settings.caption_separator
    return separator if separator[-1].isspace() else f"{separator} "


def _tags(caption: str, settings: CaptionSettings) -> list[str]:
    return [tag.strip() for tag in caption.split(settings.caption_separator) if tag.strip()]


def _warmed_up(tags: int, settings: CaptionSettings, step: int, last_step: int | None) -> int:
    """How many of the tags are shown yet: from token_warmup_min at step 0, linearly, to all at token_warmup_step."""
    length, least = settings.token_warmup_step, settings.token_warmup_min
    if 0 < length < 1:
        if last_step is None:
            raise ValueError(f"token_warmup_step {length} is a share of the run, whose last step was not given")
        length = math.floor(length * last_step)
    if step >= length or least >= tags:
        return tags
    return math.floor(step * (tags - least) / length) + least
