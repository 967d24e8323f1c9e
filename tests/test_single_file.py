"""Original single files of SD1.5 and SDXL: read, they are the folder's models to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.errors import UserError
from library.files import read_json
from library.models import single_file
from library.models.configs import configs_of
from library.models.load import load_scheduler_config, load_text_encoders, load_unet, load_vae
from library.models.sdxl_configs import SDXL_SCHEDULER
from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, Family
from tests.tools.ldm_layout import ldm_checkpoint, original_tensors

BOTH = tuple(FAMILIES.values())
BALLAST = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelout2weight": torch.zeros(4, 32, 3, 3),
    "alphas_cumprod": torch.ones(1000),
    "denoiser.sigmas": torch.ones(1000),
}
"""What real files also carry and nobody needs."""


class Setting(NamedTuple):
    family: Family
    folder: Path
    tensors: dict[str, Tensor]
    file: Path

    @property
    def first_text(self) -> str:
        return self.family.original[TEXT_ENCODER]

    def saved(self, path: Path, changes: dict[str, Tensor]) -> Path:
        return save(self.tensors | changes, path)


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def setting(family: Family, folder: Path, where: Path) -> Setting:
    tensors = ldm_checkpoint(folder)
    ballast = {f"{family.original[TEXT_ENCODER]}text_model.embeddings.position_ids": torch.arange(77)[None], **BALLAST}
    if family == SDXL:
        ballast["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    return Setting(family, folder, tensors, save(tensors | ballast, where / f"{family.key}.safetensors"))


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(SDXL, tiny_sdxl, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(SD15, tiny_sd15, tmp_path_factory.mktemp("single"))


@pytest.fixture(params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest) -> Setting:
    found: Setting = request.getfixturevalue(request.param)
    return found


def published(family: Family) -> dict[str, dict[str, Tensor]]:
    """Component -> the tensors of the real model, without memory."""
    configs = configs_of(family)
    kinds = {TEXT_ENCODER: CLIPTextModel, TEXT_ENCODER_2: CLIPTextModelWithProjection}
    with torch.device("meta"):
        models = {
            UNET: UNet2DConditionModel.from_config(configs.unet),
            VAE: AutoencoderKL.from_config(configs.vae),
            **{part: kinds[part](CLIPTextConfig(**config)) for part, config in configs.text_encoders.items()},
        }
    return {part: model.state_dict() for part, model in models.items()}


def test_the_published_models_have_the_known_numbers_of_tensors() -> None:
    counts = {family.key: [len(tensors) for tensors in published(family).values()] for family in BOTH}
    assert counts == {"sd15": [686, 248, 196], "sdxl": [1680, 248, 196, 517]}
    assert sum(value.numel() for value in published(SDXL)[UNET].values()) == 2_567_463_684
    in_a_file = original_tensors(*published(SDXL).values())
    assert [sum(n.startswith(p) for n in in_a_file) for p in SDXL.original.values()] == [1680, 248, 196, 389]


@pytest.mark.parametrize("family", BOTH, ids=FAMILIES)
def test_configurations_read_off_the_shapes_of_the_real_models_are_the_published_ones(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {name: tuple(value.shape) for name, value in original_tensors(*published(family).values()).items()}
    monkeypatch.setattr(single_file, "read_shapes", lambda _: shapes)
    configs = configs_of(family)
    assert single_file.file_unet_config(Path("x"), family) == configs.unet
    assert single_file.file_vae_config(Path("x"), family) == configs.vae
    for component, config in configs.text_encoders.items():
        assert single_file.file_text_config(Path("x"), family, component) == config


def test_configurations_of_a_file_are_the_folders(model: Setting) -> None:
    found: dict[str, dict[str, Any]] = {
        UNET: single_file.file_unet_config(model.file, model.family),
        VAE: single_file.file_vae_config(model.file, model.family),
        **{part: single_file.file_text_config(model.file, model.family, part) for part in model.family.text_encoders},
    }
    for component, config in found.items():
        theirs = read_json(model.folder / component / "config.json")
        # The size that it was trained at leaves no trace in a file.
        assert {k: v for k, v in config.items() if theirs.get(k, v) != v and k != "sample_size"} == {}, component


@pytest.mark.bits
def test_every_tensor_is_the_folders_to_the_bit(model: Setting) -> None:
    for component in model.family.original:
        (file,) = (model.folder / component).glob("*.safetensors")
        expected, found = load_file(file), single_file.file_tensors(model.file, model.family, component)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), component


@pytest.mark.bits
def test_diffusers_converters_agree(model: Setting) -> None:
    family, tensors = model.family, model.tensors
    config = {"class_embed_type": None, "addition_embed_type": None} | single_file.file_unet_config(model.file, family)
    theirs = {
        UNET: single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config),
        VAE: single_file_utils.convert_ldm_vae_checkpoint(
            dict(tensors), single_file.file_vae_config(model.file, family)
        ),
    }
    if family == SDXL:
        text = load_text_encoders(str(model.folder))[1].model
        prefix = SDXL.original[TEXT_ENCODER_2]
        theirs[TEXT_ENCODER_2] = single_file_utils.convert_open_clip_checkpoint(text, dict(tensors), prefix)
    for component, expected in theirs.items():
        found = single_file.file_tensors(model.file, family, component)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), component


@pytest.mark.bits
def test_folder_and_file_of_sdxl_compute_the_same_to_the_bit(sdxl: Setting) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    outputs = []
    for base in (str(sdxl.folder), str(sdxl.file)):
        texts = []
        for part in load_text_encoders(base):
            ids = part.tokenizer(["a red circle", "wow! odd"], padding="max_length", return_tensors="pt").input_ids
            texts.append(part.model(ids, output_hidden_states=True))
        words = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        conditions = {"text_embeds": texts[1].text_embeds, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
        noise = load_unet(base, families=BOTH)(latents, 500, words, added_cond_kwargs=conditions).sample
        outputs.append((words, texts[1].text_embeds, noise, load_vae(base, families=BOTH).decode(latents).sample))
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def test_text_encoders_of_sdxl_come_in_order_with_tokenizers_that_pad_differently(sdxl: Setting) -> None:
    for base in (sdxl.folder, sdxl.file):
        first, second = load_text_encoders(str(base))
        assert (first.component, second.component) == (TEXT_ENCODER, TEXT_ENCODER_2)
        assert isinstance(first.model, CLIPTextModel) and isinstance(second.model, CLIPTextModelWithProjection)
        assert not any(p.requires_grad for p in second.model.parameters()) and not second.model.training
        padded = [part.tokenizer("a cat", padding="max_length").input_ids for part in (first, second)]
        assert padded[0][:4] == padded[1][:4]
        assert set(padded[0][4:]) == {first.tokenizer.eos_token_id} and set(padded[1][4:]) == {0}
    asked = "Hello! a red circle, 42"
    ids = [[p.tokenizer(asked).input_ids for p in load_text_encoders(str(base))] for base in (sdxl.folder, sdxl.file)]
    assert ids[0] == ids[1]


@pytest.mark.bits
def test_text_encoders_without_their_prefix_are_understood(sdxl: Setting, tmp_path: Path) -> None:
    bare = {name.replace("transformer.text_model.", "transformer."): value for name, value in sdxl.tensors.items()}
    found = load_text_encoders(str(save(bare, tmp_path / "bare.safetensors")))
    for part, expected in zip(found, load_text_encoders(str(sdxl.folder)), strict=True):
        state = expected.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in part.model.state_dict().items())


@pytest.mark.bits
def test_a_second_text_encoder_without_its_prefix_in_a_folder_is_understood(sdxl: Setting, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "base"))
    file = folder / TEXT_ENCODER_2 / "model.safetensors"
    save({name.removeprefix("text_model."): value for name, value in load_file(file).items()}, file)
    found, expected = (load_text_encoders(str(base))[1].model.state_dict() for base in (folder, sdxl.folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_whose_encoders_changed_places_is_refused(sdxl: Setting, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.folder, tmp_path / "base"))
    shutil.copyfile(folder / TEXT_ENCODER / "config.json", folder / TEXT_ENCODER_2 / "config.json")
    with pytest.raises(UserError, match="describes a CLIPTextModel. A CLIPTextModelWithProjection is needed here"):
        load_text_encoders(str(folder))


@pytest.mark.bits
def test_a_vae_with_its_attention_as_matrices_is_understood(model: Setting, tmp_path: Path) -> None:
    flat = {name: value.flatten(1) for name, value in model.tensors.items() if "mid.attn_1" in name and value.ndim == 4}
    assert len(flat) == 8
    path = model.saved(tmp_path / "flat.safetensors", flat)
    expected = single_file.file_tensors(model.file, model.family, VAE)
    found = single_file.file_tensors(path, model.family, VAE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision_load(sdxl: Setting, tmp_path: Path, dtype: torch.dtype) -> None:
    path = save({name: value.to(dtype) for name, value in sdxl.tensors.items()}, tmp_path / "half.safetensors")
    expected = load_unet(str(sdxl.folder), families=BOTH, dtype=dtype).state_dict()
    found = load_unet(str(path), families=BOTH, dtype=dtype).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_schedule_of_a_file_is_its_familys_and_follows_its_marks(sdxl: Setting, tmp_path: Path) -> None:
    assert load_scheduler_config(str(sdxl.folder)) == load_scheduler_config(str(sdxl.file)) == SDXL_SCHEDULER
    marked = sdxl.saved(tmp_path / "v.safetensors", {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    marks = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert load_scheduler_config(str(marked)) == {**SDXL_SCHEDULER, **marks}


@pytest.mark.parametrize(
    ("component", "stranger"),
    [
        (UNET, "model.diffusion_model.align_heads.0.weight"),
        (VAE, "first_stage_model.loss.logvar"),
        (TEXT_ENCODER_2, "conditioner.embedders.1.model.transformer.resblocks.0.lora_down.weight"),
    ],
)
def test_what_training_left_is_refused(sdxl: Setting, tmp_path: Path, component: str, stranger: str) -> None:
    path = sdxl.saved(tmp_path / "junk.safetensors", {stranger: torch.zeros(2)})
    with pytest.raises(
        UserError, match=rf"^1 of \d+ tensors in .* have no place in SDXL \(first: {stranger}\)\. Merge"
    ):
        single_file.file_tensors(path, SDXL, component)


def test_a_file_that_lacks_something_says_what(sdxl: Setting, tmp_path: Path) -> None:
    def without(beginning: str) -> Path:
        return save(
            {n: v for n, v in sdxl.tensors.items() if not n.startswith(beginning)}, tmp_path / "part.safetensors"
        )

    path = without("first_stage_model.")
    with pytest.raises(UserError, match=r"has no vae: none of its \d+ tensors .* A complete SDXL checkpoint"):
        load_vae(str(path), families=BOTH)
    path = without("model.diffusion_model.label_emb.0.0.")
    missing = r"is not laid out like SDXL: the tensor model\.diffusion_model\.label_emb\.0\.0\.weight is missing"
    with pytest.raises(UserError, match=missing):
        load_unet(str(path), families=BOTH)
    path = without("conditioner.embedders.1.model.transformer.resblocks.3.ln_1.")
    with pytest.raises(UserError, match=r"The text encoder 2 of .*: 2 missing \(first: text_model.encoder.layers.3"):
        load_text_encoders(str(path))
