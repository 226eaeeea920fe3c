"""Checkpoints that the session's contract tests export to other engines' formats: one model whose
state grows and one whose state does not, over the toys' vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import toys


def llama(folder: Path) -> None:
    """A random llama in hub layout."""
    from safetensors.numpy import save_file

    rng, width, inner, vocab = np.random.default_rng(0), 64, 96, toys.VOCAB

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2 / np.sqrt(shape[-1])).astype(np.float32)

    out = {
        "model.embed_tokens.weight": matrix(vocab, width),
        "lm_head.weight": matrix(vocab, width),
    }
    out["model.norm.weight"] = np.ones(width, np.float32)
    for i in range(2):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}.{norm}.weight"] = np.ones(width, np.float32)
        for name, rows in (("q", width), ("k", 32), ("v", 32), ("o", width)):
            out[f"{layer}.self_attn.{name}_proj.weight"] = matrix(rows, width)
        for name, shape in (
            ("gate", (inner, width)),
            ("up", (inner, width)),
            ("down", (width, inner)),
        ):
            out[f"{layer}.mlp.{name}_proj.weight"] = matrix(*shape)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab,
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    save_file(out, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def mamba2(folder: Path) -> None:
    import random_models

    random_models.write(random_models.mamba2(64, 2, toys.VOCAB), folder)


MODELS = {"recurrent": mamba2, "attention": llama}
