"""Pictures: opened with distrust, and prepared as the checkpoint's own processor does it.

numpy and Pillow only; Pillow is imported when a picture is opened. `published.py` (for the
exporter) reads the settings from Hugging Face's `preprocessor_config.json`.
"""

from __future__ import annotations

from edge_mmllm.image.files import open_image
from edge_mmllm.image.prepare import Prepared, prepare_frames, prepare_image
from edge_mmllm.image.settings import (
    AnyRes,
    Canvas,
    ImageSettings,
    Layout,
    Patches,
    Split,
    Whole,
)

__all__ = [
    "AnyRes",
    "Canvas",
    "ImageSettings",
    "Layout",
    "Patches",
    "Prepared",
    "Split",
    "Whole",
    "open_image",
    "prepare_frames",
    "prepare_image",
]
