"""The adapter files that other programs read, written at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from library.files import whole_file
from library.options.repa import TrainRepaOptions
from library.training.plan import Plan
from library.training.repa_run import lora_spec
from library.training.state import read_facts, read_tensors
from networks.adapter_export import adapter_metadata, to_kohya


def export_adapters(state: Path, options: TrainRepaOptions, plan: Plan, *, missing_only: bool = False) -> list[Path]:
    """NAME.safetensors with the weights as trained and, where they were averaged, NAME-ema.safetensors; kohya's format.

    Made of a state's folder, so that a run that died after its last state can still have them (missing_only).
    """
    sources = {"": "lora.safetensors", "-ema": "ema.safetensors"}
    files = []
    for suffix, source in sources.items():
        if (state / source).is_file():
            path = options.output.output_dir / f"{options.output.output_name}{suffix}.safetensors"
            if not (missing_only and path.exists()):
                _export(state / source, path, options, plan, read_facts(state)["prediction_type"])
            files.append(path)
    return files


def _export(source: Path, path: Path, options: TrainRepaOptions, plan: Plan, prediction_type: str) -> None:
    date = datetime.now().isoformat(timespec="seconds")
    tensors, metadata = adapter_file(read_tensors(source), path.stem, options, plan, prediction_type, date)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def adapter_file(
    weights: Mapping[str, Tensor], name: str, options: TrainRepaOptions, plan: Plan, prediction_type: str, date: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file `name`.safetensors, of weights by their names in a state."""
    spec = lora_spec(options)
    tensors = to_kohya({key: one for key, one in weights.items() if not key.startswith("align_heads.")}, spec)
    metadata = adapter_metadata(
        spec,
        tensors,
        output_name=name,
        date=date,
        resolution=(options.data.resolution, options.data.resolution),
        base_model=options.model.pretrained_model_name_or_path,
        prediction_type=prediction_type,
        extra=_training_metadata(options, plan),
    )
    return tensors, metadata


def _training_metadata(options: TrainRepaOptions, plan: Plan) -> dict[str, str]:
    """What kohya's files say of the training, as str() of the value (kohya sd-scripts, train_network.py)."""
    values = {
        "ss_steps": plan.last_step,
        "ss_epoch": plan.last_step // plan.steps_per_epoch,
        "ss_num_epochs": -(-plan.last_step // plan.steps_per_epoch),
        "ss_num_batches_per_epoch": plan.steps_per_epoch * plan.accumulation,
        "ss_num_train_images": plan.samples,
        "ss_batch_size_per_device": plan.batch_size,
        "ss_total_batch_size": plan.samples_per_step,
        "ss_gradient_accumulation_steps": plan.accumulation,
        "ss_max_train_steps": plan.last_step,
        "ss_learning_rate": options.optimizer.learning_rate,
        "ss_unet_lr": options.optimizer.learning_rate,
        "ss_lr_scheduler": options.optimizer.lr_scheduler,
        "ss_lr_warmup_steps": plan.warmup_steps,
        "ss_optimizer": f"torch.optim.adamw.AdamW(weight_decay={options.optimizer.weight_decay})",
        "ss_max_grad_norm": options.optimizer.max_grad_norm,
        "ss_mixed_precision": options.model.mixed_precision,
        "ss_seed": options.training.seed,
        "ss_min_snr_gamma": options.objective.min_snr_gamma,
        "ss_resolution": (options.data.resolution, options.data.resolution),
        "ss_training_comment": "U-REPA" if options.alignment.alignment else None,
    }
    return {key: str(value) for key, value in values.items()}
