"""From options to caches that are complete and fit: what prepare_cache.py does, and train_repa.py first of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from library.caching.build import build
from library.caching.picture_sets import Pictures, PictureSet
from library.caching.producers import Wanted
from library.caching.survey import Survey, survey
from library.caching.text import build_text_embeddings, prompts_of, up_to_date
from library.data.pixels import PIXELS_VERSION
from library.data.sources import Sample
from library.data.store import TensorStore, disk_bytes, lock_store, shard_folders
from library.data.store_writer import mark, purge
from library.data.text_embeddings import TextEmbeddings, read_text_embeddings
from library.errors import UserError
from library.files import human_bytes, require_space, write_text
from library.models.dinov2 import dinov2_width, load_dinov2
from library.models.encoders import VAE_FACTOR, DinoEncoder, TextEncoder, VaeEncoder, weight_fingerprint
from library.models.load import load_text_encoder, load_vae
from library.models.locate import DINOV2, locate_base, locate_dino
from library.options.data import CacheOptions, DataOptions
from library.options.model import ModelOptions
from library.processes import Processes

KINDS = ("latents", "tokens")
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}
SD_LATENT_CHANNELS = 4


@dataclass
class Cached:
    """A picture set whose entries all stand in its stores; unreadable pictures are left out of `samples`."""

    samples: list[Sample]
    stores: dict[str, TensorStore]
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass
class Caches:
    train: Cached
    val: Cached | None
    text: TextEmbeddings
    text_path: Path


class Preparation:
    """What the options ask of the caches. Encoders are loaded only when something has to be encoded."""

    def __init__(
        self,
        model: ModelOptions,
        data: DataOptions,
        cache: CacheOptions,
        processes: Processes,
        *,
        workers: int,
        tokens: bool,
    ) -> None:
        self.model, self.data, self.cache, self.processes, self.workers = model, data, cache, processes, workers
        self.kinds = KINDS if tokens else KINDS[:1]
        self.precision = model.mixed_precision if cache.encoder_precision == "auto" else cache.encoder_precision
        self._encoders: dict[str, Any] = {}

    @property
    def memory(self) -> Path:
        """Hashes of weight files, remembered between runs."""
        return self.cache.cache_dir / "weight_hashes.json"

    def made_elsewhere(self, kind: str) -> tuple[int, ...] | None:
        return self.cache.latent_shape if kind == "latents" else self.cache.token_shape

    def path(self, pictures: str, kind: str) -> Path:
        return self.cache.store_path(f"{pictures}_{kind}")

    def is_foreign(self, pictures: str, kind: str) -> bool:
        """Whether the store was made elsewhere: it has no `__meta__`, and its shape is given."""
        path = self.path(pictures, kind)
        if self.made_elsewhere(kind) is None or not shard_folders(path):
            return False
        store = TensorStore(path, kind, made_elsewhere=("float16", self.made_elsewhere(kind) or ()))
        foreign = store.foreign
        store.close()
        return foreign

    def wanted(self, kind: str, foreign: bool) -> Wanted:
        """Form and producer of the entries this run needs."""
        if foreign:
            shape = self.made_elsewhere(kind)
            assert shape is not None
            side = self.data.resolution // VAE_FACTOR
            right = (SD_LATENT_CHANNELS, side, side) if kind == "latents" else (self.cache.token_grid**2, shape[1])
            return Wanted(kind, "float16", right, {})
        return self._wanted_latents() if kind == "latents" else self._wanted_tokens()

    def _wanted_latents(self) -> Wanted:
        location = locate_base(self.model.pretrained_model_name_or_path, ("vae",))
        side = self.data.resolution // VAE_FACTOR
        producer = self._pixels() | {
            "model": self.model.pretrained_model_name_or_path,
            "weights": weight_fingerprint(location, "vae", self.memory),
            "value": "posterior mode x scaling factor",
        }
        return Wanted("latents", "float16", (SD_LATENT_CHANNELS, side, side), producer)

    def _wanted_tokens(self) -> Wanted:
        location = locate_dino(self.model.dino_model)
        producer = self._pixels() | {
            "model": self.model.dino_model,
            "weights": weight_fingerprint(location, DINOV2, self.memory),
            "dino_resolution": self.cache.dino_resolution,
            "token_grid": self.cache.token_grid,
        }
        shape = (self.cache.token_grid**2, dinov2_width(location))
        return Wanted("tokens", self.cache.token_dtype, shape, producer)

    def _pixels(self) -> dict[str, Any]:
        return {
            "resolution": self.data.resolution,
            "crop": "centre",
            "pixels": PIXELS_VERSION,
            "precision": self.precision,
        }

    def encoder(self, kind: str) -> Any:
        """VaeEncoder, DinoEncoder or TextEncoder, loaded on first use."""
        if kind not in self._encoders:
            dtype, device = DTYPES[self.precision], self.processes.device
            base = self.model.pretrained_model_name_or_path
            if kind == "latents":
                self._encoders[kind] = VaeEncoder(load_vae(locate_base(base, ("vae",)), dtype=dtype, device=device))
            elif kind == "tokens":
                teacher = load_dinov2(locate_dino(self.model.dino_model), dtype=dtype, device=device)
                self._encoders[kind] = DinoEncoder(teacher, self.cache.dino_resolution, self.cache.token_grid)
            else:
                tokenizer, text_model = load_text_encoder(locate_base(base, ("text_encoder", "tokenizer")))
                self._encoders[kind] = TextEncoder(tokenizer, text_model.to(device))
        return self._encoders[kind]

    def survey(self, pictures: PictureSet, *, lock: bool = True) -> dict[str, Survey]:
        """State of each store against `pictures`. lock: False where this run holds the stores' locks itself."""
        # The main process first: it may have to fetch or make a model.
        with self.processes.main_first():
            return self._survey(pictures, lock)

    def _survey(self, pictures: PictureSet, lock: bool) -> dict[str, Survey]:
        states = {}
        for kind in self.kinds:
            foreign = self.is_foreign(pictures.name, kind)
            states[kind] = survey(
                self.path(pictures.name, kind),
                self.wanted(kind, foreign),
                pictures.source,
                pictures.samples,
                made_elsewhere=self.made_elsewhere(kind) if foreign else None,
                lock=lock,
            )
        return states

    def prepare(self, pictures: Pictures, *, rebuild: bool, say: Callable[..., None]) -> Caches:
        """Make every cache complete, building what is missing; say what was done.

        rebuild: stores of another teacher, resolution or option are made anew; otherwise they are a UserError, because
        a training run should not overwrite by a slip of an option what took days.
        """
        ready = {one.name: self._prepare_set(one, rebuild=rebuild, say=say) for one in pictures.sets}
        text, text_path = self._prepare_text(pictures.class_names, say)
        self._encoders.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Caches(ready["train"], ready.get("val"), text, text_path)

    def _prepare_set(self, pictures: PictureSet, *, rebuild: bool, say: Callable[..., None]) -> Cached:
        states = self.survey(pictures)
        for state in states.values():
            if state.differences and not rebuild:
                raise UserError(
                    f"The store {state.path} was made differently: {'; '.join(state.differences)}. Restore these options, or "
                    "let prepare_cache.py rebuild it."
                )
        self.processes.wait()
        todo = {kind: state for kind, state in states.items() if not state.complete}
        if todo:
            with self._locked(todo):
                self._build(pictures, todo, say)
                states |= {kind: state for kind, state in self.survey(pictures, lock=False).items() if kind in todo}
                self._finish({kind: states[kind] for kind in todo})
            self.processes.wait()
        dropped = {sample_id: why for state in states.values() for sample_id, why in state.unreadable.items()}
        present = [sample for sample in pictures.samples if sample.sample_id not in dropped]
        stores = ", ".join(
            f"{kind} {human_bytes(disk_bytes(state.path))} in {state.path}" for kind, state in states.items()
        )
        say(f"{pictures.name}: {len(present)} samples cached, {len(dropped)} unreadable; {stores}")
        self._list_unreadable(pictures, dropped, say)
        if not present:
            reasons = ", ".join(f"{count} {reason}" for reason, count in _tally(dropped.values()))
            raise UserError(f"No usable images in {pictures.source.location}: {len(pictures.samples)} seen, {reasons}.")
        opened = {
            kind: TensorStore(
                state.path, kind, made_elsewhere=("float16", state.wanted.shape) if state.foreign else None
            )
            for kind, state in states.items()
        }
        return Cached(present, opened, dropped)

    @contextmanager
    def _locked(self, todo: dict[str, Survey]) -> Iterator[None]:
        """Within the context the main process holds the stores' exclusive locks for all."""
        locks = [lock_store(state.path, exclusive=True) for state in todo.values()] if self.processes.is_main else []
        try:
            self.processes.wait()
            yield
        finally:
            for lock in locks:
                if lock is not None:
                    lock.close()

    def _build(self, pictures: PictureSet, todo: dict[str, Survey], say: Callable[..., None]) -> None:
        for state in todo.values():
            if state.differences:
                say(f"{state.path} was made differently ({'; '.join(state.differences)}): rebuilding it.")
            words = [f"{len(entries)} {word}" for word, entries in
                     (("missing", state.missing), ("outdated", state.stale), ("changed", state.doubtful)) if entries]  # fmt: skip
            if words:
                say(
                    f"{pictures.name} {state.path.name}: {state.present} of {len(pictures.samples)} present, {', '.join(words)}"
                )
        self._check_before_writing(pictures, todo)
        work = {kind: state for kind, state in todo.items() if state.work}
        result = build(
            work,
            pictures.source,
            {kind: self.encoder(kind) for kind in work},
            resolution=self.data.resolution,
            batch_size=self.cache.cache_batch_size,
            workers=self.workers,
            device=self.processes.device,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            label=pictures.name,
        )
        self.processes.wait()
        counts = torch.tensor([result.encoded, result.unchanged, len(result.reasons)], device=self.processes.device)
        encoded, unchanged, unreadable = self.processes.sum(counts).tolist()
        if done := encoded + unchanged + unreadable:
            say(
                f"{pictures.name}: {encoded} encoded, {unchanged} unchanged, {unreadable} unreadable in {result.seconds:.1f} s "
                f"({done / max(result.seconds, 1e-3):.1f} images/s)"
            )

    def _check_before_writing(self, pictures: PictureSet, todo: dict[str, Survey]) -> None:
        wanted = {entry.sample.sample_id: entry.sample for state in todo.values() for entry in state.work}
        if wanted:
            there = pictures.source.present()
            absent = [sample for sample in wanted.values() if sample.path not in there]
            if absent:
                raise UserError(
                    f"{len(absent)} of {len(pictures.samples)} rows of {pictures.source.location} name files that are not there "
                    f"(first: {', '.join(sample.path for sample in absent[:3])}). Correct the paths or give --image_root."
                )
        by_disk: dict[int, list[Survey]] = {}
        for state in todo.values():
            folder = state.path
            while not folder.exists():
                folder = folder.parent
            by_disk.setdefault(folder.stat().st_dev, []).append(state)
        for states in by_disk.values():
            names = " and ".join(state.path.name for state in states)
            require_space(states[0].path, sum(state.needed_bytes for state in states), f"Building {names}")

    def _finish(self, states: dict[str, Survey]) -> None:
        """Mark the stores complete, once they are; take out what another producer left behind."""
        for state in states.values():
            if state.work:
                first = ", ".join(entry.sample.sample_id for entry in state.work[:3])
                raise UserError(
                    f"{len(state.work)} entries of {state.path} are still missing (first: {first}): their files changed while "
                    "they were read. Run the same command again."
                )
        self.processes.wait()
        if self.processes.is_main:
            for state in states.values():
                purge(state.path, state.wanted.kind, state.wanted.fingerprint)
                mark(state.path, state.wanted.meta(complete=True))
                state.meta = state.wanted.meta(complete=True)
        self.processes.wait()

    def _list_unreadable(self, pictures: PictureSet, dropped: dict[str, str], say: Callable[..., None]) -> None:
        if dropped and self.processes.is_main:
            path = self.cache.cache_dir / f"{pictures.name}_unreadable.tsv"
            paths = {sample.sample_id: sample.path for sample in pictures.samples}
            lines = [f"{sample_id}\t{paths[sample_id]}\t{why}\n" for sample_id, why in dropped.items()]
            write_text(path, "sample_id\tpath\treason\n" + "".join(lines))
            say(f"{pictures.name}: {len(dropped)} unreadable pictures are listed in {path}")

    def _prepare_text(self, names: dict[int, str], say: Callable[..., None]) -> tuple[TextEmbeddings, Path]:
        path = self.cache.text_embeddings_path
        if path.suffix != ".safetensors":
            if not path.exists():
                raise UserError(f"text_embeddings {path} does not exist. Give a .safetensors path to have it built.")
            return read_text_embeddings(path), path
        class_ids, prompts = prompts_of(names, self.data.prompt_template)
        producer = {
            "model": self.model.pretrained_model_name_or_path,
            "weights": weight_fingerprint(
                locate_base(self.model.pretrained_model_name_or_path, ("text_encoder", "tokenizer")),
                "text_encoder",
                self.memory,
            ),
        }
        if self.processes.is_main and not up_to_date(path, prompts, producer):
            build_text_embeddings(path, class_ids, prompts, producer, self.encoder("text"))
            say(f"text: {len(prompts)} prompts encoded to {path}")
            if cut := self.encoder("text").overlong(prompts):
                say(f"text: {len(cut)} prompts are longer than 77 tokens and were cut (first: {prompts[cut[0]]!r})")
        self.processes.wait()
        return read_text_embeddings(path), path


def _tally(reasons: Any) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for reason in reasons:
        # The part before any detail in brackets or after a colon groups them.
        short = reason.split(":")[-1].split("(")[0].strip()
        counts[short] = counts.get(short, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])
