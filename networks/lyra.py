"""Lyra: a variational autoencoder over the states of several text encoders, fused token by token.

Source: geofractal's vae_lyra (the Lyra VAE of the model card sd15-flow-lune), restated: each encoder's states are projected to
one width and marked with an embedding of their own, mixed by attention across the encoders at the same position, encoded to a
normal distribution, and decoded to each encoder's own states again. Added here: states are standardised by channel, and positions
where an encoder has no text are masked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import AdapterError
from networks.trained_weights import draw_uniform, generator_for

FusionKind = Literal["attention", "cantor"]
TEXT_FUSION_KEY = "ss_text_fusion"
"""In the metadata of an adapter: name of the file that fused the text it was trained on."""
CANTOR_WINDOW = 3
"""Encoders that each one attends to with Cantor routing, itself among them (vae_lyra)."""
_LOG_VARIANCES = -30.0, 20.0  # as diffusers keeps those of AutoencoderKL
_MOST_ENCODERS, _DEEPEST = 16, 32  # a guess: nobody has tried more
_LARGEST = 1 << 16  # no text encoder, and no sensible layer over one, is wider


@dataclass(frozen=True)
class LyraSpec:
    """What a Lyra is built from. widths: of each encoder's states."""

    widths: tuple[int, ...]
    latent: int
    hidden: int
    depth: int = 3
    heads: int = 8
    fusion: FusionKind = "attention"

    def __post_init__(self) -> None:
        sizes = (*self.widths, self.latent, self.hidden, self.depth, self.heads)
        if not 2 <= len(self.widths) <= _MOST_ENCODERS:
            raise AdapterError(f"A Lyra fuses 2 to {_MOST_ENCODERS} text encoders, got {len(self.widths)}.")
        if not all(isinstance(size, int) and 1 <= size <= _LARGEST for size in sizes):
            raise AdapterError(
                f"Sizes of a Lyra are whole numbers from 1 to {_LARGEST}, got {', '.join(map(str, sizes))}."
            )
        if self.depth > _DEEPEST:
            raise AdapterError(f"A Lyra has at most {_DEEPEST} layers, got {self.depth}.")
        if self.latent % self.heads:
            raise AdapterError(f"{self.heads} heads do not divide {self.latent} latent channels.")
        if self.fusion not in get_args(FusionKind):
            raise AdapterError(f"fusion must be one of {', '.join(get_args(FusionKind))}, got {self.fusion!r}.")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LyraSpec:
        """Raises AdapterError where the text is none."""
        try:
            values = json.loads(text)
            return cls(**{**values, "widths": tuple(values["widths"])})
        except (ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"it describes no Lyra ({error})") from None


