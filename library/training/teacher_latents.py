"""Draws latents with a frozen base from a list of prompts into a store, of which `library.data.teacher_latents` is the format.

Each prompt conditions the base as it will condition the training, as a caption: A1111's syntax has no meaning in it. A killed run
goes on with the batches that are not there; batches are the same whoever draws them, and so are their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from library.caching.fill import locked
from library.caching.producers import Wanted, content_hash
from library.data.store import (
    DRAWN,
    META_KEY,
    StoreMeta,
    TensorStore,
    disk_bytes,
    pack_source,
    read_transactions,
    shard_folder,
    shard_folders,
    unpack_source,
)
from library.data.store_writer import StoreWriter, mark
from library.data.teacher_latents import VALUE, Drawn, Spread, spread_of
from library.device import named_dtype
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import RunFailed, UserError
from library.files import human_bytes, require_space
from library.inference.drawing_model import DrawingModel, load_drawing_vae
from library.inference.lora_tags import StepWeights
from library.inference.picture_request import LoraUse, PictureRequest
from library.inference.prompt_encoding import EncodedPart
from library.inference.prompt_file import PromptLine, read_prompt_file
from library.inference.text_to_image import TextToImage, on_process
from library.models.base_family import family_of, native_side
from library.models.conditioning import Conditioning, TextConditioner, clip_skip
from library.models.load import load_scheduler_config
from library.models.locate import BaseLocation
from library.options.repa import PrepareCacheOptions
from library.options.run import RunOptions
from library.processes import Processes
from library.progress import doing
from library.training.models import FrozenModels, base_weights_facts, scaling_factor
from library.words import plural
from networks.families import UNET, Family

ENOUGH = 8
"""Entries whose spread tells whether they are scaled."""
DRAWN_AGAIN = 8
LEAST_COSINE = 0.999
"""As in `library.caching.verify`: a batch of another size may take other kernels."""

_OWN = ("prompt", "negative_prompt", "seed")  # settings that a prompt may have of its own


def teacher_facts(options: RunOptions, base: BaseLocation, family: Family) -> dict[str, Any]:
    """Which base it is that draws, or is trained: what two of them must have in common for one to be the other's teacher."""
    return {"family": family.key, "weights": base_weights_facts(options, base, (UNET, *family.text_encoders))}


def read_prompts(options: PrepareCacheOptions) -> dict[str, Drawn]:
    """What is to be drawn, by sample id. Raises UserError for a prompt with other settings of its own than a seed."""
    o = options.drawing
    assert o.teacher_prompts is not None
    found: dict[str, Drawn] = {}
    for line in read_prompt_file(o.teacher_prompts):
        others = [f.name for f in fields(PromptLine) if f.name not in _OWN and getattr(line, f.name) is not None]
        if others:
            raise UserError(
                f"The prompt {line.prompt!r} of {o.teacher_prompts} sets {' and '.join(others)}, and all latents of a store are "
                "drawn alike. Leave it out, and see teacher_size, teacher_steps, teacher_cfg and teacher_sampler."
            )
        for image in range(o.teacher_images):
            seed = o.teacher_seed + len(found) if line.seed is None else line.seed + image
            found[f"{len(found):09d}"] = Drawn(line.prompt, line.negative_prompt, seed)
    return found


@dataclass
class _OfPrompts(TextToImage):
    """Each picture of the batch has a prompt of its own."""

    conditioner: TextConditioner = field(kw_only=True)
    drawn: Sequence[Drawn] = field(kw_only=True)

    def _encode_prompts(
        self, model: DrawingModel, pass_: Any, loras: Sequence[LoraUse]
    ) -> tuple[list[EncodedPart], EncodedPart]:
        positive = self.conditioner([one.prompt for one in self.drawn])
        negative = unconditional(self.conditioner, [one.negative_prompt for one in self.drawn])
        return [EncodedPart(1.0, (1,), (positive,))], EncodedPart(1.0, (1,), (negative,))

    def _strengths(self, loras: Sequence[LoraUse], weights: Sequence[StepWeights], step: int, steps: int) -> list[Any]:
        return []


