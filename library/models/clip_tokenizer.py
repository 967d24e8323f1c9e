"""CLIP's byte-pair tokenizer without a download: the real vocabulary, and a small one for the tiny model."""

from __future__ import annotations

import gzip
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from library.errors import UserError
from library.files import write_json, write_text
from networks.families import TEXT_ENCODER, TEXT_ENCODER_2

START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_PAD = "!"  # the first entry of every such vocabulary: OpenCLIP pads with zeros
PADS = {TEXT_ENCODER: END, TEXT_ENCODER_2: OPEN_CLIP_PAD}
MAX_LENGTH = 77

CLIP_VOCABULARY_SIZE = 49408
_CLIP_MERGES = CLIP_VOCABULARY_SIZE - 512 - 2  # less 256 bytes, the same 256 at the end of a word, and the two markers
_MERGE_FILE = Path(__file__).parent / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz"

# Words that become one token in the tiny vocabulary; any other text is spelled out in bytes.
_TINY_WORDS = (
    "a an the of on in at and with to is no one two three photo picture image drawing painting background small large big "
    "red green blue yellow orange purple pink brown black white gray grey cyan magenta teal dark light bright "
    "circle square triangle star ring cross diamond heart stripes dots line ellipse rectangle hexagon pentagon shape "
    "plain striped checked dotted gradient turquoise small medium middle spiral "
    "left right top bottom center dog cat bird fish tree car flower house person girl boy face"
)


def tiny_words() -> list[str]:
    """The words that the tiny models know as one token."""
    return _TINY_WORDS.split()


def tiny_tokenizer(pad: str = END) -> CLIPTokenizer:
    """The tiny models' tokenizer: bytes, and one token for each of some hundred words of colours and shapes."""
    return build_tokenizer(tiny_merges(), pad)


def tokenizer_for(vocabulary_size: int, where: str, pad: str = END) -> CLIPTokenizer:
    """The tokenizer that goes with a token embedding of so many rows: CLIP's, or the tiny models'.

    OpenAI's has 49,408 entries: "a photo of a cat" is 49406 320 1125 539 320 2368 49407, padded with 49407. Raises UserError for
    an unknown size.
    """
    return build_tokenizer(merges_for(vocabulary_size, where), pad)


def folder_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a diffusers folder. Raises UserError where there is none that can be read."""
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder} holds no readable CLIP tokenizer: {reason}. vocab.json and merges.txt are needed."
        ) from error


def merges_for(vocabulary_size: int, where: str) -> tuple[tuple[str, str], ...]:
    """The merges that span a vocabulary of this size. Raises UserError for an unknown one, naming `where`."""
    if vocabulary_size == CLIP_VOCABULARY_SIZE:
        return _clip_merges()
    if vocabulary_size == len(vocabulary(tiny_merges())):
        return tiny_merges()
    raise UserError(
        f"{where} has a token embedding of {vocabulary_size} rows, and a single file carries no tokenizer. Known are "
        f"CLIP's ({CLIP_VOCABULARY_SIZE}) and the tiny model's ({len(vocabulary(tiny_merges()))}): use the diffusers folder."
    )


def build_tokenizer(merges: tuple[tuple[str, str], ...], pad: str = END) -> CLIPTokenizer:
    """A CLIPTokenizer of 77 positions over the vocabulary that the merges span."""
    pairs: Any = list(merges)  # annotated as strings, but tokenizers' BPE takes pairs
    return CLIPTokenizer(vocab=vocabulary(merges), merges=pairs, model_max_length=MAX_LENGTH, pad_token=pad)


def write_tokenizer(folder: Path, merges: tuple[tuple[str, str], ...], pad: str = END) -> None:
    """Write vocab.json, merges.txt and the two configuration files, as tokenizer/ of SD1.5 has them, tokenizer_2/ of SDXL.

    `pad` is OPEN_CLIP_PAD for the latter.
    """
    write_json(folder / "vocab.json", vocabulary(merges))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    markers = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", markers)
    write_json(
        folder / "tokenizer_config.json",
        {**markers, "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True},
    )


def vocabulary(merges: tuple[tuple[str, str], ...]) -> dict[str, int]:
    """Token -> id in CLIP's order: 256 bytes, the same at the end of a word, the merges, start and end of text."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


@cache
def _clip_merges() -> tuple[tuple[str, str], ...]:
    lines = gzip.decompress(_MERGE_FILE.read_bytes()).decode("utf-8").split("\n")
    return tuple((left, right) for left, right in (line.split() for line in lines[1 : _CLIP_MERGES + 1]))


@cache
def tiny_merges() -> tuple[tuple[str, str], ...]:
    """Byte-pair encoding (Sennrich et al. 2016) of `_TINY_WORDS`, until every word is one token. Ties go by alphabet."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in tiny_words()]
    merges = []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_merge(word, best) for word in words]
    return tuple(merges)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        # Left to right, so "aaa" with (a, a) becomes "aa a": a merged symbol never equals the pair's left half.
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in CLIP's order: printable bytes as themselves, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