class Posterior(NamedTuple):
    """A normal distribution for each token: mean and log-variance, [B, T, latent]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + noise * (self.log_variance / 2).exp()


class Lyra(nn.Module):
    """States of several text encoders <-> one latent for each token.

    States are [B, T, width], float32, all of one length T; a position whose state is zero throughout is one where that encoder
    has no text. It takes no part in the fusion, and what is decoded there means nothing.
    """

    def __init__(self, spec: LyraSpec) -> None:
        super().__init__()
        self.spec = spec
        self.sides = nn.ModuleList(Side(width, spec) for width in spec.widths)
        self.fusion = TokenFusion(spec)
        self.encoder = perceptron(spec.latent, 2 * spec.latent, spec)

    @property
    def each(self) -> list[Side]:
        return cast(list[Side], list(self.sides))

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states of every encoder, by way of the latents' means."""
        return self.decode(self.encode(states).mean)

    def encode(self, states: Sequence[Tensor]) -> Posterior:
        tokens = torch.stack([side.read(own) for side, own in zip(self.each, states, strict=True)], dim=2)
        present = torch.stack([has_text(own) for own in states], dim=2)
        mean, log_variance = self.encoder(self.fusion(tokens, present)).chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(*_LOG_VARIANCES))

    def decode(self, latents: Tensor) -> list[Tensor]:
        """Each encoder's states, as it would say them."""
        return [side.restore(own) for side, own in zip(self.each, self.decode_standardised(latents), strict=True)]

    def decode_standardised(self, latents: Tensor) -> list[Tensor]:
        return [side.decoder(latents) for side in self.each]

    def standardise(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [side.standardise(own) for side, own in zip(self.each, states, strict=True)]

    @torch.no_grad()
    def measure(self, means: Sequence[Tensor], deviations: Sequence[Tensor]) -> None:
        """Standardise by these means and standard deviations of each encoder's channels, [width]."""
        for side, mean, deviation in zip(self.each, means, deviations, strict=True):
            side.mean.copy_(mean)
            side.deviation.copy_(deviation.clamp(min=1e-4))

    @torch.no_grad()
    def draw(self, seed: int) -> Lyra:
        """Draw all weights anew, each by (seed, name) alone: matrices as nn.Linear does, norms as they are, biases 0."""
        for name, parameter in list(self.named_parameters()):
            module, _, own = name.rpartition(".")
            values = torch.ones(parameter.shape) if own == "weight" else torch.zeros(parameter.shape)
            if parameter.ndim == 2 or own == "modality":
                fan_in = parameter.shape[-1]
                values = draw_uniform(parameter.shape, generator_for(seed, f"lyra.{name}"), fan_in=fan_in)
            setattr(self.get_submodule(module), own, nn.Parameter(values))
        return self


def new_lyra(spec: LyraSpec, seed: int) -> Lyra:
    """A Lyra with fresh weights; torch's global generator is left alone."""
    with torch.device("meta"):
        lyra = Lyra(spec)
    return lyra.draw(seed)


def has_text(states: Tensor) -> Tensor:
    """Bool [B, T] of states [B, T, D]: where an encoder says anything."""
    return (states != 0).any(dim=-1)


class Side(nn.Module):
    """What belongs to one encoder: its standardisation, its way in, its decoder."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, spec: LyraSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, device="cpu"))
        self.register_buffer("deviation", torch.ones(width, device="cpu"))
        self.project = nn.Linear(width, spec.latent)
        self.modality = nn.Parameter(torch.zeros(spec.latent))
        self.decoder = perceptron(spec.latent, width, spec)

    def read(self, states: Tensor) -> Tensor:
        return self.project(self.standardise(states)) + self.modality

    def standardise(self, states: Tensor) -> Tensor:
        return (states.float() - self.mean) / self.deviation

    def restore(self, states: Tensor) -> Tensor:
        return states * self.deviation + self.mean


class TokenFusion(nn.Module):
    """Attention across the encoders at each position, and the mean of those that have text there: [B, T, M, L] -> [B, T, L]."""

    neighbours: Tensor

    def __init__(self, spec: LyraSpec) -> None:
        super().__init__()
        count = len(spec.widths)
        self.heads = spec.heads
        reach = count if spec.fusion == "attention" else min(CANTOR_WINDOW, count)
        self.register_buffer("neighbours", neighbour_mask(cantor_neighbours(count, reach)), persistent=False)
        self.norm = nn.LayerNorm(spec.latent)
        self.to_qkv = nn.Linear(spec.latent, 3 * spec.latent)
        self.to_out = nn.Linear(spec.latent, spec.latent)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """present: bool [B, T, M], where an encoder has text."""
        count = tokens.shape[2]
        flat = tokens.flatten(0, 1)  # [B * T, M, L]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.to_qkv(self.norm(flat)).chunk(3, dim=-1)
        )
        itself = torch.eye(count, dtype=torch.bool, device=tokens.device)  # so that no row is empty
        allowed = self.neighbours & present.flatten(0, 1)[:, None, None, :] | itself
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        fused = (flat + self.to_out(mixed.transpose(1, 2).flatten(2))).view_as(tokens)
        shares = present / present.sum(dim=2, keepdim=True).clamp(min=1)
        return (fused * shares[..., None]).sum(dim=2)


def cantor_neighbours(count: int, reach: int) -> Tensor:
    """int64 [count, reach]: of each place of a sequence, the nearest ones by the distance of Cantor's pairing function.

    The places are (i, 0), whose pairing number is i (i + 1) / 2 (geofractal's CantorAttention). It grows with i, so that these are
    always one window of the sequence; of up to `reach` places it is all of them. Ties go to the lower place.
    """
    numbers = torch.arange(count, device="cpu")
    numbers = numbers * (numbers + 1) // 2
    distances = (numbers[:, None] - numbers[None, :]).abs()
    return distances.sort(dim=1, stable=True).indices[:, :reach]


def neighbour_mask(neighbours: Tensor) -> Tensor:
    """Bool [count, count]: whether a row attends to a column."""
    count = len(neighbours)
    return torch.zeros(count, count, dtype=torch.bool, device="cpu").scatter_(1, neighbours, True)


def perceptron(inputs: int, outputs: int, spec: LyraSpec) -> nn.Sequential:
    """`depth` linear layers, with GELU and a norm between them."""
    widths = [inputs, *[spec.hidden] * (spec.depth - 1), outputs]
    layers: list[nn.Module] = []
    for position, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(before, after))
        if position < spec.depth - 1:
            layers += [nn.GELU(), nn.LayerNorm(after)]
    return nn.Sequential(*layers)


class LyraLosses(NamedTuple):
    """Scalars: of reconstruction, of the latents' distance to N(0, I), and of encoders that say other things."""

    reconstruction: Tensor
    kl: Tensor
    cross: Tensor


def lyra_losses(lyra: Lyra, states: Sequence[Tensor], posterior: Posterior, latents: Tensor) -> LyraLosses:
    """The parts of the loss; `latents` are the posterior's, or drawn from it.

    reconstruction: mean over encoders of the mean squared error of standardised states where there is text. kl: mean over tokens
    and channels of KL(N(mean, variance) || N(0, 1)). cross: mean over pairs of encoders, where both have text, of the squared
    distance between what the decoded states of both are projected to, at length 1 (2 - 2 cosine).
    """
    targets, decoded = lyra.standardise(states), lyra.decode_standardised(latents)
    present = [has_text(own) for own in states]
    errors = [
        _mean_where((one - other).square().mean(dim=-1), where)
        for one, other, where in zip(decoded, targets, present, strict=True)
    ]
    mean, log_variance = posterior
    kl = (mean.square() + log_variance.exp() - log_variance - 1).mean() / 2
    seen = [F.normalize(side.project(own), dim=-1) for side, own in zip(lyra.each, decoded, strict=True)]
    pairs = [(i, j) for i in range(len(seen)) for j in range(i)]
    distances = [_mean_where((seen[i] - seen[j]).square().sum(dim=-1), present[i] & present[j]) for i, j in pairs]
    return LyraLosses(torch.stack(errors).mean(), kl, torch.stack(distances).mean())


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)
