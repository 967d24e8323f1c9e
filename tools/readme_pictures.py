"""Draw the picture of README.md: one new thing learnt from twelve pictures, by how much of the adapter is added.

    python tools/readme_pictures.py

Runs the commands that it prints, on the embedded models: about four minutes on two CPU cores.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "outputs" / "readme"
PICTURE = ROOT / "docs" / "images" / "readme.jpg"
sys.path.insert(0, str(ROOT / "tools"))
from demo import run_commands  # noqa: E402


def main() -> int:
    sheet = OUTPUT / "sheet.png"
    shutil.rmtree(OUTPUT, ignore_errors=True)  # its own, of the last time
    failed = run_commands([
        ["-m", "library.data.new_concept", "--out", OUTPUT / "pictures"],
        ["train_network.py", "--train_data_dir", OUTPUT / "pictures/train", "--resolution", "128,128", "--train_batch_size", "4",
         "--max_train_steps", "300", "--learning_rate", "1e-3", "--network_dim", "8", "--network_alpha", "8",
         "--output_dir", OUTPUT, "--output_name", "zorb"],
        ["generate.py", "--prompt", "a large zorb at the top right on a striped turquoise background",
         "--lora", OUTPUT / "zorb.safetensors", "--x_axis", "weight: 0, 0.4, 0.8, 1.2",
         "--y_axis", "prompt: a large zorb at the top right, a medium zorb on the left, a large red circle on the left",
         "--output", sheet],
    ])  # fmt: skip
    if failed:
        return failed
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    Image.open(sheet).convert("RGB").save(PICTURE, quality=90, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
