"""The llama family: llama, mistral, qwen2, qwen3, olmo2, SmolLM.

Source: `modeling_{llama,mistral,qwen2,qwen3,olmo2}.py` of transformers 5.23; LLaMA (arXiv
2302.13971), GQA (2305.13245), OLMo 2 (2501.00656) for the norm after each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm.spec import CAPACITY, StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.head import logits
from edge_mmllm_export.models.rope import inverse_frequencies, scaled_frequencies
from edge_mmllm_export.ops.base import Activation, Attention, Ops, Rope
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Positions tabulated by default; `--context` asks for more, up to the model's own limit.
DEFAULT_CONTEXT = 32768
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of the family.

    Attributes:
        qk_norm: `head` normalizes each head of q and k (qwen3), `full` the whole projection
            (olmo2).
        post_norm: norms after attention and MLP instead of before (olmo2).
        windows: sliding window of each layer, None = full attention.
        inv_freq: rotary frequencies, float32 `(head_dim / 2,)`, scaling applied.
        rope_theta: their base, and rope_scaling: what a `llama3` config says, for formats that
            name them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    context_length: int
    inv_freq: NDArray[np.float32]
    tied: bool
    windows: tuple[int | None, ...]
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    post_norm: bool = False
    permuted: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None


class Llama:
    """Decoder-only transformer with rotary grouped-query attention and a gated MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        c = self.config = config
        self.name = c.model_type
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers
        self.context_length: int | None = c.context_length

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Llama:
        """Read the config of either layout. Raises: CheckpointError."""
        where = str(checkpoint.source)
        if checkpoint.layout == "gguf":
            config = _gguf_config(checkpoint, where, context)
        else:
            config = _hub_config(checkpoint, where, context)
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise CheckpointError(
                "the config's head counts do not fit together",
                where=where,
                expected="heads a multiple of kv heads, an even head size",
                found=f"{config.heads} heads, {config.kv_heads} kv heads of {config.head_dim}",
            )
        return cls(config)

    def parameters(self) -> list[Parameter]:
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        h, f = c.hidden_size, c.intermediate_size
        out = [Parameter("embed", (c.vocab_size, h), "embedding")]
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [
                Parameter(f"{p}.norm_attn", (h,), "vector"),
                Parameter(f"{p}.attn.q", (q, h)),
                Parameter(f"{p}.attn.k", (kv, h)),
                Parameter(f"{p}.attn.v", (kv, h)),
                Parameter(f"{p}.attn.o", (h, q)),
                Parameter(f"{p}.norm_mlp", (h,), "vector"),
                Parameter(f"{p}.mlp.gate", (f, h)),
                Parameter(f"{p}.mlp.up", (f, h)),
                Parameter(f"{p}.mlp.down", (h, f)),
            ]
            if c.qkv_bias:
                for n, width in (("q", q), ("k", kv), ("v", kv)):
                    out.append(Parameter(f"{p}.attn.{n}_bias", (width,), "vector"))
            if c.output_bias:
                out.append(Parameter(f"{p}.attn.o_bias", (h,), "vector"))
            if c.mlp_bias:
                for n, width in (("gate", f), ("up", f), ("down", h)):
                    out.append(Parameter(f"{p}.mlp.{n}_bias", (width,), "vector"))
            if c.qk_norm != "none":
                full = c.qk_norm == "full"
                out.append(Parameter(f"{p}.attn.q_norm", (q if full else c.head_dim,), "vector"))
                out.append(Parameter(f"{p}.attn.k_norm", (kv if full else c.head_dim,), "vector"))
        out.append(Parameter("norm", (h,), "vector"))
        if not c.tied:
            out.append(Parameter("head", (c.vocab_size, h), "head"))
        return out

    def sources(self, layout: Layout) -> dict[str, Source]:
        """Our names to the hub's or GGUF's (whose q and k rows are permuted for llama)."""
        gguf = layout == "gguf"
        names = GGUF_NAMES if gguf else _HUB_NAMES
        if self.config.post_norm:
            names = {**names, **(GGUF_POST_NORM if gguf else _HUB_POST_NORM)}
        out = {}
        for p in self.parameters():
            stem, bias = p.name.removesuffix("_bias"), p.name.endswith("_bias")
            parts = stem.split(".")
            if parts[0] == "layers":
                their = names[".".join(parts[2:])].format(i=parts[1])
            else:
                their = names[stem]
            order = None
            if gguf and self.config.permuted and parts[-1] in ("q", "k"):
                order = _unpermute(p.shape[0], self.config.head_dim)
            out[p.name] = Source(their + (".bias" if bias else ".weight"), order=order)
        return out

    def ignored(self) -> tuple[str, ...]:
        extra = ("lm_head.weight", "output.weight") if self.config.tied else ()
        return ("*.rotary_emb.inv_freq", "rope_freqs.weight", *extra)

    def states(self) -> tuple[StateSpec, ...]:
        shape = (1, self.config.kv_heads, CAPACITY, self.config.head_dim)
        return tuple(
            StateSpec(f"layers.{i}.attn.{n}", shape, "float32", "kv")
            for i in range(self.config.layers)
            for n in ("k", "v")
        )

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return op.rows(w["embed"], ids)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c = self.config
        delta: T | None = None  # what the last block adds to the residual stream x
        rope = self.turns(op)
        for i in range(c.layers):
            block = self._post_norm_layer if c.post_norm else self.layer
            x, delta = block(op, w, i, x, delta, rope)
        return logits(op, w, x, delta, eps=c.norm_eps, tied=c.tied)

    def turns(self, op: Ops[T]) -> Rope | T:
        """What turns q and k: rotary embedding by position, or angles `(seq, head_dim / 2)`."""
        return Rope(self.config.inv_freq, self.config.context_length)

    def layer(
        self, op: Ops[T], w: Mapping[str, Weight], i: int, x: T, delta: T | None, rope: Rope | T
    ) -> tuple[T, T | None]:
        """One pre-norm layer: x `(seq, hidden)` and the last block's output, both carried."""
        p, eps = f"layers.{i}", self.config.norm_eps
        x, h = op.add_norm(x, delta, w[f"{p}.norm_attn"], eps=eps)
        h = self._attention(op, w, i, h, rope)
        x, h = op.add_norm(x, h, w[f"{p}.norm_mlp"], eps=eps)
        return x, self._mlp(op, w, i, h)

    def _post_norm_layer(
        self, op: Ops[T], w: Mapping[str, Weight], i: int, x: T, delta: T | None, rope: Rope | T
    ) -> tuple[T, T | None]:
        p, eps = f"layers.{i}", self.config.norm_eps
        h = self._attention(op, w, i, x, rope)
        x = op.add(x, op.norm(h, w[f"{p}.norm_attn"], eps=eps))
        h = self._mlp(op, w, i, x)
        return op.add(x, op.norm(h, w[f"{p}.norm_mlp"], eps=eps)), None

    def _attention(self, op: Ops[T], w: Mapping[str, Weight], i: int, h: T, rope: Rope | T) -> T:
        c, p = self.config, f"layers.{i}.attn"
        bias = tuple(w[f"{p}.{n}_bias"] for n in "qkv") if c.qkv_bias else ()
        q, k, v = op.linear(h, w[f"{p}.q"], w[f"{p}.k"], w[f"{p}.v"], bias=bias)
        if c.qk_norm == "full":
            q = op.norm(q, w[f"{p}.q_norm"], eps=c.norm_eps)
            k = op.norm(k, w[f"{p}.k_norm"], eps=c.norm_eps)
        if not isinstance(rope, Rope):
            q, k = op.rotary(q, rope, c.heads), op.rotary(k, rope, c.kv_heads)
        spec = Attention(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.head_dim**-0.5,
            rope=rope if isinstance(rope, Rope) else None,
            window=c.windows[i],
            q_norm=w[f"{p}.q_norm"] if c.qk_norm == "head" else None,
            k_norm=w[f"{p}.k_norm"] if c.qk_norm == "head" else None,
            norm_eps=c.norm_eps,
        )
        k_state, v_state = self.states()[2 * i : 2 * i + 2]
        h = op.attention(q, k, v, k_state, v_state, spec)
        return op.linear(h, w[f"{p}.o"], bias=(w[f"{p}.o_bias"],) if c.output_bias else ())[0]

    def _mlp(self, op: Ops[T], w: Mapping[str, Weight], i: int, h: T) -> T:
        c, p = self.config, f"layers.{i}.mlp"
        bias = (w[f"{p}.gate_bias"], w[f"{p}.up_bias"]) if c.mlp_bias else ()
        gate, up = op.linear(h, w[f"{p}.gate"], w[f"{p}.up"], bias=bias)
        h = op.glu(gate, up, c.activation)
        return op.linear(h, w[f"{p}.down"], bias=(w[f"{p}.down_bias"],) if c.mlp_bias else ())[0]


