"""What is to be merged: adapter files, training states, wrapped checkpoints; and the base they say they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import UserError
from library.files import read_json
from library.models.base_family import family_of
from library.models.checkpoint import Checkpoint, StoredTensor
from library.models.locate import base_status, locate_base
from library.models.pickles import PICKLE_SUFFIXES, conversion_command
from library.models.tensor_files import TensorFile
from library.words import plural
from networks import AdapterError
from networks.adapter_family import known_family
from networks.adapter_file import BASE_MODEL_KEY, read_adapter
from networks.adapters import Adapter
from networks.families import FAMILIES, Family
from networks.names import split_wrapped_key
from networks.prediction_names import FLOW_NAME, name_by_metadata

PROVENANCE_KEY = "repa_merge"
"""Metadata of what merge_lora.py writes: version, inputs with their SHA-256, ratios."""

# What PEFT, diffusers and accelerate call the one file of weights in a folder.
_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Source:
    file: Path
    adapter: Adapter
    base_model: str | None
    """The base as whoever trained the adapter named it; None where no file says so."""
    named_in: str
    """Where it is named, e.g. "state.json"."""

    @property
    def is_wrapped(self) -> bool:
        """Whether the file holds the frozen weights too: a whole model with adapters in it."""
        return bool(self.adapter.frozen)

    def describe(self) -> str:
        """ "a.safetensors: 128 modules, rank 8, alpha 8" """
        modules = self.adapter.modules.values()
        ranked = [m for m in modules if m.rank > 0]  # the others have neither
        sizes = [f"{what} {_span(values)}" for what, values in
                 (("rank", {m.rank for m in ranked}), ("alpha", {m.alpha for m in ranked})) if values]  # fmt: skip
        kinds = sorted({m.kind.title for m in modules} - {"LoRA"})
        return f"{self.file}: {', '.join([plural(len(modules), 'module'), *sizes, *kinds])}"


def read_source(model: Path, *, use_ema: bool = False, network_alpha: float | None = None) -> Source:
    """Read `model`: an adapter file, a wrapped checkpoint, a folder of PEFT or diffusers, or a state `step_NNNNNN` of
    train_repa.py.

    use_ema: take the moving average of a state's weights. network_alpha: the alpha of a file that does not say it.
    Raises UserError for everything that cannot be read.
    """
    if not model.is_dir():
        if use_ema and not model.stem.endswith("-ema"):
            raise UserError(f"--use_ema picks the averaged weights of a training state, but {model} is not a folder.")
        adapter = open_adapter(model, network_alpha)
        # A state's own lora.safetensors, named by itself, carries the base as "base_model".
        base_model = adapter.metadata.get(BASE_MODEL_KEY, adapter.metadata.get("base_model"))
        if base_model is None and (beside := _base_beside(model, adapter)) is not None:
            return Source(model, adapter, beside, "the adapter's metadata by its file name")
        return Source(model, adapter, base_model, "the adapter's metadata")
    if not (model / "state.json").is_file():
        for name in _IN_FOLDERS:
            if (model / name).is_file():
                return read_source(model / name, use_ema=use_ema, network_alpha=network_alpha)
        states = sorted(path.parent for path in model.glob("step_*/state.json"))
        hint = f"Its newest state is {states[-1]}." if states else "Name a step_NNNNNN folder or a file."
        raise UserError(f"{model} is no training state: there is no state.json in it. {hint}")
    file = model / ("ema.safetensors" if use_ema else "lora.safetensors")
    if not file.is_file():
        if (model / "lora_unet.safetensors").is_file() or (model / "lora_text_encoder.safetensors").is_file():
            saved = model.with_name(f"{model.name.removesuffix('-state')}.safetensors")
            raise UserError(
                f"{model} is a state of train_network.py, which keeps its adapter in parts. Name the adapter file that was "
                f"saved with it{f', {saved}' if saved.is_file() else ''}."
            )
        hint = " The run kept no moving average (--ema_decay 0); leave --use_ema out." if use_ema else ""
        raise UserError(f"{model} has no {file.name}.{hint}")
    return Source(
        file, open_adapter(file, network_alpha), read_json(model / "state.json").get("base_model"), "state.json"
    )


def open_adapter(path: Path, network_alpha: float | None = None) -> Adapter:
    """`networks.adapter_file.read_adapter`, whose objections become the user's."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is read, so it is not read. If you trust where it came from, "
            f"convert it once and name the .safetensors file: {conversion_command(path)}"
        )
    try:
        return read_adapter(path, alpha=network_alpha)
    except AdapterError as error:
        raise UserError(str(error)) from error


