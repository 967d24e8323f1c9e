"""Text encoders beside a base's own: T5 and CLIP as transformers' folders have them, from a folder, the hub, or the tiny T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from library.errors import UserError
from library.files import read_json
from library.models.clip_tokenizer import MAX_LENGTH, folder_tokenizer
from library.models.language_files import CLIP, T5, language_kind
from library.models.locate import LANGUAGE, BaseLocation, weight_files
from library.models.weights import assemble, read_tensors
from library.progress import doing

# Of a whole T5 or CLIPModel.
_LEFT_OUT = {
    T5: ("decoder.", "lm_head."),
    CLIP: ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
}


@dataclass(frozen=True)
class T5Language:
    """Text, end token, padding; padding is not attended to, and its states are zeros."""

    name: str
    model: T5EncoderModel
    tokenizer: Tokenizer
    kind: str = T5

    @property
    def width(self) -> int:
        return int(self.model.config.d_model)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, 77] int64, on the CPU; what does not fit is cut off."""
        end = 1 if self.model.config.eos_token_id is None else int(self.model.config.eos_token_id)  # T5's own
        rows = torch.full((len(texts), MAX_LENGTH), int(self.model.config.pad_token_id or 0))
        for row, found in zip(rows, self._ids(texts), strict=True):
            cut = found[: MAX_LENGTH - 1] + [end]
            row[: len(cut)] = torch.tensor(cut)
        return rows

    def overlong(self, texts: Sequence[str]) -> list[int]:
        """Indices of texts of which it does not see the end."""
        return [index for index, found in enumerate(self._ids(texts)) if len(found) > MAX_LENGTH - 1]

    def states(self, ids: Tensor) -> Tensor:
        """The last layer's states [B, 77, width] float32 of ids on the model's device; zeros where there is no text."""
        mask = ids != int(self.model.config.pad_token_id or 0)
        output = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return output.float() * mask[..., None]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class ClipLanguage:
    """CLIP's last layer, with its padding, of which a U-Net sees the states too."""

    name: str
    model: CLIPTextModel
    tokenizer: CLIPTokenizer
    kind: str = CLIP

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def ids(self, texts: Sequence[str]) -> Tensor:
        found = self.tokenizer(list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True)
        return torch.tensor(found.input_ids)

    def overlong(self, texts: Sequence[str]) -> list[int]:
        found = self.tokenizer(list(texts), verbose=False).input_ids
        return [index for index, row in enumerate(found) if len(row) > MAX_LENGTH]

    def states(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state.float()


LanguageModel: TypeAlias = T5Language | ClipLanguage


def load_language(location: BaseLocation, *, dtype: torch.dtype, device: torch.device | str) -> LanguageModel:
    """The encoder with its tokenizer, frozen. T5 overflows float16, and computes in float32 instead.

    Raises UserError where a file is missing or damaged, or the folder is of another kind of model.
    """
    kind, config = _config(location.path)
    with doing(f"reading {location.path.name}"):
        stored = read_tensors(weight_files(location.path, LANGUAGE))
    tensors = {name: value for name, value in stored.items() if not name.startswith(_LEFT_OUT[kind])}
    where = f"The text encoder of {location.path}"
    if kind == T5:
        shared = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
        if shared is not None:
            tensors |= {"shared.weight": shared, "encoder.embed_tokens.weight": shared}
        dtype = torch.float32 if dtype == torch.float16 else dtype
        t5 = assemble(lambda: T5EncoderModel(config), tensors, where, dtype=dtype, device=device)
        return T5Language(location.name, t5, _tokenizer(location.path))
    tensors.pop("text_model.embeddings.position_ids", None)  # which older versions saved
    clip = assemble(lambda: CLIPTextModel(config), tensors, where, dtype=dtype, device=device)
    return ClipLanguage(location.name, clip, folder_tokenizer(location.path))


def _config(folder: Path) -> tuple[str, Any]:
    kind, fields = language_kind(folder), read_json(folder / "config.json")
    if kind == T5:
        return kind, T5Config.from_dict(fields)
    return kind, CLIPTextConfig.from_dict(fields.get("text_config") or fields)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(
            f"{path} is no readable tokenizer: {(str(error).splitlines() or [type(error).__name__])[0]}. It is saved beside the "
            "weights as transformers' fast tokenizers do."
        ) from None
    found.no_padding()
    found.no_truncation()
    return found
