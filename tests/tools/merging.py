"""Merges of the tiny models as tests need them: bases in every layout, adapters in every form, processes to kill."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.files import read_json
from library.merging.layouts import Merging
from library.merging.merge import place
from library.merging.strength import Strength
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.locate import BaseLocation
from library.options.toml_file import PROJECT_ROOT
from networks.adapter_alphas import NETWORK_SPEC_KEY
from networks.adapter_file import BASE_MODEL_KEY
from networks.adapters import Adapter
from networks.families import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from networks.network import Network
from tests.tools.adapters import earlier_spec, earlier_weights, whole_adapter, write_adapter
from tests.tools.ldm_layout import ldm_checkpoint

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
EMA = {"model_ema.decay": torch.tensor(0.9999), "model_ema.diffusion_modelout2weight": torch.zeros(4, 32, 3, 3)}


def run_merge(*words: object) -> int:
    """merge_lora.py in this process; its exit code."""
    import merge_lora

    return merge_lora.main([str(word) for word in words])


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(BaseLocation(path.name, path))


def merging_of(base: Path, *adapters: tuple[Adapter, float], dtype: torch.dtype | None = None) -> Merging:
    checkpoint = opened(base)
    folds = place([(adapter, Strength(ratio)) for adapter, ratio in adapters], checkpoint.shapes, checkpoint.family)
    return Merging(checkpoint, folds, dtype)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata=metadata)
    return path


def single_file(
    folder: Path, path: Path, dtype: torch.dtype | None = None, extra: Mapping[str, Tensor] | None = None
) -> Path:
    """A diffusers folder as an original single file, by the tests' own table of names."""
    tensors = {name: value if dtype is None else value.to(dtype) for name, value in ldm_checkpoint(folder).items()}
    return save(tensors | dict(extra or {}), path)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def payload(file: Path) -> bytes:
    """All tensors' bytes, in the order of the file."""
    whole = file.read_bytes()
    return whole[8 + int.from_bytes(whole[:8], "little") :]


def assert_same_tensors(found: Path | Mapping[str, Tensor], expected: Path | Mapping[str, Tensor]) -> None:
    """Equal names, shapes, number formats and bits."""
    ours, theirs = (load_file(tensors) if isinstance(tensors, Path) else tensors for tensors in (found, expected))
    assert sorted(ours) == sorted(theirs)
    different = [
        name
        for name, value in ours.items()
        if value.dtype != theirs[name].dtype or not torch.equal(value, theirs[name])
    ]
    assert not different, different[:3]


def assert_same_folders(found: Path, expected: Path) -> None:
    """The same tensors at the same places: who maps a file into memory rounds by where a tensor lies."""
    parts = [file for file in FILES.values() if (expected / file).exists()]
    for file in parts:
        assert_same_tensors(found / file, expected / file)
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file


