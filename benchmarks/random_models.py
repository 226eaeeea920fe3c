"""Checkpoints with random weights of published dimensions: for times and sizes, not for quality.

Hub layouts in float16, so that a 0.1B model takes 0.4 GB at most and one of 0.4B 0.9 GB; made
once, kept in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float16]]
#: config.json and the tensors.
Checkpoint = tuple[dict[str, Any], Tensors]


class _Random:
    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def matrix(self, rows: int, columns: int) -> NDArray[np.float16]:
        """Outputs about as large as inputs."""
        return (self._rng.standard_normal((rows, columns), np.float32) / columns**0.5).astype("f2")

    def vector(self, *shape: int, mean: float = 0.0, spread: float = 0.1) -> NDArray[np.float16]:
        return (mean + spread * self._rng.standard_normal(shape, np.float32)).astype("f2")

    def norms(self, out: Tensors, width: int, *names: str) -> None:
        """Adds weight and bias of layer norms."""
        for name in names:
            out[f"{name}.weight"] = self.vector(width, mean=1)
            out[f"{name}.bias"] = self.vector(width)


def mamba(width: int, layers: int, vocab: int = 50280) -> Checkpoint:
    """Mamba with 16 states and a rank of width / 16 for the time step."""
    r, inner, states, rank = _Random(), 2 * width, 16, width // 16
    out = {"backbone.embeddings.weight": r.matrix(vocab, width)}
    out["backbone.norm_f.weight"] = r.vector(width, mean=1)
    for i in range(layers):
        layer = f"backbone.layers.{i}"
        mixer = f"{layer}.mixer"
        out |= {
            f"{layer}.norm.weight": r.vector(width, mean=1),
            f"{mixer}.in_proj.weight": r.matrix(2 * inner, width),
            f"{mixer}.conv1d.weight": r.vector(inner, 1, 4, spread=0.5),
            f"{mixer}.conv1d.bias": r.vector(inner),
            f"{mixer}.x_proj.weight": r.matrix(rank + 2 * states, inner),
            f"{mixer}.dt_proj.weight": r.matrix(inner, rank),
            f"{mixer}.dt_proj.bias": r.vector(inner, mean=-4),
            f"{mixer}.A_log": np.tile(np.log(np.arange(1, states + 1)), (inner, 1)).astype("f2"),
            f"{mixer}.D": r.vector(inner, mean=1),
            f"{mixer}.out_proj.weight": r.matrix(width, inner),
        }
    config = {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": width,
        "num_hidden_layers": layers, "intermediate_size": inner, "state_size": states,
        "time_step_rank": rank, "conv_kernel": 4, "expand": 2, "vocab_size": vocab,
        "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    return config, out


def mamba2(width: int, layers: int, vocab: int = 50288) -> Checkpoint:
    """Mamba-2 with heads of 64, 128 states and one group."""
    r, inner, states, heads = _Random(), 2 * width, 128, 2 * width // 64
    out = {"backbone.embeddings.weight": r.matrix(vocab, width)}
    out["backbone.norm_f.weight"] = r.vector(width, mean=1)
    for i in range(layers):
        layer = f"backbone.layers.{i}"
        mixer = f"{layer}.mixer"
        out |= {
            f"{layer}.norm.weight": r.vector(width, mean=1),
            f"{mixer}.in_proj.weight": r.matrix(2 * inner + 2 * states + heads, width),
            f"{mixer}.conv1d.weight": r.vector(inner + 2 * states, 1, 4, spread=0.5),
            f"{mixer}.conv1d.bias": r.vector(inner + 2 * states),
            f"{mixer}.dt_bias": r.vector(heads, mean=-4),
            f"{mixer}.A_log": np.log(np.linspace(1, 16, heads)).astype("f2"),
            f"{mixer}.D": r.vector(heads, mean=1),
            f"{mixer}.norm.weight": r.vector(inner, mean=1),
            f"{mixer}.out_proj.weight": r.matrix(width, inner),
        }
    config = {
        "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_size": width,
        "num_hidden_layers": layers, "state_size": states, "num_heads": heads, "head_dim": 64,
        "n_groups": 1, "conv_kernel": 4, "expand": 2, "vocab_size": vocab, "use_bias": False,
        "use_conv_bias": True, "hidden_act": "silu", "layer_norm_epsilon": 1e-5,
        "chunk_size": 256, "rms_norm": True, "tie_word_embeddings": True,
        "time_step_limit": [0.0, float("inf")],
    }  # fmt: skip
    return config, out


def rwkv7(width: int, layers: int, vocab: int = 65536) -> Checkpoint:
    """RWKV-7 World of up to 1024 wide, in flash-linear-attention's names."""
    r, ffn, heads = _Random(), 4 * width, width // 64
    out = {
        "model.embeddings.weight": r.matrix(vocab, width),
        "lm_head.weight": r.matrix(vocab, width),
    }
    r.norms(out, width, "model.layers.0.pre_norm", "model.norm")
    for i in range(layers):
        layer = f"model.layers.{i}"
        attn = f"{layer}.attn"
        r.norms(out, width, f"{layer}.attn_norm", f"{layer}.ffn_norm", f"{attn}.g_norm")
        for m in "rkvo":
            out[f"{attn}.{m}_proj.weight"] = r.matrix(width, width)
        for m in "rwkvag":
            out[f"{attn}.x_{m}"] = r.vector(1, 1, width, mean=0.5)
        for m, rank, bias in (("w", 64, -1.0), ("a", 64, 0.0), ("v", 32, 0.5), ("g", 128, None)):
            if m == "v" and i == 0:
                continue
            out[f"{attn}.{m}_lora.lora.0.weight"] = r.matrix(rank, width)
            out[f"{attn}.{m}_lora.lora.2.weight"] = r.matrix(width, rank)
            if bias is not None:
                out[f"{attn}.{m}_lora.lora.2.bias"] = r.vector(width, mean=bias)
        out |= {
            f"{attn}.k_k": r.vector(width, mean=0.8),
            f"{attn}.k_a": r.vector(width, mean=1),
            f"{attn}.r_k": r.vector(heads, 64),
            f"{layer}.ffn.x_k": r.vector(width, mean=0.5),
            f"{layer}.ffn.key.weight": r.matrix(ffn, width),
            f"{layer}.ffn.value.weight": r.matrix(width, ffn),
        }
    return {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"]}, out


def rwkv6(width: int, layers: int, vocab: int = 65536) -> Checkpoint:
    """RWKV-6 World below 4096 wide, in flash-linear-attention's names: adapters of rank 32 (mixes)
    and 64 (decay), a channel mix of 3.5 widths. Source: RWKV-LM, `RWKV-v5` (x060)."""
    r, ffn, mix_rank, decay_rank = _Random(), int(3.5 * width) // 32 * 32, 32, 64
    out = {
        "model.embeddings.weight": r.matrix(vocab, width),
        "lm_head.weight": r.matrix(vocab, width),
    }
    r.norms(out, width, "model.layers.0.pre_norm", "model.norm")
    for i in range(layers):
        layer = f"model.layers.{i}"
        attn, up = f"{layer}.attn", f"{layer}.attn.x_proj.2.weight"
        r.norms(out, width, f"{layer}.attn_norm", f"{layer}.ffn_norm", f"{attn}.g_norm")
        for m in "rkvg":
            out[f"{attn}.{m}_proj.linear.weight"] = r.matrix(width, width)
        out |= {
            f"{attn}.o_proj.weight": r.matrix(width, width),
            f"{attn}.x_proj.0.mu": r.vector(width, mean=0.5),
            f"{attn}.x_proj.0.linear.weight": r.matrix(5 * mix_rank, width),
            up: np.concatenate([r.matrix(width, mix_rank) for _ in range(5)], axis=1),
            f"{attn}.x_bias": r.vector(5, width, mean=0.5),
            f"{attn}.w_proj.linear.lora.0.weight": r.matrix(decay_rank, width),
            f"{attn}.w_proj.linear.lora.2.weight": r.matrix(width, decay_rank),
            f"{attn}.w_proj.linear.lora.2.bias": r.vector(width, mean=-3),
            f"{attn}.bonus": r.vector(width // 64, 64, mean=0.5),
            f"{layer}.ffn.key.mu": r.vector(width, mean=0.5),
            f"{layer}.ffn.receptance.mu": r.vector(width, mean=0.5),
            f"{layer}.ffn.key.linear.weight": r.matrix(ffn, width),
            f"{layer}.ffn.receptance.linear.weight": r.matrix(width, width),
            f"{layer}.ffn.value.weight": r.matrix(width, ffn),
        }
    # 64e-5: see `GROUP_NORM_EPS` of the exporter's rwkv.py.
    config = {
        "model_type": "rwkv6", "architectures": ["RWKV6ForCausalLM"], "group_norm_eps": 64e-5
    }  # fmt: skip
    return config, out


def rwkv4(width: int, layers: int, vocab: int = 50277) -> Checkpoint:
    """RWKV-4 Pile, in transformers' names."""
    r, ffn = _Random(), 4 * width
    out = {"rwkv.embeddings.weight": r.matrix(vocab, width), "head.weight": r.matrix(vocab, width)}
    r.norms(out, width, "rwkv.blocks.0.pre_ln", "rwkv.ln_out")
    for i in range(layers):
        block = f"rwkv.blocks.{i}"
        attention, feed = f"{block}.attention", f"{block}.feed_forward"
        r.norms(out, width, f"{block}.ln1", f"{block}.ln2")
        out |= {
            f"{attention}.time_decay": r.vector(width, mean=-1, spread=1),
            f"{attention}.time_first": r.vector(width, mean=-1),
            f"{feed}.key.weight": r.matrix(ffn, width),
            f"{feed}.receptance.weight": r.matrix(width, width),
            f"{feed}.value.weight": r.matrix(width, ffn),
        }
        for m in ("key", "value", "receptance", "output"):
            out[f"{attention}.{m}.weight"] = r.matrix(width, width)
        for part, mixes in ((attention, ("key", "value", "receptance")),
                            (feed, ("key", "receptance"))):  # fmt: skip
            for m in mixes:
                out[f"{part}.time_mix_{m}"] = r.vector(1, 1, width, mean=0.5)
    config = {
        "model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "hidden_size": width,
        "num_hidden_layers": layers, "vocab_size": vocab, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return config, out


@dataclass(frozen=True)
class Dimensions:
    """A published model's: which definition, its width and layers."""

    make: Callable[[int, int], Checkpoint]
    width: int
    layers: int


#: As state-spaces/mamba-*-hf, mamba2-130m and BlinkDL's rwkv-4-pile-169m and rwkv-7-world have
#: them; RWKV-6 was not published below 1.6B: the depth and width are RWKV-7 0.4B's.
MODELS = {
    "mamba-130m": Dimensions(mamba, 768, 24),
    "mamba-370m": Dimensions(mamba, 1024, 48),
    "mamba2-130m": Dimensions(mamba2, 768, 24),
    "rwkv7-0.1b": Dimensions(rwkv7, 768, 12),
    "rwkv7-0.4b": Dimensions(rwkv7, 1024, 24),
    "rwkv6-0.4b": Dimensions(rwkv6, 1024, 24),
    "rwkv4-169m": Dimensions(rwkv4, 768, 12),
}


def checkpoint(name: str, cache: Path) -> Path:
    """The model's folder in the cache."""
    folder = cache / "random" / name
    if not (folder / "config.json").is_file():
        size = MODELS[name]
        write(size.make(size.width, size.layers), folder)
    return folder


def write(made: Checkpoint, folder: Path) -> None:
    """A hub-layout folder; config.json comes last, so that it marks a whole one."""
    from safetensors.numpy import save_file

    config, tensors = made
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
