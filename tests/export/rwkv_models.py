"""Random RWKV checkpoints in the published layouts, with nothing but numpy.

Every vector is random, so that a wrong or forgotten one shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from checkpoint_files import View, state_pickle, write_torch_zip

VOCAB, HIDDEN, HEADS, SIZE, FFN = 96, 48, 3, 16, 80
LAYERS = 3
VERSIONS = ("4", "5.1", "5.2", "6", "7")

Tensors = dict[str, np.ndarray]


class _Random:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, *shape: int, gain: float = 1.3) -> np.ndarray:
        return self.normal(*shape) * np.float32(gain / np.sqrt(shape[-1]))

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        return self._rng.normal(mean, std, shape).astype(np.float32)

    def share(self) -> np.ndarray:
        return self._rng.random((1, 1, HIDDEN)).astype(np.float32)

    def norm(self, name: str, width: int = HIDDEN) -> Tensors:
        return {
            f"{name}.weight": self.normal(width, mean=1, std=0.3),
            f"{name}.bias": self.normal(width, std=0.3),
        }


def blinkdl(version: str, *, dummy_v: bool = False) -> Tensors:
    """A state dict in BlinkDL's layout."""
    r = _Random(int(10 * float(version)))
    out = {"emb.weight": r.matrix(VOCAB, HIDDEN), **r.norm("blocks.0.ln0")}
    for i in range(LAYERS):
        b = f"blocks.{i}"
        out |= {**r.norm(f"{b}.ln1"), **r.norm(f"{b}.ln2")}
        att = _ATT[version](r)
        names = ["receptance", "key", "value", "output"]
        names += ["gate"] if version in ("5.1", "5.2", "6") else []
        att |= {f"{n}.weight": r.matrix(HIDDEN, HIDDEN) for n in names}
        if version != "4":
            att |= r.norm("ln_x")
        if version == "7" and (i or dummy_v):
            att |= {f"v{n}": x for n, x in _adapter(r, 16).items()}
        out |= {f"{b}.att.{n}": x for n, x in att.items()}
        prefix = {"6": "time_maa_", "7": "x_"}.get(version, "time_mix_")
        out |= {f"{b}.ffn.{prefix}{n}": r.share() for n in ("k" if version == "7" else "kr")}
        out[f"{b}.ffn.key.weight"] = r.matrix(FFN, HIDDEN)
        out[f"{b}.ffn.value.weight"] = r.matrix(HIDDEN, FFN)
        if version != "7":
            out[f"{b}.ffn.receptance.weight"] = r.matrix(HIDDEN, HIDDEN)
    return {**out, **r.norm("ln_out"), "head.weight": r.matrix(VOCAB, HIDDEN, gain=3)}


def _adapter(r: _Random, rank: int, bias: float | None = 0.0) -> Tensors:
    out = {"1": r.matrix(rank, HIDDEN).T, "2": r.matrix(HIDDEN, rank).T}
    return out if bias is None else out | {"0": r.normal(1, 1, HIDDEN, mean=bias)}


def _att4(r: _Random) -> Tensors:
    out = {f"time_mix_{m}": r.share() for m in "kvr"}
    return out | {"time_decay": r.normal(HIDDEN, mean=-1), "time_first": r.normal(HIDDEN, mean=0.5)}


def _att5(r: _Random, *shape: int) -> Tensors:
    out = {f"time_mix_{m}": r.share() for m in "kvrg"}
    return out | {"time_decay": r.normal(*shape, mean=-1), "time_faaaa": r.normal(*shape)}


def _att6(r: _Random) -> Tensors:
    out = {f"time_maa_{m}": r.share() for m in "xwkvrg"}
    out |= {"time_maa_w1": r.matrix(5 * 8, HIDDEN).T, "time_maa_w2": r.matrix(5, 8, HIDDEN)}
    decay = _adapter(r, 16, -1.0)
    out |= {"time_decay": decay["0"], "time_decay_w1": decay["1"], "time_decay_w2": decay["2"]}
    return out | {"time_faaaa": r.normal(HEADS, SIZE)}


def _att7(r: _Random) -> Tensors:
    out = {f"x_{m}": r.share() for m in "rwkvag"}
    for m, rank, bias in (("w", 16, -1.0), ("a", 24, 0.5), ("g", 32, None)):
        out |= {f"{m}{n}": x for n, x in _adapter(r, rank, bias).items()}
    out |= {f"k_{m}": r.normal(1, 1, HIDDEN, mean=0.8, std=0.3) for m in "ka"}
    return out | {"r_k": r.normal(HEADS, SIZE, std=0.3)}


_ATT = {
    "4": _att4,
    "5.1": lambda r: _att5(r, HEADS),
    "5.2": lambda r: _att5(r, HEADS, SIZE),
    "6": _att6,
    "7": _att7,
}


