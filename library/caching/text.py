"""The file of prompt embeddings: one row per class and the empty prompt last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from library.caching.producers import fingerprint
from library.data.text_embeddings import TextEmbeddings, read_text_embeddings
from library.files import whole_file


class PromptEncoder(Protocol):
    def encode(self, prompts: list[str]) -> torch.Tensor: ...


def prompts_of(names: dict[int, str], template: str) -> tuple[list[int], list[str]]:
    """Class ids in order, and their prompts followed by the empty one."""
    class_ids = sorted(names)
    return class_ids, [*(template.replace("{name}", names[c]) for c in class_ids), ""]


def up_to_date(path: Path, prompts: list[str], producer: dict[str, Any]) -> bool:
    """Whether the file at `path` holds just these prompts by just this encoder."""
    if not path.exists():
        return False
    present = read_text_embeddings(path)
    return present.prompts == prompts and fingerprint(present.producer) == fingerprint(producer)


def build_text_embeddings(
    path: Path,
    class_ids: list[int],
    prompts: list[str],
    producer: dict[str, Any],
    encoder: PromptEncoder,
    batch: int = 64,
) -> TextEmbeddings:
    """Encode all prompts, write [C+1, 77, D] float16 and read it back."""
    with torch.no_grad():
        parts = [encoder.encode(prompts[i : i + batch]).cpu() for i in range(0, len(prompts), batch)]
    metadata = {"class_ids": json.dumps(class_ids), "prompts": json.dumps(prompts), "producer": json.dumps(producer)}
    with whole_file(path) as temporary:
        save_file({"embeddings": torch.cat(parts).to(torch.float16).contiguous()}, temporary, metadata=metadata)
    return read_text_embeddings(path)
