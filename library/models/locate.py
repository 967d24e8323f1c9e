"""Where the files of a frozen model lie: a name that the project itself knows, a folder, a single file, or a hub id.

Light on purpose (no torch), so that `--help`, `--dry_run` and configuration errors stay quick.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.files import read_json
from library.models.base_schedule import check_schedule
from library.models.embedded import MODELS, SHAPES, SHAPES_CLIP, SHAPES_DINOV2, TINY_BASES, TINY_TEACHERS
from library.models.pickles import PICKLE_SUFFIXES, conversion_command

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SDXL_COMPONENTS = (*COMPONENTS, "text_encoder_2", "tokenizer_2")
REFINER_COMPONENTS = ("unet", "text_encoder_2", "tokenizer_2", "scheduler")
"""Of SDXL's refiner, whose pictures the base's autoencoder decodes."""
DINOV2, LONE_VAE, LANGUAGE = "dinov2", "autoencoder", "language model"
_AT_ROOT = (DINOV2, LONE_VAE, LANGUAGE)  # such a folder has one component, which lies at its root

# Ids that left the hub, and where the same files are now.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

# What a file of tensors is called, without its suffix, as diffusers and transformers save it.
_SAFE_STEM = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    DINOV2: "model",
    LONE_VAE: "diffusion_pytorch_model",
    LANGUAGE: "model",
}
# transformers' pickles have a name of their own, diffusers' have not.
_PICKLE_STEM = {part: "pytorch_model" if stem == "model" else stem for part, stem in _SAFE_STEM.items()}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseLocation:
    """Where the files of a frozen model lie on this machine."""

    name: str
    """What the user wrote."""
    path: Path
    """A folder in diffusers' (DINOv2: transformers') layout, or one file that holds everything."""
    note: str | None = None
    """A sentence worth printing, e.g. that a hub id has moved."""

    @property
    def is_file(self) -> bool:
        return self.path.is_file()


def locate_base(name: str, components: Sequence[str] | None = None, otherwise: Sequence[str] = ()) -> BaseLocation:
    """Find a Stable Diffusion base; fetch it from the hub if it is a hub id not yet in the local cache.

    `name` is `tiny-shapes`, `tiny-sd15` or `tiny-sdxl`, a diffusers folder, a `.safetensors` file, or `owner/name`. Of a
    hub model only `components` are fetched; None means all that a model of its family has. A complete copy in the hub
    cache is used as it is, without asking the hub for a newer one. otherwise: what is fetched of a hub model that lacks the
    components and has these. Raises UserError for everything that cannot be used, with what to do.
    """
    if name in TINY_BASES:
        return _tiny(name)
    return _judged(_local_base(name, components) or _fetch(name, components, otherwise), components)


def locate_dino(name: str) -> BaseLocation:
    """Find a DINOv2: one of `TINY_TEACHERS`, a transformers folder, Meta's `.pth` (or `.safetensors`) file, or a hub id."""
    if name in TINY_TEACHERS:
        return _tiny(name)
    return _local_dino(name) or _fetch(name, (DINOV2,))


def base_status(name: str, components: Sequence[str] | None = None) -> str | None:
    """None when `locate_base(name, components)` needs no network, else a sentence saying what is missing.

    Looks at names of files and the model's index: nothing is fetched or built. A tiny model counts as there, since it is
    built when it is needed. Raises UserError for one that is there and of a noise schedule that is not known here.
    """
    if name in TINY_BASES:
        return None
    try:
        found = _local_base(name, components)
    except UserError as error:
        return str(error)
    if found is None:
        return _absent(name, SHAPES)
    _judged(found, components)
    return None


def check_base(name: str, components: Sequence[str] | None = None) -> None:
    """Raise UserError where `locate_base` would, as far as that can be known without fetching or building anything."""
    if name not in TINY_BASES and (found := _local_base(name, components)):
        _judged(found, components)
    elif name not in TINY_BASES:
        _require_fetchable(name, SHAPES)


