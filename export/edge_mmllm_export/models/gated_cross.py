"""What the gated blocks of Idefics and Llama-3.2-Vision share: names, and the memory they read."""

from __future__ import annotations

from functools import partial

import numpy as np

from edge_mmllm.spec import MEMORY, StateSpec
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.weights import Source

#: The span of each row of the memory.
SPAN = StateSpec("memory.span", (1, MEMORY, 2), "int64", "cross_kv")

#: A block's tensors that both name alike, ours to the hub's.
NAMES = {
    "norm_attn": "input_layernorm.weight",
    "norm_mlp": "post_attention_layernorm.weight",
    "attn.q": "cross_attn.q_proj.weight",
    "attn.k": "cross_attn.k_proj.weight",
    "attn.v": "cross_attn.v_proj.weight",
    "attn.o": "cross_attn.o_proj.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
}


def memory_states(blocks: int, heads: int, head_dim: int) -> tuple[StateSpec, ...]:
    """The span, then keys and values of each block."""
    shape = (1, heads, MEMORY, head_dim)
    names = (f"cross.{i}.attn.{n}" for i in range(blocks) for n in "kv")
    return (SPAN, *(StateSpec(name, shape, "float32", "cross_kv") for name in names))


def head_norm_source(name: str, heads: int, head_dim: int) -> Source:
    """One norm, for every head."""
    return Source(name, whole=partial(_repeated, times=heads), stored=(head_dim,))


def _repeated(values: Float32, times: int) -> Float32:
    return np.tile(values, times)
