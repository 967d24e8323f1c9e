"""What an adapter file says of its training: kohya's ss_* entries, and ModelSpec's.

All values are str() of the value, or JSON where kohya writes JSON (sd-scripts, train_network.py).
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from library.data.captions import is_static
from library.data.collect import TrainingData
from library.data.dataset_schema import Dataset, Subset
from library.data.trained_image import TrainedImage, groups_of
from library.files import remembered_hash
from library.models.fingerprint import HASHES
from library.options.run import RunOptions
from library.training.optimizers import optimizer_text
from library.training.plan import Plan
from networks.adapter_export import adapter_metadata
from networks.families import Family
from networks.lyra import TEXT_FUSION_KEY
from networks.prediction_names import FLOW_SHIFT_KEY, flow_usage
from networks.spec import RUN_KEY, NetworkSpec, is_kept


@dataclass
class AdapterMetadata:
    """Everything that does not change from save to save, worked out once."""

    options: RunOptions
    plan: Plan
    data: TrainingData
    family: Family
    spec: NetworkSpec
    prediction_type: str
    base: Path
    record: Mapping[str, Any] | None = None
    """By which the run knows its files again; see earlier.py."""
    flow: Mapping[str, str] = field(default_factory=dict)
    """Of a training along a rectified flow, and by bins of timesteps; see flow.py and bins.py."""
    started: float = field(default_factory=time.time)
    session: int = field(default_factory=lambda: random.SystemRandom().randint(0, 2**32))

    def __post_init__(self) -> None:
        self._fixed = self._of_options() | self._of_data() | self._of_base()
        if (fusion := self.options.fusion.text_fusion) is not None:
            self._fixed[TEXT_FUSION_KEY] = fusion.name

    def at(
        self, step: int, tensors: Mapping[str, Tensor], name: str, date: str, *, finished: bool = False
    ) -> dict[str, str]:
        """Of the file that holds `tensors` after `step` steps. date: local time, ISO with seconds.

        ss_epoch counts whole epochs, and at the end the one that was begun, as kohya's final file does.
        """
        epochs, begun = divmod(step, self.plan.steps_per_epoch)
        now = {
            "ss_output_name": name,
            "ss_training_finished_at": time.time(),
            "ss_steps": step,
            "ss_epoch": epochs + (finished and begun > 0),
        }
        given = {key: str(value) for key, value in {**self._fixed, **now}.items()}
        if self.record is not None:
            given[RUN_KEY] = json.dumps({**self.record, "finished": finished})
        whole = adapter_metadata(
            self.spec,
            tensors,
            family=self.family,
            output_name=name,
            date=date,
            resolution=self._resolution(),
            base_model=self.options.model.pretrained_model_name_or_path,
            prediction_type=self.prediction_type,
            title=self.options.metadata.metadata_title or name,
            extra=given | dict(self.flow) | self._modelspec(),
        )
        if self.options.metadata.no_metadata:
            whole = {k: v for k, v in whole.items() if is_kept(k)}
        return whole

    def _resolution(self) -> tuple[int, int]:
        """What was trained: that of the first dataset."""
        return self.data.datasets[0].resolution

    def _modelspec(self) -> dict[str, str]:
        metadata = self.options.metadata
        entries = {
            "author": metadata.metadata_author,
            "description": metadata.metadata_description,
            "license": metadata.metadata_license,
            "tags": metadata.metadata_tags,
            "usage_hint": metadata.metadata_usage_hint,
            "thumbnail": metadata.metadata_thumbnail,
            "merged_from": metadata.metadata_merged_from,
            "trigger_phrase": metadata.metadata_trigger_phrase,
            "preprocessor": metadata.metadata_preprocessor,
            "is_negative_embedding": metadata.metadata_is_negative_embedding,
        }
        noise = self.options.noise
        if noise.min_timestep is not None or noise.max_timestep is not None:
            entries["timestep_range"] = ",".join(map(str, noise.timesteps))
        if self.options.text.clip_skip is not None:
            entries["encoder_layer"] = str(self.options.text.clip_skip)
        if self.flow.get("ss_flow_mode") == "native" and metadata.metadata_usage_hint is None:
            entries["usage_hint"] = " ".join(
                filter(None, (flow_usage(self.flow[FLOW_SHIFT_KEY]), self.spec.kind.readers))
            )
        return {f"modelspec.{key}": str(value) for key, value in entries.items() if value is not None}

    def _of_options(self) -> dict[str, Any]:
        o, plan = self.options, self.plan
        optimizer, objective, noise, captions = o.optimizer, o.objective, o.noise, o.captions
        values: dict[str, Any] = {
            "ss_session_id": self.session,
            "ss_training_started_at": self.started,
            "ss_learning_rate": optimizer.learning_rate,
            "ss_text_encoder_lr": list(optimizer.text_encoder_lr) or None,
            "ss_unet_lr": optimizer.unet_lr,
            "ss_num_epochs": -(-plan.last_step // plan.steps_per_epoch),
            "ss_gradient_checkpointing": o.speed.gradient_checkpointing,
            "ss_gradient_accumulation_steps": plan.accumulation,
            "ss_max_train_steps": plan.last_step,
            "ss_lr_warmup_steps": plan.warmup_steps,
            "ss_lr_scheduler": optimizer.lr_scheduler_type or optimizer.lr_scheduler,
            "ss_network_dropout": o.network.network_dropout,
            "ss_mixed_precision": o.model.mixed_precision,
            "ss_full_fp16": False,
            "ss_clip_skip": o.text.clip_skip,
            "ss_max_token_length": o.text.max_token_length,
            "ss_cache_latents": True,
            "ss_seed": o.training.seed,
            "ss_lowram": False,
            "ss_noise_offset": noise.noise_offset,
            "ss_noise_offset_random_strength": noise.noise_offset_random_strength,
            "ss_multires_noise_iterations": noise.multires_noise_iterations,
            "ss_multires_noise_discount": noise.multires_noise_discount,
            "ss_adaptive_noise_scale": noise.adaptive_noise_scale,
            "ss_zero_terminal_snr": noise.zero_terminal_snr,
            "ss_ip_noise_gamma": noise.ip_noise_gamma,
            "ss_ip_noise_gamma_random_strength": noise.ip_noise_gamma_random_strength,
            "ss_training_comment": o.metadata.training_comment,
            "ss_sd_scripts_commit_hash": "(unknown)",
            "ss_optimizer": optimizer_text(optimizer),
            "ss_max_grad_norm": optimizer.max_grad_norm,
            "ss_caption_dropout_rate": captions.caption_dropout_rate,
            "ss_caption_dropout_every_n_epochs": captions.caption_dropout_every_n_epochs,
            "ss_caption_tag_dropout_rate": captions.caption_tag_dropout_rate,
            "ss_face_crop_aug_range": o.data.face_crop_aug_range,
            "ss_prior_loss_weight": objective.prior_loss_weight,
            "ss_min_snr_gamma": objective.min_snr_gamma,
            "ss_debiased_estimation": objective.debiased_estimation_loss,
            "ss_scale_weight_norms": o.network.scale_weight_norms,
            "ss_loss_type": objective.loss_type,
            "ss_huber_schedule": objective.huber_schedule,
            "ss_huber_scale": objective.huber_scale,
            "ss_huber_c": objective.huber_c,
            "ss_fp8_base": o.model.fp8_base,
            "ss_fp8_base_unet": o.model.fp8_base_unet,
            "ss_validation_seed": o.validation.validation_seed,
            "ss_validation_split": o.validation.validation_split,
            "ss_max_validation_steps": o.validation.max_validation_steps,
            "ss_validate_every_n_epochs": o.validation.validate_every_n_epochs,
            "ss_validate_every_n_steps": o.output.validate_every_n_steps,
            "ss_resize_interpolation": o.data.resize_interpolation,
        }
        if o.model.base_quantization != "none":  # not kohya's; the adapter is for the base as it was
            values["ss_base_quantization"] = o.model.base_quantization
        if o.network.network_args:
            words = dict(word.split("=", 1) for word in o.network.network_args)
            values["ss_network_args"] = json.dumps({**words, "dropout": o.network.network_dropout})
        if o.alignment.alignment:
            # Not kohya's: nothing else in the file tells of the heads, which are left in the states.
            heads = {
                name: getattr(optimizer, name)
                for name in ("align_learning_rate", "align_weight_decay", "align_max_grad_norm")
            }
            described = (
                asdict(o.alignment)
                | heads
                | ({"dino_model": list(o.model.dino_model)} if o.alignment.needs_teacher else {})
            )
            values["ss_alignment"] = json.dumps({name: one for name, one in described.items() if name != "alignment"})
        return values

    def _of_data(self) -> dict[str, Any]:
        training, datasets = self.data.training, self.data.datasets
        batches = sum(group.batches for group in groups_of(training))
        described = [
            self._dataset(dataset, table.info()) for dataset, table in zip(datasets, self.data.tables, strict=True)
        ]
        found: dict[str, Any] = {
            "ss_num_train_images": sum(picture.repeats for picture in training if not picture.image.subset.is_reg),
            "ss_num_reg_images": sum(picture.repeats for picture in training if picture.image.subset.is_reg),
            "ss_num_validation_images": len(self.data.validation),
            "ss_num_batches_per_epoch": -(-batches // self.plan.world_size),
            "ss_datasets": json.dumps(described),
            "ss_tag_frequency": json.dumps(self._first_tags(described)),
            "ss_dataset_dirs": json.dumps(self._folders(is_reg=False)),
            "ss_reg_dataset_dirs": json.dumps(self._folders(is_reg=True)),
            "ss_total_batch_size": self.plan.samples_per_step,
        }
        # Entries of one value, which say nothing where data sets differ.
        return found | (self._of_only_dataset(datasets[0]) if len(datasets) == 1 else {})

    def _of_only_dataset(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "ss_batch_size_per_device": dataset.batch_size,
            "ss_resolution": dataset.resolution,
            "ss_enable_bucket": dataset.enable_bucket,
            "ss_bucket_no_upscale": dataset.bucket_no_upscale,
            "ss_min_bucket_reso": dataset.min_bucket_reso,
            "ss_max_bucket_reso": dataset.max_bucket_reso,
            "ss_bucket_info": json.dumps(self.data.tables[0].info()),
            **{
                f"ss_{name}": any(getattr(subset, name) for subset in dataset.subsets)
                for name in ("color_aug", "flip_aug", "random_crop", "shuffle_caption")
            },
            "ss_keep_tokens": max(subset.keep_tokens for subset in dataset.subsets),
        }

    @staticmethod
    def _first_tags(datasets: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
        """Tags of each folder, once where several data sets train it, as kohya counts them."""
        found: dict[str, dict[str, int]] = {}
        for dataset in datasets:
            found = dataset["tag_frequency"] | found
        return found

    def _dataset(self, dataset: Dataset, buckets: Mapping[str, Any]) -> dict[str, Any]:
        images = [picture for picture in self.data.training if picture.dataset is dataset]
        return {
            "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
            "batch_size_per_device": dataset.batch_size,
            "num_train_images": sum(picture.repeats for picture in images if not picture.image.subset.is_reg),
            "num_reg_images": sum(picture.repeats for picture in images if picture.image.subset.is_reg),
            "resolution": list(dataset.resolution),
            "enable_bucket": dataset.enable_bucket,
            "min_bucket_reso": dataset.min_bucket_reso,
            "max_bucket_reso": dataset.max_bucket_reso,
            "tag_frequency": self._tags(images),
            "bucket_info": buckets,
            "resize_interpolation": dataset.resize_interpolation,
            "subsets": [self._subset(subset, images) for subset in dataset.subsets],
        }

    @staticmethod
    def _subset(subset: Subset, images: Sequence[TrainedImage]) -> dict[str, Any]:
        own = [picture for picture in images if picture.image.subset is subset]
        names = (
            *("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator"),
            *("secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation"),
            *("class_tokens", "is_reg"),
        )
        described = {name: getattr(subset, name) for name in names}
        return {
            "img_count": len(own),
            "num_repeats": subset.num_repeats,
            "static_caption": is_static(subset),
            **described,
            "image_dir": None if subset.image_dir is None else subset.image_dir.name,
            "metadata_file": None if subset.metadata_file is None else subset.metadata_file.name,
        }

    @staticmethod
    def _tags(images: Sequence[TrainedImage]) -> dict[str, dict[str, int]]:
        """Folder -> tag -> how many pictures have it. Tags are what commas separate, in lower case."""
        found: dict[str, Counter[str]] = {}
        for picture in images:
            counts = found.setdefault(_folder_name(picture.image.subset), Counter())
            # Counter.update would ask whether it is given a mapping, which among all classes of torch takes a third of a second.
            for tag in filter(None, (tag.strip().lower() for tag in picture.image.caption.split(","))):
                counts[tag] += 1
        return {folder: dict(counts) for folder, counts in found.items()}

    def _folders(self, *, is_reg: bool) -> dict[str, dict[str, int]]:
        """Folder -> repeats and pictures; a second one of the same name is "name (2)"."""
        found: dict[str, dict[str, int]] = {}
        for subset in (subset for dataset in self.data.datasets for subset in dataset.subsets):
            if subset.is_reg != is_reg:
                continue
            name = unique = _folder_name(subset)
            number = 2
            while unique in found:
                unique, number = f"{name} ({number})", number + 1
            count = sum(picture.image.subset is subset for picture in self.data.training)
            found[unique] = {"n_repeats": subset.num_repeats, "img_count": count}
        return found

    def _of_base(self) -> dict[str, Any]:
        """Hashes of base and VAE where they are files, as A1111 knows them; and the name of the VAE."""
        cache_dir = self.options.cache.cache_dir
        found = _hashes("sd_model", self.base, cache_dir) if self.base.is_file() else {}
        if (vae := self.options.model.vae) is not None:
            found["ss_vae_name"] = Path(vae).name
            found |= _hashes("vae", Path(vae), cache_dir) if Path(vae).is_file() else {}
        return found


def _folder_name(subset: Subset) -> str:
    place = subset.image_dir or subset.metadata_file
    return "" if place is None else place.name


def _hashes(what: str, path: Path, cache_dir: Path) -> dict[str, str]:
    """A1111's old hash, of 64 KiB at 1 MiB, and that of the whole file."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return {f"ss_{what}_hash": old, f"ss_new_{what}_hash": remembered_hash(path, cache_dir / HASHES)}