def check_dino(name: str) -> None:
    """The same for `locate_dino`."""
    if name not in TINY_TEACHERS and _local_dino(name) is None:
        _require_fetchable(name, SHAPES_DINOV2)


def check_refiner(name: str) -> None:
    """The same for what can be a refiner: a base, or SDXL's refiner."""
    try:
        check_base(name)
    except UserError as as_base:
        try:
            check_base(name, REFINER_COMPONENTS)
        except UserError:
            raise as_base from None


def check_clip(name: str) -> None:
    """The same for a CLIPModel of transformers."""
    if clip_status(name) is not None:
        _require_fetchable(name, SHAPES_CLIP)


def refiner_status(name: str) -> str | None:
    """`base_status` for what can be a refiner: a base, or SDXL's refiner."""
    missing = base_status(name)
    return missing and base_status(name, REFINER_COMPONENTS) and missing


def dino_status(name: str) -> str | None:
    """`base_status` for the names that `locate_dino` takes."""
    try:
        there = name in TINY_TEACHERS or _local_dino(name) is not None
    except UserError as error:
        return str(error)
    return None if there else _absent(name, SHAPES_DINOV2)


def clip_status(name: str) -> str | None:
    """`base_status` for a CLIPModel of transformers: `tiny-shapes-clip`, a folder, or a hub id."""
    if name == SHAPES_CLIP or (Path(name).expanduser() / "config.json").is_file():
        return None
    from huggingface_hub import try_to_load_from_cache

    is_cached = is_hub_id(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    return None if is_cached else _absent(name, SHAPES_CLIP)


def weight_files(folder: Path, component: str) -> list[Path]:
    """The files of `folder` (the model's root) that hold a component's tensors: one, or its shards in order.

    Preferred in this order: full precision, fp16, shards, `.bin`. Raises UserError when there is none.
    """
    inside = folder if component in _AT_ROOT else folder / component
    names = [file.name for file in inside.iterdir()] if inside.is_dir() else []
    chosen = choose_weights(names, component)
    if not chosen:
        raise UserError(
            f"{folder} has no weights for {component}: {_in_component(component, _SAFE_STEM[component])}.safetensors "
            "was looked for (also .fp16.safetensors, shards, .bin). Complete the folder or name another base model."
        )
    return [inside / name for name in chosen]


def choose_weights(names: Collection[str], component: str) -> list[str]:
    """Which of the file names in a component's folder hold its tensors; empty when none does (see `weight_files`)."""
    safe, pickled = _SAFE_STEM[component], _PICKLE_STEM[component]
    shards = sorted(name for name in names if re.fullmatch(re.escape(safe) + r"-\d+-of-\d+\.safetensors", name))
    complete = bool(shards) and len(shards) == int(shards[0].split("-")[-1].removesuffix(".safetensors"))
    candidates = [
        [f"{safe}.safetensors"],
        [f"{safe}.fp16.safetensors"],
        shards if complete else [],
        [f"{pickled}.bin"],
        [f"{pickled}.fp16.bin"],
    ]
    return next((files for files in candidates if files and set(files) <= set(names)), [])


def locate_clip(name: str) -> BaseLocation:
    """Find a CLIP that tells how well a picture fits words: `tiny-shapes-clip`, or a transformers folder of a CLIPModel."""
    if name == SHAPES_CLIP:
        return _tiny(name)
    path = Path(name).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"{name} is not a folder with a CLIPModel of transformers (no config.json). Name one, or {SHAPES_CLIP}."
        )
    return BaseLocation(name, path)


def _tiny(name: str) -> BaseLocation:
    if name in (SHAPES, SHAPES_DINOV2, SHAPES_CLIP):
        if not (MODELS / name).is_dir():
            raise UserError(
                f"{MODELS / name} is missing. It is part of the repository: git checkout -- models, or train it anew with "
                "python tools/train_tiny_base.py."
            )
        return BaseLocation(name, MODELS / name)
    # Building needs torch; finding does not.
    from library.models.tiny import ensure_tiny

    return BaseLocation(name, ensure_tiny(name))


