"""The objective loss: the mean log-ratio of the denoising loss on held-out pictures to the untouched base's.

Timesteps and noise depend on the picture alone, so two measurements differ by the weights only. Losses are compared for each
picture and timestep before they are averaged: between timesteps they differ by a factor of 500, but their ratios do not.
No global random state is used, and the models are left in the mode in which they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from library.diffusion.objective import Objective as DiffusionObjective
from library.errors import Diverged, UserError
from library.search.constraints import is_broken
from library.search.held_out_pictures import EVALUATION_SEED
from library.training.randomness import sample_noise

BANDS = ("low", "mid", "high")
"""Thirds of the timesteps, named by their noise."""
TIMESTEPS = 9  # of the 8 to 16 that make a stable curve: three for each band
MOST_PICTURES = 16  # beyond, a measurement would cost more than it tells
FEW_PICTURES = 4
# Two noises a timestep; of few pictures four, which are then as many passes.
NOISES, NOISES_OF_FEW = 2, 4
# Latents of a pass, as many as four pictures of 512 pixels: without gradients that is less than a training step keeps.
# A constant, not the batch size: values of trials with other batch sizes are to be comparable to the bit.
CELLS = 4 * 64 * 64
MOST_ROWS = 64

Item = TypeVar("Item")


@dataclass(frozen=True)
class Measured:
    """A trial's value at a slot; lower is better.

    components: what it was made of, and its constraints. details: more of it, for the slot's file.
    """

    value: float
    components: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[bool, float]:
        """The least is a trial's best slot: one that keeps the constraints before one that does not."""
        return is_broken(self.components), self.value


class Judge(Protocol):
    """Measures the value of a trial at a slot, with the parameters as they are then."""

    slots: frozenset[int]
    """Slots that it measures."""

    def __call__(self, slot: int) -> Measured: ...


@dataclass
class HeldOut:
    """Held-out pictures of one shape.

    latents: [n, 4, h, w] float32, scaled, on the device. mask: [n, 1, h, w]. text: what the encoders say of the captions
    now, called once a measurement. predict: (noisy [B, 4, h, w] float32, timesteps [B], text, rows [B] of the pictures) ->
    the network's output [B, 4, h, w].
    """

    ids: list[str]
    latents: Tensor
    mask: Tensor | None
    text: Callable[[], Any]
    predict: Callable[[Tensor, Tensor, Any, Tensor], Tensor]


Losses = dict[str, Tensor]
"""Sample id -> [TIMESTEPS] float64 on the CPU: the loss at each timestep, the mean over its noises."""


