"""What an adapter file of train_network.py says of its training, and what becomes of files when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.base_family import family_of
from library.models.locate import locate_base
from library.options.kohya.training import NetworkOutputOptions
from library.options.network import parse_network_options
from library.training.metadata import AdapterMetadata
from library.training.models import network_spec
from library.training.patience import validation_due
from library.training.pictures import collect_pictures
from library.training.plan import Plan, make_order, make_plan
from library.training.saving import KohyaSaving
from networks.adapter_alphas import NETWORK_SPEC_KEY
from tests.tools.network_runs import NetworkSetting, draw_pictures, metadata, names
from tests.tools.network_runs import adapter as tensors_of

# kohya's sd-scripts, train_network.py: the entries of every file.
ALWAYS = """
session_id training_started_at output_name learning_rate text_encoder_lr unet_lr num_train_images num_validation_images
num_reg_images num_batches_per_epoch num_epochs gradient_checkpointing gradient_accumulation_steps max_train_steps
lr_warmup_steps lr_scheduler network_module network_dim network_alpha network_dropout mixed_precision full_fp16 v2
base_model_version clip_skip max_token_length cache_latents seed lowram noise_offset multires_noise_iterations
multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment sd_scripts_commit_hash optimizer
max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma debiased_estimation noise_offset_random_strength
ip_noise_gamma_random_strength loss_type huber_schedule huber_scale huber_c fp8_base fp8_base_unet validation_seed
validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps resize_interpolation
training_finished_at steps epoch sd_model_name datasets tag_frequency dataset_dirs
""".split()  # noqa: SIM905
# Where there is one data set.
OF_ONE = """
batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket
bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens reg_dataset_dirs bucket_info
""".split()  # noqa: SIM905
NEEDED = {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}


def said(setting: NetworkSetting, *words: str, tensors: Any = None, **changes: object) -> dict[str, str]:
    """The metadata that a run with these options would write after its second step."""
    argv = setting.argv(setting.folder / "unused", *words, **changes)
    options = parse_network_options(argv, prog="train_network.py", description=None)
    base = locate_base(str(options.model.pretrained_model_name_or_path))
    family, data = family_of(base), collect_pictures(options, base)
    plan = make_plan(make_order(data, options), options.training, options.optimizer)
    described = AdapterMetadata(options, plan, data, family, network_spec(options, family, None), "epsilon", base.path)
    return described.at(2, {"x": torch.zeros(2)} if tensors is None else tensors, "mio", "2026-01-02T03:04:05")


def test_every_entry_of_kohyas_is_there_in_its_form(finished_network: Path) -> None:
    found = metadata(finished_network / "mio.safetensors")
    assert [name for name in ALWAYS + OF_ONE if f"ss_{name}" not in found] == []
    expected = {
        "output_name": "mio", "learning_rate": "0.01", "text_encoder_lr": "None", "unet_lr": "None", "num_train_images": "6",
        "num_validation_images": "0", "num_reg_images": "0", "num_batches_per_epoch": "4", "num_epochs": "2",
        "gradient_checkpointing": "False", "gradient_accumulation_steps": "2", "max_train_steps": "4",
        "lr_warmup_steps": "0", "lr_scheduler": "cosine", "network_module": "networks.lora", "network_dim": "2",
        "network_alpha": "1.0", "network_dropout": "0.1", "mixed_precision": "no", "v2": "False",
        "base_model_version": "sd_v1", "clip_skip": "None", "max_token_length": "None", "seed": "42", "steps": "4",
        "epoch": "2", "optimizer": "torch.optim.adamw.AdamW", "caption_dropout_rate": "0.2", "loss_type": "l2",
        "resolution": "(96, 96)", "flip_aug": "True", "batch_size_per_device": "2", "sd_model_name": "tiny-sd15",
        "enable_bucket": "True", "min_bucket_reso": "64", "max_bucket_reso": "192", "validation_split": "0.0",
    }  # fmt: skip
    assert {name: found[f"ss_{name}"] for name in expected} == expected
    assert float(found["ss_training_started_at"]) < float(found["ss_training_finished_at"])
    assert found["ss_session_id"].isdecimal()
    first = metadata(finished_network / "mio-000001.safetensors")
    assert (first["ss_steps"], first["ss_epoch"], first["ss_output_name"]) == ("2", "1", "mio-000001")
    assert first["ss_session_id"] == found["ss_session_id"]


def test_json_entries_are_kohyas(finished_network: Path) -> None:
    found = {name: json.loads(value) for name, value in metadata(finished_network / "mio.safetensors").items()
             if name in ("ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info")}  # fmt: skip
    tags = {"mio": 6, "a red cat": 2, "on grass": 3, "at sea": 3, "a blue cat": 2, "a green cat": 2}
    assert found["ss_tag_frequency"] == {"mio": tags}
    assert found["ss_dataset_dirs"] == {"mio": {"n_repeats": 1, "img_count": 6}}
    buckets = {
        "0": {"resolution": [64, 128], "count": 1}, "1": {"resolution": [96, 96], "count": 3},
        "2": {"resolution": [128, 64], "count": 2},
    }  # fmt: skip
    assert found["ss_bucket_info"] == {"buckets": buckets, "mean_img_ar_error": 0.0}
    (dataset,) = found["ss_datasets"]
    (subset,) = dataset.pop("subsets")
    assert dataset == {
        "is_dreambooth": True, "batch_size_per_device": 2, "num_train_images": 6, "num_reg_images": 0,
        "resolution": [96, 96], "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 192,
        "tag_frequency": {"mio": tags}, "bucket_info": found["ss_bucket_info"], "resize_interpolation": None,
    }  # fmt: skip
    kohyas = {
        "img_count": 6, "num_repeats": 1, "color_aug": False, "flip_aug": True, "random_crop": False,
        "shuffle_caption": True, "keep_tokens": 0, "keep_tokens_separator": None, "secondary_separator": None,
        "enable_wildcard": False, "caption_prefix": None, "caption_suffix": None, "resize_interpolation": None,
        "image_dir": "mio", "class_tokens": None, "is_reg": False,
    }  # fmt: skip
    assert {name: subset[name] for name in kohyas} == kohyas


def test_the_hash_is_that_of_the_written_tensors(finished_network: Path) -> None:
    path = finished_network / "mio.safetensors"
    found = metadata(path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert re.fullmatch("[0-9a-f]{8}", found["sshs_legacy_hash"])


def test_modelspec_says_what_was_trained(
    finished_network: Path, network_setting: NetworkSetting, sdxl_setting: NetworkSetting
) -> None:
    found = metadata(finished_network / "mio.safetensors")
    spec = {name.removeprefix("modelspec."): value for name, value in found.items() if name.startswith("modelspec.")}
    date = spec.pop("date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", date)
    assert spec == {
        "sai_model_spec": "1.0.1", "architecture": "stable-diffusion-v1/lora", "implementation": "diffusers",
        "title": "mio", "resolution": "96x96", "prediction_type": "epsilon",
    }  # fmt: skip
    words = (
        "--metadata_title T --metadata_author A --metadata_tags a,b --metadata_trigger_phrase mio --min_timestep 100"
    )
    more = said(sdxl_setting, *words.split(), clip_skip=2, training_comment="hello")
    expected = {
        "title": "T", "author": "A", "tags": "a,b", "trigger_phrase": "mio", "timestep_range": "100,1000",
        "encoder_layer": "2", "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
    }  # fmt: skip
    assert {name: more[f"modelspec.{name}"] for name in expected} == expected
    assert more["ss_training_comment"] == "hello" and more["ss_base_model_version"] == "sdxl_base_v1-0"


def test_arguments_of_the_network_are_json_of_strings(network_setting: NetworkSetting) -> None:
    found = said(network_setting, network_args="conv_dim=4 conv_alpha=2 rank_dropout=0.1", network_dropout=0.2)
    expected = {"conv_dim": "4", "conv_alpha": "2", "rank_dropout": "0.1", "dropout": 0.2}
    assert json.loads(found["ss_network_args"]) == expected


def test_folders_of_one_name_are_numbered_and_tags_of_a_folder_count_once(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    """A second folder `mio`, `mio2`, and the first once more at another resolution."""
    for name in ("a/mio", "mio2"):
        draw_pictures(tmp_path / name, ((96, 96),))
    more = "".join(f"[[datasets.subsets]]\nimage_dir = '{tmp_path / name}'\n" for name in ("mio2", "a/mio"))
    again = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{network_setting.data}'\n"
    found = said(network_setting, dataset_config=network_setting.dataset("named", more=more + again))
    images = {name: one["img_count"] for name, one in json.loads(found["ss_dataset_dirs"]).items()}
    assert images == {"mio": 6, "mio2": 1, "mio (2)": 1, "mio (3)": 6}
    assert json.loads(found["ss_tag_frequency"])["mio"]["mio"] == 7
    assert "ss_resolution" not in found and len(json.loads(found["ss_datasets"])) == 2


def test_little_is_said_on_request(network_setting: NetworkSetting) -> None:
    found = said(network_setting, "--no_metadata", network_args="conv_dim=4")
    own = {name for name in found if name.startswith("ss_")}
    assert own == NEEDED | {"ss_network_args"} and found["sshs_model_hash"] and found["modelspec.resolution"] == "96x96"


def test_base_and_vae_are_told_by_their_hashes(
    network_setting: NetworkSetting, tiny_sd15: Path, tmp_path: Path
) -> None:
    from tests.tools.ldm_layout import ldm_checkpoint

    base, vae = tmp_path / "v1-5.safetensors", tmp_path / "vae.safetensors"
    save_file({name: value.contiguous() for name, value in ldm_checkpoint(tiny_sd15).items()}, base)
    save_file(load_file(tiny_sd15 / "vae" / "diffusion_pytorch_model.safetensors"), vae)
    found = said(network_setting, pretrained_model_name_or_path=base, vae=vae)
    for what, path in (("sd_model", base), ("vae", vae)):
        raw = path.read_bytes()
        assert found[f"ss_{what}_name"] == path.name
        assert found[f"ss_{what}_hash"] == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
        assert found[f"ss_new_{what}_hash"] == hashlib.sha256(raw).hexdigest()


def test_save_precision_is_that_of_the_file_and_training_stays_float32(
    network_setting: NetworkSetting, tmp_path: Path
) -> None:
    options = {**network_setting.quick, "max_train_epochs": 1, "save_state": ""}
    assert network_setting.train(tmp_path, **options, save_precision="bf16", save_n_epoch_ratio=1) == 0
    dtypes = {value.dtype for name, value in tensors_of(tmp_path / "mio.safetensors").items() if "lora_" in name[-20:]}
    assert dtypes == {torch.bfloat16}
    (state,) = tmp_path.glob("*-state/lora_unet.safetensors")
    assert {value.dtype for value in load_file(state).values()} == {torch.float32}


PLAN = Plan(8, 2, 1, 1, steps_per_epoch=4, last_step=40, warmup_steps=0)


def saving(**options: Any) -> KohyaSaving:
    return KohyaSaving(NetworkOutputOptions(output_name="mio", **options))


def test_adapters_are_due_by_epochs_steps_or_number() -> None:
    def due(**options: Any) -> list[int]:
        return [step for step in range(1, 41) if saving(**options).adapters(step, step == 40, PLAN)]

    assert due() == [40]
    assert due(save_every_n_epochs=4) == [16, 32, 40]
    assert due(save_n_epoch_ratio=3) == [12, 24, 36, 40]
    assert due(save_n_epoch_ratio=99) == list(range(4, 41, 4))
    assert due(save_every_n_steps=15, save_every_n_epochs=5) == [15, 20, 30, 40]


def test_a_last_step_that_is_due_is_saved_under_its_own_name_too() -> None:
    """As in kohya: the step's file, and its state with save_state; save_state_on_train_end is about the last one alone."""
    kept = saving(save_every_n_steps=20)
    assert kept.adapters(40, True, PLAN) == ["mio-step00000040", "mio"] and kept.states(40, True, False, PLAN) == []
    assert saving(save_every_n_steps=15).adapters(40, True, PLAN) == ["mio"]
    kept = saving(save_every_n_steps=20, save_state=True)
    assert kept.states(40, True, False, PLAN) == ["mio-step00000040-state", "mio-state"]
    kept = saving(save_every_n_steps=20, save_state_on_train_end=True)
    assert kept.states(40, True, False, PLAN) == ["mio-state"] and kept.states(20, False, False, PLAN) == []


