"""A LoRA training as people write it with diffusers and PEFT alone: what benchmarks/beside.py runs beside train_network.py.

python benchmarks/plain_loop.py BASE.safetensors CONFIGURATIONS PICTURES RESOLUTION STEPS RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

# The Linear layers and 1x1 convolutions of the U-Net's transformers: kohya's 192 modules.
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


def main(base: str, configurations: str, pictures: str, resolution: int, steps: int, rank: int) -> None:
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_single_file(
        base, config=configurations, local_files_only=True, torch_dtype=torch.float32, safety_checker=None
    )
    unet, vae, text_encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    del pipeline
    schedule = DDPMScheduler.from_pretrained(configurations, subfolder="scheduler")
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False)

    latents, states = [], []
    with torch.no_grad():
        for path in sorted(Path(pictures).glob("*.png")):
            picture = Image.open(path).convert("RGB").resize((resolution, resolution))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)
            caption = path.with_suffix(".txt").read_text(encoding="utf-8")
            ids = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            states.append(text_encoder(ids.input_ids)[0])
    del vae, text_encoder

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    unet.train()
    for step in tqdm(range(steps)):
        x, text = latents[step % len(latents)], states[step % len(states)]
        noise = torch.randn_like(x)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (1,))
        predicted = unet(schedule.add_noise(x, noise, timesteps), timesteps, text).sample
        F.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_file(get_peft_model_state_dict(unet), Path(configurations) / "plain.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(value) for value in sys.argv[4:]))
