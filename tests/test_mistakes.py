"""Mistakes in options, TOML files and paths, and --help, are answered before torch is imported, in little time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from library.options.toml_file import PROJECT_ROOT

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "optuna")
RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported", [name for name in {HEAVY} if name in sys.modules])
"""
# Importing torch and diffusers alone is some 300 times what an empty program takes.
MOST = 60
SCRIPTS = sorted(path.name for path in PROJECT_ROOT.glob("*.py"))
KINDS = {
    **{f"help of {script}": (f"{script} --help", 0, "usage: ") for script in SCRIPTS},
    "option": ("train_repa.py --learnin_rate 3", 2, "did you mean learning_rate?"),
    "value": ("train_network.py --network_dim x", 2, "network_dim is 'x': expected INT."),
    "combination": ("train_repa.py --align_cutoff_step 5", 2, "has no effect with align_schedule warmup"),
    "kind": ("train_network.py --network_args algo=oft --scale_weight_norms 1", 2, "scale_weight_norms"),
    "TOML": ("train_repa.py --dataset_config BAD", 2, "Unknown key: lerning_rate"),
    "no TOML": ("train_repa.py --dataset_config nowhere.toml", 2, "No configuration file nowhere.toml"),
    "data sets": ("train_network.py --dataset_config BAD", 2, "bad.toml has no [[datasets]]"),
    "no data sets": ("train_network.py --dataset_config nowhere.toml", 2, "nowhere.toml could not be read"),
    "folder of data sets": ("train_network.py --dataset_config SETS", 2, "nowhere"),
    "pictures": ("train_repa.py --train_data nowhere", 2, "train_data nowhere does not exist"),
    "pictures to cache": ("prepare_cache.py --train_data nowhere", 2, "train_data nowhere does not exist"),
    "base": (
        "train_network.py --train_data_dir demo --pretrained_model_name_or_path no/such/base",
        2,
        "does not exist",
    ),
    "teacher": ("train_repa.py --dino_model nowhere.pth", 2, "nowhere.pth does not exist"),
    "base to draw with": ("generate.py --pretrained_model_name_or_path no/such/base --prompt x", 2, "does not exist"),
    "adapter to draw with": ("generate.py --lora nowhere.safetensors --prompt x", 2, "does not exist"),
    "adapter to merge": ("merge_lora.py --models nowhere.safetensors --output_dir out", 2, "does not exist"),
    "checkpoint": ("evaluate.py --checkpoint nowhere", 2, "does not exist"),
    "model": (
        "extract_lora.py --model_org no/such/a --model_tuned no/such/b --save_to x.safetensors",
        2,
        "does not exist",
    ),
    "captions": ("train_lyra.py --captions nowhere", 2, "captions nowhere does not exist"),
    "folder to look at": ("doctor.py nowhere", 2, "nowhere does not exist"),
    "pictures to look at": ("doctor.py tests", 2, "has no images"),
    "pictures to caption": ("caption.py tests --edit shuffle", 2, "tests has no pictures"),
    "model to caption with": ("caption.py models --model nowhere", 2, "has no pictures"),
    "number of trials": ("optimize.py --n-trials x", 2, "n_trials is 'x': expected INT."),
}


def cpu_seconds(argv: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, cwd=PROJECT_ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope="module")
def empty() -> float:
    """What an empty program takes."""
    return sorted(cpu_seconds([sys.executable, "-c", "pass"])[0] for _ in range(5))[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_is_answered_before_torch_is_imported(kind: str, empty: float, tmp_path: object) -> None:
    words, code, sentence = KINDS[kind]
    bad, sets = f"{tmp_path}/bad.toml", f"{tmp_path}/sets.toml"
    with open(bad, "w") as file:
        file.write("lerning_rate = 1\n")
    with open(sets, "w") as file:
        file.write("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n")
    argv = words.replace("BAD", bad).replace("SETS", sets).split()
    taken, done = cpu_seconds([sys.executable, "-c", RUN, *argv])
    assert done.returncode == code, done.stderr
    assert sentence in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert "imported []" in done.stdout
    assert taken < MOST * max(empty, 0.01)