@torch.no_grad()
def draw_latents(
    model: DrawingModel, request: PictureRequest, conditioner: TextConditioner, drawn: Sequence[Drawn]
) -> Tensor:
    """Latents [B, C, h, w] float32, scaled, of these prompts and seeds, and as the request says for the rest."""
    seeds = [one.seed for one in drawn]
    return _OfPrompts(model, request, seeds, {}, None, conditioner=conditioner, drawn=drawn).latents()


def unconditional(conditioner: TextConditioner, prompts: Sequence[str]) -> Conditioning:
    """What guidance leads away from, [B, T, D]: zeros for no prompt where the family was trained so."""
    found = conditioner(prompts)
    if not conditioner.family.zeros_for_no_prompt:
        return found
    says = torch.tensor([bool(prompt.strip()) for prompt in prompts], device=found.states.device)
    pooled = None if found.pooled is None else found.pooled * says[:, None]
    return Conditioning(found.states * says[:, None, None], pooled)


class Teacher:
    """A frozen base that draws latents, and how it does."""

    def __init__(self, options: PrepareCacheOptions, base: BaseLocation, processes: Processes) -> None:
        """Raises UserError for a sampler that the base cannot be drawn with, and sizes that cannot be."""
        self.options, self.base, self.processes, self.family = options, base, processes, family_of(base)
        self.process = parametrisation_of(load_scheduler_config(base))
        o, side = options.drawing, native_side(base)
        width, height = o.teacher_size or (side, side)
        if width % 64 or height % 64:
            raise UserError(f"teacher_size must be multiples of 64 (VAE 8 x U-Net 8), got {width} x {height}.")
        request = PictureRequest(
            "",
            "",
            steps=o.teacher_steps,
            cfg_scale=o.teacher_cfg,
            width=width,
            height=height,
            sampler=o.teacher_sampler,
        )
        self.request = on_process(request, self.process)[0]
        self.sampler, self.schedule = self.request.sampler_and_schedule

    @cached_property
    def wanted(self) -> Wanted:
        """Form and producer of the store."""
        o = self.options.drawing
        with self.processes.main_first():
            facts = teacher_facts(self.options, self.base, self.family)
        producer = {
            "model": self.base.name,
            **facts,
            "value": VALUE,
            "scaled": True,
            "scaling_factor": scaling_factor(self.options, self.base, self.family),
            "prediction_type": self.process.output.name.scheduler,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "steps": o.teacher_steps,
            "cfg_scale": o.teacher_cfg,
            "flow_shift": self.request.flow_shift,
            "clip_skip": clip_skip(self.options.text, self.family),
            "chunks": self.options.text.chunks,
            "precision": self.options.model.mixed_precision,
            "noise": "torch.randn of the seed on the CPU",
        }
        shape = (self.family.latent_channels, *self.family.latent_size(self.request.width, self.request.height))
        return Wanted("latents", "float16", shape, producer)

    @cached_property
    def _models(self) -> tuple[DrawingModel, TextConditioner]:
        options, device, family = self.options, self.processes.device, self.family
        frozen, dtype = FrozenModels(), named_dtype(options.model.mixed_precision)
        parts = frozen.text(options, self.base, family, device)
        unet = frozen.unet(options, self.base, family, device).eval()
        vae = load_drawing_vae(self.base, family, dtype=dtype, device=device)
        skip, chunks = clip_skip(options.text, family), options.text.chunks
        model = DrawingModel(family, unet, parts, vae, self.process, dtype)
        return model, TextConditioner(family, parts, clip_skip=skip, chunks=chunks)

    def draw(self, drawn: Sequence[Drawn]) -> np.ndarray:
        """Latents [B, C, h, w] float16, scaled. Raises RunFailed where they are not finite."""
        model, conditioner = self._models
        latents = draw_latents(model, self.request, conditioner, drawn).to(torch.float16).cpu()
        if not torch.isfinite(latents).all():
            raise RunFailed(
                f"{self.base.name} drew latents that are not finite: {self.options.model.mixed_precision} is too narrow. Use "
                "--mixed_precision bf16 or no."
            )
        return latents.numpy()

    def overlong(self, drawn: Sequence[Drawn]) -> list[int]:
        return self._models[1].overlong([one.prompt for one in drawn])


