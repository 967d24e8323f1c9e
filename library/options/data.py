"""Class pictures that train_repa.py learns from, and the caches made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import positive, require, share
from library.options.given import Needed, Verbatim
from library.options.kohya.dataset import DEMO_DATA, NetworkCacheOptions


@dataclass(frozen=True)
class ClassPictureOptions:
    """Pictures of classes, each trained with its class's prompt, in squares."""

    train_data: Needed = DEMO_DATA
    """Training pictures: a folder of class folders, a CSV manifest (sample_id,path,class_id), a ZIP with one, or demo."""
    val_data: str | None = None
    """Validation pictures, in any of the same forms. Without them there is no validation."""
    image_root: Path | None = None
    """Folder that the paths of a CSV manifest are relative to. Default: the folder of the manifest."""
    class_names: Path | None = None
    """JSON of class names, {"0": "tench", ...} or a list; ImageNet's: dataset_configs/imagenet_classes.json. Class folders without
    it are named by their folder."""
    prompt_template: Verbatim = "a photo of a {name}"
    """Prompt of a class; {name} becomes the class name."""
    class_dropout: float = 0.1
    """Share of samples whose class prompt is replaced by the empty one, for classifier-free guidance."""
    max_train_samples: int | None = None
    """Train on this many samples, chosen by a stable hash of their ids. Default: all."""
    max_validation_samples: int | None = None
    """Validate on this many samples, chosen likewise. Default: all."""

    def __post_init__(self) -> None:
        require(bool(self.train_data), "train_data", "is empty.")
        require("{name}" in self.prompt_template, "prompt_template", "must contain {name}.")
        share("class_dropout", self.class_dropout)
        positive("max_train_samples", self.max_train_samples)
        positive("max_validation_samples", self.max_validation_samples)


@dataclass(frozen=True)
class ClassCacheOptions(NetworkCacheOptions):
    """Where latents, tokens and prompts are kept, and how they are encoded."""

    train_latents: Path | None = None
    """LMDB store of the training latents. Default: train_latents in cache_dir."""
    train_tokens: Path | None = None
    """LMDB store of the training pictures' tokens (/dev/shm suits, if they fit). Default: train_tokens in cache_dir. Those of a
    second teacher lie beside it, as train_tokens_NAME."""
    val_latents: Path | None = None
    """LMDB store of the validation latents. Default: val_latents in cache_dir."""
    val_tokens: Path | None = None
    """LMDB store of the validation tokens. Default: val_tokens in cache_dir."""
    text_embeddings: Path | None = None
    """Prompt embeddings [C+1, 77, 768], .safetensors or .pt. Default: text_embeddings.safetensors in cache_dir."""
    latent_shape: tuple[int, int, int] | None = None
    """Shape of one latent in a raw float16 store made elsewhere without __meta__, such as 4 64 64."""
    token_shape: tuple[int, int] | None = None
    """Shape of one sample's tokens in such a store, such as 256 1024; of several teachers the first's."""
    encoder_precision: Literal["auto", "bf16", "no"] = "auto"
    """Number format in which VAE, teacher and text encoder compute. auto follows mixed_precision."""
    cache_batch_size: int = 16
    """Class pictures per batch while encoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("cache_batch_size", self.cache_batch_size)

    def store_path(self, pictures: str, name: str) -> Path:
        """Folder of a store of the training (train) or validation pictures (val): latents, tokens; those of other teachers than the
        first (`token_kinds`) lie beside the first's."""
        kind, _, teacher = name.partition("_")
        path: Path = getattr(self, f"{pictures}_{kind}") or self.cache_dir / f"{pictures}_{kind}"
        return path.with_name(f"{path.name}_{teacher}") if teacher else path

    @property
    def text_embeddings_path(self) -> Path:
        return self.text_embeddings or self.cache_dir / "text_embeddings.safetensors"
