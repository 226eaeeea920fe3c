"""The recurrences of RWKV in float32 numpy, token by token as the papers write them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.ops.base import Wkv7, Wkv7Weights

Array = NDArray[Any]

#: exp(-1/2): how far one token may decay the state at most, in nats (RWKV-7).
DECAY_NATS = np.float32(np.exp(-0.5))


def wkv4(k: Array, v: Array, decay: Array, bonus: Array, state: Array) -> tuple[Array, Array]:
    """See `Ops.wkv4`. state `(3, C)`; returns y `(seq, C)` and the new state."""
    a, b, m = state
    m = np.where(b > 0, m, np.float32(-1e38))
    y = np.empty_like(k)
    for t in range(len(k)):
        now = bonus + k[t]
        top = np.maximum(m, now)
        old, new = np.exp(m - top), np.exp(now - top)
        y[t] = (old * a + new * v[t]) / (old * b + new)
        top = np.maximum(m + decay, k[t])
        old, new = np.exp(m + decay - top), np.exp(k[t] - top)
        a, b, m = old * a + new * v[t], old * b + new, top
    return y, np.stack([a, b, m])


def wkv6(
    r: Array, k: Array, v: Array, log_decay: Array, bonus: Array, state: Array
) -> tuple[Array, Array]:
    """See `Ops.wkv6`. bonus `(heads, d)`, state `(heads, d, d)`; returns y and the new state."""
    s = state.copy()
    rows = (len(r), *bonus.shape)
    r, k, v, w = (np.reshape(x, rows) for x in (r, k, v, np.exp(log_decay)))
    y = np.empty_like(v)
    for t in range(len(r)):
        outer = k[t][:, :, None] * v[t][:, None, :]
        y[t] = np.matmul(r[t][:, None, :], s + bonus[:, :, None] * outer)[:, 0]
        s = s * w[t][:, :, None] + outer
    return y.reshape(len(y), -1), s


def wkv7(x: Wkv7[Array], weights: Wkv7Weights, state: Array) -> tuple[Array, Array, Array]:
    """See `Ops.wkv7`. state `(heads, d, d)`; returns y, the bonus and the new state."""
    s = state.copy()
    rows = (len(x.r), *weights.r_k.shape)
    keys = (x.k * (1 + (x.rate - 1) * weights.k_a.values)).reshape(rows)
    removed = (x.k * weights.k_k.values).reshape(rows)
    length = np.sqrt(np.sum(removed * removed, axis=-1, keepdims=True))
    removed = removed / np.maximum(length, np.float32(1e-12))
    written = removed * x.rate.reshape(rows)
    w = np.exp(-DECAY_NATS * x.gate).reshape(rows)
    r, v = x.r.reshape(rows), x.v.reshape(rows)
    y = np.empty_like(v)
    for t in range(len(r)):
        old = np.matmul(removed[t][:, None, :], s)
        s = s * w[t][:, :, None] - written[t][:, :, None] * old
        s += keys[t][:, :, None] * v[t][:, None, :]
        y[t] = np.matmul(r[t][:, None, :], s)[:, 0]
    bonus = np.sum(r * keys * weights.r_k.values, axis=-1, keepdims=True) * v
    return y.reshape(len(y), -1), bonus.reshape(len(y), -1), s
