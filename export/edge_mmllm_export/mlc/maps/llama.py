"""MLC map of the llama family. Source: mlc-llm, `model/{llama,mistral,qwen2,qwen3,olmo2}`."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_mmllm_export.mlc.maps.base import Kind, MlcMap, MlcTensor, refuse
from edge_mmllm_export.models.llama import Llama, LlamaConfig

#: Ours -> theirs, of a layer's tensors but for the fused ones.
_NAMES = {
    "norm_attn": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.down": "mlp.down_proj",
}
_POST_NORM = {"norm_attn": "post_attention_layernorm", "norm_mlp": "post_feedforward_layernorm"}
#: mlc-llm reads a prompt in pieces of at most so many tokens.
_CHUNK, _CHUNK_QWEN3 = 8192, 2048
#: Relative error of frequencies that counts as none: float32 powers differ in the last digits.
_SAME = 1e-5


def mlc_map(model: Llama, prefix: str = "") -> MlcMap:
    """Args: prefix: before every name (`language_model.` of llava).

    Raises: UnsupportedArchitecture, for what mlc-llm's model would compute otherwise.
    """
    c = model.config
    _check(c)
    window = _window(c)
    # A window that their graph does not have: right as far as it reaches.
    context = c.context_length if c.model_type == "mistral" else min(c.context_length, window)
    return MlcMap(
        model_type=c.model_type,
        config=_config(c, context, window),
        tensors=_tensors(model, prefix),
        stock=True,
        context_length=context,
        remarks=(f"mlc-llm has no sliding window here: at most {context} tokens",)
        if context < c.context_length
        else (),
    )


def _window(c: LlamaConfig) -> int:
    return min([c.context_length, *(w for w in c.windows if w is not None)])


def _check(c: LlamaConfig) -> None:
    """Raises: UnsupportedArchitecture."""
    name = c.model_type
    if c.activation != "silu" and not (name in ("qwen2", "qwen3", "olmo2") and _act(c)):
        refuse(f"its activation is {c.activation}", name, "silu")
    if c.output_bias or c.mlp_bias or c.qkv_bias != (name == "qwen2"):
        refuse("it has other biases", name, "those of q, k and v" if name == "qwen2" else "none")
    if name == "qwen2" and c.head_dim * c.heads != c.hidden_size:
        refuse(f"{c.heads} heads of {c.head_dim}", name, f"{c.hidden_size} in all")
    if name == "mistral" and len(set(c.windows)) > 1:
        refuse("its layers have different windows", name, "one window")
    if rope_scaling(c) is not None and name not in ("llama", "olmo2"):
        refuse("it takes no scaling of rotary frequencies", name, "none")


def _act(c: LlamaConfig) -> str | None:
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}.get(
        c.activation
    )


def rope_scaling(c: LlamaConfig) -> dict[str, Any] | None:
    """`llama3` scaling in mlc-llm's words; None where there is none.

    Raises: UnsupportedArchitecture, for any other.
    """
    half = c.head_dim // 2
    powers = float(c.rope_theta) ** -(np.arange(half) / half)
    if np.allclose(c.inv_freq.astype(np.float64), powers, rtol=_SAME, atol=0):
        return None
    scaling = c.rope_scaling
    if scaling is None or scaling.get("rope_type") != "llama3":
        refuse("its rotary frequencies are scaled", c.model_type, "none, or llama3's way")
    return dict(scaling)


def _config(c: LlamaConfig, context: int, window: int) -> dict[str, Any]:
    """The fields of mlc-llm's own config class, as it would write them."""
    name = c.model_type
    out: dict[str, Any] = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "rms_norm_eps": c.norm_eps,
        "vocab_size": c.vocab_size,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "context_window_size": context,
        "prefill_chunk_size": min(context, _CHUNK_QWEN3 if name == "qwen3" else _CHUNK),
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
    }
    if name in ("qwen2", "qwen3"):
        out |= {"hidden_act": _act(c), "rope_theta": _whole(c.rope_theta), "dtype": "float32"}
        out |= {"tie_word_embeddings": c.tied}
        if name == "qwen3":
            out |= {"attention_bias": False, "weight_block_size": None}
        return out
    out["position_embedding_base"] = _whole(c.rope_theta)
    if name == "mistral":
        sliding = window if c.windows[0] is not None and window < c.context_length else -1
        # Their four tokens that are always seen are no part of the model.
        out |= {"sliding_window_size": sliding, "attention_sink_size": 0}
        if sliding > 0:
            out |= {"context_window_size": -1, "prefill_chunk_size": min(sliding, _CHUNK)}
        return out
    out |= {"tie_word_embeddings": c.tied, "rope_scaling": rope_scaling(c)}
    out["pipeline_parallel_stages"] = 1
    return out | ({"hidden_act": _act(c)} if name == "olmo2" else {"disaggregation": False})


def _whole(x: float) -> float | int:
    return int(x) if x == int(x) else x


def _tensors(model: Llama, prefix: str) -> list[MlcTensor]:
    c = model.config
    names = {**_NAMES, **(_POST_NORM if c.post_norm else {})}
    qkv = "c_attn" if c.model_type in ("qwen2", "qwen3") else "qkv_proj"
    out = [_matrix(f"{prefix}model.embed_tokens", "embed", kind="embedding")]
    for i in range(c.layers):
        p, b = f"layers.{i}", f"{prefix}model.layers.{i}"
        out.append(_matrix(f"{b}.self_attn.{qkv}", *(f"{p}.attn.{n}" for n in "qkv")))
        if c.qkv_bias:
            parts = tuple(f"{p}.attn.{n}_bias" for n in "qkv")
            out.append(MlcTensor(f"{b}.self_attn.{qkv}.bias", parts))
        out.append(_matrix(f"{b}.{names['attn.o']}", f"{p}.attn.o"))
        out.append(_matrix(f"{b}.mlp.gate_up_proj", f"{p}.mlp.gate", f"{p}.mlp.up"))
        out.append(_matrix(f"{b}.{names['mlp.down']}", f"{p}.mlp.down"))
        plain = ["norm_attn", "norm_mlp"]
        if c.qk_norm != "none":
            plain += ["attn.q_norm", "attn.k_norm"]
        out += [MlcTensor(f"{b}.{names[n]}.weight", (f"{p}.{n}",)) for n in plain]
    out.append(MlcTensor(f"{prefix}model.norm.weight", ("norm",)))
    if not c.tied or c.model_type == "mistral":  # whose model has a head of its own always
        ours = "embed" if c.tied else "head"
        out.append(_matrix(f"{prefix}lm_head", ours, kind="head"))
    return out


def _matrix(name: str, *parts: str, kind: Kind = "matrix") -> MlcTensor:
    return MlcTensor(f"{name}.weight", parts, kind)
