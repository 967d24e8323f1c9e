"""Run every command of README.md and docs/ as printed, on the tiny models, in a copy of the project that is thrown away.

    python tools/run_docs.py [--minutes 3] [PAGE ...]

What the commands name is laid out first: hub ids in a cache of the hub, checkpoints, adapters, pictures and dataset files of
the same names, all of them small. A command that still works after --minutes is asked to stop as by Ctrl-C, and has to answer
as documented: it saves, and ends with exit code 75. Prints a line for each command; exit code 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("doctor", "train_network", "flow", "lyra", "repa", "generate", "merge", "evaluate", "optimize")
    ),
)
ASIDE = {
    "make": "installs",
    "docker": "needs docker",
    "-m venv": "installs",
    "postgresql": "needs a PostgreSQL server",
    "--device cuda": "needs a CUDA device",
    "--model Salesforce": "fetches a model",
    "--tagger": "needs onnxruntime, and fetches a model",
    "...": "is not whole",
}
"""What a command holds that cannot run here, and why."""
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny-shapes",
    "facebook/dinov2-large": "tiny-dinov2",
    "openai/clip-vit-large-patch14": "tiny-shapes-clip",
    "google-t5/t5-base": "tiny-t5",
}
SNAPSHOT = "0123456789abcdef0123456789abcdef01234567"
STOPPED = 75
UNFINISHED = {
    "trackA.toml": ("outputs/trackA/repa_trackA.safetensors", "mine.safetensors"),
    "mine": ("outputs/mine/mine.safetensors", "mine.safetensors"),
    "student": ("outputs/network/student.safetensors", "mine.safetensors"),
    "zorb": ("outputs/zorb/zorb.safetensors", "mine.safetensors"),
    "train_lyra.py": ("outputs/lyra/lyra.safetensors", "short/lyra.safetensors"),
}
"""Word of a command that was stopped -> what it would have left for the commands after it, and what stands in for that."""


def commands_of(page: str) -> Iterator[str]:
    """The commands in the fenced blocks of a page, each on one line."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language in ("", "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(python|accelerate|make|docker|sh|[A-Z]+=\S+) ", line):
                    yield shlex.join(shlex.split(line, comments=True))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--minutes", type=float, default=3.0, help="after which a command is asked to stop")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which then stays")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        place = Sandbox(options.keep or Path(temporary) / "project")
        place.lay_out()
        failed = [
            command
            for page in options.pages
            for command in commands_of((ROOT / page).read_text(encoding="utf-8"))
            if not place.try_command(f"{page}: {command}", command, options.minutes * 60)
        ]
    print(f"{len(failed)} failed" if failed else "All commands ran.")
    return 1 if failed else 0


