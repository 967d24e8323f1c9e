"""Small runs of train_network.py as tests need them: tiny bases, a handful of pictures in three buckets, a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tools.runs import metric_rows as rows
from tests.tools.warm import Run

if TYPE_CHECKING:
    from library.data.cached_samples import Batch, CachedSamples
    from library.data.order import BatchOrder
    from library.options.network import TrainNetworkOptions
    from library.training.caches import Prepared
    from library.training.plan import Plan
    from library.training.task import LoraTask

SIZES = ((96, 96), (96, 96), (96, 96), (128, 64), (128, 64), (64, 128))
"""Of the pictures: with resolution 96 and steps of 32 each is a bucket of its own."""
CAPTIONS = tuple(
    f"mio, a {colour} cat, {place}" for colour in ("red", "blue", "green") for place in ("on grass", "at sea")
)

EXACT: dict[str, object] = {
    "gradient_accumulation_steps": 2, "save_state": "", "save_every_n_epochs": 1, "ema_decay": 0.5, "network_dropout": 0.1,
    "shuffle_caption": "", "caption_dropout_rate": 0.2, "flip_aug": "", "lr_scheduler": "cosine",
}  # fmt: skip
"""Options of a run that draws everything there is to draw."""


def draw_pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES, *, first: int = 0) -> Path:
    """images/p0.png ... and captions/p0.txt ... in `folder`."""
    for kind in ("images", "captions"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes, first):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / "images" / f"p{number}.png")
        (folder / "captions" / f"p{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return folder


class NetworkSetting:
    """Options of runs over one folder of pictures; caches are built once and shared."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.data = draw_pictures(folder / "mio")
        self.few = draw_pictures(folder / "few", ((64, 64),) * 3, first=10)
        self.options: dict[str, object] = {
            "pretrained_model_name_or_path": base, "cache_dir": folder / "caches", "device": "cpu", "mixed_precision": "no",
            "network_dim": 2, "learning_rate": 1e-2, "max_train_epochs": 2, "max_data_loader_n_workers": 1,
            "log_every_n_steps": 1, "output_name": "mio",
        }  # fmt: skip

    @property
    def quick(self) -> dict[str, object]:
        """Changes for a run of two epochs of two steps over three pictures of 64 px, the U-Net alone."""
        config = self.dataset("few", folder=self.few, dataset="resolution = 64\nbatch_size = 1")
        return {
            "dataset_config": config, "gradient_accumulation_steps": 2, "network_train_unet_only": "",
            "cache_text_encoder_outputs": "",
        }  # fmt: skip

    def dataset(
        self, name: str = "data", *, subset: str = "", dataset: str = "", more: str = "", folder: Path | None = None
    ) -> Path:
        """A dataset file with further lines for its subset, its dataset, and after both.

        Folders beside it are named without their path, so that what is held out does not depend on where they lie.
        """
        path, folder = self.folder / f"{name}.toml", folder or self.data
        if folder.parent == self.folder:
            folder = Path(folder.name)
        path.write_text(
            f"[general]\nenable_bucket = true\nbucket_reso_steps = 32\nmin_bucket_reso = 64\nresolution = 96\nbatch_size = 2\n"
            f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n{subset}\n{more}\n"
        )
        return path

    def argv(self, output: Path, *extra: str, **changes: object) -> list[str]:
        """Words of a command line. A change that is None leaves an option out; "" makes it a flag."""
        options = {**self.options, "output_dir": output, **changes}
        if not {"dataset_config", "train_data_dir"} & options.keys():
            options["dataset_config"] = self.dataset()
        given = {name: value for name, value in options.items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())] + list(extra)

    def train(self, output: Path, *extra: str, **changes: object) -> int:
        """Run train_network.py in this process; its exit code."""
        import train_network

        return train_network.main(self.argv(output, *extra, **changes))

    def build(self, *extra: str, **changes: object) -> Built:
        """Everything up to the first step, in this process."""
        from library.models.base_family import family_of
        from library.models.locate import locate_base
        from library.options.network import parse_network_options
        from library.processes import Processes
        from library.training.caches import prepare_caches
        from library.training.pictures import collect_pictures
        from library.training.plan import make_order, make_plan
        from library.training.run import build_task

        argv = self.argv(self.folder / "unused", *extra, **changes)
        options = parse_network_options(argv, prog="train_network.py", description=None)
        processes, base = Processes("cpu"), locate_base(str(options.model.pretrained_model_name_or_path))
        prepared = prepare_caches(options, processes, base, family_of(base), collect_pictures(options, base))
        order = make_order(prepared.data, options)
        plan = make_plan(order, options.training, options.optimizer)
        context = ExitStack()
        task = build_task(options, processes, prepared, plan, context)
        return Built(options, prepared, order, plan, task, context)

    def start(self, output: Path, *extra: str, processes: int = 1, **changes: object) -> Run:
        return Run("train_network.py", self.argv(output, *extra, **changes), processes)


@dataclass
class Built:
    """A run that has not begun: what its options come to."""

    options: TrainNetworkOptions
    prepared: Prepared
    order: BatchOrder
    plan: Plan
    task: LoraTask
    context: ExitStack
    """Holds the feature hooks."""

    def batch(self, number: int = 0, samples: CachedSamples | None = None) -> Batch:
        """The `number`-th batch of the training pictures in their order, as they are in the first epoch."""
        from library.data.cached_samples import requests_in_order

        samples = samples or self.task.training
        request = list(requests_in_order(samples))[number]
        batch = samples.empty_batch(request, pin=False)
        samples.fill(batch, slice(0, len(batch)))
        return batch

    def loss(self, batch: Batch | None = None, step: int = 0) -> float:
        """Of a batch, with the noise and timesteps of a step."""
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        return self.task.losses(self.batch() if batch is None else batch, generator, step)["loss"].item()

    def close(self) -> None:
        """Let go of the caches, so that others can be written."""
        self.prepared.close()
        self.context.close()

    def stir(self, scale: float = 0.1) -> Built:
        """Give every adapter an effect, the same in all runs with the same network."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in sorted(self.task.network.parameters.items()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return self


@contextmanager
def asked(step: int, request: int, folder: Path) -> Iterator[None]:
    """Within the context the file `stop` or `save` appears in the output folder while step `step` runs."""
    from library.training.stop import STOP, Requests

    looks, original = iter(range(1000)), Requests.look

    def look(self: Requests) -> int:
        if next(looks) == step:
            (folder / ("stop" if request == STOP else "save")).touch()
        self._looked = 0.0
        return original(self)

    with mock.patch.object(Requests, "look", look):
        yield


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def names(folder: Path) -> list[str]:
    """What lies in a folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def losses(output: Path, name: str = "train/loss") -> list[float]:
    return [row[name] for row in rows(output, name)]
