"""A small U-REPA run as tests need it: tiny models, twelve pictures, a few steps."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tools.pictures import draw_picture
from tests.tools.warm import Run

IMAGES = 12


class RepaSetting:
    """Options of a run over a folder of pictures; caches are built once and shared by all runs of a session."""

    def __init__(self, folder: Path, base: Path, dino: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        for name, ids in (("train", range(8)), ("val", range(8, IMAGES))):
            with open(folder / f"{name}.csv", "w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["sample_id", "path", "class_id"])
                for i in ids:
                    draw_picture(folder / "images" / f"p{i}.png", i, 128)
                    rows.writerow([f"p{i}", f"images/p{i}.png", i % 2])
        (folder / "names.json").write_text(json.dumps(["cat", "dog"]))
        self.options = {
            "train_data": folder / "train.csv", "val_data": folder / "val.csv", "class_names": folder / "names.json",
            "cache_dir": folder / "caches", "pretrained_model_name_or_path": base, "dino_model": dino, "device": "cpu",
            "resolution": 128, "dino_resolution": 56, "token_grid": 4, "mixed_precision": "no", "lora_scope": "mid",
            "max_data_loader_n_workers": 1, "train_batch_size": 4, "max_train_steps": 4, "learning_rate": 1e-2,
            "align_warmup_steps": 2, "lr_warmup_steps": 1, "ema_decay": 0.5, "log_every_n_steps": 1,
        }  # fmt: skip

    def argv(self, output: Path, *extra: str, **changes: object) -> list[str]:
        options = {**self.options, "output_dir": output, **changes}
        return [w for name, value in options.items() for w in (f"--{name}", *str(value).split())] + list(extra)

    def train(self, output: Path, *extra: str, **changes: object) -> int:
        """Run train_repa.py in this process; its exit code."""
        import train_repa

        return train_repa.main(self.argv(output, *extra, **changes))

    def start(self, output: Path, *extra: str, processes: int = 1, **changes: object) -> Run:
        """Start train_repa.py as a process of its own, or as several."""
        return Run("train_repa.py", self.argv(output, *extra, **changes), processes)


def state_tensors(state: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a state, by file and name."""
    return {f"{f.stem}/{name}": t for f in state.glob("*.safetensors") for name, t in load_file(f).items()}


def assert_equal_states(a: Path, b: Path) -> None:
    left, right = state_tensors(a), state_tensors(b)
    assert left.keys() == right.keys() and len(left) > 20
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different[:5]


def copy_until(source: Path, target: Path, step: int) -> None:
    """The output folder as it was at `step`: later states, and metrics, are those of a run that was killed later."""
    shutil.copytree(source, target)
    for state in target.glob("step_*"):
        if int(state.name[5:]) > step:
            shutil.rmtree(state)
    for adapter in target.glob("*.safetensors"):
        adapter.unlink()


def metric_rows(output: Path, name: str = "train/loss") -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if name in row]