class Sandbox:
    """A copy of the project with an empty home and what the commands name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
        programs = root / ".programs"
        programs.mkdir()
        for name, words in (("python", ""), ("accelerate", " -m accelerate.commands.accelerate_cli")):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(root / ".home"), "HF_HOME": str(root / ".hub"),
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def lay_out(self) -> None:
        """Small files under the names that the pages use."""
        self._python(
            "-c", "from library.models.tiny import ensure_tiny; ensure_tiny('tiny-dinov2'); ensure_tiny('tiny-t5')"
        )
        for hub_id, model in HUB.items():
            repository = self.root / ".hub" / "hub" / f"models--{hub_id.replace('/', '--')}"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text(SNAPSHOT)
            shutil.copytree(self.root / "models" / model, repository / "snapshots" / SNAPSHOT)
        self._python(
            "-m", "library.data.demo_pictures", "--out", "data/imagenet", "--images", "136", "--validation", "8"
        )
        for old, new in (("train.csv", "train_200k.csv"), ("val.csv", "val_50k.csv")):
            (self.root / "data/imagenet" / old).rename(self.root / "data/imagenet" / new)
        pictures = sorted((self.root / "data/imagenet/images").rglob("*.png"))
        for folder in (
            "data/mio/images",
            "data/my/images",
            "data/character/images",
            "data/held_out_photos",
            "photos/luca_held_out",
        ):
            (self.root / folder).mkdir(parents=True)
            for picture in pictures[:6]:
                for file in (picture, picture.with_suffix(".txt")):
                    shutil.copy(file, self.root / folder)
        for wnid, drawn in (("n01440764", pictures[:64]), ("n01443537", pictures[64:128])):
            (self.root / "data/imagenet/train" / wnid).mkdir(parents=True)
            for picture in drawn:
                shutil.copy(picture, self.root / "data/imagenet/train" / wnid)
        subsets = '[[datasets]]\nresolution = 128\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "data/my/images"\n'
        (self.root / "my.toml").write_text(subsets)
        (self.root / "prompts.txt").write_text("a red square --n blurry --w 128 --h 128\na blue star --s 4\n")
        (self.root / "captions.txt").write_text("a red square\na blue star --n blurry\n")
        captions = [picture.with_suffix(".txt").read_text().strip() for picture in pictures[:64]]
        (self.root / "my_captions.txt").write_text("\n".join(captions))
        (self.root / "params.json").write_text('{"params": {"learning_rate": 1e-4}}')
        for name, base, rank in (
            ("mine", "tiny-shapes", 4),
            ("big", "tiny-shapes", 16),
            ("luca-000008", "tiny-sdxl", 4),
        ):
            self._python(
                *("train_network.py", "--pretrained_model_name_or_path", base, "--dataset_config", "my.toml"),
                *("--max_train_steps", "2", "--network_dim", str(rank), "--output_dir", ".", "--output_name", name),
            )
        run = self.root / "exps/run/step_030000"
        run.mkdir(parents=True)
        for copy in ("a.safetensors", "b.safetensors", "peft.safetensors", run / "model.safetensors"):
            shutil.copy(self.root / "mine.safetensors", self.root / copy)
        for name, adapter, ratio in (("sd15", "mine", 0), ("tuned", "mine", 1), ("sd_xl_base_1.0", "luca-000008", 0)):
            base = "tiny-sdxl" if "xl" in name else "tiny-shapes"
            self._python(
                *("merge_lora.py", "--pretrained_model_name_or_path", base, "--models", f"{adapter}.safetensors"),
                *("--ratios", str(ratio), "--save_to", f"{name}.safetensors"),
            )
        shutil.copy(self.root / "sd15.safetensors", self.root / "v1-5-pruned.safetensors")
        demo = ("--models", "mine.safetensors", "--output_dir", "outputs/demo/merged")
        self._python("merge_lora.py", "--pretrained_model_name_or_path", "tiny-shapes", *demo)
        shutil.copy(self.root / "mine.safetensors", self.root / "outputs/demo/demo.safetensors")
        steps = ("--max_train_steps", "2", "--save_every_n_steps", "2", "--output_dir", "outputs/repa")
        self._python("train_repa.py", "--dataset_config", "demo.toml", *steps)
        (self.root / "outputs/repa/step_000002").rename(self.root / "outputs/repa/step_000200")
        for file in self.root.glob("outputs/repa/*.safetensors"):
            file.unlink()  # <lora:demo:1> is to find the demo's
        shutil.copy(pictures[0], self.root / "photo.png")
        self._python("train_lyra.py", "--max_train_steps", "2", "--output_dir", "short")
        few = ("--block_probe_samples", "32", "--block_probe_bins", "10")
        self._python("evaluate.py", "--block_probe", *few, "--output_dir", "short/probe")
        (self.root / "outputs/probe").mkdir()
        shutil.copy(self.root / "short/probe/timestep_bins.json", self.root / "outputs/probe")

    def _python(self, *words: str) -> None:
        subprocess.run(
            [sys.executable, *words], cwd=self.root, env=self.environment, check=True, stdout=subprocess.DEVNULL
        )

    def try_command(self, title: str, command: str, seconds: float) -> bool:
        """Run it; a line of what came of it, and what it said where it failed."""
        if reason := next((why for words, why in ASIDE.items() if words in command), None):
            print(f"aside    {title}  ({reason})", flush=True)
            return True
        start = time.monotonic()
        with open(self.root / ".said", "w+") as said:
            process = subprocess.Popen(
                f"exec {command}",
                shell=True,
                cwd=self.root,
                env=self.environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
                # A shell's background jobs ignore Ctrl-C, and so would all that they start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            stopped = False
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                stopped = True
                while process.poll() is None:  # a study ends its trials before it stops; asked again it does not
                    os.killpg(process.pid, signal.SIGINT)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(60)
                for word, (path, other) in UNFINISHED.items():
                    if word in command and not (self.root / path).exists():
                        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(self.root / other, self.root / path)
            passed = process.returncode == 0 or stopped and process.returncode == STOPPED
            how = "stopped" if stopped and passed else "ok" if passed else f"FAILED {process.returncode}"
            print(f"{how:8} {title}  ({time.monotonic() - start:.0f} s)", flush=True)
            if not passed:
                said.seek(0)
                print("".join(f"         | {line}" for line in said.readlines()[-12:]), flush=True)
        return passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