def family_given(key: str | None, base: str | None) -> tuple[Family | None, str]:
    """The family that the user says: by a key of FAMILIES, or by a base; and a phrase that tells who says so.

    Raises UserError for a base that is not at hand, for of it only the family is asked.
    """
    if base is None:
        family = None if key is None else FAMILIES[key]
        return family, "" if family is None else f"--family says {family.title}"
    if missing := base_status(base):
        raise UserError(f"{missing} With --lora_only a base says the family alone: --family sd15 or sdxl does too.")
    family = family_of(locate_base(base))
    return family, f"{base} is of {family.title}"


def of_one_family(sources: Sequence[Source], given: Family | None, said: str) -> list[Source]:
    """The same sources, each of a family that is known: by its file, as `given` (`said` tells by whom), or by the others.

    Raises UserError, naming --family, where nothing tells or a file contradicts itself, and for other models.
    """
    known = [found for source in sources if (found := source.adapter.known_family) is not None]
    return [_told(source, given, said, known[0] if known else None) for source in sources]


def check_one_kind(sources: Sequence[Source]) -> None:
    """Raise UserError where some adapters are of flow models and others say that theirs predicted something else."""
    flow = [source for source in sources if name_by_metadata(source.adapter.metadata) is FLOW_NAME]
    other = [
        source for source in sources if source not in flow and "modelspec.prediction_type" in source.adapter.metadata
    ]
    if flow and other:
        said = other[0].adapter.metadata["modelspec.prediction_type"]
        raise UserError(
            f"{flow[0].file} was trained on a flow model and {other[0].file} on a base that predicts {said}: a sum fits neither."
        )


def _told(source: Source, given: Family | None, said: str, of_others: Family | None) -> Source:
    signs = source.adapter.family_signs
    if given is not None:  # which counts above how names are spelled
        signs = [sign for sign in signs if not sign.is_spelling]
    own = known_family(signs)
    seen = " and ".join(f"like {sign.title} ({sign.because})" for sign in signs)
    if others := [sign for sign in signs if not isinstance(sign.says, Family)]:
        raise UserError(
            f"{source.file} looks like a LoRA for {others[0].title} ({others[0].because}); only those for SD1.5 and SDXL are "
            "read."
        )
    if own is not None and given is not None and given is not own:
        raise UserError(f"{source.file} looks {seen}, and {said}. Leave that out.")
    family = own or given or (None if signs else of_others)
    if family is None:
        why = f"looks {seen}" if signs else "tells neither by its modules, their sizes and names, nor by its metadata"
        raise UserError(
            f"Whether {source.file} is for SD1.5 or SDXL is not known: it {why}. Say it with --family sd15 or --family sdxl."
        )
    return replace(source, adapter=replace(source.adapter, told=family))


