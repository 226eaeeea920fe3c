"""GGUF map of the llama family. Source: llama.cpp src/llama-model.cpp and its hub converter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.gguf.maps.base import GgufMap, GgufTensor, Value, refuse
from edge_mmllm_export.models.llama import GGUF_NAMES, GGUF_POST_NORM, Llama, LlamaConfig
from edge_mmllm_export.models.qwen2_vl import Qwen2Vl

#: Definitions that llama.cpp has under another name: mistral is its llama.
_NAMES = {"mistral": "llama"}
#: Streams of rotary positions that the format has room for; the last one is not used.
_STREAMS = 4
#: Relative error of frequencies that counts as none: float32 powers differ in the last digits.
_SAME = 1e-5


def gguf_map(model: Llama) -> GgufMap:
    """Raises: UnsupportedArchitecture."""
    c = model.config
    name = _NAMES.get(c.model_type, c.model_type)
    if isinstance(model, Qwen2Vl):
        name = "qwen2vl"  # whose norms have an epsilon of 0 in 0.3.36, whatever the file says
    _check(c, name)
    # llama.cpp has no sliding window in these graphs: right up to the window, so that far it goes.
    context = min([c.context_length, *(w for w in c.windows if w is not None)])
    factor, divisors = _frequencies(c)
    metadata: dict[str, Value] = {
        "context_length": context,
        "embedding_length": c.hidden_size,
        "block_count": c.layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.freq_base": float(c.rope_theta),
        "rope.dimension_count": c.head_dim,
        "vocab_size": c.vocab_size,
    }
    if isinstance(model, Qwen2Vl):
        if len(model.sections) >= _STREAMS:
            refuse(f"mrope_section {list(model.sections)}", name, "three sections")
        unused = [0] * (_STREAMS - len(model.sections))
        metadata["rope.dimension_sections"] = [*model.sections, *unused]
    if factor != 1.0:
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    tensors = _tensors(model, permuted=name == "llama")
    if divisors is not None:
        if name != "llama":
            refuse("it takes no scaling of single frequencies here", name, "default | linear")
        tensors.append(GgufTensor("rope_freqs.weight", values=divisors, hold="float32"))
    return GgufMap(name, metadata, tensors, context)


def _check(c: LlamaConfig, name: str) -> None:
    """Raises: UnsupportedArchitecture, for switches that llama.cpp's graph does not have."""
    if c.activation != "silu":
        refuse(f"its activation is {c.activation}", name, "silu")
    if name in ("qwen2", "qwen2vl", "olmo2") and c.head_dim * c.heads != c.hidden_size:
        refuse(f"{c.heads} heads of {c.head_dim}", name, f"{c.hidden_size} in all")
    if name in ("qwen3", "olmo2") and (c.qkv_bias or c.output_bias or c.mlp_bias):
        refuse("it has biases", name, "none")
    if name in ("qwen2", "qwen2vl") and (c.output_bias or c.mlp_bias):
        refuse("it has biases beside those of q, k and v", name, "biases of q, k and v")


def _tensors(model: Llama, *, permuted: bool) -> list[GgufTensor]:
    c = model.config
    names = {**GGUF_NAMES, **(GGUF_POST_NORM if c.post_norm else {})}
    out = []
    for p in model.parameters():
        stem, bias = p.name.removesuffix("_bias"), p.name.endswith("_bias")
        parts = stem.split(".")
        layer = parts[0] == "layers"
        their = names[".".join(parts[2:])].format(i=parts[1]) if layer else names[stem]
        order = None
        if permuted and parts[-1] in ("q", "k"):
            order = permutation(p.shape[0], c.head_dim)
        their += ".bias" if bias else ".weight"
        out.append(GgufTensor(their, (p.name,), order=order))
    if c.tied and c.model_type == "olmo2":  # its graph asks for a head of its own
        out.append(GgufTensor("output.weight", ("embed",)))
    return out


def permutation(rows: int, head_dim: int) -> NDArray[np.int64]:
    """llama.cpp turns neighbouring pairs of a llama's q and k, where the hub turns halves of a
    head: their row (head, j, half) is our row (head, half, j)."""
    order = np.arange(rows, dtype=np.int64).reshape(-1, 2, head_dim // 2)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(rows)


def _frequencies(c: LlamaConfig) -> tuple[float, NDArray[np.float32] | None]:
    """What the powers of `rope_theta` are divided by: one factor (linear scaling), or one for each
    (llama3 scaling), None where one is all."""
    half = c.head_dim // 2
    powers = float(c.rope_theta) ** -(np.arange(half) / half)
    divisors = powers / c.inv_freq.astype(np.float64)
    factor = float(divisors[0])
    if not np.allclose(divisors, factor, rtol=_SAME, atol=0):
        return 1.0, divisors.astype(np.float32)
    whole = float(round(factor))
    return (whole if abs(whole - factor) < _SAME * factor else factor), None
