"""An autoencoder without a model around it, as `--vae` takes it: in every form the same bits as the base's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.files import file_hash, read_json, write_json
from library.models.base_family import family_of
from library.models.fingerprint import weight_fingerprint
from library.models.load import load_vae
from library.models.locate import BaseLocation
from library.models.lone_vae import locate_vae, vae_status
from networks.families import SD15, SDXL, VAE
from tests.test_locate import hub_cache, hub_of
from tests.tools.generating import run
from tests.tools.infotext import read_png
from tests.tools.ldm_layout import ldm_checkpoint
from tests.tools.network_runs import NetworkSetting, adapter, metadata
from tests.tools.runs import RepaSetting, assert_equal_states

WEIGHTS = "diffusion_pytorch_model.safetensors"
ID = "someone/a-vae"
FIRST = "first_stage_model."


def written(tensors: dict[str, Tensor], path: Path) -> str:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return str(path)


def original(base: Path, nested: str = "") -> dict[str, Tensor]:
    found = {name: value for name, value in ldm_checkpoint(base).items() if name.startswith(FIRST)}
    return {nested + name.removeprefix(FIRST): value for name, value in found.items()}


def original_file(base: Path, folder: Path) -> str:
    return written(original(base), folder / "sdxl_vae.safetensors")


def nested_file(base: Path, folder: Path) -> str:
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4)}
    return written(original(base, FIRST) | loss, folder / "nested.safetensors")


def checkpoint_file(base: Path, folder: Path) -> str:
    return written(original(base, "state_dict."), folder / "checkpoint.safetensors")


def diffusers_file(base: Path, folder: Path) -> str:
    return str(shutil.copy(base / VAE / WEIGHTS, folder / "diffusers.safetensors"))


def diffusers_folder(base: Path, folder: Path) -> str:
    return str(shutil.copytree(base / VAE, folder / "vae-ft"))


def fp16_folder(base: Path, folder: Path) -> str:
    there = Path(shutil.copytree(base / VAE, folder / "fp16"))
    (there / WEIGHTS).rename(there / "diffusion_pytorch_model.fp16.safetensors")
    return str(there)


def file_of_folder(base: Path, folder: Path) -> str:
    return str(Path(diffusers_folder(base, folder)) / WEIGHTS)


def folder_around(base: Path, folder: Path) -> str:
    shutil.copytree(base / VAE, folder / "around" / VAE)
    return str(folder / "around")


def hub_id(base: Path, folder: Path) -> str:
    hub_cache(folder / "hub", ID, base / VAE)
    return ID


Form = Callable[[Path, Path], str]
FORMS: list[Form] = [
    original_file, nested_file, checkpoint_file, diffusers_file, diffusers_folder, fp16_folder, file_of_folder, folder_around,
    hub_id,
]  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@every_form
@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda family: family.key)
def test_every_form_is_the_bases_own_autoencoder(
    form: Form, family: object, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    base = tiny_sd15 if family is SD15 else tiny_sdxl
    name = form(base, tmp_path)
    assert vae_status(name) is None
    location = locate_vae(name)
    served = family_of(BaseLocation("base", base))
    found, own = load_vae(location, serves=served), load_vae(str(base), families=(served,))
    assert found.config.scaling_factor == own.config.scaling_factor == served.scaling_factor
    assert {
        key: value for key, value in found.state_dict().items() if not torch.equal(value, own.state_dict()[key])
    } == {}
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = [vae.encode(pixels).latent_dist.mean for vae in (found, own)]
        assert torch.equal(*latents) and torch.equal(*(vae.decode(latents[0]).sample for vae in (found, own)))
    assert weight_fingerprint(location, VAE, tmp_path) == file_hash(location.path)


@pytest.mark.parametrize("form", [original_file, diffusers_folder, hub_id], ids=lambda form: form.__name__)
def test_generate_draws_the_same_picture_and_names_it(form: Form, tiny_sdxl: Path, tmp_path: Path) -> None:
    name, base = form(tiny_sdxl, tmp_path), ["--pretrained_model_name_or_path", tiny_sdxl, "--seed", 3]
    assert run(*base, "--output", tmp_path / "own.png") == EXIT_OK
    assert run(*base, "--vae", name, "--dry_run") == EXIT_OK
    assert run(*base, "--vae", name, "--output", tmp_path / "lone.png") == EXIT_OK
    with Image.open(tmp_path / "own.png") as own, Image.open(tmp_path / "lone.png") as lone:
        assert own.tobytes() == lone.tobytes()
    expected = {original_file: "sdxl_vae.safetensors", diffusers_folder: "vae-ft", hub_id: ID}[form]
    assert read_png(tmp_path / "lone.png").vae == expected


@pytest.mark.parametrize("form", [original_file, diffusers_file, diffusers_folder], ids=lambda form: form.__name__)
def test_training_with_it_is_training_without_and_its_hash_is_kept(
    form: Form, network_setting: NetworkSetting, tiny_sd15: Path, tmp_path: Path
) -> None:
    name = form(tiny_sd15, tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    options = {
        **network_setting.quick, "max_train_epochs": 1, "cache_dir": tmp_path / "caches",
        "sample_prompts": tmp_path / "prompts.txt", "sample_every_n_epochs": 1,
    }  # fmt: skip
    for output, more in (("own", {}), ("lone", {"vae": name})):
        assert network_setting.train(tmp_path / output, **options, **more) == EXIT_OK
    found, expected = (adapter(tmp_path / output / "mio.safetensors") for output in ("lone", "own"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    (lone,), (own,) = ((tmp_path / output / "sample").glob("*.png") for output in ("lone", "own"))
    with Image.open(lone) as one, Image.open(own) as other:
        assert one.tobytes() == other.tobytes()
    said = metadata(tmp_path / "lone" / "mio.safetensors")
    assert said["ss_vae_name"] == Path(name).name
    assert said.get("ss_new_vae_hash") == (file_hash(Path(name)) if Path(name).is_file() else None)


def test_train_repa_with_it_is_train_repa_without(repa_setting: RepaSetting, tiny_sd15: Path, tmp_path: Path) -> None:
    changes = {"max_train_steps": 2, "cache_dir": tmp_path / "caches"}
    assert repa_setting.train(tmp_path / "own", **changes) == EXIT_OK
    changes = {"max_train_steps": 2, "cache_dir": tmp_path / "others", "vae": original_file(tiny_sd15, tmp_path)}
    assert repa_setting.train(tmp_path / "lone", **changes) == EXIT_OK
    (own,), (lone,) = (sorted((tmp_path / name).glob("step_*")) for name in ("own", "lone"))
    assert_equal_states(own, lone)


def test_scaled_latents_of_one_family_are_not_taken_for_another(
    repa_setting: RepaSetting, tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"max_train_steps": 1, "cache_dir": tmp_path / "caches", "vae": original_file(tiny_sd15, tmp_path)}
    assert repa_setting.train(tmp_path / "one", **changes) == EXIT_OK
    changes["pretrained_model_name_or_path"] = tiny_sdxl
    assert repa_setting.train(tmp_path / "two", **changes) == EXIT_BAD_INPUT
    assert "scaling_factor" in capsys.readouterr().err


def test_the_scaling_factor_is_the_configurations_or_else_the_families(
    tiny_sd15: Path, tmp_path: Path, network_setting: NetworkSetting
) -> None:
    file, folder = locate_vae(original_file(tiny_sd15, tmp_path)), Path(diffusers_folder(tiny_sd15, tmp_path))
    assert [load_vae(file, serves=family).config.scaling_factor for family in (SD15, SDXL)] == [0.18215, 0.13025]
    config = read_json(folder / "config.json")
    for said, expected in ((0.5, 0.5), (None, SDXL.scaling_factor)):
        config = {key: value for key, value in config.items() if key != "scaling_factor"}
        write_json(folder / "config.json", config if said is None else {**config, "scaling_factor": said})
        assert load_vae(locate_vae(str(folder)), serves=SDXL).config.scaling_factor == expected
    write_json(folder / "config.json", {**config, "scaling_factor": 0.25})
    built = network_setting.build(**{**network_setting.quick, "vae": folder, "cache_dir": tmp_path / "caches"})
    assert built.task.scaling_factor == 0.25
    built.close()
    built.context.close()


def test_one_of_other_latents_is_refused_by_name(
    tiny_sd15: Path, network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = original(tiny_sd15)
    width = tensors["decoder.conv_in.weight"].shape[0]
    wide = written(tensors | {"decoder.conv_in.weight": torch.zeros(width, 16, 3, 3)}, tmp_path / "ae.safetensors")
    sentence = f"{wide} is an autoencoder of 16 latent channels, and SD1.5 has 4"
    base = ["--pretrained_model_name_or_path", tiny_sd15, "--vae", wide]
    for more in (["--dry_run"], ["--output", tmp_path / "x.png"]):
        assert run(*base, *more) == EXIT_BAD_INPUT
        assert sentence in capsys.readouterr().err
    for extra in (["--dry_run"], []):
        assert network_setting.train(tmp_path / "out", *extra, **network_setting.quick, vae=wide) == EXIT_BAD_INPUT
        assert sentence in capsys.readouterr().err


def test_what_is_no_autoencoder_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = Path(diffusers_folder(tiny_sd15, tmp_path))
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "_class_name": "AutoencoderTiny"})
    with pytest.raises(
        UserError, match="config.json describes a AutoencoderTiny. An AutoencoderKL is needed for --vae"
    ):
        locate_vae(str(folder))
    write_json(folder / "config.json", config)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"is incomplete: {WEIGHTS} missing"):
        locate_vae(str(folder))
    shutil.copy(tiny_sd15 / VAE / WEIGHTS, folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is incomplete: config.json missing"):
        locate_vae(str(folder))
    tiny = written(
        {"encoder.layers.0.weight": torch.zeros(1), "decoder.layers.0.weight": torch.zeros(1)},
        tmp_path / "t.safetensors",
    )
    with pytest.raises(
        UserError, match="no autoencoder of Stable Diffusion's kind .*decoder.conv_in.weight is missing"
    ):
        locate_vae(tiny)
    tensors = original(tiny_sd15)
    tensors.pop("decoder.conv_out.weight")
    torn = written(tensors, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match="does not fit a AutoencoderKL of 248 tensors: 1 missing"):
        load_vae(locate_vae(torn), serves=SD15)


def test_as_a_base_it_is_refused_with_a_hint(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in (original_file, nested_file, diffusers_file, diffusers_folder):
        assert run("--pretrained_model_name_or_path", form(tiny_sd15, tmp_path), "--dry_run") == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert "VAE alone" in error and "to --vae" in error


def test_of_a_hub_id_that_is_not_here_only_the_autoencoder_is_fetched(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(diffusers_folder(tiny_sd15, tmp_path))
    files = ["README.md", "config.json", WEIGHTS, "diffusion_pytorch_model.bin", "sdxl_vae.safetensors"]
    asked = hub_of(files, folder, monkeypatch)
    assert "is not on this machine" in str(vae_status(ID))
    location = locate_vae(ID)
    assert set(asked[ID]) == {"config.json", WEIGHTS} and location.path == folder / WEIGHTS and location.name == ID
    asked = hub_of(["model_index.json", "vae/config.json", f"vae/{WEIGHTS}"], tiny_sd15, monkeypatch)
    assert locate_vae("someone/base").path == tiny_sd15 and "vae/config.json" in asked["someone/base"]
