"""What rounding leaves of a merge: measured, reported, warned of; and rounding at random, which keeps it on average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.files import read_json
from library.merging.rounding import NEAREST, Arrival, Rounding
from networks.adapter_file import read_adapter
from networks.families import SD15, UNET
from networks.original_names import original_place
from tests.tools.merging import assert_same_tensors, metadata_of, run_merge, single_file

NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def weight_and_change(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight that is in the format, with zeros and the smallest numbers in it, and a change below its steps."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(512, 512, generator=generator)).to(dtype).float()
    weight[:8] = 0.0
    size = 0.01 if dtype.itemsize == 1 else 0.003
    return weight, size * 0.05 * torch.randn(512, 512, generator=generator)


def share_arrived(before: torch.Tensor, change: torch.Tensor, after: torch.Tensor) -> float:
    arrival = Arrival()
    arrival.add(before, change, after)
    return arrival.share


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_takes_one_of_the_two_nearest_numbers_and_keeps_the_mean(dtype: torch.dtype) -> None:
    weight, change = weight_and_change(dtype)
    wanted = weight + change
    rounded = [Rounding(True, seed)(wanted, dtype, "x").float() for seed in range(8)]
    shares = torch.tensor([share_arrived(weight, change, found) for found in rounded])
    assert shares.mean().item() == pytest.approx(1.0, abs=0.02)
    for sign in (1, -1):
        part = wanted.sign() == sign
        assert (torch.stack(rounded).mean(0) - wanted)[part].mean().abs() < 0.02 * change.abs().mean()
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    near, found = wanted.abs().to(dtype).view(bits).int(), rounded[0].abs().to(dtype).view(bits).int()
    sides = (found - near).abs()
    assert sides.max() <= 1 and (rounded[0] * wanted >= 0).all()
    kept = Rounding(True, 0)(weight, dtype, "x")
    assert torch.equal(kept.float(), weight), "what is in the format already stays"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_follows_from_its_seed_and_the_tensor_s_name(dtype: torch.dtype) -> None:
    wanted = sum(weight_and_change(dtype))
    assert isinstance(wanted, torch.Tensor)
    first = Rounding(True, 1)(wanted, dtype, "x").float()
    assert torch.equal(first, Rounding(True, 1)(wanted, dtype, "x").float())
    assert not torch.equal(first, Rounding(True, 2)(wanted, dtype, "x").float())
    assert not torch.equal(first, Rounding(True, 1)(wanted, dtype, "y").float())
    assert torch.equal(NEAREST(wanted, dtype, "x").float(), wanted.to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_in_pieces_is_that_of_the_whole(dtype: torch.dtype) -> None:
    wanted, rounded = sum(weight_and_change(dtype)), Rounding(True, 1).of("x")
    assert isinstance(wanted, torch.Tensor)
    pieces = [rounded(piece, dtype) for piece in wanted.split([3, 500, 9])]
    assert torch.equal(torch.cat(pieces).float(), Rounding(True, 1)(wanted, dtype, "x").float())


def test_rounding_at_random_leaves_alone_what_is_no_narrower_and_what_is_not_finite() -> None:
    values = torch.tensor([0.1, -0.0, torch.nan, torch.inf, -3e38])
    assert torch.equal(Rounding(True)(values, torch.float32, "x").nan_to_num(7), values.nan_to_num(7))
    found = Rounding(True)(values, torch.float16, "x")
    assert found[2].isnan() and found[3].isinf() and found[4].isinf() and torch.signbit(found[1])


def test_the_share_that_arrives_is_the_projection_on_the_change() -> None:
    before, change = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0])
    assert share_arrived(before, change, before + change) == pytest.approx(1.0)
    assert share_arrived(before, change, before) == 0.0
    assert share_arrived(before, change, before + torch.tensor([3.0, 0.0])) == pytest.approx(9 / 25)
    assert share_arrived(before, change, before + torch.tensor([-4.0, 3.0])) == pytest.approx(0.0)
    assert share_arrived(before, torch.zeros(2), before) == 1.0


@pytest.fixture(scope="module")
def bases(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    formats = {"float": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return {name: single_file(tiny_sd15, folder / f"{name}.safetensors", dtype) for name, dtype in formats.items()}


@pytest.mark.parametrize(
    ("base", "ratio"), [("bf16", 0.02), ("fp8", 0.1), ("fp8", 1.0), ("bf16", 1.0), ("float", 0.02)]
)
def test_the_report_says_what_arrived_per_layer_and_in_all(
    base: str,
    ratio: float,
    bases: dict[str, Path],
    adapter_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "merged.safetensors"
    words = ("--models", adapter_file, "--pretrained_model_name_or_path", bases[base], "--save_to", output)
    assert run_merge(*words, "--ratios", ratio) == 0
    said = capsys.readouterr().out
    report = read_json(tmp_path / "merged_merge_report.json")
    before, after = load_file(bases[base]), load_file(output)
    modules = read_adapter(adapter_file).modules
    assert len(report["changes"]) == len(modules)
    whole = arrived = 0.0
    for change in report["changes"]:
        place = original_place(SD15, change["component"], change["key"]).key
        target = next(t for t in modules if (t.component, f"{t.path}.weight") == (change["component"], change["key"]))
        weight = before[place].float().reshape(after[place].shape)
        delta = ratio * modules[target].delta(weight)
        moved = after[place].float() - weight
        assert change["arrived"] == pytest.approx(float((moved * delta).sum() / delta.square().sum()), abs=1e-3)
        whole, arrived = whole + float(delta.square().sum()), arrived + float((moved * delta).sum())
    assert report["arrived"] == pytest.approx(arrived / whole, abs=1e-3)
    assert f"{report['arrived']:.1%} of the change arrived after rounding (least " in said
    below = [change for change in report["changes"] if change["arrived"] < 0.9]
    assert bool(below) == ("warning: less than 90% of the change arrived in " in said)
    if below:
        assert (
            f"in {len(below)} weight" in said and "--rounding stochastic" in said and "--save_precision float" in said
        )
        assert (
            f"| {min(below, key=lambda change: change['arrived'])['arrived']:.1%} |"
            in (tmp_path / "merged_merge_report.md").read_text()
        )


def test_stochastic_rounding_brings_a_small_change_into_a_narrow_base_and_can_be_repeated(
    bases: dict[str, Path], adapter_file: Path, tmp_path: Path
) -> None:
    words = ("--models", adapter_file, "--pretrained_model_name_or_path", bases["bf16"], "--ratios", 0.02)
    at_random = ("--rounding", "stochastic", "--rounding_seed")
    for name, more in (("near", ()), ("a", (*at_random, 3)), ("again", (*at_random, 3)), ("b", (*at_random, 4))):
        assert run_merge(*words, "--save_to", tmp_path / f"{name}.safetensors", *more) == 0
    reports = {name: read_json(tmp_path / f"{name}_merge_report.json") for name in ("near", "a")}
    assert reports["near"]["arrived"] < 0.8 and reports["a"]["arrived"] == pytest.approx(1, abs=0.05)
    assert reports["a"]["precision"] == "as the base, rounded stochastically (seed 3)"
    assert "rounded stochastically (seed 3)" in metadata_of(tmp_path / "a.safetensors")["repa_merge"]
    assert "rounding" not in metadata_of(tmp_path / "near.safetensors")["repa_merge"]
    files = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("near", "a", "again", "b")}
    assert_same_tensors(files["a"], files["again"])
    place = original_place(SD15, UNET, "mid_block.attentions.0.proj_in.weight").key
    assert not torch.equal(files["a"][place], files["b"][place])
    kept = [name for name in files["near"] if name.startswith("first_stage_model.")]
    assert all(torch.equal(files["a"][name], files["near"][name]) for name in kept)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora_only", "--rounding", "stochastic"), "rounding is of merged models; with lora_only there is none."),
        (("--rounding_seed", 3), "rounding_seed is for --rounding stochastic."),
        (("--rounding", "up"), "rounding"),
    ],
)
def test_bad_options_of_rounding_are_refused(
    words: tuple[object, ...], said: str, adapter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_merge("--models", adapter_file, "--save_to", tmp_path / "x.safetensors", *words) == 2
    assert said in capsys.readouterr().err


def test_the_second_text_encoder_s_tensors_are_counted_as_they_are_written(tiny_sdxl: Path, tmp_path: Path) -> None:
    from tests.tools.merging import write_whole_adapter

    lora = write_whole_adapter(tiny_sdxl, tmp_path)
    file = single_file(tiny_sdxl, tmp_path / "xl.safetensors")
    whole = {"unet": 1680, "vae": 248, "text_encoder": 196}
    stacked = len([name for name in load_file(file) if name.startswith("conditioner.embedders.1.model.")])
    apart = len(load_file(tiny_sdxl / "text_encoder_2/model.safetensors"))
    assert stacked < apart
    for base, counted in ((file, stacked), (tiny_sdxl, apart)):
        for words, written in (
            (("--save_to", tmp_path / "out.safetensors"), stacked),
            (("--output_dir", tmp_path / "out"), apart),
        ):
            assert run_merge("--models", lora, "--pretrained_model_name_or_path", base, *words, "--overwrite") == 0
            name = "out/merge_report.json" if "--output_dir" in words else "out_merge_report.json"
            counts = {
                part["name"]: (part["keys_before"], part["keys_after"])
                for part in read_json(tmp_path / name)["components"]
            }
            assert counts["text_encoder_2"] == (counted, written)
            assert counts["vae"] == (whole["vae"], whole["vae"])
