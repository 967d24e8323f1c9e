"""What the U-Net sees of a few pictures while a run trains AlignHeads: its map beside the teacher's, in colours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image

from library.data.batches import Prefetcher
from library.data.cached_samples import requests_in_order
from library.data.collect import TrainingData
from library.data.pixels import UnreadableImage, square_crop
from library.data.trained_image import TrainedImage
from library.diffusion.dense_maps import dense_maps
from library.diffusion.noise import Draw
from library.inference.grids import grid
from library.training.randomness import sample_noise
from library.training.task import LoraTask

PICTURES, TILE = 4, 96
PLACE = 0.261
"""In the timesteps: 261 of a thousand, DIFT's (arXiv 2306.03881), as in evaluate.py's dense maps."""
GREY = "#808890"


@dataclass
class Sight:
    """data: where the pictures of the task lie."""

    task: LoraTask
    data: TrainingData
    _photos: dict[str, Image.Image] = field(default_factory=dict)

    @torch.no_grad()
    def sheet(self) -> tuple[Image.Image, float]:
        """A row for each of up to four held-out pictures (where there are none, training pictures) of one batch, and their mean
        cosine to the teacher. Noise belongs to the picture, so that two sheets differ by the weights alone."""
        task = self.task
        assert task.alignment is not None
        samples = task.validation.get("loss", task.training)
        modes = {model: model.training for model in task.models.values()}
        for model in modes:
            model.eval()
        try:
            shown = next(requests_in_order(samples, most=1)).micro.indices[:PICTURES]
            few = requests_in_order(samples, indices=[int(index) for index in shown])
            batches = Prefetcher(samples, few, task.processes.device, workers=1)
            batch = next(batches)
            batches.close()
            latents, ids = task.latents(batch), samples.ids_of(batch)
            noise = sample_noise(task.validation_seed, ids, tuple(latents.shape[1:])).to(latents.device)
            timesteps = task.objective.parametrisation.spread(torch.full((len(ids),), PLACE)).to(latents.device)
            task.each(batch, latents, Draw(noise, noise, timesteps))
        finally:
            for model, training in modes.items():
                model.train(training)
        heads, features = task.alignment.heads, task.alignment.features
        tap, (targets, token_grid) = next(iter(heads)), task.alignment.targets(batch, latents)
        maps = dense_maps(
            ids,
            [self._photo(samples.images[int(index)]) for index in batch.indices],
            targets[heads.teachers[0]].cpu(),
            heads.tokens(tap, features, token_grid).cpu(),
            features[tap].float().cpu(),
            token_grid,
        )
        names = list(maps[0].columns())
        tiles = [tile for one in maps for tile in one.columns().values()]
        return grid(tiles, len(names), column_headings=names), sum(one.mean_cosine for one in maps) / len(maps)

    def _photo(self, picture: TrainedImage) -> Image.Image:
        """Read once; grey where it can no longer be read."""
        sample_id = picture.image.sample_id
        if sample_id not in self._photos:
            try:
                self._photos[sample_id] = Image.fromarray(square_crop(self.data.decoded(picture), TILE))
            except (UnreadableImage, OSError):
                self._photos[sample_id] = Image.new("RGB", (TILE, TILE), GREY)
        return self._photos[sample_id]
