"""Number formats of files, as kohya's --save_precision names them."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float", "fp16", "bf16"]
TORCH_DTYPES: dict[Precision, str] = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}