def _judged(location: BaseLocation, components: Sequence[str] | None) -> BaseLocation:
    """The same, whose noise schedule is known here, where that is asked for."""
    if components is None or "scheduler" in components:
        check_schedule(location.path)
    return location


def _local_base(name: str, components: Sequence[str] | None) -> BaseLocation | None:
    path = Path(name).expanduser()
    if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file():
        raise UserError(
            f"{name} is a pickle, which can run code when it is read, so it is refused as a base model. If you trust "
            f"where it came from, convert it once and name the .safetensors file: {conversion_command(path)}"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            what = "quantised (GGUF), which is not read here" if path.suffix.lower() == ".gguf" else "not a base model"
            raise UserError(f"{name} is {what}: a diffusers folder or a .safetensors file is needed.")
        return BaseLocation(name, path)
    if path.is_dir():
        if not ((path / "model_index.json").exists() or (path / "unet" / "config.json").exists()):
            hint = "" if missing_parts(path, (LONE_VAE,)) else " If it is a VAE alone, give it to --vae."
            raise UserError(
                f"{name} is not a diffusers folder: it has neither model_index.json nor unet/config.json. Name the "
                f"folder that holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/.{hint}"
            )
        if missing := missing_parts(path, components or _all_components(path)):
            raise UserError(f"{name} is incomplete: {', '.join(missing)} missing. Complete it or name another.")
        return BaseLocation(name, path)
    return cached_copy(name, components)


def _local_dino(name: str) -> BaseLocation | None:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in (".pth", ".safetensors"):
            raise UserError(f"{name} is not a DINOv2: a transformers folder, a .pth or .safetensors file is needed.")
        return BaseLocation(name, path)
    if path.is_dir():
        if missing := missing_parts(path, (DINOV2,)):
            raise UserError(f"{name} is not a DINOv2 folder: {', '.join(missing)} missing.")
        return BaseLocation(name, path)
    return cached_copy(name, (DINOV2,))


def _all_components(folder: Path) -> Sequence[str]:
    """What a diffusers folder should hold, by what its index (or else its U-Net) says it is."""
    if (index := folder / "model_index.json").is_file():
        named = read_json(index)
        parts = [name for name in SDXL_COMPONENTS if (named.get(name) or [None])[0]]
        return parts if "text_encoder_2" in parts else COMPONENTS
    unet = folder / "unet" / "config.json"
    is_sdxl = unet.is_file() and read_json(unet).get("addition_embed_type") == "text_time"
    return SDXL_COMPONENTS if is_sdxl else COMPONENTS


def missing_parts(folder: Path, components: Sequence[str]) -> list[str]:
    """The files that a diffusers (DINOv2: transformers) folder lacks for these components, by name only."""
    files = [file.relative_to(folder).as_posix() for file in folder.glob("*")]
    files += [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]
    return _missing(files, components)


def _missing(files: Collection[str], components: Sequence[str]) -> list[str]:
    missing = []
    for component in components:
        if component in ("tokenizer", "tokenizer_2"):
            names = _names_in(files, component)
            if not ({"vocab.json", "merges.txt"} <= set(names) or "tokenizer.json" in names):
                missing.append(f"{component}/vocab.json")
        elif component == "scheduler":
            if "scheduler/scheduler_config.json" not in files:
                missing.append("scheduler/scheduler_config.json")
        else:
            if (config := _in_component(component, "config.json")) not in files:
                missing.append(config)
            if not choose_weights(_names_in(files, component), component):
                missing.append(_in_component(component, f"{_SAFE_STEM[component]}.safetensors"))
    return missing


def _in_component(component: str, file: str) -> str:
    return file if component in _AT_ROOT else f"{component}/{file}"


def _names_in(files: Collection[str], component: str) -> list[str]:
    if component in _AT_ROOT:
        return [file for file in files if "/" not in file]
    return [file.split("/")[1] for file in files if file.startswith(f"{component}/") and file.count("/") == 1]


def cached_copy(name: str, components: Sequence[str] | None) -> BaseLocation | None:
    """A complete copy in the hub cache of the id, or of the id it moved to."""
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    marker = "config.json" if components and components[0] in _AT_ROOT else "model_index.json"
    for hub_id in (name, MOVED[name]) if name in MOVED else (name,):
        found = try_to_load_from_cache(hub_id, marker)
        if not isinstance(found, str):
            continue
        folder = Path(found).parent
        if not missing_parts(folder, components or _all_components(folder)):
            return BaseLocation(name, folder, None if hub_id == name else _moved(name))
    return None


def _fetch(name: str, components: Sequence[str] | None, otherwise: Sequence[str] = ()) -> BaseLocation:
    tiny = SHAPES_DINOV2 if components == (DINOV2,) else SHAPES
    _require_fetchable(name, tiny)
    import httpx
    from huggingface_hub import HfApi, snapshot_download

    hub_id = MOVED.get(name, name)
    try:
        files = HfApi().list_repo_files(hub_id)
        if components is None:
            components = SDXL_COMPONENTS if _names_in(files, "text_encoder_2") else COMPONENTS
        if otherwise and _missing(files, components) and not _missing(files, otherwise):
            components = otherwise
        if missing := _missing(files, components):
            raise UserError(
                f"{hub_id} on the hub is not in the needed layout: {', '.join(missing)} missing. If it holds a single "
                ".safetensors file, download that and give its path."
            )
        folder = snapshot_download(hub_id, allow_patterns=_wanted(files, components))
    except (OSError, httpx.HTTPError) as error:  # hub errors are OSErrors, lost connections are httpx's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{hub_id} could not be fetched from the hub ({reason}), and is no file or folder in {Path.cwd()}. Check the "
            f"name and the network, or give a local folder, a file or {tiny}."
        ) from error
    return BaseLocation(name, Path(folder), _moved(name) if name in MOVED else None)


