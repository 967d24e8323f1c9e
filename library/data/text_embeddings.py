"""Prompt embeddings of all classes and of the empty prompt, in one file."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from library.errors import UserError


@dataclass(frozen=True)
class TextEmbeddings:
    """`embeddings` [C+1, 77, D] float16; row `rows[class_id]` belongs to a class, the last row to the empty prompt."""

    embeddings: torch.Tensor
    rows: dict[int, int]
    prompts: list[str] | None = None
    producer: dict[str, Any] = field(default_factory=dict)
    pooled: torch.Tensor | None = None
    """[C+1, P] float16, of SDXL's second encoder."""

    @property
    def empty_row(self) -> int:
        return self.embeddings.shape[0] - 1

    def rows_of(self, class_ids: list[int], path: Path) -> torch.Tensor:
        """Row of each class id, [N] int64. Raises UserError for classes the file does not have."""
        absent = sorted({c for c in class_ids if c not in self.rows})
        if absent:
            raise UserError(
                f"{len(absent)} class ids of the manifest have no prompt embedding in {path} (first: "
                f"{', '.join(map(str, absent[:3]))}). Rebuild it with prepare_cache.py, or check class_names."
            )
        return torch.tensor([self.rows[c] for c in class_ids], dtype=torch.int64)


def read_text_embeddings(path: Path) -> TextEmbeddings:
    """Read a `.safetensors` file of this project or a `.pt` tensor [C+1, 77, D] whose row i is class i.

    Raises UserError where the file is neither; a pickle that holds more than tensors is never executed.
    """
    pooled = None
    if path.suffix == ".safetensors":
        embeddings, pooled, rows, prompts, producer = _read_safetensors(path)
    else:
        embeddings = _read_pickle(path)
        rows, prompts, producer = {i: i for i in range(embeddings.shape[0] - 1)}, None, {}
    if embeddings.ndim != 3 or embeddings.shape[0] < 1 or not embeddings.is_floating_point():
        raise UserError(
            f"{path} should hold prompt embeddings [C+1, 77, D], but holds {tuple(embeddings.shape)} {embeddings.dtype}."
        )
    if not embeddings.isfinite().all():
        raise UserError(f"{path} holds values that are not finite. Delete it and build it again.")
    return TextEmbeddings(embeddings.to(torch.float16), rows, prompts, producer, pooled)


def _read_safetensors(
    path: Path,
) -> tuple[torch.Tensor, torch.Tensor | None, dict[int, int], list[str], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            embeddings = file.get_tensor("embeddings")
            pooled = file.get_tensor("pooled") if "pooled" in file.keys() else None
        class_ids = json.loads(metadata["class_ids"])
        return (
            embeddings,
            pooled,
            {int(c): row for row, c in enumerate(class_ids)},
            json.loads(metadata["prompts"]),
            json.loads(metadata["producer"]),
        )
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a file of prompt embeddings ({error}). Delete it to have it built again."
        ) from None


def _read_pickle(path: Path) -> torch.Tensor:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is a pickle that holds more than tensors, and running it could run anything. Where you trust it, convert "
            f"it: python -c \"import torch; torch.save(torch.load('{path}', weights_only=False)[:], 'clean.pt')\"."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} could not be read: {str(error).splitlines()[0]}.") from None
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, torch.Tensor):
        raise UserError(f"{path} should hold one tensor [C+1, 77, D], but holds {type(content).__name__}.")
    return content
