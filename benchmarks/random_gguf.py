"""GGUF files of the checkpoints of `random_models`, for llama.cpp to quantize: the same weights.

Matrices in float16, and in float32 what llama.cpp's own converter keeps so (vectors, convolutions,
decays, the adapters of mixes and decay). There is no tokenizer in them (`no_vocab`): token ids go
in and logits come out. llama.cpp has no RWKV-4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import random_models
from gguf import GGUFWriter
from numpy.typing import NDArray

Array = NDArray[Any]
Named = Iterator[tuple[str, Array]]

#: Two-dimensional tensors that stay in float32.
_FLOAT32 = ("ssm_conv1d", "time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay_w1",
            "time_mix_decay_w2", "lerp_fused")  # fmt: skip
_CONTEXT = 1 << 20


class _Source:
    """A hub-layout checkpoint: its config, and tensors by name."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
        self._tensors: dict[str, Array] = load_file(folder / "model.safetensors")

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

    def pair(self, ours: str, theirs: str) -> Named:
        """Weight and bias."""
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", self[f"{theirs}.{part}"]

    def layers(self, prefix: str) -> range:
        """Numbers of the layers."""
        return range(1 + max(int(n[len(prefix) :].split(".")[1]) for n in self._tensors
                             if n.startswith(f"{prefix}.")))  # fmt: skip


def _mamba(s: _Source, out: GGUFWriter) -> Named:
    """Mamba and Mamba-2. The decay is stored as -exp(A_log)."""
    c, second = s.config, s.config["model_type"] == "mamba2"
    layers, inner = s.layers("backbone.layers"), 2 * c["hidden_size"]
    _frame(out, s["backbone.embeddings.weight"].shape, len(layers), feed_forward=0)
    out.add_layer_norm_rms_eps(c["layer_norm_epsilon"])
    out.add_ssm_conv_kernel(c["conv_kernel"])
    out.add_ssm_inner_size(inner)
    out.add_ssm_state_size(c["state_size"])
    out.add_ssm_time_step_rank(c["num_heads"] if second else c["time_step_rank"])
    if second:
        out.add_ssm_group_count(c["n_groups"])
    yield "token_embd.weight", s["backbone.embeddings.weight"]
    yield "output_norm.weight", s["backbone.norm_f.weight"]
    for i in layers:
        b, mixer = f"blk.{i}", f"backbone.layers.{i}.mixer"
        yield f"{b}.attn_norm.weight", s[f"backbone.layers.{i}.norm.weight"]
        yield f"{b}.ssm_in.weight", s[f"{mixer}.in_proj.weight"]
        yield f"{b}.ssm_conv1d.weight", s[f"{mixer}.conv1d.weight"][:, 0]
        yield f"{b}.ssm_conv1d.bias", s[f"{mixer}.conv1d.bias"]
        decay, skip = -np.exp(s[f"{mixer}.A_log"].astype("f4")), s[f"{mixer}.D"]
        if second:
            yield f"{b}.ssm_dt.bias", s[f"{mixer}.dt_bias"]
            yield f"{b}.ssm_norm.weight", s[f"{mixer}.norm.weight"].reshape(c["n_groups"], -1)
            decay, skip = decay[:, None], skip[:, None]
        else:
            yield f"{b}.ssm_x.weight", s[f"{mixer}.x_proj.weight"]
            yield from s.pair(f"{b}.ssm_dt", f"{mixer}.dt_proj")
        yield f"{b}.ssm_a", decay
        yield f"{b}.ssm_d", skip
        yield f"{b}.ssm_out.weight", s[f"{mixer}.out_proj.weight"]


def _rwkv(s: _Source, out: GGUFWriter, ffn: str) -> tuple[range, Named]:
    """What RWKV-6 and 7 share. `ffn`: the channel mix's key."""
    layers = s.layers("model.layers")
    rows = s[f"model.layers.0.ffn.{ffn}.weight"].shape[0]
    _frame(out, s["model.embeddings.weight"].shape, len(layers), feed_forward=rows)
    out.add_layer_norm_eps(1e-5)
    out.add_wkv_head_size(64)

    def tensors() -> Named:
        yield "token_embd.weight", s["model.embeddings.weight"]
        yield from s.pair("token_embd_norm", "model.layers.0.pre_norm")
        yield from s.pair("output_norm", "model.norm")
        yield "output.weight", s["lm_head.weight"]
        for i in layers:
            b, layer = f"blk.{i}", f"model.layers.{i}"
            yield from s.pair(f"{b}.attn_norm", f"{layer}.attn_norm")
            yield from s.pair(f"{b}.attn_norm_2", f"{layer}.ffn_norm")
            yield from s.pair(f"{b}.time_mix_ln", f"{layer}.attn.g_norm")
            yield f"{b}.time_mix_output.weight", s[f"{layer}.attn.o_proj.weight"]
            yield f"{b}.channel_mix_key.weight", s[f"{layer}.ffn.{ffn}.weight"]
            yield f"{b}.channel_mix_value.weight", s[f"{layer}.ffn.value.weight"]

    return layers, tensors()