_HUB_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "norm_attn": "model.layers.{i}.input_layernorm",
    "norm_mlp": "model.layers.{i}.post_attention_layernorm",
    "attn.q": "model.layers.{i}.self_attn.q_proj",
    "attn.k": "model.layers.{i}.self_attn.k_proj",
    "attn.v": "model.layers.{i}.self_attn.v_proj",
    "attn.o": "model.layers.{i}.self_attn.o_proj",
    "attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "mlp.up": "model.layers.{i}.mlp.up_proj",
    "mlp.down": "model.layers.{i}.mlp.down_proj",
}
_HUB_POST_NORM = {
    "norm_attn": "model.layers.{i}.post_attention_layernorm",
    "norm_mlp": "model.layers.{i}.post_feedforward_layernorm",
}
GGUF_NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "norm_attn": "blk.{i}.attn_norm",
    "norm_mlp": "blk.{i}.ffn_norm",
    "attn.q": "blk.{i}.attn_q",
    "attn.k": "blk.{i}.attn_k",
    "attn.v": "blk.{i}.attn_v",
    "attn.o": "blk.{i}.attn_output",
    "attn.q_norm": "blk.{i}.attn_q_norm",
    "attn.k_norm": "blk.{i}.attn_k_norm",
    "mlp.gate": "blk.{i}.ffn_gate",
    "mlp.up": "blk.{i}.ffn_up",
    "mlp.down": "blk.{i}.ffn_down",
}
GGUF_POST_NORM = {
    "norm_attn": "blk.{i}.post_attention_norm",
    "norm_mlp": "blk.{i}.post_ffw_norm",
}