def test_the_last_step_removes_old_steps_and_no_epochs(tmp_path: Path) -> None:
    there = [
        "mio-000008.safetensors",
        "mio-000009.safetensors",
        "mio-step00000020.safetensors",
        "mio-step00000030.safetensors",
    ]
    for name in there:
        (tmp_path / name).write_text("")
    changes = {"save_every_n_epochs": 1, "save_last_n_epochs": 2, "save_every_n_steps": 10, "save_last_n_steps": 10}
    saving(output_dir=tmp_path, **changes).prune(40, True, None, PLAN)
    assert set(there) - set(names(tmp_path)) == {"mio-step00000020.safetensors"}


def test_old_files_go_as_kohyas_do(tmp_path: Path) -> None:
    """By distance in steps and epochs; the newest state stays, and so does what another run is called."""
    there = [f"mio-00000{n}{ending}" for n in (2, 4, 6) for ending in (".safetensors", "-ema.safetensors", "-state")]
    there += [f"mio-step{n:08d}.safetensors" for n in (6, 12, 18, 24)] + ["mio-000002.txt", "mio-2-000002.safetensors"]
    for name in there:
        (tmp_path / name).mkdir() if name.endswith("-state") else (tmp_path / name).write_text("")
    changes = {"save_every_n_epochs": 2, "save_last_n_epochs": 2, "save_every_n_steps": 6, "save_last_n_steps": 11}
    kept = saving(output_dir=tmp_path, save_state=True, save_last_n_epochs_state=1, **changes)
    kept.prune(24, False, tmp_path / "mio-000002-state", PLAN)
    assert set(there) - set(names(tmp_path)) == {
        "mio-000002.safetensors", "mio-000002-ema.safetensors", "mio-000004-state", "mio-step00000006.safetensors",
        "mio-step00000012.safetensors",
    }  # fmt: skip


