"""Small runs of train_lyra.py as tests need them: a tiny CLIP and a tiny T5, a dozen captions, a few steps."""

from __future__ import annotations

from pathlib import Path

CAPTIONS = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue", "Pink, dark") for shape in ("circle", "cat", "ring")
]


class LyraSetting:
    """Options of runs over one file of captions; caches are built once and shared."""

    def __init__(self, folder: Path, base: Path, t5: Path) -> None:
        folder.mkdir()
        self.captions = folder / "captions.txt"
        self.captions.write_text("\n".join(CAPTIONS) + "\n\n" + CAPTIONS[0])
        self.options: dict[str, object] = {
            "captions": self.captions, "pretrained_model_name_or_path": base, "encoders": t5, "cache_dir": folder / "cache",
            "device": "cpu", "hidden_dim": 32, "depth": 2, "train_batch_size": 4, "max_train_steps": 6, "ema_decay": 0.5,
            "save_every_n_steps": 2, "validate_every_n_steps": 2, "log_every_n_steps": 1, "validation_split": 0.2,
            "learning_rate": 1e-2, "cross_weight": 0.05, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        }  # fmt: skip

    def train(self, output: Path, *extra: str, **changes: object) -> int:
        """Run train_lyra.py in this process; its exit code. A change that is None leaves an option out."""
        import train_lyra

        options = {**self.options, "output_dir": output, **changes}
        given = {name: value for name, value in options.items() if value is not None}
        words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
        return train_lyra.main([*words, *extra])
