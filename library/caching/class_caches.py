"""Caches of class pictures: for each set a store of latents and one of tokens for each teacher, and a file of the classes' prompts.

The key of an entry is the sample id, of tokens with `_mid`; latents are float16 [C, h, w], scaled. The file of prompts has one
row per class and the empty prompt last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from library.caching.fill import Filling, dropped_of, list_dropped, nothing_usable
from library.caching.geometry import SquareCrop
from library.caching.producers import Wanted, fingerprint
from library.caching.survey import Survey, Target
from library.caching.teacher import Teacher, locate_teacher
from library.data.class_pictures import Pictures, PictureSet
from library.data.pixels import PIXELS_VERSION
from library.data.sources import Sample, missing_files
from library.data.store import TensorStore, disk_bytes, shard_folders
from library.data.text_embeddings import TextEmbeddings, read_text_embeddings
from library.device import named_dtype
from library.errors import UserError
from library.files import human_bytes, whole_file
from library.models.conditioning import TextConditioner, clip_skip
from library.models.encoders import PROMPTS_AT_ONCE, VaeEncoder
from library.models.fingerprint import weight_fingerprint
from library.models.load import load_text_encoders, load_vae
from library.models.locate import BaseLocation, locate_base
from library.models.lone_vae import LoneVae, locate_vae
from library.models.text_fusion import fusion_facts, load_fusion
from library.options.alignment import AlignmentOptions
from library.options.data import ClassCacheOptions, ClassPictureOptions
from library.options.kohya.training import NetworkModelOptions, TextEncoderOptions
from library.options.model import token_kinds
from library.options.text_fusion import TextFusionOptions
from library.processes import Processes
from library.words import plural
from networks.families import TOKENIZERS, Family


@dataclass
class Cached:
    """A picture set whose entries all stand in its stores; unreadable pictures are left out of `samples`."""

    samples: list[Sample]
    stores: dict[str, TensorStore]
    """By what they are called: latents, and for each teacher the name that `token_kinds` gives."""
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
        model: NetworkModelOptions,
        classes: ClassPictureOptions,
        cache: ClassCacheOptions,
        alignment: AlignmentOptions,
        text: TextEncoderOptions,
        fusion: TextFusionOptions,
        family: Family,
        processes: Processes,
        *,
        side: int,
        workers: int,
    ) -> None:
        """side: of the squares, in pixels. workers: threads that decode pictures."""
        self.model, self.classes, self.cache, self.alignment = model, classes, cache, alignment
        self.text, self.fusion, self.family, self.processes = text, fusion, family, processes
        self.side, self.workers = side, workers
        teachers = token_kinds(model.teachers) if alignment.needs_teacher else {}
        self.teachers = {name: teacher for teacher, name in teachers.items()}
        """By the names of their stores."""
        self.names = ("latents", *self.teachers)
        automatic = "bf16" if model.mixed_precision == "bf16" else "no"  # fp16 may overflow
        self.precision = automatic if cache.encoder_precision == "auto" else cache.encoder_precision
        self.vae = locate_vae(model.vae or model.pretrained_model_name_or_path)
        self._encoders: dict[str, Any] = {}

    def made_elsewhere(self, name: str) -> tuple[int, ...] | None:
        return {"latents": self.cache.latent_shape, "tokens": self.cache.token_shape}.get(name)

    def path(self, pictures: str, name: str) -> Path:
        return self.cache.store_path(pictures, name)

    def is_foreign(self, pictures: str, name: str) -> bool:
        """Whether the store was made elsewhere: it has no `__meta__`, and its shape is given."""
        path, shape = self.path(pictures, name), self.made_elsewhere(name)
        if shape is None or not shard_folders(path):
            return False
        store = TensorStore(path, name, made_elsewhere=("float16", shape))
        foreign = store.foreign
        store.close()
        return foreign

    def wanted(self, name: str, foreign: bool) -> Wanted:
        """Form and producer of the entries this run needs."""
        if foreign:
            shape = self.made_elsewhere(name)
            assert shape is not None
            right = self._latent_shape if name == "latents" else (self.alignment.token_grid**2, shape[1])
            return Wanted(name, "float16", right, {})
        return self._wanted_latents() if name == "latents" else self._wanted_tokens(self._teacher(name))

    def _wanted_latents(self) -> Wanted:
        producer = self._pixels() | {
            "model": self.model.vae or self.model.pretrained_model_name_or_path,
            "weights": weight_fingerprint(self.vae, "vae", self.cache.cache_dir),
            "value": "posterior mode x scaling factor",
        }
        if isinstance(self.vae, LoneVae):  # which may have that of the base's family
            producer["scaling_factor"] = self.vae.scaling_factor(self.family)
        return Wanted("latents", "float16", self._latent_shape, producer)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self.family.latent_channels, *self.family.latent_size(self.side, self.side)

    def _wanted_tokens(self, teacher: Teacher) -> Wanted:
        producer = self._pixels() | teacher.facts(self.cache.cache_dir)
        return Wanted("tokens", teacher.dtype, (teacher.grid**2, teacher.size.width), producer)

    def _teacher(self, name: str) -> Teacher:
        return locate_teacher(self.teachers[name], self.model, self.alignment, self.precision)

    def _pixels(self) -> dict[str, Any]:
        return {
            "resolution": self.side,
            "crop": "centre",
            "pixels": PIXELS_VERSION,
            "precision": self.precision,
        }

    def encoder(self, name: str) -> Any:
        """VaeEncoder, TeacherEncoder or TextConditioner, loaded on first use."""
        if name not in self._encoders:
            dtype, device = named_dtype(self.precision), self.processes.device
            if name == "latents":
                self._encoders[name] = VaeEncoder(load_vae(self.vae, serves=self.family, dtype=dtype, device=device))
            elif name in self.teachers:
                self._encoders[name] = self._teacher(name).encoder(device)
            else:
                parts = load_text_encoders(self._text_location, families=(self.family,), device=device)
                skip = clip_skip(self.text, self.family)
                fusion = load_fusion(self.fusion, self.family, parts, dtype=torch.float32, device=device)
                self._encoders[name] = TextConditioner(
                    self.family, parts, clip_skip=skip, chunks=self.text.chunks, fusion=fusion
                )
        return self._encoders[name]

    def survey(self, pictures: PictureSet) -> dict[str, Survey]:
        """State of each store against `pictures`."""
        return self._filling(pictures, print).survey(self._targets(pictures))

    def _filling(self, pictures: PictureSet, say: Callable[..., None]) -> Filling:
        return Filling(
            pictures.name,
            pictures.source,
            SquareCrop(self.side),
            self.processes,
            batch_size=self.cache.cache_batch_size,
            workers=self.workers,
            say=say,
        )

    def _targets(self, pictures: PictureSet) -> dict[str, Target]:
        targets = {}
        # The main process first: it may have to fetch or make a model.
        with self.processes.main_first():
            for name in self.names:
                foreign = self.is_foreign(pictures.name, name)
                shape = self.made_elsewhere(name) if foreign else None
                targets[name] = Target(
                    self.path(pictures.name, name), self.wanted(name, foreign), pictures.samples, shape
                )
        return targets

    def prepare(self, pictures: Pictures, *, rebuild: bool, say: Callable[..., None]) -> Caches:
        """Make every cache complete, building what is missing; say what was done.

        rebuild: stores of another teacher, resolution or option are built again; otherwise they are a UserError, because
        a training run should not overwrite by a slip of an option what took days.
        """
        ready = {
            picture_set.name: self._prepare_set(picture_set, rebuild=rebuild, say=say) for picture_set in pictures.sets
        }
        text, text_path = self._prepare_text(pictures, say)
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
            f"{name} {human_bytes(disk_bytes(state.path))} in {state.path}" for name, state in states.items()
        )
        say(f"{pictures.name}: {plural(len(present), 'sample')} cached, {len(dropped)} unreadable; {stores}")
        table = self.cache.cache_dir / f"{pictures.name}_unreadable.tsv"
        list_dropped(table, pictures.name, pictures.samples, dropped, self.processes, say)
        if not present:
            raise nothing_usable(str(pictures.source.location), len(pictures.samples), dropped)
        opened = {
            name: TensorStore(
                state.path, state.wanted.kind, made_elsewhere=("float16", state.wanted.shape) if state.foreign else None
            )
            for name, state in states.items()
        }
        return Cached(present, opened, dropped)

    def _check_files(self, pictures: PictureSet, states: dict[str, Survey]) -> None:
        wanted = {entry.sample.sample_id for state in states.values() for entry in state.work}
        missing = missing_files(pictures.source) if wanted else []
        if absent := [sample for sample in missing if sample.sample_id in wanted]:
            raise UserError(
                f"{len(absent)} of {len(pictures.samples)} rows of {pictures.source.location} name files that are not there "
                f"(first: {', '.join(sample.path for sample in absent[:3])}). Correct the paths or give --image_root."
            )

    def _prepare_text(self, pictures: Pictures, say: Callable[..., None]) -> tuple[TextEmbeddings, Path]:
        path = self.cache.text_embeddings_path
        if path.suffix != ".safetensors":
            if not path.exists():
                raise UserError(f"text_embeddings {path} does not exist. Give a .safetensors path to have it built.")
            return read_text_embeddings(path), path
        prompts = pictures.prompts(self.classes.prompt_template)
        class_ids = sorted(prompts)
        texts = [*(prompts[class_id] for class_id in class_ids), ""]
        producer = self._text_producer()
        if self.processes.is_main and not _up_to_date(path, texts, producer):
            conditioner = self.encoder("text")
            _encode_prompts(path, class_ids, texts, producer, conditioner)
            say(f"text: {plural(len(texts), 'prompt')} encoded to {path}")
            if cut := conditioner.overlong(texts):
                are = plural(len(cut), "prompt is", "prompts are")
                say(f"text: {are} longer than {conditioner.length} tokens and cut off (first: {texts[cut[0]]!r})")
        self.processes.wait()
        return read_text_embeddings(path), path

    @property
    def _text_location(self) -> BaseLocation:
        encoders = self.family.text_encoders
        parts = (*encoders, *(TOKENIZERS[name] for name in encoders))
        return locate_base(self.model.pretrained_model_name_or_path, parts)

    def _text_producer(self) -> dict[str, Any]:
        hashes = [
            weight_fingerprint(self._text_location, name, self.cache.cache_dir) for name in self.family.text_encoders
        ]
        producer = {
            "model": self.model.pretrained_model_name_or_path,
            "weights": hashes[0] if len(hashes) == 1 else hashes,
        }
        more = {"clip_skip": clip_skip(self.text, self.family), "chunks": self.text.chunks}
        return producer | {name: value for name, value in more.items() if value != 1} | fusion_facts(self.fusion)


def _up_to_date(path: Path, prompts: list[str], producer: dict[str, Any]) -> bool:
    """Whether the file at `path` holds just these prompts by just this encoder."""
    if not path.exists():
        return False
    present = read_text_embeddings(path)
    return present.prompts == prompts and fingerprint(present.producer) == fingerprint(producer)


@torch.no_grad()
def _encode_prompts(
    path: Path, class_ids: Sequence[int], prompts: list[str], producer: dict[str, Any], conditioner: TextConditioner
) -> None:
    """Write embeddings [C+1, T, D] float16 and, of SDXL, pooled [C+1, P]."""
    parts = [conditioner(prompts[i : i + PROMPTS_AT_ONCE]) for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
    tensors = {"embeddings": torch.cat([part.states.to(torch.float16).cpu() for part in parts])}
    pooled = [part.pooled.to(torch.float16).cpu() for part in parts if part.pooled is not None]
    if pooled:
        tensors["pooled"] = torch.cat(pooled)
    metadata = {"class_ids": json.dumps(class_ids), "prompts": json.dumps(prompts), "producer": json.dumps(producer)}
    with whole_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
