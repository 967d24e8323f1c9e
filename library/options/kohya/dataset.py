"""Which pictures and captions a LoRA is trained on, where no dataset TOML says otherwise: it has the last word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import not_negative, positive, require, share
from library.options.given import Count, Verbatim
from library.options.kohya.values import OptionalSize, OptionalSpan

DEMO_DATA = "demo"
"""Stands for the generated pictures."""

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"]


@dataclass(frozen=True)
class DatasetOptions:
    """Which pictures are trained on, in which sizes."""

    train_data_dir: Path | None = None
    """Folder with folders named REPEATS_CLASS TOKENS, or with pictures, or with images/ and captions/; demo is generated."""
    reg_data_dir: Path | None = None
    """Regularisation pictures in the same form. Their loss counts prior_loss_weight."""
    in_json: Path | None = None
    """Metadata file (.json, .jsonl) with the captions of the pictures in train_data_dir."""
    conditioning_data_dir: Path | None = None
    """Folder of masks, each named as its picture (red channel: white counts in full). Needs masked_loss."""
    dataset_repeats: int = 1
    """Times that each picture of in_json comes up in an epoch."""
    resolution: OptionalSize = None
    """Side in pixels, or width and height: the area that pictures are scaled to. Default: the base's, 512 or 1024."""
    resize_interpolation: Interpolation | None = None
    """How pictures are scaled. Default: area where both sides shrink, else lanczos."""
    enable_bucket: bool = False
    """Keep aspect ratios: pictures of similar shape form batches. Without, every picture is cropped to resolution."""
    min_bucket_reso: int | None = None
    """Shortest side of a bucket in pixels. Default: 256, or half the resolution where that is less."""
    max_bucket_reso: int | None = None
    """Longest side of a bucket in pixels. Default: twice the resolution (1024 at 512, 2048 at 1024)."""
    bucket_reso_steps: int = 64
    """Sides of buckets are multiples of this."""
    bucket_no_upscale: bool = False
    """Never enlarge a picture: buckets follow the sizes of the pictures, and min_ and max_bucket_reso do not count."""
    flip_aug: bool = False
    """Mirror half of the pictures, drawn anew in each epoch. Not for subjects with a left and a right."""
    color_aug: bool = False
    """Shift hue a little at random. Needs fresh pixels each time, so latents are not cached."""
    random_crop: bool = False
    """Crop at random instead of from the centre. Needs fresh pixels each time, so latents are not cached."""
    face_crop_aug_range: OptionalSpan = None
    """Crop around the face that a file name ends with (_cx_cy_w_h), this many times its size, such as 1.0,2.5."""
    alpha_mask: bool = False
    """Take the transparency of a picture for its mask: what is transparent does not count in the loss."""
    missing_caption: Literal["class_tokens", "drop", "stop"] = "class_tokens"
    """A picture without caption: train it with its class tokens (else an empty caption), drop it, or stop. They are counted."""

    def __post_init__(self) -> None:
        for name in ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"):
            path: Path | None = getattr(self, name)
            is_demo = name == "train_data_dir" and str(path) == DEMO_DATA
            require(path is None or is_demo or path.exists(), name, f"{path} does not exist.")
        for name in ("dataset_repeats", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
            positive(name, getattr(self, name))
        require(
            self.bucket_reso_steps % 8 == 0,
            "bucket_reso_steps",
            f"must be a multiple of 8, as the VAE makes one latent of 8 pixels, got {self.bucket_reso_steps}.",
        )
        self._check_sources()
        self._check_sizes()

    def _check_sources(self) -> None:
        require(
            self.in_json is None or self.in_json.suffix in (".json", ".jsonl"),
            "in_json",
            f"must be a .json or .jsonl file, got {self.in_json}.",
        )
        for name in ("in_json", "reg_data_dir"):
            require(
                getattr(self, name) is None or self.train_data_dir is not None,
                name,
                "needs train_data_dir, the folder of the pictures to train on.",
            )
        require(
            self.dataset_repeats == 1 or self.in_json is not None,
            "dataset_repeats",
            "has no effect without in_json. Put the repeats into the folder's name, 10_mio.",
        )

    def _check_sizes(self) -> None:
        if self.resolution is not None:
            require(
                min(self.resolution) >= 64, "resolution", f"must be at least 64 pixels, got {min(self.resolution)}."
            )
        longest = self.max_bucket_side(self.resolution or (512, 512))
        require(
            self.bucket_no_upscale or self.min_bucket_reso is None or self.min_bucket_reso <= longest,
            "min_bucket_reso",
            f"{self.min_bucket_reso} is more than max_bucket_reso {longest}.",
        )
        if self.resolution is not None and self.enable_bucket and not self.bucket_no_upscale:
            shorter, longer = min(self.resolution), max(self.resolution)
            require(
                self.min_bucket_reso is None or self.min_bucket_reso <= shorter,
                "min_bucket_reso",
                f"{self.min_bucket_reso} is more than the resolution's shorter side {shorter}.",
            )
            require(
                longest >= longer, "max_bucket_reso", f"{longest} is less than the resolution's longer side {longer}."
            )
        if self.face_crop_aug_range is not None:
            low, high = self.face_crop_aug_range
            require(
                0 < low <= high,
                "face_crop_aug_range",
                f"must be two positive numbers, the smaller one first, got {low:g},{high:g}.",
            )

    def max_bucket_side(self, resolution: tuple[int, int]) -> int:
        """max_bucket_reso, or what takes its place at this (width, height)."""
        return 2 * max(resolution) if self.max_bucket_reso is None else self.max_bucket_reso


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are found and changed."""

    caption_extension: str | None = None
    """Ending of the caption files beside the pictures. Default: .caption, else .txt."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption each time, except the first keep_tokens."""
    caption_separator: Verbatim = ","
    """What separates the tags of a caption."""
    keep_tokens: int = 0
    """So many tags at the beginning keep their place and are never dropped."""
    keep_tokens_separator: Verbatim = ""
    """Text in a caption (such as |||) before which tags keep their place, instead of keep_tokens. Default: none."""
    secondary_separator: Verbatim | None = None
    """Separator of tags that stay together; becomes caption_separator at the end."""
    enable_wildcard: bool = False
    """Captions may hold {a|b|c}, of which one is drawn, and several lines, of which one is drawn."""
    caption_prefix: Verbatim | None = None
    """Text put before every caption, with a blank."""
    caption_suffix: Verbatim | None = None
    """Text put after every caption, with a blank."""
    caption_dropout_rate: float = 0.0
    """Share of the captions that are replaced by the empty one."""
    caption_dropout_every_n_epochs: int = 0
    """Train every n-th epoch with empty captions; 0 is never."""
    caption_tag_dropout_rate: float = 0.0
    """Share of the tags that are left out of a caption."""
    token_warmup_min: int = 1
    """Tags that captions begin with while their number grows (token_warmup_step)."""
    token_warmup_step: float = 0
    """Steps, or below 1 a share of all, over which captions grow from token_warmup_min tags to all; 0 is at once."""

    def __post_init__(self) -> None:
        share("caption_dropout_rate", self.caption_dropout_rate)
        share("caption_tag_dropout_rate", self.caption_tag_dropout_rate)
        for name in ("keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_step"):
            not_negative(name, getattr(self, name))
        positive("token_warmup_min", self.token_warmup_min)
        require(bool(self.caption_separator), "caption_separator", "is empty; tags are usually separated by commas.")
        require(
            self.token_warmup_min == 1 or self.token_warmup_step > 0,
            "token_warmup_min",
            "has no effect without token_warmup_step.",
        )
        require(
            self.caption_extension is None or self.caption_extension.strip(".") != "",
            "caption_extension",
            f"must be an ending such as .txt, got {self.caption_extension!r}.",
        )

    @property
    def changes_captions(self) -> str | None:
        """The first option that makes a caption differ from one epoch to the next, if any does."""
        names = (
            "shuffle_caption",
            "enable_wildcard",
            "caption_dropout_rate",
            "caption_dropout_every_n_epochs",
            "caption_tag_dropout_rate",
            "token_warmup_step",
        )
        return next((name for name in names if getattr(self, name)), None)


@dataclass(frozen=True)
class NetworkCacheOptions:
    """What is encoded once, and where it is kept."""

    cache_dir: Path = Path("data/cache")
    """Folder of the caches. Entries are keyed by content and geometry, so runs and data sets may share it."""
    cache_latents: bool | None = None
    """Encode pictures once and keep the latents. --no_cache_latents does not. Default: yes, unless
    color_aug, random_crop or face_crop_aug_range forbid it."""
    cache_latents_to_disk: bool = False
    """The same as cache_latents: caches are always on disk, in cache_dir, and outlive the run."""
    vae_batch_size: Count = 1
    """Pictures of one shape per batch while encoding."""
    cache_text_encoder_outputs: bool = False
    """Encode captions once and keep the result. The text encoders cannot be trained then, nor captions changed."""
    cache_text_encoder_outputs_to_disk: bool = False
    """The same as cache_text_encoder_outputs: caches are always on disk."""

    def __post_init__(self) -> None:
        positive("vae_batch_size", self.vae_batch_size)
        require(
            not (self.cache_latents_to_disk and self.cache_latents is False),
            "cache_latents_to_disk",
            "and no_cache_latents contradict each other.",
        )

    @property
    def caches_text(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    @property
    def asks_for_latents(self) -> bool:
        """Whether caching latents was asked for, not only left to the default."""
        return bool(self.cache_latents) or self.cache_latents_to_disk
