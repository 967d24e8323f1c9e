"""What train_repa.py trains: LoRA in a frozen U-Net and AlignHeads on its features (U-REPA, arXiv 2503.18414)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from library.data.batches import Batch, CachedSamples, Prefetcher
from library.data.text_embeddings import TextEmbeddings
from library.diffusion.objective import Objective
from library.processes import Processes
from library.training.alignment import Alignment, AlignmentLosses
from library.training.optimizers import ParameterGroup
from library.training.randomness import sample_noise, stratified_timesteps

QUANTILES = 4


@dataclass
class Terms:
    """One batch's losses: diffusion per sample [B]; aligned None without alignment."""

    diffusion: torch.Tensor
    aligned: AlignmentLosses | None = None


@dataclass
class RepaTask:
    """The Task of the loop for U-REPA. alignment: None in a run without heads."""

    unet: torch.nn.Module
    unet_config: Mapping[str, Any]
    groups: list[ParameterGroup]
    objective: Objective
    text: TextEmbeddings
    alignment: Alignment | None
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

    def losses(self, batch: Batch, generator: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        """Loss parts of a training batch with noise, timesteps and dropped prompts drawn from `generator`."""
        device, count = batch.latents.device, batch.latents.shape[0]
        noise = torch.randn(batch.latents.shape, generator=generator, device=device)
        timesteps = self.objective.parametrisation.draw_timesteps(count, generator)
        dropped = torch.rand(count, generator=generator, device=device) < self.class_dropout
        text_rows = torch.where(dropped, self.text.empty_row, batch.text_rows)
        coefficient = 0.0 if self.alignment is None else self.alignment.coefficient(step)
        terms = self.terms(batch, noise, timesteps, text_rows, generator, with_gradient=coefficient > 0)
        diffusion = terms.diffusion.mean()
        parts = {"loss": diffusion, "diffusion": diffusion}
        if self.alignment is not None and terms.aligned is not None:
            if coefficient > 0:
                parts["loss"] = diffusion + self.alignment.weighed(terms.aligned, coefficient)
            parts |= self.alignment.parts(terms.aligned, coefficient)
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

        with_gradient: whether the alignment losses stand in the graph.
        """
        latents = batch.latents.float()
        noisy = self.objective.parametrisation.add_noise(latents, noise, timesteps)
        output = self.predict(noisy, timesteps, self.embeddings[text_rows])
        terms = Terms(self.objective.losses(output, latents, noise, noisy, timesteps))
        if self.alignment is not None:
            terms.aligned = self.alignment.losses(batch.target_tokens(), generator, with_gradient=with_gradient)
        return terms

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The U-Net's output [B, 4, h, w] in the compute dtype. text: [B, 77, D]."""
        inputs = noisy.to(self.compute_dtype)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.unet(inputs, timesteps, text, return_dict=False)[0]

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
        all_timesteps = stratified_timesteps(count, self.objective.parametrisation.timesteps)
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
            if terms.aligned is not None:
                sums[1:] += torch.stack([terms.aligned.token, terms.aligned.manifold]) * len(ids)
            quarter = timesteps * QUANTILES // self.objective.parametrisation.timesteps
            quarters[0].index_add_(0, quarter, terms.diffusion)
            quarters[1].index_add_(0, quarter, torch.ones_like(terms.diffusion))
        batches.close()
        total = sum(len(part) for part in order) * self.processes.world_size
        means = (self.processes.sum(sums) / total).tolist()
        quarters = self.processes.sum(quarters)
        by_quarter = [(i, loss / seen) for i, (loss, seen) in enumerate(quarters.T.tolist(), start=1) if seen]
        results = {"val/total": means[0], "val/diffusion": means[0]}
        if self.alignment is not None:
            weighed = means[1] + self.alignment.options.manifold_weight * means[2]
            results["val/total"] += self.alignment.coefficient(step) * weighed
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
