"""make demo: the main job on the embedded default, from generated pictures to a picture, with what came out of it.

python tools/demo.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "outputs" / "demo"
EVALUATION = OUTPUT / "evaluation"
PROMPT = "a photo of a red circle"
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
PAGES = {
    "before": (OUTPUT / "doctor.html", "the pictures that are trained on"),
    "while": (OUTPUT / "run.html", "losses, and what the U-Net sees"),
    "after": (EVALUATION / "report.html", "what was learned, and which checkpoint to use"),
}


def main() -> int:
    start = time.perf_counter()
    adapter, merged, picture = OUTPUT / "demo.safetensors", OUTPUT / "merged", OUTPUT / "picture.png"
    failed = run_commands([
        ["train_repa.py", "--dataset_config", "demo.toml", "--dry_run", "--report"],
        # train_repa.py would build missing caches itself; this also renews those of an older version of the tiny models.
        ["prepare_cache.py", "--dataset_config", "demo.toml"],
        # A demo shows a whole run; a second one would only find that the first is finished.
        [*LAUNCH, "train_repa.py", "--dataset_config", "demo.toml", "--overwrite"],
        ["merge_lora.py", "--models", adapter, "--output_dir", merged, "--overwrite"],
        ["generate.py", "--pretrained_model_name_or_path", merged, "--prompt", PROMPT,
         "--images", "4", "--steps", "12", "--output", picture],
        # As few pictures and timesteps as make a page: it takes a quarter of the demo's time.
        ["evaluate.py", "--checkpoint", OUTPUT, "--prompt", PROMPT, "--num-samples", "4", "--steps", "6",
         "--batch_size", "2", "--representation_samples", "64", "--representation_timesteps", "50", "261", "500",
         "--output_dir", EVALUATION, "--overwrite"],
    ])  # fmt: skip
    if failed:
        print(f"The demo ended here: exit code {failed}.", file=sys.stderr)
        return failed
    print_summary(adapter, merged, picture, time.perf_counter() - start)
    return 0


def run_commands(commands: Sequence[Sequence[str | Path]]) -> int:
    """Run Python with each of the commands in turn, printed as a user writes them; the exit code of the first that fails."""
    for command in commands:
        words = [str(word) for word in command]
        shown = [word.removeprefix(f"{ROOT}/") for word in words]
        print(f"\n$ python {' '.join(f'{w!r}' if ' ' in w else w for w in shown)}", flush=True)
        if code := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            return code
    return 0


def print_summary(adapter: Path, merged: Path, picture: Path, seconds: float) -> None:
    rows = [json.loads(line) for line in (OUTPUT / "metrics.jsonl").read_text().splitlines()]
    print(f"\n{'':16}{'start':>10}{'end':>10}")
    for name in ("train/diffusion", "train/token", "train/manifold", "val/loss", "val/token", "val/manifold"):
        values = [row[name] for row in rows if name in row]
        print(f"{name:16}{values[0]:10.4f}{values[-1]:10.4f}")
    reference = next(row for row in rows if "reference/constant_token_loss" in row)
    print(f"The token loss of the best constant is {reference['reference/constant_token_loss']:.4f}.\n")
    print(f"adapter        {adapter.relative_to(ROOT)}")
    print(f"merged model   {merged.relative_to(ROOT)}")
    print(f"picture        {picture.relative_to(ROOT)}  ({PROMPT})")
    print(f"TensorBoard    tensorboard --logdir {(OUTPUT / 'logs').relative_to(ROOT)}")
    print("\nPages, for a browser:")
    for when, (page, shows) in PAGES.items():
        if page.is_file():
            print(f"  {when:12} {page.relative_to(ROOT)}  ({shows})")
    print(f"\n{seconds:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
