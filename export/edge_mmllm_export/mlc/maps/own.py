"""MLC map of what mlc-llm has no model for: our names, one tensor a weight.

A matrix, the embedding and the head are quantized, as mlc-llm does. What a recurrence multiplies
by itself, step after step, is not: decays, time steps, mixes and norms are float32 in all their
bits, and the small matrices that make them (adapters, Mamba's selection) float16. They are a few
per cent of the weights.
"""

from __future__ import annotations

import fnmatch

from edge_mmllm_export.mlc.maps.base import Kind, MlcMap, MlcTensor
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.weights import Parameter

#: Matrices that stay float16, by definition.
HELD = {
    "mamba": ("layers.*.x.*", "layers.*.dt"),
    "falcon_mamba": ("layers.*.x.*", "layers.*.dt"),
    "mamba2": ("layers.*.in.dt",),
    "rwkv6": ("layers.*.down", "layers.*.up"),
    "rwkv7": ("layers.*.down", "layers.*.up"),
    "opt": ("positions",),
}
_KINDS: dict[str, Kind] = {"matrix": "matrix", "embedding": "embedding", "head": "head"}


def own_map(model: Architecture, because: str) -> MlcMap:
    """Every weight under our name.

    Args:
        because: why mlc-llm cannot run it.
    """
    held = HELD.get(getattr(model, "backbone", model).name, ())
    return MlcMap(
        model_type=model.name,
        config={
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.layers,
            "context_window_size": model.context_length or -1,
        },
        tensors=[_tensor(p, held) for p in model.parameters()],
        stock=False,
        context_length=model.context_length,
        remarks=(because,),
    )


def _tensor(p: Parameter, held: tuple[str, ...]) -> MlcTensor:
    kind = _KINDS.get(p.role, "plain")
    if kind == "plain":
        return MlcTensor(p.name, (p.name,), store="exact")
    beside = p.name.split(".")[0] in ("image", "video", "audio", "output")
    if beside or any(fnmatch.fnmatchcase(p.name, pattern) for pattern in held):
        # As mlc-llm leaves CLIP unquantized; a projector is small.
        return MlcTensor(p.name, (p.name,), store="float16")
    return MlcTensor(p.name, (p.name,), kind)