def base_model_of(sources: Sequence[Source], given: str | None) -> tuple[str, str]:
    """(name of the base, why that one). Raises UserError where none is given or named, or the sources disagree."""
    if given is not None:
        trained_on = sorted({s.base_model for s in sources if s.base_model not in (None, given)} - {None}, key=str)
        return given, f"the adapter was trained on {', '.join(map(str, trained_on))}" if trained_on else "as given"
    named = {source.base_model: source for source in sources if source.base_model is not None}
    if len(named) > 1:
        raise UserError(
            f"The adapters were trained on different bases ({', '.join(map(str, named))}). Name the one to merge into with "
            "--pretrained_model_name_or_path."
        )
    if named:
        name, source = next(iter(named.items()))
        return str(name), f"named in {source.named_in}"
    first = sources[0]
    if first.is_wrapped:
        # A checkpoint that holds a U-Net, and does not say whose text encoder and VAE go with it.
        return first.adapter.family.hub_id, f"{first.file.name} names no base; what it does not hold comes from here"
    kohyas = first.adapter.metadata.get("ss_sd_model_name")
    said = f"only says that its base was called {kohyas}" if kohyas else "does not say which base model it belongs to"
    raise UserError(
        f"{first.file} {said}. Name the base with --pretrained_model_name_or_path (merge_lora.py --lora_only needs none)."
    )


def with_frozen_weights(base: Checkpoint, source: Source) -> Checkpoint:
    """The base with the components that a wrapped checkpoint holds taken from there. Raises UserError where they differ."""
    file = TensorFile(source.file)
    found: dict[str, dict[str, StoredTensor]] = {}
    for name in source.adapter.frozen:
        split = split_wrapped_key(name)
        assert split is not None, name
        component, key = split
        stored = file.tensors[name]
        found.setdefault(component, {})[key] = StoredTensor(stored, stored.shape)
    return replaced_by(base, found, source.file)


def replaced_by(base: Checkpoint, found: Mapping[str, Mapping[str, StoredTensor]], file: Path) -> Checkpoint:
    """The base with these components of `file` in place of its own. Raises UserError where they differ in names or shapes."""
    for component, tensors in found.items():
        expected = base.shapes.get(component, {})
        shapes = {key: stored.shape for key, stored in tensors.items()}
        wrong = sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key))
        if wrong:
            raise UserError(
                f"{file} holds a {component} of {len(shapes)} tensors, the base {base.location.name} one of "
                f"{len(expected)}, and {len(wrong)} do not agree (first: {', '.join(wrong[:3])}). Name the base it was "
                "trained on with --pretrained_model_name_or_path."
            )
        base = base.replaced(component, tensors, len(tensors))
    return base


def newest_output(root: Path, *, use_ema: bool = False) -> Path:
    """The adapter file or training state under `root` that was written last. Raises UserError where there is none."""
    found = list(_outputs(root, use_ema))
    if not found:
        raise UserError(
            f"There is no training output in {root.absolute()} to merge. Name adapters with --models, or train one first "
            "(python train_repa.py --dataset_config demo.toml)."
        )
    return max(found, key=lambda path: (path / "state.json" if path.is_dir() else path).stat().st_mtime_ns)


def _outputs(root: Path, use_ema: bool) -> Iterator[Path]:
    for file in [*root.glob("*.safetensors"), *root.glob("*/*.safetensors")]:
        averaged = file.stem.endswith("-ema")
        if averaged == use_ema and not (file.parent / "model_index.json").exists():
            try:
                metadata = TensorFile(file).metadata
            except UserError:
                continue  # being written, or not a whole file
            if BASE_MODEL_KEY in metadata and PROVENANCE_KEY not in metadata:  # no sum of adapters, none converted
                yield file
    for state in root.glob("*/step_*/state.json"):
        if (state.parent / ("ema.safetensors" if use_ema else "lora.safetensors")).is_file():
            yield state.parent


def _base_beside(model: Path, adapter: Adapter) -> str | None:
    """The base whose file name kohya's metadata has, where a file or folder of that name is at hand."""
    name = adapter.metadata.get("ss_sd_model_name")
    if not name or name != Path(name).name:
        return None
    places = (Path(name), model.parent / name, Path("models") / name)
    return next((str(place) for place in places if place.exists()), None)


def _span(values: set[int] | set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
