"""Findings about captions: what is missing, what all repeat, what is not read, what contradicts its folder."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.doctor.findings import Finding
from library.doctor.words import PLAIN, Caption, are_tags, counted, cut_off, pieces
from library.words import plural

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MOST = 0.9
"""Share of the captions that name the trigger word, where nobody says which it is."""
FEWEST = 8
"""With fewer captions nothing is said about what most of them name."""
COMMON = 5
"""Captions that have a word which another may be a slip of."""
LEAST_ALIKE = 3
"""So many pictures with one caption are worth a word."""

# Of one kind of subject; a caption that names another one of the kind than its folder's class contradicts it.
_KINDS = tuple(
    {word: name for name, words in kind.items() for word in words.split()}
    for kind in (
        {"man": "man men male guy", "woman": "woman women female lady", "boy": "boy boys 1boy", "girl": "girl girls 1girl"},
        {
            "dog": "dog dogs puppy", "cat": "cat cats kitten", "bird": "bird birds", "horse": "horse horses", "cow": "cow cows",
            "rabbit": "rabbit rabbits bunny", "bear": "bear bears", "fox": "fox foxes", "wolf": "wolf wolves",
        },
        {"car": "car cars", "truck": "truck trucks", "bicycle": "bicycle bike", "boat": "boat boats ship", "train": "train"},
    )
)  # fmt: skip


def caption_findings(
    captions: Sequence[Caption], tokenizer: CLIPTokenizer, room: int, trigger: str | None
) -> Iterator[Finding]:
    """captions: of the pictures to train, without regularisation pictures. room: tokens that the text encoders read."""
    yield from _empty(captions)
    own = [caption for caption in captions if caption.has_own and caption.text]
    yield from _overlong(captions, tokenizer, room)
    yield from _identical(own)
    yield from _trigger(own, tokenizer, trigger)
    yield from _repeated(own, trigger)
    yield from _misspelt(own)
    yield from _contradicting(own)


def suggested_trigger(captions: Sequence[Caption]) -> str | None:
    """The word that nearly all captions name and that is rarest elsewhere: the first one, where several do."""
    if len(captions) < FEWEST:
        return None
    counts = counted(captions, tags=False)
    often = [word for word, count in counts.items() if count >= MOST * len(captions)]
    places = {word: captions[0].text.lower().find(word) for word in often}
    return min(often, key=lambda word: (places[word] < 0, places[word], word), default=None)


def _empty(captions: Sequence[Caption]) -> Iterator[Finding]:
    bare = [caption.path for caption in captions if not caption.text.strip()]
    if bare and len(bare) == len(captions):
        yield Finding(
            "no captions",
            "spoils",
            f"All {plural(len(bare), 'caption is', 'captions are')} empty.",
            "Nothing says what the pictures show, so that no prompt will bring it back. Write captions (caption.py does it with a "
            "model), or set class_tokens; see caption_extension where there are files of another ending.",
            tuple(bare),
        )
    elif bare:
        yield Finding(
            "empty captions",
            "mend",
            f"{plural(len(bare), 'picture has', 'pictures have')} no caption or an empty one.",
            "What they show is learned for every prompt. Write a caption for each, or leave them out.",
            tuple(bare),
        )


def _overlong(captions: Sequence[Caption], tokenizer: CLIPTokenizer, room: int) -> Iterator[Finding]:
    cut = [(caption.path, rest) for caption in captions if (rest := cut_off(caption.text, tokenizer, room)[1])]
    if not cut:
        return
    longer = " Raise --max_token_length (150 or 225), or shorten them." if room < 225 else " Shorten them."
    yield Finding(
        "cut captions",
        "mend",
        f"{plural(len(cut), 'caption is', 'captions are')} longer than the {room} tokens that the text encoders read.",
        f"What is shown under each picture is not read.{longer}",
        tuple(path for path, _ in cut),
        tuple(f"… {rest.strip()}" for _, rest in cut),
    )


def _identical(captions: Sequence[Caption]) -> Iterator[Finding]:
    same: dict[str, list[str]] = defaultdict(list)
    for caption in captions:
        same[caption.text].append(caption.path)
    groups = [(text, paths) for text, paths in same.items() if len(paths) >= LEAST_ALIKE]
    if groups:
        paths = [path for _, group in groups for path in group]
        texts = [text for text, group in groups for _ in group]
        yield Finding(
            "same caption",
            "mend",
            f"{plural(len(paths), 'picture shares', 'pictures share')} {plural(len(groups), 'caption')} word for word.",
            "What differs between them is said nowhere, and is learned as part of the subject. Say what changes: place, pose, "
            "light, clothes.",
            tuple(paths),
            tuple(texts),
        )


def _trigger(captions: Sequence[Caption], tokenizer: CLIPTokenizer, trigger: str | None) -> Iterator[Finding]:
    word = trigger or suggested_trigger(captions)
    if word is None or not captions:
        return
    without = [caption for caption in captions if word.lower() not in caption.text.lower()]
    if without:
        named = f"the trigger word {word!r}" if trigger else f"{word!r}, which nearly all the others name"
        yield Finding(
            "trigger missing",
            "mend",
            f"{plural(len(without), 'caption does', 'captions do')} not have {named}.",
            f"Add it: python caption.py FOLDER --edit first:{word}, which leaves captions alone that name it. Pictures without it "
            "teach the subject to every prompt.",
            tuple(caption.path for caption in without),
            tuple(caption.text for caption in without),
        )
    spelt = pieces(trigger, tokenizer) if trigger else []
    if len(spelt) > 1 and trigger is not None and " " not in trigger:
        yield Finding(
            "trigger of pieces",
            "know",
            f"The trigger word {trigger!r} is no token of its own: it is spelt {' + '.join(spelt)}.",
            "It can be learned all the same, and shares its pieces with other words. A rare word of one token has no meaning to "
            "unlearn.",
        )


def _repeated(captions: Sequence[Caption], trigger: str | None) -> Iterator[Finding]:
    """What every caption says beside the trigger word and the class."""
    if len(captions) < FEWEST:
        return
    tags = are_tags(captions)
    counts = counted(captions, tags=tags)
    everywhere = sorted(unit for unit, count in counts.items() if count == len(captions))
    known = {word for caption in captions for word in caption.class_words}
    known |= set((trigger or "").lower().split()) | ({trigger.lower()} if trigger else set())
    excused = 0 if trigger else 1
    if not tags:
        excused += 1  # the class: sks dog
    shared = [unit for unit in everywhere if not set(unit.split()) <= known | PLAIN]
    if trigger is None and (word := suggested_trigger(captions)) in shared:
        shared.remove(word)
        excused -= 1
    if len(shared) <= excused:
        return
    named = ", ".join(repr(unit) for unit in shared)
    yield Finding(
        "repeated",
        "know",
        f"All {len(captions):,} captions say {named}.",
        "What every caption names becomes part of the trigger: it comes without being asked for, and does not come alone. Leave it "
        "out of the captions where it belongs to the subject, and vary it where it does not.",
        tuple(caption.path for caption in captions),
    )


def _misspelt(captions: Sequence[Caption]) -> Iterator[Finding]:
    """Words of one caption that are nearly a frequent word: as long to one letter, with its first and last letter."""
    counts = counted(captions, tags=False)
    common: dict[tuple[str, str], list[str]] = defaultdict(list)
    for word, count in counts.items():
        if count >= COMMON and len(word) > 4:
            common[word[0], word[-1]].append(word)
    slips: dict[str, str] = {}
    for word, count in counts.items():
        if count == 1 and len(word) > 4 and word.isalpha():
            near = [other for other in common[word[0], word[-1]] if abs(len(other) - len(word)) <= 1]
            if meant := difflib.get_close_matches(word, near, n=1, cutoff=0.85):
                slips[word] = meant[0]
    if slips:
        which = [(caption.path, word) for caption in captions for word in sorted(caption.words & slips.keys())]
        yield Finding(
            "misspelt",
            "know",
            f"{plural(len(slips), 'word looks', 'words look')} like a slip: "
            f"{', '.join(f'{one!r} for {other!r}' for one, other in list(slips.items())[:20])}.",
            "A word that only one caption has is learned from one picture. Mend it where it is a slip.",
            tuple(path for path, _ in which),
            tuple(word for _, word in which),
        )


def _contradicting(captions: Sequence[Caption]) -> Iterator[Finding]:
    """Captions that name another subject than their folder's class, and not that."""
    classes = {word for caption in captions for word in caption.class_words - PLAIN}
    shared = {word for word in classes if all(word in caption.class_words for caption in captions)}
    wrong: list[tuple[Caption, str]] = []
    for caption in captions:
        own = caption.class_words - PLAIN
        if not own:
            continue
        others = (classes - own - shared) & caption.words if not own & caption.words else set()
        for kind in _KINDS:
            mine, said = ({kind[word] for word in words & kind.keys()} for words in (own, caption.words))
            if mine and said and not mine & said:
                others |= said
        if others:
            wrong.append((caption, ", ".join(sorted(others))))
    if wrong:
        yield Finding(
            "other class",
            "mend",
            f"{plural(len(wrong), 'caption names', 'captions name')} another subject than the class of the folder.",
            "Move the picture to the folder of what it shows, or mend its caption.",
            tuple(caption.path for caption, _ in wrong),
            tuple(
                f"{said}, in a folder of {caption.picture.image.subset.class_tokens}: {caption.text}"
                for caption, said in wrong
            ),
        )