def write_pth(path: Path, tensors: Tensors) -> Path:
    """A `.pth` as torch.save lays it out; transposed matrices stay strided views."""
    views, storages = {}, {}
    for i, (name, x) in enumerate(tensors.items()):
        strides = tuple(s // 4 for s in x.strides)
        views[name] = View(str(i), x.size, x.shape, strides)
        storages[str(i)] = (x if x.flags.c_contiguous else x.T).tobytes()
    return write_torch_zip(path, state_pickle(views), storages)


def fla7(tensors: Tensors, *, fused: bool) -> Tensors:
    """RWKV-7 as flash-linear-attention names it; `fused`: the mixes in one `x_x`."""
    out = _fla_frame(tensors)
    for i in range(LAYERS):
        theirs = {
            n.split(".", 3)[3]: x for n, x in tensors.items() if n.startswith(f"blocks.{i}.att.")
        }
        a = f"model.layers.{i}.attn"
        for n, x in theirs.items():
            long = {"receptance": "r", "key": "k", "value": "v", "output": "o"}
            first, _, part = n.partition(".")
            if first in long:
                out[f"{a}.{long[first]}_proj.weight"] = x
            elif first == "ln_x":
                out[f"{a}.g_norm.{part}"] = x
            elif len(n) == 2 and n[1] in "012":
                suffix = {"1": "0.weight", "2": "2.weight", "0": "2.bias"}[n[1]]
                out[f"{a}.{n[0]}_lora.lora.{suffix}"] = np.ravel(x) if n[1] == "0" else x.T
            elif not (fused and n.startswith("x_")):
                out[f"{a}.{n}"] = x if n == "r_k" or n.startswith("x_") else np.ravel(x)
        if fused:
            out[f"{a}.x_x"] = np.concatenate([theirs[f"x_{m}"] for m in "rwkvag"]).reshape(6, -1)
        f = f"model.layers.{i}.ffn"
        out[f"{f}.x_k"] = np.ravel(tensors[f"blocks.{i}.ffn.x_k"])
        for n in ("key", "value"):
            out[f"{f}.{n}.weight"] = tensors[f"blocks.{i}.ffn.{n}.weight"]
    return out


def fla6(tensors: Tensors) -> Tensors:
    """RWKV-6 as flash-linear-attention names it, its mixes in the order r, w, k, v, g."""
    out = _fla_frame(tensors)
    for i in range(LAYERS):
        t = {n.split(".", 2)[2]: x for n, x in tensors.items() if n.startswith(f"blocks.{i}.")}
        a, f = f"model.layers.{i}.attn", f"model.layers.{i}.ffn"
        for m, n in (("r", "receptance"), ("k", "key"), ("v", "value"), ("g", "gate")):
            out[f"{a}.{m}_proj.linear.weight"] = t[f"att.{n}.weight"]
        order = ["wkvrg".index(m) for m in "rwkvg"]
        down = t["att.time_maa_w1"].T.reshape(5, -1, HIDDEN)[order]
        up = t["att.time_maa_w2"][order]
        out |= {
            f"{a}.o_proj.weight": t["att.output.weight"],
            f"{a}.x_proj.0.mu": np.ravel(t["att.time_maa_x"]),
            f"{a}.x_proj.0.linear.weight": down.reshape(-1, HIDDEN),
            f"{a}.x_proj.2.weight": up.reshape(-1, HIDDEN).T,
            f"{a}.x_bias": np.concatenate([t[f"att.time_maa_{m}"][0] for m in "rwkvg"]),
            f"{a}.w_proj.linear.lora.0.weight": t["att.time_decay_w1"].T,
            f"{a}.w_proj.linear.lora.2.weight": t["att.time_decay_w2"].T,
            f"{a}.w_proj.linear.lora.2.bias": np.ravel(t["att.time_decay"]),
            f"{a}.bonus": t["att.time_faaaa"],
            f"{a}.g_norm.weight": t["att.ln_x.weight"],
            f"{a}.g_norm.bias": t["att.ln_x.bias"],
            f"{f}.key.linear.weight": t["ffn.key.weight"],
            f"{f}.key.mu": np.ravel(t["ffn.time_maa_k"]),
            f"{f}.receptance.linear.weight": t["ffn.receptance.weight"],
            f"{f}.receptance.mu": np.ravel(t["ffn.time_maa_r"]),
            f"{f}.value.weight": t["ffn.value.weight"],
        }
    return out


def _fla_frame(tensors: Tensors) -> Tensors:
    names = {"emb": "model.embeddings", "head": "lm_head", "ln_out": "model.norm"}
    names["blocks.0.ln0"] = "model.layers.0.pre_norm"
    for i in range(LAYERS):
        names[f"blocks.{i}.ln1"] = f"model.layers.{i}.attn_norm"
        names[f"blocks.{i}.ln2"] = f"model.layers.{i}.ffn_norm"
    found = {n: n.rsplit(".", 1) for n in tensors}
    return {f"{names[a]}.{b}": tensors[n] for n, (a, b) in found.items() if a in names}


def write_hub(folder: Path, tensors: Tensors, **config: object) -> Path:
    """A hub folder."""
    import safetensors.numpy

    folder.mkdir(exist_ok=True)
    whole = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    safetensors.numpy.save_file(whole, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
