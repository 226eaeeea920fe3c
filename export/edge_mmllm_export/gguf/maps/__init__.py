"""Definitions that llama.cpp runs, and how its GGUF files hold them."""

from __future__ import annotations

import importlib

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.gguf.maps.base import GgufMap, GgufTensor, refuse
from edge_mmllm_export.ops.base import Architecture

__all__ = ["GGUF_MAPS", "GgufMap", "GgufTensor", "gguf_map"]

#: Name of a definition -> module:function.
GGUF_MAPS = {
    "llama": "llama:gguf_map",
    "mistral": "llama:gguf_map",
    "qwen2": "llama:gguf_map",
    "qwen2_vl_text": "llama:gguf_map",
    "qwen3": "llama:gguf_map",
    "olmo2": "llama:gguf_map",
    "mamba": "mamba:mamba",
    "falcon_mamba": "mamba:mamba",
    "mamba2": "mamba:mamba2",
    "t5": "t5:t5",
    "rwkv6": "rwkv:rwkv6",
    "rwkv7": "rwkv:rwkv7",
}
#: What llama.cpp has no graph for at all.
_NEVER = ("rwkv4", "rwkv5", "opt")


def gguf_map(model: Architecture) -> GgufMap:
    """How GGUF holds a model.

    Raises:
        UnsupportedArchitecture: llama.cpp has no graph for it, or there is no map yet.
    """
    if model.name in _NEVER:
        refuse("it has no such architecture", model.name, " | ".join(GGUF_MAPS))
    if isinstance(model, Composite) or model.name not in GGUF_MAPS:
        raise UnsupportedArchitecture(
            f"{model.name} cannot be written as GGUF yet",
            expected=" | ".join(GGUF_MAPS),
            found=model.name,
            fix="export with --format onnx",
        )
    module, _, function = GGUF_MAPS[model.name].partition(":")
    found: GgufMap = getattr(importlib.import_module(f"{__name__}.{module}"), function)(model)
    return found
