"""GGUF maps of RWKV-6 and RWKV-7. Source: llama.cpp src/llama-model.cpp and its hub converter."""

from __future__ import annotations

import math

import numpy as np

from edge_mmllm_export.gguf.maps.base import GgufMap, GgufTensor, Hold, Value, refuse
from edge_mmllm_export.gguf.maps.mamba import CONTEXT
from edge_mmllm_export.models.rwkv import GROUP_NORM_EPS, LONG
from edge_mmllm_export.models.rwkv6 import Rwkv6
from edge_mmllm_export.models.rwkv7 import Rwkv7

#: The orders in which llama.cpp stacks mixes.
_MIXES_6, _MIXES_7 = "wkvrg", "rwkvag"

#: ggml's kernel of RWKV-7 takes so many channels at a time with AVX-512, and reads beyond a
#: smaller head. Source: `ggml_compute_forward_rwkv_wkv7_f32`, GGML_F32_STEP.
_STEP_7 = 64


def rwkv6(model: Rwkv6) -> GgufMap:
    c = model.config
    metadata = _metadata(model) | {
        "time_mix_extra_dim": c.mix_rank,
        "time_decay_extra_dim": c.decay_rank,
        "rescale_every_n_layers": 0,
    }
    out, width = _frame(), c.hidden_size
    for i in range(c.layers):
        p, b = f"layers.{i}.att", f"blk.{i}.time_mix"
        ups = tuple(f"{p}.mix.{m}.up" for m in _MIXES_6)
        mixes = tuple(f"{p}.mix.{m}.bias" for m in _MIXES_6)
        out += _layer(model, i, "rkvgo", "kr")
        out += [
            GgufTensor(f"{b}_w2.weight", ups, (5, width, c.mix_rank), "float32"),
            GgufTensor(f"{b}_lerp_x.weight", (f"{p}.x_x",), (1, 1, width), "float32"),
            GgufTensor(f"{b}_lerp_fused.weight", mixes, (5, 1, 1, width), "float32"),
            GgufTensor(f"{b}_decay.weight", (f"{p}.w.bias",)),
            GgufTensor(f"{b}_decay_w1.weight", (f"{p}.w.down",), None, "float32"),
            GgufTensor(f"{b}_decay_w2.weight", (f"{p}.w.up",), None, "float32"),
            GgufTensor(f"{b}_first.weight", (f"{p}.u",), None, "float32"),
            _mix_down(model, f"{b}_w1.weight", f"{p}.mix.down"),
        ]
    return GgufMap("rwkv6", metadata, out, None)


def rwkv7(model: Rwkv7) -> GgufMap:
    """Raises: UnsupportedArchitecture."""
    c = model.config
    if c.head_size % _STEP_7:
        refuse(f"its heads are of {c.head_size}", model.name, f"multiples of {_STEP_7}")
    metadata = _metadata(model) | {
        "attention.decay_lora_rank": c.ranks["w"],
        "attention.iclr_lora_rank": c.ranks["a"],
        "attention.value_residual_mix_lora_rank": c.ranks.get("v", c.ranks["a"]),
        "attention.gate_lora_rank": c.ranks["g"],
    }
    out, width = _frame(), c.hidden_size
    for i in range(c.layers):
        p, b = f"layers.{i}.att", f"blk.{i}.time_mix"
        mixes = tuple(f"{p}.x_{m}" for m in _MIXES_7)
        bonus = GgufTensor(f"{b}_r_k.weight", (f"{p}.r_k",), (width,), scale=1 / _louder(model))
        out += _layer(model, i, "rkvo", "k")
        out += [
            GgufTensor(f"{b}_lerp_fused.weight", mixes, (6, 1, 1, width), "float32"),
            GgufTensor(f"{b}_k_k.weight", (f"{p}.k_k",)),
            GgufTensor(f"{b}_k_a.weight", (f"{p}.k_a",)),
            bonus,
        ]
        for m in "wavg":
            # llama.cpp asks the first layer for a v that it never reads: that of a.
            ours = "a" if m == "v" and i == 0 else m
            hold: Hold = "float32" if m == "w" else "float16"
            out.append(GgufTensor(f"{b}_{m}1.weight", (f"{p}.{ours}.down",), None, hold))
            out.append(GgufTensor(f"{b}_{m}2.weight", (f"{p}.{ours}.up",), None, hold))
            if m != "g":
                out.append(GgufTensor(f"{b}_{m}0.weight", (f"{p}.{ours}.bias",)))
    return GgufMap("rwkv7", metadata, out, None)


def _metadata(model: Rwkv6 | Rwkv7) -> dict[str, Value]:
    c = model.config
    return {
        "context_length": CONTEXT,
        "embedding_length": c.hidden_size,
        "block_count": c.layers,
        "feed_forward_length": c.dim_ffn,
        "attention.head_count": 0,
        "attention.layer_norm_epsilon": float(c.norm_eps),
        "wkv.head_size": c.head_size,
        "vocab_size": c.vocab_size,
    }


def _louder(model: Rwkv6 | Rwkv7) -> float:
    """llama.cpp's group norm has one epsilon, BlinkDL's. A model with another has the same output
    where what is normalized, linear in the values, is as much louder as the epsilon's root."""
    return math.sqrt(GROUP_NORM_EPS / model.config.group_norm_eps)


def _frame() -> list[GgufTensor]:
    out = [GgufTensor("token_embd.weight", ("embed",)), GgufTensor("output.weight", ("head",))]
    return out + _norm("token_embd_norm", "ln0") + _norm("output_norm", "ln_out")


def _norm(theirs: str, ours: str) -> list[GgufTensor]:
    return [GgufTensor(f"{theirs}.{n}", (f"{ours}.{n}",)) for n in ("weight", "bias")]


def _layer(model: Rwkv6 | Rwkv7, i: int, projections: str, mixes: str) -> list[GgufTensor]:
    """What both versions have: norms, projections, channel mixing."""
    p, b, width = f"layers.{i}", f"blk.{i}", model.hidden_size
    out = _norm(f"{b}.attn_norm", f"{p}.ln1") + _norm(f"{b}.attn_norm_2", f"{p}.ln2")
    out += _norm(f"{b}.time_mix_ln", f"{p}.att.ln_x")
    for m in projections:
        scale = _louder(model) if m == "v" else 1.0
        out.append(GgufTensor(f"{b}.time_mix_{LONG[m]}.weight", (f"{p}.att.{m}",), scale=scale))
    for m in "krv" if "r" in mixes else "kv":
        out.append(GgufTensor(f"{b}.channel_mix_{LONG[m]}.weight", (f"{p}.ffn.{m}",)))
    for m in mixes:
        name, part = f"{b}.channel_mix_lerp_{m}.weight", (f"{p}.ffn.x_{m}",)
        out.append(GgufTensor(name, part, (1, 1, width), "float32"))
    return out


def _mix_down(model: Rwkv6, name: str, part: str) -> GgufTensor:
    """The mixes' first adapters, one block of rows each, in llama.cpp's order."""
    mark = "layers.0.att.mix."
    ups = [p.name.removeprefix(mark) for p in model.parameters() if p.name.startswith(mark)]
    mixes = [name[0] for name in ups if name.endswith(".up")]
    rank = model.config.mix_rank
    blocks = np.arange(5 * rank, dtype=np.int64).reshape(5, rank)
    order = blocks[[mixes.index(m) for m in _MIXES_6]].reshape(-1)
    same = mixes == list(_MIXES_6)
    return GgufTensor(name, (part,), None, "float32", None if same else order)
