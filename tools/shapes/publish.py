"""The trained parts as folders that Stable Diffusion's own libraries load, measured, with a model card."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from library.files import file_hash, human_bytes, whole_folder, write_json, write_text
from library.models.clip_tokenizer import tiny_merges, write_tokenizer
from library.models.embedded import SHAPES, SHAPES_CLIP, SHAPES_DINOV2
from library.models.sd15_configs import SD15_PIPELINE, SD15_SCHEDULER
from library.models.tiny_parts import write_pipeline_index
from tools.shapes import autoencoder, clip, denoiser, teacher
from tools.shapes.judge import Judge, prompts_to_judge, share_right
from tools.shapes.parts import load_model, record_of
from tools.shapes.pictures import Pictures

GUIDANCES = (4.0, 5.5, 7.0)
JUDGED, STEPS = 200, 25
OF = {"picture_tower": "clip", "denoiser_2": "denoiser"}  # stages of training that go on with a part
TRAINED = ("autoencoder", "clip", "picture_tower", "teacher", "denoiser", "denoiser_2")


def publish(work: Path, out: Path, unseen: Pictures) -> dict[str, Any]:
    """Write the three folders into `out`, each whole or not at all, and return what the card says in numbers."""
    parts = _parts(work)
    with whole_folder(out / SHAPES_DINOV2, overwrite=True) as folder:
        _save(parts["teacher"], folder, "model")
        write_text(folder / "README.md", _short_card("DINOv2-shaped teacher", SHAPES_DINOV2))
    with whole_folder(out / SHAPES_CLIP, overwrite=True) as folder:
        _save(parts["clip"], folder, "model")
        write_tokenizer(folder, tiny_merges())
        write_json(folder / "preprocessor_config.json", _preprocessor())
        write_text(folder / "README.md", _short_card("CLIP", SHAPES_CLIP))
    with whole_folder(out / SHAPES, overwrite=True) as folder:
        _save(parts["autoencoder"], folder / "vae", "diffusion_pytorch_model")
        _save(parts["text"], folder / "text_encoder", "model")
        _save(parts["denoiser"], folder / "unet", "diffusion_pytorch_model")
        write_tokenizer(folder / "tokenizer", tiny_merges())
        write_json(folder / "scheduler" / "scheduler_config.json", SD15_SCHEDULER)
        write_pipeline_index(folder, SD15_PIPELINE)
        numbers = measure(folder, out, parts, unseen)
        numbers["training"] = {name: record_of(work, name) for name in TRAINED}
        write_json(folder / "measured.json", numbers)
        write_text(folder / "README.md", card(numbers))
    return numbers


def _parts(work: Path) -> dict[str, nn.Module]:
    """Everything trained, with its weights as they are saved: rounded to float16."""
    models: dict[str, nn.Module] = {
        "autoencoder": load_model(work, "autoencoder", AutoencoderKL.from_config(autoencoder.CONFIG)),
        "denoiser": load_model(work, "denoiser_2", denoiser.new_unet()),
        "clip": load_model(work, "picture_tower", CLIPModel(clip.config())),
        "text": load_model(work, "clip", CLIPTextModel(CLIPTextConfig(**clip.text_config()))),
        "teacher": load_model(work, "teacher", Dinov2Model(Dinov2Config(**teacher.CONFIG))),
        "judge": load_model(work, "judge", Judge()),
    }
    for name in set(models) - {"judge"}:
        models[name] = models[name].half().float()
    return models


def _save(model: Any, folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    if isinstance(model, AutoencoderKL | UNet2DConditionModel):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def measure(folder: Path, out: Path, parts: dict[str, nn.Module], unseen: Pictures) -> dict[str, Any]:
    """Reconstruction of unseen pictures, and whether 200 prompts are drawn at several guidances."""
    vae: Any = parts["autoencoder"]
    files = [*folder.rglob("*.safetensors"), *(out / SHAPES_DINOV2).glob("*.safetensors")]
    files += (out / SHAPES_CLIP).glob("*.safetensors")
    right = {}
    judge: Any = parts["judge"]
    for guidance in GUIDANCES:
        prompts = prompts_to_judge(JUDGED)
        images = draw_all(folder, [prompt for prompt, _ in prompts], guidance)
        right[str(guidance)] = round(share_right(judge, images, [wanted for _, wanted in prompts]), 3)
    return {
        "reconstruction_psnr_db": round(autoencoder.reconstruction_psnr(vae, unseen.pixels[:256]), 2),
        "shape_and_colour_right": right,
        "judge_right_on_unseen_renders": round(_judge_on_renders(judge, unseen), 3),
        "prompts": JUDGED,
        "sampler": f"DPM++ 2M Karras, {STEPS} steps",
        "clip_right_class_of_16_on_unseen": round(_clip_right(parts["clip"], unseen), 3),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in sorted(parts.items())},
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": {
            file.relative_to(folder if folder in file.parents else out).as_posix(): file_hash(file) for file in files
        },
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


@torch.no_grad()
def draw_all(folder: Path, prompts: Sequence[str], guidance: float) -> list[Image.Image]:
    """One picture for each prompt, by diffusers' own pipeline; picture i has the seed i."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 25):
        part = list(prompts[start : start + 25])
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
        images += pipeline(part, guidance_scale=guidance, num_inference_steps=STEPS, generator=generators).images
    return images


