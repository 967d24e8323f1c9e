"""A few latents that the trained tiny base draws at 64 pixels in a few steps."""

from __future__ import annotations

from pathlib import Path

from tests.tools.network_runs import NetworkSetting

BASE = "tiny-shapes"
PROMPTS = "a red square\na blue circle --n red\na green triangle --d 7\n"


def words(store: Path, prompts: Path, *more: str) -> list[str]:
    """Of a command line of prepare_cache.py."""
    options = {
        "teacher_latents": store, "teacher_prompts": prompts, "teacher_images": 2, "teacher_sampler": "Euler", "teacher_steps": 3,
        "teacher_cfg": 1.5, "teacher_seed": 1, "teacher_size": 64, "cache_batch_size": 2, "pretrained_model_name_or_path": BASE,
        "mixed_precision": "no", "device": "cpu", "cache_dir": store.parent / "hashes",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*given, *more]


def draw(store: Path, prompts: str = PROMPTS, *more: str) -> int:
    """Run prepare_cache.py in this process; its exit code. The prompts lie beside the store."""
    import prepare_cache

    store.parent.mkdir(parents=True, exist_ok=True)
    file = store.parent / ("prompts.txt" if prompts == PROMPTS else "other_prompts.txt")
    file.write_text(prompts)
    return prepare_cache.main(words(store, file, *more))


class TeacherSetting(NetworkSetting):
    """Runs of a few steps on drawn latents, in place of pictures."""

    def __init__(self, folder: Path, store: Path) -> None:
        super().__init__(folder / "pictures", Path(BASE))
        self.options |= {
            "pretrained_model_name_or_path": BASE, "teacher_latents": store, "dataset_config": None, "train_batch_size": 2,
            "network_train_unet_only": "", "cache_text_encoder_outputs": "", "max_train_epochs": None, "max_train_steps": 3,
        }  # fmt: skip