def _unpermute(rows: int, head_dim: int) -> NDArray[np.int64]:
    """llama.cpp stores q and k of `llama` for interleaved rope: each head's halves shuffled
    together. Our row (head, half p, j) is its row (head, j, p).
    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    order = np.arange(rows, dtype=np.int64).reshape(-1, head_dim // 2, 2)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(rows)


def _context(longest: int, asked: int | None) -> int:
    return min(longest, asked or DEFAULT_CONTEXT)


def _hub_config(checkpoint: Checkpoint, where: str, context: int | None) -> LlamaConfig:
    f = Fields(checkpoint.config, f"{where}, config.json")
    model_type = f.one_of("model_type", ("llama", "mistral", "qwen2", "qwen3", "olmo2"))
    layers = f.size("num_hidden_layers", limit=MAX_LAYERS)
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    head_dim = f.size("head_dim", max(1, hidden // heads))
    scaling = {**f.table("rope_scaling"), **f.table("rope_parameters")}
    theta = f.number("rope_theta", 10000.0, positive=True)
    theta = Fields(scaling, f"{f.where}, rope_parameters").number(
        "rope_theta", theta, positive=True
    )
    qwen = model_type.startswith("qwen")
    bias = f.flag("attention_bias", model_type == "qwen2")
    act = f.text("hidden_act", "silu")
    if act not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"activation {act!r} has no definition here",
            where=where,
            expected=" | ".join(_ACTIVATIONS),
        )
    if f.get("pretraining_tp", 1) != 1:
        raise UnsupportedArchitecture("pretraining_tp other than 1", where=where)
    return LlamaConfig(
        model_type=model_type,
        vocab_size=f.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=f.size("num_key_value_heads", 8 if model_type == "mistral" else heads),
        head_dim=head_dim,
        norm_eps=f.number("rms_norm_eps", 1e-5 if model_type == "olmo2" else 1e-6),
        context_length=_context(f.size("max_position_embeddings", 2048), context),
        inv_freq=scaled_frequencies(theta, head_dim, scaling, where),
        rope_theta=theta,
        rope_scaling=scaling if scaling.get("rope_type") == "llama3" else None,
        tied=f.flag("tie_word_embeddings", False),
        windows=_windows(f, model_type, layers),
        activation=_ACTIVATIONS[act],
        qkv_bias=True if model_type == "qwen2" else bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=f.flag("mlp_bias", False) if not qwen else False,
        qk_norm={"qwen3": "head", "olmo2": "full"}.get(model_type, "none"),  # type: ignore[arg-type]
        post_norm=model_type == "olmo2",
    )


def _windows(f: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer. Qwen slides only where `use_sliding_window`, and from
    `max_window_layers` on; newer configs list `layer_types`."""
    # Absent is not null: transformers' MistralConfig slides over 4096 tokens unless told not to.
    absent = 4096 if model_type == "mistral" else None
    window = f.get("sliding_window") if "sliding_window" in f.config else absent
    if window is None or (
        model_type.startswith("qwen") and not f.flag("use_sliding_window", False)
    ):
        return (None,) * layers
    if model_type not in ("mistral", "qwen2", "qwen3"):
        return (None,) * layers
    window = f.size("sliding_window", absent)
    kinds = f.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers and model_type != "mistral":
        return tuple(window if k == "sliding_attention" else None for k in kinds)
    first = f.size("max_window_layers", 28, least=0) if model_type != "mistral" else 0
    return tuple(window if i >= first else None for i in range(layers))


