"""What a training trains: adapters in U-Net and text encoders, and maybe AlignHeads on the U-Net's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.data.batches import Prefetcher
from library.data.cached_samples import Batch, CachedSamples, requests_in_order
from library.diffusion.alignment_losses import Weights
from library.diffusion.loss import SMALLEST_MASK_AREA
from library.diffusion.noise import Draw, draw
from library.diffusion.objective import Objective
from library.diffusion.timestep_bins import TimestepBins
from library.models.conditioning import Conditioning
from library.options.kohya.objective import NoiseOptions
from library.processes import Processes
from library.training.alignment import Alignment, AlignmentLosses
from library.training.distillation import BridgedTeacher
from library.training.optimizers import ParameterGroup
from library.training.randomness import sample_noise, stratified_places
from library.training.text import Text
from networks.network import Network

QUANTILES = 4


@dataclass
class LoraTask:
    """The Task of the loop.

    models: component -> the frozen model with its adapters. validation: held-out pictures, and training pictures beside them.
    alignment: heads on the U-Net's features, where the run has any (U-REPA, arXiv 2503.18414). teacher: the base behind its bridge,
    whose velocities a native flow learns instead of noise - latents, where it does. bins: that timesteps are drawn from.
    """

    models: Mapping[str, nn.Module]
    network: Network
    groups: list[ParameterGroup]
    objective: Objective
    recipe: NoiseOptions
    text: Text
    has_size_conditions: bool
    latent_channels: int
    scaling_factor: float
    compute_dtype: torch.dtype
    processes: Processes
    training: CachedSamples
    validation: dict[str, CachedSamples]
    validation_batches: int | None
    validation_seed: int
    workers: int
    channels_last: bool = False
    alignment: Alignment | None = None
    teacher: BridgedTeacher | None = None
    bins: TimestepBins | None = None

    @property
    def unet(self) -> nn.Module:
        return self.models["unet"]

    def sample_ids(self, indices: np.ndarray) -> list[str]:
        return [self.training.images[i].image.sample_id for i in indices]

    def coefficient(self, step: int) -> float:
        """lambda(step); 0 without heads."""
        return 0.0 if self.alignment is None else self.alignment.coefficient(step)

    def losses(
        self, batch: Batch, generator: torch.Generator, step: int, coefficient: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss parts of a training batch, the mean over its pictures; noise, timesteps and dropped prompts from `generator`.

        Where lambda is 0 the loss is that of a run without heads, to the bit. coefficient: lambda on the device, for what is
        recorded at this step and repeated at others; default: made here.
        """
        latents = self.latents(batch)
        drawn = draw(latents, generator, self.recipe, self.objective.parametrisation, batch.noise, self.bins)
        losses = self.each(batch, latents, drawn, generator)
        if batch.weights is None or batch.real is None:
            mean = losses.mean()
            parts = {"loss": mean, "diffusion": mean}
        else:
            real = batch.real.sum().clamp(min=1.0)
            parts = {
                "loss": (losses * batch.weights).sum() / real,
                "diffusion": (losses.detach() * batch.real).sum() / real,
            }
        if self.alignment is not None:
            counts = self.coefficient(step) > 0
            aligned = self.aligned(batch, latents, drawn.timesteps, generator, with_gradient=counts)
            if coefficient is None:
                coefficient = torch.full((), self.coefficient(step), device=latents.device)
            weighed = coefficient * self.alignment.total(aligned)
            if counts:
                parts["loss"] = parts["loss"] + weighed
            parts |= {"alignment": weighed, **aligned, "lambda": coefficient}
        return parts

    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents [B, C, h, w] float32: as stored, or of the posterior's moments the mode."""
        latents = batch.latents.float()
        if latents.shape[1] == self.latent_channels:
            return latents
        return latents.chunk(2, dim=1)[0] * self.scaling_factor

    def each(self, batch: Batch, latents: Tensor, drawn: Draw, generator: torch.Generator | None = None) -> Tensor:
        """Loss of each picture, [B] float32, weighted by timestep and mask but not by picture; bins learn from it.

        generator: draws which class prompts are dropped; None drops none.
        """
        noisy = self.objective.parametrisation.add_noise(latents, drawn.added_noise, drawn.timesteps)
        self.network.set_multiplier(batch.multiplier)
        preserved = None
        if batch.preserve is not None or self.teacher is not None:
            with torch.no_grad(), self.network.disabled():
                preserved = self._as_the_base(noisy, drawn.timesteps, batch)
        if torch.is_grad_enabled():
            self.network.cast_together(self.compute_dtype)
        # Last, so that the features caught on the way are the adapted network's.
        output = self.predict(noisy, drawn.timesteps, self.condition(batch, generator), batch.sizes)
        losses = self.objective.losses(
            output,
            latents,
            drawn.noise,
            noisy,
            drawn.timesteps,
            mask=batch.mask,
            preserved=preserved,
            preserve_mask=batch.preserve,
            weighted=False,
        )
        weights = self.objective.weights(drawn.timesteps)
        weighted = losses if weights is None else losses * weights
        if self.bins is None or drawn.bins is None:
            return weighted
        self.bins.note(drawn.bins, losses, batch.real)
        return weighted * self.bins.corrections(drawn.bins) if self.bins.corrects else weighted

    def _as_the_base(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What the network would give, did it say what the base says: of a native flow, by way of the base's bridge."""
        text = self.condition(batch)
        if self.teacher is None:
            return self.predict(noisy, timesteps, text, batch.sizes)
        sigmas = self.objective.parametrisation.at(timesteps)[1].flatten()
        return self.teacher.velocity(self.predict, noisy, sigmas, text, batch.sizes)

    def fixed_noise(self, batch: Batch, samples: CachedSamples, latents: Tensor) -> Tensor:
        """The noise that a picture has in every validation, [B, C, h, w]: its own, or what it was drawn from."""
        if batch.noise is not None:
            return batch.noise
        return sample_noise(self.validation_seed, samples.ids_of(batch), tuple(latents.shape[1:])).to(latents.device)

    def aligned(
        self, batch: Batch, latents: Tensor, timesteps: Tensor, generator: torch.Generator, *, with_gradient: bool
    ) -> AlignmentLosses:
        """Alignment losses of the last batch that `each` ran, of these latents at these timesteps [B]."""
        assert self.alignment is not None
        targets, grid = self.alignment.targets(batch, latents)
        weights = self.alignment.at_noise(
            self.token_weights(batch, grid),
            timesteps,
            self.objective.parametrisation,
            self.processes.world_size,
        )
        return self.alignment.losses(
            targets,
            generator,
            grid=grid,
            weights=weights,
            with_gradient=with_gradient,
        )

    def token_weights(self, batch: Batch, grid: tuple[int, int]) -> Weights | None:
        """How much pictures and tokens count: as much as in the diffusion loss, whose mask is pooled to the tokens.

        Pictures with diff_output_preservation keep the base's output and are not aligned.
        """
        if batch.weights is None or batch.real is None:
            return None
        pictures = batch.weights if batch.preserve is None else batch.weights * ~batch.preserve
        tokens = None
        if batch.mask is not None:
            tokens = F.adaptive_avg_pool2d(batch.mask, grid).flatten(1)
            if self.objective.masked_loss_renormalize:
                tokens = tokens / tokens.mean(dim=1, keepdim=True).clamp(min=SMALLEST_MASK_AREA)
        return Weights(pictures, batch.real, tokens, batch.sharing, batch.turn_share)

    def condition(self, batch: Batch, generator: torch.Generator | None = None) -> Conditioning:
        """The conditioning that the captions give the U-Net, in the compute dtype."""
        text = self.text.condition(batch, generator)
        pooled = None if text.pooled is None else text.pooled.to(self.compute_dtype)
        return Conditioning(text.states.to(self.compute_dtype), pooled)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Tensor) -> Tensor:
        """The U-Net's output [B, C, h, w] in the compute dtype. sizes: [B, 6], for families whose U-Net takes them."""
        inputs = noisy.to(self.compute_dtype)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        added = (
            {"text_embeds": text.pooled, "time_ids": sizes.to(self.compute_dtype)} if self.has_size_conditions else None
        )
        return self.unet(inputs, timesteps, text.states, added_cond_kwargs=added, return_dict=False)[0]

    # -------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Mean loss of the held-out pictures, of as many training pictures, the gap, and the loss per quarter of timesteps.

        With heads, their losses on the held-out pictures too; the loss is the diffusion loss in any case.

        Noise belongs to the picture and timesteps to its place in the set: two validations differ by the weights only.
        """
        for model in self.models.values():
            model.eval()
        try:
            results: dict[str, float] = {}
            for name, samples in self.validation.items():
                mean, quarters, aligned = self._mean_loss(samples)
                results[f"val/{name}"] = mean
                if name == "loss":
                    results |= {
                        f"val/loss_q{i}": value for i, value in enumerate(quarters, start=1) if value is not None
                    }
                    results |= {f"val/{part}": value for part, value in aligned.items()}
                    if self.alignment is not None:
                        results["val/total"] = mean + self.alignment.coefficient(step) * self.alignment.total(aligned)
            if "train_loss" in self.validation:
                results["val/gap"] = results["val/loss"] - results["val/train_loss"]
            return results
        finally:
            for model in self.models.values():
                model.train()

    def _mean_loss(self, samples: CachedSamples) -> tuple[float, list[float | None], dict[str, float]]:
        """Over all, per quarter of the timesteps, and of the heads by name."""
        device, places = self.processes.device, stratified_places(len(samples))
        order = requests_in_order(samples, self.processes.rank, self.processes.world_size, self.validation_batches)
        generator = torch.Generator(device)
        sums = torch.zeros(2, QUANTILES, device=device)
        names = [] if self.alignment is None else self.alignment.parts
        aligned = torch.zeros(len(names), device=device)
        batches = Prefetcher(samples, order, device, workers=self.workers)
        for batch in batches:
            latents = self.latents(batch)
            noise = self.fixed_noise(batch, samples, latents)
            own = places[torch.from_numpy(batch.indices)]
            chosen = self.objective.parametrisation.spread(own).to(device)
            losses = self.each(batch, latents, Draw(noise, noise, chosen))
            real = torch.ones_like(losses) if batch.real is None else batch.real
            quarter = (own * QUANTILES).long().to(device)
            sums[0].index_add_(0, quarter, losses * real)
            sums[1].index_add_(0, quarter, real)
            if self.alignment is not None:
                generator.manual_seed(int(batch.indices[0]))
                parts = self.aligned(batch, latents, chosen, generator, with_gradient=False)
                aligned += torch.stack([parts[name] for name in names]) * real.sum()
        batches.close()
        totals, counts = self.processes.sum(sums).tolist()
        every = max(sum(counts), 1.0)
        of_heads = dict(zip(names, (self.processes.sum(aligned) / every).tolist(), strict=True)) if names else {}
        return sum(totals) / every, [t / c if c else None for t, c in zip(totals, counts, strict=True)], of_heads
