"""What train_repa.py trains: LoRA in a frozen U-Net and AlignHeads on its features (U-REPA, arXiv 2503.18414).

loss = L_diff + lambda(step) * (L_token + w * L_manifold)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from library import losses
from library.data.batches import Batch, CachedSamples, Prefetcher
from library.data.text_embeddings import TextEmbeddings
from library.diffusion.objective import Objective
from library.options.alignment import AlignmentOptions
from library.processes import Processes
from library.training.optimizers import ParameterGroup
from library.training.randomness import sample_noise, stratified_timesteps
from networks.align_head import AlignHeads

QUANTILES = 4


@dataclass
class Terms:
    """One batch's losses: diffusion per sample [B]; token and manifold scalars, None without alignment."""

    diffusion: torch.Tensor
    token: torch.Tensor | None = None
    manifold: torch.Tensor | None = None

    def total(self, coefficient: float, manifold_weight: float) -> torch.Tensor:
        loss = self.diffusion.mean()
        if self.token is not None and self.manifold is not None and coefficient > 0:
            loss = loss + coefficient * (self.token + manifold_weight * self.manifold)
        return loss


@dataclass
class RepaTask:
    """The Task of the loop for U-REPA.

    features: the mapping that forward hooks on the U-Net fill, tap -> [B, C, h, w] (networks.features.capture).
    heads: tap -> AlignHead; empty in a run without alignment.
    """

    unet: torch.nn.Module
    unet_config: Mapping[str, Any]
    heads: AlignHeads
    features: Mapping[str, torch.Tensor]
    groups: list[ParameterGroup]
    objective: Objective
    text: TextEmbeddings
    alignment: AlignmentOptions
    class_dropout: float
    compute_dtype: torch.dtype
    processes: Processes
    training: CachedSamples
    validation: CachedSamples | None
    batch_size: int
    workers: int
    seed: int
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.embeddings = self.text.embeddings.to(self.processes.device, self.compute_dtype)

    def sample_ids(self, indices: np.ndarray) -> list[str]:
        return [self.training.sample_ids[i] for i in indices]

    def coefficient(self, step: int) -> float:
        """lambda(step)."""
        a = self.alignment
        return losses.align_coefficient(
            step, a.align_coeff, a.align_schedule, a.align_warmup_steps, a.align_cutoff_step
        )

    def losses(self, batch: Batch, generator: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        """Loss parts of a training batch with noise, timesteps and dropped prompts drawn from `generator`."""
        device, count = batch.latents.device, batch.latents.shape[0]
        noise = torch.randn(batch.latents.shape, generator=generator, device=device)
        timesteps = torch.randint(0, self.objective.schedule.timesteps, (count,), generator=generator, device=device)
        dropped = torch.rand(count, generator=generator, device=device) < self.class_dropout
        text_rows = torch.where(dropped, self.text.empty_row, batch.text_rows)
        coefficient = self.coefficient(step)
        terms = self.terms(batch, noise, timesteps, text_rows, generator, with_gradient=coefficient > 0)
        loss = terms.total(coefficient, self.alignment.manifold_weight)
        parts = {"loss": loss, "diffusion": terms.diffusion.mean()}
        if terms.token is not None and terms.manifold is not None:
            parts |= {"token": terms.token, "manifold": terms.manifold}
            parts["lambda"] = torch.full((), coefficient, device=device)
        return parts

    def terms(
        self,
        batch: Batch,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        text_rows: torch.Tensor,
        generator: torch.Generator,
        *,
        with_gradient: bool,
    ) -> Terms:
        """Run the network once and compare. noise [B, C, h, w], timesteps [B], text_rows [B].

        with_gradient False leaves the alignment losses out of the graph: where lambda is 0 the step is, to the bit, the
        step of a run without heads.
        """
        latents = batch.latents.float()
        noisy = self.objective.schedule.add_noise(latents, noise, timesteps)
        inputs = noisy.to(self.compute_dtype)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        output = self.unet(inputs, timesteps, self.embeddings[text_rows], return_dict=False)[0]
        terms = Terms(self.objective.losses(output, latents, noise, noisy, timesteps))
        if self.heads:
            with nullcontext() if with_gradient else torch.no_grad():
                terms.token, terms.manifold = self.align(batch.target_tokens(), generator)
        return terms

    def align(self, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and manifold loss of the captured features against `target` [B, N, D] float32, mean over taps."""
        token, manifold = [], []
        for tap, head in self.heads.items():
            predicted = head(self.features[tap])
            token.append(losses.token_loss(predicted, target))
            manifold.append(self.manifold(predicted, target, generator))
        return torch.stack(token).mean(), torch.stack(manifold).mean()

    def manifold(self, predicted: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        a = self.alignment
        if a.manifold_mode == "sample":
            loss = losses.sample_manifold_loss(predicted, target, a.manifold_margin, self.processes.gather_rows)
        elif a.manifold_mode == "token":
            loss = losses.token_manifold_loss(predicted, target, a.manifold_margin)
        else:
            count = predicted.shape[0] * predicted.shape[1]
            chosen = torch.randperm(count, generator=generator, device=predicted.device)[: a.manifold_random_tokens]
            loss = losses.random_manifold_loss(predicted, target, chosen, a.manifold_margin)
        return losses.clip_loss(loss, a.manifold_clip)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Loss parts over the validation set, and the diffusion loss per quarter of the timesteps.

        Noise belongs to the sample and timesteps to its place in the set: two validations differ by the weights only.
        """
        assert self.validation is not None
        self.unet.eval()
        try:
            return self._validate(self.validation, step)
        finally:
            self.unet.train()

    def _validate(self, samples: CachedSamples, step: int) -> dict[str, float]:
        device, count = self.processes.device, len(samples)
        all_timesteps = stratified_timesteps(count, self.objective.schedule.timesteps)
        generator = torch.Generator(device)
        # sums: diffusion, token, manifold (weighted by samples); quarters: diffusion sum and count of each.
        sums = torch.zeros(3, device=device)
        quarters = torch.zeros(2, QUANTILES, device=device)
        order = validation_order(count, self.batch_size, self.processes.rank, self.processes.world_size)
        batches = Prefetcher(samples, iter(order), device, workers=self.workers)
        for batch in batches:
            ids = [samples.sample_ids[i] for i in batch.indices]
            noise = sample_noise(self.seed, ids, tuple(batch.latents.shape[1:])).to(device)
            timesteps = all_timesteps[torch.from_numpy(batch.indices)].to(device)
            generator.manual_seed(int(batch.indices[0]))
            terms = self.terms(batch, noise, timesteps, batch.text_rows, generator, with_gradient=False)
            sums[0] += terms.diffusion.sum()
            if terms.token is not None and terms.manifold is not None:
                sums[1:] += torch.stack([terms.token, terms.manifold]) * len(ids)
            quarter = timesteps * QUANTILES // self.objective.schedule.timesteps
            quarters[0].index_add_(0, quarter, terms.diffusion)
            quarters[1].index_add_(0, quarter, torch.ones_like(terms.diffusion))
        batches.close()
        total = sum(len(part) for part in order) * self.processes.world_size
        means = (self.processes.sum(sums) / total).tolist()
        quarters = self.processes.sum(quarters)
        by_quarter = [(i, loss / seen) for i, (loss, seen) in enumerate(quarters.T.tolist(), start=1) if seen]
        results = {"val/total": means[0], "val/diffusion": means[0]}
        if self.heads:
            results["val/total"] += self.coefficient(step) * (means[1] + self.alignment.manifold_weight * means[2])
            results |= {"val/token": means[1], "val/manifold": means[2]}
        return results | {f"val/diffusion_q{i}": value for i, value in by_quarter}


def validation_order(count: int, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This process's validation batches: the whole set in order, cut into global batches of batch_size x processes.

    All processes get batches of equal size; of a last global batch that does not divide, up to W - 1 samples are left out.
    """
    order = []
    for start in range(0, count, batch_size * world_size):
        share = min(batch_size, (count - start) // world_size)
        if share:
            order.append(np.arange(start + rank * share, start + (rank + 1) * share))
    return order
