"""Prompts to what the U-Net is conditioned on, for SD1.x and SDXL, short prompts and long ones.

Long prompts are cut into chunks of 75 tokens, each encoded alone between its own markers, as kohya's and A1111's. Their
states are joined to [start, 75 of each chunk, end]. Source: kohya sd-scripts (max_token_length), SDXL (arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from library.errors import UserError
from library.models.load import TextPart
from library.options.kohya.training import TextEncoderOptions
from networks.families import Family

CHUNK = 75
_MARKERS = 2


class Conditioning(NamedTuple):
    states: Tensor
    """[B, 75 * chunks + 2, D]; of SDXL both encoders' side by side"""
    pooled: Tensor | None
    """[B, P] of SDXL's second encoder, from the first chunk; None for SD1.x"""


class Fusion(Protocol):
    """States in place of the text encoders' own, made of these and of what other encoders say (`library.models.text_fusion`)."""

    def ids(self, texts: Sequence[str]) -> Tensor:
        """What the other encoders read: token ids [others, N, 77] int64, on the CPU."""
        ...

    def __call__(self, hidden: Sequence[Tensor], ids: Tensor) -> list[Tensor]:
        """The same as `hidden`, of each text encoder [N, 77, D]; ids: those of the same N texts, on the encoders' device."""
        ...


class TextConditioner:
    """The text encoders of a model as one function of prompts. Differentiable, so that they can be trained.

    clip_skip: as A1111 counts, 1 is the last layer; it has no effect where the family's layer is fixed. chunks: 1, 2 or 3 (75,
    150, 225 tokens). fusion: what to take in place of the encoders' states. Raises UserError for layers that are not there.
    """

    def __init__(
        self,
        family: Family,
        parts: Sequence[TextPart],
        *,
        clip_skip: int = 1,
        chunks: int = 1,
        fusion: Fusion | None = None,
    ) -> None:
        self.family, self.parts, self.chunks, self.fusion = family, list(parts), chunks, fusion
        self.clip_skip = checked_clip_skip(self.parts, clip_skip)

    @property
    def length(self) -> int:
        """Positions that come out."""
        return CHUNK * self.chunks + _MARKERS

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [encoders, B, chunks, 77] int64, on the CPU, behind the model's own those of a fusion's other encoders; what
        does not fit is cut off (`overlong` says where)."""
        ids = torch.tensor(
            [
                [[_with_markers(part, piece) for piece in self._pieces(part, text)] for text in prompts]
                for part in self.parts
            ]
        )
        if self.fusion is None:
            return ids
        return torch.cat([ids, self.fusion.ids(self.texts(prompts)).unflatten(1, (len(prompts), self.chunks))])

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """What a fusion's other encoders read: the words of each chunk of each prompt."""
        return [words_of(self.parts[0], piece) for text in prompts for piece in self._pieces(self.parts[0], text)]

    def overlong(self, prompts: Sequence[str]) -> list[int]:
        """Indices of prompts of which the encoders do not see the end."""
        tokenizer, room = self.parts[0].tokenizer, CHUNK * self.chunks
        found = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in prompts]
        return [i for i, ids in enumerate(found) if len(ids) > room]

    def encode(self, ids: Tensor) -> Conditioning:
        """Ids of `tokenize`, on the encoders' device, to what the U-Net takes, in the encoders' dtype."""
        hidden, pooled = [], None
        rows, shape = ids.flatten(1, 2), ids.shape[1:3]  # [encoders, B * chunks, 77]
        own = len(self.parts)
        for part, of_part in zip(self.parts, rows[:own], strict=True):
            output = part.model(of_part, output_hidden_states=True)
            hidden.append(hidden_layer(self.family, part, output, self.clip_skip))
            if part is not self.parts[0]:
                pooled = output.text_embeds.unflatten(0, shape)[:, 0]
        if self.fusion is not None:
            hidden = self.fusion(hidden, rows[own:])
        return Conditioning(torch.cat([_joined(one.unflatten(0, shape)) for one in hidden], dim=-1), pooled)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts).to(self.parts[0].model.device))

    def _pieces(self, part: TextPart, text: str) -> list[list[int]]:
        """One prompt's tokens, up to 75 for each chunk."""
        tokens = part.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return [tokens[start : start + CHUNK] for start in range(0, CHUNK * self.chunks, CHUNK)]


def words_of(part: TextPart, tokens: Sequence[int]) -> str:
    """What a chunk says, as CLIP's tokenizer has it: in lower case, with blanks around marks."""
    return part.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _with_markers(part: TextPart, tokens: Sequence[int]) -> list[int]:
    """A chunk's 77 ids: start, tokens, end, padding."""
    tokenizer = part.tokenizer
    row = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (CHUNK + _MARKERS - len(row))


def clip_skip(options: TextEncoderOptions, family: Family) -> int:
    """The layer that the options ask for, counted from the end; 1 where the family's is fixed."""
    return 1 if family.text_layer is not None or options.clip_skip is None else options.clip_skip


def checked_clip_skip(parts: Sequence[TextPart], clip_skip: int) -> int:
    """Raises UserError for layers that are not there."""
    return checked_layer(clip_skip, min(int(part.model.config.num_hidden_layers) for part in parts))


def checked_layer(clip_skip: int, layers: int) -> int:
    """Of a text encoder with so many layers, whose last one is 1. Raises UserError for one that is not there."""
    if not 1 <= clip_skip <= layers:
        raise UserError(f"clip_skip must lie between 1 and {layers}, the text encoder's layers, got {clip_skip}.")
    return clip_skip


def hidden_layer(family: Family, part: TextPart, output: object, clip_skip: int) -> Tensor:
    """Of an encoder's output with its hidden_states, the layer the U-Net takes [N, 77, D]."""
    hidden_states: Sequence[Tensor] = output.hidden_states  # type: ignore[attr-defined]
    if family.text_layer is not None:
        return hidden_states[-family.text_layer]
    if clip_skip == 1:
        return output.last_hidden_state  # type: ignore[attr-defined]
    return part.model.text_model.final_layer_norm(hidden_states[-clip_skip])


def _joined(hidden: Tensor) -> Tensor:
    """[B, chunks, 77, D] -> [B, 75 * chunks + 2, D]"""
    middle = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], middle, hidden[:, -1, -1:]], dim=1)
