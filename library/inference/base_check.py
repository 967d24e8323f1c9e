"""Whether a base can be drawn with and adapters fit it, from headers and configurations: before it is loaded, and in dry runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError, check_all
from library.merging.merge import Shapes, place
from library.merging.strength import Strength
from library.models.base_family import check_headers, family_of
from library.models.base_schedule import require_kind
from library.models.checkpoint import open_checkpoint
from library.models.conditioning import checked_layer
from library.models.load import load_scheduler_config
from library.models.locate import BaseLocation
from library.models.lone_vae import LoneVae, check_lone_vae
from networks.adapters import Adapter
from networks.families import VAE, Family

_LAYERS = "text_model.encoder.layers."


def check_base_fits(
    base: BaseLocation,
    adapters: Mapping[Path, Adapter],
    *,
    clip_skip: int = 1,
    prediction_type: str | None = None,
    own_vae: bool = True,
) -> Parametrisation:
    """What the base predicts. Raises UserError, a line for each fault, where it cannot be drawn with or adapters do not fit it.

    clip_skip: the largest that is asked for. own_vae: whether the base's autoencoder is needed. Of pickles, everything is read.
    """
    family = family_of(base)
    given = {} if prediction_type is None else {"prediction_type": prediction_type}
    parametrisation = parametrisation_of(load_scheduler_config(base) | given)
    needs_layer = clip_skip > 1 and family.text_layer is None
    without = () if own_vae else (VAE,)
    if not adapters and not needs_layer:
        check_headers(base, without=without)
        return parametrisation
    shapes = open_checkpoint(base, without=without).shapes
    is_flow = None if prediction_type is not None else isinstance(parametrisation, FlowPath)
    checks: list[Callable[[], object]] = [
        partial(_check_adapter, path, adapter, shapes, family, base, is_flow) for path, adapter in adapters.items()
    ]
    if needs_layer:
        checks.append(partial(checked_layer, clip_skip, _text_layers(shapes, family)))
    check_all(*checks)
    return parametrisation


def check_vae(vae: BaseLocation, family: Family) -> None:
    """Raise UserError where another autoencoder, of a base or alone, does not serve a base of `family`, by its headers."""
    if isinstance(vae, LoneVae):
        return check_lone_vae(vae, family)
    check_headers(vae, without=[component for component in family_of(vae).original if component != VAE])


def _check_adapter(
    path: Path, adapter: Adapter, shapes: Mapping[str, Shapes], family: Family, base: BaseLocation, is_flow: bool | None
) -> None:
    if is_flow is not None:
        require_kind(str(path), adapter.metadata, base.name, is_flow, "--prediction_type flow_prediction")
    try:
        place([(adapter, Strength())], shapes, family)
    except UserError as error:
        raise UserError(f"{path} is not for {base.name}: {error}") from None


def _text_layers(shapes: Mapping[str, Shapes], family: Family) -> int:
    """Layers of the text encoder that has the fewest."""
    names = {
        part: {key.split(".")[3] for key in shapes[part] if key.startswith(_LAYERS)} for part in family.text_encoders
    }
    return min(map(len, names.values()))
