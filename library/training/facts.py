"""What a state records of its run; a run that resumes from it must have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from library.data.captions import changes_tags, tag_joint
from library.data.collect import TrainingData
from library.data.dataset_schema import Dataset, Subset
from library.diffusion.objective import Objective
from library.models.locate import BaseLocation
from library.options.model import token_kinds
from library.options.run import RunOptions
from library.training.caches import Prepared
from library.training.models import base_weights_facts
from networks.families import UNET, Family
from networks.spec import NetworkSpec

# Where pictures and captions lie and how these are reported: it may change without another picture being shown.
_NOT_SHOWN = frozenset(
    """
    image_dir conditioning_data_dir metadata_file name place notes subsets cache_info num_repeats validation_split
    validation_seed
    """.split()  # noqa: SIM905
)


def state_facts(options: RunOptions, prepared: Prepared, spec: NetworkSpec, objective: Objective) -> dict[str, Any]:
    """What state.json says besides the counters: enough to rebuild the model around the saved weights."""
    family, stores = prepared.family, prepared.training
    tokens: dict[str, Any] = {}
    for teacher, name in token_kinds(stores.tokens).items():
        tokens |= stores.tokens[teacher].producers(f"{name} ")
    return {
        "base_model": options.model.pretrained_model_name_or_path,
        "family": family.key,
        "network": spec.to_json(),
        "prediction_type": objective.parametrisation.output.name.scheduler,
        "samples": samples_digest(prepared.data),
        "base_weights": base_facts(options, prepared.base, family),
        "caches": stores.latents.producers() | tokens,
        "teacher_width": next((caches.width for caches in stores.tokens.values()), 0),
    }


def base_facts(options: RunOptions, base: BaseLocation, family: Family) -> dict[str, Any]:
    """Hashes of the weights that the run is made with."""
    # Prompts of classes are cached with a producer of their own.
    encoders = () if options.class_pictures is not None else family.text_encoders
    return base_weights_facts(options, base, (UNET, *encoders))


def samples_digest(data: TrainingData) -> str:
    """Of everything that decides what is shown: pictures, cuts, captions, weights, and how each data set draws from them."""
    digest = hashlib.sha256()
    for picture, settings in zip(data.training, settings_of(data), strict=True):
        image = picture.image
        line = repr((image.sample_id, picture.repeats, picture.loss_weight, picture.fitted, image.caption))
        digest.update(f"{line[:-1]}, {settings})\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def settings_of(data: TrainingData) -> Iterator[str]:
    """How the data set of each training picture draws from it."""
    drawn: dict[tuple[int, int], str] = {}
    for picture in data.training:
        key = id(picture.dataset), id(picture.image.subset)
        if key not in drawn:
            drawn[key] = repr(sorted((_shown(picture.dataset) | _shown(picture.image.subset)).items()))
        yield drawn[key] + ", hidden colours" * picture.image.hidden_colours


def _shown(settings: Dataset | Subset) -> dict[str, Any]:
    shown = {name: value for name, value in vars(settings).items() if name not in _NOT_SHOWN}
    # Of what has come to be read otherwise, only where it makes a difference, so that states of other data stay valid.
    if isinstance(settings, Subset) and (changes_tags(settings) or settings.keep_tokens_separator):
        shown |= {} if (joint := tag_joint(settings)) == ", " else {"tag_joint": joint}
    return shown
