"""What the text encoders say of captions, each caption encoded once.

    cache_dir/prompts_<hash of encoders, clip_skip, chunks, precision>/states    float16 [T, D]
    cache_dir/prompts_<hash of encoders, clip_skip, chunks, precision>/pooled    float16 [P], of SDXL only

The key is a hash of the caption: an edited one gets a new entry, and the old one stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from library.caching.fill import Say, locked
from library.caching.producers import fingerprint
from library.data.store import META_KEY, StoreMeta, TensorStore, pack_source, read_transactions, shard_folder
from library.data.store_writer import StoreWriter
from library.errors import RunFailed, UserError
from library.files import require_space
from library.models.conditioning import Conditioning
from library.models.encoders import PROMPTS_AT_ONCE
from library.processes import Processes
from library.progress import doing
from library.words import plural

STORES = {"states": "prompts", "pooled": "pooled"}
"""Folder of each store, and the kind of what is in it."""
EMPTY = ""


class Encoder(Protocol):
    """What is cached: a function of captions, as `library.models.conditioning.TextConditioner` is."""

    def __call__(self, prompts: Sequence[str]) -> Conditioning: ...

    def overlong(self, prompts: Sequence[str]) -> list[int]:
        """Indices of captions of which it does not see the end."""
        ...


class PromptCache:
    """Embeddings of the captions of a run and of the empty one. A row is a number for a caption.

    Can be pickled; stores are opened in the process that reads.
    """

    def __init__(self, folder: Path, captions: Sequence[str]) -> None:
        self.captions = list(captions)
        self._keys = [prompt_key(caption) for caption in self.captions]
        self._rows = {caption: row for row, caption in enumerate(self.captions)}
        self.states = TensorStore(folder / "states", "prompts")
        has_pooled = self.states.meta.producer["pooled"]
        self.pooled = TensorStore(folder / "pooled", "pooled") if has_pooled else None

    @property
    def empty_row(self) -> int:
        return self._rows[EMPTY]

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        """Row of each caption, int64 [B]. Raises UserError for one that this cache was not made for."""
        found = [self._rows.get(caption, -1) for caption in captions]
        if -1 in found:
            raise UserError(
                f"The caption {captions[found.index(-1)]!r} has no cached embedding. Options that change captions while "
                "training (shuffling, dropout of tags, wildcards) do not go with --cache_text_encoder_outputs."
            )
        return np.array(found, np.int64)

    def read(self, rows: Sequence[int] | np.ndarray) -> Conditioning:
        """float16 states [B, T, D], and pooled [B, P] where there are any."""
        states = np.empty((len(rows), *self.states.meta.shape), np.float16)
        pooled = None if self.pooled is None else np.empty((len(rows), *self.pooled.meta.shape), np.float16)
        self.read_into(rows, states, pooled)
        return Conditioning(torch.from_numpy(states), None if pooled is None else torch.from_numpy(pooled))

    def read_into(self, rows: Sequence[int] | np.ndarray, states: np.ndarray, pooled: np.ndarray | None) -> None:
        """Copy embeddings into parts of a batch, float16 and C-contiguous."""
        keys = [self._keys[row] for row in rows]
        self.states.read_into(keys, states)
        if self.pooled is not None and pooled is not None:
            self.pooled.read_into(keys, pooled)

    def close(self) -> None:
        for store in (self.states, self.pooled):
            if store is not None:
                store.close()


def prompt_key(caption: str) -> str:
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prompt_folder(cache_dir: Path, facts: dict[str, Any]) -> Path:
    return cache_dir / f"prompts_{fingerprint(facts)[:4].hex()}"


def prepare_prompts(
    captions: Sequence[str],
    *,
    conditioner: Callable[[], Encoder],
    facts: dict[str, Any],
    cache_dir: Path,
    processes: Processes,
    say: Say,
) -> PromptCache:
    """Encode the captions that are not cached yet, and the empty one; say how many.

    Args:
        conditioner: loads the text encoders; called only where something is missing.
        facts: all that decides what an encoder says: hashes of its weights, clip_skip, chunks, precision. Any other
            facts have a cache of their own.

    Raises UserError: a store in use, no space; RunFailed: an embedding that is not finite.
    """
    unique = list(dict.fromkeys([*captions, EMPTY]))
    folder = prompt_folder(cache_dir, facts)
    missing = _missing(folder, unique)
    processes.wait()
    if missing:
        say(f"prompts: {len(unique) - len(missing)} of {len(unique)} present, {len(missing)} missing in {folder}")
        # Who reads the pooled ones has the states open, too.
        with locked([folder / "states"], processes):
            mine = missing[processes.rank :: processes.world_size]
            share = _Share(folder, mine, len(missing), facts, processes.rank)
            cut = processes.gather(share.encode(conditioner()) if mine else [])
        processes.wait()
        if cut:
            are = plural(len(cut), "caption is", "captions are")
            say(f"prompts: {are} longer than the text encoders' room and cut off (first: {cut[0]!r})")
    return PromptCache(folder, unique)


def _missing(folder: Path, captions: Sequence[str]) -> list[str]:
    meta = _meta(folder / "states")
    if meta is None or (meta.producer["pooled"] and _meta(folder / "pooled") is None):
        return list(captions)
    stores = [TensorStore(folder / "states", "prompts")]
    stores += [TensorStore(folder / "pooled", "pooled")] if meta.producer["pooled"] else []
    missing = [caption for caption in captions if not all(prompt_key(caption) in store for store in stores)]
    for store in stores:
        store.close()
    return missing


def _meta(path: Path) -> StoreMeta | None:
    """None where there is no store, or one whose build was killed before its first commit."""
    with read_transactions(path) as transactions:
        notes = [bytes(data) for transaction in transactions if (data := transaction.get(META_KEY)) is not None]
    return StoreMeta.from_json(notes[0], path) if notes else None


@dataclass
class _Share:
    """What one process encodes. `missing`: how many captions all of them do."""

    folder: Path
    captions: list[str]
    missing: int
    facts: dict[str, Any]
    rank: int

    def encode(self, conditioner: Encoder) -> list[str]:
        """Write the embeddings. Returns the captions of which the encoders do not see the end."""
        writers: dict[str, StoreWriter] = {}
        try:
            with doing("caching prompts", len(self.captions)) as activity:
                for start in range(0, len(self.captions), PROMPTS_AT_ONCE):
                    part = self.captions[start : start + PROMPTS_AT_ONCE]
                    with torch.no_grad():
                        found = conditioner(part)
                    values = {"states": _to_host(found.states)}
                    if found.pooled is not None:
                        values["pooled"] = _to_host(found.pooled)
                    writers = writers or self._open({name: value.shape[1:] for name, value in values.items()})
                    for row, caption in enumerate(part):
                        self._put(writers, caption, {name: value[row] for name, value in values.items()})
                    activity.advance(len(part))
        finally:
            # Also after Ctrl-C: what was encoded is committed.
            for writer in writers.values():
                writer.commit()
                writer.close()
        return [self.captions[i] for i in conditioner.overlong(self.captions)]

    def _open(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, StoreWriter]:
        # Captions come and go, so there is no more to complete than the entries.
        metas = {
            name: StoreMeta(STORES[name], "float16", shape, self.facts | {"pooled": "pooled" in shapes}, complete=True)
            for name, shape in shapes.items()
        }
        require_space(self.folder, self.missing * sum(meta.entry_bytes for meta in metas.values()), "Caching prompts")
        writers = {}
        for name, meta in metas.items():
            shard = shard_folder(self.folder / name, self.rank)
            writers[name] = StoreWriter(shard, meta.kind, expected_bytes=self.missing * meta.entry_bytes)
            writers[name].set_meta(meta)
        return writers

    def _put(self, writers: dict[str, StoreWriter], caption: str, values: dict[str, np.ndarray]) -> None:
        key = prompt_key(caption)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise RunFailed(
                    f"The embedding of the caption {caption!r} is not finite in float16 (encoded in precision "
                    f"{self.facts.get('precision')}). Are the text encoders whole? --mixed_precision no may help."
                )
            writers[name].put(key, value, pack_source(bytes(16), bytes.fromhex(key), fingerprint(self.facts)))


def _to_host(encoded: torch.Tensor) -> np.ndarray:
    return encoded.to(torch.float16).cpu().numpy()