def _gguf_config(checkpoint: Checkpoint, where: str, context: int | None) -> LlamaConfig:
    meta, tensors = checkpoint.config, checkpoint.tensors
    model_type = str(meta.get("general.architecture"))
    f = Fields(meta, where, prefix=f"{model_type}.")
    layers = f.size("block_count", limit=MAX_LAYERS)
    hidden, heads = f.size("embedding_length"), f.size("attention.head_count")
    head_dim = f.size("attention.key_length", max(1, hidden // heads))
    if f.size("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedArchitecture("rope over a part of each head", where=where)
    theta = f.number("rope.freq_base", 10000.0, positive=True)
    inv_freq = inverse_frequencies(theta, head_dim)
    if f.get("rope.scaling.type", "none") == "linear":
        inv_freq = inv_freq / np.float32(f.number("rope.scaling.factor", positive=True))
    elif f.get("rope.scaling.type", "none") != "none":
        raise UnsupportedArchitecture(
            f"rope scaling {f.get('rope.scaling.type')!r} has no definition here", where=where
        )
    if "rope_freqs.weight" in tensors:  # llama3 scaling, as divisors
        inv_freq = inv_freq / checkpoint.read("rope_freqs.weight")
    embed = tensors.get("token_embd.weight")
    if embed is None:
        raise CheckpointError("the GGUF file has no token_embd.weight", where=where)
    window = f.size("attention.sliding_window", 0, least=0)
    return LlamaConfig(
        model_type=model_type,
        vocab_size=embed.shape[0],
        hidden_size=hidden,
        intermediate_size=f.size("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=f.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=f.number("attention.layer_norm_rms_epsilon"),
        context_length=_context(f.size("context_length", 2048), context),
        inv_freq=inv_freq.astype(np.float32),
        rope_theta=theta,
        tied="output.weight" not in tensors,
        windows=(window or None,) * layers,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm={"qwen3": "head", "olmo2": "full"}.get(model_type, "none"),  # type: ignore[arg-type]
        post_norm=model_type == "olmo2",
        permuted=model_type == "llama",
    )
