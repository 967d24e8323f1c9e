"""Encodes the weighted spans of a prompt for the U-Net, for SD1.x and SDXL, as A1111 does.

Chunks of 75 tokens are encoded one by one between start and end tokens, and joined with these: 77 positions a chunk. (Training
joins chunks without the inner start and end tokens, as kohya: `library.models.conditioning`.) Behaviour: A1111's wiki,
"Features", and its token counts in tests/data/prompt_vectors.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from library.inference.picture_request import Emphasis
from library.inference.prompt_syntax import Part, Prompt, Span
from library.models.conditioning import CHUNK, Conditioning, Fusion, checked_clip_skip, hidden_layer, words_of
from library.models.load import TextPart
from networks.families import TEXT_ENCODER_2, Family

# Of a full chunk, what follows a comma within this many tokens of its end moves to the next chunk: A1111's default.
COMMA_BACKTRACK = 20
_COMMA = ",</w>"
# Relative to the states. With untrained gain and bias, the mean after a layer norm consists of rounding errors, and the quotient
# of two such means is noise; CLIP's own means are near 0.1.
_NO_MEAN = 1e-5


@dataclass
class Chunk:
    """Up to 75 token ids, without start, end and padding, and the weight of each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EncodedPart:
    """An encoded side of an AND."""

    weight: float
    untils: tuple[int, ...]
    """last step of each text, counted from 1"""
    texts: tuple[Conditioning, ...]
    """of each text, a batch of one; all of one length"""

    @property
    def length(self) -> int:
        """Positions of each text."""
        return self.texts[0].states.shape[1]

    def filled(self, length: int, filling: Tensor | None = None) -> EncodedPart:
        """Each text filled to `length` positions with copies of `filling` [1, n, D], or else of its own last position."""
        if length == self.length:
            return self
        texts = []
        for text in self.texts:
            copied = text.states[:, -1:] if filling is None else filling
            copies = copied.repeat(1, (length - self.length) // copied.shape[1], 1)
            texts.append(text._replace(states=torch.cat([text.states, copies], dim=1)))
        return replace(self, texts=tuple(texts))

    def at_step(self, step: int) -> Conditioning:
        """The conditioning at a step, counted from 1; after the last step, the last one."""
        return next(
            (text for until, text in zip(self.untils, self.texts, strict=True) if step <= until), self.texts[-1]
        )


class PromptEncoder:
    """The text encoders of a model as a function of parsed prompts.

    clip_skip: as A1111 counts, 1 is the last layer; SDXL's layer is fixed. emphasis: "original" scales weighted states back to the
    mean that they had without weights, "no norm" does not. fusion: what to take in place of the encoders' states; weights act on
    it. Raises UserError for layers that do not exist.
    """

    def __init__(
        self,
        family: Family,
        parts: Sequence[TextPart],
        *,
        clip_skip: int = 1,
        emphasis: Emphasis = "original",
        fusion: Fusion | None = None,
    ) -> None:
        self.family, self.parts, self.emphasis, self.fusion = family, list(parts), emphasis, fusion
        self.clip_skip = checked_clip_skip(self.parts, clip_skip)

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> tuple[EncodedPart, ...]:
        """The parts of a prompt; equal texts of a schedule are encoded once."""
        return tuple(self._part(part) for part in prompt.parts)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Sequence[Span]], counts: Sequence[int] | None = None) -> Conditioning:
        """One batch: states [B, 77 * chunks, D] in the encoders' dtype and pooled [B, P] of the first chunks (SDXL).

        A batch is the texts of one schedule, and treated as A1111 treats these: shorter texts are filled with empty chunks, and
        "original" takes its means over the batch; counts: how often each text occurs in the schedule.
        """
        chunked = [cut_into_chunks(spans, self.parts[0]) for spans in texts]
        length = max(map(len, chunked))
        rows = [chunks + [Chunk()] * (length - len(chunks)) for chunks in chunked]
        shares = torch.tensor(counts or [1] * len(rows), dtype=torch.float64)
        pieces, pooled = [], None
        for index in range(length):
            chunks = [row[index] for row in rows]
            outputs = [self._run(part, chunks) for part in self.parts]
            hidden = [
                hidden_layer(self.family, part, output, self.clip_skip)  # [B, 77, D]
                for part, output in zip(self.parts, outputs, strict=True)
            ]
            if self.fusion is not None:
                ids = self.fusion.ids([words_of(self.parts[0], chunk.tokens) for chunk in chunks])
                hidden = self.fusion(hidden, ids.to(hidden[0].device))
            pieces.append(torch.cat([self._weighted(one, chunks, shares) for one in hidden], dim=-1))
            if index == 0 and self.parts[-1].component == TEXT_ENCODER_2:
                pooled = outputs[-1].text_embeds
        return Conditioning(torch.cat(pieces, dim=1), pooled)

    def _part(self, part: Part) -> EncodedPart:
        """Encode a part. Texts that alternations repeat are encoded once, and count for the mean as often as they occur."""
        spans = [scheduled.spans for scheduled in part.schedule]
        unique = list(dict.fromkeys(spans))
        batch = self.encode_texts(unique, [spans.count(text) for text in unique])
        found = {text: _row(batch, index) for index, text in enumerate(unique)}
        return EncodedPart(
            part.weight,
            tuple(scheduled.until_step for scheduled in part.schedule),
            tuple(found[text] for text in spans),
        )

    def _run(self, part: TextPart, chunks: Sequence[Chunk]) -> Any:
        ids = torch.tensor([padded_ids(chunk, part) for chunk in chunks], device=part.model.device)
        return part.model(ids, output_hidden_states=True)

    def _weighted(self, hidden: Tensor, chunks: Sequence[Chunk], shares: Tensor) -> Tensor:
        if all(weight == 1 for chunk in chunks for weight in chunk.weights):
            return hidden
        weights = torch.tensor([padded_weights(chunk) for chunk in chunks]).to(hidden.device)  # [B, 77]
        states = hidden.float()
        weighted = states * weights[..., None]
        if self.emphasis == "original":
            shares = shares.to(hidden.device)
            before, after = (shares @ values.double().mean(dim=(1, 2)) / shares.sum() for values in (states, weighted))
            size = states.square().mean().sqrt()
            if min(abs(before), abs(after)) > _NO_MEAN * size:
                weighted = weighted * (before / after).float()
        return weighted.to(hidden.dtype)


