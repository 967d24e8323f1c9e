"""Captions as a training reads them, and the words, tags and tokens in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.data.captions import make_caption
from library.data.trained_image import TrainedImage

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

# What says nothing of a picture: articles, prepositions, and what captions begin with.
PLAIN = frozenset(
    """
    a an the this that these those of on in at by and or with without to from for as is are was were be it its his her their
    there one two some very up down out over under near next behind before above below into onto through front back left right
    top bottom middle background foreground photo photograph picture image drawing painting illustration art close-up shot view
    portrait style
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Caption:
    """What is trained with a picture."""

    picture: TrainedImage
    text: str
    """As trained, all tags shown: with prefix and suffix, a wildcard chosen, nothing dropped or shuffled."""
    has_own: bool
    """Whether the picture has a caption itself: neither class tokens nor nothing."""

    @property
    def path(self) -> str:
        return str(self.picture.image.path)

    @property
    def words(self) -> set[str]:
        return set(_WORD.findall(self.text.lower()))

    @property
    def tags(self) -> set[str]:
        separator = self.picture.image.subset.caption_separator
        return {tag.strip().lower() for tag in self.text.split(separator) if tag.strip()}

    @property
    def class_words(self) -> set[str]:
        """Of the folder's class tokens."""
        return set(_WORD.findall((self.picture.image.subset.class_tokens or "").lower()))


def captions_of(pictures: Sequence[TrainedImage], seed: int) -> list[Caption]:
    """The caption of each picture in the first epoch, without what a training leaves out at random."""
    found = []
    for picture in pictures:
        image = picture.image
        settings = replace(
            image.subset,
            shuffle_caption=False,
            caption_dropout_rate=0.0,
            caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0,
            token_warmup_step=0.0,
        )
        text = make_caption(image.caption, settings, seed=seed, epoch=0, sample_id=image.sample_id, step=0)
        found.append(Caption(picture, text, image.caption_source in ("file", "metadata")))
    return found


def are_tags(captions: Sequence[Caption]) -> bool:
    """Whether most captions are lists of tags: three or more, of two words on average."""
    lists = [caption.tags for caption in captions]
    return (
        sum(len(tags) >= 3 and sum(len(tag.split()) for tag in tags) <= 3 * len(tags) for tags in lists)
        > len(lists) / 2
    )


def counted(captions: Sequence[Caption], *, tags: bool) -> Counter[str]:
    """In how many captions each tag stands, or each word that says something."""
    return Counter(unit for caption in captions for unit in (caption.tags if tags else caption.words - PLAIN))


def token_count(text: str, tokenizer: CLIPTokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def cut_off(text: str, tokenizer: CLIPTokenizer, room: int) -> tuple[str, str]:
    """What a text encoder that has room for so many tokens reads of a text, and what it does not."""
    offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True).offset_mapping
    if len(offsets) <= room:
        return text, ""
    return text[: offsets[room][0]], text[offsets[room][0] :]


def pieces(word: str, tokenizer: CLIPTokenizer) -> list[str]:
    """The tokens that a word is spelt with, without the mark of a word's end."""
    ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
    return [str(token).removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