def regularisation_findings(captions: Sequence[Caption]) -> Iterator[Finding]:
    """captions: of all training pictures. Regularisation pictures should be of the class that the subject belongs to."""
    prior = [caption for caption in captions if caption.picture.image.subset.is_reg]
    subject = [caption for caption in captions if not caption.picture.image.subset.is_reg]
    if not prior or not subject:
        return
    classes = {word for caption in prior for word in caption.class_words - PLAIN}
    named = classes or {word for word, count in counted(subject, tags=False).items() if count >= len(subject) / 2}
    unlike = [caption for caption in prior if named and caption.text and not named & caption.words]
    alien = classes and not any(classes & (caption.words | caption.class_words) for caption in subject)
    if alien:
        yield Finding(
            "other regularisation class",
            "mend",
            f"The regularisation pictures are of {', '.join(sorted(classes))}, which no caption to train names.",
            "They keep what the base knows of the subject's class. Take pictures of that class (dog, for sks dog).",
            tuple(caption.path for caption in prior),
        )
    if unlike:
        yield Finding(
            "regularisation unlike",
            "mend",
            f"{plural(len(unlike), 'regularisation picture does', 'regularisation pictures do')} not name the class "
            f"({', '.join(sorted(named))}).",
            "Regularisation pictures keep what the base knows of the class: their captions name it, and not the subject.",
            tuple(caption.path for caption in unlike),
            tuple(caption.text for caption in unlike),
        )
