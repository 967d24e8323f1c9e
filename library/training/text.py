"""How captions condition the U-Net: encoded in the step, cached one by one, or as a table of the prompts of all classes.

Each kind puts what it needs into a batch (`library.data.cached_samples.Captions`) and makes the conditioning of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from library.caching.prompt_cache import PromptCache
from library.data.cached_samples import Batch, Captions
from library.data.text_embeddings import TextEmbeddings
from library.data.trained_image import TrainedImage
from library.device import named_dtype
from library.errors import UserError
from library.models.conditioning import CHUNK, Conditioning, TextConditioner
from library.models.load import TextPart
from library.options.data import ClassCacheOptions
from library.options.run import RunOptions
from library.processes import Processes
from library.training.caches import Prepared
from library.training.models import text_conditioner
from networks.families import Family


class Text(Captions, Protocol):
    """Captions in batches, and the conditioning they give the U-Net."""

    def condition(self, batch: Batch, generator: torch.Generator | None) -> Conditioning:
        """The conditioning of a batch. generator: draws which prompts are dropped; None drops none."""
        ...


@dataclass(frozen=True)
class EncodedText:
    """Text encoders that run in the step. trains: whether they learn."""

    conditioner: TextConditioner
    trains: bool

    def allocate(self, batch: Batch, pin: bool) -> None:
        pass

    def label(self, batch: Batch, images: Sequence[TrainedImage]) -> None:
        batch.ids = self.conditioner.tokenize(batch.captions).transpose(0, 1).contiguous()

    def read(self, batch: Batch, part: slice) -> None:
        pass

    def condition(self, batch: Batch, generator: torch.Generator | None) -> Conditioning:
        assert batch.ids is not None
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            return self.conditioner.encode(batch.ids.transpose(0, 1))


@dataclass(frozen=True)
class CachedText:
    """Embeddings of captions that do not change, from the cache."""

    prompts: PromptCache

    def allocate(self, batch: Batch, pin: bool) -> None:
        def room(shape: tuple[int, ...]) -> Tensor:
            return torch.empty((len(batch), *shape), dtype=torch.float16, pin_memory=pin)

        batch.states = room(self.prompts.states.meta.shape)
        if self.prompts.pooled is not None:
            batch.pooled = room(self.prompts.pooled.meta.shape)

    def label(self, batch: Batch, images: Sequence[TrainedImage]) -> None:
        pass

    def read(self, batch: Batch, part: slice) -> None:
        assert batch.states is not None
        captions = batch.captions[part]
        if captions:
            pooled = None if batch.pooled is None else batch.pooled.numpy()[part]
            self.prompts.read_into(self.prompts.rows(captions), batch.states.numpy()[part], pooled)

    def condition(self, batch: Batch, generator: torch.Generator | None) -> Conditioning:
        assert batch.states is not None
        return Conditioning(batch.states, batch.pooled)


class PromptTable:
    """The embeddings of all prompts of classes, on the device; a batch holds row numbers. dropout: share of empty prompts."""

    def __init__(self, text: TextEmbeddings, dropout: float, *, device: torch.device, dtype: torch.dtype) -> None:
        self.rows: Mapping[int, int] = text.rows
        self.empty_row, self.dropout = text.empty_row, dropout
        self.states = text.embeddings.to(device, dtype)
        self.pooled = None if text.pooled is None else text.pooled.to(device, dtype)

    def allocate(self, batch: Batch, pin: bool) -> None:
        pass

    def label(self, batch: Batch, images: Sequence[TrainedImage]) -> None:
        batch.text_rows = torch.tensor([self.rows[image.class_id] for image in images if image.class_id is not None])

    def read(self, batch: Batch, part: slice) -> None:
        pass

    def condition(self, batch: Batch, generator: torch.Generator | None) -> Conditioning:
        rows = batch.text_rows
        assert rows is not None
        if generator is not None:
            dropped = torch.rand(len(batch), generator=generator, device=rows.device) < self.dropout
            rows = torch.where(dropped, self.empty_row, rows)
        return Conditioning(self.states[rows], None if self.pooled is None else self.pooled[rows])


def make_text(options: RunOptions, processes: Processes, prepared: Prepared, unet: Any, parts: list[TextPart]) -> Text:
    """How captions condition the U-Net. parts: text encoders that run in the step, where there are any."""
    dtype = named_dtype(options.model.mixed_precision)
    if isinstance(prepared.text, TextEmbeddings):
        assert options.class_pictures is not None
        _check_prompts(prepared.text, options, unet, prepared.family)
        return PromptTable(prepared.text, options.class_pictures.class_dropout, device=processes.device, dtype=dtype)
    if prepared.text is not None:
        return CachedText(prepared.text)
    conditioner = text_conditioner(options, prepared.family, parts, processes.device)
    captions = list(dict.fromkeys(picture.image.caption for picture in prepared.data.every))
    if cut := conditioner.overlong(captions):
        processes.say(
            f"{len(cut)} of {len(captions)} captions are longer than {conditioner.chunks * CHUNK} tokens and are cut (first: "
            f"{captions[cut[0]]!r}). --max_token_length gives them room, up to 225."
        )
    return EncodedText(conditioner, options.trains_text_encoders)


def _check_prompts(text: TextEmbeddings, options: RunOptions, unet: Any, family: Family) -> None:
    """Raise UserError where the prompts are not of this base's text encoders."""
    assert isinstance(options.cache, ClassCacheOptions)
    shape, width = tuple(text.embeddings.shape[1:]), unet.config["cross_attention_dim"]
    lacks_pooled = family.has_size_conditions and text.pooled is None
    lacks = " and the pooled ones of the second encoder" if lacks_pooled else ""
    if shape[-1] != width or lacks:
        raise UserError(
            f"{options.cache.text_embeddings_path} holds prompt embeddings {shape}, and the U-Net wants {width} wide "
            f"ones{lacks}: they are another text encoder's. Name another file, or leave text_embeddings out to have them built."
        )
