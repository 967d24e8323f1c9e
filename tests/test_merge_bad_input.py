"""What merge_lora.py refuses: one sentence, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library import files
from library.errors import EXIT_BAD_INPUT
from tests.tools.merging import FILES, run_merge, save, single_file, write_whole_adapter

PROJ = "lora_unet_mid_block_attentions_0_proj_in"


class Case:
    """A folder with a good adapter and a good base, for one test to spoil."""

    def __init__(self, folder: Path, adapter: Path, base: Path, diffusers: Path) -> None:
        self.folder = folder
        self.adapter = Path(shutil.copy(adapter, folder / "a.safetensors"))
        self.base = Path(shutil.copy(base, folder / "base.safetensors"))
        self.diffusers = diffusers
        self.output: list[object] = ["--save_to", folder / "out" / "m.safetensors"]
        self.words: list[object] = []

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.adapter)

    def write(self, tensors: dict[str, Tensor]) -> None:
        save(tensors, self.adapter)

    def run(self) -> int:
        words = [*self.output, *self.words]
        base = () if "--lora_only" in words else ("--pretrained_model_name_or_path", self.base)
        return run_merge("--models", self.adapter, *base, *words)


@pytest.fixture(scope="module")
def base_file(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single_file(tiny_sd15, tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def case(adapter_file: Path, base_file: Path, tiny_sd15: Path, tmp_path: Path) -> Case:
    return Case(tmp_path, adapter_file, base_file, tiny_sd15)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def spoil_adapter(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        tensors = case.tensors()
        change(tensors)
        case.write(tensors)

    return spoil


def truncated_adapter(case: Case) -> None:
    truncated(case.adapter)


def truncated_base(case: Case) -> None:
    truncated(case.base)


def truncated_folder(case: Case) -> None:
    case.base = Path(shutil.copytree(case.diffusers, case.folder / "folder"))
    truncated(case.base / FILES["vae"])


def corrupt_adapter(case: Case) -> None:
    case.adapter.write_bytes(b"\xff" * 3000)


def pickled_adapter(case: Case) -> None:
    case.adapter = case.folder / "a.pt"
    torch.save({"x": torch.zeros(1)}, case.adapter)


def pickle_that_says_it_is_none(case: Case) -> None:
    torch.save({"x": torch.zeros(1)}, case.adapter)


def pickled_base(case: Case) -> None:
    case.base = case.folder / "base.ckpt"
    torch.save({"x": torch.zeros(1)}, case.base)


def unknown_base(case: Case) -> None:
    case.base = case.folder / "absent.safetensors"


def base_of_another_kind(case: Case) -> None:
    save({"double_blocks.0.x": torch.zeros(1)}, case.base)


def adapter_as_base(case: Case) -> None:
    case.base = Path(shutil.copy(case.adapter, case.folder / "b.safetensors"))


def output_exists(case: Case) -> None:
    save({"x": torch.zeros(1)}, Path(str(case.output[1])))


def output_is_the_adapter(case: Case) -> None:
    case.output = ["--save_to", case.adapter, "--overwrite"]


def output_is_the_base(case: Case) -> None:
    case.output = ["--save_to", case.base, "--overwrite"]


def output_is_a_file_of_the_base(case: Case) -> None:
    case.base = Path(shutil.copytree(case.diffusers, case.folder / "folder"))
    case.output = ["--save_to", case.base / FILES["unet"], "--overwrite"]


def output_folder_is_the_base(case: Case) -> None:
    case.base = Path(shutil.copytree(case.diffusers, case.folder / "folder"))
    (case.folder / "folder" / "merge_report.json").write_text("{}")  # of an earlier merge
    case.output = ["--output_dir", case.base, "--overwrite"]


def output_folder_is_of_other_things(case: Case) -> None:
    (case.folder / "photos").mkdir()
    (case.folder / "photos" / "1.jpg").write_bytes(b"")
    case.output = ["--output_dir", case.folder / "photos", "--overwrite"]


def dora(case: Case) -> None:
    tensors = case.tensors()
    up = tensors[f"{PROJ}.lora_up.weight"]
    case.write({**tensors, f"{PROJ}.dora_scale": torch.ones(up.shape[0], 1, 1, 1)})
    case.words = ["--lora_only"]


def words(*more: object) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        case.words = list(more)

    return spoil


def only_text_encoder_2(tensors: dict[str, Tensor]) -> None:
    old = [name for name in tensors if name.startswith(PROJ)]
    for name in old:
        tensors[name.replace(PROJ, "lora_te2_text_model_encoder_layers_0_mlp_fc1")] = tensors.pop(name)


CASES: dict[str, tuple[Callable[[Case], None], str]] = {
    "truncated_adapter": (truncated_adapter, "a.safetensors is not a whole safetensors file: "),
    "truncated_base": (truncated_base, "is not a whole safetensors file: "),
    "truncated_folder": (truncated_folder, "vae/diffusion_pytorch_model.safetensors ("),
    "corrupt_adapter": (corrupt_adapter, "a.safetensors is not a whole safetensors file: "),
    "pickled_adapter": (pickled_adapter, "a.pt is a pickle, which can run code when it is read"),
    "disguised_pickle": (pickle_that_says_it_is_none, "a.safetensors is not a whole safetensors file: "),
    "pickled_base": (pickled_base, "is a pickle, which can run code when it is read, so it is refused as a base"),
    "unknown_base": (unknown_base, "absent.safetensors does not exist (looked in "),
    "other_base": (base_of_another_kind, "looks like Flux. An SD1.5 or SDXL base model is needed here."),
    "adapter_as_base": (adapter_as_base, "looks like a LoRA adapter. An SD1.5 or SDXL base model is needed here."),
    "nan": (
        spoil_adapter(lambda tensors: tensors[f"{PROJ}.lora_up.weight"].view(-1)[3].fill_(torch.nan)),
        f"up of {PROJ} has values that are not finite; the training has diverged.",
    ),
    "infinite_alpha": (
        spoil_adapter(lambda tensors: tensors[f"{PROJ}.alpha"].fill_(torch.inf)),
        f"alpha of {PROJ} has values that are not finite",
    ),
    "ranks_differ": (
        spoil_adapter(lambda tensors: tensors.update({f"{PROJ}.lora_up.weight": torch.zeros(96, 3, 1, 1)})),
        "whose ranks differ.",
    ),
    "half_missing": (
        spoil_adapter(lambda tensors: tensors.pop(f"{PROJ}.lora_up.weight")),
        f"has no up weight for {PROJ}: it is incomplete.",
    ),
    "other_size": (
        spoil_adapter(lambda tensors: tensors.update({f"{PROJ}.lora_down.weight": torch.zeros(4, 320, 1, 1)})),
        f"1 of 278 LoRA modules have no place in this checkpoint (first: {PROJ}). {PROJ} is for a weight [96, 320, 1, 1], "
        "the base has [96, 96, 1, 1]: it was trained on a model of another size.",
    ),
    "text_encoder_2": (spoil_adapter(only_text_encoder_2), "It looks like an SDXL LoRA on an SD1.5 model."),
    "vera": (
        spoil_adapter(lambda tensors: tensors.update({f"{PROJ}.vera_lambda_b": torch.zeros(4, 4)})),
        "It is VeRA, which is not supported.",
    ),
    "no_lora": (
        spoil_adapter(lambda tensors: (tensors.clear(), tensors.update({"emb_params": torch.zeros(2, 4)}))),
        "It looks like a textual inversion embedding.",
    ),
    "dora_as_lora": (dora, "1 of 278 modules are DoRA"),
    "output_exists": (output_exists, "m.safetensors exists already. Name another output, or replace it with --overwrite."),
    "output_is_the_adapter": (output_is_the_adapter, "a.safetensors is to be read. Name another output."),
    "output_is_the_base": (output_is_the_base, "base.safetensors is to be read. Name another output."),
    "output_in_the_base": (output_is_a_file_of_the_base, "diffusion_pytorch_model.safetensors is to be read."),
    "output_folder_is_the_base": (output_folder_is_the_base, "folder is to be read. Name another output."),
    "output_of_other_things": (output_folder_is_of_other_things, "photos is no earlier merge (it has no merge_report.json), so"),
    "two_ratios": (words("--ratios", 1, 2), "ratios wants one entry per adapter, got 2 for 1 in models."),
    "two_blocks": (words("--block_ratios", "MID=1", "MID=0"), "block_ratios wants one entry per adapter, got 2 for 1"),
    "wrong_block": (words("--block_ratios", "MIDDLE=1"), "block_ratios: 'MIDDLE=1' is not of the form BLOCK=FACTOR"),
    "large_ratio": (words("--ratios", 11), "ratios must lie between -10 and 10, got 11.0."),
    "no_number": (words("--ratios", "nan"), "ratios must lie between -10 and 10, got nan."),
    "alpha_zero": (words("--network_alpha", 0), "network_alpha must be positive, got 0.0."),
    "rank_zero": (words("--lora_only", "--new_rank", 0), "new_rank must be positive, got 0."),
    "rank_of_a_model": (words("--new_rank", 4), "new_rank is for --lora_only."),
    "ema_of_a_file": (words("--use_ema"), "--use_ema picks the averaged weights of a training state, but "),
    "two_outputs": (words("--output_dir", "x"), "save_to and output_dir exclude each other."),
    "checkpoint_twice": (words("--checkpoint", "."), "checkpoint is another word for models; give one of the two."),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_a_sentence_and_exit_code_2(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(case.folder)
    spoil, sentence = CASES[name]
    spoil(case)
    before = {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}
    assert case.run() == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("adapter", "base"), [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_an_adapter_of_the_other_family_is_named(
    adapter: str, base: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = {"sd15": "SD1.5", "sdxl": "SDXL"}
    file = write_whole_adapter(request.getfixturevalue(f"tiny_{adapter}"), tmp_path)
    options = ["--models", file, "--pretrained_model_name_or_path", request.getfixturevalue(f"tiny_{base}")]
    assert run_merge(*options, "--save_to", tmp_path / "m.safetensors") == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert f"It looks like an {titles[adapter]} LoRA on an {titles[base]} model.\n" in said
    assert "LoRA modules have no place in this checkpoint (first: lora_" in said
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--save_to", "m.safetensors"], "The merged model"),
        (["--output_dir", "m", "--save_single_file"], "The merged model"),
        (["--lora_only", "--save_to", "m.safetensors"], "The LoRA"),
    ],
)
def test_too_little_space_is_found_before_anything_is_written(
    words: list[str], what: str, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(case.folder)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    monkeypatch.setattr("library.merging.write.write_tensor_file", None)  # nothing is to be written
    monkeypatch.setattr("library.hashes.file_hash", None)  # nor read whole
    case.output = list(words)
    assert case.run() == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith(f"error: {what} needs ") and "but only 1000 B (1000 bytes) are free there.\n" in said
    assert sorted(path.name for path in case.folder.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_the_space_needed_is_the_size_of_what_is_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("library.merging.write.require_space", lambda path, count, what: needed.append(count))
    assert case.run() == 0
    assert needed == [Path(str(case.output[1])).stat().st_size]


def test_a_folder_that_cannot_be_written_to_is_named(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.folder / "file").write_text("")
    case.output = ["--save_to", case.folder / "file" / "m.safetensors"]
    assert case.run() == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