def prepare_teacher_latents(
    options: PrepareCacheOptions, base: BaseLocation, processes: Processes, say: Callable[..., None]
) -> None:
    """Draw what is not in the store yet, and see that all of it is scaled.

    Raises UserError where the store was drawn in another way, is in use, or does not fit on the disk; where latents are not scaled.
    """
    path = options.drawing.teacher_latents
    assert path is not None
    wanted, teacher = read_prompts(options), Teacher(options, base, processes)
    there, others = _survey(teacher, wanted)
    missing = len(wanted) - len(there)
    o = options.drawing
    how = f"{teacher.sampler} {teacher.schedule}, {plural(o.teacher_steps, 'step')}, cfg {o.teacher_cfg:g}"
    say(f"teacher {base.name} ({how}): {len(wanted) - missing} of {plural(len(wanted), 'latent')} present in {path}")
    if options.config.dry_run:
        return
    processes.wait()
    require_space(path, missing * teacher.wanted.meta(complete=False).entry_bytes, "Drawing latents")
    if missing or others:
        with locked([path], processes):
            if processes.is_main:
                _forget(teacher, others)
            processes.wait()
            _draw_share(teacher, wanted, there, say)
    processes.wait()
    if processes.is_main:
        _finish(teacher, wanted, say)
    processes.wait()
    if options.verify and processes.is_main:
        _verify(teacher, wanted, say)


def _store_path(teacher: Teacher) -> Any:
    return teacher.options.drawing.teacher_latents


def _survey(teacher: Teacher, wanted: dict[str, Drawn]) -> tuple[set[str], set[str]]:
    """Sample ids of the entries that are as they are wanted, and of all others. Raises UserError for those drawn otherwise."""
    path = _store_path(teacher)
    there: set[str] = set()
    others: set[str] = set()
    metas = []
    with read_transactions(path) as transactions:
        for transaction in transactions:
            if (data := transaction.get(META_KEY)) is not None:
                metas.append(StoreMeta.from_json(bytes(data), path))
            for key in transaction.cursor().iternext(keys=True, values=False):
                name, _, ending = bytes(key).decode().rpartition("#")
                if ending == "source":
                    made = unpack_source(transaction.get(key))[0]
                    is_wanted = name in wanted and made == _signature(wanted[name])
                    (there if is_wanted else others).add(name)
    for meta in metas:
        _require_same(teacher, meta, is_empty=not (there or others))
    return there, others


def _require_same(teacher: Teacher, meta: StoreMeta, is_empty: bool) -> None:
    differences = teacher.wanted.differences(meta)
    if meta.kind == "latents" and (is_empty or not differences):
        return
    why = f"was drawn differently: {'; '.join(differences)}" if meta.kind == "latents" else f"holds {meta.kind}"
    raise UserError(
        f"teacher_latents {_store_path(teacher)} {why}. Restore these options, or name another folder; what may have taken days is "
        "not replaced."
    )


def _signature(drawn: Drawn) -> bytes:
    return blake2b(drawn.to_json(), digest_size=16).digest()


def _forget(teacher: Teacher, others: set[str]) -> None:
    """Take out entries that are not wanted, and note that the store is not complete."""
    path = _store_path(teacher)
    for folder in shard_folders(path) or [path]:
        writer = StoreWriter(folder, "latents", expected_bytes=0)
        writer.set_meta(teacher.wanted.meta(complete=False))
        writer.delete_raw([writer.key(name) for name in others])
        writer.commit()
        writer.close()


def _chunks(teacher: Teacher, wanted: dict[str, Drawn]) -> Iterator[list[str]]:
    """The batches of this process: the same whatever is there already, so that an entry is drawn beside the same others."""
    names, size = list(wanted), teacher.options.cache.cache_batch_size
    for start in range(teacher.processes.rank * size, len(names), teacher.processes.world_size * size):
        yield names[start : start + size]


