"""From options to caches that are complete and fit: what prepare_cache.py does, and train_repa.py first of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from library.caching.fill import Filling, dropped_of, list_dropped, nothing_usable
from library.caching.geometry import SquareCrop
from library.caching.picture_sets import Pictures, PictureSet
from library.caching.producers import Wanted
from library.caching.survey import Survey, Target
from library.caching.text import build_text_embeddings, prompts_of, up_to_date
from library.data.pixels import PIXELS_VERSION
from library.data.sources import Sample
from library.data.store import TensorStore, disk_bytes, shard_folders
from library.data.text_embeddings import TextEmbeddings, read_text_embeddings
from library.errors import UserError
from library.files import human_bytes
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

    def survey(self, pictures: PictureSet) -> dict[str, Survey]:
        """State of each store against `pictures`."""
        return self._filling(pictures, print).survey(self._targets(pictures))

    def _filling(self, pictures: PictureSet, say: Callable[..., None]) -> Filling:
        return Filling(
            pictures.name,
            pictures.source,
            SquareCrop(self.data.resolution),
            self.processes,
            batch_size=self.cache.cache_batch_size,
            workers=self.workers,
            say=say,
        )

    def _targets(self, pictures: PictureSet) -> dict[str, Target]:
        targets = {}
        # The main process first: it may have to fetch or make a model.
        with self.processes.main_first():
            for kind in self.kinds:
                foreign = self.is_foreign(pictures.name, kind)
                shape = self.made_elsewhere(kind) if foreign else None
                targets[kind] = Target(
                    self.path(pictures.name, kind), self.wanted(kind, foreign), pictures.samples, shape
                )
        return targets

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
        filling = self._filling(pictures, say)
        states = filling.survey(self._targets(pictures))
        for state in states.values():
            if state.differences and not rebuild:
                raise UserError(
                    f"The store {state.path} was made differently: {'; '.join(state.differences)}. Restore these options, or "
                    "let prepare_cache.py rebuild it."
                )
        self._check_files(pictures, states)
        states = filling.fill(states, self.encoder)
        dropped = dropped_of(states.values())
        present = [sample for sample in pictures.samples if sample.sample_id not in dropped]
        stores = ", ".join(
            f"{kind} {human_bytes(disk_bytes(state.path))} in {state.path}" for kind, state in states.items()
        )
        say(f"{pictures.name}: {len(present)} samples cached, {len(dropped)} unreadable; {stores}")
        table = self.cache.cache_dir / f"{pictures.name}_unreadable.tsv"
        list_dropped(table, pictures.name, pictures.samples, dropped, self.processes, say)
        if not present:
            raise nothing_usable(str(pictures.source.location), len(pictures.samples), dropped)
        opened = {
            kind: TensorStore(
                state.path, kind, made_elsewhere=("float16", state.wanted.shape) if state.foreign else None
            )
            for kind, state in states.items()
        }
        return Cached(present, opened, dropped)

    def _check_files(self, pictures: PictureSet, states: dict[str, Survey]) -> None:
        wanted = {entry.sample.sample_id: entry.sample for state in states.values() for entry in state.work}
        if wanted:
            there = pictures.source.present()
            absent = [sample for sample in wanted.values() if sample.path not in there]
            if absent:
                raise UserError(
                    f"{len(absent)} of {len(pictures.samples)} rows of {pictures.source.location} name files that are not there "
                    f"(first: {', '.join(sample.path for sample in absent[:3])}). Correct the paths or give --image_root."
                )

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
