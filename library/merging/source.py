"""What is to be merged: an adapter file or a training state, and the base model it says it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.files import read_json
from networks import AdapterError
from networks.adapter_file import BASE_MODEL_KEY, Adapter, read_adapter


@dataclass(frozen=True)
class Source:
    file: Path
    adapter: Adapter
    base_model: str | None
    """The base as whoever trained the adapter named it; None where no file says so."""
    named_in: str
    """Where it is named, e.g. "state.json"."""

    def describe(self) -> str:
        """ "a.safetensors: 128 modules, rank 8, alpha 8" """
        modules = self.adapter.modules.values()
        sizes = [f"{what} {_span(values)}" for what, values in
                 (("rank", {m.rank for m in modules}), ("alpha", {m.alpha for m in modules}))]  # fmt: skip
        return f"{self.file}: {len(modules)} modules, {', '.join(sizes)}"


def read_source(model: Path, *, use_ema: bool = False, network_alpha: float | None = None) -> Source:
    """Read `model`: a LoRA file, or a state folder `step_NNNNNN` of train_repa.py.

    use_ema: take the moving average of a state's weights. network_alpha: the alpha of a file that does not say it.
    Raises UserError for everything that cannot be read.
    """
    if not model.is_dir():
        if use_ema:
            raise UserError(f"--use_ema picks the averaged weights of a training state, but {model} is not a folder.")
        adapter = open_adapter(model, network_alpha)
        # A state's own lora.safetensors, named by itself, carries the base as "base_model".
        base_model = adapter.metadata.get(BASE_MODEL_KEY, adapter.metadata.get("base_model"))
        return Source(model, adapter, base_model, "the adapter's metadata")
    if not (model / "state.json").is_file():
        states = sorted(path.parent for path in model.glob("step_*/state.json"))
        hint = f"Its newest state is {states[-1]}." if states else "Name a step_NNNNNN folder or a file."
        raise UserError(f"{model} is no training state: there is no state.json in it. {hint}")
    file = model / ("ema.safetensors" if use_ema else "lora.safetensors")
    if not file.is_file():
        hint = " The run kept no moving average (--ema_decay 0); leave --use_ema out." if use_ema else ""
        raise UserError(f"{model} has no {file.name}.{hint}")
    return Source(
        file, open_adapter(file, network_alpha), read_json(model / "state.json").get("base_model"), "state.json"
    )


def open_adapter(path: Path, network_alpha: float | None = None) -> Adapter:
    """`networks.adapter_file.read_adapter`, whose objections become the user's."""
    try:
        return read_adapter(path, alpha=network_alpha)
    except AdapterError as error:
        raise UserError(str(error)) from error


def base_model_of(source: Source, given: str | None) -> str:
    """The base model's name: the given one, else the one the source names. Raises UserError where there is neither."""
    if given is not None:
        return given
    if source.base_model is not None:
        return source.base_model
    kohyas = source.adapter.metadata.get("ss_sd_model_name")
    said = f"only says that its base was called {kohyas}" if kohyas else "does not say which base model it belongs to"
    raise UserError(f"{source.file} {said}. Name the base with --pretrained_model_name_or_path.")


def _span(values: set[int] | set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
