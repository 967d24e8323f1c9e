"""Captions by an image-to-text model of transformers: BLIP, BLIP-2, GIT, Florence-2, and chat models such as LLaVA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.captioning.checks import no_describer
from library.device import choose_device
from library.options.caption import CaptionModelOptions

ASKED = "Describe the picture in one sentence."
"""Of chat models, which say nothing unless they are asked."""


class Describer:
    """What a model says of pictures. Raises UserError where it cannot be loaded."""

    def __init__(self, options: CaptionModelOptions) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        assert options.model is not None
        path = Path(options.model).expanduser()
        where = path if path.is_dir() else options.model
        if path.is_dir():
            logging.disable_progress_bar()  # nothing is downloaded, and weights are read in a moment
        device = choose_device(options.device)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        try:
            config = AutoConfig.from_pretrained(where)
            if type(config) not in AutoModelForImageTextToText._model_mapping:
                raise ValueError(f"its config.json describes a {config.model_type}.")
            self.processor: Any = AutoProcessor.from_pretrained(where)
            model: Any = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype, use_safetensors=True)
        except Exception as error:  # whatever its files or the way to them make transformers raise
            raise no_describer(options.model, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
        self.model = model.eval().requires_grad_(False).to(device)
        self.options = options
        self._chats = bool(getattr(self.processor, "chat_template", None))
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # so that what is generated begins at one place in a batch
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        inputs = self._inputs(list(pictures)).to(self.model.device)
        inputs.pop("token_type_ids", None)  # of BERT's tokenizer, and taken by no generating model
        if self.options.prompt and self.model.config.model_type == "git":
            for key in ("input_ids", "attention_mask"):
                inputs[key] = inputs[key][:, :-1]  # the end of the sentence, which is to go on
        for key, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[key] = value.to(self.model.dtype)
        written = self.model.generate(
            **inputs, max_new_tokens=self.options.max_new_tokens, num_beams=self.options.num_beams, do_sample=False
        )
        if self._chats and _begins(written, inputs["input_ids"]):
            written = written[:, inputs["input_ids"].shape[1] :]  # the answer alone; a caption's own beginning stays
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        prompt = self.options.prompt
        if self._chats:
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt or ASKED}]}]
            asked = self.processor.apply_chat_template(message, add_generation_prompt=True)
            each = [[picture] for picture in pictures]
            return self.processor(images=each, text=[asked] * len(pictures), padding=True, return_tensors="pt")
        if prompt:
            return self.processor(images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt")
        return self.processor(images=pictures, return_tensors="pt")


def _begins(written: torch.Tensor, given: torch.Tensor) -> bool:
    return written.shape[1] >= given.shape[1] and bool((written[:, : given.shape[1]] == given).all())
