"""All randomness of a step comes from (seed, rank, step): nothing of it has to be saved to resume exactly."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *place: int | str) -> int:
    """A 63-bit seed for a place in the run, such as (rank, step, micro-batch). Unlike places give unrelated streams."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *place))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StepRandomness:
    """One generator on the device, set anew for each step; and torch's global one, which dropout layers draw from."""

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        self.seed, self.rank = seed, rank
        self.generator = torch.Generator(device)

    def at(self, step: int, micro: int = 0) -> torch.Generator:
        self.generator.manual_seed(seed_of(self.seed, self.rank, step, micro))
        torch.manual_seed(seed_of(self.seed, self.rank, step, micro, "global"))
        return self.generator


def sample_noise(seed: int, sample_ids: list[str], shape: tuple[int, ...]) -> torch.Tensor:
    """Noise that belongs to each sample whatever batch it stands in, [B, *shape] float32 on the CPU."""
    generator = torch.Generator()
    rows = []
    for sample_id in sample_ids:
        generator.manual_seed(seed_of(seed, "validation", sample_id))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def stratified_places(count: int) -> torch.Tensor:
    """A fixed place in [0, 1) for each of `count` samples, [count] float64: evenly spread, and so in every run of neighbours.

    The golden ratio's multiples modulo 1 are the classical low-discrepancy sequence.
    """
    golden = (5**0.5 - 1) / 2
    return (torch.arange(count, dtype=torch.float64) * golden + 0.5) % 1.0