def empty_conditioning(like: Conditioning) -> Conditioning:
    """One chunk of zeros, with which SDXL was trained for "no prompt"; A1111 and diffusers use them for an empty negative."""
    states = torch.zeros_like(like.states[:, : CHUNK + 2])
    return Conditioning(states, None if like.pooled is None else torch.zeros_like(like.pooled))


def same_length(states: Sequence[Tensor]) -> list[Tensor]:
    """States [B, n, D], each repeated to the least common multiple of all n: they fit in one batch of the U-Net, as in ComfyUI.

    Attention does not notice: of k equal keys each gets 1/k of the weight that one of them gets alone. So the output is, up to
    rounding, that of a pass for each n, as in A1111.
    """
    common = math.lcm(*(one.shape[1] for one in states))
    return [one if one.shape[1] == common else one.repeat(1, common // one.shape[1], 1) for one in states]


def cut_into_chunks(spans: Sequence[Span], part: TextPart, backtrack: int = COMMA_BACKTRACK) -> list[Chunk]:
    """At least one chunk. A BREAK ends a chunk; of a full chunk, what follows a comma in the last `backtrack` tokens moves on."""
    tokenizer = part.tokenizer
    comma = tokenizer.get_vocab().get(_COMMA)
    chunks, current, last_comma = [], Chunk(), -1

    def close(keep: int = CHUNK) -> None:
        nonlocal current, last_comma
        chunks.append(Chunk(current.tokens[:keep], current.weights[:keep]))
        current, last_comma = Chunk(current.tokens[keep:], current.weights[keep:]), -1

    for span in spans:
        if span.closes_chunk:
            close()
            continue
        ids = tokenizer(span.text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        for token in ids:
            if token == comma:
                last_comma = len(current.tokens)
            elif len(current.tokens) == CHUNK and last_comma != -1 and CHUNK - last_comma <= backtrack:
                close(last_comma + 1)
            if len(current.tokens) == CHUNK:
                close()
            current.tokens.append(token)
            current.weights.append(span.weight)
    if current.tokens or not chunks:
        close()
    return chunks


def padded_ids(chunk: Chunk, part: TextPart) -> list[int]:
    """77 ids: start, tokens, end, and the tokenizer's padding: the end token for CLIP-L, 0 for SDXL's CLIP-G."""
    tokenizer = part.tokenizer
    ids = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (CHUNK + 2 - len(ids))


def padded_weights(chunk: Chunk) -> list[float]:
    """77 weights; 1 for start, end and padding."""
    return [1.0, *chunk.weights, *[1.0] * (CHUNK + 1 - len(chunk.weights))]


def _row(batch: Conditioning, index: int) -> Conditioning:
    row = slice(index, index + 1)
    return Conditioning(batch.states[row], None if batch.pooled is None else batch.pooled[row])
