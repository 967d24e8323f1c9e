"""Hashes of what small trainings leave, to show that a change of the engine changes no bit.

    python tools/record_runs.py before.json                  # of the tree it lies in
    python tools/record_runs.py after.json --compare before.json

Each training is a process of its own on the embedded models and pictures drawn here: both scripts, with everything that decides
bits (scopes, taps, manifold modes, buckets, masks, text encoders, SDXL, two processes). Hashes hold on one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 30
PROCESSES = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
             "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip

REPA = {
    "mid_sample": "",
    "taps_token": "--lora_scope down_mid --taps enc_last mid dec_first --manifold_mode token --align_head linear",
    "all_conv_random_bf16": "--lora_scope all --conv_dim 2 --manifold_mode random --min_snr_gamma 5 --mixed_precision bf16 "
    "--cache_dir CACHES/bf16",
    "objective_v": "--objective v --manifold_margin 0.1 --manifold_clip 0.01",
    "raw_v": "--raw_v_target --align_schedule cutoff --align_cutoff_step 20",
    "no_alignment": "--no_alignment --ema_decay 0 --lora_scope down_mid",
    "int8_accumulated": "--token_dtype int8 --cache_dir CACHES/int8 --gradient_accumulation_steps 2 --align_head conv3x3",
    "checkpointed": "--gradient_checkpointing --no_sdpa --class_dropout 0.5 --optimizer_type Lion",
    "two_processes": "--train_batch_size 4",
}
NETWORK = {
    "buckets_text": "--network_dim 4 --flip_aug --caption_dropout_rate 0.2 --shuffle_caption --ema_decay 0.9",
    "aligned_sample": "--network_train_unet_only --alignment --align_warmup_steps 5 --network_dim 4",
    "aligned_token_masks": "--network_train_unet_only --alignment --manifold_mode token --masked_loss --alpha_mask "
    "--masked_loss_renormalize --taps mid dec_first",
    "aligned_random": "--alignment --manifold_mode random --gradient_accumulation_steps 2 --network_dropout 0.1",
    "cached_text_dora": "--network_train_unet_only --cache_text_encoder_outputs --network_args algo=dora conv_dim=2",
    "lokr": "--network_args algo=lokr factor=4 --network_dim 4 --loss_type huber --noise_offset 0.05",
    "loha_bf16": "--network_args algo=loha rank_dropout=0.1 --network_dim 4 --mixed_precision bf16",
    "kohya_v": "--v_parameterization --zero_terminal_snr --multires_noise_iterations 4 --ip_noise_gamma 0.1",
    "sdxl": "--pretrained_model_name_or_path tiny-sdxl --network_train_unet_only --alignment --max_train_steps 10",
    "two_processes": "--network_dim 4",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON to write")
    parser.add_argument("--compare", type=Path, help="JSON of another tree; exit code 1 where a hash differs")
    parser.add_argument("--only", default="", help="only the runs whose names contain this")
    parser.add_argument("--old", action="store_true", help="the tree still has --v_parameterization for --objective v")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the tree to run")
    arguments = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dataset = draw_pictures(work)
        for script, runs in (("train_repa", REPA), ("train_network", NETWORK)):
            for name, words in runs.items():
                title = f"{script}/{name}"
                if arguments.only not in title:
                    continue
                start = time.perf_counter()
                more = words.replace("CACHES", str(work / "caches")).split()
                if arguments.old and "--objective" in more:
                    more[more.index("--objective") : more.index("--objective") + 2] = ["--v_parameterization"]
                found[title] = record(
                    arguments.tree, script, more, work / title, work, dataset, name == "two_processes"
                )
                print(f"{title:40} {time.perf_counter() - start:5.1f} s  {found[title]}", flush=True)
    arguments.file.write_text(json.dumps(found, indent=1) + "\n")
    return compared(found, json.loads(arguments.compare.read_text())) if arguments.compare else 0


def record(
    tree: Path, script: str, words: list[str], output: Path, work: Path, dataset: Path, two_processes: bool
) -> dict[str, str]:
    """Run one training; hashes of its adapter, its average and its heads."""
    common = {
        "output_dir": output, "output_name": "run", "device": "cpu", "max_train_steps": STEPS, "seed": 7,
        "max_data_loader_n_workers": 1, "cache_dir": work / "caches" / script, "dino_resolution": 224,
        "learning_rate": 1e-3, "log_every_n_steps": 10,
    }  # fmt: skip
    if script == "train_repa":
        common |= {
            "dataset_config": "demo.toml", "train_batch_size": 8, "align_warmup_steps": 5,
            "max_train_samples": 60, "max_validation_samples": 8,
        }  # fmt: skip
    else:
        common |= {"dataset_config": dataset, "save_state": None}
        if "--alignment" not in words:
            del common["dino_resolution"]
        else:
            common |= {"token_grid": 4}
    given = {name: value for name, value in common.items() if f"--{name}" not in words}
    argv = [word for name, value in given.items() for word in ([f"--{name}"] + [str(value)] * (value is not None))]
    command = [sys.executable, *(PROCESSES if two_processes else []), f"{script}.py", *argv, *words]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    states = sorted([*output.glob("step_*"), *output.glob("run-state")])
    files = {"adapter": output / "run.safetensors", "average": output / "run-ema.safetensors"}
    files |= {"heads": states[-1] / "align_heads.safetensors"}
    hashes = {part: hash_of(path) for part, path in files.items() if path.is_file()}
    if (states[-1] / "ema.safetensors").is_file() and "heads" in hashes:
        hashes["heads' average"] = hash_of(states[-1] / "ema.safetensors", "align_heads.")
    return hashes


def hash_of(path: Path, prefix: str = "") -> str:
    """Of all tensors whose names begin with `prefix`: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        if name.startswith(prefix):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()[:12]


def draw_pictures(folder: Path) -> Path:
    """Twelve pictures in three shapes with captions and transparent corners, and the dataset file of them."""
    images = folder / "pictures"
    images.mkdir()
    for number in range(12):
        random = np.random.default_rng(number)
        size = ((128, 128), (160, 96), (96, 160))[number % 3]
        colours = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        picture = colours.resize(size, Image.Resampling.BICUBIC).convert("RGBA")
        picture.paste((0, 0, 0, 0), (0, 0, size[0] // 3, size[1] // 2))
        picture.save(images / f"p{number}.png")
        (images / f"p{number}.txt").write_text(f"a picture, colours {number % 4}, shape {number % 3}")
    path = folder / "dataset.toml"
    path.write_text(
        "[general]\nresolution = 128\nbatch_size = 3\nenable_bucket = true\nbucket_reso_steps = 32\nmin_bucket_reso = 64\n"
        "validation_split = 0.2\nvalidation_seed = 3\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'\n"
        "caption_extension = '.txt'\nnum_repeats = 2\n"
    )
    return path


def compared(found: dict[str, dict[str, str]], before: dict[str, dict[str, str]]) -> int:
    """Print what differs; 1 where something does."""
    different = [title for title, hashes in found.items() if hashes != before.get(title)]
    for title in different:
        print(f"different: {title}\n  before {before.get(title)}\n  now    {found[title]}")
    print(f"{len(found) - len(different)} of {len(found)} runs are equal to the bit.")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