def _draw_share(teacher: Teacher, wanted: dict[str, Drawn], there: set[str], say: Callable[..., None]) -> None:
    todo = [chunk for chunk in _chunks(teacher, wanted) if not there.issuperset(chunk)]
    if not todo:
        return
    meta, path = teacher.wanted.meta(complete=False), _store_path(teacher)
    count = sum(map(len, todo))
    writer = StoreWriter(
        shard_folder(path, teacher.processes.rank), "latents", expected_bytes=count * (meta.entry_bytes + 512)
    )
    spread = Spread(meta.shape[0])
    try:
        writer.set_meta(meta)
        with doing("drawing latents", len(wanted), done=len(wanted) - count) as activity:
            for chunk in todo:
                latents = teacher.draw([wanted[name] for name in chunk])
                spread.add(latents)
                if spread.entries >= ENOUGH or chunk is todo[-1]:
                    spread.check(f"The latents that {teacher.base.name} draws")
                for name, value in zip(chunk, latents, strict=True):
                    if name not in there:
                        _put(writer, name, value, wanted[name], teacher.wanted.fingerprint)
                writer.commit_if_due()
                activity.advance(len(chunk))
    finally:  # also after Ctrl-C: what was drawn is committed
        writer.commit()
        writer.close()
    if cut := teacher.overlong(list(wanted.values())):
        are = plural(len(cut), "prompt is", "prompts are")
        say(f"{are} longer than the text encoders' room and cut off (first: {list(wanted.values())[cut[0]].prompt!r})")


def _put(writer: StoreWriter, name: str, value: np.ndarray, drawn: Drawn, producer: bytes) -> None:
    key, data = writer.key(name), np.ascontiguousarray(value).tobytes()
    writer.put_raw(key, data)
    writer.put_raw(key + b"#source", pack_source(_signature(drawn), content_hash(data), producer))
    writer.put_raw(key + DRAWN, drawn.to_json())


def _finish(teacher: Teacher, wanted: dict[str, Drawn], say: Callable[..., None]) -> None:
    """Mark the store complete, with the spread of what is in it. Raises UserError where that is none of scaled latents."""
    path = _store_path(teacher)
    store = TensorStore(path, "latents")
    with doing("measuring latents"):
        spread = spread_of(store, wanted)
    store.close()
    spread.check(f"The latents in {path}")
    statistics = {"mean": np.round(spread.means, 5).tolist(), "std": np.round(spread.deviations, 5).tolist()}
    producer = {**teacher.wanted.producer, "statistics": statistics}
    meta = teacher.wanted.meta(complete=True)
    mark(path, StoreMeta(meta.kind, meta.dtype, meta.shape, producer, complete=True))
    of_channels = ", ".join(f"{value:.3f}" for value in spread.deviations)
    say(
        f"{plural(len(wanted), 'latent')} of {meta.shape}, standard deviation {spread.deviation:.3f} (by channel {of_channels}); "
        f"{human_bytes(disk_bytes(path))} in {path}"
    )


def _verify(teacher: Teacher, wanted: dict[str, Drawn], say: Callable[..., None]) -> None:
    """Draw every k-th entry again. Raises RunFailed where one is another."""
    store, names = TensorStore(_store_path(teacher), "latents"), list(wanted)
    chosen = names[:: max(1, -(-len(names) // DRAWN_AGAIN))]
    kept = np.stack([store.read(name) for name in chosen])
    store.close()
    with doing("drawing latents again", len(chosen)):
        fresh = teacher.draw([wanted[name] for name in chosen])
    cosines = F.cosine_similarity(_flat(kept), _flat(fresh), dim=1)
    if (least := float(cosines.min())) < LEAST_COSINE:
        raise RunFailed(
            f"Entry {chosen[int(cosines.argmin())]} of {_store_path(teacher)} is not what its prompt and seed give (cosine "
            f"{least:.4f}). Delete the store and draw it again."
        )
    largest = float(np.abs(kept.astype(np.float32) - fresh).max())
    say(f"{len(chosen)} drawn again: least cosine {least:.6f}, largest difference {largest:.2g}")


def _flat(latents: np.ndarray) -> Tensor:
    return torch.from_numpy(latents).float().flatten(1)