def _rwkv7(s: _Source, out: GGUFWriter) -> Named:
    layers, shared = _rwkv(s, out, "key")
    first = "model.layers.1.attn"
    ranks = {m: s[f"{first}.{m}_lora.lora.0.weight"].shape[0] for m in "wavg"}
    out.add_decay_lora_rank(ranks["w"])
    out.add_iclr_lora_rank(ranks["a"])
    out.add_value_residual_mix_lora_rank(ranks["v"])
    out.add_gate_lora_rank(ranks["g"])
    yield from shared
    for i in layers:
        b, attn = f"blk.{i}", f"model.layers.{i}.attn"
        for m, name in (("r", "receptance"), ("k", "key"), ("v", "value")):
            yield f"{b}.time_mix_{name}.weight", s[f"{attn}.{m}_proj.weight"]
        mixes = np.stack([s[f"{attn}.x_{m}"].reshape(1, 1, -1) for m in "rwkvag"])
        yield f"{b}.time_mix_lerp_fused.weight", mixes
        for m in "wavg":
            # The first layer's v is loaded and not used: that of a.
            lora = f"{attn}.{'a' if m == 'v' and i == 0 else m}_lora.lora"
            if m != "g":
                yield f"{b}.time_mix_{m}0.weight", s[f"{lora}.2.bias"]
            yield f"{b}.time_mix_{m}1.weight", s[f"{lora}.0.weight"]
            yield f"{b}.time_mix_{m}2.weight", s[f"{lora}.2.weight"]
        for m in ("k_k", "k_a", "r_k"):
            yield f"{b}.time_mix_{m}.weight", s[f"{attn}.{m}"].reshape(-1)
        mix = s[f"model.layers.{i}.ffn.x_k"].reshape(1, 1, -1)
        yield f"{b}.channel_mix_lerp_k.weight", mix


def _rwkv6(s: _Source, out: GGUFWriter) -> Named:
    layers, shared = _rwkv(s, out, "key.linear")
    first = "model.layers.0.attn"
    rank = s[f"{first}.x_proj.0.linear.weight"].shape[0] // 5
    out.add_time_mix_extra_dim(rank)
    out.add_time_decay_extra_dim(s[f"{first}.w_proj.linear.lora.0.weight"].shape[0])
    out.add_rescale_every_n_layers(0)
    yield from shared
    order = ["rwkvg".index(m) for m in "wkvrg"]  # theirs, from the order in the checkpoint
    for i in layers:
        b, attn, ffn = f"blk.{i}", f"model.layers.{i}.attn", f"model.layers.{i}.ffn"
        for m, name in (("r", "receptance"), ("k", "key"), ("v", "value"), ("g", "gate")):
            yield f"{b}.time_mix_{name}.weight", s[f"{attn}.{m}_proj.linear.weight"]
        yield f"{b}.channel_mix_receptance.weight", s[f"{ffn}.receptance.linear.weight"]
        for m, name in (("k", "key"), ("r", "receptance")):
            yield f"{b}.channel_mix_lerp_{m}.weight", s[f"{ffn}.{name}.mu"].reshape(1, 1, -1)
        down = s[f"{attn}.x_proj.0.linear.weight"]
        width = down.shape[1]
        down = down.reshape(5, rank, width)[order].reshape(5 * rank, width)
        up = s[f"{attn}.x_proj.2.weight"].reshape(width, 5, rank).transpose(1, 0, 2)[order]
        yield f"{b}.time_mix_w1.weight", down
        yield f"{b}.time_mix_w2.weight", up
        yield f"{b}.time_mix_lerp_x.weight", s[f"{attn}.x_proj.0.mu"].reshape(1, 1, -1)
        mixes = s[f"{attn}.x_bias"][order].reshape(5, 1, 1, -1)
        yield f"{b}.time_mix_lerp_fused.weight", mixes
        lora = f"{attn}.w_proj.linear.lora"
        yield f"{b}.time_mix_decay.weight", s[f"{lora}.2.bias"]
        yield f"{b}.time_mix_decay_w1.weight", s[f"{lora}.0.weight"]
        yield f"{b}.time_mix_decay_w2.weight", s[f"{lora}.2.weight"]
        yield f"{b}.time_mix_first.weight", s[f"{attn}.bonus"]


_WRITERS: dict[str, Callable[[_Source, GGUFWriter], Named]] = {
    "mamba": _mamba, "mamba2": _mamba, "rwkv6": _rwkv6, "rwkv7": _rwkv7,
}  # fmt: skip


def _frame(out: GGUFWriter, embeddings: tuple[int, ...], layers: int, feed_forward: int) -> None:
    vocab, width = embeddings
    out.add_context_length(_CONTEXT)
    out.add_embedding_length(width)
    out.add_block_count(layers)
    out.add_feed_forward_length(feed_forward)
    out.add_head_count(0)
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(vocab)


def write(folder: Path, path: Path) -> None:
    """A hub-layout folder as one GGUF file."""
    source = _Source(folder)
    architecture = source.config["model_type"]
    out = GGUFWriter(path, architecture)
    for name, tensor in _WRITERS[architecture](source, out):
        small = tensor.ndim == 1 or "_norm." in name or "lerp" in name
        stays = small or not name.endswith(".weight") or any(f".{n}." in name for n in _FLOAT32)
        out.add_tensor(name, np.ascontiguousarray(tensor, "f4" if stays else "f2"))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def float16(name: str, cache: Path) -> Path:
    """A random model's file in the cache, in float16."""
    path = cache / "random" / f"{name}-f16.gguf"
    if not path.is_file():
        part = path.with_suffix(".part")
        write(random_models.checkpoint(name, cache), part)
        part.replace(path)
    return path
