"""Names and places of the models that need no download: trained ones that come with the project, and tiny ones built on demand."""

from __future__ import annotations

from pathlib import Path

# What comes with the project, trained: the base that training and drawing default to, its teacher and its CLIP.
SHAPES = "tiny-shapes"
SHAPES_DINOV2 = "tiny-shapes-dinov2"
SHAPES_CLIP = "tiny-shapes-clip"
# Built on demand, with random weights.
TINY_SD15 = "tiny-sd15"
TINY_SDXL = "tiny-sdxl"
TINY_DINOV2 = "tiny-dinov2"
TINY_T5 = "tiny-t5"

TINY_BASES = (SHAPES, TINY_SD15, TINY_SDXL)
TINY_TEACHERS = (SHAPES_DINOV2, TINY_DINOV2)
MODELS = Path(__file__).resolve().parents[2] / "models"
"""The folder that all of them lie in."""
