"""GGUF maps of Mamba, Falcon Mamba and Mamba-2. Source: llama.cpp src/llama-model.cpp and its
hub converter: the decay is stored as -exp(A_log), fused projections as the hub has them."""

from __future__ import annotations

import math

import numpy as np

from edge_mmllm_export.gguf.maps.base import GgufMap, GgufTensor, Value, refuse
from edge_mmllm_export.models.falcon_mamba import FalconMamba
from edge_mmllm_export.models.mamba import Mamba
from edge_mmllm_export.models.mamba2 import Mamba2

#: What the format asks for where a model has no limit: as llama.cpp's own converter writes.
CONTEXT = 1 << 20


def mamba(model: Mamba) -> GgufMap:
    """Raises: UnsupportedArchitecture."""
    c = model.config
    if c.bias:
        refuse("its projections have biases", model.name, "use_bias false")
    if c.d_inner != 2 * c.hidden_size:
        refuse(f"an inner size of {c.d_inner}", model.name, f"twice the hidden {c.hidden_size}")
    metadata = _metadata(model, c.norm_eps) | {
        "ssm.conv_kernel": c.conv_kernel,
        "ssm.inner_size": c.d_inner,
        "ssm.state_size": c.d_state,
        "ssm.time_step_rank": c.dt_rank,
    }
    louder = 1.0
    if isinstance(model, FalconMamba):
        metadata["ssm.dt_b_c_rms"] = True
        # llama.cpp's norms have one epsilon. What a norm reads may be as much louder as the root
        # of the epsilons' ratio: the result is the same.
        louder = math.sqrt(c.norm_eps / model.selection_eps)
    out = _frame(c.tied)
    for i in range(c.layers):
        p, b = f"layers.{i}", f"blk.{i}"
        x = tuple(f"{p}.x.{n}" for n in ("dt", "B", "C"))
        out += [
            GgufTensor(f"{b}.attn_norm.weight", (f"{p}.norm",)),
            GgufTensor(f"{b}.ssm_in.weight", (f"{p}.in.x", f"{p}.in.z")),
            GgufTensor(f"{b}.ssm_conv1d.weight", (f"{p}.conv",), hold="float32"),
            _conv_bias(p, b, c.d_inner, present=c.conv_bias),
            GgufTensor(f"{b}.ssm_x.weight", x, hold="byte", scale=louder),
            GgufTensor(f"{b}.ssm_dt.weight", (f"{p}.dt",), hold="byte"),
            GgufTensor(f"{b}.ssm_dt.bias", (f"{p}.dt_bias",)),
            GgufTensor(f"{b}.ssm_a", (f"{p}.A",), hold="float32"),
            GgufTensor(f"{b}.ssm_d", (f"{p}.D",)),
            GgufTensor(f"{b}.ssm_out.weight", (f"{p}.out",)),
        ]
    return GgufMap("mamba", metadata, out, None)


def mamba2(model: Mamba2) -> GgufMap:
    """Raises: UnsupportedArchitecture."""
    c = model.config
    if c.bias:
        refuse("its projections have biases", model.name, "use_bias false")
    if c.time_step_limit != (0.0, float("inf")):
        refuse("it limits time steps", model.name, "time_step_limit (0, infinity)")
    metadata = _metadata(model, c.norm_eps) | {
        "ssm.conv_kernel": c.conv_kernel,
        "ssm.inner_size": c.d_inner,
        "ssm.state_size": c.d_state,
        "ssm.time_step_rank": c.heads,
        "ssm.group_count": c.groups,
    }
    out, column = _frame(c.tied), (c.heads, 1)
    for i in range(c.layers):
        p, b = f"layers.{i}", f"blk.{i}"
        norm = (c.groups, c.d_inner // c.groups)
        out += [
            GgufTensor(f"{b}.attn_norm.weight", (f"{p}.norm",)),
            GgufTensor(f"{b}.ssm_in.weight", tuple(f"{p}.in.{n}" for n in ("z", "xBC", "dt"))),
            GgufTensor(f"{b}.ssm_conv1d.weight", (f"{p}.conv",), hold="float32"),
            _conv_bias(p, b, c.d_conv, present=c.conv_bias),
            GgufTensor(f"{b}.ssm_dt.bias", (f"{p}.dt_bias",)),
            GgufTensor(f"{b}.ssm_a", (f"{p}.A",), column),
            GgufTensor(f"{b}.ssm_d", (f"{p}.D",), column),
            GgufTensor(f"{b}.ssm_norm.weight", (f"{p}.norm_gated",), norm),
            GgufTensor(f"{b}.ssm_out.weight", (f"{p}.out",)),
        ]
    return GgufMap("mamba2", metadata, out, None)


def _metadata(model: Mamba | Mamba2, eps: float) -> dict[str, Value]:
    return {
        "context_length": CONTEXT,
        "embedding_length": model.hidden_size,
        "block_count": model.layers,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": float(eps),
        "vocab_size": model.vocab_size,
    }


def _frame(tied: bool) -> list[GgufTensor]:
    out = [
        GgufTensor("token_embd.weight", ("embed",)),
        GgufTensor("output_norm.weight", ("norm",)),
    ]
    return out if tied else [*out, GgufTensor("output.weight", ("head",))]


def _conv_bias(p: str, b: str, channels: int, *, present: bool) -> GgufTensor:
    """llama.cpp asks for one always."""
    name = f"{b}.ssm_conv1d.bias"
    if present:
        return GgufTensor(name, (f"{p}.conv_bias",))
    return GgufTensor(name, values=np.zeros(channels, np.float32), hold="float32")
