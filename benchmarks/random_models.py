"""Checkpoints with random weights of published dimensions: for times and sizes, not for quality.

Hub layouts in float16, so that a 0.1B model takes 0.4 GB at most; made once, kept in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float16]]


class _Random:
    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def matrix(self, rows: int, columns: int) -> NDArray[np.float16]:
        """Outputs about as large as inputs."""
        return (self._rng.standard_normal((rows, columns), np.float32) / columns**0.5).astype("f2")

    def vector(self, *shape: int, mean: float = 0.0, spread: float = 0.1) -> NDArray[np.float16]:
        return (mean + spread * self._rng.standard_normal(shape, np.float32)).astype("f2")


def mamba_130m() -> tuple[dict[str, Any], Tensors]:
    """state-spaces/mamba-130m-hf: 24 layers of 768, d_inner 1536, 16 states."""
    r, width, inner, states, rank, layers, vocab = _Random(), 768, 1536, 16, 48, 24, 50280
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


def mamba2_130m() -> tuple[dict[str, Any], Tensors]:
    """state-spaces/mamba2-130m: 24 layers of 768, 24 heads of 64, 128 states."""
    r, width, inner, states, heads, layers, vocab = _Random(), 768, 1536, 128, 24, 24, 50288
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


def rwkv7_0_1b() -> tuple[dict[str, Any], Tensors]:
    """RWKV-7 World 0.1B: 12 layers of 768, 12 heads of 64, in flash-linear-attention's names."""
    r, width, ffn, heads, layers, vocab = _Random(), 768, 3072, 12, 12, 65536
    out = {
        "model.embeddings.weight": r.matrix(vocab, width),
        "lm_head.weight": r.matrix(vocab, width),
    }

    def norm(name: str) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = r.vector(width, mean=1), r.vector(width)

    norm("model.layers.0.pre_norm")
    norm("model.norm")
    for i in range(layers):
        layer = f"model.layers.{i}"
        attn = f"{layer}.attn"
        for name in (f"{layer}.attn_norm", f"{layer}.ffn_norm", f"{attn}.g_norm"):
            norm(name)
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


MODELS: dict[str, Callable[[], tuple[dict[str, Any], Tensors]]] = {
    "rwkv7-0.1b": rwkv7_0_1b,
    "mamba-130m": mamba_130m,
    "mamba2-130m": mamba2_130m,
}


def checkpoint(name: str, cache: Path) -> Path:
    """The model's folder in the cache."""
    from safetensors.numpy import save_file

    folder = cache / "random" / name
    if not (folder / "config.json").is_file():
        config, tensors = MODELS[name]()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
