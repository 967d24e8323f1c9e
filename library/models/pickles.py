"""Pickles, which can run code when they are read: what they are called, and how to turn one into safetensors."""

from __future__ import annotations

from pathlib import Path

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def conversion_command(path: Path | str) -> str:
    """A shell command that rewrites a pickled checkpoint as safetensors. It runs what is in the pickle."""
    target = Path(path).with_suffix(".safetensors")
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"d = torch.load(r'{path}', map_location='cpu', weights_only=False); d = d.get('state_dict', d); "
        "save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
        f"r'{target}')\""
    )