def _wanted(files: Collection[str], components: Sequence[str]) -> list[str]:
    """Exactly the files of a hub repository that the components need: one set of weights each, configurations, words."""
    wanted = [file for file in ("model_index.json",) if file in files]
    for component in components:
        names = _names_in(files, component)
        weights = choose_weights(names, component) if component in _SAFE_STEM else []
        texts = [n for n in names if n.endswith((".json", ".txt")) and not n.endswith(".index.json")]
        wanted += [_in_component(component, n) for n in [*weights, *texts]]
    return sorted(set(wanted))


def _require_fetchable(name: str, tiny: str) -> None:
    """Raise UserError for what is not on this machine and not to be fetched from the hub. tiny: to name in its place."""
    if not is_fetchable(name):
        raise UserError(_absent(name, tiny))


def is_fetchable(name: str) -> bool:
    """Whether the hub is asked for it."""
    if not is_hub_id(name):
        return False
    from huggingface_hub import constants

    return not constants.is_offline_mode()


def is_hub_id(name: str) -> bool:
    """Whether it has the form owner/name; whether there is such a repository only the hub knows."""
    return bool(_HUB_ID.fullmatch(name)) and not name.lower().endswith((".safetensors", *PICKLE_SUFFIXES))


def _moved(name: str) -> str:
    return f"{name} has left the hub; its copy {MOVED[name]} is used."


def _absent(name: str, tiny: str) -> str:
    if not is_hub_id(name):
        return f"{name} does not exist (looked in {Path.cwd()}), and is no hub id of the form owner/name."
    from huggingface_hub import constants

    remedy = (
        "HF_HUB_OFFLINE is set, so it cannot be fetched: unset it, or"
        if constants.is_offline_mode()
        else "It is fetched from the hub at first use, which needs a network; else"
    )
    return (
        f"{name} is not on this machine: no such file or folder in {Path.cwd()}, and no complete copy in the hub cache "
        f"{constants.HF_HUB_CACHE}. {remedy} give a local folder, a file or {tiny}."
    )