class LossJudge:
    """Mean over pictures and timesteps of log(loss / the base's loss). An adapter at zero gives exactly 0.

    Args:
        diffusion: of which parametrisation and what is compared; the loss is the mean squared error whatever the run minimises,
            and a run's weights by timestep are the same on both sides of a ratio anyway.
        disabled: a context in which the models compute as the base.
        known: the base's losses of an earlier trial with the same base, pictures and arithmetic; they are put there.

    Raises UserError where the base's own losses are not finite.
    """

    slots = frozenset(range(1, 11))

    def __init__(
        self,
        pictures: Sequence[HeldOut],
        diffusion: DiffusionObjective,
        models: Mapping[str, nn.Module],
        disabled: Callable[[], AbstractContextManager[None]],
        known: Losses | None = None,
    ) -> None:
        self.pictures, self.models, self.disabled = pictures, models, disabled
        self.diffusion = DiffusionObjective(diffusion.parametrisation, diffusion.compares)
        count = sum(len(one.ids) for one in pictures)
        self.noises = NOISES_OF_FEW if count <= FEW_PICTURES else NOISES
        self.base: Losses = {} if known is None else known
        if not self.base:
            with in_eval_mode(models.values()), disabled():
                self.base.update(_checked(self.losses()))

    def __call__(self, slot: int) -> Measured:
        """Raises Diverged where a loss is not finite."""
        with in_eval_mode(self.models.values()):
            now = self.losses()
        return compare(now, self.base)

    @torch.no_grad()
    def losses(self) -> Losses:
        """Of the models as they are."""
        found: Losses = {}
        for one in self.pictures:
            found |= self._of_shape(one)
        return found

    def _of_shape(self, one: HeldOut) -> Losses:
        device, shape = one.latents.device, tuple(one.latents.shape[1:])
        steps = torch.stack([timesteps_of(name, self.diffusion.parametrisation.timesteps) for name in one.ids])
        text = one.text()
        # Row = (picture, timestep, noise), the last the fastest.
        places = torch.cartesian_prod(*map(torch.arange, (len(one.ids), TIMESTEPS, self.noises)))
        size = max(1, min(MOST_ROWS, CELLS // (shape[-2] * shape[-1])))
        parts = []
        for chunk in places.split(size):
            names = [f"{one.ids[picture]}/{step}/{noise}" for picture, step, noise in chunk.tolist()]
            noise = sample_noise(EVALUATION_SEED, names, shape).to(device)
            rows, timesteps = chunk[:, 0].to(device), steps[chunk[:, 0], chunk[:, 1]].to(device)
            latents = one.latents[rows]
            noisy = self.diffusion.parametrisation.add_noise(latents, noise, timesteps)
            output = one.predict(noisy, timesteps, text, rows)
            mask = None if one.mask is None else one.mask[rows]
            parts.append(self.diffusion.losses(output, latents, noise, noisy, timesteps, mask=mask))
        losses = torch.cat(parts).cpu().double().view(len(one.ids), TIMESTEPS, self.noises).mean(dim=2)
        return dict(zip(one.ids, losses, strict=True))


def _checked(base: Losses) -> Losses:
    for name, losses in base.items():
        if not torch.isfinite(losses).all() or not (losses > 0).all():
            raise UserError(
                f"The base itself has no finite loss on the held-out picture {name}, so nothing can be compared with it. Use "
                "mixed_precision bf16 or no, and look at that picture."
            )
    return base


def compare(now: Losses, base: Losses) -> Measured:
    """The log-ratios of losses, averaged. Raises Diverged where a loss is not finite."""
    ratios = torch.stack([(now[name] / base[name]).log() for name in base])  # [pictures, TIMESTEPS]
    if not torch.isfinite(ratios).all():
        bad = next(name for name in base if not torch.isfinite(now[name]).all() or not torch.isfinite(base[name]).all())
        raise Diverged(f"The loss on the held-out picture {bad} is not a finite number. Lower the learning rate.")
    by_band = ratios.view(len(base), len(BANDS), -1).mean(dim=(0, 2)).tolist()
    by_picture = ratios.mean(dim=1)
    details = {
        "pictures": dict(zip(base, by_picture.tolist(), strict=True)),
        "timesteps": ratios.mean(dim=0).tolist(),
    }
    return Measured(ratios.mean().item(), dict(zip(BANDS, by_band, strict=True)), details)


def timesteps_of(sample_id: str, timesteps: int) -> Tensor:
    """[TIMESTEPS] int64, one in each of as many equal parts of the schedule, at the picture's own place in the part."""
    place = int.from_bytes(_digest(f"place/{sample_id}"), "big") / 2**64
    return ((torch.arange(TIMESTEPS, dtype=torch.float64) + place) * (timesteps / TIMESTEPS)).long()


def by_hash(items: Iterable[Item], name: Callable[[Item], str], count: int) -> list[Item]:
    """`count` of the items, chosen by a hash of their names and so the same ones whatever others there are, in their order."""
    listed = list(items)
    places = sorted(range(len(listed)), key=lambda place: _digest(name(listed[place])))[:count]
    return [listed[place] for place in sorted(places)]


@contextmanager
def in_eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the models are in eval mode; afterwards each module is in the mode it was in."""
    models = list(models)
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _digest(text: str) -> bytes:
    return blake2b(f"{EVALUATION_SEED}/{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
