"""What each block of a U-Net knows of the noise level and of the picture, beside the same with the timestep frozen.

A U-Net is told its timestep. That a noise level can be read from its features so says nothing by itself: with inputs that are
noise at every level, it is read as well. So everything is measured twice, and with the timestep frozen at the middle of the range
only what a block sees in its input is left. It is the diagnostic that the block classifiers (David) of Lune's card are without
that control.

Features are the mean and the deviation of a block's channels over places, of pictures noised to levels that are even in log-SNR,
with the empty prompt. The noise level is read by a linear probe into bins of log-SNR, on pictures that it was not fitted on.
Patterns are clusters of the features (k-means) in each part of the range, compared with the pictures' own labels. These are read by
a linear probe, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from library.diffusion.bridge import along_flow
from library.diffusion.level_accuracy import LevelAccuracy
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.rectified_flow import FlowPath
from library.errors import UserError
from library.evaluation.clusters import chance_information, k_means, normalised_mutual_information
from library.evaluation.probes import LinearProbe, chance_accuracy, split_by_hash
from library.evaluation.standard_errors import Estimate, Spread, paired_difference
from library.progress import doing
from library.training.randomness import sample_noise, seed_of
from networks.features import capture
from networks.taps import all_taps

Control = Literal["fed", "frozen"]
CONTROLS: tuple[Control, ...] = ("fed", "frozen")
"""The network is told its own timestep; it is told the middle one, whatever the noise."""
LEAST_PICTURES = 12
ENDS = (0.01, 0.99)
"""Of native flows, whose log-SNR has no end: the smallest and the largest sigma that is probed."""
PENALTY = 1e-2
"""Of all linear probes, so that blocks are compared alike; most blocks of tiny-shapes would choose it of 0.1, 0.01 and 0.001."""

Predict = Callable[[Tensor, Tensor], object]
"""Runs the U-Net on noisy latents [B, C, h, w] float32 at timesteps [B] float32, with the empty prompt."""


@dataclass(frozen=True)
class BlockProbeSettings:
    bins: int = 100
    """Of log-SNR, between which the linear probe tells noise levels apart."""
    parts: int = 10
    """Of the range; each picture is noised to one level in each, and patterns are sought in each."""
    prototypes: int = 10
    """Clusters in each part."""
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.parts <= self.bins:
            raise UserError(f"bins must be at least parts, and both at least 2; got {self.bins} and {self.parts}.")


@dataclass(frozen=True)
class LabelledPictures:
    """latents [n, C, h, w] float32, scaled. labels: [n] int64, None where the pictures have none. kind: what these are."""

    latents: Tensor
    ids: Sequence[str]
    labels: Tensor | None
    kind: str

    def __post_init__(self) -> None:
        if len(self.ids) < LEAST_PICTURES:
            raise UserError(f"A block probe needs at least {LEAST_PICTURES} pictures, and there are {len(self.ids)}.")


@dataclass(frozen=True)
class Reading:
    """What one block says under one control.

    accuracy: of the noise level, by part of the range. off: mean distance to the true bin, in bins. by_bin: accuracy around each
    bin, an average over the levels up to a part's width away, the nearer the more. confusion: [parts][parts], of true parts the
    share that was taken for each. pattern: normalised mutual information of clusters and labels by part, None without labels;
    shuffled: the same of shuffled labels. label: accuracy of the label by part.
    """

    accuracy: Spread
    off: float
    by_bin: tuple[float, ...]
    confusion: list[list[float]]
    pattern: Spread | None = None
    shuffled: Spread | None = None
    label: Spread | None = None

    def to_json(self) -> dict[str, Any]:
        names = ("accuracy", "pattern", "shuffled", "label")
        spreads = {name: getattr(self, name) for name in names}
        plain = {name: None if spread is None else spread.to_json() for name, spread in spreads.items()}
        return {**plain, "bins_off": self.off, "by_bin": list(self.by_bin), "confusion": self.confusion}


@dataclass
class BlockProbe:
    """models: name -> block -> control -> reading, the base first. log_snr: edges of the bins, ascending.

    labels: what they are. label_chance: accuracy of guessing the commonest one; None without labels.
    """

    settings: BlockProbeSettings
    pictures: int
    labels: str
    label_chance: float | None
    log_snr: list[float]
    models: dict[str, dict[str, dict[Control, Reading]]]

    @property
    def base(self) -> str:
        return next(iter(self.models))

    @property
    def blocks(self) -> list[str]:
        return list(self.models[self.base])

    @property
    def chance(self) -> float:
        """Accuracy of the noise level that guessing has."""
        return 1 / self.settings.bins

    def level_accuracy(self, model: str) -> LevelAccuracy:
        """What bins of a training read: what is read with the timestep frozen, the mean over blocks."""
        rows = [reading["frozen"].by_bin for reading in self.models[model].values()]
        means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        return LevelAccuracy(self.log_snr, means, {"model": model, "pictures": self.pictures, "control": "frozen"})

    def recommendation(self) -> list[str]:
        """Where to tap for alignment, and how far that stands out."""
        readings = {block: reading["fed"].label for block, reading in self.models[self.base].items()}
        known = {block: spread for block, spread in readings.items() if spread is not None}
        if not known:
            return [
                "Nothing can be said of where to tap: the pictures have no labels, or all the same. Put them into a folder for "
                "each class, or give them captions."
            ]
        best = max(known, key=lambda block: known[block].mean)
        alike = [b for b in known if b != best and not paired_difference(known[best], known[b]).is_significant]
        among = f"; {' and '.join(alike)} {'are' if len(alike) > 1 else 'is'} not told apart from it" if alike else ""
        return [
            f"For alignment, tap {best}: of the {len(known)} blocks, a linear probe tells the {self.labels} best from it, of "
            f"{known[best].mean:.1%} of the inputs (chance: {self.label_chance:.1%}){among}."
        ]

    def change(
        self, model: str, block: str, control: Control, what: Literal["accuracy", "pattern", "label"]
    ) -> Estimate | None:
        """A model's number less the base's, paired over the parts of the range."""
        pair = [self.models[name][block][control] for name in (model, self.base)]
        own, base = (getattr(reading, what) for reading in pair)
        return None if own is None or base is None else paired_difference(own, base)

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "pictures": self.pictures,
            "labels": self.labels,
            "chance": self.chance,
            "label_chance": self.label_chance,
            "log_snr": self.log_snr,
            "models": {
                name: {block: {c: reading[c].to_json() for c in CONTROLS} for block, reading in blocks.items()}
                for name, blocks in self.models.items()
            },
            "recommendation": self.recommendation(),
        }


class Prober:
    """Probes U-Nets of one base, all on the same inputs.

    parametrisation: on the device of the inputs. Pictures, levels and noise follow from the settings' seed and the pictures' ids.
    """

    def __init__(
        self, parametrisation: Parametrisation, pictures: LabelledPictures, settings: BlockProbeSettings
    ) -> None:
        self.path, self.pictures, self.settings = along_flow(parametrisation), pictures, settings
        count, parts = len(pictures.ids), settings.parts
        low, high = probed_range(self.path)
        generator = torch.Generator().manual_seed(seed_of(settings.seed, "block probe"))
        self.places = ((torch.arange(parts) + torch.rand(count, parts, generator=generator)) / parts).flatten()
        self.log_snr = low + (high - low) * self.places
        self.edges = torch.linspace(low, high, settings.bins + 1)
        self.bins = (self.places * settings.bins).long().clamp(max=settings.bins - 1)
        self.parts = torch.arange(parts).repeat(count)
        self.owners = [id_ for id_ in pictures.ids for _ in range(parts)]
        self.held_out = split_by_hash(pictures.ids, 1 / 3, "block probe").repeat_interleave(parts)
        self.middle = (low + high) / 2
        self.labels = None if pictures.labels is None else pictures.labels.repeat_interleave(parts)
        if self.labels is not None and len(self.labels[~self.held_out].unique()) < 2:
            self.labels = None

    @torch.no_grad()
    def features(
        self, unet: Any, predict: Predict, control: Control, seen: Callable[[int], object] = lambda count: None
    ) -> dict[str, Tensor]:
        """Mean and deviation of each block's channels, [n * parts, 2 * channels] float32 on the CPU."""
        found: dict[str, list[Tensor]] = {block: [] for block in _blocks(unet)}
        parts, device = self.settings.parts, next(unet.parameters()).device
        with capture(unet, list(found)) as maps:
            for start in range(0, len(self.owners), self.settings.batch_size):
                rows = range(start, min(start + self.settings.batch_size, len(self.owners)))
                latents = self.pictures.latents[[row // parts for row in rows]]
                noise = sample_noise(
                    self.settings.seed, [f"{self.owners[row]}@{row % parts}" for row in rows], tuple(latents.shape[1:])
                )
                timesteps = self._timesteps(self.log_snr[rows.start : rows.stop])
                noisy = self.path.add_noise(latents, noise, timesteps)
                told = timesteps if control == "fed" else self._timesteps(torch.full((len(rows),), self.middle))
                predict(noisy.to(device), told.to(device))
                for block, parts_of in found.items():
                    deviation, mean = torch.std_mean(maps[block].float(), dim=(2, 3), correction=0)
                    parts_of.append(torch.cat([mean, deviation], dim=1).cpu())
                seen(len(rows))
        return {block: torch.cat(rows) for block, rows in found.items()}

    def _timesteps(self, log_snr: Tensor) -> Tensor:
        return self.path.timesteps_of(torch.sigmoid(-log_snr / 2))

    def read(self, features: Tensor) -> Reading:
        """What is in the features of one block."""
        test, settings = self.held_out, self.settings
        said, true, parts = self._told(features, self.bins), self.bins[test], self.parts[test]
        right = (said == true).float()
        middles = (torch.arange(settings.bins) + 0.5) / settings.bins
        near = (1 - settings.parts * (middles[:, None] - self.places[test]).abs()).clamp(min=0)  # [bins, held out]
        confusion = torch.zeros(settings.parts, settings.parts)
        confusion.index_put_((parts, said * settings.parts // settings.bins), torch.ones(len(said)), accumulate=True)
        reading = Reading(
            self._by_part(right),
            (said - true).abs().float().mean().item(),
            tuple(((near @ right) / near.sum(dim=1)).tolist()),
            (confusion / confusion.sum(dim=1, keepdim=True)).tolist(),
        )
        if self.labels is None:
            return reading
        patterns = [self._pattern(features, part) for part in range(settings.parts)]
        found, shuffled = (Spread(values) for values in zip(*patterns, strict=True))
        label = self._by_part((self._told(features, self.labels) == self.labels[test]).float())
        return replace(reading, pattern=found, shuffled=shuffled, label=label)

    def _told(self, features: Tensor, labels: Tensor) -> Tensor:
        """What a linear probe takes the held-out inputs for."""
        fit, test = ~self.held_out, self.held_out
        return LinearProbe.fit(features[fit], labels[fit], grid=(PENALTY,))(features[test])

    def _by_part(self, right: Tensor) -> Spread:
        parts = self.parts[self.held_out]
        return Spread(tuple(right[parts == part].mean().item() for part in range(self.settings.parts)))

    def _pattern(self, features: Tensor, part: int) -> tuple[float, float]:
        """What clusters say of labels among the inputs of a part, and by chance. What follows the noise level is taken out."""
        assert self.labels is not None
        x, levels, labels = (of[self.parts == part] for of in (features.double(), self.log_snr.double(), self.labels))
        levels = levels - levels.mean()
        powers = torch.stack([torch.ones_like(levels), levels, levels.square()], dim=1)
        x = x - powers @ torch.linalg.lstsq(powers, x).solution
        deviation = x.std(dim=0, correction=0)
        x = torch.where(deviation > 1e-6 * deviation.max(), x / deviation, 0.0)
        clusters = k_means(x, self.settings.prototypes, seed_of(self.settings.seed, "pattern", part))
        seed = seed_of(self.settings.seed, "shuffled", part)
        return normalised_mutual_information(clusters, labels), chance_information(clusters, labels, seed)

    def probe(self, name: str, unet: Any, predict: Predict) -> dict[str, dict[Control, Reading]]:
        """Readings of every block by control. name: of the model, for who waits."""
        readings: dict[str, dict[Control, Reading]] = {block: {} for block in _blocks(unet)}
        for control in CONTROLS:
            with doing(f"{name}, timestep {control}: noisy pictures", len(self.owners)) as activity:
                found = self.features(unet, predict, control, activity.advance)
            with doing(f"{name}, timestep {control}: probing blocks", len(found)) as activity:
                for block, features in found.items():
                    readings[block][control] = self.read(features)
                    activity.advance()
        return readings

    def result(self, models: dict[str, dict[str, dict[Control, Reading]]]) -> BlockProbe:
        chance = None
        if self.labels is not None:
            chance = chance_accuracy(self.labels[~self.held_out], self.labels[self.held_out])
        pictures, edges = self.pictures, self.edges.tolist()
        return BlockProbe(self.settings, len(pictures.ids), pictures.kind, chance, edges, models)


def _blocks(unet: Any) -> list[str]:
    return all_taps(len(unet.config["block_out_channels"]))


def probed_range(path: FlowPath) -> tuple[float, float]:
    """The lowest and the highest log-SNR that is probed: all that a base was trained on, ENDS of native flows."""
    sigmas = (min(path.high, ENDS[1]), max(path.sigma_of(0), ENDS[0]))
    low, high = (2 * math.log((1 - sigma) / sigma) for sigma in sigmas)
    return low, high
