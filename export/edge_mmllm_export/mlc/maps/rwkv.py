"""MLC maps of RWKV-5.2 and RWKV-6. Source: mlc-llm, `model/{rwkv5,rwkv6}`."""

from __future__ import annotations

from typing import Any

from edge_mmllm_export.mlc.maps.base import Kind, MlcMap, MlcTensor, refuse
from edge_mmllm_export.models.rwkv import LONG
from edge_mmllm_export.models.rwkv5 import Rwkv5
from edge_mmllm_export.models.rwkv6 import Rwkv6

#: The epsilon of their group norms, whatever the model's.
_GROUP_NORM_EPS = 1e-5
#: mlc-llm takes a linear layer of this name with so few rows for the gate of a mixture of experts,
#: and leaves it unquantized. Source: `quantization/utils.py`, `is_moe_gate`.
_GATE_ROWS = 256
_CHUNK = 4096
#: The order in which their RWKV-6 stacks mixes.
_MIXES_6 = "wkvrg"
#: Ranks of mixes and decay that their RWKV-6 has, at a hidden size of 4096 and at any other.
_RANKS_6 = {4096: (64, 128)}
_RANKS_6_ELSE = (32, 64)


def rwkv5(model: Rwkv5) -> MlcMap:
    """Raises: UnsupportedArchitecture."""
    c = model.config
    if c.per_head:
        refuse("its decays are one a head", "rwkv5 5.1", "version 5.2")
    out = _begin(model)
    for i in range(c.layers):
        p, b = f"layers.{i}.att", f"model.blocks.{i}.attention"
        out += _layer(model, i)
        out.append(MlcTensor(f"{b}.time_decay", (f"{p}.w",), change="exp", store="exact"))
        out += [
            MlcTensor(
                f"{b}.time_mix_{LONG[m]}",
                (f"{p}.x_{m}",),
                shape=(1, 1, c.hidden_size),
                change="one_minus",
            )
            for m in "gkvr"
        ]
        out += _channel_mix(model, i, "time_mix", change=True)
    return _map(model, "rwkv5", "5_2", out)


def rwkv6(model: Rwkv6) -> MlcMap:
    """Raises: UnsupportedArchitecture."""
    c, width = model.config, model.hidden_size
    ranks = _RANKS_6.get(width, _RANKS_6_ELSE)
    if (c.mix_rank, c.decay_rank) != ranks:
        refuse(f"its adapters have ranks {c.mix_rank} and {c.decay_rank}", "rwkv6", str(ranks))
    if c.dim_ffn != width // 2 * 7:
        refuse(f"a channel mixing of {c.dim_ffn}", "rwkv6", f"{width // 2 * 7}")
    out = _begin(model)
    for i in range(c.layers):
        p, b = f"layers.{i}.att", f"model.blocks.{i}.attention"
        out += _layer(model, i)
        shape = (1, 1, width)
        out.append(MlcTensor(f"{b}.time_maa_x", (f"{p}.x_x",), shape=shape))
        out += [
            MlcTensor(f"{b}.time_maa_{m}", (f"{p}.mix.{m}.bias",), shape=shape) for m in _MIXES_6
        ]
        ups = tuple(f"{p}.mix.{m}.up" for m in _MIXES_6)
        stacked = (len(ups), c.mix_rank, width)
        out += [
            _mixes_down(model, i, f"{b}.time_maa_w1"),
            MlcTensor(f"{b}.time_maa_w2", ups, shape=stacked, change="transposed"),
            _transposed(f"{b}.time_decay_w1", f"{p}.w.down", (width, c.decay_rank)),
            _transposed(f"{b}.time_decay_w2", f"{p}.w.up", (c.decay_rank, width)),
            MlcTensor(f"{b}.time_decay", (f"{p}.w.bias",), shape=shape, store="exact"),
        ]
        out += _channel_mix(model, i, "time_maa", change=False)
    return _map(model, "rwkv6", "6_0", out)