def test_validation_is_due_by_steps_epochs_or_both() -> None:
    def due(steps: int | None, epochs: int | None) -> list[int]:
        return [step for step in range(1, 13) if validation_due(step, steps, epochs, 4)]

    assert due(None, None) == [4, 8, 12] and due(5, None) == [5, 10] and due(None, 2) == [8] and due(5, 2) == [5, 8, 10]


def test_a_full_disk_keeps_the_last_good_file_and_ends_with_code_1(
    network_setting: NetworkSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**network_setting.quick, "save_every_n_epochs": 1, "save_state": "", "max_train_epochs": 3}
    (tmp_path / "mio.safetensors").write_bytes(b"an adapter of before")
    import library.training.checkpoints as checkpoints

    original, calls = checkpoints.save_file, []

    def full(tensors: Any, path: Path, **more: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a")
            raise OSError(28, "No space left on device")
        original(tensors, path, **more)

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert network_setting.train(tmp_path, **options) == 1
    said = capsys.readouterr().err
    assert "mio-000002.safetensors could not be written: No space left on device" in said and said.count("\n") == 1
    assert [name for name in names(tmp_path) if name.startswith(("mio", "."))] == [
        "mio-000001-state", "mio-000001.safetensors", "mio.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "mio.safetensors").read_bytes() == b"an adapter of before"
    monkeypatch.undo()
    assert network_setting.train(tmp_path, **options) == 0
    assert "resuming from" in capsys.readouterr().out and len(tensors_of(tmp_path / "mio.safetensors")) > 100


def test_bad_input_is_one_sentence_before_anything_is_cached(
    network_setting: NetworkSetting, sdxl_setting: NetworkSetting, tiny_sd15: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for setting, name in ((network_setting, "sd15"), (sdxl_setting, "sdxl")):
        built = setting.build(network_train_unet_only="")
        version = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[name]
        save_file(built.task.network.tensors(), tmp_path / f"{name}.safetensors", {"ss_base_model_version": version})
        built.close()
    torch.save({"state_dict": {}}, tmp_path / "base.ckpt")
    capsys.readouterr()
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").write_text("")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --ar 3\n")
    sdxl_adapter, sd15_adapter = tmp_path / "sdxl.safetensors", tmp_path / "sd15.safetensors"
    unet_only = {"network_train_unet_only": ""}
    cases: list[tuple[NetworkSetting, dict[str, object], str]] = [
        (network_setting, {"network_weights": sdxl_adapter}, "network_weights {} is for SDXL, and the base model is SD1.5"),
        (sdxl_setting, {"network_weights": sd15_adapter}, "network_weights {} is for SD1.5, and the base model is SDXL"),
        (network_setting, {"base_weights": sdxl_adapter}, "base_weights {} is for SDXL, and the base model is SD1.5"),
        (network_setting, {"network_weights": sd15_adapter, "network_dim": 3, **unet_only}, "of rank 2 where 3 is to be trained"),
        (network_setting, {"network_weights": sd15_adapter}, "--network_train_unet_only, or --dim_from_weights"),
        (network_setting, {"pretrained_model_name_or_path": tmp_path / "base.ckpt"}, "base.ckpt"),
        (network_setting, {"output_name": "a/b"}, "output_name is a file name without its ending and must have no path separators"),
        (network_setting, {"output_dir": tmp_path / "file" / "out"}, "file"),
        (network_setting, {"optimizer_type": "AdamV"}, "AdamV is unknown (did you mean"),
        (network_setting, {"text_encoder_lr": "1e-4 1e-5"}, "has 2 values, and the base has 1 text encoder"),
        (sdxl_setting, {"clip_skip": 1}, "clip_skip 1 cannot be used: SDXL was trained on layer 2 of its text encoders"),
        (network_setting, {"sample_prompts": prompts}, "--ar is no switch of a prompt"),
        (network_setting, {"no_cache_latents": ""}, "no_cache_latents"),
        (network_setting, {"shuffle_caption": "", "cache_text_encoder_outputs": "", **unet_only}, "encodes each caption once"),
    ]  # fmt: skip
    for setting, changes, words in cases:
        output = {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "caches", **changes}
        assert setting.train(output.pop("output_dir"), **output) == 2, words
        found = capsys.readouterr().err
        given = next((str(changes[name]) for name in ("network_weights", "base_weights") if name in changes), "")
        assert found.startswith("error: ") and words.format(given) in found and found.count("\n") == 1, found
    assert not (tmp_path / "out").exists() and not list((tmp_path / "caches").glob("*_*"))


def test_the_networks_own_description_is_in_its_states(finished_network: Path) -> None:
    from safetensors import safe_open

    with safe_open(finished_network / "mio-state" / "lora_unet.safetensors", "pt") as file:
        assert json.loads(file.metadata()[NETWORK_SPEC_KEY])["rank"] == 2
