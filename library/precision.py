"""Number formats, as kohya's --save_precision names those of files and --mixed_precision those that are computed in."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float", "fp16", "bf16"]
TORCH_DTYPES = {"float": "float32", "no": "float32", "fp16": "float16", "bf16": "bfloat16"}
