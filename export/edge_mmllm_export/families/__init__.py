"""Families of multimodal models by the `model_type` of their config, imported when used.

A family is one function from a published config to a `Composite`: which components fill the
slots, under which names their weights lie, and how features reach the backbone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.families.composite import Composite

#: `model_type` of config.json -> module:function. Never the name of a model that computes
#: something else. `vl_mamba` is the layout of this project's own LLaVA with a Mamba-2 backbone.
FAMILIES = {
    "llava": "llava:llava",
    "vl_mamba": "llava:llava",
    "idefics3": "idefics3:idefics3",
    "smolvlm": "idefics3:idefics3",
    "llava_next": "llava_next:llava_next",
    "qwen2_audio": "qwen2_audio:qwen2_audio",
    "qwen2_vl": "qwen2_vl:qwen2_vl",
    "video_llava": "video_llava:video_llava",
    "blip-2": "blip2:blip2",
    "instructblip": "instructblip:instructblip",
    "idefics": "idefics:idefics",
    "mllama": "mllama:mllama",
}


def build_family(name: str, checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a checkpoint of a family.

    Raises:
        CheckpointError: a config that cannot be used, or names a component without a definition.
    """
    module, _, function = FAMILIES[name].partition(":")
    found: Callable[[Checkpoint, int | None], Composite] = getattr(
        importlib.import_module(f"{__name__}.{module}"), function
    )
    return found(checkpoint, context)
