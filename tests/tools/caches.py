"""Pictures and the options of a cache build, as tests need them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from library.caching.class_caches import Caches, Preparation
from library.data.class_pictures import open_pictures
from library.options.parser import parse
from library.options.repa import PrepareCacheOptions
from library.processes import Processes
from library.training.caches import class_preparation
from networks.families import SD15
from tests.tools.pictures import draw_picture


def write_photos(folder: Path) -> Path:
    """12 pictures with a manifest, 4 of them for validation; classes 0 and 5."""
    (folder / "images").mkdir(parents=True)
    for name, ids in (("train", range(8)), ("val", range(8, 12))):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["sample_id", "path", "class_id"])
            for i in ids:
                draw_picture(folder / "images" / f"p{i}.png", i)
                rows.writerow([f"p{i}", f"images/p{i}.png", 5 * (i % 2)])
    (folder / "names.json").write_text(json.dumps({"0": "cat", "5": "dog"}))
    return folder


class CacheSetting:
    """The options of a cache build that tests change one by one."""

    def __init__(self, tmp_path: Path, photos: Path, base: Path, dino: Path) -> None:
        self.said: list[str] = []
        self.last: Caches | None = None
        self.argv = {
            "train_data": photos / "train.csv", "val_data": photos / "val.csv", "class_names": photos / "names.json",
            "cache_dir": tmp_path / "caches", "pretrained_model_name_or_path": base, "dino_model": dino,
            "resolution": 64, "dino_resolution": 56, "token_grid": 4, "mixed_precision": "no",
            "max_data_loader_n_workers": 0, "cache_batch_size": 3,
        }  # fmt: skip

    def arguments(self, **changes: object) -> list[str]:
        return [word for name, value in {**self.argv, **changes}.items() for word in (f"--{name}", *str(value).split())]

    def preparation(self, **changes: object) -> tuple[Preparation, PrepareCacheOptions]:
        options = parse(PrepareCacheOptions, self.arguments(**changes), prog="x", description="")
        return class_preparation(options, Processes("cpu"), SD15), options

    def build(self, *, rebuild: bool = True, **changes: object) -> Caches:
        self.said.clear()
        # A process that still reads a store cannot write to it. A closed store opens again when it is read.
        for cached in [] if self.last is None else [self.last.train, self.last.val]:
            for store in cached.stores.values() if cached is not None else ():
                store.close()
        preparation, options = self.preparation(**changes)
        self.last = preparation.prepare(open_pictures(options.classes), rebuild=rebuild, say=self.said.append)
        return self.last

    @property
    def counts(self) -> list[tuple[int, int, int]]:
        """(encoded, unchanged, unreadable) of each set that had work to do."""
        found = [re.match(r"\w+: (\d+) encoded, (\d+) unchanged, (\d+) unreadable", line) for line in self.said]
        return [tuple(map(int, match.groups())) for match in found if match]
