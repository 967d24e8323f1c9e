"""evaluate.py --block_probe: which base, checkpoint and pictures, and what is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from library.device import choose_device, choose_dtype
from library.errors import check_all
from library.evaluation.block_pictures import PictureSource, find_pictures, probe_models
from library.evaluation.block_probe import BlockProbe, BlockProbeSettings
from library.evaluation.block_probe_page import probe_page
from library.evaluation.candidates import find_candidates
from library.evaluation.generated_pictures import AppliedAdapter
from library.evaluation.photos import held_out_photos
from library.files import public_name, write_json
from library.inference.base_check import check_base_fits
from library.merging.source import base_model_of
from library.models.base_family import native_side
from library.models.locate import check_base, locate_base
from library.options.evaluate import EvaluateOptions
from library.options.model import ModelOptions
from library.options.parser import flatten
from library.words import plural

BINS_FILE = "timestep_bins.json"


@dataclass(frozen=True)
class ProbePlan:
    base: str
    why_base: str
    checkpoints: dict[str, AppliedAdapter]
    source: PictureSource
    settings: BlockProbeSettings

    def lines(self) -> list[str]:
        told = f"each at {plural(self.settings.parts, 'noise level')}, in {self.settings.bins} bins of log-SNR"
        return [
            *(f"checkpoint {applied.path}" for applied in self.checkpoints.values()),
            f"base       {self.base} ({self.why_base})",
            f"pictures   {len(self.source)}, {self.source.where}, {self.source.size} x {self.source.size} pixels, {told}",
        ]


def plan_probe(options: EvaluateOptions) -> ProbePlan:
    """Everything found and checked; no model is loaded. Raises UserError for what is not there or does not fit."""
    chosen, given = options.checkpoints, options.checkpoints.pretrained_model_name_or_path
    candidates = find_candidates([path.expanduser() for path in chosen.checkpoint], use_ema=chosen.use_ema)[-1:]
    sources = [candidate.read(use_ema=chosen.use_ema) for candidate in candidates]
    if sources:
        base, why = base_model_of(sources, given)
    else:
        base, why = given or ModelOptions.pretrained_model_name_or_path, "as given" if given else "the default"
    checkpoints = {
        candidate.name: AppliedAdapter(candidate.path, source.adapter, chosen.weight)
        for candidate, source in zip(candidates, sources, strict=True)
    }

    def check_fit() -> None:
        check_base(base)
        adapters = {applied.path: applied.adapter for applied in checkpoints.values()}
        check_base_fits(locate_base(base), adapters, clip_skip=1)

    check_all(partial(choose_device, options.device), check_fit)
    size = options.pictures.resolution or native_side(locate_base(base))
    cached = [candidate.path for candidate in candidates if candidate.is_state]
    beside, count = held_out_photos(candidates), options.probe.block_probe_samples
    source = find_pictures(options.measures.reference_dir, cached, beside, base, size, count)
    settings = BlockProbeSettings(bins=options.probe.block_probe_bins, seed=options.pictures.seed)
    return ProbePlan(base, why, checkpoints, source, settings)


def run_probe(options: EvaluateOptions, plan: ProbePlan, report: Path, metrics: Path, version: int) -> BlockProbe:
    """Measure, and write the page, the file of bins beside it, and the numbers, in a format of this version."""
    start, device = time.perf_counter(), choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    found = probe_models(plan.base, plan.checkpoints, plan.source, plan.settings, dtype=dtype, device=device)
    facts = {
        "base": public_name(plan.base),
        "checkpoint": ", ".join(plan.checkpoints) or "none",
        "pictures": f"{found.pictures}, {public_name(plan.source.where)}",
        "labels": "none" if found.label_chance is None else found.labels,
        "device": str(device),
        "time": f"{time.perf_counter() - start:.0f} s",
    }
    found.level_accuracy(found.base).write(report.with_name(BINS_FILE))
    probe_page(found, facts, flatten(options)).write(report)
    values = {"format_version": version, "facts": facts, "block_probe": found.to_json(), "options": flatten(options)}
    write_json(metrics, values)
    return found
