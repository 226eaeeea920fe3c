"""GGUF map of T5. Source: llama.cpp src/models/t5.cpp and its hub converter.

llama.cpp counts distances up to 128 always, in as many buckets as the file says. A model with
another reach gets more buckets, so many that each distance it tells apart has one of its own.
Its caches are as many as the encoder has layers: where the decoder has more, layers that add
nothing follow the encoder's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.gguf.maps.base import GgufMap, GgufTensor, Value, refuse
from edge_mmllm_export.models.t5 import T5, T5Config
from edge_mmllm_export.ops.memory import RelativeBias
from edge_mmllm_export.weights import Source, Weight

_REACH = 128
_LAYER = {
    "norm_attn": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
    "attn.o": "attn_o", "norm_cross": "cross_attn_norm", "cross.q": "cross_attn_q",
    "cross.k": "cross_attn_k", "cross.v": "cross_attn_v", "cross.o": "cross_attn_o",
    "norm_mlp": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip
_FRAME = {
    "embed": "token_embd", "encoder.norm": "enc.output_norm", "norm": "dec.output_norm",
    "head": "output", "encoder.bias": "enc.blk.0.attn_rel_b", "bias": "dec.blk.0.attn_rel_b",
}  # fmt: skip


def t5(model: T5) -> GgufMap:
    """Raises: UnsupportedArchitecture."""
    c = model.config
    if (c.activation, c.gated) not in (("relu", False), ("gelu_tanh", True)):
        refuse(f"its MLP is {'gated ' * c.gated}{c.activation}", "t5", "relu | gated gelu_tanh")
    if c.max_distance > _REACH:
        refuse(f"it tells distances apart up to {c.max_distance}", "t5", f"at most {_REACH}")
    buckets = c.buckets if c.max_distance == _REACH else 4 * c.max_distance
    layers = max(c.encoder_layers, c.layers)
    metadata: dict[str, Value] = {
        "context_length": c.context_length,
        "embedding_length": c.hidden_size,
        "block_count": layers,
        "decoder_block_count": c.layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "attention.layer_norm_epsilon": float(c.norm_eps),
        "attention.relative_buckets_count": buckets,
        "decoder_start_token_id": c.decoder_start_id,
        "vocab_size": c.vocab_size,
    }
    out = [_tensor(p.name, c, buckets) for p in model.parameters()]
    for i in range(c.encoder_layers, layers):
        out += _nothing(c, f"enc.blk.{i}")
    return GgufMap("t5", metadata, out, c.context_length)


def _tensor(name: str, c: T5Config, buckets: int) -> GgufTensor:
    order = None
    if name in _FRAME:
        if name.endswith("bias"):
            order = _buckets(c, buckets, both_ways=name != "bias")
        return GgufTensor(
            f"{_FRAME[name]}.weight", (name,), None if order is None else (buckets, c.heads),
            order=order, hold="none" if order is None else "float32",
        )  # fmt: skip
    stack = "enc" if name.startswith("encoder.") else "dec"
    _, i, rest = name.removeprefix("encoder.").split(".", 2)
    return GgufTensor(f"{stack}.blk.{i}.{_LAYER[rest]}.weight", (name,))


def _buckets(c: T5Config, buckets: int, *, both_ways: bool) -> NDArray[np.int64]:
    """Our bucket of each of llama.cpp's."""
    if buckets == c.buckets:
        return np.arange(buckets)
    table = Weight("bias", (c.buckets, 1), "vector", None, Source("bias"))  # type: ignore[arg-type]
    ours = RelativeBias(table, c.max_distance, both_ways).bucket_numbers()
    far = c.max_distance
    if not both_ways:  # behind alone
        return np.asarray(ours[far - np.minimum(np.arange(buckets), far)], np.int64)
    behind = far - np.minimum(np.arange(buckets // 2), far)
    before = far + np.minimum(np.arange(buckets // 2), far)
    return np.asarray(ours[np.concatenate([behind, before])], np.int64)


def _nothing(c: T5Config, stem: str) -> list[GgufTensor]:
    """A layer whose branches are zero."""
    h, inner, wide = c.hidden_size, c.heads * c.head_dim, c.intermediate_size
    shapes = {
        "attn_norm": (h,), "attn_q": (inner, h), "attn_k": (inner, h), "attn_v": (inner, h),
        "attn_o": (h, inner), "ffn_norm": (h,), "ffn_up": (wide, h), "ffn_down": (h, wide),
    }  # fmt: skip
    if c.gated:
        shapes["ffn_gate"] = (wide, h)
    return [
        GgufTensor(f"{stem}.{name}.weight", values=np.zeros(shape, np.float32), hold="float32")
        for name, shape in shapes.items()
    ]