def left_over(folder: Path) -> list[str]:
    """What a merge that did not end leaves, and no other may."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def write_state(folder: Path, network: Network, base: str = "tiny-sd15", *, earlier: bool = False) -> Path:
    """A training state as train_repa.py leaves it, or left it. The average is half the weights, with heads beside it."""
    weights = earlier_weights(network.adapter()) if earlier else {n: p.detach() for n, p in network.parameters.items()}
    spec = earlier_spec(network.spec) if earlier else {NETWORK_SPEC_KEY: network.spec.to_json()}
    metadata = {"format": "pt", **spec}
    save(weights, folder / "lora.safetensors", metadata)
    averaged = {name: value / 2 for name, value in weights.items()}
    save(averaged | {"align_heads.mid.proj.0.weight": torch.zeros(2, 2)}, folder / "ema.safetensors", metadata)
    (folder / "state.json").write_text(json.dumps({"step": 150, "base_model": base}))
    return folder


def write_wrapped(path: Path, base: Path, network: Network) -> Path:
    """The conversion report's checkpoint: a whole U-Net wrapped by PEFT, three heads, alpha in the run's config.json."""
    adapted = {target.path for target in network.layers}
    tensors = earlier_weights(network.adapter(), "unet.base_model.model.")
    for name, value in load_file(base / FILES["unet"]).items():
        module, _, leaf = name.rpartition(".")
        tensors[f"unet.base_model.model.{module}{'.base_layer' if module in adapted else ''}.{leaf}"] = value
    tensors |= {f"align_heads.{block}.weight": torch.zeros(2, 2) for block in ("down", "mid", "up")}
    save(tensors, path)
    path.with_name("config.json").write_text(
        json.dumps({"lora": {"rank": network.spec.rank, "lora_alpha": network.spec.alpha}})
    )
    return path


def models_of(folder: Path) -> dict[str, nn.Module]:
    """The models of a diffusers folder that adapters sit on, without weights."""
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            UNET: UNet2DConditionModel.from_config(read_json(folder / UNET / "config.json"))
        }
        for component, kind in ((TEXT_ENCODER, CLIPTextModel), (TEXT_ENCODER_2, CLIPTextModelWithProjection)):
            if (folder / component).exists():
                models[component] = kind(CLIPTextConfig.from_pretrained(folder / component))
    return models


def write_whole_adapter(base: Path, folder: Path) -> Path:
    """A kohya file of an adapter on everything that kohya's scripts train, text encoders too."""
    version = "sdxl_base_v1-0" if (base / TEXT_ENCODER_2).exists() else "sd_v1"
    metadata = {"ss_base_model_version": version, BASE_MODEL_KEY: str(base)}
    return write_adapter(whole_adapter(models_of(base), metadata=metadata), "kohya", folder)


@contextmanager
def without_complaint(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where diffusers or transformers warn of anything."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.enable_propagation()
        library.set_verbosity_warning()
    caplog.clear()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error", UserWarning)
            yield
        assert not caplog.records, caplog.text
    finally:
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.disable_propagation()
            library.set_verbosity(verbosity)


def picture(pipeline: Any) -> np.ndarray:
    """A small picture, [64, 64, 3]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    return pipeline("a red circle", generator=generator, **options).images[0]


# What the process below does for each line it reads: a merge in a fork of its own, which needs no second import of torch.
_SERVER = """
import json, os, re, signal, sys, threading, time
from library.quiet import quiet_libraries
quiet_libraries()
import merge_lora, library.merging.lora_file, library.merging.write, typeguard

def anonymous():  # without the pages of libraries, which a fork faults in anew
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", status.read())[1]) * 1024

def watch(peak):
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

def die_before(call):
    name, count = call
    inner, left = getattr(os, name), [count]
    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **options)
    setattr(os, name, counted)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        said, _ = os.dup(1), os.dup2(null, 1)
        if order["die_before"]:
            die_before(order["die_before"])
        before = anonymous()
        peak = [before]
        threading.Thread(target=watch, args=(peak,), daemon=True).start()
        code = merge_lora.main(order["argv"])
        os.write(said, f"{peak[0] - before}\\n".encode())
        os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
"""


class MergeServer:
    """merge_lora.py as processes of their own, one at a time, that can be killed and weighed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def start(self, *words: object, die_before: tuple[str, int] | None = None) -> int:
        """Begin a merge; its process id. die_before: let it kill itself before the n-th call of a function of os."""
        assert self._process.stdin is not None
        order: dict[str, Any] = {"argv": [str(word) for word in words], "die_before": die_before}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> tuple[int, int | None]:
        """(exit code, negative a signal; bytes of memory of its own that the merge held at most, seen every millisecond)"""
        line, grown = self._line(), None
        while not line.startswith("ended"):
            line, grown = self._line(), int(line)
        return int(line.split()[1]), grown

    def run(self, *words: object, die_before: tuple[str, int] | None = None) -> tuple[int, int | None]:
        self.start(*words, die_before=die_before)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server has died"
        return line.strip()
