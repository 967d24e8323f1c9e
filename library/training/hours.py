"""How long a training takes, from what benchmarks/ measured on a device of this kind; and which benchmark measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.models.configs import published_family
from library.models.embedded import TINY_BASES
from library.options.run import RunOptions
from library.options.toml_file import PROJECT_ROOT
from library.training.plan import Plan
from networks.families import SD15, Family

RESULTS = Path("benchmarks") / "results"


@dataclass(frozen=True)
class Workload:
    """What decides how fast a device trains. base: a tiny one by its name, any other by its family."""

    base: str
    side: int
    """Of a square of as many pixels as the pictures have."""
    batch: int
    precision: str
    compile: str
    alignment: bool
    scope: str

    def command(self, on_gpu: bool) -> str:
        """The benchmark that measures it."""
        compiled = f" --compile {self.compile}" if self.compile != "none" else ""
        if self.alignment and on_gpu and (self.base, self.side) == (SD15.key, 512):
            return f"python benchmarks/repa_step.py --batch {self.batch} --lora_scope {self.scope}{compiled}"
        more = f"{' --alignment' if self.alignment else ''}{compiled}"
        return (
            f"python benchmarks/train_network.py --family {self.base} --resolution {self.side} --batch {self.batch} "
            f"--precision {self.precision}{f' --{more}' if more else ''}"
        )


def workload_of(options: RunOptions, family: Family, side: int, batch: int) -> Workload:
    name = options.model.pretrained_model_name_or_path
    return Workload(
        base=name if name in TINY_BASES else family.key,
        side=side,
        batch=batch,
        precision=options.model.mixed_precision,
        compile=options.speed.compile,
        alignment=options.alignment.alignment,
        scope=options.network.scope,
    )


def hours_line(workload: Workload, plan: Plan, device: str, *, on_gpu: bool, results: Path | None = None) -> str | None:
    """The forecast, or how to get one; None for a tiny base that nobody has measured, which takes no time worth a forecast.

    device: as benchmarks name it. results: folder of their JSON files; default: the project's.
    """
    found = _nearest(workload, device, PROJECT_ROOT / RESULTS if results is None else results)
    if found is None:
        if workload.base in TINY_BASES:
            return None
        return f"unknown: no benchmark of such a training on {device} yet. To measure one: {workload.command(on_gpu)}"
    path, measured, rate = found
    samples = plan.last_step * plan.batch_size * plan.accumulation
    others = [
        f"{name} {there} there, {getattr(workload, name)} here"
        for name, there in vars(measured).items()
        if there != getattr(workload, name) and (name != "scope" or workload.alignment)
    ]
    return (
        f"about {_duration(samples / rate)} of training alone, at {rate:.3g} img/s on {device} "
        f"({RESULTS.as_posix()}/{path.name}{''.join(f'; {other}' for other in others)})"
    )


def _nearest(workload: Workload, device: str, folder: Path) -> tuple[Path, Workload, float] | None:
    """The result of this base, size and kind of training on this device that is most alike in the rest."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = read_json(path)
            measured, rate = _measured(result["settings"]), float(result["measured"]["samples_per_second"])
        except (UserError, KeyError, TypeError, ValueError):
            continue  # of something else
        same = (measured.base, measured.side, measured.alignment) == (workload.base, workload.side, workload.alignment)
        if same and result.get("device") == device and rate > 0:
            unlike = [getattr(measured, name) != getattr(workload, name) for name in ("precision", "compile", "scope")]
            apart = max(measured.batch, workload.batch) / min(measured.batch, workload.batch)
            found.append(((sum(unlike), apart), (path, measured, rate)))
    return min(found, key=lambda one: one[0])[1] if found else None


def _measured(settings: Mapping[str, Any]) -> Workload:
    """What a result of train_network.py or repa_step.py was measured with. Raises KeyError for those of other benchmarks."""
    if "lora_scope" in settings:
        family = published_family(settings["model"])
        base = settings["model"] if family is None else family.key
        alignment, compiled, scope = True, settings["compile"], settings["lora_scope"]
    else:
        more = settings["more"].split()
        base, alignment, scope = settings["family"], "--alignment" in more, "all"
        compiled = more[more.index("--compile") + 1] if "--compile" in more else "none"
        if others := set(more) - {"none", "--alignment", "--compile", compiled}:
            raise KeyError(f"a training with {others}")
    return Workload(base, settings["resolution"], settings["batch"], settings["precision"], compiled, alignment, scope)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 10 * 3600 else f"{seconds / 3600:.0f} hours"
