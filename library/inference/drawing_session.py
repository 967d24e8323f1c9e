"""Draws the pictures of a plan: each model is loaded once, and pictures that differ in their seeds alone are drawn in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock, Thread

import torch
from PIL import Image

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.errors import UserError, check_all
from library.inference.base_check import check_base_fits, check_vae
from library.inference.drawing_model import DrawingModel, load_model
from library.inference.infotext import Infotext, lora_hash, model_hash, model_title
from library.inference.picture_infotext import infotext_of, model_name, vae_name
from library.inference.picture_plan import PlannedPicture
from library.inference.picture_request import LoraUse, PictureRequest
from library.inference.reference import ReferenceHeads
from library.inference.refiner import load_refiner, locate_refiner
from library.inference.text_to_image import draw, on_process
from library.merging.source import Source, read_source
from library.models.base_family import family_of, native_side
from library.models.locate import BaseLocation, locate_base
from library.models.lone_vae import locate_vae
from library.models.text_fusion import check_fusion, load_fusion
from library.options.text_fusion import TextFusionOptions
from library.progress import doing
from networks.adapters import Adapter
from networks.families import UNET
from networks.lyra import TEXT_FUSION_KEY


@dataclass
class DrawingSession:
    """Keeps what several pictures share: the base, the refiner, adapters and hashes.

    prediction_type, zero_terminal_snr: see `load_model`. fusion: of its text encoders. heads: of request.reference. say: prints
    what the user should know.
    """

    dtype: torch.dtype
    device: torch.device
    vae: str | None = None
    refiner: str | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    fusion: TextFusionOptions = TextFusionOptions()
    heads: ReferenceHeads | None = None
    say: Callable[[str], None] = print
    _along: dict[str, Parametrisation] = field(default_factory=dict, init=False)
    _loaded: tuple[str, DrawingModel] | None = field(default=None, init=False)
    _refiner: DrawingModel | None = field(default=None, init=False)
    _sources: dict[Path, Source] = field(default_factory=dict, init=False)
    _hashes: dict[Path, str] = field(default_factory=dict, init=False)
    _model_hashes: dict[str, str | None] = field(default_factory=dict, init=False)
    _hashing: Lock = field(default_factory=Lock, init=False)

    def model(self, base: str) -> DrawingModel:
        """The base, loaded. The one loaded before is released first."""
        if self._loaded is not None and self._loaded[0] == base:
            return self._loaded[1]
        self._loaded = None
        location = locate_base(base)
        if location.note:
            self.say(location.note)
        found = load_model(
            location,
            dtype=self.dtype,
            device=self.device,
            vae=None if self.vae is None else locate_vae(self.vae),
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
        )
        found.fusion = load_fusion(self.fusion, found.family, found.parts, dtype=self.dtype, device=self.device)
        self._loaded = base, found
        return found

    def check(self, pictures: Sequence[PlannedPicture]) -> dict[str, int]:
        """The side in pixels that each base was trained at. Fetches bases from the hub, and reads headers (of pickles, everything).

        Raises UserError, a line for each fault, for a missing base, autoencoder or refiner, and where a base does not fit the
        refiner or its pictures: their adapters, their clip_skip.
        """
        bases = {base: locate_base(base) for base in dict.fromkeys(picture.base for picture in pictures)}
        checks: list[Callable[[], object]] = []
        if (vae := self.vae) is not None:
            checks += [partial(self._check_vae, vae, location) for location in bases.values()]
        for base, location in bases.items():
            requests = [picture.request for picture in pictures if picture.base == base]
            checks.append(partial(self._check_base, base, location, requests))
            if self.refiner is not None:
                checks.append(partial(locate_refiner, self.refiner, family_of(location)))
        check_all(*checks)
        return {base: native_side(location) for base, location in bases.items()}

    @staticmethod
    def _check_vae(vae: str, base: BaseLocation) -> None:
        check_vae(locate_vae(vae), family_of(base))

    def _check_base(self, name: str, base: BaseLocation, requests: Sequence[PictureRequest]) -> None:
        paths = dict.fromkeys(use.path for request in requests for use in request.loras)
        parametrisation = check_base_fits(
            base,
            {path: self.adapter(path) for path in paths},
            clip_skip=max(request.clip_skip for request in requests),
            prediction_type=self.prediction_type,
            own_vae=self.vae is None,
        )
        self._along[name] = parametrisation
        if self.heads is not None:
            self.heads.check_base(base)
        for skip in {request.clip_skip for request in requests}:
            check_fusion(self.fusion, family_of(base), skip)
        found = [on_process(request, parametrisation)[0] for request in requests]
        for request in dict.fromkeys(found):
            request.sampler_and_schedule  # noqa: B018
        if self.refiner is not None and any(request.flow_shift is not None for request in found):
            raise UserError(
                f"A refiner takes over between levels of SD's own schedule, and {base.name} is drawn along a rectified flow. Leave "
                "the refiner out."
            )

    def as_drawn(self, picture: PlannedPicture) -> PlannedPicture:
        """The picture with what its base decides; call `check` first."""
        return replace(picture, request=on_process(picture.request, self._along[picture.base])[0])

    def kind(self, base: str) -> str:
        """What a base was found to predict, in words; call `check` first."""
        process = self._along[base]
        return "a rectified flow" if isinstance(process, FlowPath) else f"predicts {process.output.noun}"

    def draw(
        self, pictures: Sequence[PlannedPicture], batch_size: int = 1
    ) -> Iterator[tuple[list[PlannedPicture], list[Image.Image]]]:
        """Batches as they are drawn, in the order of `pictures`; call `check` first."""
        with doing("drawing pictures", len(pictures)) as activity:
            for base, group in groupby(pictures, key=lambda picture: picture.base):
                of_base = list(group)
                model = self.model(base)
                self._prepare(model, of_base)
                for request, alike in groupby(of_base, key=lambda picture: picture.request):
                    together = list(alike)
                    for start in range(0, len(together), batch_size):
                        batch = together[start : start + batch_size]
                        drawn = self._draw_batch(model, request, [picture.seed for picture in batch])
                        activity.advance(len(batch))
                        yield batch, drawn

    def hash_ahead(self, bases: Iterable[str]) -> None:
        """Hash the files of bases and refiner in a thread, for `infotext`: gigabytes take seconds."""
        models = dict.fromkeys([*bases, *([] if self.refiner is None else [self.refiner])])
        Thread(target=lambda: [self._model_hash(name) for name in models], daemon=True).start()

    def infotext(self, picture: PlannedPicture) -> Infotext:
        """The parameters text for a picture's file."""
        refiner = None
        if self.refiner is not None:
            refiner = model_title(model_name(self.refiner), self._model_hash(self.refiner))
        return infotext_of(
            picture.request,
            picture.seed,
            model_name(picture.base),
            model_hash=self._model_hash(picture.base),
            lora_hashes={use.weights.name: self._hash(use) for use in picture.request.loras},
            refiner=refiner,
            vae=None if self.vae is None else vae_name(self.vae),
            is_flow=isinstance(self._along.get(picture.base), FlowPath),
            text_fusion=None if self.fusion.text_fusion is None else self.fusion.text_fusion.name,
        )

    def _draw_batch(self, model: DrawingModel, request: PictureRequest, seeds: Sequence[int]) -> list[Image.Image]:
        refiner = None if request.refiner_switch_at is None else self._refiner
        adapters = {use.path: self.adapter(use.path) for use in request.loras}
        guidance, reference = None, request.reference
        if self.heads is not None and reference is not None and reference.strength > 0:
            guidance = self.heads.guidance(reference, request.width, request.height, self.device)
        return draw(model, request, seeds, adapters=adapters, refiner=refiner, guidance=guidance)

    def _prepare(self, model: DrawingModel, pictures: Sequence[PlannedPicture]) -> None:
        requests = list(dict.fromkeys(picture.request for picture in pictures))
        if self.refiner is not None and (self._refiner is None or self._refiner.family != model.family):
            self._refiner = load_refiner(self.refiner, model, dtype=self.dtype, device=self.device)
        model.folded.keeps_originals = adapters_change(requests)
        layer = model.family.text_layer
        if layer is not None and any(request.clip_skip not in (1, layer) for request in requests):
            self.say(
                f"clip_skip has no effect: {model.family.title} always takes layer {layer} from the end of its text encoders."
            )

    def adapter(self, path: Path) -> Adapter:
        """The adapter in a file or folder, read once. Raises UserError for a damaged file, and for a whole model."""
        if path not in self._sources:
            self._sources[path] = read_source(path)
            adapter = self._sources[path].adapter
            for note in [*adapter.notes, *self._fusion_notes(adapter)]:
                self.say(f"{path}: {note}")
        source = self._sources[path]
        if source.is_wrapped:
            raise UserError(
                f"{path} holds a whole model with adapters in it. Merge it with merge_lora.py and name the result as the base."
            )
        return source.adapter

    def _fusion_notes(self, adapter: Adapter) -> list[str]:
        """Where an adapter was trained on other text than it is drawn with, or changes the encoders that a fusion is for."""
        trained, used = adapter.metadata.get(TEXT_FUSION_KEY), self.fusion.text_fusion
        notes = []
        if trained is not None and used is None:
            notes.append(f"it was trained on text fused by {trained}; --text_fusion names that file")
        if used is not None and any(target.component != UNET for target in adapter.modules):
            notes.append(f"it changes the text encoder, and {used.name} was trained on the base's own")
        return notes

    def _hash(self, use: LoraUse) -> str:
        if use.path not in self._hashes:
            self._hashes[use.path] = lora_hash(self._sources[use.path].file)
        return self._hashes[use.path]

    def _model_hash(self, base: str) -> str | None:
        with self._hashing:
            if base not in self._model_hashes:
                self._model_hashes[base] = model_hash(Path(base).expanduser())
            return self._model_hashes[base]


def adapters_change(requests: Sequence[PictureRequest]) -> bool:
    """Whether any adapter's weight changes between pictures, passes or steps."""
    states = set()
    for request in requests:
        if request.fills_conds and request.loras:
            return True  # the filling is encoded without adapters
        state = []
        for use in request.loras:
            weights = use.weights
            by_step = [weights.te, weights.unet] + ([weights.hrte, weights.hrunet] if request.hires else [])
            if not all(weight.is_constant for weight in by_step):
                return True
            state.append((use.path, *(weight.weights[0] for weight in by_step[:2])))
            if request.hires and by_step[:2] != by_step[2:]:
                return True
        states.add(tuple(state))
    return len(states) > 1
