"""Definitions in MLC's format: those that mlc-llm has, as it has them; the others by our names."""

from __future__ import annotations

import importlib

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.mlc.maps.base import MlcMap, MlcTensor
from edge_mmllm_export.ops.base import Architecture

__all__ = ["MLC_MAPS", "MlcMap", "MlcTensor", "mlc_map"]

#: Name of a definition -> module:function, of the architectures that mlc-llm has.
MLC_MAPS = {
    "llama": "llama:mlc_map",
    "mistral": "llama:mlc_map",
    "qwen2": "llama:mlc_map",
    "qwen3": "llama:mlc_map",
    "olmo2": "llama:mlc_map",
    "rwkv5": "rwkv:rwkv5",
    "rwkv6": "rwkv:rwkv6",
    "llava": "llava:llava",
}


def mlc_map(model: Architecture) -> MlcMap:
    """How MLC's format holds a model: as mlc-llm's own, where that computes the same."""
    from edge_mmllm_export.mlc.maps.own import own_map

    if model.name not in MLC_MAPS:
        return own_map(model, f"mlc-llm has no {model.name}")
    module, _, function = MLC_MAPS[model.name].partition(":")
    try:
        found: MlcMap = getattr(importlib.import_module(f"{__name__}.{module}"), function)(model)
    except UnsupportedArchitecture as error:
        return own_map(model, error.what)
    return found