def _judge_on_renders(judge: Judge, unseen: Pictures) -> float:
    read = judge.read(unseen.pixels)
    return sum(a == f"{b.colour} {b.shape}" for a, b in zip(read, unseen.known, strict=True)) / len(read)


@torch.no_grad()
def _clip_right(model: Any, unseen: Pictures) -> float:
    """Part of the pictures whose class's words are the nearest of the sixteen classes'."""
    from library.data.demo_pictures import CLASSES
    from library.models.clip_tokenizer import tiny_tokenizer

    ids = tiny_tokenizer()([f"a {name}" for name in CLASSES], padding="max_length", return_tensors="pt").input_ids
    similarities = model(input_ids=ids, pixel_values=clip.clip_inputs(unseen.pixels)).logits_per_image
    found = [CLASSES[index] for index in similarities.argmax(1).tolist()]
    return sum(a == f"{b.colour} {b.shape}" for a, b in zip(found, unseen.known, strict=True)) / len(found)


def _preprocessor() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": clip.vision_config()["image_size"]},
        "do_center_crop": True,
        "crop_size": {"height": clip.vision_config()["image_size"], "width": clip.vision_config()["image_size"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": list(clip.CLIP_MEAN),
        "image_std": list(clip.CLIP_STD),
    }


def _short_card(what: str, name: str) -> str:
    return f"# {name}\n\n{what}, trained on the same pictures as `{SHAPES}`, whose README.md says how. Licence: Apache-2.0.\n"


def card(numbers: dict[str, Any]) -> str:
    """The model card, README.md of the base."""
    training = numbers["training"]
    ends = {
        name: (list(record["losses"].values())[0], list(record["losses"].values())[-1])
        for name, record in training.items()
    }
    rows = "\n".join(
        f"| {name} | {numbers['parameters'][OF.get(name, name)]:,} | {record['steps']} x {record['batch']} | "
        f"{record['seconds'] / 60:.0f} min | {ends[name][0]:.4f} -> {ends[name][1]:.4f} |"
        for name, record in training.items()
    )
    right = ", ".join(f"{share:.0%} at CFG {guidance}" for guidance, share in numbers["shape_and_colour_right"].items())
    return f"""# {SHAPES}

The base model that this project's scripts use until they are given another: a latent diffusion model with the classes and
the block structure of Stable Diffusion 1.5 (an autoencoder with eight pixels to a latent and four channels, four levels of
U-Net, a CLIP text encoder with its tokenizer), small enough to lie in the repository. It draws 128 x 128 pixels: a red, green,
blue or yellow circle, square, triangle or star, small, medium or large, in one of nine places, on one of thirty backgrounds.
Nothing else: it never saw a photo.

Prompts it knows: "a photo of a red circle", "a small blue star at the top left on a striped grey background", and what
lies between. Around CFG 5.

Beside it: `{SHAPES_CLIP}`, the CLIP whose text tower this base uses, and `{SHAPES_DINOV2}`, a teacher with DINOv2's
architecture. All three together: {human_bytes(numbers["bytes"])} of float16.

## Training

On 12,000 pictures that `library/data/demo_pictures.py` draws, with other seeds than the demo data set, and captions that say
part or all of what is on them; no other data. The teacher learned from the drawings' own labels (in each patch: how much of
it the shape covers, its colour, its shape or texture; shape, colour, background and texture of the whole), not by
self-supervision as DINOv2 did. CLIP learned by contrast, with each picture that fulfils a caption as its match, then its
picture tower alone with the text tower locked. The autoencoder and the teacher saw half of the pictures in other colours.
The U-Net: noise prediction, min-SNR weights (gamma 5), one empty prompt in ten.

| part | parameters | steps x batch | time, two shared CPU cores | loss |
|---|---|---|---|---|
{rows}

    python tools/train_tiny_base.py --out models

## Measured

- Autoencoder: {numbers["reconstruction_psnr_db"]} dB PSNR on 256 unseen pictures.
- {numbers["prompts"]} prompts over the 16 classes, {numbers["sampler"]}: a small classifier that was trained on real renders
  (right on {numbers["judge_right_on_unseen_renders"]:.1%} of unseen ones) reads the right shape and colour in {right}.
- CLIP finds the class of {numbers["clip_right_class_of_16_on_unseen"]:.1%} of 512 unseen pictures among the 16.

`measured.json` has the losses, hashes and versions. Licence: Apache-2.0, as the project.
"""