def _mixes_down(model: Rwkv6, i: int, name: str) -> MlcTensor:
    """The mixes' first adapters, side by side. Raises: UnsupportedArchitecture."""
    c, p = model.config, f"layers.{i}.att.mix."
    ups = [q.name.removeprefix(p) for q in model.parameters() if q.name.startswith(p)]
    if [name[0] for name in ups if name.endswith(".up")] != list(_MIXES_6):
        refuse("its mixes are stacked in another order", "rwkv6", " ".join(_MIXES_6))
    return _transposed(name, f"{p}down", (c.hidden_size, 5 * c.mix_rank))


def _transposed(name: str, part: str, shape: tuple[int, int]) -> MlcTensor:
    return MlcTensor(name, (part,), shape=shape, change="transposed")


def _map(model: Rwkv5 | Rwkv6, name: str, version: str, tensors: list[MlcTensor]) -> MlcMap:
    c = model.config
    if c.heads * c.head_size != c.hidden_size:
        refuse(f"{c.heads} heads of {c.head_size}", name, f"{c.hidden_size} in all")
    config: dict[str, Any] = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.dim_ffn,
        "num_hidden_layers": c.layers,
        "vocab_size": c.vocab_size,
        "model_version": version,
        "tensor_parallel_shards": 1,
        "rescale_every": 0,
        "head_size": c.head_size,
        "layer_norm_epsilon": c.norm_eps,
        "context_window_size": -1,
        "prefill_chunk_size": _CHUNK,
        "num_heads": c.heads,
        "max_batch_size": 1,
    }
    remarks: tuple[str, ...] = ()
    if c.group_norm_eps != _GROUP_NORM_EPS:
        remarks = (
            f"mlc-llm's group norm has epsilon {_GROUP_NORM_EPS:g}, not {c.group_norm_eps:g}",
        )
    tensors += [*_norm("model.ln_out", "ln_out"), _matrix("head", "head", kind="head")]
    return MlcMap(name, config, tensors, True, None, remarks)


def _begin(model: Rwkv5 | Rwkv6) -> list[MlcTensor]:
    out = [_matrix("model.embeddings", "embed", kind="embedding")]
    return out + _norm("model.blocks.0.pre_ln", "ln0")


def _layer(model: Rwkv5 | Rwkv6, i: int) -> list[MlcTensor]:
    """Norms, projections and bonus, which both versions have."""
    p, b = f"layers.{i}", f"model.blocks.{i}"
    out = _norm(f"{b}.ln1", f"{p}.ln1") + _norm(f"{b}.ln2", f"{p}.ln2")
    for m in "rkvgo":
        few = m == "g" and model.hidden_size <= _GATE_ROWS
        kind: Kind = "plain" if few else "matrix"
        out.append(_matrix(f"{b}.attention.{LONG[m]}", f"{p}.att.{m}", kind=kind))
    out += _norm(f"{b}.attention.ln_x", f"{p}.att.ln_x", exact=True)
    out.append(MlcTensor(f"{b}.attention.time_faaaa", (f"{p}.att.u",), store="exact"))
    return out


def _channel_mix(model: Rwkv5 | Rwkv6, i: int, mix: str, *, change: bool) -> list[MlcTensor]:
    p, b = f"layers.{i}.ffn", f"model.blocks.{i}.feed_forward"
    out = [
        MlcTensor(
            f"{b}.{mix}_{LONG[m] if change else m}",
            (f"{p}.x_{m}",),
            shape=(1, 1, model.hidden_size),
            change="one_minus" if change else "same",
        )
        for m in "kr"
    ]
    return out + [_matrix(f"{b}.{LONG[m]}", f"{p}.{m}") for m in "krv"]


def _norm(theirs: str, ours: str, *, exact: bool = False) -> list[MlcTensor]:
    store: Any = "exact" if exact else "model"
    return [
        MlcTensor(f"{theirs}.{part}", (f"{ours}.{part}",), store=store)
        for part in ("weight", "bias")
    ]


def _matrix(name: str, part: str, *, kind: Kind = "matrix") -> MlcTensor:
    return MlcTensor(f"{name}.weight", (part,), kind)
