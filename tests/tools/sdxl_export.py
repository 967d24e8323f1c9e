"""Best trainings of studies that never ran, for the tests of what becomes of them on SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from library.data.dataset_schema import Dataset, Subset
from library.options.network import TrainNetworkOptions
from library.search.best_params import BaseModel, BestParams, Confirmed, ObjectiveFacts, Params, RateReference, TopTrial
from library.search.to_sdxl.trainings import PictureFacts, Sd15Training

# The guide's: the values of dataset_configs/character.toml, as a study on SD1.5 would have found them.
GUIDE: dict[str, Any] = {
    "pretrained_model_name_or_path": "tiny-sd15", "network_dim": 64, "network_alpha": 32.0, "learning_rate": 3e-4, "unet_lr": 3e-4,
    "text_encoder_lr": 2e-4, "optimizer_type": "AdamW8bit", "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3,
    "lr_warmup_steps": 100, "gradient_accumulation_steps": 2, "max_train_epochs": 12, "clip_skip": 2, "mixed_precision": "bf16",
    "min_snr_gamma": 5.0, "noise_offset": 0.05, "seed": 7,
}  # fmt: skip
PARAMS: Params = {
    "learning_rate": 3e-4, "text_encoder_ratio": 2 / 3, "network_dim": 64, "network_alpha": 32, "optimizer_type": "AdamW8bit",
    "lr_scheduler": "cosine_with_restarts", "gradient_accumulation_steps": 2, "max_train_epochs": 12,
}  # fmt: skip
GUIDE_DATASET = Dataset(
    (512, 512),
    8,
    True,
    384,
    768,
    64,
    subsets=(Subset(image_dir=Path("images"), caption_extension=".txt"),),
    name="512x512",
)


def best_params(
    config: Mapping[str, Any] | None = None, *, params: Params | None = None, steps: int = 1200, **changes: Any
) -> BestParams:
    """A best_params.json of a study with the guide's values; `config` is put over them, None leaving an option out."""
    given = GUIDE | dict(config or {})
    train_config = {name: value for name, value in given.items() if value is not None}
    alpha, dim = train_config.get("network_alpha", 1.0), train_config.get("network_dim", 4)
    params = PARAMS if params is None else params
    best = BestParams(
        created="2025-11-12T08:00:00",
        study="mio",
        base_model=BaseModel("sd15", "tiny-sd15", "ab" * 32),
        dataset="cd" * 32,
        objective=ObjectiveFacts("loss", {"low": -0.02, "high": -0.05}, {"low": 1.0}),
        value=-0.04,
        trial=25,
        params=params,
        train_config=train_config,
        lr_reference=RateReference(alpha, dim, 16, steps),
        search_space="0123456789abcdef",
        confirmed=Confirmed(-0.038, 0.004, (43, 44)),
        top5=(TopTrial(25, -0.04, params, Confirmed(-0.038, 0.004, (43, 44))), TopTrial(7, -0.03, params)),
        versions={"optuna": "5.0.0"},
    )
    return replace(best, **changes)


def found_training(
    datasets: tuple[Dataset, ...] = (GUIDE_DATASET,),
    *,
    count: int = 359,
    side: int = 1200,
    steps: int = 1200,
    **given: Any,
) -> Sd15Training:
    """The guide's training with changes to its options, as the rules see it. No picture has to be there."""
    values = GUIDE | given
    groups = {}
    for group in fields(TrainNetworkOptions):
        kind = type(getattr(TrainNetworkOptions(), group.name))
        own = {one.name: values[one.name] for one in fields(kind) if values.get(one.name) is not None}
        if not isinstance(rates := own.get("text_encoder_lr", ()), tuple):
            own["text_encoder_lr"] = (rates,)
        groups[group.name] = kind(**own)
    options = TrainNetworkOptions(**groups)
    pictures = tuple(PictureFacts(count, float(side * side)) for _ in datasets)
    reference = RateReference(options.network.alpha, options.network.rank, 16, steps)
    return Sd15Training(options, datasets, pictures, reference, 0.1)
